"""The torch twin of every Triton kernel: same signature, same meaning."""
