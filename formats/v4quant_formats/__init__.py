"""Checkpoints as files: headers, layouts, names and what engines expect."""

import v4quant_kernels  # noqa: F401  settles OpenMP before anything loads torch
