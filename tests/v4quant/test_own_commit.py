"""The commit that made a file: a clone's, and whether its files are that commit's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from v4quant.own_commit import _clone


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_a_clone_tells_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    assert _clone(package) == "", "no clone, no commit"
    git("init", "-q")
    assert _clone(package) == "", "nothing was committed yet"
    (package / "a.py").write_text("a = 1\n")
    git("add", "-A")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    assert _clone(package) == commit
    (tmp_path / "notes").write_text("what git does not know changes nothing\n")
    assert _clone(package) == commit
    (package / "a.py").write_text("a = 2\n")
    assert _clone(package) == f"{commit}+changes"
