"""Number formats, kernels and their twins. The first import settles how OpenMP's threads wait."""

from v4quant_kernels import openmp

openmp.set_defaults()
