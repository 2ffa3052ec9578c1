"""Converted checkpoints in a real client: transformers, with compressed-tensors for INT.

What is claimed: the client finds every tensor it wants and no other, holds exactly our values, and
computes what our forward pass computes.

Tolerances. Parameters: none, but the client holds experts in BF16 and so rounds an INT4 product of
code and scale (4 + 8 significant bits) once; exact targets are not rounded at all. Logits in
float32: 1e-4 of the largest, two orders of float32 summation. Logits in BF16: a client in BF16
rounds every activation, which moves single tokens a lot where a router or indexer is nearly
undecided, and others hardly; so the median over tokens is bounded tightly and the mean loosely.
Measured: medians 6e-5 (trained) and 2e-4 (random weights), means up to 8e-3. Two projections
exchanged by mistake give a median of 2e-1.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tests.support.conversion import convert
from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.forward.logits import stream_logits
from v4quant_calibration.forward.stream import StreamModel, stream_forward
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.model_config import load_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense
from v4quant_formats.weights import find_weight

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
match_name = pytest.importorskip("compressed_tensors.utils.match").match_name

ROOT = Path(__file__).parent.parent.parent
TINY_A = ROOT / "tests" / "data" / "tiny-a"
TINY_V4 = ROOT / "v4quant" / "data" / "tiny-v4"

CASES = ["source", "mxfp4", "fp8", "int8-g32", "int4-g128", "tiny-v4 int4-g32"]
CASES += ["bf16", "int3-g64", "int2-g128", "mxfp4/compressed-tensors", "int3-g128@vllm"]
EXACT = ["source", "mxfp4", "fp8", "int8-g32", "bf16", "mxfp4/compressed-tensors"]
MEDIAN_KL, MEAN_KL = 5e-4, 2e-2

# Ours -> theirs, within a layer; what is listed only at its end keeps its path.
LAYER_NAMES = (
    (r"attn\.wq_a$", "self_attn.q_a_proj.weight"),
    (r"attn\.wq_b$", "self_attn.q_b_proj.weight"),
    (r"attn\.wkv$", "self_attn.kv_proj.weight"),
    (r"attn\.wo_a$", "self_attn.o_a_proj.weight"),
    (r"attn\.wo_b$", "self_attn.o_b_proj.weight"),
    (r"attn\.q_norm$", "self_attn.q_a_norm.weight"),
    (r"attn\.kv_norm$", "self_attn.kv_norm.weight"),
    (r"attn\.attn_sink$", "self_attn.sinks"),
    (r"attn\.indexer\.wq_b$", "self_attn.compressor.indexer.q_b_proj.weight"),
    (r"attn\.indexer\.weights_proj$", "self_attn.compressor.indexer.scorer.weights_proj.weight"),
    (r"attn\.indexer\.compressor\.(.*)", r"self_attn.compressor.indexer.\1"),
    (r"attn\.compressor\.(.*)", r"self_attn.compressor.\1"),
    (r"ffn\.gate$", "mlp.gate.weight"),
    (r"ffn\.gate\.bias$", "mlp.gate.e_score_correction_bias"),
    (r"ffn\.gate\.tid2eid$", "mlp.gate.tid2eid"),
    (r"ffn\.shared_experts\.w1$", "mlp.shared_experts.gate_proj.weight"),
    (r"ffn\.shared_experts\.w2$", "mlp.shared_experts.down_proj.weight"),
    (r"ffn\.shared_experts\.w3$", "mlp.shared_experts.up_proj.weight"),
    (r"attn_norm$", "input_layernorm.weight"),
    (r"ffn_norm$", "post_attention_layernorm.weight"),
    (r"hc_(attn|ffn)_(\w+)$", r"\1_hc.\2"),
)
COMPRESSOR_NAMES = {
    "ape": "position_bias",
    "wkv": "kv_proj.weight",
    "wgate": "gate_proj.weight",
    "norm": "kv_norm.weight",
}
TOP_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in the client: what it complained of, holds and computes."""

    folder: Path
    ids: Tensor
    complaints: dict[str, Any]
    state: dict[str, Tensor]
    logits_bf16: Tensor
    logits_float: Tensor


def load(folder: Path, ids: Tensor) -> Loaded:
    extra = {}
    if folder.name.endswith("vllm"):
        # FP8 activations are imitated otherwise, and weights decoded with BF16 scales.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        extra["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model, complaints = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True, **extra
    )
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        bf16 = model(input_ids=ids[None], use_cache=False).logits[0].float()
        # transformers forbids `.float()` on quantized models; these hold plain tensors by now.
        model = torch.nn.Module.float(model)
        wide = model(input_ids=ids[None], use_cache=False).logits[0]
    return Loaded(folder, ids, complaints, state, bf16, wide)


def random_ids() -> Tensor:
    ids: Tensor = load_file(TINY_A.parent / "tiny-a.reference.safetensors")["input_ids"][0]
    return ids


def text_ids() -> Tensor:
    tokenizer = Tokenizer.from_file(str(TINY_V4 / "tokenizer.json"))
    text = (ROOT / "v4quant" / "data" / "text" / "heldout-prose.txt").read_text(encoding="utf-8")
    return torch.tensor([0, *tokenizer.encode(text[:3000], add_special_tokens=False).ids[:255]])


@pytest.fixture(scope="module")
def loaded(
    converted: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Loaded]]:
    """Each case, loaded once."""
    cache: dict[str, Loaded] = {}

    def get(case: str) -> Loaded:
        if case not in cache:
            if case.startswith("tiny-v4"):
                folder = tmp_path_factory.mktemp("engines") / "tiny-v4"
                convert(TINY_V4, folder, case.partition(" ")[2])
                cache[case] = load(folder, text_ids())
            else:
                folder = TINY_A if case == "source" else converted(case)
                cache[case] = load(folder, random_ids())
        return cache[case]

    yield get
    cache.clear()


def their_name(module: str) -> str:
    """The client's name of one of our modules (routed experts excluded)."""
    if module in TOP_NAMES:
        return TOP_NAMES[module]
    stage, number, rest = module.split(".", 2)
    for pattern, replacement in LAYER_NAMES:
        if re.match(pattern, rest):
            path, _, last = re.sub(pattern, replacement, rest).rpartition(".")
            return f"model.{stage}.{number}.{path}.{COMPRESSOR_NAMES.get(last, last)}"
    raise AssertionError(f"no name for {module}")


def expected_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What the client must hold, by its names, from our decoder."""
    bases = {re.sub(r"\.(weight\w*|scale)$", "", name) for name in checkpoint.tensors}
    expected: dict[str, Tensor] = {}
    for base in bases:
        if not base.startswith("mtp.") and ".experts." not in base:
            expected[their_name(base)] = read_dense(checkpoint, base)
    config = load_model_config(checkpoint.path)
    for layer in range(config.num_hidden_layers):
        experts = f"layers.{layer}.ffn.experts"
        gate_up, down = [], []
        for e in range(config.n_routed_experts):
            w1, w2, w3 = (
                read_dense(checkpoint, f"{experts}.{e}.{p}").bfloat16() for p in ("w1", "w2", "w3")
            )
            gate_up.append(torch.cat([w1, w3]))
            down.append(w2)
        expected[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        expected[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(down)
    return expected


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_missing_or_left_over(loaded: Callable[[str], Loaded], case: str) -> None:
    complaints = loaded(case).complaints
    assert complaints.keys() >= {"missing_keys", "unexpected_keys", "mismatched_keys"}
    assert not any(complaints.values()), complaints


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_bit_equal(loaded: Callable[[str], Loaded], case: str) -> None:
    found = loaded(case)
    with open_checkpoint(found.folder) as checkpoint:
        expected = expected_state(checkpoint)
    assert expected.keys() == found.state.keys()
    for name, value in expected.items():
        held = found.state[name]
        assert torch.equal(held, value.to(held.dtype)), name


@pytest.mark.parametrize("case", [c for c in EXACT if c != "bf16"])
def test_exact_targets_need_no_rounding(loaded: Callable[[str], Loaded], case: str) -> None:
    """BF16 holds every value of FP8, MXFP4 and the INT8 cast, so the client computes with ours."""
    with open_checkpoint(loaded(case).folder) as checkpoint:
        coded = [
            base
            for name in checkpoint.tensors
            if (base := re.sub(r"\.(weight|weight_packed)$", "", name)) != name
            and find_weight(checkpoint, base).scheme is not None
        ]
        assert len(coded) > 50
        for base in coded:
            value = read_dense(checkpoint, base)
            assert torch.equal(value.bfloat16().float(), value), base


@pytest.mark.parametrize("case", ["int8-g32", "int4-g128"])
def test_targets_select_the_routed_experts(converted: Callable[[str], Path], case: str) -> None:
    """The library's own matcher, because transformers loads V4 without asking the targets."""
    folder = converted(case)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()

    def matches(module: str, patterns: list[str]) -> bool:
        return any(match_name(module, pattern) for pattern in patterns)

    with open_checkpoint(folder) as checkpoint:
        packed = {n.removesuffix("_packed") for n in checkpoint.tensors if n.endswith("_packed")}
        linear = {n for n, s in checkpoint.tensors.items() if n.endswith("weight") and s.shape[1:]}
    assert len(packed) == 60 and len(linear) > 30
    for weight in packed | linear:
        module = weight.removesuffix(".weight")
        assert matches(module, group["targets"]) == (weight in packed), module
        assert matches(module, config["ignore"]) == (weight in linear), module


def plain_logits(folder: Path, ids: Tensor) -> Tensor:
    """Our forward pass with experts as the client holds them: rounded to BF16."""
    config = load_model_config(folder)
    with open_checkpoint(folder) as checkpoint:
        exact = CheckpointParams(checkpoint)

        def params(base: str, /) -> Tensor:
            value = exact(base)
            return value.bfloat16().float() if ".ffn.experts." in base else value

        models = [StreamModel(params)]
        streams = stream_forward(models, config, [ids])
        return torch.cat([part.logits[0] for part in stream_logits(models, config, streams)])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) of each row, nats, in float64."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_ours(loaded: Callable[[str], Loaded], case: str) -> None:
    found = loaded(case)
    ours = plain_logits(found.folder, found.ids)
    worst = relative(found.logits_float, ours)
    kl = divergence(ours, found.logits_bf16)
    print(f"{case}: float {worst:.1e}; BF16 KL median {kl.median():.1e}, mean {kl.mean():.1e}")
    assert worst < 1e-4
    assert float(kl.median()) < MEDIAN_KL
    assert float(kl.mean()) < MEAN_KL


@pytest.mark.parametrize("case", EXACT[1:])
def test_exact_targets_compute_the_sources_logits(
    loaded: Callable[[str], Loaded], case: str
) -> None:
    found, source = loaded(case), loaded("source")
    assert torch.equal(found.logits_float, source.logits_float)
    assert torch.equal(found.logits_bf16, source.logits_bf16)


def test_an_exchanged_expert_is_seen(loaded: Callable[[str], Loaded]) -> None:
    """The tolerances above are not so wide that w1 and w3 could be exchanged unnoticed."""
    found = loaded("mxfp4")
    config = load_model_config(found.folder)
    with open_checkpoint(found.folder) as checkpoint:
        exact = CheckpointParams(checkpoint)

        def faulty(base: str, /) -> Tensor:
            last = {"w1": "w3", "w3": "w1"}.get(base[-2:]) if ".experts.1." in base else None
            return exact(base[:-2] + last if last else base)

        models = [StreamModel(faulty)]
        streams = stream_forward(models, config, [found.ids])
        wrong = torch.cat([part.logits[0] for part in stream_logits(models, config, streams)])
    kl = divergence(wrong, found.logits_bf16)
    print(f"exchanged: float {relative(found.logits_float, wrong):.1e}, KL {kl.median():.1e}")
    assert relative(found.logits_float, wrong) > 1e-3
    assert float(kl.median()) > 20 * MEDIAN_KL
