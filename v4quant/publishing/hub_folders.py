"""A conversion with the hub on one side or on both: its folders, and who may take how much disk.

What is fetched lies in `.v4quant/source` of the output folder and goes when the journal goes. A
conversion to the hub has a work folder in place of an output folder; what was published is deleted
there, and the folder too if the conversion made it.
One cap covers both sides: source shards fetched ahead and output shards not yet sent, each with a
share of its own, so that neither can starve the other. Ranks on one machine divide the cap; each
fetches into a folder of its own, rank 0 as a single process would, the others below it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from v4quant.conversion.journal import SOURCE_FOLDER, journal_files
from v4quant.conversion.output_folder import check_folder
from v4quant.conversion.plan import Plan
from v4quant.conversion.ranks import Ranks
from v4quant.hub.refs import HubRef, HubReferenceError
from v4quant.hub.shard_cache import DiskCapError, ShardCache
from v4quant.hub.source import forget_fetched, open_hub
from v4quant.own_folders import is_made_home, own_folder, remove_if_empty
from v4quant.publishing.card import CardRequest, card_files
from v4quant.publishing.hub_delivery import HubDelivery, RankDelivery
from v4quant.publishing.publisher import CommitPlan, Publisher
from v4quant.publishing.serving import accepted_engines
from v4quant.source import Source, open_source
from v4quant.temporary_folders import TemporaryFolder
from v4quant_formats.checkpoint import INDEX_NAME, Checkpoint
from v4quant_formats.errors import OutputError
from v4quant_formats.manifest import MANIFEST_NAME, read_manifest
from v4quant_formats.system import real_path

_AT_ONCE = 3  # shards a side: one worked on, one arriving or leaving, one waiting
_AHEAD = 50 * 10**9  # of whole GGUF files, two more would be a disk of their own

Destination = Path | HubRef
Kind = TypeVar("Kind", Path, HubRef)


@dataclass(frozen=True)
class WorkFolders:
    """Where a conversion works.

    scratch: for source shards, None for a temporary folder. made: whether `out` is a work folder
    that was not there before, so that it goes when all of it is published.
    """

    out: Path
    scratch: Path | None
    repo: str | None
    made: bool = False

    def leave(self) -> None:
        """Everything is published: remove the work folder if it was made for that."""
        if self.made:
            remove_if_empty(self.out)


def find_folders(
    source: Source, out: Destination, scratch: Path | None, rank: int = 0
) -> WorkFolders:
    """Decide the folders and check the output folder before anything is fetched into it.

    Rank 0 first, then the others. Raises OutputError or HubReferenceError.
    """
    remote = isinstance(source, HubRef)
    if isinstance(out, HubRef):
        if out.revision or out.quant:
            raise HubReferenceError(
                f"{out}: conversions are published on main, as their recipe calls them; leave out "
                "what stands behind the repository's name"
            )
        folder = scratch or Path(f"v4quant-{out.repo.replace('/', '--')}")
        check_folder(folder)
        fetched = _rank_folder(own_folder(folder, SOURCE_FOLDER), rank) if remote else None
        return WorkFolders(folder, fetched, out.repo, is_made_home(folder))
    finished = (out / MANIFEST_NAME).exists() and not journal_files(out)
    if not remote or finished:
        return WorkFolders(out, None, None)
    if scratch is None:
        check_folder(out)
        scratch = own_folder(out, SOURCE_FOLDER)
    elif real_path(scratch).is_relative_to(real_path(out)):
        raise OutputError(
            f"--scratch {scratch} lies in {out}, where only the result may be; name a folder "
            "outside it, or leave --scratch out"
        )
    return WorkFolders(out, _rank_folder(scratch, rank), None)


def _rank_folder(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}" if rank else folder


def open_shared(
    source: Source,
    scratch: Path | None,
    cap: int | None,
    adapter: Source | None,
    tokenizer: Path | None,
    ranks: Ranks,
) -> Checkpoint:
    """Open the source on every rank, a repository at the commit that rank 0 found.

    What earlier runs with more ranks left on this disk is removed. Raises what `open_source` does.
    """
    if not isinstance(source, HubRef):
        return open_source(source, adapter=adapter, tokenizer=tokenizer)
    cap = None if cap is None else cap // ranks.on_machine
    if not ranks.is_first:
        source = replace(source, revision=ranks.agree("commit", None))
        return open_source(source, scratch, cap, adapter=adapter, tokenizer=tokenizer)
    opened = open_source(source, scratch, cap, adapter=adapter, tokenizer=tokenizer)
    if scratch is not None:
        for folder in scratch.glob("rank-*"):
            told = folder.name.removeprefix("rank-")
            if told.isdecimal() and int(told) >= ranks.size:
                forget_fetched(folder)
    assert opened.origin is not None, "what comes from a repository knows its commit"
    ranks.agree("commit", opened.origin.revision)
    return opened


def keep_source(checkpoint: Checkpoint, beside: int) -> int:
    """Let all shards of a repository stay on this disk, if it holds them and `beside` bytes more.

    How many bytes these are; 0 where they cannot stay, or come from no repository.
    """
    cache = checkpoint.shards
    if not isinstance(cache, ShardCache):
        return 0
    total = sum(state.size for state in checkpoint.files.values())
    if _room(cache.folder) < total + beside:
        return 0
    cache.cap, cache.stays = max(cache.cap, total), True
    return total


def share_cap(
    plan: Plan, cap: int | None, work: Path | None, sharers: int = 1, keep: int = 0
) -> int:
    """Divide the cap; set the source's share, return the output's. Raises DiskCapError.

    work: the folder of output shards on their way to the hub, None for a conversion that stays.
    sharers: processes, or conversions, that share this disk at one time; what is divided is one's
    part. keep: what `keep_source` said, where there is no cap. Without a cap it is three
    shards a side, of large files what they take and 50 GB, or what the disk has and an earlier run
    left here.
    """
    target = work is not None
    cache = plan.checkpoint.shards
    sizes = {name: state.size for name, state in plan.checkpoint.files.items()}
    remote = isinstance(cache, ShardCache)
    source = max(sum(sizes[f] for f in s.source_files) for s in plan.shards) if remote else 0
    output = max(s.nbytes for s in plan.shards) if target else 0
    each = f"for each of the {sharers} that share the disk, " if sharers > 1 else ""
    if cap is None:
        cap = sum(min(_AT_ONCE * part, part + _AHEAD) for part in (source, output))
        room = [
            _room(p) // sharers
            for p in (work, cache.folder if isinstance(cache, ShardCache) else None)
            if p
        ]
        cap = min([cap, *room])
        if cap < source + output:
            raise DiskCapError(
                f"{each}one source shard and one output shard need {source + output:,} bytes, and "
                f"this disk has {cap:,} for them; free some, or give a --scratch folder on another "
                "disk"
            )
    else:
        cap //= sharers
    if cap < source + output:
        raise DiskCapError(
            f"--disk-cap {cap * sharers:,} bytes is too little: {each}one source shard and one "
            f"output shard need {source + output:,}"
        )
    mine = cap * source // (source + output) if remote else 0
    mine = min(max(mine, source), cap - output)
    if isinstance(cache, ShardCache):
        cache.cap = max(mine, keep)
    return cap - mine


def _room(folder: Path) -> int:
    """Bytes of disk for a folder of shards: what is free, and what such a folder already takes."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    taken = sum(p.lstat().st_size for p in folder.iterdir()) if folder.is_dir() else 0
    return shutil.disk_usage(there).free + taken


def update_card(repo: str, request: CardRequest) -> None:
    """Render the card of a published checkpoint anew, from its own manifest. Raises HubError."""
    publisher = Publisher(repo)
    with TemporaryFolder() as folder:
        publisher.read_small(MANIFEST_NAME, folder / MANIFEST_NAME)
        manifest = read_manifest(folder)
    if any(f["name"] == INDEX_NAME for f in manifest["files"]):
        with open_hub(HubRef(repo), headers_only=True) as published:
            request = replace(request, engines=accepted_engines(published))
    files = card_files(manifest, request)
    publisher.commit(CommitPlan("Card with the evaluation", tuple(files)))


def open_delivery(
    repo: str,
    out: Path,
    plan: Plan,
    cap: int,
    private: bool,
    request: CardRequest,
    ranks: Ranks | None = None,
) -> HubDelivery | RankDelivery:
    """Check the repository and begin to deliver to it; rank 0 first. Raises HubError and its kinds.

    cap: this rank's.
    """
    board = ranks.board if ranks is not None else None
    if ranks is not None and board is not None and not ranks.is_first:
        return RankDelivery(repo, out, cap, board)
    target = HubDelivery(repo, out, cap, request, private, board)
    try:
        target.refuse_other(plan)
    except BaseException:
        target.stop()
        raise
    return target
