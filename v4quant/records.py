"""Records: what became of every source tensor, and what it cost. The manifest is made of these."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Disposition = Literal["copied", "cast", "quantized", "dropped"]


@dataclass(frozen=True)
class TensorRecord:
    """The fate of one module (a weight with its scales).

    copied: byte for byte. cast: re-encoded, `altered` elements changed value (0 means bit-exact).
    quantized: re-gridded, with relative RMS and largest absolute error against the source values.
    """

    module: str
    disposition: Disposition
    source: str
    target: str
    elements: int
    altered: int = 0
    relative_rms: float = 0.0
    max_error: float = 0.0
    reason: str = ""

    @property
    def exact(self) -> bool:
        """Whether the output holds exactly the source's values."""
        return self.disposition in ("copied", "cast") and self.altered == 0

    def as_dict(self) -> dict[str, Any]:
        """JSON form: fields that say nothing are left out."""
        plain = {k: v for k, v in asdict(self).items() if v not in (0, 0.0, "")}
        if self.disposition != "dropped":
            plain["exact"] = self.exact
        return plain


def record_from_dict(table: dict[str, Any]) -> TensorRecord:
    """Inverse of `as_dict`."""
    return TensorRecord(**{"elements": 0, **{k: v for k, v in table.items() if k != "exact"}})
