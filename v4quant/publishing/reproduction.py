"""How to make the same bytes again: the files a repository needs for it, and the commands.

A conversion is decided by its source, its recipe, its statistics or solution, and the program. The
source is named by repository and commit, the recipe is published as a file, small statistics
travelled with the checkpoint, and whatever is too large is named by the `calibrate` command that
makes it. The commands run as they stand in an empty folder, one after the other. What cannot be
had by others (a source that was a local folder, somebody's own text) is named as such: then the
block begins with a variable that the reader must set.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from v4quant.builtin import PREFIX
from v4quant.conversion.calibrated import solved_part
from v4quant.conversion.finish import STATISTICS_NAME
from v4quant.evaluation.report.text import code_span, escape_markdown
from v4quant.hub.refs import HubReferenceError, parse_hub
from v4quant.publishing.publisher import RepoFile
from v4quant.recipe import recipe_from_table
from v4quant.shell import command_line, quoted
from v4quant.visible import visible
from v4quant_calibration.statistics.provenance import (
    DEFAULTS,
    CorpusText,
    Provenance,
    provenance_from,
)
from v4quant_formats.sidecars import WORDS
from v4quant_kernels.errors import V4QuantError

RECIPE_NAME = "v4quant-recipe.toml"
_HASH = re.compile(r"[0-9a-f]{40,64}")
_MOST = 120  # characters of a value of the manifest
_PLACE = "published"  # where the commands put what they fetch


def recipe_file(manifest: Mapping[str, Any]) -> RepoFile:
    """The recipe of a conversion as the file that `quantize --recipe` takes."""
    data = (recipe_toml(manifest.get("recipe") or {}) + "\n").encode()
    return RepoFile(RECIPE_NAME, len(data), hashlib.sha256(data).hexdigest(), data)


def recipe_toml(recipe: Mapping[str, Any]) -> str:
    """A recipe as TOML, without what it leaves to the program.

    JSON's strings, numbers, booleans and lists are TOML's.
    """
    told = {k: v for k, v in recipe.items() if v not in (None, "", {})}
    plain = {k: v for k, v in told.items() if not isinstance(v, Mapping)}
    lines = [f"{_key(k)} = {json.dumps(v)}" for k, v in plain.items()]
    for name, table in told.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{_key(name)}]"]
            lines += [f"{_key(k)} = {json.dumps(v)}" for k, v in table.items() if v is not None]
    return "\n".join(line.replace("```", "") for line in lines)


def reproduction(manifest: Mapping[str, Any], repo: str, folder: str = "") -> str:
    """Markdown: which program, the commands in one block, and what to know about them.

    folder: where in the repository the conversion lies, "" for its top. Nothing of the manifest
    reaches a command but what has the form that is expected there.
    """
    where = source_argument(manifest)
    made = provenance_from(manifest.get("calibration"))
    commands, notes = _commands(manifest, made, where, repo, folder)
    lines = (_source_line(where), _adapter_line(manifest), _tokenizer_line(manifest))
    variables = [line for line in lines if line]
    block = "\n".join([*variables, *commands])
    return "\n\n".join(
        [
            f"{_program(manifest)} With it, these commands make the same bytes again:",
            f"```sh\n{block}\n```",
            *notes,
            "`v4quant.json` lists the SHA-256 of every file and what became of every module.",
        ]
    )


def _commands(
    manifest: Mapping[str, Any], made: Provenance | None, source: str, repo: str, folder: str
) -> tuple[list[str], list[str]]:
    within = f"{folder}/" if folder else ""
    published = f"hf://{repo}" + (f":{folder}" if folder else "")
    names = {str(row.get("name")) for row in manifest["files"]}
    fetched, notes, calibrate, stats = [within + RECIPE_NAME], list[str](), "", ""
    if STATISTICS_NAME in names:
        fetched.append(within + STATISTICS_NAME)
        stats = f"{_PLACE}/{within}{STATISTICS_NAME}"
    elif manifest.get("stats") and made is not None:
        calibrate, stats = _calibrate(manifest, made, source, f"{_PLACE}/{within}{RECIPE_NAME}")
        notes += _texts(made)
    elif manifest.get("stats"):
        stats = '"$STATISTICS"'
        notes.append(
            "`$STATISTICS` stands for what `calibrate` had written; it is not published, and the "
            "manifest does not say how it was made (SHA-256 "
            f"{code_span(manifest['stats'], _MOST)})."
        )
    words = ""
    if manifest.get("tokenizer"):
        there = [within + name for name in WORDS if name in names]
        fetched += there
        words = f" --tokenizer {_PLACE}/{within}" if there else ' --tokenizer "$TOKENIZER"'
    convert = f"v4quant quantize {source} out --recipe {_PLACE}/{within}{RECIPE_NAME}"
    convert += adapter_option(manifest) + words
    commands = [
        command_line(["hf", "download", repo, *fetched, "--local-dir", _PLACE], "sh"),
        calibrate,
        convert + (f" --stats {stats}" if stats else ""),
        command_line(["v4quant", "verify", "out", "--same-as", published], "sh"),
    ]
    if calibrate:
        notes.append(
            "Solving adds up floating-point numbers; another version of torch or another kind of "
            "processor may choose another code where two are as good. Versions are named above."
        )
    return [c for c in commands if c], notes


def _calibrate(
    manifest: Mapping[str, Any], made: Provenance, source: str, recipe: str
) -> tuple[str, str]:
    """The `calibrate` command, and the name of what it writes."""
    out, parts = "stats.v4q", ["v4quant calibrate", source]
    if made.solved:
        out = "solved"
        parts.append(_what_is_solved(manifest, made, recipe))
    texts = made.corpus
    parts += [f"--corpus {_corpus_name(text)}" for text in texts]
    for key, value in made.options.items():
        if key == "no-propagate":
            parts.append("--no-propagate")
        elif key in DEFAULTS and re.fullmatch(r"[A-Za-z0-9.-]{1,40}", str(value)):
            parts.append(f"--{key} {value}")
    return " ".join([*parts, f"--out {out}"]), out


def _what_is_solved(manifest: Mapping[str, Any], made: Provenance, recipe: str) -> str:
    """By the recipe, unless dense matrices were left for the conversion to code."""
    try:
        own = solved_part(recipe_from_table(manifest["recipe"], RECIPE_NAME))
    except (V4QuantError, TypeError, LookupError):
        own = {}
    scheme, dense = str(made.solved.get("scheme")), str(made.solved.get("dense") or "")
    if made.solved == own or not re.fullmatch(r"[a-z0-9_-]{1,40}", scheme):
        return f"--recipe {recipe}"
    wanted = f" --dense {dense}" if re.fullmatch(r"[a-z0-9_-]{1,40}", dense) else ""
    return f"--solve {scheme}{wanted}"


def _corpus_name(text: CorpusText) -> str:
    if text.name.startswith(PREFIX) and re.fullmatch(r"[a-z0-9:-]{1,60}", text.name):
        return text.name
    return quoted(visible(text.name).replace("`", "").replace("/", ""), "sh")


def _texts(made: Provenance) -> list[str]:
    """Where the text is not the program's own, what it was."""
    own = [text for text in made.corpus if not text.name.startswith(PREFIX)]
    if not own:
        return []
    cells = [(code_span(t.name, _MOST), t.nbytes, code_span(t.sha256, _MOST)) for t in own]
    rows = "\n".join(f"| {name} | {nbytes:,} | {sha256} |" for name, nbytes, sha256 in cells)
    return [
        "The text that was calibrated on is not published here. The same bytes need the same "
        f"files:\n\n| Text | Bytes | SHA-256 |\n| --- | ---: | --- |\n{rows}"
    ]


def source_argument(manifest: Mapping[str, Any]) -> str:
    """The source as a command names it: repository and commit, or a variable."""
    return _pinned(manifest.get("source")) or '"$SOURCE"'


def adapter_option(manifest: Mapping[str, Any]) -> str:
    """The option that names the adapter that was merged, with a space before it; "" for none."""
    adapter = manifest.get("adapter")
    return f""" --adapter {_pinned(adapter) or '"$ADAPTER"'}""" if adapter else ""


def _pinned(table: Any) -> str:
    """Repository and commit as a command names them; "" where they are not known."""
    table = table if isinstance(table, Mapping) else {}
    repo, revision = str(table.get("repo") or ""), str(table.get("revision") or "")
    if not _HASH.fullmatch(revision):
        return ""
    try:
        return str(parse_hub(f"hf://{repo}@{revision}"))
    except HubReferenceError:
        return ""


def _source_line(source: str) -> str:
    if source != '"$SOURCE"':
        return ""
    return "SOURCE=...  # the folder it was converted from; no repository is known that holds it"


def _adapter_line(manifest: Mapping[str, Any]) -> str:
    adapter = manifest.get("adapter")
    if not isinstance(adapter, Mapping) or _pinned(adapter):
        return ""
    name, digest = str(adapter.get("name")), str(adapter.get("digest"))
    called = f", called {name}" if re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII) else ""
    told = f", digest {digest[:16]}" if _HASH.fullmatch(digest) else ""
    return f"ADAPTER=...  # the folder of the LoRA adapter that was merged{called}{told}"


def _tokenizer_line(manifest: Mapping[str, Any]) -> str:
    digest, names = manifest.get("tokenizer"), {str(r.get("name")) for r in manifest["files"]}
    if not digest or any(name in names for name in WORDS):
        return ""
    told = f", digest {digest[:16]}" if _HASH.fullmatch(str(digest)) else ""
    return f"TOKENIZER=...  # the folder of the tokenizer.json that was given{told}"


def _program(manifest: Mapping[str, Any]) -> str:
    """Which program: version, commit, and the versions of what decides rounding."""
    tool = manifest.get("tool")
    tool = tool if isinstance(tool, Mapping) else {}
    version, commit = str(tool.get("v4quant") or "?"), str(tool.get("commit") or "")
    told = f"Made with v4quant {escape_markdown(visible(version))}"
    if re.fullmatch(rf"{_HASH.pattern}(\+changes)?", commit):
        told += f", commit {code_span(commit, _MOST)}"
    others = [
        f"{name} {escape_markdown(visible(str(tool[name])))}"
        for name in ("torch", "python")
        if tool.get(name)
    ]
    return told + (f" ({', '.join(others)})." if others else ".")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
