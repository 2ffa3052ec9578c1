"""Which library and which operands multiply fastest on this CPU, found out by trying.

A flag says what a processor could do, not what a library does with it: oneDNN takes float32
operands as BF16 on processors with AMX, and on those with AVX512_BF16 alone it ignores the
permission; torch's default for float32 is slower than oneDNN on AMD processors and as fast on
others. So the first large product runs a few small ones, a tenth of a second in all.
Nothing runs when this module is imported.

The library for float32 decides the order of sums, hence last digits. What was found is therefore
kept in the user's cache folder, for this torch, processor and number of threads, and what keeps
libraries from instructions the processor has; a run that is resumed gives the digits that the whole
run would have given. V4QUANT_FLOAT32=default or =onednn decides instead.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import SCHEMES
from v4quant_kernels.twins.bf16_product import Way, exact_product, product_of_bf16
from v4quant_kernels.twins.onednn_product import onednn_product
from v4quant_kernels.user_cache import cache_folder

Library = Literal["default", "onednn"]
VARIABLE = "V4QUANT_FLOAT32"
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""What keeps oneDNN and MKL from instructions the processor has."""
FEW, MANY = 8, 128
"""Rows of the products that are tried; from the middle on a product counts as one of many rows."""
_MIDDLE = (FEW + MANY) // 2

_LARGE = 1 << 24
"""Multiplications and rows of a matrix from which the library is worth asking about."""
_LEAST_ROWS = 4
_K, _COLUMNS = 4096, 1024
_TRIES = 5
_WORTH = 0.95  # of the time of the default: a smaller gain may be chance


def product(a: Tensor, b: Tensor) -> Tensor:
    """float32 a @ b, by the library that is faster here where that matters.

    `[..., m, k]` and `[k, n]`, or `[g, m, k]` and `[g, k, n]`. Small products, those on a GPU and
    those with gradients are torch's own.
    """
    if (
        a.is_cuda
        or a.dtype != torch.float32
        or a.dim() < 2
        or b.dim() not in {2, a.dim() if a.dim() == 3 else 2}
        or a.shape[-2] < _LEAST_ROWS
        or a.shape[-2] * b.shape[-2] * b.shape[-1] < _LARGE
        or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        or float32_library(a.shape[-2] >= _MIDDLE) == "default"
    ):
        return a @ b
    return onednn_product(a, b)


@cache
def float32_library(many: bool) -> Library:
    """Who takes large float32 products of many or few rows: what the user says, what was found
    before, or a probe."""
    said = os.environ.get(VARIABLE)
    if said in {"default", "onednn"}:
        return said if said == "default" or available() else "default"  # type: ignore[return-value]
    if not available():
        return "default"
    return _kept(many)


def available() -> bool:
    """Whether this torch has the operation of `onednn_product`."""
    found = torch.backends.mkldnn.is_available()
    return bool(found) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def decided() -> str | None:
    """Who takes large float32 products in this process, None if none has been asked for."""
    if not float32_library.cache_info().currsize:
        return None
    few, many = float32_library(False), float32_library(True)
    return few if few == many else f"{few}, from {_MIDDLE} rows on {many}"


def _probe_library(many: bool) -> Library:
    """oneDNN, if it multiplies float32 as it is and takes clearly less time."""
    b = torch.full((_COLUMNS, _K), 1 + 2.0**-10)
    exact = bool((onednn_product(torch.ones(MANY, _K), b.T) == _K * (1 + 2.0**-10)).all())
    rows = MANY if many else FEW
    faster = exact and _is_faster(_float32_by(onednn_product), _float32_by(torch.matmul), rows)
    return "onednn" if faster else "default"


def _float32_by(multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], object]:
    b = torch.ones(_COLUMNS, _K)
    return lambda rows: multiply(torch.ones(rows, _K), b.T)


def _kept(many: bool) -> Library:
    """What the cache folder says for this machine; else what the probe finds, written there."""
    file = cache_folder() / "float32.json"
    words = torch.__version__, _processor(), *_limits(), torch.get_num_threads(), "threads"
    key = " ".join(map(str, (*words, "many rows" if many else "few rows")))
    known: dict[str, Library] = {}
    with suppress(OSError, ValueError, RecursionError):
        stored = json.loads(_head(file)) if file.is_file() else {}
        if isinstance(stored, dict):
            known = {k: v for k, v in stored.items() if v in ("default", "onednn")}
    if key not in known:
        known[key] = _probe_library(many)
        with suppress(OSError):
            _write(file, json.dumps(known, indent=1))
    return known[key]


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(1 << 16)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "wb") as out:
        out.write(text.encode())
    Path(name).replace(file)


def _limits() -> list[str]:
    """What torch takes of the processor, and what keeps its libraries from more."""
    said = (f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ)
    return [str(torch.backends.cpu.get_cpu_capability()), *said]


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


@cache
def has_bf16_units() -> bool:
    """Whether products by "units" are taken from BF16 operands here, and sooner than in float32."""
    return takes_bf16() and all(
        _is_faster(_bf16_by("units"), _bf16_by("rounded"), rows) for rows in (FEW, MANY)
    )


@cache
def takes_bf16() -> bool:
    """Whether the library rounds operands to BF16 once it may.

    Each product of the probe is 1 + 2^-10, which is not a BF16 number and rounds to 1.
    """
    a, b = torch.ones(MANY, _K), torch.full((_COLUMNS, _K), 1 + 2.0**-10)
    return bool((product_of_bf16(a, b.T, "units") == _K).all())


def _bf16_by(way: Way) -> Callable[[int], object]:
    b = torch.ones(_COLUMNS, _K)
    return lambda rows: product_of_bf16(torch.ones(rows, _K), b.T, way)


def fastest_way(x: Tensor, weight: QTensor) -> Way:
    """How a CPU takes `exact_product` of x and weight soonest: by "units" or in "f32"."""
    if not takes_bf16():
        return "f32"
    many = x.shape[0] >= _MIDDLE
    return "units" if _units_pay(weight.scheme.element == "int", many) else "f32"


@cache
def _units_pay(integers: bool, many: bool) -> bool:
    """Whether units are faster for such weights; integers take two products and a split."""
    scheme, groups = SCHEMES["int8-g128" if integers else "mxfp8"], (128 if integers else 32)
    codes = torch.full((_COLUMNS, _K), 0x81 if integers else 0x38, dtype=torch.uint8)
    scale = torch.ones(_COLUMNS, _K // groups)
    weight = QTensor(
        scheme,
        (_COLUMNS, _K),
        codes if integers else codes.view(torch.float8_e4m3fn),
        scale.bfloat16() if integers else scale.to(torch.float8_e8m0fnu),
    )

    def by(way: Way) -> Callable[[int], object]:
        return lambda rows: exact_product(torch.ones(rows, _K), weight, way, product)

    return _is_faster(by("units"), by("f32"), MANY if many else FEW)


def _is_faster(one: Callable[[int], object], other: Callable[[int], object], rows: int) -> bool:
    """Whether `one` takes clearly less time, the best of a few turns each."""
    best = [float("inf")] * 2
    for _ in range(_TRIES):
        for i, each in enumerate((one, other)):
            best[i] = min(best[i], _seconds(each, rows))
    return best[0] < _WORTH * best[1]


def _seconds(work: Callable[[int], object], rows: int) -> float:
    """Processor time, of which neighbours take none."""
    start = time.process_time()
    work(rows)
    return time.process_time() - start
