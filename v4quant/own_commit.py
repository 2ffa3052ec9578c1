"""Which commit of v4quant is running, where that can be known.

Everything between two releases shares a version number, so what is to be made again, byte for byte,
names the commit too: as `pip` recorded it (PEP 610) when it installed from a repository, or as git
tells of the clone that the package runs from.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

_PATIENCE = 10.0  # seconds for git
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


@cache
def source_commit() -> dict[str, str]:
    """{"commit": hash}, with "+changes" where a clone's files differ from it; {} if unknown."""
    found = _installed() or _clone(Path(__file__).resolve().parent)
    return {"commit": found} if found else {}


def _installed() -> str:
    try:
        told = json.loads(distribution("v4quant").read_text("direct_url.json") or "{}")
        commit = str(told["vcs_info"]["commit_id"])
    except (PackageNotFoundError, ValueError, LookupError, TypeError, OSError):
        return ""
    return commit if _COMMIT.fullmatch(commit) else ""


def _clone(package: Path) -> str:
    """Asks git only where the folder above the package is a clone of ours."""
    git = shutil.which("git")
    if git is None or not (package.parent / ".git").exists():
        return ""
    try:
        commit = _ask(git, package, "rev-parse", "HEAD")
        changed = _ask(git, package, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    if not _COMMIT.fullmatch(commit):
        return ""
    return f"{commit}+changes" if changed else commit


def _ask(git: str, folder: Path, *arguments: str) -> str:
    command = [git, "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    return done.stdout.strip()
