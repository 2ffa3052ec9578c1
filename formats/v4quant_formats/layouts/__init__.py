"""What each container's tensors and configuration look like."""
