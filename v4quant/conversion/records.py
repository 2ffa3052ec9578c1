"""Records: what became of every source tensor, and what it cost. The manifest is made of these."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from v4quant_formats.manifest import MANIFEST_NAME, ManifestError

Disposition = Literal["copied", "cast", "quantized"]
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("module", "disposition", "source", "target"), (str,)),
    **dict.fromkeys(("elements", "altered"), (int,)),
    **dict.fromkeys(("relative_rms", "max_error"), (int, float)),
}


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

    @property
    def exact(self) -> bool:
        """Whether the output holds exactly the source's values."""
        return self.disposition in ("copied", "cast") and self.altered == 0

    def as_dict(self) -> dict[str, Any]:
        """JSON form: fields that say nothing are left out."""
        plain = {k: v for k, v in asdict(self).items() if v not in (0, 0.0, "")}
        return {**plain, "exact": self.exact}


def record_from_dict(table: dict[str, Any]) -> TensorRecord:
    """Inverse of `as_dict`. Raises ManifestError for a table of another form."""
    values = {"elements": 0, **{k: v for k, v in table.items() if k != "exact"}}
    for key, value in values.items():
        kinds = _KINDS.get(key)
        if kinds is None or isinstance(value, bool) or not isinstance(value, kinds):
            raise ManifestError(f"{MANIFEST_NAME}: {str(key)[:80]!r} in a record is not as written")
    for key in ("module", "disposition", "source", "target"):
        if key not in values:
            raise ManifestError(f"{MANIFEST_NAME}: a record lacks '{key}'")
    return TensorRecord(**values)
