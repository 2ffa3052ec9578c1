"""Whether Triton runs its kernels in its interpreter, and what that changes.

With TRITON_INTERPRET=1 in the environment *before* Triton is imported, kernels run in numpy on CPU
tensors: slowly, but anywhere Triton can be imported. The kernels here keep to what the interpreter
computes correctly, with one switch: it has no bfloat16 arithmetic, so there tiles are multiplied as
float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


@triton.jit
def _probe(ptr):
    tl.store(ptr, 0)


def interpreting() -> bool:
    """True when this process's kernels are interpreted; decided when this module was imported."""
    return isinstance(_probe, InterpretedFunction)


def compute_type() -> tl.dtype:
    """The type tiles are multiplied in: bfloat16, or float32 under the interpreter."""
    return tl.float32 if interpreting() else tl.bfloat16
