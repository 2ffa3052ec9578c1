"""One check of a checkpoint's structure, in front of every verb that works on one.

Whatever reads only what it asks for passes over what it does not know: an adapter that was never
merged, a bias, half a draft stage. So before any work every tensor must be accounted for: its name
is the release's, config.json implies its module, its parts are a known form, its shape and dtype
are those of its role; every module implied is there; and routing tables name experts that exist.

`find_defects` lists all that is wrong (inspect does), `check_structure` raises the first that makes
work on the checkpoint meaningless. The others (`blocking` false) are statements of config.json that
the tensors contradict without making them ambiguous; the tensors decide.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from v4quant_formats.checkpoint import SINGLE_NAME, Checkpoint
from v4quant_formats.config_fields import short
from v4quant_formats.declarations import false_statements
from v4quant_formats.deepseek_v4 import (
    TensorName,
    draft_stages,
    expected_modules,
    other_release,
    parse_name,
    wrong_draft_count,
)
from v4quant_formats.defect import Defect
from v4quant_formats.errors import (
    FormatError,
    ImplausibleScales,
    MissingTensor,
    UnexpectedTensor,
    UnknownTokenizer,
    WrongDtype,
)
from v4quant_formats.model_config import (
    V41,
    ConfigError,
    Dimensions,
    parse_dimensions,
    parse_model_config,
)
from v4quant_formats.module_shapes import module_shape
from v4quant_formats.naming import GATE_UP_BLOCKS
from v4quant_formats.release_config import FIXED
from v4quant_formats.scale_sense import odd_scales
from v4quant_formats.spec import TensorSpec, torch_dtype
from v4quant_formats.vocabulary_files import odd_vocabulary
from v4quant_formats.weights import StoredWeight, find_weight
from v4quant_kernels.late import torch

_LOG = logging.getLogger(__name__)
MAX_DEFECTS = 1000
MAX_NOTES = 8
_FLOATS = ("F32", "BF16", "F16")
_INTEGERS = ("I64", "I32")
_PIECE = 1 << 20  # bytes of a routing table looked at at a time
# Modules that some releases have beyond what every one must.
_OPTIONAL = re.compile(
    r"mtp\.\d+\.(emb\.tok_emb|head)|image_\w+|(vision|aligner)\..+"
    r"|(layers|mtp)\.\d+\.ffn\.gate\.bias_vl"  # also of a vision model without its tower
)
# Endings of tensors that other tools leave behind -> what they are.
_STRAYS = (
    (r"\.lora_[AB]\.|\.lora_embedding|\.dora_|lora_magnitude", "an adapter that was not merged"),
    (r"zero_point$|qzeros$", "zero points of a packed matrix, which change its values"),
    (r"(g_idx|perm)$", "an order of columns, without which a packed matrix is scrambled"),
    (r"rotation|hadamard|smooth|pre_quant_scale", "a transform of a matrix's inputs"),
    (r"bias$", "a bias, which no matrix of V4 has"),
)


@dataclass(frozen=True)
class Structure:
    """A checkpoint taken apart: parsed names by tensor (None for unknown ones), the modules that
    could be read, and all defects, at most 1000."""

    config: Dimensions | None
    names: Mapping[str, TensorName | None]
    stored: Mapping[str, StoredWeight]
    defects: tuple[Defect, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Defects that stop nothing, as texts."""
        return tuple(str(d) for d in self.defects if not d.blocking)


def find_defects(checkpoint: Checkpoint) -> Structure:
    """Take a checkpoint apart and list what is wrong with it.

    Routing tables, which headers say nothing about, are read as well where there is data (a few
    megabytes), and of local files a sample of the scales.
    """
    names = {spec.name: parse_name(spec.name) for spec in checkpoint}
    defects: list[Defect] = []
    where, raw = str(checkpoint.path / "config.json"), dict(checkpoint.config)
    try:
        config = parse_dimensions(raw, where)
    except ConfigError as error:
        config = None
        defects.append(Defect("", str(error), ConfigError))
    else:
        defects += _of_forward(raw, where)
    stored: dict[str, StoredWeight] = {}
    for module in dict.fromkeys(n.module for n in names.values() if n):
        try:
            stored[module] = find_weight(checkpoint, module)
        except FormatError as error:
            defects.append(Defect(module, str(error), type(error)))
    defects += islice(_unknown(checkpoint, names), MAX_DEFECTS)
    defects += _of_folder(checkpoint)
    if config is not None:
        defects += _of_model(checkpoint, config, names, stored)
        if checkpoint.has_data:
            defects += _of_tables(checkpoint, config, stored)
    for problem in islice(odd_vocabulary(checkpoint), MAX_DEFECTS):
        defects.append(Defect("", problem, UnknownTokenizer, blocking=False))
    for odd in islice(odd_scales(checkpoint, stored), MAX_DEFECTS):
        defects.append(Defect(odd.module, odd.problem, ImplausibleScales, blocking=odd.beyond))
    return Structure(config, names, stored, tuple(defects[:MAX_DEFECTS]))


def check_structure(
    checkpoint: Checkpoint, unknown: str = "refuse", drafts: bool = True
) -> Structure:
    """Raise the first defect that makes work on a checkpoint meaningless, as its own error, and
    tell those that stop nothing as warnings.

    unknown: "copy" lets tensors pass that no V4 release has, as `--unknown copy` wants. drafts:
    whether draft stages will be used; half a stage may be left out.
    """
    found = find_defects(checkpoint)
    for note in found.notes[:MAX_NOTES]:
        _LOG.warning("%s: %s", checkpoint.path, note)
    for defect in found.defects:
        stray = defect.kind is UnexpectedTensor and found.names.get(defect.where, ...) is None
        unused = not drafts and defect.where.startswith("mtp.")
        if defect.blocking and not unused and not (stray and unknown == "copy"):
            text = str(defect)
            named = str(checkpoint.path) in text
            raise defect.kind(text if named else f"{_file(checkpoint, defect.where)}: {text}")
    return found


def _file(checkpoint: Checkpoint, where: str) -> str:
    spec = checkpoint.tensors.get(where)
    return str(checkpoint.path / spec.file) if spec else str(checkpoint.path)


def _unknown(checkpoint: Checkpoint, names: Mapping[str, TensorName | None]) -> Iterator[Defect]:
    for name, parsed in names.items():
        if parsed is None:
            what = next((text for form, text in _STRAYS if re.search(form, name)), "")
            problem = "belongs to no V4 release v4quant knows"
            problem += f" ({what})" if what else ""
            remedy = "; --unknown copy carries such tensors byte for byte"
            if "adapter" in what:
                remedy = "; merge it, or give the adapter's own folder with --adapter"
            yield Defect(name, problem + remedy, UnexpectedTensor)


def _of_forward(raw: dict[str, object], where: str) -> Iterator[Defect]:
    """What config.json says of the forward pass. Weights convert without it, but what it says of
    positions must be V4's."""
    try:
        parse_model_config(raw, where)
    except ConfigError as error:
        yield Defect("", str(error), ConfigError, blocking="rope_scaling" in str(error))


def _of_folder(checkpoint: Checkpoint) -> Iterator[Defect]:
    """What its opener saw contradicted, and weights that lie beside the checkpoint's own: nobody
    reads them here, others may."""
    for remark in checkpoint.remarks:
        yield Defect("", remark, FormatError, blocking=False)
    halved = next((n for n in checkpoint.renamed.values() if n.endswith(GATE_UP_BLOCKS)), None)
    if halved is not None:
        problem = f"{halved} is read as rows of gate, then rows of up, as transformers' V4 has them"
        problem += "; a tool for gpt-oss may have alternated them, which no file tells"
        yield Defect("", problem, FormatError, blocking=False)
    for name in checkpoint.beside[:MAX_DEFECTS]:
        if "adapter" in name or "lora" in name.lower():
            if checkpoint.deltas is None:
                problem = f"{name} is an adapter that was not merged; give --adapter with its "
                problem += "folder, or move the file away"
                yield Defect("", problem, UnexpectedTensor)
            continue
        problem = f"{name} lies beside the model's own files and is not read"
        if name == SINGLE_NAME:
            problem += "; transformers loads it instead of them"
        yield Defect("", problem, UnexpectedTensor, blocking=False)


def _of_model(
    checkpoint: Checkpoint,
    config: Dimensions,
    names: Mapping[str, TensorName | None],
    stored: Mapping[str, StoredWeight],
) -> Iterator[Defect]:
    """What config.json implies against what there is."""
    for text in other_release(config, names):
        yield Defect("", text, ConfigError)
    language = config.raw.get("text_config") if config.v41 else config.raw
    for key, value in FIXED.items():
        said = language.get(key, value) if isinstance(language, Mapping) else value
        if said is not None and said != value:
            problem = f"config.json says {key} {short(said)}, but V4's is {short(value)}; this is "
            yield Defect("", problem + "another architecture", ConfigError)
    layers = [t for t, n in names.items() if n and _layer(n) >= config.num_hidden_layers]
    for tensor in islice(layers, MAX_DEFECTS):
        problem = f"is beyond the {config.num_hidden_layers} layers of config.json"
        yield Defect(tensor, f"{problem}; it belongs to another model", UnexpectedTensor)
    yield from _of_drafts(checkpoint, config)
    present = {n.module for n in names.values() if n}
    implied: set[str] = set()
    # A hostile config may require billions of modules.
    for module in islice(expected_modules(config, names), 20 * len(present) + MAX_DEFECTS):
        implied.add(module)
        if module not in present:
            problem = "is missing, which config.json requires; the download is incomplete or "
            yield Defect(module, problem + "config.json belongs to another model", MissingTensor)
    for module, weight in stored.items():
        yield from _of_module(config, module, weight)
    too_many = set(layers)
    for tensor, name in names.items():
        if name is None or tensor in too_many or name.module in implied:
            continue
        if not _OPTIONAL.fullmatch(name.module):
            problem = "does not fit the model config.json describes, which has no such module"
            yield Defect(tensor, problem, UnexpectedTensor)
    yield from false_statements(checkpoint, stored)
    if config.v41 is not None:
        yield from _of_engram(config.v41)


def _of_engram(v41: V41) -> Iterator[Defect]:
    """Tables have a row for every remainder of their primes, which follow from config.json."""
    for layer, said, table in zip(
        v41.engram_layer_ids, v41.engram_num_embeddings, v41.engram_tables, strict=True
    ):
        if said != table.rows:
            problem = f"engram_num_embeddings says {said:,} rows for layer {layer}, but the primes "
            problem += f"that n-grams are hashed by add up to {table.rows:,}; engram_vocab_size, "
            problem += "engram_n_heads or engram_max_ngram_size is another model's"
            yield Defect("", problem, ConfigError)
            return  # every later table follows from the same numbers


def _layer(name: TensorName) -> int:
    return int(name.stage.rpartition(".")[2]) if name.stage.startswith("layers.") else -1


def _of_drafts(checkpoint: Checkpoint, config: Dimensions) -> Iterator[Defect]:
    """Draft stages follow one another from 0; a promise of some that are not there is empty."""
    stages = draft_stages(checkpoint.tensors)
    for number, stage in enumerate(stages):
        if stage != f"mtp.{number}":
            problem = f"draft stages are {', '.join(stages)}, without mtp.{number}; a chain with a "
            yield Defect(stage, problem + "hole cannot run, fetch the missing shard", MissingTensor)
            return
    said = config.raw.get("text_config", config.raw) if config.v41 else config.raw
    promised = said.get("num_nextn_predict_layers", 0)
    if not stages and isinstance(promised, int) and promised > 0:
        problem = f"config.json promises {promised} draft stages, and there is none"
        yield Defect("", problem, MissingTensor, blocking=False)
    if stages and wrong_draft_count(said, len(stages)):
        problem = f"config.json promises {promised or 'no'} draft stage{'s'[: promised != 1]}, and "
        problem += f"there {'is' if len(stages) == 1 else 'are'} {len(stages)}"
        yield Defect("", problem, MissingTensor, blocking=False)


def _of_module(config: Dimensions, module: str, weight: StoredWeight) -> Iterator[Defect]:
    wanted, first = module_shape(config, module), weight.first
    if wanted is not None and weight.shape != wanted:
        problem = f"has shape {list(weight.shape)}, but config.json implies {list(wanted)}; "
        yield Defect(module, problem + "the files belong to different models", WrongDtype)
    integer = module.endswith(".tid2eid")
    if weight.scheme is None and first.dtype not in (_INTEGERS if integer else _FLOATS):
        problem = f"is {first.dtype}, expected {'I64' if integer else 'a float dtype'}; the file "
        yield Defect(first.name, problem + "was written wrongly", WrongDtype)
    if weight.scheme is not None and integer:
        yield Defect(first.name, "is coded, but must hold integers", WrongDtype)


def _of_tables(
    checkpoint: Checkpoint, config: Dimensions, stored: Mapping[str, StoredWeight]
) -> Iterator[Defect]:
    """Routing tables of hash layers: every token names different experts, all of which exist."""
    experts = config.n_routed_experts
    for module, weight in stored.items():
        spec = weight.first
        if not module.endswith(".tid2eid") or spec.dtype not in _INTEGERS or len(spec.shape) != 2:
            continue
        lowest, highest, repeated = _survey(checkpoint, spec)
        if lowest < 0 or highest >= experts:
            problem = f"names experts {lowest} to {highest} of {experts}; the table is stale (the "
            problem += "experts were pruned or renumbered) or damaged"
            yield Defect(spec.name, problem, WrongDtype)
        elif repeated:
            # As naive renumbering after pruning leaves it; engines run it.
            problem = f"names an expert twice for {repeated} tokens, which counts it double"
            yield Defect(spec.name, problem, WrongDtype, blocking=False)


def _survey(checkpoint: Checkpoint, spec: TensorSpec) -> tuple[int, int, int]:
    """Smallest and largest id, and rows that name one twice. Read by ranges, so that no shard of a
    repository is fetched for it."""
    row = spec.row_bytes
    step = max(1, _PIECE // max(row, 1)) * row
    lowest, highest, repeated = 0, 0, 0
    for start in range(0, spec.nbytes, step):
        count = min(step, spec.nbytes - start)
        (data,) = checkpoint.shards.slices(spec.file, [spec.offset + start], count)
        if len(data) < count:
            return lowest, highest, repeated  # a file that shrank is told by who reads it
        ids = torch.frombuffer(bytearray(data), dtype=torch_dtype(spec.dtype))
        ids = ids.view(-1, spec.shape[1])
        lowest, highest = min(lowest, int(ids.min())), max(highest, int(ids.max()))
        ordered = ids.sort(1)[0]
        repeated += int((ordered[:, 1:] == ordered[:, :-1]).any(1).sum())
    return lowest, highest, repeated
