"""v4quant: released DeepSeek-V4 weights to a checkpoint you can serve, with proof of its cost."""

import v4quant_kernels  # noqa: F401  settles OpenMP before anything loads torch

__version__ = "0.1.0"
