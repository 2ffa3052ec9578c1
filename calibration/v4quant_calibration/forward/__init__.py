"""The reference forward pass, streamed layer by layer over a checkpoint."""
