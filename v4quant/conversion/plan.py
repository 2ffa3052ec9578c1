"""Plan: every output tensor, its shard, size and treatment, decided before a byte is read.

The plan maps source shards to output shards one to one (one layer a shard, as released), groups
tensors that must be seen together into Units (an expert's w1, w3 and w2; a weight and its scale)
and accounts for every source tensor: it is copied, re-encoded exactly, quantized, or dropped with a
reason. What is missing, unknown or of the wrong kind is an error here, not after hours.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import torch

from v4quant import __version__
from v4quant.conversion.gguf_files import gguf_shards
from v4quant.conversion.unit_planner import plan_units
from v4quant.conversion.units import Dropped, ShardPlan, Unit
from v4quant.devices import CPU
from v4quant.recipe import Recipe
from v4quant_formats.checkpoint import SINGLE_NAME, Checkpoint
from v4quant_formats.deepseek_v4 import (
    PROJECTIONS,
    draft_stages,
    wrong_draft_count,
)
from v4quant_formats.errors import UnexpectedTensor
from v4quant_formats.gguf.file_names import file_stem
from v4quant_formats.model_config import Dimensions
from v4quant_formats.sidecars import small_file, tokenizer_digest
from v4quant_kernels.scheme import Scheme


@dataclass(frozen=True)
class Plan:
    """The whole conversion. `digest` keys the journal: same digest, same output bytes.

    stem: what the shards' names have in common ("" where they keep the source's); a name, which
    does not change the bytes, and no part of the digest.
    kept: stages whose experts stay in the source format because a cast would change them.
    device: where experts are computed; not part of the digest, because the bytes are the same.
    """

    checkpoint: Checkpoint
    config: Dimensions
    recipe: Recipe
    shards: tuple[ShardPlan, ...]
    dropped: tuple[Dropped, ...]
    stats_digest: str
    kept: tuple[str, ...] = ()
    stem: str = ""
    device: torch.device = CPU

    @property
    def scheme(self) -> Scheme:
        """The experts' scheme."""
        return self.recipe.expert_scheme

    @property
    def units(self) -> Iterator[Unit]:
        """All units, in output order."""
        return (unit for shard in self.shards for unit in shard.units)

    @cached_property
    def bytes_in(self) -> int:
        """Bytes of tensor data that will be read."""
        return sum(u.bytes_in for u in self.units)

    @cached_property
    def bytes_out(self) -> int:
        """Bytes of shards that will be written."""
        return sum(s.nbytes for s in self.shards)

    @cached_property
    def source_digest(self) -> str:
        """Identity of the source."""
        return self.checkpoint.digest()

    @cached_property
    def digest(self) -> str:
        """Identity of the conversion: source, recipe, statistics, tool version, and the tokenizer
        where one is given for the source."""
        parts = [self.source_digest, repr(self.recipe.as_dict()), self.stats_digest, __version__]
        if self.checkpoint.tokenizer is not None:
            parts.append(tokenizer_digest(self.checkpoint))
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def largest_norm(self, stage: str) -> float:
        """The largest magnitude in the norm before a stage's experts; all of them ask for it."""
        if stage not in self._norms:
            norm = self.checkpoint.read(f"{stage}.ffn_norm.weight")
            self._norms[stage] = float(norm.float().abs().max())
        return self._norms[stage]

    @cached_property
    def _norms(self) -> dict[str, float]:
        return {}

    def output_config(self) -> dict[str, Any]:
        """The output's config.json."""
        layout, raw = self.recipe.layout, self.checkpoint.config
        if self.recipe.places and layout.mixed_config is not None:
            config = layout.mixed_config(raw, self._stage_schemes())
        else:
            config = layout.config(raw, self.scheme, self.kept)
        return _with_drafts(
            config, len(draft_stages(s.name for f in self.shards for s in f.outputs))
        )

    def _stage_schemes(self) -> dict[str, Scheme]:
        """The scheme of every stage's experts, where a layer has one."""
        places = (u.sources[0].module.partition(".ffn.experts.") for u in self.units)
        stages = dict.fromkeys(stage for stage, found, _ in places if found)
        return {stage: self.recipe.scheme_for(stage, PROJECTIONS[0]) for stage in stages}


def make_plan(checkpoint: Checkpoint, recipe: Recipe, stats_digest: str = "") -> Plan:
    """Plan the conversion of a checkpoint; reads no tensor data.

    (With `on_inexact = "keep"` it reads the experts' scales, to know which stages stay.)
    Raises MissingTensor, UnexpectedTensor, WrongDtype, UnsupportedPair or ConfigError naming the
    tensor and the remedy.
    """
    found = plan_units(checkpoint, recipe)
    stem = ""
    if recipe.layout.index:
        shards = _shards_as_source(found.units)
    else:
        stem = file_stem(checkpoint, recipe.scheme)
        shards = gguf_shards(checkpoint, found.units, recipe.scheme, recipe.split_bytes, stem)
    _check_accounted(checkpoint, shards, found.dropped)
    plan = Plan(
        checkpoint, found.config, recipe, shards, found.dropped, stats_digest, found.kept, stem
    )
    plan.output_config()  # what config.json cannot say is refused now
    if recipe.layout.index:
        for name in checkpoint.carried:  # so is a tokenizer that no file can hold
            small_file(checkpoint, name)
    return plan


def under_stem(plan: Plan, stem: str) -> Plan:
    """The same conversion with other names; only where names have a stem."""
    assert plan.stem, "names of shards come from the source"
    shards = (replace(s, file=stem.join(s.file.rsplit(plan.stem, 1))) for s in plan.shards)
    return replace(plan, shards=tuple(shards), stem=stem)


def _shards_as_source(units: Iterable[Unit]) -> tuple[ShardPlan, ...]:
    by_file: dict[str, list[Unit]] = {}
    for unit in units:
        file = unit.sources[0].first.file
        by_file.setdefault(file, []).append(unit)
    return tuple(
        ShardPlan(_output_file(file), tuple(members)) for file, members in sorted(by_file.items())
    )


def _with_drafts(config: dict[str, Any], stages: int) -> dict[str, Any]:
    """A config.json that promises draft stages where there are some, and none where there is none.

    A count that the tensors contradict is put right.
    """
    if not stages:
        return without_drafts(config)
    if "num_nextn_predict_layers" in config and wrong_draft_count(config, stages):
        return {**config, "num_nextn_predict_layers": stages}
    return config


def without_drafts(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that promises no draft stages, so that no engine looks for them."""
    kept = {k: v for k, v in config.items() if not k.startswith("dspark_")}
    if "num_nextn_predict_layers" in kept:
        kept["num_nextn_predict_layers"] = 0
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = without_drafts(kept["text_config"])
    return kept


def _output_file(file: str) -> str:
    # Always with an index, so that only the index, written last, makes the folder a checkpoint.
    if file == SINGLE_NAME:
        return "model-00001-of-00001.safetensors"
    return f"{PurePosixPath(file).stem}.safetensors" if file.endswith(".gguf") else file


def _check_accounted(
    checkpoint: Checkpoint, shards: Iterable[ShardPlan], dropped: Iterable[Dropped]
) -> None:
    """Every source tensor is used by exactly one unit, or dropped with a reason."""
    used = Counter(
        part.name
        for shard in shards
        for unit in shard.units
        if not unit.again
        for stored in unit.sources
        for part in stored.parts.values()
    )
    used.update(d.name for d in dropped)
    for name in checkpoint.tensors:
        if used[name] != 1:
            raise UnexpectedTensor(
                f"{checkpoint.path / checkpoint.tensors[name].file}: tensor '{name}' does not fit "
                "the model config.json describes; the files belong to different models"
            )
