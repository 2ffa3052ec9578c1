"""The state of a run that can go on: how many layers are finished, which files hold their streams,
and what the run noted of them. It lies where users keep files, so it counts only as it was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from v4quant_formats.errors import FormatError
from v4quant_formats.shards import write_file_atomically
from v4quant_formats.small_files import read_small

STATE_NAME = "state.json"
_MAX_BYTES = 2**26


@dataclass(frozen=True)
class RunState:
    """key: digest of what decides the run's numbers. files: bytes by name."""

    key: str
    finished: int
    files: Mapping[str, int]
    notes: dict[str, Any]


def write_state(folder: Path, state: RunState) -> None:
    """Replace the folder's state. Raises OutputError."""
    text = json.dumps(asdict(state))
    write_file_atomically(folder / STATE_NAME, json.dumps([_seal(text), text]).encode())


def read_state(folder: Path, key: str) -> RunState | None:
    """The state of an earlier process of the run `key`; None for anything else."""
    try:
        seal, text = json.loads(read_small(folder / STATE_NAME, _MAX_BYTES))
        if seal != _seal(text):
            return None
        state = RunState(**json.loads(text))
    except (FormatError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return state if state.key == key else None


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
