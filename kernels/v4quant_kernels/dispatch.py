"""Which implementation runs: the only module that looks at a device.

Every function here exists twice with one signature: in `ref` (torch, any device) and in `gpu`
(Triton). "auto" takes Triton, where it is installed, for CUDA tensors and torch for everything
else; the choice follows the tensors, and nothing is asked of a driver when this module is imported.
Triton itself is imported only when a kernel is called for, so the package works without it (macOS,
Windows).

"triton" on CPU tensors means Triton's interpreter, which must have been chosen when the process
started (`selfcheck.run_isolated` starts such a process).
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from v4quant_kernels import native
from v4quant_kernels.cpu_products import fastest_way, has_bf16_units
from v4quant_kernels.cpu_products import product as cpu_product
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.experts import Activations, ExpertWeights
from v4quant_kernels.runtime import Operand, RuntimeExperts, prepare_experts
from v4quant_kernels.twins import bf16_product as ref_product
from v4quant_kernels.twins import feedback as ref_feedback
from v4quant_kernels.twins import indexer as ref_indexer
from v4quant_kernels.twins import moe as ref_moe

Backend = Literal["auto", "triton", "torch"]
Products = Literal["auto", "f32", "bf16"]
"""What the torch twins multiply; "auto": BF16 where a probe found it faster, else float32."""


LEAST_ARCHITECTURE = 80
"""The first whose tensor cores take bfloat16; "auto" takes torch on older ones."""


class BackendUnavailable(V4QuantError):
    """The chosen implementation cannot run here."""


def uses_triton(tensor: Tensor, backend: Backend) -> bool:
    """Whether `backend` means Triton for this tensor's device.

    Raises BackendUnavailable when Triton is asked for and cannot run on it.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        return tensor.is_cuda and has_triton() and architecture(tensor) >= LEAST_ARCHITECTURE
    if tensor.is_cuda and (arch := architecture(tensor)) < LEAST_ARCHITECTURE:
        raise BackendUnavailable(
            f"Triton kernels multiply bfloat16, which this GPU (sm_{arch}) does not; they run on "
            f"sm_{LEAST_ARCHITECTURE} and later; use backend='torch'"
        )
    if not tensor.is_cuda and not _kernels("interpreter").interpreting():
        raise BackendUnavailable(
            f"Triton kernels cannot run on {tensor.device.type} tensors in this process; "
            "set TRITON_INTERPRET=1 before starting Python, or use backend='torch'"
        )
    return True


def product_way(tensor: Tensor, products: Products) -> ref_product.Way:
    """How torch should take products on this tensor's device; "auto" is for the CPU to say."""
    if products != "bf16":
        return "f32"
    units = not tensor.is_cuda and has_bf16_units()
    return "cuda" if tensor.is_cuda else "units" if units else "rounded"


def bf16_product(a: Tensor, b: Tensor) -> Tensor:
    """float32 a @ b of operands rounded to BF16, see `ref.bf16_product`."""
    way = product_way(a, "bf16")
    if way == "rounded":
        return float32_product(ref_product.rounded(a), ref_product.rounded(b))
    return ref_product.bf16_product(a, b, way)


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """float32 a @ b of float32 operands, see `cpu_products.product`."""
    return cpu_product(a, b)


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def require_triton() -> None:
    """Raise BackendUnavailable unless Triton can be imported."""
    _kernels("interpreter")


def _kernels(module: str) -> Any:
    """A module of `gpu`, imported when first needed."""
    try:
        return importlib.import_module(f"v4quant_kernels.gpu.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise BackendUnavailable(
            "Triton is not installed, so its kernels cannot run; install the package 'triton' "
            "(Linux), or do without them: leave out --kernels, in Python pass backend='torch'"
        ) from error


def moe(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    experts: ExpertWeights | RuntimeExperts,
    swiglu_limit: float,
    expert_map: Tensor | None = None,
    activations: Activations = "bf16",
    *,
    products: Products = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """Mixture of the routed experts; see `ref.moe.moe` for shapes and the formula.

    products: what torch multiplies, exactly either way; Triton multiplies what `prepare` laid out.
    To call it more than once on a GPU, pass `prepare(experts, activations)`: the kernels' layout is
    otherwise made anew in every call.
    """
    arguments = (x, expert_ids, expert_weights, experts, swiglu_limit, expert_map, activations)
    if not uses_triton(x, backend):
        on_cpu = products == "auto" and not x.is_cuda
        way = fastest_way if on_cpu else product_way(x, products)
        return ref_moe.moe(*arguments, way=way, multiply=float32_product)
    with _on_device_of(x):
        result: Tensor = _kernels("moe").moe(*arguments, arch=architecture(x))
    return result


def prepare(experts: ExpertWeights, activations: Activations = "bf16") -> RuntimeExperts:
    """Lay experts out for the tensor cores of the device they are on, once, when loading.

    Raises what `runtime.prepare_experts` raises.
    """
    arch = architecture(experts.w1.codes)
    return prepare_experts(experts, operand_for(arch, activations))


def arrange(
    experts: ExpertWeights, activations: Activations = "bf16", *, backend: Backend = "auto"
) -> ExpertWeights | RuntimeExperts:
    """Experts as `moe` multiplies them fastest where they are: prepared for Triton, else as given.

    Raises what `prepare` raises.
    """
    if uses_triton(experts.w1.codes, backend):
        return prepare(experts, activations)
    return experts


def operand_for(arch: int, activations: Activations) -> Operand:
    """What the tensor cores of an architecture (90 for sm_90) should multiply."""
    if activations == "bf16" or arch < 89:
        return "bf16"
    if arch < 100:
        return "fp8"
    return "native" if arch < 120 else "native8"


def architecture(tensor: Tensor) -> int:
    """Compute capability of the tensor's device, 90 for sm_90; 80 where there is none."""
    if not tensor.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def indexer_logits(
    q_codes: Tensor,
    q_scale: Tensor,
    k_packed: Tensor,
    head_weights: Tensor,
    positions: Tensor | None = None,
    round_products: bool = False,
    *,
    first_key: Tensor | None = None,
    num_keys: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Scores of compressed keys; see `ref.indexer.indexer_logits` for shapes and the formula."""
    arguments = (q_codes, q_scale, k_packed, head_weights, positions, round_products)
    which: dict[str, Any] = {"first_key": first_key, "num_keys": num_keys}
    if not uses_triton(q_codes, backend):
        return ref_indexer.indexer_logits(*arguments, **which)
    kernels = _kernels("indexer")
    with _on_device_of(q_codes):
        result: Tensor = kernels.indexer_logits(*arguments, **which, arch=architecture(q_codes))
    return result


def index_top_k(
    q_codes: Tensor,
    q_scale: Tensor,
    k_packed: Tensor,
    head_weights: Tensor,
    k: int,
    positions: Tensor | None = None,
    round_products: bool = False,
    *,
    first_key: Tensor | None = None,
    num_keys: int | None = None,
    workspace: int = ref_indexer.WORKSPACE,
    backend: Backend = "auto",
) -> Tensor:
    """The k best keys of each token, never holding all scores; see `ref.indexer.index_top_k`."""
    arguments = (q_codes, q_scale, k_packed, head_weights, k, positions, round_products)
    which: dict[str, Any] = {
        "first_key": first_key, "num_keys": num_keys, "workspace": workspace,
    }  # fmt: skip
    if not uses_triton(q_codes, backend):
        return ref_indexer.index_top_k(*arguments, **which)
    kernels = _kernels("indexer")
    with _on_device_of(q_codes):
        result: Tensor = kernels.index_top_k(*arguments, **which, arch=architecture(q_codes))
    return result


def top_k(logits: Tensor, k: int, *, backend: Backend = "auto") -> Tensor:
    """Exact stable selection, see `ref.indexer.top_k`."""
    if not uses_triton(logits, backend):
        return ref_indexer.top_k(logits, k)
    with _on_device_of(logits):
        result: Tensor = _kernels("topk").top_k(logits, k)
    return result


def quantize_index_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of indexer vectors, see `ref.indexer`; torch on every device for now."""
    return ref_indexer.quantize_index_vectors(x)


def uses_loops(tensor: Tensor) -> bool:
    """Whether compiled loops take this tensor."""
    return not tensor.is_cuda and native.available()


def best_scale(values: Tensor, cost: Tensor, magnitudes: Tensor, low: int, high: int) -> Tensor:
    """The scale of each row of a group; see `ref.feedback.best_scale`."""
    found: Tensor = _feedback("best_scale", values, cost, magnitudes, low, high)
    return found


def round_group(
    work: Tensor, scale: Tensor, factor: Tensor, low: int, high: int, integers: Tensor
) -> Tensor:
    """Round a group's channels in turn; see `ref.feedback.round_group`."""
    errors: Tensor = _feedback("round_group", work, scale, factor, low, high, integers)
    return errors


def code_steps(
    pull: Tensor, scale: Tensor, gram: Tensor, low: int, high: int, integers: Tensor
) -> None:
    """A group's codes to their best values in turn; see `ref.feedback.code_steps`."""
    _feedback("code_steps", pull, scale, gram, low, high, integers)


def _feedback(name: str, values: Tensor, *rest: Any) -> Any:
    """Error feedback on `[B, group, N]`: by loops, by kernels, or by torch where neither can."""
    if uses_loops(values):
        loops = importlib.import_module("v4quant_kernels.native.feedback")
        return getattr(loops, name)(values, *rest)
    if uses_triton(values, "auto"):
        kernels = _kernels("feedback")
        if kernels.takes(values):
            with _on_device_of(values):
                return getattr(kernels, name)(values, *rest)
    return getattr(ref_feedback, name)(values, *rest)
