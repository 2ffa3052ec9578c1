"""Calibration's moments, counts and magnitudes against other ways to the same rows.

The trunk is compared with what transformers' own model feeds its experts; the MTP stage, which
transformers leaves out, and the accumulation itself with an observer that keeps every row.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.calibration.oracle_loader import OracleParams
from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.forward.drafts import stream_mtp
from v4quant_calibration.forward.stream import StreamModel, stream_forward
from v4quant_calibration.model.observer import SilentObserver
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.statistics.collect import MomentObserver, calibrate
from v4quant_calibration.statistics.stats import Stats, load_stats, write_stats
from v4quant_formats.model_config import load_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress

DATA = Path(__file__).parents[2] / "data"
TINY = DATA / "tiny-a"
STAGES = ["layers.0", "layers.1", "layers.2", "layers.3", "mtp.0"]
CONFIG = load_model_config(TINY)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    found: Tensor = load_file(DATA / "tiny-a.reference.safetensors")["input_ids"][0]
    return found


def run(windows: list[Tensor], options: ForwardOptions | None = None, floor: int = 32) -> Stats:
    with open_checkpoint(TINY) as checkpoint:
        return calibrate(
            checkpoint, CONFIG, windows, options or ForwardOptions(), floor, SilentProgress()
        ).stats


@pytest.fixture(scope="module")
def stats(ids: Tensor) -> Stats:
    return run([ids])


class Keeper(SilentObserver):
    """Keeps every row an expert's matrices multiply, and every choice of the router."""

    def __init__(self) -> None:
        self.inputs: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self.hidden: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self.routes: dict[str, Tensor] = {}

    def on_route(self, layer: str, expert_ids: Tensor, weights: Tensor) -> None:
        self.routes[layer] = expert_ids.clone()

    def on_expert_input(self, layer: str, expert: int, x: Tensor) -> None:
        self.inputs[layer, expert].append(x.clone())

    def on_expert_hidden(self, layer: str, expert: int, h: Tensor) -> None:
        self.hidden[layer, expert].append(h.clone())


def keep(windows: list[Tensor], options: ForwardOptions) -> Keeper:
    keeper = Keeper()
    with open_checkpoint(TINY) as checkpoint:
        models = [StreamModel(CheckpointParams(checkpoint), options, keeper)]
        streams = stream_forward(models, CONFIG, windows)
        stream_mtp(models, CONFIG, windows, streams)
    return keeper


@pytest.mark.parametrize("activations", ["plain", "official"])
def test_every_row_counts_once(
    generator: torch.Generator, ids: Tensor, activations: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small products, so that one expert's rows arrive in several calls.
    monkeypatch.setattr("v4quant_calibration.model.experts.ROWS", 32)
    cuts = torch.randint(1, len(ids) - 1, (2,), generator=generator).sort().values.tolist()
    print("cuts", cuts)
    windows = [w for w in torch.tensor_split(ids, cuts) if len(w)]
    options = ForwardOptions(activations=activations)
    found, keeper = run(windows, options), keep(windows, options)
    assert max(len(calls) for calls in keeper.inputs.values()) > 1
    assert list(found.stages) == STAGES
    for name, stage in found.stages.items():
        routed = torch.bincount(keeper.routes[name].flatten(), minlength=4)
        assert torch.equal(stage.tokens, routed)
        assert int(stage.tokens.sum()) == len(ids) * CONFIG.num_experts_per_tok
        for expert in range(CONFIG.n_routed_experts):
            for source, kept in (("w13", keeper.inputs), ("w2", keeper.hidden)):
                rows = torch.cat(kept[name, expert]).double()
                assert len(rows) == stage.tokens[expert]
                torch.testing.assert_close(
                    stage.sums[source][expert], (rows * rows).sum(0), rtol=1e-12, atol=0
                )
                assert float(stage.amax[source][expert]) == float(rows.abs().max())
                assert float(stage.sums[source][expert].min()) > 0


def feed_transformers(ids: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What transformers gives each layer's experts: rows, chosen experts, their weights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    fed: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            TINY, dtype=torch.bfloat16, attn_implementation="eager"
        )
        model = model.float().eval()
        for index, layer in enumerate(model.model.layers):

            def hook(_: Any, args: tuple[Tensor, ...], index: int = index) -> None:
                fed[f"layers.{index}"] = (args[0].clone(), args[1].clone(), args[2].clone())

            layer.mlp.experts.register_forward_pre_hook(hook)
        with torch.no_grad():
            model(input_ids=ids[None], use_cache=False)
    return fed


def test_trunk_against_transformers(ids: Tensor, stats: Stats) -> None:
    """Counts are equal, moments agree to the rounding of two float32 forward passes."""
    fed, params = feed_transformers(ids), OracleParams(TINY)
    assert list(fed) == STAGES[:-1]
    for name, (x, chosen, weights) in fed.items():
        stage = stats.stages[name]
        for expert in range(CONFIG.n_routed_experts):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            assert int(stage.tokens[expert]) == len(token), (name, expert)
            rows = x[token].double()
            w1, w3 = (params(f"{name}.ffn.experts.{expert}.{w}").double() for w in ("w1", "w3"))
            gate = (rows @ w1.T).clamp(max=CONFIG.swiglu_limit)
            up = (rows @ w3.T).clamp(-CONFIG.swiglu_limit, CONFIG.swiglu_limit)
            hidden = gate * torch.sigmoid(gate) * up * weights[token, slot].double()[:, None]
            for source, expected in (("w13", rows), ("w2", hidden)):
                moment = expected.square().mean(0)
                found = stage.sums[source][expert] / stage.tokens[expert]
                assert float((found - moment).abs().max() / moment.max()) < 1e-4
                largest = float(stage.amax[source][expert])
                assert largest == pytest.approx(float(expected.abs().max()), rel=1e-4)


def test_importance_is_the_second_moment(stats: Stats) -> None:
    stage = stats.stages["layers.0"]
    for projection, source in (("w1", "w13"), ("w3", "w13"), ("w2", "w2")):
        found = stats.importance(f"layers.0.ffn.experts.2.{projection}")
        assert found is not None
        assert torch.equal(found, stage.sums[source][2] / stage.tokens[2])
        amax = stats.input_amax(f"layers.0.ffn.experts.2.{projection}")
        assert amax == float(stage.amax[source][2])
    assert stats.importance("layers.0.ffn.shared_experts.w1") is None
    assert stats.importance("mtp.1.ffn.experts.0.w1") is None


def test_starved_experts_are_listed_and_pooled(ids: Tensor, stats: Stats) -> None:
    counts = torch.cat([s.tokens for s in stats.stages.values()])
    floor = int(counts.median()) + 1
    found = run([ids], floor=floor)
    expected = [
        (name, expert, int(tokens))
        for name, stage in found.stages.items()
        for expert, tokens in enumerate(stage.tokens)
        if tokens < floor
    ]
    assert found.starved() == expected and 0 < len(expected) < len(counts)
    for name, stage in found.stages.items():
        pooled = stage.sums["w2"].sum(0) / stage.tokens.sum()
        for expert in range(CONFIG.n_routed_experts):
            count = int(stage.tokens[expert])
            own = stage.sums["w2"][expert] / count if count else torch.zeros_like(pooled)
            mixed = count / floor * own + (1 - count / floor) * pooled
            starved = (name, expert, int(stage.tokens[expert])) in expected
            module = f"{name}.ffn.experts.{expert}.w2"
            importance = found.importance(module)
            assert importance is not None
            assert torch.allclose(importance, mixed if starved else own, rtol=1e-12)
            largest = stage.amax["w2"].max() if starved else stage.amax["w2"][expert]
            assert found.input_amax(module) == float(largest)


def test_an_expert_without_tokens_uses_the_pool() -> None:
    """Few tokens of one id: the hash layer sends all to the same experts, others see none."""
    found = run([torch.full((3,), 7)], floor=1)
    stage = found.stages["layers.0"]
    absent = [name for name, _, tokens in found.starved() if tokens == 0]
    assert "layers.0" in absent
    expert = stage.tokens.tolist().index(0)
    importance = found.importance(f"layers.0.ffn.experts.{expert}.w1")
    assert importance is not None
    assert torch.equal(importance, stage.sums["w13"].sum(0) / stage.tokens.sum())
    assert bool(torch.isfinite(importance).all())


def test_same_bytes_twice_and_back(tmp_path: Path, ids: Tensor, stats: Stats) -> None:
    file, again = tmp_path / "stats.v4q", tmp_path / "again.v4q"
    write_stats(file, stats)
    write_stats(again, run([ids]))
    assert file.read_bytes() == again.read_bytes()
    loaded = load_stats(file, stats.source_digest)
    write_stats(again, loaded)
    assert file.read_bytes() == again.read_bytes()
    assert loaded.starved() == stats.starved()


def test_without_draft_stage(tmp_path: Path, ids: Tensor) -> None:
    """A checkpoint whose draft was dropped is calibrated on its trunk alone."""
    from tests.support.conversion import convert
    from v4quant.recipe import Recipe

    convert(TINY, tmp_path / "out", Recipe("mxfp4", draft="drop"))
    with open_checkpoint(tmp_path / "out") as checkpoint:
        found = calibrate(checkpoint, CONFIG, [ids], ForwardOptions(), 32, SilentProgress()).stats
    assert list(found.stages) == STAGES[:-1]


def test_a_lost_row_would_be_seen(ids: Tensor, stats: Stats) -> None:
    """The comparison above fails when one of an expert's rows is left out."""

    class Forgetful(MomentObserver):
        def on_expert_hidden(self, layer: str, expert: int, h: Tensor) -> None:
            super().on_expert_hidden(layer, expert, h[1:])

    observer = Forgetful(CONFIG, STAGES)
    with open_checkpoint(TINY) as checkpoint:
        stream_forward(
            [StreamModel(CheckpointParams(checkpoint), observer=observer)], CONFIG, [ids]
        )
    found, whole = observer.stages["layers.2"].sums["w2"], stats.stages["layers.2"].sums["w2"]
    assert float(((found - whole).abs() / whole.max()).max()) > 1e-3
