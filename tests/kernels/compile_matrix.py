"""Compiles every kernel for every architecture, without a GPU; JSON on stdout.

Run by `test_compile.py` as its own process, because Triton cannot both interpret and compile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from v4quant_kernels.experts import StackedMatrix
from v4quant_kernels.gpu import activation, indexer, moe, routing
from v4quant_kernels.scheme import SCHEMES

ARCHITECTURES = (80, 89, 90, 100, 120)
TYPES = {
    **dict.fromkeys(("x_ptr", "h_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("y_ptr", "routing_ptr", "head_weights_ptr", "logits_ptr"), "*fp32"),
    **dict.fromkeys(("g1_ptr", "g3_ptr", "g2_ptr"), "*fp32"),
    **dict.fromkeys(("w1_ptr", "w3_ptr", "w2_ptr", "s1_ptr", "s3_ptr", "s2_ptr"), "*u8"),
    **dict.fromkeys(("q_codes_ptr", "q_scale_ptr", "k_ptr"), "*u8"),
    **dict.fromkeys(("sorted_slots_ptr", "tile_expert_ptr", "counts_ptr"), "*i32"),
    **dict.fromkeys(("expert_ids_ptr", "end_ptr"), "*i32"),
    "swiglu_limit": "fp32",
}
ALIGNED = ("N", "row_bytes", "hidden", "columns")  # multiples of 16 in every release

Job = tuple[str, str, int, dict[str, Any]]


def gemm(scheme: str, slots_per_expert: int) -> dict[str, Any]:
    """Constants and options the launcher would use for this scheme."""
    dtype = torch.bfloat16 if SCHEMES[scheme].scale == "bf16" else torch.uint8
    codes = torch.empty(1, 1, 1, dtype=torch.uint8)
    scale = torch.empty(1, 1, 1, dtype=dtype)
    matrix = StackedMatrix(SCHEMES[scheme], (2048, 4096), codes, scale, torch.ones(1))
    tile = moe.choose_tile(slots_per_expert, matrix)
    return moe._constants(matrix, tile, tl.bfloat16)


def jobs() -> Iterator[Job]:
    score = {"D": 128, "HEADS": 64, "BS": 128, "BQ": 8, "ROUND_PRODUCTS": False}
    few, many = [("mxfp4", 1), ("int4-g128", 1)], [("mxfp4", 64), ("int4-g128", 128)]
    for arch in ARCHITECTURES:
        for scheme, slots in {80: few + many, 89: few[:1], 90: few + many}.get(arch, many):
            yield "gate_up_kernel", f"{scheme} {slots}", arch, {"TOP_K": 6, **gemm(scheme, slots)}
        yield "down_kernel", "mxfp4 128", arch, gemm("mxfp4", 128)
        yield "indexer_kernel", "", arch, {**score, "COMPUTE": tl.bfloat16}
    for scheme in ("nvfp4", "fp8", "mxfp8", "int8-g32", "int3-g64", "bf16"):
        yield "gate_up_kernel", f"{scheme} 128", 90, {"TOP_K": 6, **gemm(scheme, 128)}
    for arch in (80, 120):
        yield "count_kernel", "", arch, {"BLOCK": 1024}
        yield "place_kernel", "", arch, {"BM": 16, "EXPERTS": 512, "BLOCK": 1024}
        yield "combine_kernel", "", arch, {"TOP_K": 6, "BLOCK": 512}
        yield "fake_quant_e4m3_kernel", "", arch, {"BLOCK": 128}


def signature(names: list[str], constants: dict[str, Any]) -> dict[str, str]:
    types = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in names}
    if constants.get("SCALE") == "bf16":
        types |= dict.fromkeys((n for n in names if re.fullmatch(r"s\d_ptr", n)), "*bf16")
    if constants.get("ELEMENT") == "bf16":
        types |= dict.fromkeys((n for n in names if re.fullmatch(r"w\d_ptr", n)), "*bf16")
    return types


def compile_one(job: Job) -> dict[str, Any]:
    kernel, variant, arch, constants = job
    modules = (moe, indexer, routing, activation)
    function = next(getattr(m, kernel) for m in modules if hasattr(m, kernel))
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    types = signature(function.arg_names, constants)
    aligned = [i for i, n in enumerate(types) if types[n].startswith("*") or n in ALIGNED]
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel,
        "variant": variant,
        "arch": arch,
        "registers": resources["REG"],
        "spilled_bytes": resources["STACK"] + resources["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "mma": sorted(set(re.findall(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)", ptx))),
        "flushing": re.findall(r"\b(?:mul|fma|add)\S*\.ftz\S*", ptx),
        "atomics": re.findall(r"\b(?:atom|red)\.global\S*", ptx),
    }


def main() -> None:
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        sys.stdout.write(json.dumps(list(pool.map(compile_one, jobs()))))


if __name__ == "__main__":
    main()
