"""One thing that is wrong with a checkpoint, as every check of structure tells it."""

from __future__ import annotations

from dataclasses import dataclass

from v4quant_kernels.errors import V4QuantError


@dataclass(frozen=True)
class Defect:
    """Something that is not as V4 and config.json have it.

    where: the tensor or module ("" for config.json). kind: the error it is when work is to begin.
    blocking: whether work on the checkpoint would be meaningless.
    """

    where: str
    problem: str
    kind: type[V4QuantError]
    blocking: bool = True

    def __str__(self) -> str:
        named = not self.where or f"'{self.where}" in self.problem
        return self.problem if named else f"'{self.where}' {self.problem}"
