"""The small files that a user may hand to a command: how to make a good one, and who reads it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from script_tools.seeds import TEXT, Reader, written
from script_tools.tool_readers import TOOL_READERS
from script_tools.work_readers import WORK_READERS
from v4quant.api.publishing import plan_push
from v4quant.conversion.journal import FinishedShard, Journal, ShardFacts
from v4quant.conversion.records import TensorRecord
from v4quant.evaluation.figures import Figures
from v4quant.evaluation.report import render_html, render_markdown
from v4quant.evaluation.saved_logits import SavedLogits
from v4quant.own_folders import FOLDER, RECORD_NAME, own_folder, remove_own_folder
from v4quant.pipeline.recipe_file import load_pipeline
from v4quant.pipeline.step_cache import RECORD_NAME as STEPS_NAME
from v4quant.pipeline.step_cache import FinishedSteps
from v4quant.publishing.card import CardRequest, render_card
from v4quant.recipe import read_toml, recipe_from_table
from v4quant_calibration.corpus.chat_marks import BOS
from v4quant_calibration.corpus.corpus import CorpusRequest, load_corpus
from v4quant_calibration.solve.solution import SOLUTION_NAME, load_solution
from v4quant_calibration.statistics.stats import StageStats, Stats, load_stats, write_stats
from v4quant_formats.manifest import MANIFEST_NAME, read_manifest
from v4quant_formats.shards import WrittenFile

TOML = 'source = "here"\n[quantize]\nscheme = "fp8"\n[evaluate]\ncorpus = ["a.txt"]\ntokens = 64\n'
RECIPE = 'scheme = "int4-g32"\nengine = "vllm"\n[schemes]\n"layers.0-1.experts" = "int8-g32"\n'


def _tokenizer(folder: Path) -> Path:
    words = {word: i for i, word in enumerate([BOS, *sorted(set(TEXT.split()))])} | {"[UNK]": 90}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([BOS])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def _read_corpus(path: Path) -> object:
    tokenizer = path.parent / "tokenizer.json"
    if not tokenizer.exists():
        _tokenizer(path.parent)
    return load_corpus([path], tokenizer, CorpusRequest(16, None, 0, 100))


def _read_with_tokenizer(path: Path) -> object:
    corpus = path.parent / "corpus.txt"
    corpus.write_text(TEXT * 20)
    return load_corpus([corpus], path, CorpusRequest(16, None, 0, 100))


def _npy(folder: Path) -> Path:
    np.save(folder / "ids.npy", np.arange(64).reshape(4, 16))
    return folder / "ids.npy"


def _ids(folder: Path) -> Path:
    save_file({"input_ids": torch.arange(64).reshape(4, 16)}, folder / "ids.safetensors")
    return folder / "ids.safetensors"


def _stats(folder: Path) -> Path:
    sums = {"w13": torch.ones(4, 8, dtype=torch.float64), "w2": torch.ones(4, 8).double()}
    amax = dict.fromkeys(sums, torch.ones(4))
    stage = StageStats(torch.full((4,), 9), sums, amax)
    write_stats(folder / "stats.v4q", Stats("d", 1, {"layers.0": stage}, {}))
    return folder / "stats.v4q"


def _solution(folder: Path) -> Path:
    _stats(folder)
    return written(SOLUTION_NAME, json.dumps(SOLUTION))(folder)


def _journal(folder: Path) -> Path:
    record = TensorRecord("m", "cast", "mxfp4", "fp8", 32, 2, 0.5, 0.25)
    (folder / FOLDER).mkdir()
    journal = Journal(folder, "plan", {"a": ShardFacts(3, ("m",))}, "earlier")
    (folder / "a").write_bytes(b"xxx")
    journal.add(FinishedShard(WrittenFile("a", 3, "0" * 64), (record,)))
    return folder / FOLDER / "journal-0.jsonl"


def _read_journal(path: Path) -> object:
    journal = Journal(path.parent.parent, "plan", {"a": ShardFacts(3, ("m",))}, "now")
    journal.check(sorted(journal.unchecked), 1, lambda count: None)
    return journal


def _own(folder: Path) -> Path:
    own_folder(folder, "source")
    return folder / FOLDER / RECORD_NAME


def _manifest(folder: Path) -> Path:
    record = asdict(TensorRecord("layers.0.ffn.experts.0.w1", "cast", "mxfp4", "fp8", 32, 2))
    table = {
        "manifest_version": 1,
        "tool": {"v4quant": "0", "torch": "2", "python": "3"},
        "source": {"name": "x", "release": "flash", "digest": "d", "tensors": 1, "bytes": 8},
        "recipe": {"scheme": "fp8", "format": "deepseek"},
        "stats": None,
        "plan": "p",
        "files": [{"name": "model.safetensors", "bytes": 3, "sha256": "0" * 64}],
        "classes": [{"role": "experts", "weights": 32, "bytes_in": 20, "bytes_out": 32}],
        "dropped": [{"name": "y", "reason": "draft"}],
        "tensors": [TensorRecord(**record).as_dict()],
    }
    return written(MANIFEST_NAME, json.dumps(table))(folder)


def _read_card(path: Path) -> object:
    return render_card(read_manifest(path.parent), CardRequest("me/x"))


def _read_evaluation(path: Path) -> object:
    """As a card and as a report take it."""
    _manifest(path.parent)
    (path.parent / "model.safetensors").write_bytes(b"xxx")
    return plan_push(path.parent, "me/x", evaluation=path)


def _read_report(path: Path) -> object:
    from v4quant.api.publishing import _evaluation

    found = _evaluation(path.parent, path) or Figures()
    return render_html(found), render_markdown(found)


SOLUTION = {
    "version": 1, "source_digest": "d", "finished": True, "scheme": "int4-g32", "stages": {},
}  # fmt: skip
EVALUATION: dict[str, Any] = {
    "candidate": {"path": "out", "bytes": 3, "scheme": "fp8", "expert_bits_per_weight": 8.0},
    "reference": {"path": "in", "bytes": 9, "scheme": "mxfp4", "expert_bits_per_weight": 4.25},
    "tokens": 64, "perplexity": 9.5, "reference_perplexity": 9.4, "kl_mean": 1e-3,
    "noise_floor": {"kl_mean": 1e-4, "top1_agreement": 0.99}, "top1_agreement": 0.98,
    "verdict": {"text": "fine", "level": "ok"}, "parts": [{"name": "a", "tokens": 64}],
}  # fmt: skip


def _logits(folder: Path) -> Path:
    save_file(
        {"logits": torch.zeros(2, 8, 16), "input_ids": torch.zeros(2, 8, dtype=torch.int64)},
        folder / "logits.safetensors",
    )
    return folder / "logits.safetensors"


def _read_logits(path: Path) -> object:
    with SavedLogits(path) as saved:
        return saved.facts


READERS: tuple[Reader, ...] = (
    Reader("recipe", written("r.toml", RECIPE),
           lambda p: recipe_from_table(read_toml(p), str(p))),
    Reader("run file", written("run.toml", TOML), lambda p: load_pipeline(str(p))),
    Reader("corpus", written("c.txt", TEXT * 20), _read_corpus),
    Reader("jsonl", written("c.jsonl", json.dumps({"text": TEXT}) + "\n"
           + json.dumps({"messages": [{"role": "user", "content": TEXT}]}) + "\n"), _read_corpus),
    Reader("npy", _npy, _read_corpus),
    Reader("ids", _ids, _read_corpus),
    Reader("tokenizer", _tokenizer, _read_with_tokenizer),
    Reader("statistics", _stats, lambda p: load_stats(p, "d")),
    Reader("solution", _solution,
           lambda p: load_solution(p.parent, "d")),
    Reader("journal", _journal, _read_journal),
    Reader("own folders", _own, lambda p: remove_own_folder(p.parent.parent, "source")),
    Reader("steps", written(STEPS_NAME, '{"a": ["k", "h"]}'),
           lambda p: FinishedSteps(p.parent).has("k", p)),
    Reader("manifest", _manifest, _read_card),
    Reader("evaluation", written("evaluation.json", json.dumps(EVALUATION)), _read_evaluation),
    Reader("report", written("evaluation.json", json.dumps(EVALUATION)), _read_report),
    Reader("logits", _logits, _read_logits),
    *TOOL_READERS,
    *WORK_READERS,
)  # fmt: skip


def nest(path: Path, rng: random.Random) -> None:
    """Tables in tables."""
    depth = rng.choice((100, 3000, 200_000))
    opening = rng.choice(("[", "{", '{"a":', "a = [", "[a."))
    path.write_text(path.read_text("utf-8", "replace") + "\nb = " + opening * depth)


def digits(path: Path, rng: random.Random) -> None:
    """An integer no language wants to read."""
    text, number = path.read_text("utf-8", "replace"), "9" * rng.choice((30, 400, 5000))
    at = rng.randrange(len(text) + 1)
    path.write_text(text[:at] + number + text[at:])


def escapes(path: Path, rng: random.Random) -> None:
    """Escapes, direction marks and halves of surrogate pairs in the middle of words."""
    text = path.read_text("utf-8", "replace")
    at = rng.randrange(len(text) + 1)
    odd = rng.choice(("\x1b]0;x\x07", "\x9b31m", "\u202e", "\\ud800", "\x00", "<script>", "'\"`|"))
    path.write_text(text[:at] + odd + text[at:])


TEXT_MUTATIONS: tuple[Callable[[Path, random.Random], None], ...] = (nest, digits, escapes)
