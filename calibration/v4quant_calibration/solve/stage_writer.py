"""StageWriter: a stage's file, by one rank, or in parts by several and joined by the first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import safe_open

from v4quant_calibration.solve.solution import add_matrix, is_solution_file, stage_file, stage_specs
from v4quant_calibration.solve.team import Team
from v4quant_formats.shards import ShardWriter, plan_shard
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import Scheme

_PART = ".rank"


def remove_parts(folder: Path) -> None:
    """Forget what ranks of an earlier run had not joined."""
    for path in folder.glob(f"*{_PART}[0-9]*"):
        if is_solution_file(path.name):
            path.unlink()


class StageWriter:
    """Takes a stage's solved matrices; `close` returns when the whole file is there."""

    def __init__(
        self,
        team: Team,
        folder: Path,
        name: str,
        shapes: Mapping[str, tuple[int, int]],
        schemes: Mapping[str, Scheme],
        mine: Collection[str],
    ) -> None:
        """shapes, schemes: of all matrices of the stage. mine: those that this rank solves."""
        self._team, self._path = team, stage_file(folder, name)
        self._specs = stage_specs(shapes, schemes)
        self._own: ShardWriter | None = None
        if team.size == 1:
            self._own = ShardWriter(self._path, plan_shard(self._specs))
        elif mine:
            own = stage_specs({m: shapes[m] for m in shapes if m in mine}, schemes)
            self._own = ShardWriter(self._part(team.rank), plan_shard(own))

    def _part(self, rank: int) -> Path:
        return self._path.with_name(f"{self._path.name}{_PART}{rank}")

    def add(self, module: str, q: QTensor) -> None:
        """Write one matrix of this rank's."""
        assert self._own is not None, module
        add_matrix(self._own, module, q)

    def abort(self) -> None:
        """Drop what this rank has written."""
        if self._own is not None:
            self._own.abort()

    def close(self) -> None:
        """Finish this rank's part; the first rank joins them. Raises OutputError."""
        if self._own is not None:
            self._own.close()
        if self._team.size == 1:
            return
        self._team.barrier()
        if self._team.is_first:
            self._join()
        self._team.barrier()

    def _join(self) -> None:
        parts = [p for rank in range(self._team.size) if (p := self._part(rank)).exists()]
        writer = ShardWriter(self._path, plan_shard(self._specs))
        try:
            for part in parts:
                with safe_open(part, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  (a method, not a mapping)
                        writer.add(name, file.get_tensor(name))
        except BaseException:
            writer.abort()
            raise
        writer.close()
        for part in parts:
            part.unlink()
