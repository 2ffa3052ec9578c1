"""What the wrappers launch, as Triton itself would compile it, without a GPU.

    python kernels/bench/launches.py    JSON on stdout: kernel, architecture, unforeseen, error

`compile_grid.py` writes down what it believes kernels are launched with. Here the functions that
launch them run on tensors of the CPU under a driver that names an architecture and runs nothing:
Triton looks at the real arguments, and what it would then compile is taken to its first form.
`unforeseen` are arguments of types that the grid compiles the kernel for nowhere.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from compile_grid import jobs, launch_of
from specialisations import lowered
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from v4quant_kernels.codec import quantize
from v4quant_kernels.dispatch import operand_for
from v4quant_kernels.experts import ExpertWeights, stack_experts
from v4quant_kernels.gpu import feedback, indexer, moe, topk
from v4quant_kernels.runtime import prepare_experts
from v4quant_kernels.scheme import get_scheme

ARCHITECTURES = (80, 90, 100, 120)
HIDDEN, WIDTH, EXPERTS = 256, 128, 3


@dataclass(frozen=True)
class NoGpu:
    """A driver as Triton asks for one before it compiles."""

    arch: int

    def get_current_device(self) -> int:
        """A number for each architecture, so that Triton keeps their kernels apart."""
        return self.arch

    def get_current_stream(self, _: int) -> int:
        """Nothing is put there."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", self.arch, 32)


def foreseen() -> dict[tuple[str, str], set[str]]:
    """Types of each kernel's arguments in the grid; ids and maps may be any integers."""
    found: dict[tuple[str, str], set[str]] = {}
    for job in jobs(full=True):
        for name, kind in launch_of(job).types.items():
            found.setdefault((job.kernel, name), {"constexpr"}).add(kind)
            if name in {"ids_ptr", "map_ptr"}:
                found[job.kernel, name] |= {"*i8", "*i16", "*i32", "*i64"}
    return found


class Seen:
    """Collects what Triton is about to compile, and keeps it from that."""

    def __init__(self) -> None:
        self.foreseen = foreseen()
        self.records: dict[tuple[str, str], dict[str, Any]] = {}

    def __call__(self, *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook before a compilation; True: there is no need for it."""
        function, arch = fn.jit_function, triton.runtime.driver.active.arch
        this = function.__name__, key  # the first form is that of all architectures
        if this in self.records:
            return True
        options = {k: compile[k] for k in ("num_warps", "num_stages")}
        signature, constants = compile["signature"], compile["constants"]
        source = ASTSource(function, signature, constants, compile["configs"][0])
        known = self.foreseen
        new = [f"{n}: {k}" for n, k in signature.items() if k not in known[function.__name__, n]]
        record = {"kernel": function.__name__, "arch": arch, "unforeseen": new}
        self.records[this] = record
        try:
            lowered(source, options, arch)
        except Exception as error:  # noqa: BLE001  # any failure to compile is the finding
            record["error"] = f"{type(error).__name__}: {error}"
        return True


def experts(scheme: str) -> ExpertWeights:
    """Zeros: nothing is multiplied."""

    def matrix(rows: int, columns: int) -> Any:
        return quantize(torch.zeros(rows, columns), get_scheme(scheme))

    triple = matrix(WIDTH, HIDDEN), matrix(WIDTH, HIDDEN), matrix(HIDDEN, WIDTH)
    return stack_experts([triple] * EXPERTS)


def mixtures(arch: int) -> Iterator[Callable[[], object]]:
    """One token, many, and so many that slots are counted first; with maps and without."""
    for scheme, activations in product(("mxfp4", "int4-g32", "bf16"), ("bf16", "e4m3")):
        prepared = prepare_experts(experts(scheme), operand_for(arch, activations))  # type: ignore[arg-type]
        for tokens, top_k, ids_type in ((1, 1, torch.int64), (70, 6, torch.int32)):
            x = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
            ids, routing = torch.zeros(tokens, top_k, dtype=ids_type), torch.zeros(tokens, top_k)
            for expert_map in (None, torch.zeros(5, dtype=torch.int64)):
                yield lambda a=(x, ids, routing, prepared, 10, expert_map, activations): moe.moe(
                    *a, arch=arch
                )
    many = torch.zeros(5000, HIDDEN, dtype=torch.bfloat16)
    ids, routing = torch.zeros(5000, 1, dtype=torch.int64), torch.zeros(5000, 1)
    yield lambda: moe.moe(many, ids, routing, prepared, 10.0, None, "e4m3", arch=arch)


def selections(arch: int) -> Iterator[Callable[[], object]]:
    """A decoding token, tokens that share keys, and a ragged batch; one key and several."""
    for tokens, keys in product((1, 9), (1, 300)):
        arguments: list[Tensor] = [
            torch.zeros(tokens, 64, 64, dtype=torch.uint8),
            torch.full((tokens, 64, 4), 127, dtype=torch.uint8),
            torch.full((keys, 68), 127, dtype=torch.uint8),
            torch.zeros(tokens, 64),
        ]
        first = torch.zeros(tokens, dtype=torch.int64)
        yield lambda a=arguments: indexer.index_top_k(*a, 512, arch=arch)
        yield lambda a=arguments, f=first: indexer.indexer_logits(
            *a, first_key=f, num_keys=1, arch=arch
        )
    yield lambda: topk.top_k(torch.zeros(2, 5000), 2048)


def roundings() -> Iterator[Callable[[], object]]:
    """Error feedback in groups of 32, of one row and of several."""
    for rows in (1, 40):
        values, integers = torch.zeros(2, 32, rows), torch.zeros(2, 32, rows)
        scale, square = torch.ones(2, rows), torch.zeros(2, 32, 32)
        cost, sizes = torch.ones(2, 32), torch.ones(2, 41, rows)
        yield lambda v=values, c=cost, s=sizes: feedback.best_scale(v, c, s, -8, 7)
        for function in (feedback.round_group, feedback.code_steps):
            yield lambda f=function, a=(values, scale, square, -8, 7, integers): f(*a)


def main() -> None:
    seen = Seen()
    triton.knobs.runtime.jit_cache_hook = seen
    for arch in ARCHITECTURES:
        triton.runtime.driver.set_active(NoGpu(arch))
        for launch in (*mixtures(arch), *selections(arch), *(roundings() if arch == 90 else ())):
            launch()
    sys.stdout.write(json.dumps(list(seen.records.values())))


if __name__ == "__main__":
    main()
