"""SolveSettings: what shall be solved, and how."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from v4quant_calibration.rounding.descent import DEFAULT_SWEEPS
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_kernels.scheme import Scheme

DEFAULT_MEMORY = 4 * 2**30


@dataclass(frozen=True)
class SolveSettings:
    """How to solve.

    scheme: the routed experts', of integers or of GGUF's blocks. propagate: later layers see
    converted ones. sweeps: the most passes of refinement. memory: bytes that the moments and
    weights of one batch of experts may take. schemes: of every module to be solved, where not all
    routed experts get `scheme`; modules not named stay as they are. recipe: what they were read
    from, JSON values, so that a conversion can tell whether the solution is for it.
    """

    scheme: Scheme
    propagate: bool = True
    sweeps: int = DEFAULT_SWEEPS
    memory: int = DEFAULT_MEMORY
    schemes: Mapping[str, Scheme] | None = None
    recipe: Mapping[str, Any] | None = None

    def scheme_of(self, module: str, columns: int) -> Scheme | None:
        """The scheme a matrix of so many columns is solved for; None where it is not."""
        if self.schemes is not None:
            return self.schemes.get(module)
        name = parse_name(f"{module}.weight")
        if name is None or name.expert is None:
            return None
        return self.scheme.fitting(columns)

    def described(self) -> dict[str, Any]:
        """For the header of a solution: modules are told by a digest of their schemes."""
        facts = {"scheme": self.scheme.name, "propagate": self.propagate, "sweeps": self.sweeps}
        if self.schemes is None:
            return facts
        lines = (f"{module}={scheme.name}\n" for module, scheme in sorted(self.schemes.items()))
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        return {**facts, "recipe": self.recipe, "schemes_digest": digest}
