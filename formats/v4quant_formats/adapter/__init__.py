"""A LoRA adapter in PEFT's layout, merged while matrices are read.

The folder holds adapter_config.json (settings.py) and adapter_model.safetensors. Of every matrix it
changes it has `lora_A` [r, in] and `lora_B` [out, r]; the matrix becomes W + s * (B A), with
s = alpha / r (alpha / sqrt(r) for rsLoRA). An embedding [V, H] has `lora_embedding_A` [r, V] and
`lora_embedding_B` [H, r] and adds (B A)^T. Experts in one parameter have a pair together
(experts.py), and whole tensors take the base's place (replaced.py). Names are the base model's
under any of its spellings (naming.py), behind `base_model.model.`. Products are taken in float64
and the sum rounded once to float32, so that a second decoder finds the same numbers. Only A and B
are held, for one matrix at a time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from v4quant_formats.adapter.experts import FusedPair, expert_products
from v4quant_formats.adapter.factors import Factor, Product
from v4quant_formats.adapter.replaced import with_tensors
from v4quant_formats.adapter.settings import CONFIG_NAME, AdapterError, Settings, read_settings
from v4quant_formats.checkpoint import Checkpoint, check_link
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.errors import MissingTensor, UnexpectedTensor, WrongDtype
from v4quant_formats.model_config import parse_dimensions
from v4quant_formats.naming import official_name, translate
from v4quant_formats.safetensors_header import read_header
from v4quant_formats.shard_files import LocalShards, Origin, file_state
from v4quant_formats.spec import TensorSpec
from v4quant_formats.system import open_regular, real_path
from v4quant_formats.weights import PLAIN_SCHEMES, find_weight
from v4quant_kernels.late import torch

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = "adapter_model.safetensors"
_TORCH_NAME = "adapter_model.bin"
_HALF = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_EXPERTS = re.compile(r"(layers\.(?:0|[1-9]\d{0,3}))\.ffn\.experts")
# Matrices that no release codes, but PEFT finds under the names of others (`kv_proj`, `gate_proj`)
# or of their own.
_MULTIPLIED = re.compile(
    r".+\.compressor\.(wkv|wgate)|.+\.indexer\.weights_proj|.+\.ffn\.gate|head|embed"
)


@dataclass(frozen=True)
class Adapter:
    """What an adapter adds, by official module name, and which modules it replaces.

    origin: the repository it was fetched from, None for a folder.
    """

    path: Path
    products: Mapping[str, Product]
    replaced: tuple[str, ...]
    digest: str
    _shards: LocalShards = field(repr=False, compare=False)
    origin: Origin | None = None

    @property
    def name(self) -> str:
        """Its repository's name, or its folder's."""
        if self.origin is not None:
            return self.origin.repo.rpartition("/")[2]
        return real_path(self.path).name

    def __contains__(self, module: object) -> bool:
        return module in self.products

    def delta(self, module: str, rows: slice | Tensor = slice(None)) -> Tensor:
        """What is added to rows of a matrix: float64. Raises WrongDtype for NaN or infinity."""
        product = self.products[module].rows(self._shards, rows)
        if not bool(torch.isfinite(product).all()):
            raise WrongDtype(f"{self.path / WEIGHTS_NAME}: the delta of '{module}' is not finite")
        return product

    def norms(self) -> dict[str, float]:
        """Frobenius norm of every delta."""
        return {module: p.norm(self._shards) for module, p in self.products.items()}


@dataclass
class _Contents:
    """An adapter's tensors, told apart by their names. Keys are the modules' in the file."""

    halves: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    whole: list[TensorSpec] = field(default_factory=list)


def with_adapter(checkpoint: Checkpoint, folder: Path, origin: Origin | None = None) -> Checkpoint:
    """The checkpoint as the adapter in `folder`, fetched from `origin`, changes it.

    Raises AdapterError for what is not plain LoRA, ConfigError, and MissingTensor, UnexpectedTensor
    or WrongDtype for one that is another model's.
    """
    _check_files(folder)
    settings = read_settings(folder)
    contents = _contents(folder)
    shards = LocalShards(folder, {WEIGHTS_NAME: file_state((folder / WEIGHTS_NAME).stat())})
    changed, replaced = with_tensors(checkpoint, folder, contents.whole, shards)
    products = _products(changed, folder, contents, settings)
    if not products and not replaced:
        raise AdapterError(f"{folder / WEIGHTS_NAME}: holds no lora_A and lora_B")
    for module, product in products.items():
        shape = find_weight(changed, module).shape
        if shape != product.shape:
            raise WrongDtype(
                f"{folder / WEIGHTS_NAME}: changes a matrix {list(product.shape)} '{module}', but "
                f"the model's is {list(shape)}; the adapter is another model's"
            )
    adapter = Adapter(folder, products, replaced, _digest(folder), shards, origin)
    return replace(changed, deltas=adapter)


def _check_files(folder: Path) -> None:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        check_link(folder, name)
        if not (folder / name).is_file() and (folder / _TORCH_NAME).is_file():
            raise AdapterError(
                f"{folder / _TORCH_NAME}: is PyTorch's pickle, which is not read here; save it as "
                f"{WEIGHTS_NAME}"
            )
        if not (folder / name).is_file():
            raise MissingTensor(f"{folder / name}: missing; an adapter in PEFT's layout has it")


def _contents(folder: Path) -> _Contents:
    where, found = folder / WEIGHTS_NAME, _Contents()
    for name, spec in read_header(where).items():
        bare = name.removeprefix("base_model.model.")
        match = _HALF.fullmatch(bare)
        if match is None and "lora_" in bare:
            raise AdapterError(
                f"{where}: tensor {name[:120]!r} is neither lora_A nor lora_B; merge it with PEFT"
            )
        if match is None:
            found.whole.append(replace(spec, name=bare.replace(".base_layer.", ".")))
            continue
        if spec.dtype not in PLAIN_SCHEMES or len(spec.shape) != 2 or 0 in spec.shape:
            raise WrongDtype(f"{where}: '{spec}' is not a matrix of floats")
        halves = found.halves.setdefault(match[1], {})
        if match[3] in halves:
            raise UnexpectedTensor(f"{where}: '{match[1]}' has two {name[-40:]!r}")
        halves[match[3]] = spec
        if match[2]:
            found.embeddings.add(match[1])
    return found


def _products(
    checkpoint: Checkpoint, folder: Path, contents: _Contents, settings: Settings
) -> dict[str, Product]:
    """What is added to every matrix, by official module name."""
    where = folder / WEIGHTS_NAME
    found: dict[str, Product] = {}
    fused: dict[str, FusedPair] = {}
    for key, halves in contents.halves.items():
        name = f"{key}.".replace(".base_layer.", ".").removesuffix(".")
        stage = _EXPERTS.fullmatch(translate(f"{name}.").removesuffix("."))
        turned = key in contents.embeddings
        module = "" if stage else _module(where, name, turned)
        a, b = _both_halves(where, key, halves)
        if stage:
            fused[key] = FusedPair(stage[1], name, a, b)
            continue
        if module in found:
            raise UnexpectedTensor(f"{where}: '{module}' is changed twice")
        scaling = settings.scaling(name, a.shape[0])
        left, right = (a, b) if turned else (b, a)
        found[module] = Product(Factor.whole(left, turned), Factor.whole(right, turned), scaling)
    if fused:
        config = str(checkpoint.path / "config.json")
        dimensions = checkpoint.dimensions or parse_dimensions(dict(checkpoint.config), config)
        for module, product in expert_products(fused, dimensions, settings):
            if module in found:
                raise UnexpectedTensor(f"{where}: '{module}' is changed twice")
            found[module] = product
    return found


def _both_halves(
    where: Path, key: str, halves: Mapping[str, TensorSpec]
) -> tuple[TensorSpec, TensorSpec]:
    if halves.keys() != {"A", "B"}:
        raise MissingTensor(f"{where}: '{key}' has only lora_{next(iter(halves))}")
    a, b = halves["A"], halves["B"]
    if a.shape[0] != b.shape[1]:
        raise WrongDtype(f"{where}: '{a}' and '{b}' have different ranks")
    return a, b


def _module(where: Path, name: str, is_embedding: bool) -> str:
    """The official name of a matrix that LoRA changes."""
    official = official_name(f"{name}.weight")
    parsed = parse_name(official) if official else None
    if (
        parsed is None
        or not (parsed.is_linear or _MULTIPLIED.fullmatch(parsed.module))
        or (parsed.module == "embed") != is_embedding
    ):
        raise UnexpectedTensor(f"{where}: {name[:120]!r} is not a linear layer of DeepSeek-V4")
    return parsed.module


def _digest(folder: Path) -> str:
    digest = hashlib.sha256((folder / CONFIG_NAME).read_bytes())
    with open_regular(folder / WEIGHTS_NAME) as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
