"""Which GGUF files a conversion writes, and what each says about itself.

The trunk is one model file, or several when it is larger than the recipe's `split_size`: cut
between layers, as evenly as that allows, the first carrying all metadata. A draft stage is a file
of its own, because llama.cpp has one place for hc_head and final norm; that file repeats embedding,
head and norm, which llama.cpp reads from it (`llama-server -m MODEL --model-draft mtp-MODEL`).
DSpark's stages are a model of another architecture, which takes those from the trunk.

V4.1's Engram tables are the last part of a split model, alone in it. What that file says depends on
the number of parts and of tensors, not on how the rest is coded, so conversions with as many parts
have the same bytes there and can share one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from v4quant.conversion.units import ShardPlan, Unit
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import UnsupportedPair
from v4quant_formats.gguf.carried import carried_fields
from v4quant_formats.gguf.file import Field, PlaceOf, plan_gguf
from v4quant_formats.gguf.metadata import dspark_fields, model_fields, split_fields
from v4quant_formats.gguf.metadata_v41 import v41_fields
from v4quant_formats.gguf.names import dspark_place_of, place_of
from v4quant_formats.model_config import ModelConfig, parse_model_config
from v4quant_formats.sidecars import token_map_of

_NAME = "DeepSeek-V4"
_REPEATED = ("embed", "norm", "head")
_TABLE = ".engram.embed"


def gguf_shards(
    checkpoint: Checkpoint, units: Sequence[Unit], scheme: str, split_bytes: int, stem: str
) -> tuple[ShardPlan, ...]:
    """The files that hold `units`; `stem` is in all their names.

    Raises UnsupportedPair, WrongMetadata or UnknownTokenizer.
    """
    config = parse_model_config(dict(checkpoint.config), str(checkpoint.path / "config.json"))
    trunk = [u for u in units if not _is_draft(u)]
    drafts = [u for u in units if _is_draft(u)]
    place: PlaceOf = partial(place_of, layers=config.num_hidden_layers)
    draft_place = dspark_place_of if config.dspark else place
    _check_places(checkpoint, trunk, place)
    _check_places(checkpoint, drafts, draft_place)
    carried = carried_fields(checkpoint)
    tokenizer = [f for f in carried if not f.key.startswith("general.")]
    said = {f.key for f in carried}
    fields = [f for f in _trunk_fields(checkpoint, config, scheme) if f.key not in said]
    fields += carried
    tables = [u for u in trunk if u.module.endswith(_TABLE)]
    files = _pack([u for u in trunk if not u.module.endswith(_TABLE)], split_bytes)
    shards = _split([*files, tables] if tables else files, stem, fields, place)
    if drafts and config.dspark:
        stages = len({u.module.split(".")[1] for u in drafts})
        fields = [*dspark_fields(config, f"{_NAME} DSpark", scheme, stages), *tokenizer]
        build = partial(plan_gguf, fields, draft_place)
        shards.append(ShardPlan(f"dspark-{stem}.gguf", tuple(drafts), build))
    elif drafts:
        fields = [*model_fields(config, f"{_NAME} draft", scheme, drafts=1), *tokenizer]
        repeated = [replace(u, again=True) for u in trunk if u.module in _REPEATED]
        build = partial(plan_gguf, fields, draft_place)
        shards.append(ShardPlan(f"mtp-{stem}.gguf", (*repeated, *drafts), build))
    return tuple(shards)


def _trunk_fields(checkpoint: Checkpoint, config: ModelConfig, scheme: str) -> list[Field]:
    if config.v41 is None:
        return model_fields(config, _NAME, scheme)
    size = config.v41.engram_compressed_vocab_size
    token_map = token_map_of(checkpoint, config.vocab_size, size)
    return v41_fields(config, f"{_NAME}.1", scheme, token_map)


def _check_places(checkpoint: Checkpoint, units: Sequence[Unit], place: PlaceOf) -> None:
    for stored in (s for unit in units for s in unit.sources):
        if place(stored.module) is None:
            raise UnsupportedPair(
                f"{checkpoint.path}: '{stored.module}' has no place in llama.cpp's architecture, "
                "which refuses files with further tensors; take it out of the source"
            )


def _is_draft(unit: Unit) -> bool:
    return unit.module.startswith("mtp.")


def _pack(units: Sequence[Unit], limit: int) -> list[list[Unit]]:
    """Units by file: whole layers in order, the model's own tensors first."""
    stages: dict[str, list[Unit]] = {"": []}
    for unit in units:
        parts = unit.module.split(".")
        stages.setdefault(parts[1] if parts[0] == "layers" else "", []).append(unit)
    ordered = [members for _, members in sorted(stages.items(), key=lambda s: int(s[0] or -1))]
    sizes = [sum(u.bytes_out for u in members) for members in ordered]
    return [[u for i in group for u in ordered[i]] for group in packed(sizes, limit)]


def packed(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Which stages of these bytes, in order, share a file of at most `limit` bytes, if one can.

    Even files rather than a small last one.
    """
    target = sum(sizes) / max(-(-sum(sizes) // max(limit, 1)), 1)
    files: list[list[int]] = [[]]
    size = 0
    for number, nbytes in enumerate(sizes):
        full = size + nbytes > limit or size + nbytes / 2 > target
        if files[-1] and full:
            files.append([])
            size = 0
        files[-1].append(number)
        size += nbytes
    return files


def part_names(stem: str, count: int) -> list[str]:
    """What the files of a model in `count` parts are called."""
    if count == 1:
        return [f"{stem}.gguf"]
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _split(
    files: list[list[Unit]], stem: str, fields: list[Field], place: PlaceOf
) -> list[ShardPlan]:
    count = len(files)
    names = part_names(stem, count)
    if count == 1:
        build = partial(plan_gguf, fields, place)
        return [ShardPlan(names[0], tuple(files[0]), build)]
    tensors = {
        found.tensor
        for units in files
        for unit in units
        for stored in unit.sources
        if (found := place(stored.module))
    }
    shards = []
    for number, units in enumerate(files):
        own = split_fields(number, count, len(tensors))
        build = partial(plan_gguf, [*(fields if number == 0 else []), *own], place)
        shards.append(ShardPlan(names[number], tuple(units), build))
    return shards
