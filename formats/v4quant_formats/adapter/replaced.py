"""Whole tensors of an adapter's file, which take the place of the base's.

PEFT saves them under the base's names: modules of `modules_to_save`, biases it trained, embedding
and head beside a LoRA on them. Each becomes a tensor of the checkpoint like any other, of the same
shard, whose bytes are said to lie behind that shard's end; the shards here know where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import parse_name, split_part
from v4quant_formats.errors import MissingTensor, UnexpectedTensor, WrongDtype
from v4quant_formats.naming import official_specs
from v4quant_formats.shard_files import HeadersOnly, LocalShards, ShardFiles
from v4quant_formats.spec import TensorSpec
from v4quant_formats.weights import PLAIN_SCHEMES, StoredWeight, find_weight

_TABLES = ("I32", "I64")


@dataclass(frozen=True)
class ExtendedShards:
    """Shards of a base, each followed by an adapter's file. `ends`: where each shard ends."""

    base: ShardFiles
    ends: Mapping[str, int]
    added: LocalShards
    file: str

    @property
    def is_local(self) -> bool:
        """Whether reading a few bytes anywhere costs next to nothing."""
        return self.base.is_local

    def read_into(self, file: str, view: memoryview, offset: int, what: str) -> None:
        """Fill `view` from byte `offset` on; `what` is read, for messages."""
        end = self.ends[file]
        if offset >= end:
            self.added.read_into(self.file, view, offset - end, what)
        else:
            self.base.read_into(file, view, offset, what)

    def slices(self, file: str, offsets: Sequence[int], count: int) -> list[bytes]:
        """Up to `count` bytes at each offset."""
        end = self.ends[file]
        own = iter(self.base.slices(file, [o for o in offsets if o < end], count))
        beyond = [o - end for o in offsets if o >= end]
        added = iter(self.added.slices(self.file, beyond, count))
        return [next(added if o >= end else own) for o in offsets]

    def expect(self, files: Sequence[str], once: bool) -> None:
        """These shards will be acquired, in this order."""
        self.base.expect(files, once)

    def acquire(self, files: Sequence[str]) -> None:
        """Return when all of these can be read at once."""
        self.base.acquire(files)

    def spent(self, file: str, offset: int, count: int) -> None:
        """These bytes of a shard will not be read again."""
        if offset < self.ends[file]:
            self.base.spent(file, offset, count)

    def release(self, file: str) -> None:
        """This shard will not be read again."""
        self.base.release(file)

    def close(self) -> None:
        """Let go of handles."""
        self.base.close()
        self.added.close()


def with_tensors(
    checkpoint: Checkpoint, folder: Path, whole: Iterable[TensorSpec], shards: LocalShards
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint with these tensors of the adapter in `folder`, and the modules they replace.

    Raises UnexpectedTensor for one that the base has not or that comes twice, WrongDtype for one of
    another shape or kind.
    """
    changes: dict[str, TensorSpec | None] = {}
    replaced: dict[str, str] = {}
    for theirs in whole:
        for spec in official_specs(str(folder / theirs.file), theirs):
            module, _ = split_part(spec.name)
            where = f"{folder / theirs.file}: '{theirs.name}'"
            base = _base(checkpoint, where, spec, module)
            if module in replaced:
                raise UnexpectedTensor(f"{where} is '{module}' again")
            replaced[module] = spec.file
            changes |= dict.fromkeys(part.name for part in base.parts.values())
            place = base.first.file
            offset = checkpoint.files[place].size + spec.offset
            changes[base.first.name] = replace(spec, file=place, offset=offset)
    if not replaced:
        return checkpoint, ()
    kept = (changes.get(name, spec) for name, spec in checkpoint.tensors.items())
    extended = checkpoint.shards
    if not isinstance(extended, HeadersOnly):
        ends = {name: state.size for name, state in checkpoint.files.items()}
        extended = ExtendedShards(extended, ends, shards, next(iter(replaced.values())))
    changed = replace(
        checkpoint,
        tensors=MappingProxyType({spec.name: spec for spec in kept if spec is not None}),
        shards=extended,
    )
    return changed, tuple(replaced)


def _base(checkpoint: Checkpoint, where: str, spec: TensorSpec, module: str) -> StoredWeight:
    """What such a tensor replaces."""
    parsed = parse_name(spec.name)
    if parsed is None or parsed.part not in ("", "weight"):
        raise UnexpectedTensor(
            f"{where} is neither lora_A nor lora_B, nor a whole tensor of DeepSeek-V4"
        )
    try:
        base = find_weight(checkpoint, module)
    except MissingTensor:
        raise UnexpectedTensor(f"{where} replaces '{module}', which the model has not") from None
    tables = base.first.dtype in _TABLES and spec.dtype in _TABLES
    if base.shape != spec.shape or not (tables or spec.dtype in PLAIN_SCHEMES):
        raise WrongDtype(
            f"{where} is {spec.dtype} {list(spec.shape)}, but the model's '{module}' is "
            f"{list(base.shape)}; the adapter is another model's"
        )
    return base
