"""Compiles every kernel for every architecture without a GPU, and counts its instructions.

    python kernels/bench/compile_grid.py            a sample, JSON on stdout (what the tests run)
    python kernels/bench/compile_grid.py --full     every format, tile size, epilogue, architecture
    python kernels/bench/compile_grid.py --full --write     and store the counts as the new baseline
    ... --only=REGEX                                only kernels whose name matches
    python kernels/bench/compile_grid.py --special  every kernel as Triton specialises it

For each kernel: registers, spilled bytes and shared memory as ptxas and Triton report them, which
matrix instructions the machine code holds, and how many instructions one pass of the innermost loop
with a matrix instruction spends per weight (per score for the indexer). The count is static: it
says what the issue slots allow, not how long the kernel takes. Run in a process without Triton's
interpreter.
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
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton.backends.nvidia
import triton.language as tl
from specialisations import Launch, first_form, specials
from triton.backends.compiler import GPUTarget

from v4quant_kernels.dispatch import operand_for
from v4quant_kernels.gpu import (
    activation,
    feedback,
    gemm,
    index_scores,
    index_vectors,
    indexer,
    moe,
    routing,
    tiles,
    topk,
)
from v4quant_kernels.gpu import scaled_gemm as native
from v4quant_kernels.runtime import RuntimeMatrix, layout_codes
from v4quant_kernels.scheme import SCHEMES
from v4quant_kernels.words import SPREAD, STEP, columns_per_word

BASELINE = Path(__file__).with_name("instructions.json")
ARCHITECTURES = (80, 89, 90, 100, 120)
HIDDEN, WIDTH, TOP_K = 4096, 2048, 6
TYPES = {
    **dict.fromkeys(("x_ptr", "h_ptr", "out_ptr", "codes_ptr"), "*bf16"),
    **dict.fromkeys(("y_ptr", "routing_ptr", "head_weights_ptr", "logits_ptr"), "*fp32"),
    **dict.fromkeys(("row_scale_ptr", "sums_ptr", "weight_ptr", "k_factor_ptr"), "*fp32"),
    **dict.fromkeys(("scale_ptr", "x_scale_ptr", "k_bytes_ptr"), "*u8"),
    **dict.fromkeys(("words_ptr", "sorted_slots_ptr", "tile_expert_ptr"), "*i32"),
    **dict.fromkeys(("counts_ptr", "end_ptr", "reference_ptr", "map_ptr"), "*i32"),
    **dict.fromkeys(("first_key_ptr", "q_scale_ptr", "q_words_ptr", "k_words_ptr"), "*i32"),
    "ids_ptr": "*i64",
    "limit": "fp32",
}
MATRIX = r"\b((?:[UHQI]*G?MMA|OMMA|UTC\w*MMA|UTCQMMA|QMMA)[\w.]*)"

PTX_MATRIX = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*"


@dataclass(frozen=True)
class Job:
    """One compilation: `weights` are those (or scores) that one pass of the loop handles."""

    kernel: str
    variant: str
    arch: int
    constants: dict[str, Any]
    types: dict[str, str]
    weights: int = 0

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.variant} sm_{self.arch}"


def matrix_of(scheme_name: str, operand: str) -> RuntimeMatrix:
    """Gate and up of V4-Flash without data."""
    scheme = SCHEMES[scheme_name]
    code, scale_code = layout_codes(scheme, operand)  # type: ignore[arg-type]
    words = torch.empty(1, 2 * WIDTH, HIDDEN // columns_per_word(code), device="meta")
    nothing = torch.empty(2, 1, device="meta")
    return RuntimeMatrix(
        scheme, (WIDTH, HIDDEN), code, scale_code, words,
        nothing, nothing, nothing, nothing, torch.uint8,
    )  # fmt: skip


def gemm_job(scheme: str, activations: str, size: int, arch: int, epilogue: str) -> Job:
    matrix = matrix_of(scheme, operand_for(arch, activations))  # type: ignore[arg-type]
    tile = tiles.static_tile(arch, matrix, size, epilogue == "swiglu")
    constants = {
        **moe.constants(matrix, tile, tl.bfloat16),
        "SLOTS_PER_ROW": TOP_K,
        "SPLIT": 1 if epilogue == "swiglu" else 2,
        "EPILOGUE": epilogue,
    }
    types = {"out_ptr": "*bf16" if epilogue == "swiglu" else "*fp32"}
    # Where inputs have no scales, something else is pointed at.
    types["x_scale_ptr"] = "*fp32" if matrix.operand == "bf16" else "*u8"
    if matrix.operand != "bf16":
        types["x_ptr"] = "*u8"
    is_native = matrix.operand.startswith("native")
    if is_native and matrix.code != "t8":
        types["words_ptr"] = "*u8"
    if matrix.code in SPREAD:
        types["scale_ptr"] = "*i32"
    kernel = "native_gemm_kernel" if is_native else "gemm_kernel"
    name = f"{scheme} {activations} {size} {epilogue}"
    weights = tile.columns * STEP * tile.unroll
    return Job(kernel, name, arch, constants, types, weights)


SCHEME_NAMES = ("mxfp4", "nvfp4", "int4-g32", "int4-g64", "int4-g128", "int8-g32", "int8-g128",
                "fp8", "mxfp8", "bf16")  # fmt: skip


def full_gemms() -> Iterator[Job]:
    for arch in ARCHITECTURES:
        for scheme in SCHEME_NAMES:
            for activations in ("bf16", "e4m3"):
                matrix = matrix_of(scheme, operand_for(arch, activations))  # type: ignore[arg-type]
                if activations == "e4m3" and matrix.operand == "bf16":
                    continue  # the same kernel as for bf16
                for size in tiles.SIZES:
                    for epilogue in ("sums",) if size == 16 else ("swiglu", "sums"):
                        yield gemm_job(scheme, activations, size, arch, epilogue)


SAMPLE = {
    80: ("mxfp4 bf16 16 sums", "int4-g64 bf16 128 swiglu"),
    89: ("mxfp4 e4m3 16 sums", "nvfp4 bf16 128 swiglu"),
    90: ("int8-g128 bf16 16 sums", "mxfp4 bf16 128 swiglu", "mxfp4 e4m3 16 sums",
         "fp8 e4m3 128 swiglu"),
    100: ("int4-g32 bf16 16 sums", "fp8 bf16 128 swiglu", "mxfp4 e4m3 128 swiglu"),
    120: ("mxfp8 bf16 16 sums", "int4-g128 bf16 128 swiglu", "mxfp4 e4m3 16 sums"),
}  # fmt: skip
"""Both GEMM kernels where they exist, both ends of the batch, every word and scale code once."""


def sampled_gemms(both_ends: bool = False) -> Iterator[Job]:
    """both_ends: large tiles also end in sums, as those of the down projection do."""
    for arch, names in SAMPLE.items():
        for name in names:
            scheme, activations, size, epilogue = name.split()
            for end in {epilogue, "sums"} if both_ends else {epilogue}:
                yield gemm_job(scheme, activations, int(size), arch, end)


def small_kernels(archs: tuple[int, ...]) -> Iterator[Job]:
    sort = {"MAPPED": True, "BLOCK": 1024}
    for arch in archs:
        yield Job("count_kernel", "", arch, sort, {})
        for counted in (True, False):
            place = {**sort, "COUNTED": counted, "BM": 16, "EXPERTS": 512}
            yield Job("place_kernel", f"counted {counted}", arch, place, {})
        combine = {"MAPPED": True, "TOP_K": 6, "SPLIT": 4, "BLOCK": 512}
        yield Job("combine_kernel", "", arch, combine, {})
        for as_bytes in (True, False):
            pointer, form = "*u8" if as_bytes else "*bf16", f"bytes {as_bytes}"
            constants = {"AS_BYTES": as_bytes, "BR": 16, "BLOCK": 128}
            types = {"codes_ptr": pointer, "scale_ptr": pointer}
            yield Job("quantize_kernel", form, arch, constants, types)
            constants = {"MAPPED": True, "SPLIT": 2, "AS_BYTES": as_bytes, "BLOCK": 128}
            types = {"h_ptr": pointer, "scale_ptr": pointer}
            for rounding in {True, as_bytes}:
                options = constants | {"ROUND": rounding}
                yield Job("activate_kernel", f"{form} {rounding}", arch, options, types)


def score_job(arch: int, shared: bool, operand: str, ragged: bool = False) -> Job:
    """Instructions are counted per score and head: what a lane spends on one product."""
    tile = tiles.index_tile(arch, shared)
    constants = {
        "REAL": 64, "HEADS": 64, "BS": tile.keys, "STEP": tile.step, "STAGES": tile.stages,
        "OPERAND": operand, "ROUND_PRODUCTS": False, "COMPUTE": tl.bfloat16,
        "num_warps": tile.warps,
    }  # fmt: skip
    types = {"q_ptr": "*bf16" if operand == "bf16" else "*u8", "factor_ptr": "*fp32"}
    if operand == "native":
        types["q_scale_ptr"] = "*u8"
    scores = tile.keys * tile.step * 64
    if shared:
        types["k_ptr"] = types["q_ptr"]
        if operand == "native":
            types["k_factor_ptr"] = "*i32"  # there are none
        constants["BQ"] = tile.tokens
        return Job("shared_kernel", f"{operand} prefill", arch, constants, types, scores)
    constants |= {"TILES": tile.tiles, "RAGGED": ragged}
    return Job("own_kernel", f"{operand} decode", arch, constants, types, scores)


def indexer_jobs(full: bool) -> Iterator[Job]:
    for arch in ARCHITECTURES:
        operand = indexer.index_operand(arch)
        yield score_job(arch, True, operand)
        if full or arch in {80, 90}:
            yield score_job(arch, False, operand, ragged=True)
            expand = {"REAL": 64, "HEADS": 64, "WORDS": 16, "SCALES": 1, "WEIGHTED": True,
                      "FP8": arch > 80, "BLOCK": 32, "COMPUTE": tl.bfloat16}  # fmt: skip
            types = {"scale_ptr": "*i32", "out_ptr": "*i32" if arch > 80 else "*bf16"}
            form = "fp8" if arch > 80 else "bf16"
            yield Job("expand_kernel", form, arch, expand, {**types, "factor_ptr": "*fp32"})
            selection = {"CAP": 4096, "HIDDEN": topk.HIDDEN_KEY, "BLOCK": 2048}
            yield Job("collect_kernel", "", arch, selection, {"words_ptr": "*i64"})


def feedback_jobs(archs: tuple[int, ...]) -> Iterator[Job]:
    floats = ("values_ptr", "cost_ptr", "size_ptr", "work_ptr", "factor_ptr", "integers_ptr",
              "errors_ptr", "pull_ptr", "gram_ptr", "scale_ptr")  # fmt: skip
    types = {**dict.fromkeys(floats, "*fp32"), "low": "fp32", "high": "fp32"}
    constants = {"GROUP": 128, "TILE": feedback.TILE, "num_warps": feedback.WARPS}
    for arch in archs:
        yield Job("best_scale_kernel", "", arch, {**constants, "CANDIDATES": 41}, types)
        yield Job("round_group_kernel", "", arch, constants, types)
        yield Job("code_steps_kernel", "", arch, constants, types)


def jobs(full: bool) -> list[Job]:
    found = list(full_gemms() if full else sampled_gemms())
    found += indexer_jobs(full)
    found += feedback_jobs(ARCHITECTURES if full else (90,))
    return found + list(small_kernels(ARCHITECTURES if full else (80,)))


def launch_of(job: Job) -> Launch:
    modules = (
        gemm, native, moe, index_vectors, index_scores, routing, activation, topk, feedback,
    )  # fmt: skip
    function = next(getattr(m, job.kernel) for m in modules if hasattr(m, job.kernel))
    constants, known = job.constants, {**TYPES, **job.types}
    types = {n: "constexpr" if n in constants else known.get(n, "i32") for n in function.arg_names}
    return Launch(function, types, constants)


def special_jobs() -> list[Job]:
    """Every kernel once in every form it has, with as few constants as that takes."""
    found = {(j.kernel, j.variant): j for j in jobs(True) if "gemm" not in j.kernel}
    found |= {(j.kernel, j.variant): j for j in sampled_gemms(both_ends=True)}
    return list(found.values())


def specialise(job: Job) -> list[dict[str, Any]]:
    """What becomes of each specialisation of a kernel: its name, and an error if there is one."""
    plain, found = launch_of(job), []
    for special in specials(plain):
        record = {"kernel": job.kernel, "name": f"{job.name}: {special.name}"}
        try:
            first_form(replace(plain, special=special), job.arch)
        except Exception as error:  # noqa: BLE001  # any failure to compile is the finding
            record["error"] = f"{type(error).__name__}: {error}"
        found.append(record)
    return found


def compile_one(job: Job) -> dict[str, Any]:
    launch = launch_of(job)
    options = launch.options
    constants = {k: v for k, v in job.constants.items() if k not in options}
    try:
        compiled = triton.compile(
            launch.source(), target=GPUTarget("cuda", job.arch, 32), options=options
        )
    except Exception as error:  # noqa: BLE001  # any failure to compile is the finding
        return {"name": job.name, "arch": job.arch, "error": f"{type(error).__name__}: {error}"}
    usage, sass = _disassemble(compiled.asm["cubin"], bool(job.weights))
    body = matrix_loop(sass)
    threads = 32 * options.get("num_warps", 4)
    ptx = compiled.asm["ptx"]
    matrix = re.findall(MATRIX, "\n".join(sass)) if sass else re.findall(PTX_MATRIX, ptx)
    return {
        **{k: v for k, v in asdict(job).items() if k in {"kernel", "variant", "arch"}},
        "name": job.name,
        "layout": f"{constants.get('CODE')}/{constants.get('SCALE')}",
        "slots": constants.get("BM") if job.weights else None,
        "swap": bool(constants.get("SWAP")),
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "mma": sorted(set(matrix)),
        "per_weight": round(len(body) * threads / job.weights, 2) if job.weights else None,
        "flushing": re.findall(r"\b(?:mul|fma|add)\S*\.ftz\S*", ptx),
        "atomics": re.findall(r"\b(?:atom|red)\.global\S*", ptx),
    }


def _disassemble(cubin: bytes, listed: bool) -> tuple[dict[str, int], list[str]]:
    """Resources, and the code if it is wanted: the disassembler takes half a second to start."""
    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run(
                [str(tools / command[0]), *command[1:], file.name],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip

        resources = run("cuobjdump", "--dump-resource-usage")
        listing = run("nvdisasm", "-c") if listed else ""
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    return usage, listing.splitlines()


def matrix_loop(lines: list[str]) -> list[str]:
    """Instructions of the shortest loop among those with most matrix instructions; all if none."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label.group(1)] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found.group(1))
    loops = []
    for end, instruction in enumerate(code):
        jump = re.search(r"\bBRA\S*\s.*?(\.L_[\w.]+)", instruction)
        begin = labels.get(jump.group(1), end + 1) if jump else end + 1
        body = code[begin : end + 1]
        if multiplying := sum(bool(re.search(MATRIX, i)) for i in body):
            loops.append((-multiplying, len(body), body))
    return min(loops, default=(0, 0, code))[2]


def main() -> None:
    full, write = "--full" in sys.argv, "--write" in sys.argv
    only = next((a.removeprefix("--only=") for a in sys.argv if a.startswith("--only=")), "")
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        if "--special" in sys.argv:
            chosen = [j for j in special_jobs() if re.search(only, j.name)]
            sys.stdout.write(
                json.dumps([r for found in pool.map(specialise, chosen) for r in found])
            )
            return
        records = list(pool.map(compile_one, [j for j in jobs(full) if re.search(only, j.name)]))
    if write:
        stored = json.loads(BASELINE.read_text()) if only else {"kernels": {}}
        counts = stored["kernels"] | {
            r["name"]: {k: r[k] for k in ("per_weight", "registers", "slots") if r[k]}
            for r in records
            if r.get("per_weight")
        }
        content = {"triton": tiles.triton_version(), "kernels": dict(sorted(counts.items()))}
        BASELINE.write_text(json.dumps(content, indent=1) + "\n")
    sys.stdout.write(json.dumps(records))


if __name__ == "__main__":
    main()
