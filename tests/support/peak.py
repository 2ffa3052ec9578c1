"""Peak memory of a command, measured from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def peak_of(command: list[str], home: Path) -> tuple[int, dict[str, Any]]:
    """Peak resident bytes of a command, and the JSON it printed; `home` is for its caches."""
    code = (
        "import json, resource, subprocess, sys; "
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True); "
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss; "
        "print(json.dumps([peak * 1024, json.loads(done.stdout)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.PIPE,
        check=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "XDG_CACHE_HOME": str(home),
            "OMP_NUM_THREADS": "1",
        },
    )
    peak, result = json.loads(done.stdout)
    return peak, result
