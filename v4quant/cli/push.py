"""`v4quant push`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from v4quant.checks.verify import verify
from v4quant.cli import _output
from v4quant.hub.client import HubError
from v4quant.hub.refs import SCHEME, parse_hub
from v4quant.publishing.card import CardRequest, license_of, render_card
from v4quant.publishing.publisher import CommitPlan, Parcel, card_parcel, parcels_of, plan_commits
from v4quant.publishing.publisher import push as push_files
from v4quant.publishing.serving import accepted_engines
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.manifest import read_manifest
from v4quant_formats.opening import open_checkpoint

_MAX_EVALUATION_BYTES = 2**26


@click.command(epilog="Example: v4quant push out me/DeepSeek-V4-Flash-INT4 --dry-run")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option(
    "--evaluation",
    type=click.Path(path_type=Path),
    help="JSON of `evaluate` for the card (default: evaluation.json beside OUT, if there is one).",
)
@click.option("--base-model", default="", help="Source repository, where the manifest has none.")
@click.option("--license", "license_", default="", help="License name, where the source has none.")
@click.option("--public", is_flag=True, help="Create the repository public (default: private).")
@click.option("--replace", "replace_", is_flag=True, help="Replace another checkpoint there.")
@click.option("--dry-run", is_flag=True, help="Show files, commits and card; ask no hub.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def push(
    out: Path,
    repo_id: str,
    evaluation: Path | None,
    base_model: str,
    license_: str,
    public: bool,
    replace_: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish converted checkpoint OUT as REPO_ID. The same command again resumes.

    OUT is verified first. Shards are sent before config, index and card, so that nobody finds half
    a checkpoint; files that are there already are not sent again; at the end the repository's
    digests are compared with the manifest.
    """
    repo = parse_hub(f"{SCHEME}{repo_id.removeprefix(SCHEME)}").repo
    manifest = read_manifest(out)
    request = CardRequest(repo, _evaluation(out, evaluation), base_model, license_)
    parcels = parcels_of(out, manifest)
    card = render_card(manifest, _completed(request, out))
    parcels.append(card_parcel(card))
    if dry_run:
        _show(repo, parcels, plan_commits(parcels, update=False, stale=()), card, as_json)
        return
    progress = _output.TerminalProgress()
    findings = verify(out, None, progress).findings
    if findings:
        raise HubError(
            f"{out}: does not pass `v4quant verify`, so nothing was sent: {findings[0].where}: "
            f"{findings[0].problem}"
        )
    progress.start("Publishing", sum(p.size for p in parcels), "B")
    try:
        result = push_files(repo, parcels, not public, replace_, progress.advance)
    finally:
        progress.finish()
    if as_json:
        _output.emit(result)
        return
    rows = [
        ("repository", f"{SCHEME}{result.repo} ({'private' if result.private else 'public'})"),
        ("files", f"{result.files}, {_output.human_bytes(result.nbytes)}; digests compared"),
        ("sent", f"{_output.human_bytes(result.sent_bytes)} in {result.commits} commits"),
    ]
    _output.data(_output.table(rows))


def _evaluation(out: Path, file: Path | None) -> dict[str, Any] | None:
    path = file or out.resolve().parent / "evaluation.json"
    if file is None and not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_EVALUATION_BYTES:
            raise HubError(f"{path}: is too large for an evaluation")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise HubError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise HubError(f"{path}: is not an evaluation")
    return found


def _completed(request: CardRequest, out: Path) -> CardRequest:
    """With the engines that load OUT, and the licence its own file tells."""
    if (out / INDEX_NAME).exists():
        with open_checkpoint(out) as checkpoint:
            request = replace(request, engines=accepted_engines(checkpoint))
    file = out / "LICENSE"
    if request.license or not file.is_file():
        return request
    return replace(request, license=license_of(file.read_text("utf-8", "replace")))


def _show(
    repo: str, parcels: list[Parcel], commits: list[CommitPlan], card: str, as_json: bool
) -> None:
    if as_json:
        _output.emit({
            "repo": repo,
            "files": [{"name": p.name, "bytes": p.size, "sha256": p.sha256} for p in parcels],
            "commits": [
                {"title": c.title, "bytes": c.nbytes, "files": [p.name for p in c.parcels]}
                for c in commits
            ],
            "card": card,
        })  # fmt: skip
        return
    rows = [(p.name, _output.human_bytes(p.size), p.sha256[:12]) for p in parcels]
    _output.data(_output.table(rows, ("file", "bytes", "sha256")))
    _output.data("")
    steps = [(c.title, str(len(c.parcels)), _output.human_bytes(c.nbytes)) for c in commits]
    _output.data(_output.table(steps, ("commit", "files", "bytes")))
    total = _output.human_bytes(sum(p.size for p in parcels))
    _output.data(f"\n{total} to {SCHEME}{repo}; what is there already is not sent again.")
    _output.data(f"\n{card}")
