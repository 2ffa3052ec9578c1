"""Units and the files they go to: the parts a Plan is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from v4quant_formats.shards import FilePlan, plan_shard
from v4quant_formats.spec import TensorSpec
from v4quant_formats.weights import StoredWeight

Action = Literal[
    "copy", "recast", "bf16", "blocks", "fp8", "mxfp8", "f32_scale", "e8m0_scale", "experts"
]


@dataclass(frozen=True)
class Unit:
    """Tensors converted together, and what they become.

    action: copy (byte for byte), recast (the same numbers in another dtype), bf16 (any dense
    matrix decoded), blocks (a dense matrix in GGUF's block type), fp8 (a dense matrix in the
    release's tiles), mxfp8 (a dense matrix with a scale for every row and 32 columns), f32_scale
    (E8M0 scales widened), e8m0_scale (float scales narrowed), experts (w1, w3 and w2 of one routed
    expert, in that order).
    again: another file of the output holds the same; this is a copy an engine wants, not recorded.
    """

    action: Action
    sources: tuple[StoredWeight, ...]
    outputs: tuple[TensorSpec, ...]
    again: bool = False

    @property
    def module(self) -> str:
        """Name for messages and records: the first module."""
        return self.sources[0].module

    @property
    def bytes_in(self) -> int:
        """Source bytes."""
        return sum(s.nbytes for s in self.sources)

    @property
    def bytes_out(self) -> int:
        """Output bytes."""
        return sum(s.nbytes for s in self.outputs)


@dataclass(frozen=True)
class ShardPlan:
    """One output file and the units it is made of. `build` plans its bytes from the tensors."""

    file: str
    units: tuple[Unit, ...]
    build: Callable[[Sequence[TensorSpec]], FilePlan] = plan_shard

    @property
    def outputs(self) -> list[TensorSpec]:
        """All tensors of the file, by official names."""
        return [spec for unit in self.units for spec in unit.outputs]

    @cached_property
    def source_files(self) -> list[str]:
        """The source shards its units read, sorted."""
        parts = (p for u in self.units for s in u.sources for p in s.parts.values())
        return sorted({part.file for part in parts})

    @property
    def recorded(self) -> tuple[str, ...]:
        """The modules that records are made of, one each."""
        return tuple(s.module for u in self.units if not u.again for s in u.sources)

    def file_plan(self) -> FilePlan:
        """Header, places and size."""
        return self.build(self.outputs)

    @cached_property
    def nbytes(self) -> int:
        """Size of the file, header included."""
        return self.file_plan().nbytes


@dataclass(frozen=True)
class Dropped:
    """A source tensor that the output leaves out, and why."""

    name: str
    reason: str
