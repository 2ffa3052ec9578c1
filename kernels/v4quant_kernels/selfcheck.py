"""Checking the kernels on real weights, on any machine.

A kernel is right when its result lies within the bound of the float64 reference
(`reference64`), and so does its torch twin's. Here that is done on a user's own tensors: `verify`
hands over slices of a converted checkpoint.

A machine without a GPU runs the Triton kernels in Triton's interpreter, which must be chosen when a
process starts. `run_isolated` therefore writes the experts to a temporary file and starts
`python -m v4quant_kernels.selfcheck FILE` with TRITON_INTERPRET=1; that process prints its results
as JSON. With a GPU the same checks run on it, in the calling process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from v4quant_kernels import dispatch
from v4quant_kernels.codec import dequantize
from v4quant_kernels.dispatch import Backend, BackendUnavailable
from v4quant_kernels.errors import UnsupportedScheme, V4QuantError
from v4quant_kernels.experts import Activations, ExpertWeights, StackedMatrix
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.reference64 import indexer64, moe64
from v4quant_kernels.scheme import get_scheme
from v4quant_kernels.twins import indexer as ref_indexer

SWIGLU_LIMIT = 10.0
_TOKENS = 5


@dataclass(frozen=True)
class KernelCheck:
    """One comparison.

    `max_abs_error` and `bound` belong to the element that comes closest to its bound (or exceeds
    it most), over the kernel and its torch twin. `ok` means that every element keeps its bound.
    """

    name: str
    scheme: str
    max_abs_error: float
    bound: float
    ok: bool


def check_moe(
    experts: ExpertWeights,
    seed: int,
    backend: Backend = "auto",
    activations: Activations = "bf16",
) -> KernelCheck:
    """Run the expert kernel, its torch twin and the float64 reference on random tokens.

    Tokens are scaled so that the clamp acts on some channels. Raises BackendUnavailable when the
    backend cannot run here.
    """
    generator = torch.Generator().manual_seed(seed)
    count = experts.num_experts
    x = torch.randn(_TOKENS, experts.hidden_size, generator=generator)
    ids = torch.randint(count, (_TOKENS, min(2, count)), generator=generator)
    routing = torch.rand(ids.shape, generator=generator)
    experts_cpu = _move(experts, "cpu")
    gate = x @ dequantize(experts_cpu.w1[int(ids[0, 0])]).T
    rms = gate.square().mean().sqrt().clamp(min=1e-20)
    x = (x * (SWIGLU_LIMIT / 2 / rms)).bfloat16()
    value, bound = moe64(x, ids, routing, experts_cpu, SWIGLU_LIMIT, activations)
    twin = dispatch.moe(
        x, ids, routing, experts_cpu, SWIGLU_LIMIT, activations=activations, backend="torch"
    )
    device = experts.w1.codes.device
    prepared = dispatch.prepare(experts, activations)
    if prepared.gate_up.operand == "fp8":
        value, bound = moe64(x, ids, routing, experts_cpu, SWIGLU_LIMIT, activations, fp8_sums=True)
    kernel = dispatch.moe(
        x.to(device),
        ids.to(device),
        routing.to(device),
        prepared,
        SWIGLU_LIMIT,
        activations=activations,
        backend=backend,
    )
    names = dict.fromkeys((experts.w1.scheme.name, experts.w2.scheme.name))
    return _compare(f"moe {activations}", "+".join(names), [kernel, twin], value, bound)


def check_indexer(seed: int, backend: Backend = "auto", device: str = "cpu") -> KernelCheck:
    """Run the indexer kernel, its torch twin and the float64 reference on random vectors."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads, keys, width = 7, 64, 150, 128
    query = torch.randn(tokens, heads, width, generator=generator)
    q_codes, q_scale = dispatch.quantize_index_vectors(query)
    k_packed = ref_indexer.pack_index_keys(
        *dispatch.quantize_index_vectors(torch.randn(keys, width, generator=generator))
    )
    weights = torch.randn(tokens, heads, generator=generator) * (width * heads) ** -0.5
    positions = torch.randint(4 * keys + 8, (tokens,), generator=generator)
    positions[0] = 0
    inputs = (q_codes, q_scale.view(torch.uint8), k_packed, weights, positions)
    arch = dispatch.architecture(torch.empty(0, device=device))
    short_sums = dispatch.uses_triton(torch.empty(0, device=device), backend) and arch in {89, 90}
    value, bound = indexer64(*inputs, fp8_sums=short_sums)
    twin = ref_indexer.indexer_logits(*inputs)
    q, scale, k, w, p = (t.to(device) for t in inputs)
    kernel = dispatch.indexer_logits(q, scale, k, w, p, backend=backend)
    return _compare("indexer", "mxfp4", [kernel, twin], value, bound)


def _compare(
    name: str, scheme: str, results: list[Tensor], value: Tensor, bound: Tensor
) -> KernelCheck:
    stacked = torch.stack([r.cpu().double() for r in results])
    same_infinity = torch.isinf(value) & (stacked == value)
    error = (stacked - value).abs().masked_fill(same_infinity, 0.0)
    error = error.nan_to_num(nan=torch.inf)
    limits = bound.expand_as(error)
    worst = int((error / limits.clamp(min=torch.finfo(torch.float64).tiny)).argmax())
    return KernelCheck(
        name,
        scheme,
        float(error.flatten()[worst]),
        float(limits.flatten()[worst]),
        bool((error <= limits).all()),
    )


def crop(matrix: QTensor, rows: int, columns: int) -> QTensor:
    """The top left corner `[rows, columns]` of a QTensor, to check a slice of a large matrix.

    Both must be multiples of the scheme's block and lie inside. Raises UnsupportedScheme otherwise.
    """
    block_rows, block_columns = matrix.scheme.block
    n, k = matrix.shape
    if rows > n or columns > k or (rows % block_rows, columns % block_columns) != (0, 0):
        raise UnsupportedScheme(
            f"cannot cut [{rows}, {columns}] out of {matrix.scheme.name} [{n}, {k}]; "
            f"choose multiples of {block_rows} and {block_columns} within it"
        )
    codes = matrix.codes[:rows, : columns * matrix.codes.shape[1] // k]
    scale = matrix.scale
    if scale is not None:
        scale = scale[: rows // block_rows, : columns // block_columns]
    return QTensor(matrix.scheme, (rows, columns), codes, scale, matrix.global_scale)


def run_isolated(experts: ExpertWeights, seed: int, timeout: float = 600.0) -> list[KernelCheck]:
    """Check the Triton kernels on these experts (both activation modes) and the indexer.

    On a GPU when there is one, otherwise in a new process under Triton's interpreter. Cut experts
    to about 512 x 1024 first (`crop`): the interpreter then takes some seconds for each, and the
    bound, which grows with the size, is about 3 % of the output's spread. Raises
    BackendUnavailable when Triton cannot be imported, V4QuantError when the process fails.
    """
    dispatch.require_triton()
    if torch.cuda.is_available():
        return _run_checks(_move(experts, "cuda"), seed, "cuda")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "experts.safetensors"
        _save(experts, seed, file)
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "v4quant_kernels.selfcheck", str(file)]
        try:
            done = subprocess.run(
                command,
                check=False,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise V4QuantError(
                f"the kernel check did not finish in {timeout:.0f} s; give it smaller slices"
            ) from None
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise V4QuantError(
            f"the kernel check failed to run (exit code {done.returncode}): {reason[0]}; "
            "check that Triton and torch work in this environment"
        )
    return [KernelCheck(**entry) for entry in json.loads(done.stdout)]


def _run_checks(experts: ExpertWeights, seed: int, device: str) -> list[KernelCheck]:
    return [
        check_moe(experts, seed, "triton", "bf16"),
        check_moe(experts, seed, "triton", "e4m3"),
        check_indexer(seed, "triton", device),
    ]


def _move(experts: ExpertWeights, device: str) -> ExpertWeights:
    def move(matrix: StackedMatrix) -> StackedMatrix:
        return StackedMatrix(
            matrix.scheme,
            matrix.shape,
            matrix.codes.to(device),
            matrix.scale.to(device),
            matrix.global_scale.to(device),
        )

    return ExpertWeights(move(experts.w1), move(experts.w3), move(experts.w2))


_PARTS = ("codes", "scale", "global_scale")


def _save(experts: ExpertWeights, seed: int, file: Path) -> None:
    tensors, metadata = {}, {"seed": str(seed)}
    for field in fields(experts):
        matrix: StackedMatrix = getattr(experts, field.name)
        metadata[field.name] = json.dumps([matrix.scheme.name, *matrix.shape])
        for part in _PARTS:
            tensors[f"{field.name}.{part}"] = getattr(matrix, part).cpu().contiguous()
    save_file(tensors, file, metadata)


def _load(file: Path) -> tuple[ExpertWeights, int]:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        matrices = {}
        for field in fields(ExpertWeights):
            name, rows, columns = json.loads(metadata[field.name])
            parts = (opened.get_tensor(f"{field.name}.{part}") for part in _PARTS)
            matrices[field.name] = StackedMatrix(get_scheme(name), (rows, columns), *parts)
    return ExpertWeights(**matrices), int(metadata["seed"])


def main() -> int:
    """Check the experts in the file named on the command line; JSON on stdout."""
    experts, seed = _load(Path(sys.argv[1]))
    try:
        checks = _run_checks(experts, seed, "cpu")
    except BackendUnavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps([asdict(check) for check in checks]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
