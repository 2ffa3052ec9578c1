"""Compiled searches for the scales and minima of GGML blocks."""
