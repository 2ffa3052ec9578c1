"""footprint: how many bytes a conversion has, layer by layer, planned from one expert a layer.

All routed experts of a layer are alike, so a checkpoint with as many of them as a token takes and
the same headers otherwise is taken apart in no time; the first expert is planned for all of them.
The planning is the converter's own (`plan_units`), so every scheme it can write has a footprint.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from v4quant.conversion.unit_planner import plan_units
from v4quant.recipe import Recipe
from v4quant.synthetic.configs import make_config
from v4quant.synthetic.inventory import shards_of
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import TensorName, parse_name
from v4quant_formats.engines.vllm_split import is_split
from v4quant_formats.gguf.file_names import clean_name, model_name
from v4quant_formats.model_config import Dimensions, parse_dimensions
from v4quant_formats.shard_files import HeadersOnly
from v4quant_formats.spec import TensorSpec
from v4quant_formats.structure import Structure, check_structure

_EXPERT = re.compile(r"\.ffn\.experts\.(\d+)\.")
_COUNTS = ("n_routed_experts", "dspark_n_routed_experts")

HUB_NAMES = {
    "flash": "deepseek-ai/DeepSeek-V4-Flash",
    "pro": "deepseek-ai/DeepSeek-V4-Pro",
    "flash-base": "deepseek-ai/DeepSeek-V4-Flash-Base",
    "pro-base": "deepseek-ai/DeepSeek-V4-Pro-Base",
    "flash-dspark": "deepseek-ai/DeepSeek-V4-Flash-0731",
    "pro-dspark": "deepseek-ai/DeepSeek-V4-Pro-0813",
    "vision": "deepseek-ai/DeepSeek-V4-Flash-Vision-Exp",
    "v41": "deepseek-ai/DeepSeek-V4.1-Flash",
}
"""Releases whose inventory is built in, by the short name `plan` takes, and where they lie."""
_SPOKEN = dict.fromkeys(
    ("flash-v41", "flash-v4.1", "v4.1", "v4.1-flash", "deepseek-v4.1-flash-1017"), "v41"
)


def release_named(text: str) -> str | None:
    """The release a name means: `flash`, or the last part of its repository; None for others."""
    wanted = text.lower().rpartition("/")[2]
    wanted = _SPOKEN.get(wanted, wanted)
    hub = {repo.rpartition("/")[2].lower(): name for name, repo in HUB_NAMES.items()}
    return wanted if wanted in HUB_NAMES else hub.get(wanted)


@dataclass(frozen=True)
class Outline:
    """A checkpoint's headers with a few experts a layer, and how many there really are.

    name: of the model, in files' names, when it is converted from a folder on this disk.
    structure: the thin checkpoint taken apart, of its experts the first alone. config: the real
    config.json. trunk, drafts: routed experts of a layer and of a draft stage. nbytes: of the whole
    checkpoint's tensors.
    """

    label: str
    name: str
    thin: Checkpoint
    structure: Structure
    config: Mapping[str, Any]
    dimensions: Dimensions
    trunk: int
    drafts: int
    nbytes: int

    @property
    def kept(self) -> int:
        """Experts of a layer that the thin checkpoint has."""
        return min(self.trunk, self.dimensions.num_experts_per_tok)

    @property
    def draft_stages(self) -> int:
        """How many stages draft."""
        return len({n.split(".")[1] for n in self.thin.tensors if n.startswith("mtp.")})

    def experts_of(self, name: TensorName) -> tuple[int, int]:
        """(real, kept) number of experts of a tensor's layer."""
        real = self.drafts if name.is_draft else self.trunk
        return real, min(real, self.kept)


@dataclass(frozen=True)
class LayerBytes:
    """A trunk layer: its routed experts, and all else."""

    experts: int
    rest: int


@dataclass(frozen=True)
class Footprint:
    """Bytes of a conversion by where they belong.

    layers: the trunk's. embed, head: of the vocabulary. other: everything of no layer. drafts: all
    draft stages. tables: V4.1's Engram, of which a token reads a few rows; in none of the others.
    cut, whole: of trunk and `cut_drafts`, `whole_drafts` of draft stages, what vLLM divides among
    cards and what every card holds. active: share of a layer's experts a token uses.
    """

    layers: tuple[LayerBytes, ...]
    embed: int
    head: int
    other: int
    drafts: int
    tables: int
    cut: int
    whole: int
    cut_drafts: int
    whole_drafts: int
    active: float

    @property
    def trunk(self) -> int:
        """Bytes of what is computed with, without draft stages."""
        return self.embed + self.head + self.other + sum(x.experts + x.rest for x in self.layers)

    @property
    def total(self) -> int:
        """All bytes."""
        return self.trunk + self.tables + self.drafts


def outline_release(name: str) -> Outline:
    """A release of `HUB_NAMES` from its built-in inventory. No file is read."""
    config = make_config(name, False, {})
    text = config.get("text_config", config)
    kept = text["num_experts_per_tok"]
    shards = shards_of(name, _thinned(config, kept))
    tensors = {
        spec.name: replace(spec, file=f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        for number, specs in enumerate(shards, 1)
        for spec in specs
    }
    return _outline(f"hf://{HUB_NAMES[name]}", config, tensors, Path(name))


def outline_checkpoint(checkpoint: Checkpoint) -> Outline:
    """An open checkpoint's outline; its headers are all that is looked at."""
    config = dict(checkpoint.config)
    text = config.get("text_config", config)
    kept = int(text["num_experts_per_tok"])
    tensors = {}
    for spec in checkpoint:
        match = _EXPERT.search(spec.name)
        if match is None or int(match[1]) < kept:
            tensors[spec.name] = _thin_gate(spec, kept)
    found = _outline(checkpoint.label, config, tensors, checkpoint.path)
    local = checkpoint
    if checkpoint.origin is not None:
        folder = Path(checkpoint.origin.repo.rpartition("/")[2])
        local = replace(checkpoint, origin=None, path=folder)
    return replace(found, nbytes=checkpoint.nbytes, name=model_name(local))


def footprint(outline: Outline, recipe: Recipe) -> Footprint:
    """What `recipe` makes of the checkpoint. Raises what planning raises, as UnsupportedPair."""
    dims = outline.dimensions
    stages: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    drafts, whole, cut = 0, [0, 0], [0, 0]
    vocabulary = {"embed": 0, "head": 0}
    other = tables = 0
    for spec in _outputs(outline, recipe):
        name = parse_name(spec.name)
        nbytes = _real_bytes(outline, spec, name)
        if name is not None and name.role == "engram tables":
            tables += nbytes
            continue
        draft = name is not None and name.is_draft
        (cut if name is not None and is_split(name) else whole)[draft] += nbytes
        if draft:
            drafts += nbytes
        elif name is not None and name.module in vocabulary:
            vocabulary[name.module] += nbytes
        elif name is None or not name.stage:
            other += nbytes
        else:
            stages[name.stage][name.expert is None] += nbytes
    layers = (LayerBytes(*stages[f"layers.{i}"]) for i in range(dims.num_hidden_layers))
    active = dims.num_experts_per_tok / outline.trunk
    return Footprint(
        tuple(layers), vocabulary["embed"], vocabulary["head"], other, drafts, tables,
        cut[0], whole[0], cut[1], whole[1], active,
    )  # fmt: skip


def _outputs(outline: Outline, recipe: Recipe) -> list[TensorSpec]:
    units = plan_units(outline.thin, recipe, outline.structure).units
    return [spec for unit in units for spec in unit.outputs]


def _real_bytes(outline: Outline, spec: TensorSpec, name: TensorName | None) -> int:
    """Bytes of what a thin tensor stands for: the first expert for all, the others for none."""
    if name is None:
        return spec.nbytes
    real, kept = outline.experts_of(name)
    if name.expert is not None:
        return 0 if name.expert else spec.nbytes * real
    return spec.nbytes * real // kept if _is_gate(name.module) else spec.nbytes


def _is_gate(module: str) -> bool:
    return module.endswith((".ffn.gate", ".ffn.gate.bias", ".ffn.gate.bias_vl"))


def _thin_gate(spec: TensorSpec, kept: int) -> TensorSpec:
    """The router's rows or biases of the experts that are kept."""
    if not re.search(r"\.ffn\.gate\.(weight|bias|bias_vl)$", spec.name):
        return spec
    return replace(spec, shape=(min(kept, spec.shape[0]), *spec.shape[1:]))


def _thinned(config: Mapping[str, Any], kept: int) -> dict[str, Any]:
    """config.json of the thin checkpoint."""
    made = dict(config)
    for key in _COUNTS:
        if isinstance(made.get(key), int):
            made[key] = min(kept, made[key])
    if isinstance(made.get("text_config"), dict):
        made["text_config"] = _thinned(made["text_config"], kept)
    return made


def _first_experts(structure: Structure) -> Structure:
    """Without the names of experts that stand for none, whose planning would take most time."""
    names = {t: n for t, n in structure.names.items() if n is None or not n.expert}
    return replace(structure, names=names)


def _outline(
    label: str, config: dict[str, Any], tensors: dict[str, TensorSpec], path: Path
) -> Outline:
    dims = parse_dimensions(config, f"{label}: config.json")
    thin_config = _thinned(config, dims.num_experts_per_tok)
    thin = Checkpoint(path, thin_config, tensors, {}, HeadersOnly())
    drafts = dims.dspark.n_routed_experts if dims.dspark is not None else dims.n_routed_experts
    structure = _first_experts(check_structure(thin))
    found = Outline(
        label,
        clean_name(label.rpartition("/")[2]),
        thin,
        structure,
        config,
        dims,
        dims.n_routed_experts,
        drafts,
        0,
    )
    return replace(found, nbytes=sum(_real_bytes(found, s, parse_name(s.name)) for s in thin))
