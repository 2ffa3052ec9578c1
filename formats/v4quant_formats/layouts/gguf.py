"""Layout `gguf`: one file format for llama.cpp, with everything in it, tokenizer included.

Experts become MXFP4 by moving bytes (exact) or one of llama.cpp's block types. Dense matrices are
BF16 (exact) unless the recipe's `dense` names a block type. Rows that are not a multiple of
256 columns take the type llama.cpp takes instead. Of the rest, vectors and the router are widened
to float32, as llama.cpp computes with them (routing decides between experts, so its weights must
not meet rounded activations), expert numbers of the hash layers become I32, all else is copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from v4quant_formats.deepseek_v4 import TensorName
from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.layouts.choices import NEUTRAL, dense_types, table_types
from v4quant_formats.layouts.layout import DenseRule, Layout, Parts
from v4quant_formats.model_config import Dimensions
from v4quant_formats.spec import TensorSpec
from v4quant_kernels.ggml_types import fitting_type, get_type
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor


def _expert_parts(scheme: Scheme, shape: tuple[int, int]) -> Parts:
    rows, columns = shape
    kind = get_type(fitting_type(scheme.name, columns))
    return {"weight": (kind.dtype, (rows, kind.row_bytes(columns)))}


def _expert_tensors(q: QTensor, input_amax: float) -> dict[str, Tensor]:
    del input_amax  # llama.cpp quantizes activations itself
    if q.scheme.is_block_type:
        return {"weight": q.codes}
    assert q.scale is not None, q.scheme
    from v4quant_kernels.ggml import repack_mxfp4  # torch, which plans do without

    return {"weight": repack_mxfp4(q.codes, q.scale)}


def _dense(scheme: Scheme, name: TensorName, config: Dimensions) -> DenseRule:
    del scheme, name, config
    return "bf16"


def _plain(name: TensorName, spec: TensorSpec) -> str:
    if name.module.endswith(".tid2eid"):
        return "I32"
    if len(spec.shape) <= 1 or name.module.endswith(
        ("ffn.gate", "engram.q_weight", "engram.k_weight")
    ):
        return "F32"
    return spec.dtype


def _leaves_out(name: TensorName, config: Dimensions) -> str | None:
    if name.role == "vision":
        return "llama.cpp keeps a vision tower in a file of its own (mmproj)"
    if name.is_draft and config.v41 is not None:
        return "llama.cpp's architecture 'deepseek41' has no place for draft stages"
    hashed = bool(name.stage) and config.facts(name.stage).hashed
    if name.is_draft and name.module.endswith("ffn.gate.bias_vl"):
        return "llama.cpp drafts text only, so nothing reads a draft stage's bias for image tokens"
    if hashed and name.module.endswith("ffn.gate.bias"):
        return "hash layers choose experts by token, so no text token reads this bias"
    return None


def _check(config: Dimensions, drafts: Sequence[str]) -> None:
    if len(drafts) > 1 and config.dspark is None and config.v41 is None:
        raise UnsupportedPair(
            f"format 'gguf' has a place for one MTP stage, and there are {len(drafts)}, but "
            "config.json has no dspark_ keys; use --draft drop, or the release's config.json"
        )


def _config(raw: Mapping[str, Any], scheme: Scheme, kept: Sequence[str]) -> dict[str, Any]:
    del scheme
    assert not kept, "this format declares one scheme for all experts"
    # Only for readers of the folder: what the file itself says is in its own metadata.
    return {k: v for k, v in raw.items() if k not in ("expert_dtype", "quantization_config")}


def _refuses(engine: str, scheme: Scheme) -> str:
    del scheme
    return "" if engine == NEUTRAL else _OTHERS


_OTHERS = "GGUF files are llama.cpp's; deepseek and compressed-tensors are formats it loads"

GGUF = Layout(
    name="gguf",
    expert_parts=_expert_parts,
    expert_tensors=_expert_tensors,
    dense=_dense,
    config=_config,
    engines="llama.cpp and what is built on it, on CUDA, Metal, Vulkan and CPU",
    serve="llama-server -m {path}/{file}",
    mixes="projection",
    dense_choices=dense_types,
    table_choices=table_types,
    plain=_plain,
    leaves_out=_leaves_out,
    check=_check,
    index="",
    refuses=_refuses,
)
