"""What a run gives back, and who is told of its steps on the way."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from v4quant.conversion.job import JobResult
from v4quant.evaluation.result import Evaluation
from v4quant_calibration.statistics.stats import Stats


class RunWatcher(Protocol):
    """Who is told what happens, beside the bars of `Progress`."""

    def step(self, title: str) -> None:
        """A step begins."""

    def note(self, text: str) -> None:
        """Something worth knowing about the step."""

    def calibrated(self, stats: Stats) -> None:
        """Statistics have been collected."""

    def converted(self, job: JobResult) -> None:
        """The conversion is done."""


class SilentWatcher:
    """A watcher that ignores everything."""

    def step(self, title: str) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def calibrated(self, stats: Stats) -> None:
        """Ignore."""

    def converted(self, job: JobResult) -> None:
        """Ignore."""


@dataclass(frozen=True)
class Conversion:
    """One conversion of a ladder; fields as of RunResult."""

    name: str
    checkpoint: str
    conversion: JobResult
    verified: bool
    serve: str


@dataclass(frozen=True)
class RunResult:
    """checkpoint: the folder or `hf://` name. folder: everything else. evaluation: None where the
    file asks for none; of a ladder, of the first conversion, with the others beside it. serve: a
    command line. verified: False when verification found a difference. ladder: all conversions,
    where the file asks for several; the other fields are then the first's.
    """

    checkpoint: str
    folder: str
    conversion: JobResult
    evaluation: Evaluation | None
    verified: bool
    serve: str
    seconds: float
    ladder: tuple[Conversion, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether verification held and no candidate looks damaged."""
        return self.verified and not (self.evaluation and self.evaluation.is_damaged)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        facts: dict[str, Any] = {
            "conversion": asdict(self.conversion),
            "evaluation": self.evaluation and self.evaluation.as_dict(),
            "seconds": self.seconds,
        }
        if self.ladder:
            facts["ladder"] = [asdict(one) for one in self.ladder]
        return facts
