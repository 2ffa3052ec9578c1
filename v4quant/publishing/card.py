"""The model card: what a stranger must know before downloading 150 GB, and nothing else.

Made from the manifest and, when there is one, the evaluation's JSON, both of which are data of
measurements; no sentence here claims a quality, a speed or a size that is not in them. What was not
measured is said to be unmeasured. Every name comes from somebody's file and is escaped.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from v4quant.conversion.records import TensorRecord, record_from_dict
from v4quant.evaluation.figures import Figures
from v4quant.evaluation.report.probes import draft_table
from v4quant.evaluation.report.tables import (
    Table,
    distribution_table,
    summary_table,
    verdict_text,
)
from v4quant.evaluation.report.text import code_span, count, escape_markdown
from v4quant.hub.errors import HubError
from v4quant.publishing.card_facts import (
    format_of,
    layout_of,
    markdown_table,
    scheme_of,
    section,
    size_text,
    text,
)
from v4quant.publishing.card_ladder import CHART_NAME, Sibling, other_sizes, sizes_chart
from v4quant.publishing.needs import memory_table
from v4quant.publishing.publisher import RepoFile, card_file
from v4quant.publishing.reproduction import (
    RECIPE_NAME,
    adapter_option,
    recipe_file,
    recipe_toml,
    reproduction,
    source_argument,
)
from v4quant.publishing.serving import serving_lines
from v4quant.visible import visible
from v4quant_formats.engines import ENGINES
from v4quant_formats.engines.engine import Release
from v4quant_formats.manifest import MANIFEST_NAME
from v4quant_formats.preflight import Preflight

PROJECT = "v4quant"
_LICENSES = {"MIT License": "mit", "Apache License": "apache-2.0"}


@dataclass(frozen=True)
class CardRequest:
    """What the card is about besides the manifest.

    engines: what the preflight accepts. base_model, license: only where the manifest does not know
        them (a conversion of a local folder); a repository's own answer stands.
    siblings: all conversions of a ladder, this one among them. folder: where in the repository this
        conversion lies, "" for its top.
    """

    repo: str
    evaluation: Figures | None = None
    base_model: str = ""
    license: str = ""
    engines: tuple[Preflight, ...] = ()
    siblings: tuple[Sibling, ...] = ()
    folder: str = ""


def card_files(manifest: Mapping[str, Any], request: CardRequest) -> list[RepoFile]:
    """The card and what it refers to: the recipe, and a chart where several sizes were measured.

    Raises what `render_card` raises.
    """
    files = [card_file(render_card(manifest, request)), recipe_file(manifest)]
    if drawing := sizes_chart(request.siblings, request.evaluation):
        data = drawing.encode()
        files.append(RepoFile(CHART_NAME, len(data), hashlib.sha256(data).hexdigest(), data))
    return files


def render_card(manifest: Mapping[str, Any], request: CardRequest) -> str:
    """The whole README.md: front matter that huggingface_hub accepts, then Markdown.

    Raises HubError when the evaluation is of another checkpoint, or when manifest or evaluation are
    of another form than ours, and ReportError for a damaged one.
    """
    try:
        return _render(manifest, request)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise HubError(
            f"{request.repo}: no card can be made of this {MANIFEST_NAME} and evaluation "
            f"({type(error).__name__}: {error}); convert and evaluate again"
        ) from None


def _render(manifest: Mapping[str, Any], request: CardRequest) -> str:
    evaluation = request.evaluation
    if evaluation is not None:
        check_evaluation(manifest, evaluation)
    records = [record_from_dict(row) for row in manifest["tensors"]]
    charted = bool(sizes_chart(request.siblings, evaluation))
    parts = [
        f"# {escape_markdown(request.repo.partition('/')[2])}",
        _summary(manifest, request),
        "## Sizes",
        _classes(manifest),
        other_sizes(request.siblings, request.repo, charted),
        "## Quality",
        _quality(evaluation),
        "## What was done",
        _done(manifest, records),
        "## Known limits",
        _limits(manifest, records, request),
        "## How to serve",
        _memory(manifest, request),
        *_serving(manifest, request),
        "## How to reproduce and check",
        reproduction(manifest, request.repo, request.folder),
        _check(manifest, request),
    ]
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{front_matter(manifest, request)}\n---\n\n{body}\n"


def front_matter(manifest: Mapping[str, Any], request: CardRequest) -> str:
    """The YAML block, through huggingface_hub's own ModelCardData."""
    from huggingface_hub import ModelCardData

    scheme, container = scheme_of(manifest), format_of(manifest)
    base, license = _base(manifest, request), _license(manifest, request)
    library = {"gguf": "gguf", "onnx": "onnx"}.get(container, "transformers")
    family = re.split(r"[-_]", scheme.lower())[0]
    tags = dict.fromkeys(["deepseek_v4", family, scheme, container, PROJECT])
    data = ModelCardData(
        base_model=base or None,
        license=license or None,
        library_name=library,
        quantized_by=request.repo.partition("/")[0],
        pipeline_tag="text-generation",
        tags=[t for t in tags if re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", t)],
        **({"base_model_relation": "quantized"} if base else {}),
    )
    return str(data.to_yaml()).strip()


def check_evaluation(manifest: Mapping[str, Any], evaluation: Figures) -> None:
    """Refuse figures of another checkpoint. Raises HubError."""
    told, real = evaluation.candidate.bytes, shard_bytes(manifest)
    if told != real:
        raise HubError(
            f"the evaluation is of a checkpoint of {count(told) or 'unknown'} bytes, this one has "
            f"{real:,}; evaluate this one, or push without an evaluation"
        )


def shard_bytes(manifest: Mapping[str, Any]) -> int:
    """Bytes of the files with tensors, by which an evaluation is known to be of a checkpoint."""
    shards = (".safetensors", ".gguf")
    return sum(int(f["bytes"]) for f in manifest["files"] if f["name"].endswith(shards))


def license_of(text: str) -> str:
    """The hub's name of a licence by the first line of its file, or nothing."""
    first = text.lstrip().partition("\n")[0].strip()
    return _LICENSES.get(first, "")


def _summary(manifest: Mapping[str, Any], request: CardRequest) -> str:
    source = section(manifest, "source")
    base = _base(manifest, request)
    name = f"[{base}](https://huggingface.co/{base})" if base else code_span(text(source, "name"))
    total = sum(f["bytes"] for f in manifest["files"])
    rows = [
        ("Converted from", name),
        ("Source commit", code_span(text(source, "revision"))),
        ("Release", escape_markdown(text(source, "release"))),
        ("Routed experts", code_span(scheme_of(manifest))),
        ("Container", code_span(format_of(manifest))),
        ("Download", f"{size_text(total)} in {len(manifest['files']):,} files"),
        ("Tensor data before", size_text(source.get("bytes"))),
        ("Loads in", ", ".join(ENGINES[e.engine].title for e in request.engines)),
        ("Made with", f"{PROJECT} {escape_markdown(text(section(manifest, 'tool'), PROJECT))}"),
    ]
    return markdown_table(("", ""), [r for r in rows if r[1] and r[1] != "``"])


def _classes(manifest: Mapping[str, Any]) -> str:
    rows = []
    for row in manifest.get("classes") or []:
        weights, before, after = (int(row[k]) for k in ("weights", "bytes_in", "bytes_out"))
        bits = f"{8 * after / weights:.3f}" if weights else ""
        sizes = (size_text(before), size_text(after))
        rows.append((escape_markdown(str(row["role"])), f"{weights:,}", *sizes, bits))
    if not rows:
        return "The manifest of this conversion does not tell sizes by class."
    return markdown_table(("Tensors", "Weights", "Before", "After", "Bits per weight"), rows)


def _quality(evaluation: Figures | None) -> str:
    if evaluation is None:
        return "Not evaluated. No figure about this conversion's outputs has been measured."
    parts = []
    verdict = visible(verdict_text(evaluation))
    if verdict:
        parts.append(f"**{escape_markdown(verdict)}**")
    for build in (summary_table, distribution_table, draft_table):
        table = build(evaluation)
        if table is not None:
            parts.append(_report_table(table))
    tokens = evaluation.tokens
    if tokens is not None:
        parts.append(
            f"Measured on {count(tokens)} scored tokens against the source, by {PROJECT}'s own "
            f"forward pass (activations: {escape_markdown(evaluation.activations)}); a divergence "
            "means something only where it is above the noise floor."
        )
    return "\n\n".join(parts)


def _done(manifest: Mapping[str, Any], records: Sequence[TensorRecord]) -> str:
    kinds = Counter("copied" if r.disposition == "copied" else r.exact for r in records)
    losses = [r.relative_rms for r in records if not r.exact]
    altered = sum(r.altered for r in records)
    recipe = recipe_toml(section(manifest, "recipe"))
    lines = [f"The recipe in full, as in `{RECIPE_NAME}`:\n\n```toml\n{recipe}\n```"]
    exact = (
        f"Of {len(records):,} modules {kinds['copied']:,} are byte for byte the source's, "
        f"{kinds[True]:,} are recoded and hold exactly the source's values, and {kinds[False]:,} "
        "do not hold them exactly."
    )
    if altered:
        exact += f" Casts changed {altered:,} values, each to the nearest that the format holds."
    if losses:
        exact += (
            f" The error of the inexact ones, relative root mean square against the source's "
            f"weights: {sum(losses) / len(losses):.4f} on average, {max(losses):.4f} at worst."
        )
    lines.append(exact)
    if adapter := section(manifest, "adapter"):
        name = text(adapter, "repo") or text(adapter, "name")
        lines.append(
            f"The LoRA adapter {code_span(name)} was merged into "
            f"{len(section(adapter, 'norms')):,} matrices while they were read; errors are against "
            "the merged weights."
        )
    if digest := manifest.get("stats"):
        solved = section(manifest, "recipe").get("solver") == "gptq"
        how = (
            "The codes were solved with error feedback while sample text passed through the model "
            "(digest of the solution: "
            if solved
            else "The search weighed errors by statistics of the experts' inputs (SHA-256 of the "
            "statistics: "
        )
        lines.append(f"{how}{code_span(str(digest)[:64])}).")
    return "\n\n".join(lines)


def _limits(
    manifest: Mapping[str, Any],
    records: Sequence[TensorRecord],
    request: CardRequest,
) -> str:
    limits = []
    if request.evaluation is None:
        limits.append("Quality was not measured.")
    elif (tokens := request.evaluation.tokens) is not None:
        limits.append(
            f"Quality was measured on {count(tokens)} tokens of text; no task benchmark was run."
        )
    dropped = manifest.get("dropped") or []
    if dropped:
        reasons = Counter(str(d.get("reason")) for d in dropped)
        told = "; ".join(f"{escape_markdown(r)} ({n:,})" for r, n in sorted(reasons.items()))
        limits.append(f"{len(dropped):,} tensors of the source are left out: {told}.")
    if any(not r.exact for r in records):
        limits.append("Weights are not bit-exact; see the errors above and in `v4quant.json`.")
    names = {f["name"] for f in manifest["files"]}
    if any(n.startswith("encoding/") for n in names):
        limits.append(
            "The release has no Jinja chat template; `encoding/` is its chat format, byte for byte."
        )
    limits.append("Code of the source repository (`inference/`) is not included.")
    limits.append(
        "No engine was run on these files; the ones named are those whose rules the headers fit "
        f"(`{PROJECT} verify published --engine NAME`)."
    )
    return "\n".join(f"- {limit}" for limit in limits)


def _memory(manifest: Mapping[str, Any], request: CardRequest) -> str:
    gguf, classes = format_of(manifest) == "gguf", manifest.get("classes") or []
    return memory_table(request.engines, classes, gguf, size_text, markdown_table)


def _serving(manifest: Mapping[str, Any], request: CardRequest) -> list[str]:
    """A paragraph an engine: command and chat."""
    names = {str(row["name"]) for row in manifest["files"]}
    release: Release = "v41" if text(section(manifest, "source"), "release") == "V4.1" else "v4"
    place = f"{request.repo}:{request.folder}" if request.folder else request.repo
    templated = "chat_template.jinja" in names
    return serving_lines(
        request.engines, layout_of(manifest), scheme_of(manifest), place, release, templated
    )


def _check(manifest: Mapping[str, Any], request: CardRequest) -> str:
    """How to check the published files, apart from making them again."""
    source = source_argument(manifest)
    place = f"hf://{request.repo}" + (f":{request.folder}" if request.folder else "")
    return (
        "To compare every published value with the source instead:\n\n"
        f"```sh\nv4quant verify {place} --source {source}"
        f"{adapter_option(manifest)}\n```"
    )


def _base(manifest: Mapping[str, Any], request: CardRequest) -> str:
    base = text(section(manifest, "source"), "repo") or request.base_model
    return base if re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", base, re.ASCII) else ""


def _license(manifest: Mapping[str, Any], request: CardRequest) -> str:
    license = text(section(manifest, "source"), "license") or request.license
    return license if re.fullmatch(r"[a-z0-9.-]{1,40}", license) else ""


def _report_table(table: Table) -> str:
    rows = [tuple(map(escape_markdown, row)) for row in table.rows]
    notes = "".join(f"\n\n{escape_markdown(note)}" for note in table.notes)
    columns = tuple(map(escape_markdown, table.columns))
    return f"{escape_markdown(table.title)}:\n\n{markdown_table(columns, rows)}{notes}"
