"""What a command that was stopped says: what it has kept, and what the same command does next."""

from __future__ import annotations

# A copy of the streams costs time, so the work since the last one, at most twenty times what it
# costs, is done again.
_COPIED = "finished layers are kept up to the last copy"
_SHARDS = "finished shards are kept"
_KEPT = {
    "allocate": "finished measurements are kept",
    "calibrate": f"{_COPIED}, and with --solve solved ones",
    "evaluate": _COPIED,
    "export-onnx": "finished layers are kept",
    "push": "files that were sent are kept in the repository",
    "quantize": _SHARDS,
    "run": "finished steps are kept, of the one that was running finished layers or shards",
}


def stopped(why: str, command: str) -> str:
    """why: "Interrupted" or "Terminated". command: its name, "" where it is not known."""
    if not command:
        return f"{why}; the same command resumes."
    if kept := _KEPT.get(command):
        return f"{why}; {kept}: the same command resumes."
    return f"{why}; nothing is kept: the same command begins again."
