"""Layout `compressed-tensors`: experts by `config_groups`, everything dense BF16 or block FP8.

Three variants of one file. *neutral* carries the dense matrices as exact BF16 and is read by vLLM,
SGLang and transformers alike. *vllm* keeps the trunk's dense matrices as the block FP8 they are,
declared as a second group, with scales under `.weight_scale`. *sglang* keeps all of them under
their native names and says so in `linear_fp8_config`, which no other engine reads.

Targets and ignores are regular expressions over *module* names, and each engine renames modules
differently, so targets cover both worlds (w1/w2/w3 and gate/up/down_proj) and the ignore list names
what SGLang would otherwise refuse as unmatched. The experts' group comes first, and the dense
target spells `shared_exper[t]s`: transformers takes as the experts' scheme the first group whose
target contains the text `experts`, and as the dense one the first whose targets do not.

vLLM asks the targets layer by layer, for one expert's three matrices, which must get one answer. So
in its variant experts of different layers may have different schemes, each scheme a group that
lists its layers. transformers would decode all of them by the first group, hence not in the neutral
variant; SGLang has not been read for this.

In the vLLM variant draft stages are BF16: vLLM builds them as layers beyond the trunk's, and
DSpark's `context_wkv_proj`, loaded from every stage's wkv, has a name that no target of wkv meets.

Of V4.1 vLLM 0.33 reads 32x32 tiles under the native declaration alone. Under this one its variant
declares MXFP8, the same codes with each tile's scale repeated for all of its rows, and keeps `wo_a`
BF16: its product asks a form of compressed-tensors' FP8 that MXFP8 does not give it. V4.1's class
does not tell the loader which modules it fuses, so targets name the fused ones themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from v4quant_formats.deepseek_v4 import TensorName
from v4quant_formats.layouts.deepseek import QUANTIZATION_CONFIG, V41_CONFIG
from v4quant_formats.layouts.layout import DenseRule, Layout, Parts
from v4quant_formats.model_config import Dimensions, is_v41
from v4quant_kernels.late import torch
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import SCHEMES, Scheme

if TYPE_CHECKING:
    from torch import Tensor

EXPERT_TARGET = r"re:.*\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)$"
DENSE_TARGETS = (
    r"re:.*attn\.(wq_a|wq_b|wkv|wo_a|wo_b|q_a_proj|q_b_proj|kv_proj|o_a_proj|o_b_proj)$",
    r"re:.*indexer\.(wq_b|q_b_proj)$",
    r"re:.*\.shared_exper[t]s\.(w1|w2|w3|gate_proj|up_proj|down_proj)$",
)
V41_DENSE_TARGETS = (
    r"re:.*attn\.(fused_wqa_wkv|wq_a|wkv|wq_b|wo_b)$",
    r"re:.*indexer\.wq_b$",
    r"re:.*\.shared_exper[t]s\.(gate_up_proj|w1|w2|w3|down_proj)$",
    r"re:.*engram\.wkv$",
)
_ENGRAM = "re:.*engram.*"
_NEVER = (
    r"re:.*\.gate$",
    # With the dot: gate_proj, an expert's name in SGLang, ends in e_proj too.
    r"re:.*\.(e_proj|h_proj|main_proj)$",
    "re:.*(markov_head|confidence_head).*",
    _ENGRAM,
    r"re:.*(vision|aligner)\..*",
    "lm_head",
    "head",
    "embed",
)
IGNORE = ("re:.*attn.*", "re:.*shared_experts.*", *_NEVER)
_DRAFT_STAGES = 8  # more than any release has


def _expert_parts(scheme: Scheme, shape: tuple[int, int]) -> Parts:
    rows, columns = shape
    groups = (rows, columns // scheme.group_size)
    if scheme.element == "e2m1":
        return {"weight_packed": ("U8", (rows, columns // 2)), "weight_scale": ("U8", groups)}
    if scheme.element == "e4m3":
        return {"weight": ("F8_E4M3", shape), "weight_scale": ("U8", groups)}
    return {
        "weight_packed": ("I32", (rows, -(-columns * scheme.bits // 32))),
        "weight_scale": ("BF16", groups),
        "weight_shape": ("I64", (2,)),
    }


def _expert_tensors(q: QTensor, input_amax: float) -> dict[str, Tensor]:
    del input_amax  # weight-only
    assert q.scale is not None
    if not q.scheme.is_packed_integer:
        part = "weight_packed" if q.scheme.element == "e2m1" else "weight"
        return {part: q.codes, "weight_scale": q.scale.view(torch.uint8)}
    return {
        "weight_packed": q.codes.view(torch.int32),
        "weight_scale": q.scale,
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    """The `weights` object of the experts' group."""
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.is_packed_integer else "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
    if not scheme.is_packed_integer:
        weights["scale_dtype"] = "torch.uint8"
    return weights


_FORMATS = {
    "int": "pack-quantized", "e2m1": "mxfp4-pack-quantized", "e4m3": "mxfp8-quantized",
}  # fmt: skip


def _format(scheme: Scheme) -> str:
    return _FORMATS[scheme.element]


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    """MX schemes ask for FP8 activations in groups, as the release's own kernels do.

    Without them vLLM would run MXFP4 with FP4 activations on sm100 and newer.
    """
    if scheme.is_packed_integer:
        return None
    wide = scheme.element == "e4m3"  # activations in the weights' own form
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": scheme.group_size if wide else 128,
        "dynamic": True,
        "actorder": None,
        "observer": None,
        **({"scale_dtype": "torch.uint8"} if wide else {}),
    }


def _group(scheme: Scheme, *targets: str) -> dict[str, Any]:
    return {
        "targets": list(targets or (EXPERT_TARGET,)),
        "format": _format(scheme),
        "weights": _weights(scheme),
        "input_activations": _activations(scheme),
        "output_activations": None,
    }


def _dense_group() -> dict[str, Any]:
    activations = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "dynamic": True,
        "actorder": None,
        "observer": None,
    }
    return {
        "targets": list(DENSE_TARGETS),
        "format": "float-quantized",
        "weights": {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "block",
            "block_structure": [128, 128],
            "dynamic": False,
            "actorder": None,
        },
        "input_activations": activations,
        "output_activations": None,
    }


def _declare(
    raw: Mapping[str, Any], scheme: Scheme, kept: Sequence[str], ignore: Sequence[str]
) -> dict[str, Any]:
    assert not kept, "this format declares one scheme for all experts"
    config = {k: v for k, v in raw.items() if k != "expert_dtype"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": _format(scheme),
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {"group_0": _group(scheme)},
    }
    return config


def _neutral_config(raw: Mapping[str, Any], scheme: Scheme, kept: Sequence[str]) -> dict[str, Any]:
    return _declare(raw, scheme, kept, IGNORE)


def _vllm_config(raw: Mapping[str, Any], scheme: Scheme, kept: Sequence[str]) -> dict[str, Any]:
    v41 = is_v41(raw)
    first = _trunk_layers(raw)
    drafts = "|".join(str(n) for n in range(first, first + _DRAFT_STAGES))
    stages = rf"re:.*(layers\.({drafts})|mtp\.\d+)\.(attn|ffn\.shared_exper[t]s)\..*"
    never = [entry for entry in _NEVER if not v41 or entry != _ENGRAM]
    config = _declare(raw, scheme, kept, [*never, stages])
    quantization = config["quantization_config"]
    dense = _group(SCHEMES["mxfp8"], *V41_DENSE_TARGETS) if v41 else _dense_group()
    quantization["config_groups"]["group_1"] = dense
    quantization["format"] = "mixed-precision"
    return config


def _vllm_mixed(raw: Mapping[str, Any], stages: Mapping[str, Scheme]) -> dict[str, Any]:
    """As `_vllm_config`, with one group for each scheme that experts of some stages have."""
    by_scheme: dict[str, list[str]] = {}
    for stage, scheme in stages.items():
        by_scheme.setdefault(scheme.name, []).append(stage)
    config = _vllm_config(raw, next(iter(stages.values())), ())
    groups = config["quantization_config"]["config_groups"]
    dense = groups.pop("group_1")
    layers = _trunk_layers(raw)
    for number, names in enumerate(by_scheme.values()):
        groups[f"group_{number}"] = _group(stages[names[0]], _stages_target(names, layers))
    groups[f"group_{len(by_scheme)}"] = dense
    return config


def _trunk_layers(raw: Mapping[str, Any]) -> int:
    text = raw["text_config"] if is_v41(raw) else raw
    return int(text["num_hidden_layers"])


def _stages_target(stages: Sequence[str], layers: int) -> str:
    """A pattern of the experts of some stages; vLLM numbers draft stages on from the trunk's."""
    trunk = [int(s.removeprefix("layers.")) for s in stages if s.startswith("layers.")]
    drafts = [int(s.removeprefix("mtp.")) for s in stages if s.startswith("mtp.")]
    numbers = "|".join(str(n) for n in [*trunk, *(layers + n for n in drafts)])
    places = rf"layers\.({numbers})"
    if drafts:
        places = rf"({places}|mtp\.({'|'.join(map(str, drafts))}))"
    return EXPERT_TARGET.replace(r"re:.*\.experts", rf"re:(.*\.)?{places}\..*\.experts")


def _sglang_config(raw: Mapping[str, Any], scheme: Scheme, kept: Sequence[str]) -> dict[str, Any]:
    config = _declare(raw, scheme, kept, IGNORE)
    native = V41_CONFIG if is_v41(raw) else QUANTIZATION_CONFIG
    keys = ("quant_method", "activation_scheme", "fmt", "weight_block_size")
    config["quantization_config"]["linear_fp8_config"] = {
        key: native[key] for key in keys if key in native
    }
    return config


def _dense_bf16(scheme: Scheme, name: TensorName, config: Dimensions) -> DenseRule:
    del scheme, name, config
    return "bf16"


def _dense_vllm(scheme: Scheme, name: TensorName, config: Dimensions) -> DenseRule:
    del scheme
    if name.is_draft:
        return "bf16"
    if config.v41 is None:
        return "f32_scale"
    return "bf16" if name.module.endswith("attn.wo_a") else "mxfp8"


def _dense_sglang(scheme: Scheme, name: TensorName, config: Dimensions) -> DenseRule:
    del scheme, name, config
    return "copy"


_SGLANG = "SGLang's kernels for packed integers take 4 and 8 bits"
_SGLANG_MX = "SGLang loads MX experts only in the release's own format"
_SGLANG_BITS = (4, 8)
_MX_INSTEAD = {
    "e2m1": "use --format deepseek",
    "e4m3": "mxfp4 or fp8 in --format deepseek work",
}


def _refuses(engine: str, scheme: Scheme) -> str:
    if engine != "sglang":
        return ""
    if not scheme.is_packed_integer:
        return f"{_SGLANG_MX}; {_MX_INSTEAD[scheme.element]}"
    if scheme.bits in _SGLANG_BITS:
        return ""
    return f"{_SGLANG}; int4-g32, int4-g128 and int8 work, or use vLLM for 2 and 3 bits"


_NEUTRAL = Layout(
    name="compressed-tensors",
    expert_parts=_expert_parts,
    expert_tensors=_expert_tensors,
    dense=_dense_bf16,
    config=_neutral_config,
    engines="vLLM and (4 and 8 bits) SGLang on sm90 and newer, transformers anywhere",
    serve="vllm serve {path}",
    refuses=_refuses,
)
_VLLM = replace(
    _NEUTRAL,
    dense=_dense_vllm,
    config=_vllm_config,
    engines="vLLM on sm90 and newer; transformers with CompressedTensorsConfig(dequantize=True)",
    dense_scale="weight_scale",
    engine="vllm",
    mixes="layer",
    mixed_config=_vllm_mixed,
)
_SGLANG_VARIANT = replace(
    _NEUTRAL,
    dense=_dense_sglang,
    config=_sglang_config,
    engines="SGLang on sm90 and newer, with SGLANG_DSV4_FP4_EXPERTS=0",
    serve="SGLANG_DSV4_FP4_EXPERTS=0 python -m sglang.launch_server --model-path {path}",
    engine="sglang",
)
COMPRESSED_TENSORS = replace(_NEUTRAL, variants={"vllm": _VLLM, "sglang": _SGLANG_VARIANT})
