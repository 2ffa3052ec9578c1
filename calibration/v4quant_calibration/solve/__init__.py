"""Solving a checkpoint layer by layer while the text passes through it."""
