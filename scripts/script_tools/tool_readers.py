"""Files of other tools that a user may hand to a command, as seeds of the fuzzer."""

from __future__ import annotations

import gzip
import importlib.util
import json
import struct
from pathlib import Path

import torch

from script_tools.seeds import TEXT, Reader, written
from v4quant import encode
from v4quant.evaluation.kld_file import KldFile
from v4quant.evaluation.kld_writer import KldWriter
from v4quant.planner.loss import read_measured
from v4quant_calibration.corpus.chat_dialects import RELEASES
from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.corpus.text_files import read_rows
from v4quant_calibration.evaluation.token_scores import Softmax
from v4quant_calibration.forward.logits import LogitTile
from v4quant_formats.engram import read_token_map
from v4quant_formats.gguf.imatrix import Inputs, read_imatrix, write_imatrix
from v4quant_formats.gguf.imatrix_dat import read_dat
from v4quant_formats.onnx.check import check_onnx_folder
from v4quant_formats.onnx.indexer import indexer_model
from v4quant_formats.sidecars import MAX_SIDECAR_BYTES
from v4quant_formats.small_files import read_small

_DATA = Path(__file__).parents[2] / "tests" / "data"
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


def _dat(folder: Path) -> Path:
    """The older form: entries, then for each a name, calls, values."""
    entries = {"blk.0.ffn_gate_exps.weight": [1.5] * 8, "blk.0.attn_q_a.weight": [2.5] * 4}
    data = struct.pack("<i", len(entries))
    for name, values in entries.items():
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", 7, len(values)) + struct.pack(f"<{len(values)}f", *values)
    return written("imatrix.dat", data)(folder)


def _read_chat(path: Path) -> object:
    from v4quant.cli.encode import _read_chat as read

    messages, tools = read(str(path))
    return [encode(messages, mode="think-high", tools=tools, release=r) for r in RELEASES]


def _model_tokens(folder: Path) -> Path:
    data = (_DATA / "v41-tiny" / "tokenizer.json").read_bytes()
    return written("tokenizer.json", data)(folder)


def _read_tokens(path: Path) -> object:
    return read_token_map(read_small(path, MAX_SIDECAR_BYTES), path, 512, 342)


def _onnx(folder: Path) -> Path:
    return written("indexer.onnx", indexer_model(4, 32, {}))(folder)


_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": TEXT},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "[1, 2]"},
        {"role": "user", "content": "And now?"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
}
_MEASURED = {
    "candidate": {"scheme": "int4-g32"}, "kl_mean": 0.01, "top1_agreement": 0.9,
    "others": [{"candidate": {"scheme": "fp8"}, "kl_mean": 1e-4, "top1_agreement": 0.99}],
}  # fmt: skip

_HAS_ONNX = importlib.util.find_spec("onnx") is not None

TOOL_READERS: tuple[Reader, ...] = (
    Reader("llama.cpp logits", _base, _read_base),
    Reader("importance matrix", _imatrix, lambda p: list(read_imatrix(p))),
    Reader("older importance matrix", _dat, lambda p: list(read_dat(p))),
    Reader("chat", written("chat.json", json.dumps(_CHAT)), _read_chat),
    Reader("model's tokens", _model_tokens, _read_tokens),
    Reader("measured", written("m.json", json.dumps(_MEASURED)), read_measured),
    *([Reader("onnx graph", _onnx, lambda p: check_onnx_folder(p.parent))] if _HAS_ONNX else []),
    Reader("json rows", written("c.json", f"[{','.join(_ROWS)}]"), lambda p: list(read_rows(p))),
    Reader("gzip rows", written("c.jsonl.gz", gzip.compress("\n".join(_ROWS).encode())),
           lambda p: list(read_rows(p))),
)  # fmt: skip
