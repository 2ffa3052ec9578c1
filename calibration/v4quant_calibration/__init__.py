"""The reference forward pass, what is measured on it, and solvers that use it."""

import v4quant_kernels  # noqa: F401  settles OpenMP before anything loads torch
