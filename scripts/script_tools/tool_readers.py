"""Files of other tools that a user may hand to a command, as seeds of the fuzzer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from script_tools.seeds import TEXT, Reader, written
from v4quant.evaluation.kld_file import KldFile
from v4quant.evaluation.kld_writer import KldWriter
from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.corpus.text_files import read_rows
from v4quant_calibration.evaluation.token_scores import Softmax
from v4quant_calibration.forward.logits import LogitTile
from v4quant_formats.gguf.imatrix import Inputs, read_imatrix, write_imatrix

_ROWS = [json.dumps({"text": TEXT, "n": i}) for i in range(6)]


def _base(folder: Path) -> Path:
    windows = list(torch.arange(16).reshape(2, 8))
    writer = KldWriter(folder / "base.kld", Corpus([CorpusPart("a", windows)]), 24)
    logits = torch.linspace(-30, 9, 16 * 24).reshape(16, 24)
    writer(LogitTile(0, 16, 0, 24, [logits]))
    writer.close()
    return folder / "base.kld"


def _read_base(path: Path) -> object:
    with KldFile(path) as opened:
        corpus = opened.corpus(None, 0)
        opened.check(corpus, 24)
        model = Softmax(torch.cat(corpus.windows).roll(-1))
        rows = opened.begin(0, model)
        logits = torch.zeros(corpus.tokens, 24)
        model.add(logits, 0)
        rows.add(logits, 0)
        return rows.columns()


def _imatrix(folder: Path) -> Path:
    sizes = {"blk.0.ffn_gate_exps.weight": 4, "blk.0.attn_q_a.weight": 1}
    inputs = {n: Inputs(torch.ones(k, 32).double(), torch.ones(k)) for n, k in sizes.items()}
    write_imatrix(folder / "imatrix.gguf", inputs, ["a.txt"], 2, 8)
    return folder / "imatrix.gguf"


TOOL_READERS: tuple[Reader, ...] = (
    Reader("llama.cpp logits", _base, _read_base),
    Reader("importance matrix", _imatrix, lambda p: list(read_imatrix(p))),
    Reader("json rows", written("c.json", f"[{','.join(_ROWS)}]"), lambda p: list(read_rows(p))),
    Reader("gzip rows", written("c.jsonl.gz", gzip.compress("\n".join(_ROWS).encode())),
           lambda p: list(read_rows(p))),
)  # fmt: skip
