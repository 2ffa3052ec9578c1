"""Training a tiny V4.1: its parts against plain arithmetic, one small run from text to files."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tests.support.tiny_training import ROOT, script_rooms, seeded, train
from v4quant_kernels.codec import dequantize, quantize
from v4quant_kernels.scheme import SCHEMES

TINY = ROOT / "v4quant" / "data" / "tiny-v41"
pytestmark = pytest.mark.usefixtures("script_rooms")
__all__ = ["script_rooms"]  # a fixture, which pytest finds by its name


def toy_config() -> dict[str, Any]:
    """A window layer with an Engram, a source of ratio 2 with one, a source of ratio 1, its reader
    with a list of its own; tiles that are not whole."""
    config: dict[str, Any] = json.loads((TINY / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 32,
        "o_lora_rank": 24,
        "sliding_window": 8,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 4,
        "compress_ratios": [0, 2, 1, 1, 0],
        "kv_source_layer_ids": [1, 2],
        "index_source_layer_ids": [1, 2, 3],
        "candidate_source_layer_id": 2,
        "candidate_topk_blocks": 3,
        "candidate_block_size": 4,
        "engram_layer_ids": [0, 1],
        "engram_head_dim": 32,
        "engram_vocab_size": 20,
        "engram_num_embeddings": [83, 121],
        "dspark_target_layer_ids": [1, 3],
        "dspark_markov_rank": 8,
    }
    return config


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


def test_from_text_to_files_that_read_back(tmp_path: Path) -> None:
    generator = seeded()
    config = toy_config()
    options = ["--tokenizer", str(TINY), "--window", "64", "--tokens-per-step", "64"]
    told = train(tmp_path, config, generator, (2000, 300), options)
    assert "without the Engram" in told
    out = tmp_path / "out"

    assert json.loads((out / "config.json").read_text()) == config
    tensors: dict[str, torch.Tensor] = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    shape = {n: tuple(t.shape) for n, t in tensors.items()}
    assert shape["layers.0.engram.embed.scale"] == (83, 1)
    assert shape["layers.1.attn.wo_a.scale"] == (2, 1)  # 48 x 32: a partial tile
    assert shape["layers.3.ffn.experts.3.w1.weight"] == (32, 32)
    assert shape["layers.3.ffn.experts.3.w2.scale"] == (64, 1)
    assert shape["mtp.0.main_proj.weight"] == (64, 128)
    assert "layers.2.attn.compressor.wgate.weight" not in shape
    assert "layers.3.attn.indexer.wk.weight" not in shape
    assert tensors["layers.0.ffn.gate.bias_vl"].dtype == torch.float32


def test_trunk_and_draft_give_the_oracles_logits() -> None:
    """The reference was computed by a transcription of the official program."""
    from tiny_v4_training.v41_heldout import load_v41

    folder = ROOT / "tests" / "data" / "v41-tiny"
    if not folder.is_dir():
        pytest.skip("the random V4.1 checkpoint is not in tests/data")
    want = load_file(ROOT / "tests" / "data" / "v41-tiny.reference.safetensors")
    config = json.loads((folder / "config.json").read_text())["text_config"]
    trunk, draft = load_v41(folder, config)
    ids = want["input_ids"]
    with torch.no_grad():
        logits, _, targets = trunk(ids)
        torch.testing.assert_close(logits, want["logits_plain"], rtol=0, atol=5e-5)
        before = want["dspark_ids_plain"].view(1, 1, -1)[..., :-1]
        drafted, sure = draft(trunk, targets, torch.tensor([[201]]), before)
    for got, name in ((drafted, "logits"), (sure, "confidence")):
        wanted = want[f"dspark_{name}_plain"].view_as(got[0, 0])
        torch.testing.assert_close(got[0, 0], wanted, rtol=0, atol=1e-4)


def test_a_trained_v4_carries_over() -> None:
    from tiny_v4_training.v41_engram import hash_plan
    from tiny_v4_training.v41_model import V41Trunk
    from tiny_v4_training.v41_start import DoesNotFit, start_from

    from v4quant_formats.opening import open_checkpoint

    folder = ROOT / "v4quant" / "data" / "tiny-v4"
    config = json.loads((TINY / "config.json").read_text())["text_config"]
    trunk = V41Trunk(config, hash_plan(config, tokenizer()))
    fresh = trunk.head.weight[2048:].clone()
    start_from(trunk, folder)
    with open_checkpoint(folder) as source:
        assert torch.equal(trunk.embed.weight[:2048], source.read("embed.weight").float())
        behind = source.read("layers.3.hc_ffn_fn")
        here = trunk.layers[3].hc_attn_fn
        assert torch.equal(here[:4], behind[:4])
        assert torch.equal(here[4:], source.read("layers.3.hc_attn_fn")[4:])
        assert torch.equal(trunk.layers[5].hc_ffn_base[:4], source.read("hc_head_base"))
    assert torch.equal(trunk.head.weight[2048:], fresh)
    small = toy_config()["text_config"]
    with pytest.raises(DoesNotFit, match="here it is"):
        start_from(V41Trunk(small, hash_plan(small, tokenizer())), folder)


def test_the_engrams_constants_are_the_releases() -> None:
    """Those that the project reads files by; rows by whole numbers without overflow."""
    from tiny_v4_training import v41_engram

    config = json.loads((TINY / "config.json").read_text())["text_config"]
    plan = v41_engram.hash_plan(config, tokenizer())
    assert plan.rows == config["engram_num_embeddings"]
    generator = seeded()
    ids = torch.randint(2054, (2, 40), generator=generator)
    for layer in range(2):
        got = plan.row_ids(ids, layer)
        for row, at in ((0, 0), (1, 2), (1, 39)):
            longest, heads = config["engram_max_ngram_size"], config["engram_n_heads"]
            c = [int(plan.token_map[ids[row, at - i]]) if at >= i else plan.pad
                 for i in range(longest)]  # fmt: skip
            mixed, offset, wanted = c[0] * plan.multipliers[layer][0], 0, []
            for order in range(1, longest):
                mixed ^= c[order] * plan.multipliers[layer][order]
                for head in range(heads):
                    prime = plan.primes[layer][(order - 1) * heads + head]
                    wanted.append(mixed % prime + offset)
                    offset += prime
            assert got[row, at].tolist() == wanted


def test_formats_are_those_of_the_kernels() -> None:
    from tiny_v4_training import v41_formats

    generator = seeded()
    weight = (
        torch.randn(40, 64, generator=generator) * torch.randn(40, 1, generator=generator).exp()
    )
    weight[3, :32] = 0
    weight[4, 0], weight[4, 1:32] = 6.0, 0.25  # ties
    codes, exponent = v41_formats.fp4(weight)
    kernel = quantize(weight, SCHEMES["mxfp4"])
    assert kernel.scale is not None
    rounded = v41_formats.rounded_like_stored("layers.0.ffn.down_proj", weight)
    assert torch.equal(rounded, dequantize(kernel))
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    live = torch.ones_like(packed, dtype=torch.bool)
    live[3, :16] = False  # a block of zeros has no scale of its own
    assert torch.equal(packed[live], kernel.codes.view(torch.uint8)[live])
    assert int(exponent.max()) < 20
    tiled = v41_formats.rounded_like_stored("layers.0.attn.wq_a.weight", weight)
    rows = v41_formats.rounded_like_stored("layers.0.engram.embed.weight", weight)
    assert tiled is not None and rows is not None
    for given, height in ((tiled, 32), (rows, 1)):
        for top in range(0, 40, height):
            for left in (0, 32):
                block = weight[top : top + height, left : left + 32]
                largest = float(block.abs().max())
                if largest == 0:
                    continue
                scale = 2.0 ** torch.tensor(largest / 448, dtype=torch.float64).log2().ceil().item()
                want = (block / scale).to(torch.float8_e4m3fn).float() * scale
                assert torch.equal(given[top : top + height, left : left + 32], want)


def test_candidates_are_the_best_blocks_and_the_newest() -> None:
    from tiny_v4_training.v41_attention import candidate_entries

    scores = torch.randn(1, 30, 30, generator=seeded())
    complete = torch.ones(30, 30).tril().bool()
    scores = scores.masked_fill(~complete, float("-inf"))
    got = candidate_entries(scores, complete, 3, 4)
    for query in range(30):
        best = {b: float(scores[0, query, 4 * b : 4 * b + 4].max()) for b in range(query // 4 + 1)}
        best[query // 4] = float("inf")
        kept = sorted(best, key=lambda b: -best[b])[:3]
        want = [j // 4 in kept for j in range(30)]
        assert got[0, query].tolist() == want


def test_weights_are_rounded_for_a_step_and_put_back() -> None:
    from tiny_v4_training.v41_engram import hash_plan
    from tiny_v4_training.v41_formats import rounded_like_stored
    from tiny_v4_training.v41_model import V41Trunk, initialise
    from tiny_v4_training.v41_phases import ROUNDED_FROM, v41_trunk_phase

    torch.manual_seed(secrets.randbits(31))
    config = toy_config()["text_config"]
    trunk = V41Trunk(config, hash_plan(config, tokenizer()))
    initialise(trunk, 0.3)
    before = {n: p.detach().clone() for n, p in trunk.named_parameters()}
    phase = v41_trunk_phase(trunk)
    loss, _ = phase.loss(torch.randint(2054, (2, 34)), ROUNDED_FROM)
    name = "layers.2.ffn.gate_up_proj"
    during = trunk.get_parameter(name).detach().clone()
    assert torch.equal(during, rounded_like_stored(name, before[name]))
    assert not torch.equal(during, before[name])
    loss.backward()  # type: ignore[no-untyped-call]
    phase.before_update()
    for n, parameter in trunk.named_parameters():
        assert torch.equal(parameter, before[n])
    assert trunk.get_parameter(name).grad is not None
