"""What conversions, solvers and kernels cost on this machine."""
