"""The training script: its parts against plain arithmetic, and one small run from text to files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.support.tiny_training import ROOT, prose, script_rooms, seeded, train
from v4quant_formats.deepseek_v4 import expected_modules, split_part
from v4quant_formats.model_config import parse_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.codec import dequantize
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import SCHEMES

TINY = ROOT / "v4quant" / "data" / "tiny-v4"
pytestmark = pytest.mark.usefixtures("script_rooms")
__all__ = ["script_rooms"]  # a fixture, which pytest finds by its name


def toy_config() -> dict[str, Any]:
    """One window layer (hashed), one CSA, one HCA; every matrix whole 128x128 tiles."""
    config: dict[str, Any] = json.loads((TINY / "config.json").read_text())
    config |= {
        "hidden_size": 128,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "num_hidden_layers": 3,
        "num_hash_layers": 1,
        "num_attention_heads": 2,
        "index_n_heads": 4,
        "index_topk": 8,
        "o_groups": 1,
        "compress_ratios": [0, 4, 128, 0],
    }
    return config


def test_from_text_to_a_loadable_checkpoint(tmp_path: Path) -> None:
    """Run the script; transformers and our reader must agree about what it wrote."""
    generator = seeded()
    options = ["--window", "256", "--tokens-per-step", "256"]
    train(tmp_path, toy_config(), generator, (3000, 600), options)
    out = tmp_path / "out"

    with open_checkpoint(out) as checkpoint:
        config = parse_model_config(dict(checkpoint.config))
        assert dict(checkpoint.config) == toy_config()
        assert [layer.kind for layer in config.layers] == ["swa", "csa", "hca"]
        dtypes = {s.dtype for s in checkpoint}
        assert dtypes == {"I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8"}
        names = set(checkpoint.tensors)
        modules = {split_part(n)[0] for n in names}
        draft = ("e_proj", "h_proj", "enorm", "hnorm", "norm")
        draft += ("hc_head_fn", "hc_head_base", "hc_head_scale")
        assert modules == {*expected_modules(config, names), *(f"mtp.0.{m}" for m in draft)}
        assert len(checkpoint.files) == 3 + 3
        _check_against_transformers(out, checkpoint)


def test_command_line_refuses_what_cannot_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_tiny_v4 import parse_arguments

    (tmp_path / "precious").write_text("x")
    full, new = ["--out", str(tmp_path)], ["--out", str(tmp_path / "new")]
    for arguments, told in (
        ([*full, "--steps", "1"], "not an empty folder"),
        (new, "how long"),
        ([*new, "--steps", "1", "--only-given-text"], "needs --text"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse_arguments(arguments)
        assert stopped.value.code == 2
        assert told in capsys.readouterr().err


def _check_against_transformers(out: Path, checkpoint: Any) -> None:
    from tiny_v4_training.heldout import load_written

    model = load_written(out)  # raises on missing or unexpected names
    state = model.state_dict()
    experts = "model.layers.1.mlp.experts"
    for expert in range(4):
        w1, w3, w2 = (
            _decoded(checkpoint, f"layers.1.ffn.experts.{expert}.{p}") for p in ("w1", "w3", "w2")
        )
        assert torch.equal(state[f"{experts}.gate_up_proj"][expert], torch.cat([w1, w3]))
        assert torch.equal(state[f"{experts}.down_proj"][expert], w2)
    pairs = {
        "layers.1.attn.indexer.wq_b": "layers.1.self_attn.compressor.indexer.q_b_proj.weight",
        "layers.2.attn.wo_a": "layers.2.self_attn.o_a_proj.weight",
        "layers.0.ffn.shared_experts.w3": "layers.0.mlp.shared_experts.up_proj.weight",
    }
    for official, name in pairs.items():
        assert torch.equal(state[f"model.{name}"], _decoded(checkpoint, official))
    table = checkpoint.read("layers.0.ffn.gate.tid2eid")
    assert torch.equal(state["model.layers.0.mlp.gate.tid2eid"], table)
    assert (table[:, 0] != table[:, 1]).all()


def _decoded(checkpoint: Any, module: str) -> torch.Tensor:
    codes, scale = checkpoint.read(f"{module}.weight"), checkpoint.read(f"{module}.scale")
    if codes.dtype == torch.int8:
        shape = (codes.shape[0], 2 * codes.shape[1])
        return dequantize(QTensor(SCHEMES["mxfp4"], shape, codes.view(torch.uint8), scale))
    return dequantize(QTensor(SCHEMES["fp8"], tuple(codes.shape), codes, scale))


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    from tiny_v4_training import loop, model, text

    generator = seeded()
    ids = torch.randint(3, 2048, (4000,), generator=generator)
    streams = [text.Stream("random", ids)]
    settings = loop.Settings(0, 0, 128, 128, 128, 60.0)
    raw, counts = toy_config(), torch.bincount(ids, minlength=2048)

    def phase() -> Any:
        return loop.trunk_phase(model.build_trunk(raw, counts, 7))

    def run(part: Any, steps: int) -> None:
        budget = loop.Budget(steps, None)
        loop.train(part, budget, settings, streams, lambda: None)

    # A budget changes the schedule, so both runs use the same and one is stopped by an error.
    whole = phase()
    run(whole, 3)
    broken = phase()
    path = tmp_path / "state.pt"

    def stop_after_two() -> float:
        if broken.step == 1:  # the second step has been done, not yet counted
            broken.step = 2
            loop.save_state(path, settings, {"trunk": broken.state()})
            raise KeyboardInterrupt
        return after()

    after, broken.after_step = broken.after_step, lambda: (after(), stop_after_two())[0]
    with pytest.raises(KeyboardInterrupt):
        run(broken, 3)
    resumed = phase()
    resumed.restore(loop.load_state(path, settings)["trunk"])
    run(resumed, 3)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    other = loop.Settings(1, 0, 128, 128, 128, 60.0)
    with pytest.raises(ValueError, match="other settings"):
        loop.load_state(path, other)


def test_indexer_learns_and_trunk_does_not_learn_from_it() -> None:
    from tiny_v4_training import model

    generator = seeded()
    trunk = model.build_trunk(toy_config(), torch.ones(2048, dtype=torch.int64), 3).train()
    distillation = model.IndexerDistillation(trunk)
    distillation.see_everything(True, 8)
    ids = torch.randint(3, 2048, (2, 130), generator=generator)
    trunk(ids, use_cache=False)
    distillation.take_loss().backward()
    for name, parameter in trunk.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert learns == (".indexer." in name), name
    assert float(distillation.take_loss()) == 0


def test_attention_kl_against_float64() -> None:
    from tiny_v4_training.model import attention_kl

    generator = seeded()
    weights = torch.rand(2, 5, 7, generator=generator)
    weights[torch.rand(2, 5, 7, generator=generator) < 0.4] = 0
    weights[0, 0] = 0
    scores = torch.randn(2, 5, 7, generator=generator) * 3
    expected = []
    for w, s in zip(weights.reshape(-1, 7).tolist(), scores.reshape(-1, 7).tolist(), strict=True):
        total = math.fsum(w)
        if total:
            norm = math.fsum(math.exp(b) for a, b in zip(w, s, strict=True) if a)
            terms = [
                a / total * (math.log(a / total) - b + math.log(norm))
                for a, b in zip(w, s, strict=True)
                if a
            ]
            expected.append(math.fsum(terms))
    assert math.isclose(
        float(attention_kl(weights, scores)), math.fsum(expected) / len(expected), rel_tol=1e-4
    )
    assert float(attention_kl(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))) == 0


def test_hash_table_is_distinct_and_even() -> None:
    from tiny_v4_training.model import hash_table

    generator = seeded()
    counts = (1e6 / torch.arange(1, 2049) ** 1.1).long()  # Zipf, as words are
    counts[:8] = counts[8]
    table = hash_table(counts, 16, 2, generator)
    assert (table[:, 0] != table[:, 1]).all() and table.min() >= 0 and table.max() < 16
    load = torch.zeros(16, dtype=torch.int64)
    load.index_add_(0, table.reshape(-1), counts.repeat_interleave(2))
    assert load.max() / load.double().mean() < 1.05


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32), (3, 40, 24)])
def test_orthogonalise_flattens_singular_values(shape: tuple[int, ...]) -> None:
    from tiny_v4_training.muon import orthogonalise

    matrix = torch.randn(shape, generator=seeded())
    values = torch.linalg.svdvals(orthogonalise(matrix).double())
    assert values.max() < 1.3
    assert values.median() > 0.6
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    agreement = (orthogonalise(matrix).double() * (u @ vh)).sum() / values.numel()
    assert agreement > 0.7


def test_fused_experts_are_orthogonalised_apart() -> None:
    from tiny_v4_training.muon import Muon, orthogonalise

    parameter = torch.nn.Parameter(torch.zeros(2, 32, 24))
    parameter.grad = torch.randn(2, 32, 24, generator=seeded())
    gradient = parameter.grad.clone()
    Muon([{"params": [parameter], "parts": 2}], lr=1.0, momentum=0.5).step()
    ahead = gradient * 0.75  # 0.5 g + 0.5 * (momentum 0.5 g)
    for half in (slice(0, 16), slice(16, 32)):
        torch.testing.assert_close(parameter.data[:, half], -orthogonalise(ahead[:, half]))


def test_heldout_text_is_found_under_other_names_and_wrapping() -> None:
    from tiny_v4_training.text import Document, Source, without_heldout

    generator = seeded()
    secret = prose(generator, 2000)
    words = secret.split()
    rewrapped = "\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9))
    collected = prose(generator, 5000) + " " + rewrapped + " " + prose(generator, 5000)
    source = Source(
        "all", (Document("fresh", prose(generator, 3000)), Document("collected", collected))
    )
    kept, dropped = without_heldout([source], [Document("secret", secret)])
    assert dropped == ["collected"]
    assert [d.name for s in kept for d in s.documents] == ["fresh"]


def test_bundled_calibration_text_does_not_repeat_heldout_text() -> None:
    from tiny_v4_training import text

    folder = ROOT / "v4quant" / "data" / "text"
    heldout = [d for p in folder.glob("heldout-*.txt") for d in text.from_path(p).documents]
    sources = [text.from_path(p) for p in folder.glob("calibration-*.txt")]
    assert len(heldout) == 4 and len(sources) == 4
    assert text.without_heldout(sources, heldout)[1] == []


def test_windows_come_from_the_text_and_from_the_seed_alone() -> None:
    from tiny_v4_training.text import Stream, draw_windows

    streams = [Stream("a", torch.arange(100, 200)), Stream("b", torch.arange(500, 510))]
    first = draw_windows(streams, 50, 20, 0, seed=5)
    assert torch.equal(first, draw_windows(streams, 50, 20, 0, seed=5))
    assert not torch.equal(first, draw_windows(streams, 50, 20, 0, seed=6))
    assert (first[:, 0] == 0).all()
    assert (first[:, 2:] - first[:, 1:-1] == 1).all()
    assert first[:, 1:].min() >= 100 and first[:, 1:].max() < 200
    ends = draw_windows([Stream("a", torch.arange(20))], 400, 20, 0, seed=7)
    assert set(ends[:, 1].tolist()) == {0, 1}  # the last token is reached, never passed
    with pytest.raises(ValueError, match="more text"):
        draw_windows(streams, 1, 101, 0, seed=0)


def test_learned_tokenizer_keeps_the_frame() -> None:
    from tiny_v4_training.text import Document, Source, train_tokenizer

    source = Source("all", (Document("d", prose(seeded(), 4000)),))
    learned = Tokenizer.from_str(train_tokenizer(TINY / "tokenizer.json", [source], 300))
    assert learned.get_vocab_size() == 300
    frame = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    for token in frame["added_tokens"]:
        assert learned.token_to_id(token["content"]) == token["id"]
    words = "she was not that Größe 東京 123"
    assert learned.decode(learned.encode(words).ids) == words


def test_bundled_draft_stage_still_drafts() -> None:
    """The stage's arithmetic is right: the bundled weights draft as well in it as they ever did."""
    from tiny_v4_training import export, heldout, model, mtp

    trunk = heldout.load_written(TINY)
    stage = mtp.MtpStage(model.read_config(TINY / "config.json"), 0)
    with open_checkpoint(TINY) as checkpoint:
        stage.load_state_dict(_draft_state(checkpoint, stage, export))
    text = (ROOT / "v4quant" / "data" / "text" / "heldout-prose.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text[:20000]).ids
    windows = heldout.heldout_windows(torch.tensor(ids), 256, 4, 0)
    assert windows.shape == (4, 256)
    assert heldout.draft_agreement(trunk, stage.eval(), windows) > 0.22
    value, error = heldout.perplexity(trunk, windows)
    assert 25 < value < 90 and 0 < error < value


def _draft_state(checkpoint: Any, stage: Any, export: Any) -> dict[str, torch.Tensor]:
    state = {}
    for name, target in stage.state_dict().items():
        below = name.removeprefix("layer.")
        if below == "mlp.experts.gate_up_proj":
            pairs = [
                [_decoded(checkpoint, f"mtp.0.ffn.experts.{e}.{p}") for p in ("w1", "w3")]
                for e in range(target.shape[0])
            ]
            state[name] = torch.stack([torch.cat(pair) for pair in pairs])
        elif below == "mlp.experts.down_proj":
            experts = range(target.shape[0])
            found = [_decoded(checkpoint, f"mtp.0.ffn.experts.{e}.w2") for e in experts]
            state[name] = torch.stack(found)
        else:
            official = export._MTP.get(name) or export._LAYER[below]
            module = f"mtp.0.{official}".removesuffix(".weight")
            coded = f"{module}.scale" in checkpoint
            plain = f"mtp.0.{official}"
            state[name] = _decoded(checkpoint, module) if coded else checkpoint.read(plain).float()
    return state


def test_learning_rate_schedule() -> None:
    from tiny_v4_training.loop import Budget, rate

    assert rate(0, 0.0) == 1 / 25
    assert rate(100, 0.2) == 1 and rate(100, 0.35) == 1
    assert math.isclose(rate(100, 0.675), 0.5)
    assert rate(100, 1.0) == 0
    assert Budget(10, None).progress(5, 1e9) == 0.5
    assert Budget(10, 1.0).progress(5, 45.0) == 0.75


def test_products_are_taken_in_the_faster_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_v4_training import precision

    for fast, slow in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        precision.product_dtype.cache_clear()
        monkeypatch.setattr(precision, "_seconds", {fast: 0.1, slow: 0.2}.__getitem__)
        assert precision.product_dtype() == fast
    precision.product_dtype.cache_clear()
