"""GGUF files opened as a Checkpoint: official names, slices of the stored tensors, a config.

A GGUF model is its own description, so config.json is made from its metadata, whoever wrote it.
Every stored tensor becomes the official tensors it holds: an expert is a slice of a stack, `e_proj`
a strided half of `eh_proj`. After that nothing else in v4quant needs to know what the file was.

A path is one .gguf file (all parts of a split model belong to it) or a folder holding one model,
with or without its draft stage in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from v4quant_formats.checkpoint import Checkpoint, check_link
from v4quant_formats.config_fields import short
from v4quant_formats.errors import (
    DuplicateTensor,
    FormatError,
    MissingShard,
    UnexpectedTensor,
    WrongMetadata,
)
from v4quant_formats.gguf.carried import carried_files
from v4quant_formats.gguf.header import GgufHeader, GgufTensor, read_gguf_header
from v4quant_formats.gguf.imatrix import is_imatrix
from v4quant_formats.gguf.metadata import dspark_config, v4_config
from v4quant_formats.gguf.metadata_v41 import v41_config
from v4quant_formats.gguf.names import (
    ARCHITECTURE,
    DSPARK_ARCHITECTURE,
    V41_ARCHITECTURE,
    Meaning,
    dspark_meaning_of,
    meaning_of,
    tensor_name,
)
from v4quant_formats.gguf.pairs import odd_pairs
from v4quant_formats.gguf.quants import (
    MAX_FILES,
    SUFFIX,
    choose,
    files_below,
    parts_of,
    split_quant,
)
from v4quant_formats.shard_files import FileState, LocalShards, ShardFiles, file_state
from v4quant_formats.spec import DTYPE_BITS, TensorSpec

MAX_EXPERTS = 99_999
_MARKOV = "markov_w1.weight"
_MeaningOf = Callable[[str], Meaning | None]
HeaderOf = Callable[[str], GgufHeader]
FilesOf = Callable[[Sequence[str]], tuple[dict[str, FileState], ShardFiles]]


@dataclass(frozen=True)
class _Model:
    """The files of one model, metadata first."""

    files: dict[str, GgufHeader]

    @property
    def metadata(self) -> dict[str, Any]:
        return next(iter(self.files.values())).metadata

    @property
    def is_beside(self) -> bool:
        """Whether it only lies beside a model: a vision tower, an importance matrix."""
        tower = self.metadata.get("general.architecture") == "clip"
        return tower or any(map(is_imatrix, self.files.values()))

    @property
    def is_dspark(self) -> bool:
        """DSpark's stages, a model of another architecture."""
        return bool(self.metadata.get("general.architecture") == DSPARK_ARCHITECTURE)

    @property
    def is_draft(self) -> bool:
        """Draft stages alone: DSpark's, or it counts draft stages and lacks the trunk."""
        if self.is_dspark:
            return True
        draft = self.metadata.get("deepseek4.nextn_predict_layers", 0)
        first = "blk.0.attn_norm.weight"
        return bool(draft) and not any(first in h.tensors for h in self.files.values())


def is_gguf(path: Path) -> bool:
    """Whether a path is to be opened here: a .gguf file, or a folder with some and no index, or
    `FOLDER:QUANT`."""
    if split_quant(path)[1]:
        return True
    if path.is_file():
        return path.suffix == SUFFIX
    others = ("model.safetensors", "model.safetensors.index.json")
    if not path.is_dir() or any((path / name).exists() for name in others):
        return False
    plain = next(path.glob("*" + SUFFIX), None) is not None
    return plain or (not (path / "config.json").exists() and bool(files_below(path)))


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF model: a file, a folder with one, or `FOLDER:QUANT`. Raises MissingShard,
    UnexpectedTensor, DuplicateTensor, WrongMetadata, UnsafePath, or what `read_gguf_header` raises.
    """
    folder, quant = split_quant(path)
    if folder.is_file():
        folder, names = folder.parent, _whole_model(folder)
    else:
        names = sorted(n for n in files_below(folder) if "/" not in n)
        if quant or not names:
            names = choose(files_below(folder), quant, str(folder))
    return open_gguf_files(folder, names)


def open_gguf_files(folder: Path, names: Sequence[str]) -> Checkpoint:
    """Open these files of a folder, or of folders in it. Raises as `open_gguf` does."""
    within = {(folder / name).parent for name in names}
    if len(within) == 1:
        folder, names = within.pop(), [Path(name).name for name in names]
    for name in names:
        check_link(folder, name)

    def states(used: Sequence[str]) -> tuple[dict[str, FileState], ShardFiles]:
        files = {name: file_state((folder / name).stat()) for name in used}
        return files, LocalShards(folder, files)

    return assemble_gguf(folder, names, lambda name: read_gguf_header(folder / name), states)


def _whole_model(path: Path) -> list[str]:
    """The names of all parts of the model that a file is one of. Raises MissingShard."""
    names = parts_of(path.name, str(path.parent))
    for name in names:
        if not (path.parent / name).is_file():
            raise MissingShard(f"{path.parent / name}: missing; all {len(names)} parts are needed")
    return names


def assemble_gguf(
    folder: Path, names: Sequence[str], header_of: HeaderOf, files_of: FilesOf
) -> Checkpoint:
    """The checkpoint that .gguf files make up, wherever they lie.

    folder: what the checkpoint is called, and where files beside the model are looked for.
    header_of(name) reads a header, files_of(names) tells sizes and gives the bytes.
    """
    if len(names) > MAX_FILES:
        raise FormatError(f"{folder}: holds more than {MAX_FILES} .gguf files")
    groups = _groups(names, str(folder))
    for missing in {name for group in groups for name in group} - set(names):
        raise MissingShard(f"{folder / missing}: missing; all parts are needed")
    models = [_open_model(folder, group, header_of) for group in groups]
    for adapter in (m for m in models if m.metadata.get("general.type") == "adapter"):
        raise UnexpectedTensor(
            f"{_where(folder, adapter)}: is an adapter that was not merged; merge it with "
            "llama.cpp, or move it away"
        )
    models = [m for m in models if not m.is_beside]
    if not models:
        raise FormatError(
            f"{folder}: holds no model, only what lies beside one (an importance matrix, a vision "
            "tower); give the model as the source, and an importance matrix to --stats"
        )
    trunks = [m for m in models if not m.is_draft]
    drafts = [m for m in models if m.is_draft]
    if len(trunks) > 1 or len(drafts) > 1:
        choose(names, "", str(folder))  # tells what can be chosen, where names say so
        told = ", ".join(sorted(next(iter(m.files)) for m in models)[:4])
        raise FormatError(f"{folder}: holds several models ({told}); give one of the files")
    if not trunks and drafts[0].is_dspark:
        raise FormatError(
            f"{folder}: holds DSpark's stages only; give their folder, with the model"
        )
    main, _ = _config(folder, (trunks or drafts)[0])
    tensors: dict[str, TensorSpec] = {}
    for model in [*trunks, *drafts]:
        meaning, more = _reading(folder, model)
        main |= more
        for spec in _official(folder, model, meaning, copies=bool(trunks) and model.is_draft):
            if spec.name in tensors:
                raise DuplicateTensor(
                    f"{folder}: '{spec.name}' is in {tensors[spec.name].file} and in {spec.file}"
                )
            tensors[spec.name] = spec
    files, shards = files_of([name for model in models for name in model.files])
    where, metadata = _where(folder, models[0]), (trunks or drafts)[0].metadata
    return Checkpoint(
        folder,
        MappingProxyType(main),
        MappingProxyType(tensors),
        files,
        shards,
        carried=carried_files(metadata, where),
        remarks=_remarks(folder, (trunks or drafts)[0]),
        container=MappingProxyType({n: h for model in models for n, h in model.files.items()}),
    )


def _where(folder: Path, model: _Model) -> str:
    return str(folder / next(iter(model.files)))


def _config(folder: Path, model: _Model) -> tuple[dict[str, Any], int]:
    """config.json's object, and how many draft stages the model's files count."""
    where = _where(folder, model)
    if model.metadata.get("general.architecture") == V41_ARCHITECTURE:
        names = {name for header in model.files.values() for name in header.tensors}
        return v41_config(model.metadata, names, where), 0
    return v4_config(_counted(model), where)


def _reading(folder: Path, model: _Model) -> tuple[_MeaningOf, dict[str, Any]]:
    """How a model's tensor names are read, and what its metadata adds to config.json."""
    where = _where(folder, model)
    if model.is_dspark:
        tables = [
            h.tensors["markov_w1.weight"] for h in model.files.values() if _MARKOV in h.tensors
        ]
        if len(tables) != 1:
            raise WrongMetadata(f"{where}: has no '{_MARKOV}', which DSpark's stages need")
        added, stages = dspark_config(model.metadata, tables[0].shape[-1], where)
        added["num_nextn_predict_layers"] = stages
        return partial(dspark_meaning_of, stages=stages), added
    config, drafts = _config(folder, model)
    layers = int(config.get("text_config", config)["num_hidden_layers"])
    added = {"num_nextn_predict_layers": drafts} if drafts else {}
    return partial(meaning_of, layers=layers, draft_file=model.is_draft), added


def _counted(model: _Model) -> Mapping[str, Any]:
    """The metadata, with the number of blocks and of draft stages among them as the tensors have
    it: a draft's blocks hold `nextn` tensors and lie behind all others. A number that no file can
    mean stays as it is, for whoever reads it to refuse.
    """
    written = model.metadata.get(f"{ARCHITECTURE}.block_count")
    if type(written) is not int or written < 1:
        return model.metadata
    names = [n for h in model.files.values() for n in h.tensors if n.startswith("blk.")]
    blocks = {int(n.split(".")[1]) for n in names if n.split(".")[1].isdecimal()}
    drafts = {int(n.split(".")[1]) for n in names if ".nextn." in n and n.split(".")[1].isdecimal()}
    count = max(blocks, default=0) + 1
    if model.is_draft or not blocks or drafts != set(range(count - len(drafts), count)):
        return model.metadata
    if count - len(drafts) < _listed_layers(model.metadata, written):
        # Layers that the metadata describes one by one are missing rather than counted wrongly.
        return model.metadata
    said = {"block_count": count, "nextn_predict_layers": len(drafts)}
    return {**model.metadata, **{f"{ARCHITECTURE}.{k}": v for k, v in said.items()}}


def _listed_layers(metadata: Mapping[str, Any], blocks: int) -> int:
    """Layers that have entries of their own in every list a layer, 0 where the count of blocks
    does not cover them."""
    lengths = [
        len(value)
        for key, value in metadata.items()
        if key.startswith(f"{ARCHITECTURE}.") and isinstance(value, list) and len(value) > 1
    ]
    drafts = metadata.get(f"{ARCHITECTURE}.nextn_predict_layers", 0)
    layers = min(lengths, default=0)
    return layers if type(drafts) is int and layers <= blocks - max(drafts, 0) else 0


def _remarks(folder: Path, model: _Model) -> tuple[str, ...]:
    """Numbers of the metadata that its tensors contradict."""
    counted = _counted(model)
    odd = (f"{_where(folder, model)}: {problem}" for problem in odd_pairs(model.metadata))
    return (*_unsaid(folder, model), *odd, *_contradicted(folder, model, counted))


def _unsaid(folder: Path, model: _Model) -> Iterator[str]:
    """What a file leaves out that some engines then take otherwise than it is meant."""
    key = f"{ARCHITECTURE}.rope.scaling"
    if f"{key}.factor" in model.metadata and f"{key}.type" not in model.metadata:
        problem = "is absent; its other keys are YaRN's, but llama.cpp would scale linearly"
        yield f"{_where(folder, model)}: {key}.type {problem}"
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    embeddings = [h.tensors["token_embd.weight"] for h in model.files.values()
                  if "token_embd.weight" in h.tensors]  # fmt: skip
    rows = embeddings[0].shape[0] if embeddings else 0
    if isinstance(tokens, list) and tokens and rows and len(tokens) != rows:
        problem = f"the tokenizer has {len(tokens):,} tokens, the embedding {rows:,} rows"
        yield f"{_where(folder, model)}: {problem}"


def _contradicted(folder: Path, model: _Model, counted: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{_where(folder, model)}: {key} is {short(model.metadata.get(key))}, its tensors make "
        f"{counted[key]}"
        for key in counted
        if counted[key] != model.metadata.get(key, 0)
    )


def _groups(names: Sequence[str], where: str) -> list[list[str]]:
    """Names of the files of each model, in order of parts."""
    parts = [parts_of(name, where) for name in names]
    return list({model[0]: model for model in parts}.values())


def _open_model(folder: Path, names: Sequence[str], header_of: HeaderOf) -> _Model:
    files = {name: header_of(name) for name in names}
    total = sum(len(h.tensors) for h in files.values())
    for number, (name, header) in enumerate(files.items()):
        said = [header.metadata.get(f"split.{k}", d) for k, d in (("no", 0), ("count", 1))]
        if said != [number, len(names)] and not (len(names) == 1 and said == [0, 0]):
            raise WrongMetadata(
                f"{folder / name}: says it is part {said[0]} (from 0) of {said[1]}, its name says "
                f"{number} of {len(names)}; the file was renamed or is another model's"
            )
        if header.metadata.get("split.tensors.count", total) != total:
            raise WrongMetadata(
                f"{folder / name}: the model has {header.metadata['split.tensors.count']} tensors, "
                f"its parts hold {total}"
            )
    seen: dict[str, str] = {}
    for name, header in files.items():
        for tensor in header.tensors:
            if tensor in seen:
                raise DuplicateTensor(f"{folder}: '{tensor}' is in {seen[tensor]} and in {name}")
            seen[tensor] = name
    return _Model(files)


def _official(
    folder: Path, model: _Model, meaning_of: _MeaningOf, copies: bool
) -> Iterator[TensorSpec]:
    """The official tensors in a model's files; `copies`: the trunk's are elsewhere."""
    for file, header in model.files.items():
        for tensor in header.tensors.values():
            meaning = meaning_of(tensor.name)
            if meaning is None:
                raise UnexpectedTensor(
                    f"{folder / file}: tensor {tensor.name[:80]!r} is none of DeepSeek-V4's"
                )
            first = meaning.modules[0]
            if copies and not first.startswith("mtp."):
                continue
            if meaning.stacked:
                yield from _experts(folder, file, tensor, first)
            elif len(meaning.modules) > 1:
                yield from _halves(folder, file, tensor, meaning.modules)
            else:
                yield TensorSpec(
                    tensor_name(first), tensor.dtype, _byte_shape(tensor), file, tensor.offset
                )


def _byte_shape(tensor: GgufTensor, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Block types are bytes: the last dimension counts a row's."""
    shape = shape or tensor.shape
    if tensor.dtype in DTYPE_BITS:
        return shape
    rows = 1
    for length in tensor.shape[:-1]:
        rows *= length
    row_bytes = tensor.nbytes // rows
    return (*shape[:-1], row_bytes * shape[-1] // tensor.shape[-1])


def _experts(folder: Path, file: str, tensor: GgufTensor, pattern: str) -> Iterator[TensorSpec]:
    if len(tensor.shape) != 3 or tensor.shape[0] > MAX_EXPERTS:
        raise WrongMetadata(f"{folder / file}: {tensor.name!r} is not a stack of expert matrices")
    experts = tensor.shape[0]
    size = tensor.nbytes // experts
    shape = _byte_shape(tensor, tensor.shape[1:])
    for expert in range(experts):
        name = tensor_name(pattern.format(expert))
        yield TensorSpec(name, tensor.dtype, shape, file, tensor.offset + expert * size)


def _halves(
    folder: Path, file: str, tensor: GgufTensor, modules: Sequence[str]
) -> Iterator[TensorSpec]:
    if len(tensor.shape) != 2 or tensor.shape[1] % 2:
        raise WrongMetadata(f"{folder / file}: {tensor.name!r} is not two matrices side by side")
    whole = _byte_shape(tensor)
    row = tensor.nbytes // tensor.shape[0]
    if row % 2:
        raise WrongMetadata(f"{folder / file}: {tensor.name!r} cannot be cut in half")
    for index, module in enumerate(modules):
        name, shape = tensor_name(module), (whole[0], whole[1] // 2)
        place = tensor.offset + index * row // 2
        yield TensorSpec(name, tensor.dtype, shape, file, place, stride=row)


def metadata_of(path: Path) -> Mapping[str, Any]:
    """The key-value pairs of a GGUF file, or of the first part of a split one."""
    return read_gguf_header(path).metadata
