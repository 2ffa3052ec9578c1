"""push: a converted checkpoint as a repository."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from v4quant.api.arguments import PathLike, SourceLike, path_of, source_of
from v4quant.checks.verify import verify
from v4quant.evaluation.figures import Figures, ResultError, figures_from_dict
from v4quant.hub.errors import HubError
from v4quant.hub.refs import SCHEME, HubRef, parse_hub
from v4quant.progress import default_progress
from v4quant.publishing.card import CardRequest, card_files, license_of, shard_bytes
from v4quant.publishing.card_ladder import Sibling
from v4quant.publishing.publisher import (
    CommitPlan,
    PushResult,
    RepoFile,
    beside_others,
    plan_commits,
    repo_files,
)
from v4quant.publishing.publisher import push as push_files
from v4quant.publishing.serving import accepted_engines
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.errors import FormatError
from v4quant_formats.gguf.quants import home_of
from v4quant_formats.manifest import read_manifest
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.sidecars import MAX_SIDECAR_BYTES
from v4quant_formats.small_files import read_small
from v4quant_formats.system import real_path
from v4quant_kernels.progress import Progress

_MAX_EVALUATION_BYTES = 2**26


@dataclass(frozen=True)
class PlannedPush:
    """What a push would send: files, the commits they go in, and the card's text.

    folder: where in the repository, "" for its top.
    """

    repo: str
    files: tuple[RepoFile, ...]
    commits: tuple[CommitPlan, ...]
    card: str
    folder: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What `--dry-run --json` prints."""
        return {
            "repo": self.repo,
            "files": [{"name": p.name, "bytes": p.size, "sha256": p.sha256} for p in self.files],
            "commits": [
                {"title": c.title, "bytes": c.nbytes, "files": [p.name for p in c.files]}
                for c in self.commits
            ],
            "card": self.card,
        }


def plan_push(
    out: SourceLike,
    repo: str,
    *,
    evaluation: PathLike | None = None,
    base_model: str = "",
    license: str = "",
) -> PlannedPush:
    """What `push` would send; asks no hub. Raises ManifestError and HubError."""
    place = _folder_of(out)
    folder = home_of(place)
    ref = parse_hub(f"{SCHEME}{repo.removeprefix(SCHEME)}")
    name, manifest = ref.repo, read_manifest(folder)
    _check_place(ref, manifest)
    request = CardRequest(name, None, base_model, license, folder=ref.quant)
    measured = _evaluation(folder, path_of(evaluation))
    request = _completed(_with_figures(request, manifest, measured), folder)
    beside = card_files(manifest, request)
    files, card = [*repo_files(folder, manifest), *beside], _text(beside[0])
    if ref.quant:
        files = beside_others(files, ref.quant)
    commits = plan_commits(files, update=False, stale=())
    return PlannedPush(name, tuple(files), tuple(commits), card, ref.quant)


def _folder_of(out: SourceLike) -> Path:
    """A folder, or one of its GGUF quants. Raises HubError for what is published already."""
    place = source_of(out)
    if isinstance(place, HubRef):
        raise HubError(f"{place}: is published already; push takes a folder of this disk")
    return place


def _check_place(ref: HubRef, manifest: dict[str, Any]) -> None:
    """Raise HubError for a place nothing, or not this checkpoint, is published at."""
    if ref.revision:
        raise HubError(f"{ref}: checkpoints are published on main; leave '@{ref.revision}' out")
    if not ref.quant:
        return
    names = [str(row["name"]) for row in manifest["files"]]
    if not any(name.endswith(".gguf") for name in names):
        raise HubError(f"{ref}: only GGUF quants lie beside others; leave ':{ref.quant}' out")
    if "/" in ref.quant or ref.quant.endswith(".gguf"):
        raise HubError(f"{ref}: what stands behind ':' names one folder, like Q4_K_M")


def push(
    out: SourceLike,
    repo: str,
    *,
    evaluation: PathLike | None = None,
    base_model: str = "",
    license: str = "",
    public: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> PushResult:
    """Publish converted checkpoint `out` as repository `repo`. The same call again resumes.

    out: a folder, or `FOLDER:QUANT`. repo: "owner/name", or "owner/name:QUANT" to put a GGUF quant
    beside others, in a folder of its own: nothing else of the repository is touched.
    evaluation: JSON of `evaluate` for the card (default: evaluation.json beside `out`). base_model,
    license: where the manifest and the source have none. public: how a new repository is created.
    replace: replace another checkpoint that is there. `out` is verified before anything is sent.

    Raises HubError when it does not verify or the hub refuses, ManifestError without a manifest.
    """
    plan = plan_push(out, repo, evaluation=evaluation, base_model=base_model, license=license)
    shown = default_progress(progress)
    findings = verify(_folder_of(out), None, shown).findings
    if findings:
        raise HubError(
            f"{out}: does not pass `v4quant verify`, so nothing was sent: {findings[0].where}: "
            f"{findings[0].problem}"
        )
    shown.start("Publishing", sum(p.size for p in plan.files), "B")
    try:
        return push_files(
            plan.repo, list(plan.files), not public, replace, shown.advance, plan.folder
        )
    finally:
        shown.finish()


def _text(file: RepoFile) -> str:
    assert isinstance(file.content, bytes), "a card is made, not read"
    return file.content.decode()


def _with_figures(
    request: CardRequest, manifest: dict[str, Any], measured: Figures | None
) -> CardRequest:
    """With the figures of this checkpoint, and what was measured beside it as its siblings."""
    if measured is None:
        return request
    real = shard_bytes(manifest)
    own = next((one for one in measured.everyone if one.candidate.bytes == real), measured)
    siblings = tuple(
        Sibling(
            request.repo if one == own else "", one.candidate.scheme,
            int(one.candidate.bytes or 0), one.kl_mean or 0.0, one.top1_agreement or 0.0,
            one.verdict.grade,
        )
        for one in measured.everyone
    )  # fmt: skip
    return replace(request, evaluation=replace(own, others=()), siblings=siblings)


def _evaluation(out: Path, file: Path | None) -> Figures | None:
    path = file or real_path(out).parent / "evaluation.json"
    if file is None and not path.is_file():
        return None
    try:
        found = json.loads(read_small(path, _MAX_EVALUATION_BYTES))
    except FormatError as error:
        raise HubError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise HubError(f"{path}: cannot be read as JSON ({error})") from None
    try:
        return figures_from_dict(found)
    except ResultError as error:
        raise HubError(f"{path}: is not an evaluation: {error}") from None


def _completed(request: CardRequest, out: Path) -> CardRequest:
    """With the engines that load `out`, and the licence its own file tells."""
    if (out / INDEX_NAME).exists():
        with open_checkpoint(out) as checkpoint:
            request = replace(request, engines=accepted_engines(checkpoint))
    file = out / "LICENSE"
    if request.license or not file.is_file():
        return request
    told = read_small(file, MAX_SIDECAR_BYTES).decode(errors="replace")
    return replace(request, license=license_of(told))
