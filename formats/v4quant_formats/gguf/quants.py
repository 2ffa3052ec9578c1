"""Several quants side by side: which .gguf files a name like `Q4_K_M` means.

Repositories and folders of GGUF files hold one model many times, a quant in a file, in parts
(`-00001-of-00003`) or in a folder of its own, and files beside them: draft stages, which belong to
a quant, vision towers and importance matrices, which do not. Only names are looked at, so that
nothing is fetched before it is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from v4quant_formats.errors import FormatError, MissingShard

SUFFIX = ".gguf"
MAX_FILES = 1000
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# Parts as others number them, which neither llama.cpp nor anybody else joins.
_ODD_PART = re.compile(r".+[-._]\d+[-_.]?of[-_.]?\d+\.gguf", re.IGNORECASE)
# A file cut in pieces, or not yet whole: what stands behind `.gguf`.
_PIECE = re.compile(r".+\.gguf[-.](?:part|split|\d|[a-z]{1,2}$).*", re.IGNORECASE)
_UNFINISHED = re.compile(
    r".+\.gguf(?:\.[0-9a-f]{8})?\.(?:crdownload|incomplete|part|download|tmp)", re.IGNORECASE
)
_QUANT = (
    r"(?:UD-)?(?:I?Q\d+(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP\d(?:_[A-Z0-9]+)*|NVFP\d|BF16|FP?16|FP?32|FP8)"
)
_LABEL = re.compile(rf"(?:^|[-._])({_QUANT})(?=$|[-._])", re.IGNORECASE)
_LABEL_LAST = re.compile(rf"[-._]{_QUANT}$", re.IGNORECASE)
_DRAFT = re.compile(r"(?:^|[-._])(?:mtp|dspark|draft|nextn)(?=$|[-._])", re.IGNORECASE)
_BESIDE = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_LISTED = 12


@dataclass(frozen=True)
class Variant:
    """One model's files, relative names in order of parts. label: its quant, or its whole stem.

    is_draft: whether its name says that it holds draft stages alone.
    """

    folder: str
    stem: str
    label: str
    files: tuple[str, ...]
    is_draft: bool = False

    @property
    def choice(self) -> str:
        """What a user writes to choose it."""
        return self.folder if self.folder and self.label == self.stem else self.label


def variants(names: Iterable[str], where: str) -> list[Variant]:
    """The models among file names, without what only lies beside one; parts may be missing.

    Raises FormatError for impossible numbers of parts.
    """
    there = sorted(n for n in names if n.endswith(SUFFIX))
    groups: dict[tuple[str, str], tuple[str, ...]] = {}
    for name in there:
        path = PurePosixPath(name)
        folder = "" if str(path.parent) == "." else str(path.parent)
        match = _PART.fullmatch(path.name)
        groups[folder, match[1] if match else path.stem] = tuple(parts_of(name, where))
    models = {key: files for key, files in groups.items() if not _BESIDE.search(key[1])}
    # A model may itself be called `...-DSpark`; its drafts say so once more than it does.
    said = {key: len(_DRAFT.findall(key[1])) for key in models}
    least = min(said.values(), default=0)
    return [
        Variant(folder, stem, _label(stem), files, said[folder, stem] > least)
        for (folder, stem), files in models.items()
    ]


def parts_of(name: str, where: str) -> list[str]:
    """The names of all parts of the model that a file is one of, in order; there or not.

    Raises FormatError for an impossible number of parts.
    """
    base = PurePosixPath(name).name
    match = _PART.fullmatch(base)
    if match is None:
        return [name]
    count, stem = int(match[3]), f"{name.removesuffix(base)}{match[1]}"
    if not 1 <= count <= MAX_FILES:
        raise FormatError(f"{where}: {name}: its name says {count} parts")
    return [f"{stem}-{i:05d}-of-{match[3]}{SUFFIX}" for i in range(1, count + 1)]


def without_label(stem: str) -> str:
    """A name without the quant at its end."""
    return _LABEL_LAST.sub("", stem)


def _label(stem: str) -> str:
    found = _LABEL.findall(stem)
    return found[-1] if found else stem


def choose(names: Sequence[str], quant: str, where: str) -> list[str]:
    """The files of the quant that is meant ("": the only one), and those of its draft stages.

    quant: a label (`Q4_K_M`, or `Q4_K` where only one begins so), a folder, or a file, which then
    goes without draft stages of another file. where: for messages. Raises FormatError that lists
    what is there, and MissingShard for parts that are not.
    """
    found = variants(names, where)
    models = [v for v in found if not v.is_draft] or found
    for variant in found:
        if quant and quant in (*variant.files, *(PurePosixPath(f).name for f in variant.files)):
            return _whole(list(variant.files), names, where)
    chosen = _matching(models, quant) if quant else models
    if len(chosen) != 1:
        said = f"'{quant}' is none" if not chosen else f"'{quant}' means several"
        problem = f"{said} of its quants" if quant else "holds several quants"
        odd = [f for v in chosen or models for f in v.files if _ODD_PART.fullmatch(f)]
        if odd and not _PART.fullmatch(PurePosixPath(odd[0]).name):
            raise FormatError(
                f"{where}: {odd[0]} looks like one of several parts; they are read by llama.cpp's "
                "names only (NAME-00001-of-00003.gguf), rename them"
            )
        if not models:
            raise FormatError(f"{where}: has no .gguf files, so there is no ':{quant}' to choose")
        raise FormatError(f"{where}: {problem}; choose one: {_listed(chosen or models)}")
    return _whole([*chosen[0].files, *_drafts(found, chosen[0], where)], names, where)


def almost_gguf(name: str) -> str | None:
    """What a file is that is nearly a GGUF file by its name, and the remedy; None for others."""
    if _UNFINISHED.fullmatch(name):
        return f"{name} is not whole yet; finish the download, or what writes it"
    if _PIECE.fullmatch(name):
        return f"{name} is a piece of a file; join all pieces in order (cat) into one .gguf file"
    if name.lower().endswith(SUFFIX) and not name.endswith(SUFFIX):
        return f"{name} must end in {SUFFIX}, in small letters; rename it"
    return None


def _whole(chosen: list[str], names: Sequence[str], where: str) -> list[str]:
    """The chosen files, all of which must be there. Raises MissingShard."""
    if missing := sorted(set(chosen) - set(names)):
        raise MissingShard(f"{where}: {missing[0]} is missing; all parts of a model are needed")
    return chosen


def _matching(models: Sequence[Variant], quant: str) -> list[Variant]:
    """Those a word means: exactly, without Unsloth's prefix, or by how their labels begin."""
    word = quant.lower()
    rules = (
        lambda v: word in (v.label.lower(), v.stem.lower()),
        lambda v: word in (v.folder.lower(), PurePosixPath(v.folder).name.lower()),
        lambda v: v.label.lower() == f"ud-{word}",
        lambda v: v.label.lower().startswith(f"{word}_"),
        lambda v: v.label.lower().startswith(f"ud-{word}_"),
    )
    return next((found for rule in rules if (found := [v for v in models if rule(v)])), [])


def _drafts(found: Sequence[Variant], model: Variant, where: str) -> list[str]:
    """The draft stages that go with a model: those of its quant, else the only ones beside it or,
    for a model in a folder, above it, unless they are of a quant that lies there, too."""
    label = model.label.lower()
    drafts = [v for v in found if v.is_draft and v is not model and v.folder in ("", model.folder)]
    beside = [v for v in drafts if v.folder == model.folder]
    above = {v.label.lower() for v in found if not v.is_draft and not v.folder}
    chosen = (
        [v for v in beside if v.label.lower() == label]
        or [v for v in drafts if v.label.lower() == label]
        or beside
        or [v for v in drafts if v.label.lower() not in above]
    )
    if len(chosen) > 1:
        raise FormatError(
            f"{where}: holds several files of draft stages ({_names(chosen)}), and none is of this "
            f"quant; choose {PurePosixPath(model.files[0]).name} to go without"
        )
    return [name for v in chosen for name in v.files]


def _names(found: Sequence[Variant]) -> str:
    return ", ".join(sorted(v.files[0] for v in found)[:4])


def _listed(models: Sequence[Variant]) -> str:
    """What can be chosen, as it is written."""
    choices = [v.choice for v in models]
    told = sorted(
        f":{c if choices.count(c) == 1 else PurePosixPath(v.files[0]).name}"
        for v, c in zip(models, choices, strict=True)
    )
    more = f" and {len(told) - _LISTED} more" if len(told) > _LISTED else ""
    return ", ".join(told[:_LISTED]) + more


def split_quant(path: Path) -> tuple[Path, str]:
    """`FOLDER:QUANT` taken apart; a path that exists, or no such folder, stays whole."""
    head, colon, quant = str(path).rpartition(":")
    if not colon or not quant or path.exists() or not Path(head).is_dir():
        return path, ""
    return Path(head), quant.replace("\\", "/")


def home_of(path: Path) -> Path:
    """The folder that holds the files of the model a path means: a folder, one of its .gguf files,
    or `FOLDER:QUANT`. Raises FormatError that lists what is there, and MissingShard."""
    folder, quant = split_quant(path)
    if not quant:
        return folder.parent if folder.is_file() else folder
    chosen = choose(files_below(folder), quant, str(folder))
    homes = {PurePosixPath(name).parent for name in chosen}
    return folder / homes.pop() if len(homes) == 1 else folder


def files_below(folder: Path) -> list[str]:
    """Relative names of the .gguf files of a folder and of the folders in it.

    Raises FormatError for more than anybody has.
    """
    found = sorted(
        p.relative_to(folder).as_posix()
        for pattern in (f"*{SUFFIX}", f"*/*{SUFFIX}")
        for p in folder.glob(pattern)
        if not p.name.startswith("._")  # which macOS leaves beside a file it copies
    )
    if len(found) > MAX_FILES:
        raise FormatError(f"{folder}: holds more than {MAX_FILES} .gguf files")
    return found
