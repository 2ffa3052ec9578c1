"""Kernels timed against the floors of the same machine, and against other people's kernels."""
