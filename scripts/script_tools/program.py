"""Running v4quant as a user does, and reading its JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def v4quant(*arguments: str) -> dict[str, Any]:
    """Run a command and return its JSON. Raises CalledProcessError."""
    done = subprocess.run(
        [sys.executable, "-m", "v4quant", *arguments, "--json"],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found
