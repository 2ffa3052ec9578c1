"""Files that v4quant keeps for itself while it works, or for the next command, as seeds of the
fuzzer: they lie in folders of users, who copy, edit and mix them up.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from script_tools.seeds import Reader, written
from v4quant.allocation.findings import Findings
from v4quant.bench.kernels.cells import Cells
from v4quant.bench.kernels.device import Machine
from v4quant.bench.kernels.tune import stored_tiles
from v4quant.conversion.overwrite import what_we_made
from v4quant.finished import request_of
from v4quant.hub.source import PIN_NAME, forget_fetched
from v4quant.temporary_folders import TemporaryFolder, remove_abandoned
from v4quant_calibration.forward.scratch import Scratch
from v4quant_calibration.model.streams import StreamShape
from v4quant_kernels.progress import SilentProgress

_KEY = "ab" * 32
_SHAPE = StreamShape((3, 5), (2, 4), torch.float32, torch.device("cpu"))
_MACHINE = Machine("cpu", "x", "1", "2", "3", 1.0, 1.0, 1.0)


def _scratch(folder: Path) -> Path:
    with Scratch(folder, _KEY) as store:
        store.open("0.0", _SHAPE)
        store.commit(1)
        return store.folder / "state.json"


def _read_scratch(path: Path) -> object:
    with Scratch(path.parent.parent, _KEY) as store:
        rows = store.open(f"0.{store.finished}", _SHAPE).read(0, 8)
        store.remove()
        return rows


def _findings(folder: Path) -> Path:
    Findings(folder / "r.toml", _KEY).add("kl a", 0.5)
    return folder / "r.toml.unfinished.json"


def _read_findings(path: Path) -> object:
    found = Findings(path.with_name("r.toml"), _KEY)
    if "kl a" in found:
        found.number("kl a")
    found.add("error b", {"int4": 0.5})
    found.finish()
    return found


def _request(folder: Path) -> Path:
    """The record of a finished request has a name of its own in the user's cache."""
    (folder / "out").write_text("x")
    request = request_of({"a": 1}, [], ["d"], [folder / "out"])
    record = {"files": request._files(), "found": {"tokens": 3}}
    return written("record.json", json.dumps(record))(folder)


def _read_request(path: Path) -> object:
    request = request_of({"a": 1}, [], ["d"], [path.with_name("out")])
    request._place.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.is_symlink():
        return None
    request._place.write_bytes(path.read_bytes())
    try:
        return request.answer()
    finally:
        request._place.unlink()


def _temporary(folder: Path) -> Path:
    made = TemporaryFolder(folder)
    made._end.detach()
    return made.path / ".made-by-v4quant"


def _overwritten(folder: Path) -> Path:
    lines = ['{"plan": "x", "stem": ""}', '{"file": {"name": "a.gguf"}}']
    (folder / "a.gguf").write_bytes(b"a")
    return written(".v4quant/journal-0.jsonl", "\n".join(lines) + "\n")(folder)


_TILES = {"device": "x", "triton": "3", "tiles": {"a 16 sums": {"rows": 16, "columns": 32}}}
_PIN = {"repo": "a/b", "revision": None, "commit": "0" * 40}

WORK_READERS: tuple[Reader, ...] = (
    Reader("scratch state", _scratch, _read_scratch),
    Reader("findings", _findings, _read_findings),
    Reader("finished request", _request, _read_request),
    Reader("pinned commit", written(PIN_NAME, json.dumps(_PIN)),
           lambda p: forget_fetched(p.parent)),
    Reader("temporary folder", _temporary, lambda p: remove_abandoned(p.parent.parent)),
    Reader("what is overwritten", _overwritten, lambda p: what_we_made(p.parent.parent)),
    Reader("tuned tiles", written("tiles.json", json.dumps(_TILES)), stored_tiles),
    Reader("rows of a bench", written("rows.jsonl", '{"bench": "moe", "row": {}}\n'),
           lambda p: Cells("moe", _MACHINE, SilentProgress(), p)),
)  # fmt: skip
