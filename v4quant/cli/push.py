"""`v4quant push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import v4quant
from v4quant.cli import _output
from v4quant.cli._types import SOURCE
from v4quant.hub.refs import SCHEME
from v4quant.sizes import human_bytes

if TYPE_CHECKING:
    from v4quant import PlannedPush


@click.command(epilog="Example: v4quant push out me/DeepSeek-V4-Flash-INT4 --dry-run")
@click.argument("out", type=SOURCE)
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
@click.option("--dry-run", is_flag=True, help="Show files, commits and card offline.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def push(
    out: str,
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

    REPO_ID:QUANT puts a GGUF quant beside others, in a folder of its own; nothing else of the
    repository is touched.

    OUT is verified first. Shards are sent before config, index and card, so that nobody finds half
    a checkpoint; files that are there already are not sent again; at the end the repository's
    digests are compared with the manifest.
    """
    if dry_run:
        planned = v4quant.plan_push(
            out, repo_id, evaluation=evaluation, base_model=base_model, license=license_
        )
        _show(planned, as_json)
        return
    result = v4quant.push(
        out,
        repo_id,
        evaluation=evaluation,
        base_model=base_model,
        license=license_,
        public=public,
        replace=replace_,
        progress=_output.TerminalProgress(),
    )
    if as_json:
        _output.emit(result)
        return
    rows = [
        ("repository", f"{SCHEME}{result.repo} ({'private' if result.private else 'public'})"),
        ("files", f"{result.files}, {human_bytes(result.nbytes)}; digests compared"),
        ("sent", f"{human_bytes(result.sent_bytes)} in {result.commits} commits"),
    ]
    _output.data(_output.table(rows))


def _show(planned: PlannedPush, as_json: bool) -> None:
    if as_json:
        _output.emit(planned.as_dict())
        return
    rows = [(p.name, human_bytes(p.size), p.sha256[:12]) for p in planned.files]
    _output.data(_output.table(rows, ("file", "bytes", "sha256")))
    _output.data("")
    steps = [(c.title, str(len(c.files)), human_bytes(c.nbytes)) for c in planned.commits]
    _output.data(_output.table(steps, ("commit", "files", "bytes")))
    total = human_bytes(sum(p.size for p in planned.files))
    _output.data(f"\n{total} to {SCHEME}{planned.repo}; what is there already is not sent again.")
    _output.data(f"\n{planned.card}")
