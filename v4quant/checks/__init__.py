"""What is true of a checkpoint: inspect, verify, diff, kernels on its tensors."""
