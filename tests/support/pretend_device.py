"""A second device that is not there: who mixes its tensors with the CPU's is caught without a GPU.

Tensors "on" DEVICE are ordinary ones with a mark. While `PretendDevice` is entered, whatever makes
a tensor from marked ones marks it, `.to` and `device=` set and clear the mark, and an operation on
tensors with and without raises what CUDA would raise. Values are the CPU's own, so a run there must
give the same figures to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
# Operations that may read tensors of two devices: copies, and indices from the CPU.
_MIXED = {"copy_", "__setitem__", "__getitem__"}
_CPU_ONLY = {"numpy", "__array__"}


class Elsewhere(torch.Tensor):
    """A marked tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class PretendDevice(TorchFunctionMode):
    """While entered, DEVICE can be asked for and its tensors keep apart.

    products: matrix products there, and on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = [0, 0]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        given = list(_tensors((args, kwargs)))
        marked = any(isinstance(t, Elsewhere) for t in given)
        if name == "__get__" and marked:
            known = {
                Tensor.device: DEVICE, Tensor.is_cuda: True, Tensor.is_cpu: False
            }  # fmt: skip
            for attribute, value in known.items():
                if func == attribute.__get__:  # type: ignore[attr-defined]
                    return value
        if name in _CPU_ONLY and marked:
            raise TypeError(f"can't convert a tensor of {DEVICE} to numpy")
        sized = [t for t in given if t.dim() > 0]
        mixed = marked and not all(isinstance(t, Elsewhere) for t in sized)
        if mixed and name not in _MIXED:
            shapes = [(type(t).__name__, list(t.shape)) for t in sized]
            raise RuntimeError(f"{name}: tensors of two devices, {shapes}")
        if "matmul" in name:
            self.products[0 if marked else 1] += 1
        target = _target(name, args, kwargs)
        if target is not None:
            args, kwargs = _without_device(args, kwargs)
            marked = target == DEVICE
        elif name == "cpu":
            marked = False
        elif name in _MIXED:
            marked = isinstance(args[0], Elsewhere)
        return _mark(func(*_plain(args), **_plain(kwargs)), marked)


def _target(name: str, args: Any, kwargs: Any) -> torch.device | None:
    """The device an operation asks for."""
    wanted = kwargs.get("device")
    if name == "to" and wanted is None:
        wanted = next((a for a in args[1:] if isinstance(a, torch.device | str)), None)
    if wanted is None:
        return None
    found = torch.device(wanted)
    return DEVICE if found.type == "cuda" else found


def _without_device(args: Any, kwargs: Any) -> tuple[Any, Any]:
    cpu = torch.device("cpu")
    changed = tuple(cpu if isinstance(a, torch.device | str) else a for a in args)
    return changed, {k: cpu if k == "device" else v for k, v in kwargs.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _plain(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.as_subclass(torch.Tensor)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_plain(v) for v in value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _mark(value: Any, marked: bool) -> Any:
    if isinstance(value, Tensor):
        if isinstance(value, Elsewhere) or not marked:
            return value
        return value.as_subclass(Elsewhere)
    if isinstance(value, list | tuple) and marked:
        parts = [_mark(v, marked) for v in value]
        return type(value)(parts)  # named results take a list as well
    return value
