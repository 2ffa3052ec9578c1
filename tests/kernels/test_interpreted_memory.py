"""The strict memory of the interpreter catches what it is there for."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU checks its own addresses"
)


@triton.jit
def copy(x_ptr: Any, out_ptr: Any, first: Any, read: Any, written: Any, BLOCK: tl.constexpr) -> Any:
    place = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < read)
    tl.store(out_ptr + place, x, mask=place < written)


def run(first: int, read: int, written: int, shift: int = 0) -> torch.Tensor:
    whole = torch.arange(40, dtype=torch.int32)
    out = torch.zeros(40, dtype=torch.int32)
    copy[(1,)](whole[shift : shift + 9], out[20:29], first, read, written, BLOCK=16)
    return out[20:29]


def test_a_kernel_keeps_to_its_tensors() -> None:
    assert run(0, 9, 9, 5).tolist() == list(range(5, 14))
    for arguments in ((0, 10, 9), (-1, 9, 9), (0, 16, 0, 24)):
        with pytest.raises(Exception, match="copy reads outside its tensors"):
            run(*arguments)
    with pytest.raises(Exception, match="copy writes outside its tensors"):
        run(0, 9, 10)


def test_what_a_load_leaves_out_is_no_zero() -> None:
    assert run(0, 7, 9).tolist() == [*range(7), 0x7F7F7F7F, 0x7F7F7F7F]
