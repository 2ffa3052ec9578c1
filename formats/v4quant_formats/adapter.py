"""A LoRA adapter in PEFT's layout, merged while matrices are read.

The folder holds adapter_config.json and adapter_model.safetensors. Of every matrix it changes it
has `lora_A` [r, in] and `lora_B` [out, r]; the matrix becomes W + s * (B A), with s = alpha / r
(alpha / sqrt(r) for rsLoRA). Names are the base model's under any of its spellings (naming.py),
behind `base_model.model.`. Products are taken in float64 and the sum rounded once to float32, so
that a second decoder finds the same numbers. Only A and B are held, for one matrix at a time.

What is more than that (DoRA, biases, whole modules saved, experts fused into one parameter) is
refused: left out silently, it would be a model nobody trained.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4quant_formats.checkpoint import Checkpoint, check_link
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.errors import FormatError, MissingTensor, UnexpectedTensor, WrongDtype
from v4quant_formats.model_config import read_json_object
from v4quant_formats.naming import official_name
from v4quant_formats.safetensors_header import read_header
from v4quant_formats.shard_files import LocalShards, file_state
from v4quant_formats.spec import TensorSpec, torch_dtype
from v4quant_formats.weights import StoredWeight, find_weight

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_TORCH_NAME = "adapter_model.bin"
_NAME = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_FLOATS = ("F32", "BF16", "F16")
# Matrices that no release codes, but PEFT finds under the names of others (`kv_proj`, `gate_proj`).
_MULTIPLIED = re.compile(r"\.compressor\.(wkv|wgate)$|\.indexer\.weights_proj$")
# Ways to begin A and B that leave the base as it is; PiSSA, OLoRA, LoftQ and others take part of it
# away, and such an adapter fits what is left only.
_PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal")


class AdapterError(FormatError):
    """An adapter that is not plain LoRA, or not this model's."""


@dataclass(frozen=True)
class _Pair:
    """A [r, in] and B [out, r] of one matrix, and the factor of their product."""

    a: TensorSpec
    b: TensorSpec
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """An adapter's matrices by official module name."""

    path: Path
    pairs: Mapping[str, _Pair]
    digest: str
    _shards: LocalShards = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.path.resolve().name

    def __contains__(self, module: object) -> bool:
        return module in self.pairs

    def delta(self, module: str) -> Tensor:
        """What is added to a matrix: float64 [out, in]. Raises WrongDtype for NaN or infinity."""
        pair = self.pairs[module]
        product = pair.scaling * (self._read(pair.b) @ self._read(pair.a))
        if not bool(torch.isfinite(product).all()):
            raise WrongDtype(f"{self.path / WEIGHTS_NAME}: the delta of '{module}' is not finite")
        return product

    def norms(self) -> dict[str, float]:
        """Frobenius norm of every delta: of B A, from the small products B^T B and A A^T."""
        found = {}
        for module, pair in self.pairs.items():
            a, b = self._read(pair.a), self._read(pair.b)
            square = float(((b.mT @ b) * (a @ a.mT)).sum())
            found[module] = pair.scaling * math.sqrt(max(square, 0.0))
        return found

    def _read(self, spec: TensorSpec) -> Tensor:
        data = torch.empty(spec.nbytes, dtype=torch.uint8)
        buffer: Any = data.numpy()
        self._shards.read_into(spec.file, memoryview(buffer), spec.offset, spec.name)
        return data.view(torch_dtype(spec.dtype)).view(spec.shape).double()


def with_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint as the adapter changes it.

    Raises AdapterError for what is not plain LoRA, ConfigError, and MissingTensor, UnexpectedTensor
    or WrongDtype for one that is another model's.
    """
    adapter = open_adapter(folder)
    for module, pair in adapter.pairs.items():
        stored: StoredWeight = find_weight(checkpoint, module)
        wanted = (pair.b.shape[0], pair.a.shape[1])
        if stored.shape != wanted:
            raise WrongDtype(
                f"{folder / WEIGHTS_NAME}: changes a matrix {list(wanted)} '{module}', but the "
                f"model's is {list(stored.shape)}; the adapter is another model's"
            )
    return replace(checkpoint, deltas=adapter)


def open_adapter(folder: Path) -> Adapter:
    """Read an adapter's headers. Raises as `with_adapter` does."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        check_link(folder, name)
        if not (folder / name).is_file() and (folder / _TORCH_NAME).is_file():
            raise AdapterError(
                f"{folder / _TORCH_NAME}: is PyTorch's pickle, which is not read here; save it as "
                f"{WEIGHTS_NAME}"
            )
        if not (folder / name).is_file():
            raise MissingTensor(f"{folder / name}: missing; an adapter in PEFT's layout has it")
    config = read_json_object(folder / CONFIG_NAME)
    _check_config(folder, config)
    header = read_header(folder / WEIGHTS_NAME)
    halves: dict[str, dict[str, TensorSpec]] = {}
    theirs: dict[str, str] = {}
    for name, spec in header.items():
        module, half = _module_of(folder, name)
        if spec.dtype not in _FLOATS or len(spec.shape) != 2 or 0 in spec.shape:
            raise WrongDtype(f"{folder / WEIGHTS_NAME}: '{spec}' is not a matrix of floats")
        if half in halves.setdefault(module, {}):
            raise UnexpectedTensor(f"{folder / WEIGHTS_NAME}: '{module}' has two {name[-40:]!r}")
        halves[module][half] = spec
        theirs[module] = name
    pairs = {m: _pair(folder, config, m, theirs[m], parts) for m, parts in halves.items()}
    if not pairs:
        raise AdapterError(f"{folder / WEIGHTS_NAME}: holds no lora_A and lora_B")
    state = file_state((folder / WEIGHTS_NAME).stat())
    digest = hashlib.sha256((folder / CONFIG_NAME).read_bytes())
    with (folder / WEIGHTS_NAME).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    shards = LocalShards(folder, {WEIGHTS_NAME: state})
    return Adapter(folder, pairs, digest.hexdigest(), shards)


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    where = folder / CONFIG_NAME
    kind, begun = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    refused = {
        f"its peft_type is {str(kind)[:40]!r}": kind != "LORA",
        "it is DoRA (use_dora)": bool(config.get("use_dora")),
        "it trains biases": config.get("bias", "none") != "none" or bool(config.get("lora_bias")),
        "it replaces whole modules (modules_to_save)": bool(config.get("modules_to_save")),
        "it changes fused parameters (target_parameters)": bool(config.get("target_parameters")),
        "its matrices are transposed (fan_in_fan_out)": bool(config.get("fan_in_fan_out")),
        "it repeats layers (layer_replication)": bool(config.get("layer_replication")),
        "it trains single tokens (trainable_token_indices)": bool(
            config.get("trainable_token_indices")
        ),
        "it is for some tokens of a text only (alora_invocation_tokens)": bool(
            config.get("alora_invocation_tokens")
        ),
        f"it changed the base it was trained on (init_lora_weights {str(begun)[:40]!r})": not (
            begun is None or isinstance(begun, bool) or begun in _PLAIN_BEGINNINGS
        ),
    }
    for what, holds in refused.items():
        if holds:
            raise AdapterError(f"{where}: {what}, which is not merged here; merge it with PEFT")


def _module_of(folder: Path, name: str) -> tuple[str, str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise AdapterError(
            f"{folder / WEIGHTS_NAME}: tensor {name[:120]!r} is neither lora_A nor lora_B; "
            "merge it with PEFT"
        )
    bare = match[1].removeprefix("base_model.model.")
    official = official_name(f"{bare}.weight")
    parsed = parse_name(official) if official else None
    if parsed is None or not (parsed.is_linear or _MULTIPLIED.search(parsed.module)):
        raise UnexpectedTensor(
            f"{folder / WEIGHTS_NAME}: {bare[:120]!r} is not a linear layer of DeepSeek-V4"
        )
    return parsed.module, match[2]


def _pair(
    folder: Path, config: Mapping[str, Any], module: str, name: str, parts: Mapping[str, TensorSpec]
) -> _Pair:
    where = folder / WEIGHTS_NAME
    if parts.keys() != {"A", "B"}:
        raise MissingTensor(f"{where}: '{module}' has only lora_{next(iter(parts))}")
    a, b = parts["A"], parts["B"]
    if a.shape[0] != b.shape[1]:
        raise WrongDtype(f"{where}: '{a}' and '{b}' have different ranks")
    rank = a.shape[0]
    key = name.partition(".lora_")[0].removeprefix("base_model.model.")
    alpha = _pattern(config.get("alpha_pattern"), key)
    alpha = config.get("lora_alpha") if alpha is None else alpha
    said = _pattern(config.get("rank_pattern"), key)
    said = config.get("r") if said is None else said
    if said != rank:
        raise WrongDtype(f"{where}: '{a}' has rank {rank}, {CONFIG_NAME} says {said!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{folder / CONFIG_NAME}: lora_alpha is {str(alpha)[:40]!r}")
    return _Pair(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pattern(table: object, key: str) -> Any:
    """PEFT's patterns: a name's end, or a regular expression of it."""
    for form, value in table.items() if isinstance(table, dict) else ():
        try:
            if re.fullmatch(rf"(.*\.)?({form})", key):
                return value
        except re.error:
            continue
    return None
