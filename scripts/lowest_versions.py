"""The lowest versions that pyproject.toml allows, as requirements for pip, one a line.

    python scripts/lowest_versions.py > lowest.txt      then: pip install -r lowest.txt

`torch` is left out: its wheels on the index bring three gigabytes of CUDA with them, and the
environment that the requirements go into has one already. A dependency without a lower bound is
refused, because its lowest version would be one that nobody tries.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
LEFT_OUT = ("torch",)
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9][0-9.]*)[^;]*(;.*)?")


def lowest(dependencies: list[str]) -> list[str]:
    """`name==version`, with its marker, of each dependency. Raises ValueError without a bound."""
    pinned = []
    for dependency in dependencies:
        found = _REQUIREMENT.fullmatch(dependency.strip())
        if found is None:
            raise ValueError(f"pyproject.toml: {dependency!r} has no lowest version; write name>=N")
        name, version, marker = found.groups()
        if name not in LEFT_OUT:
            pinned.append(f"{name}=={version}{marker or ''}")
    return pinned


def main() -> int:
    """Print them."""
    table = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    print("\n".join(lowest(table["project"]["dependencies"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
