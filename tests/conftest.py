"""What has to happen before any test module is imported.

Triton decides at import whether kernels run on a GPU or in its interpreter, and the kernel tests
share this process with all others, so the choice is made here. On a GPU machine start pytest with
TRITON_INTERPRET=0 to run the same tests on the device. (Compilation needs a process without the
interpreter; `kernels/test_compile.py` starts one.)
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
