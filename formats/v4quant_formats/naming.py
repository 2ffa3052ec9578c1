"""The one place that knows other tools' names: tensors and config.json in the release's own terms.

Transformers keeps a V4 model under a namespace of its own (`model.layers.3.mlp.experts.down_proj`),
and its `save_pretrained` writes half of it back. Every name that is not the release's is translated
by the table below, piece by piece, so that mixtures are read too; a translation counts only where
the result is a name of the release. Experts fused into one tensor [E, 2I, D] or [E, D, I] become
slices of it. So do stacks in MXFP4 as gpt-oss has them, `down_proj_blocks` [E, D, I/32, 16] with
`down_proj_scales` [E, D, I/32]: their bytes are the release's, low nibble first, with sixteen a
group. Rows of `gate_up_proj` are gate, then up, as in transformers' V4; gpt-oss alternates them,
which bytes do not tell, so the check of structure names such a stack. Everything that v4quant does
afterwards sees official names only; what stood in the files is kept in `Checkpoint.renamed`.

Source: transformers' conversion_mapping ("deepseek_v4") and its state_dict.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.errors import DuplicateTensor, WrongDtype
from v4quant_formats.release_config import release_config
from v4quant_formats.spec import TensorSpec

_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(form), new)
    for form, new in (
        (r"^(?:model\.)+", ""),
        (r"^embed_tokens\.", "embed."),
        (r"^lm_head\.", "head."),
        (r"^hc_head\.(?:hc_)?(fn|base|scale)$", r"hc_head_\1"),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.(fn|base|scale)$", r".hc_\1_\2"),
        (r"\.attn\.sinks$", ".attn.attn_sink"),
        (r"\.attn\.compressor\.indexer\.", ".attn.indexer."),
        (r"\.attn\.indexer\.scorer\.", ".attn.indexer."),
        (
            r"\.attn\.indexer\.(kv_proj|gate_proj|wkv|wgate|kv_norm|norm|position_bias|ape)\b",
            r".attn.indexer.compressor.\1",
        ),
        (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"\.(q_a|q_b|o_a|o_b)_proj\.", r".w\1."),
        (r"\.kv_proj\.", ".wkv."),
        (r"\.position_bias$", ".ape"),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
        (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
        (r"\.((?:shared_)?experts(?:\.\d+)?)\.gate_proj\.", r".\1.w1."),
        (r"\.((?:shared_)?experts(?:\.\d+)?)\.up_proj\.", r".\1.w3."),
        (r"\.((?:shared_)?experts(?:\.\d+)?)\.down_proj\.", r".\1.w2."),
    )
)
_FUSED = re.compile(r"(.+\.ffn\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?")
_FUSED_DTYPES = ("BF16", "F16", "F32")
_BLOCKS = re.compile(
    r"(.+\.ffn\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)_(blocks|scales)"
)
_PROJECTIONS = {
    "gate_up_proj": ("w1", "w3"), "gate_proj": ("w1",), "up_proj": ("w3",), "down_proj": ("w2",),
}  # fmt: skip
GATE_UP_BLOCKS = "gate_up_proj_blocks"
MAX_EXPERTS = 99_999


def official_name(name: str) -> str | None:
    """The release's name of a tensor under another tool's; None where there is none."""
    if parse_name(name) is not None:
        return name
    translated = translate(name)
    return translated if parse_name(translated) is not None else None


def translate(name: str) -> str:
    """A name in the release's terms, whether or not the release has such a tensor."""
    for form, new in _RULES:
        name = form.sub(new, name)
    return name


def understood(
    where: str, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> tuple[Mapping[str, Any], Mapping[str, TensorSpec], Mapping[str, str]]:
    """config.json and tensors in the release's terms, and official name -> name in the files, of
    those that differ.

    Names without a meaning stay as they are, for the check of structure to name. Raises
    DuplicateTensor where two names mean one tensor, WrongDtype for a stack of experts that is none,
    ConfigError for a config that says two different things.
    """
    found: dict[str, TensorSpec] = {}
    renamed: dict[str, str] = {}
    for name, spec in tensors.items():
        for official in official_specs(where, _as_bytes(spec)):
            if official.name in found:
                first = renamed.get(official.name, official.name)
                raise DuplicateTensor(
                    f"{where}: '{first}' and '{name}' are both the tensor '{official.name}'"
                )
            found[official.name] = official
            if official.name != name:
                renamed[official.name] = name
    return (
        MappingProxyType(release_config(config, found, where)),
        MappingProxyType(found),
        MappingProxyType(renamed),
    )


def _as_bytes(spec: TensorSpec) -> TensorSpec:
    """FP4 pairs as bytes: safetensors' F4 counts elements, everybody else's I8 and U8 bytes."""
    if spec.dtype != "F4" or not spec.shape or spec.shape[-1] % 2:
        return spec
    shape = (*spec.shape[:-1], spec.shape[-1] // 2)
    return replace(spec, dtype="U8", shape=shape, is_f4=True)


def official_specs(where: str, spec: TensorSpec) -> Iterator[TensorSpec]:
    """The release's tensors that a stored one is: itself, or slices of a stack of experts.

    A name without a meaning stays. Raises WrongDtype for a stack that is none.
    """
    name = official_name(spec.name)
    if name is not None:
        yield spec if name == spec.name else replace(spec, name=name)
        return
    translated = translate(spec.name)
    if match := _FUSED.fullmatch(translated):
        if len(spec.shape) != 3 or spec.dtype not in _FUSED_DTYPES:
            raise _no_stack(where, spec, "[experts, out, in]")
        yield from _slices(where, spec, match[1], match[2], "weight", spec.shape)
    elif match := _BLOCKS.fullmatch(translated):
        blocks = match[3] == "blocks"
        form = "[experts, out, in / 32, 16]" if blocks else "[experts, out, in / 32]"
        if spec.dtype != "U8" or len(spec.shape) != 3 + blocks or (blocks and spec.shape[3] != 16):
            raise _no_stack(where, spec, f"{form} of bytes")
        experts, rows, groups = spec.shape[:3]
        shape, part = (experts, rows, groups * 16 if blocks else groups), "scale"
        yield from _slices(where, spec, match[1], match[2], "weight" if blocks else part, shape)
    else:
        yield spec


def _no_stack(where: str, spec: TensorSpec, form: str) -> WrongDtype:
    return WrongDtype(f"{where}: '{spec}' is not a stack of expert matrices {form}")


def _slices(
    where: str, spec: TensorSpec, module: str, fused: str, part: str, shape: tuple[int, ...]
) -> Iterator[TensorSpec]:
    """A part of every expert in a stack of this shape, whose rows hold one projection or two."""
    experts, rows, columns = shape
    projections = _PROJECTIONS[fused]
    if rows % len(projections) or not 0 < experts <= MAX_EXPERTS:
        raise _no_stack(where, spec, "[experts, out, in]")
    size = spec.nbytes // experts // len(projections)
    for number in range(experts * len(projections)):
        expert, half = divmod(number, len(projections))
        yield TensorSpec(
            f"{module}.{expert}.{projections[half]}.{part}",
            spec.dtype,
            (rows // len(projections), columns),
            spec.file,
            spec.offset + number * size,
        )
