"""What Triton's interpreter lets pass and a GPU may not: accesses outside the tensors of a launch.

The interpreter reads and writes this process's memory wherever a pointer leads, and gives zeros for
what a load leaves out, where a GPU gives whatever the register held. Here an address outside every
tensor of the launch is an error, read or written, and what is left out without `other=` is garbage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from torch import Tensor

Words = np.ndarray[Any, np.dtype[np.uint64]]

WILD, FAR = 0xFF, 0x7F
"""Bytes of garbage: NaN in all floats, E4M3 and E8M0 included; a large number of wider integers."""


@dataclass(frozen=True)
class Ranges:
    """The bytes of a launch's tensors: sorted, disjoint ranges from `starts` to before `ends`."""

    starts: Words
    ends: Words

    def holds(self, addresses: Words, size: int) -> bool:
        """Whether `size` bytes from each address on lie within one of the ranges."""
        place = np.searchsorted(self.starts, addresses, side="right")
        ends = np.concatenate((np.zeros(1, np.uint64), self.ends))[place]
        return bool((addresses + np.uint64(size) <= ends).all())


def ranges_of(tensors: list[Tensor]) -> Ranges:
    """Of tensors that may overlap."""
    spans = []
    for x in tensors:
        if x.numel():
            last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            spans.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    starts, ends = np.array(merged, dtype=np.uint64).reshape(-1, 2).T
    return Ranges(np.ascontiguousarray(starts), np.ascontiguousarray(ends))


@contextmanager
def strict_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While this lasts, interpreted kernels keep to their tensors and know no friendly zeros."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    launched: list[tuple[str, Ranges]] = []
    call = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        launched.append((self.fn.__name__, ranges_of(tensors)))
        try:
            return call(self, *args, **kwargs)
        finally:
            launched.pop()

    def check(pointers: Any, mask: Any, how: str) -> None:
        name, ranges = launched[-1]
        addresses, taken = np.broadcast_arrays(pointers.data, mask.data.astype(bool))
        size = pointers.get_element_ty().primitive_bitwidth // 8
        assert ranges.holds(addresses[taken], size), f"{name} {how} outside its tensors"

    def checked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        check(pointers, mask, "reads")
        if other is None:
            element = pointers.get_element_ty()
            dtype = load(self, pointers, none_of(mask), None, *rest).data.dtype
            byte = WILD if dtype.itemsize == 1 or element.is_floating() else FAR
            filled = np.full((*pointers.data.shape, dtype.itemsize), byte, np.uint8)
            other = TensorHandle(filled.view(dtype)[..., 0], element)
        return load(self, pointers, mask, other, *rest)

    def none_of(mask: Any) -> Any:
        return TensorHandle(np.zeros_like(mask.data), mask.dtype)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "writes")
        return store(self, pointers, value, mask, *rest)

    changed: dict[tuple[Any, str], Callable[..., Any]] = {
        (GridExecutor, "__call__"): run,
        (InterpreterBuilder, "create_masked_load"): checked_load,
        (InterpreterBuilder, "create_masked_store"): checked_store,
    }
    with monkeypatch.context() as patch:
        for (owner, name), function in changed.items():
            patch.setattr(owner, name, function)
        yield
