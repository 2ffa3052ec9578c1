"""A scheme for every place of the model, within a size."""
