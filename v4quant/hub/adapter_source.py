"""A LoRA adapter of a repository on the hub: its two files, brought to this disk and checked.

An adapter is small beside its model, and read again for every matrix, so it is fetched whole. It
stays in a temporary folder until the process ends; what the hub's own cache holds of the commit is
read where it lies when HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

from pathlib import Path

from v4quant.hub.client import is_offline
from v4quant.hub.download import download
from v4quant.hub.errors import HubError, HubOffline
from v4quant.hub.refs import HubRef, HubReferenceError
from v4quant.hub.remote import open_remote, require
from v4quant_formats.adapter import WEIGHTS_NAME
from v4quant_formats.adapter.settings import CONFIG_NAME
from v4quant_formats.json_object import MAX_CONFIG_BYTES
from v4quant_formats.shard_files import Origin


def fetch_adapter(ref: HubRef, into: Path) -> tuple[Path, Origin]:
    """The folder, below `into` or in the hub's cache, that holds a repository's adapter, and the
    commit it is of.

    It is called as the repository is, whatever `into` is called. Raises HubError and its kinds,
    SourceChanged or OutputError.
    """
    if ref.quant:
        raise HubReferenceError(f"{ref}: an adapter has no quants; write hf://{ref.repo}")
    if is_offline():
        return _cached(ref)
    remote, folder = open_remote(ref), into / ref.name
    files = [require(remote, name) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    if files[0].size > MAX_CONFIG_BYTES:
        raise HubError(
            f"{remote}: {CONFIG_NAME} has {files[0].size:,} bytes; no adapter needs that"
        )
    for file in files:
        download(remote, file, folder / file.name)
    return folder, Origin(ref.repo, remote.commit)


def _cached(ref: HubRef) -> tuple[Path, Origin]:
    """The commit's folder in the local hub cache, which is called as it. Raises HubOffline."""
    from huggingface_hub import try_to_load_from_cache

    revision = ref.revision or "main"
    found = [
        try_to_load_from_cache(ref.repo, name, revision=revision)
        for name in (CONFIG_NAME, WEIGHTS_NAME)
    ]
    if not all(isinstance(place, str) for place in found):
        raise HubOffline(
            f"{ref}: HF_HUB_OFFLINE is set and the local cache does not hold this adapter; unset "
            "it, or download the repository first"
        )
    folder = Path(str(found[0])).parent
    return folder, Origin(ref.repo, folder.name)
