"""A repository at one commit: its files with sizes and digests, and any byte range of them.

The revision is resolved to a commit once; everything afterwards names the commit, so a branch that
moves cannot mix two versions. Names in the listing are hostile until shown to be plain relative
paths. Bytes come by HTTP ranges: a read goes on where a broken connection left it, and a redirect
to another host is followed without the token.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin, urlsplit

from v4quant.hub.client import client, persistently
from v4quant.hub.errors import HubError, HubNotFound, PassingFailure
from v4quant.hub.failures import broken, refusal
from v4quant.hub.lines import read_body
from v4quant.hub.patience import SHORTEST_TRY, VARIABLE, Patience, patience_seconds
from v4quant.hub.refs import HubRef
from v4quant.hub.session import origin
from v4quant.hub.stopping import is_stopped
from v4quant_formats.errors import SourceChanged, UnsafePath

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_FILES = 100_000
MAX_FILE_BYTES = 2**44
_MAX_REDIRECTS = 5
_READINGS, _WIDER = 6, 64
_MAX_PAGES = 1000


@dataclass(frozen=True)
class RemoteFile:
    """One file of the commit. `sha256` for files in large storage, else git's `blob` name."""

    name: str
    size: int
    sha256: str = ""
    blob: str = ""


class Remote:
    """A repository pinned to a commit."""

    def __init__(
        self,
        api: HfApi,
        repo: str,
        commit: str,
        files: Mapping[str, RemoteFile],
        license: str = "",
    ) -> None:
        """Made by `open_remote`. license: what the repository's card says."""
        self.repo, self.commit, self.files, self.license = repo, commit, files, license
        self._api = api
        self._locations: dict[str, str] = {}
        self._paths: Mapping[str, str] = {}

    def picked(self, paths: Sequence[str]) -> Remote:
        """The same commit with these files, under their names without folders, and what else lies
        in their folder, where that is one.

        Raises HubError for two of one name.
        """
        by_name = {PurePosixPath(path).name: path for path in paths}
        if len(by_name) != len(paths):
            raise HubError(f"{self}: two of the chosen files have one name; give one of them")
        homes = {PurePosixPath(path).parent for path in paths}
        if len(homes) == 1:
            home = homes.pop()
            for path in map(PurePosixPath, self.files):
                if path.is_relative_to(home):
                    by_name.setdefault(str(path.relative_to(home)), str(path))
        files = {n: replace(self.files[path], name=n) for n, path in by_name.items()}
        found = Remote(self._api, self.repo, self.commit, files, self.license)
        found._paths = by_name
        return found

    def path_of(self, name: str) -> str:
        """A file's path in the repository."""
        return self._paths.get(name, name)

    def __str__(self) -> str:
        return f"hf://{self.repo}@{self.commit[:12]}"

    def read(self, name: str, start: int, count: int) -> bytes:
        """`count` bytes from `start` on, fewer at the file's end.

        No digest covers a range, so where the line itself guards nothing (plain HTTP) it is read
        until two answers agree. Raises HubError, or SourceChanged when they never do.
        """
        stop = min(start + count, self.files[name].size)
        data = self._whole(name, start, stop)
        if self._api.endpoint.startswith("https:"):
            return data
        for reading in range(1, _READINGS):
            # A wider range: what stands between may have kept the last answer, or break one place.
            more = reading * _WIDER
            first, last = max(0, start - more), min(stop + more, self.files[name].size)
            wider = self._whole(name, first, last)
            again = wider[start - first : stop - first]
            if again == data:
                return data
            data = again
        raise SourceChanged(
            f"{self}: {name}: bytes {start:,} to {stop:,} are others at every reading; check the "
            "line, then run the same command again"
        )

    def _whole(self, name: str, start: int, stop: int) -> bytes:
        data = bytearray()
        for piece in self.stream(name, start, stop):
            data += piece
        return bytes(data)

    def stream(
        self,
        name: str,
        start: int,
        stop: int,
        stopped: Callable[[], bool] = is_stopped,
        room: Callable[[], memoryview | None] = lambda: None,
    ) -> Iterator[bytes | memoryview]:
        """Bytes `start:stop` of a file in pieces, whatever breaks on the way.

        A piece is valid until the next one is asked for. room: memory for the next bytes, which may
        be put into it; it is asked again when they have been taken. Raises HubError.
        """
        import httpx2

        at = start
        patience = Patience(f"{self}: reading {name}", stopped, stop - start)
        while at < stop:
            if stopped():
                raise HubError(f"{self}: reading {name}: stopped")
            pieces = self._request(name, at, stop, room)
            try:
                while True:
                    with patience.governs():
                        piece = next(pieces, None)
                    if piece is None:
                        break
                    at += len(piece)
                    patience.gained(len(piece))
                    with patience.stands_still():
                        yield piece
                failure = PassingFailure(f"the answer ended at byte {at:,} of {stop:,}")
            except PassingFailure as error:
                failure = error
            except httpx2.TransportError as error:
                failure = broken(f"{self}: reading {name}", error)
            if at < stop:
                patience.wait(failure)

    def _request(
        self, name: str, start: int, stop: int, room: Callable[[], memoryview | None]
    ) -> Iterator[bytes | memoryview]:
        """One request, redirects followed; may yield less than asked, never more."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers

        home = f"{self._api.endpoint}/{self.repo}/resolve/{self.commit}/{quote(self.path_of(name))}"
        url = self._locations.get(name, home)
        for _ in range(_MAX_REDIRECTS):
            headers = build_hf_headers(token=self._api.token, library_name="v4quant")
            if origin(url) != origin(home):
                headers = {"user-agent": headers.get("user-agent", "v4quant")}
            headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=False, timeout=timeout
            ) as response:
                if response.is_redirect:
                    url = self._redirected(name, url, response.headers.get("Location", ""))
                    continue
                self._check(name, url != home, response)
                self._locations[name] = url
                yield from self._body(name, response, start, stop, room)
                return
        raise HubError(f"{self}: {name}: more than {_MAX_REDIRECTS} redirects")

    def _redirected(self, name: str, url: str, location: str) -> str:
        try:
            target = urljoin(url, location)
        except ValueError:
            target = location
        allowed = {"https"} if urlsplit(url).scheme == "https" else {"http", "https"}
        scheme, host, _ = origin(target)
        plain = target.isascii() and target.isprintable()
        if not plain or not host or scheme not in allowed:
            raise HubError(f"{self}: {name}: is redirected to something that is not https; refused")
        return target

    def _check(self, name: str, elsewhere: bool, response: Any) -> None:
        if response.status_code in (200, 206):
            return
        # A signed link that ran out; the next try asks for a new one.
        if self._locations.pop(name, None) is not None and elsewhere:
            raise PassingFailure(f"HTTP {response.status_code} from a link given earlier")
        if response.status_code == 416:
            raise SourceChanged(f"{self}: {name}: is shorter than the repository announces")
        raise refusal(f"{self}: reading {name}", response.status_code, "")

    def _body(
        self,
        name: str,
        response: Any,
        start: int,
        stop: int,
        room: Callable[[], memoryview | None],
    ) -> Iterator[bytes | memoryview]:
        skip = start if response.status_code == 200 else 0  # a server that knows no ranges
        if response.status_code == 206:
            told = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "")
            )
            if told is None or int(told[1]) != start:
                raise PassingFailure("the answer holds a different range than requested")
            if told[2] not in ("*", str(self.files[name].size)):
                raise SourceChanged(
                    f"{self}: {name}: has {told[2]} bytes, but the repository announces "
                    f"{self.files[name].size:,}"
                )
        left = stop - start
        for chunk in read_body(response, room):
            if not left:  # ending here only when there is more keeps the connection for the next
                return
            piece = chunk[skip:] if skip else chunk
            skip = max(0, skip - len(chunk))
            if piece := piece[:left]:
                left -= len(piece)
                yield piece


def open_remote(ref: HubRef, commit: str | None = None) -> Remote:
    """Pin a repository to a commit (the one given, or what the revision means now) and list it.

    Raises HubAccessError, HubNotFound, HubOffline or UnsafePath.
    """
    api = client()
    revision = commit or ref.revision
    info = persistently(f"{ref}", lambda: api.model_info(ref.repo, revision=revision))
    if not re.fullmatch(r"[0-9a-f]{40,64}", str(info.sha)) or commit not in (None, info.sha):
        raise HubError(f"{ref}: the hub names no commit for this revision")
    told = getattr(info.card_data, "license", None)
    license = told if isinstance(told, str) and re.fullmatch(r"[a-z0-9.-]{1,40}", told) else ""
    files = list_files(api, ref.repo, str(info.sha))
    return Remote(api, ref.repo, str(info.sha), files, license)


def list_files(api: HfApi, repo: str, revision: str) -> dict[str, RemoteFile]:
    """All files of a revision by name, checked. Raises HubError or UnsafePath."""
    pages = _pages(api, repo, revision)
    files = [file for file in map(_listed, chain.from_iterable(pages)) if file]
    for file in files:
        check_name(repo, file.name)
        whole = isinstance(file.size, int) and 0 <= file.size <= MAX_FILE_BYTES
        if not whole or (file.sha256 and not re.fullmatch(r"[0-9a-f]{64}", file.sha256)):
            raise HubError(f"hf://{repo}: {file.name}: has an impossible size or digest")
    return {f.name: f for f in files}


def _pages(api: HfApi, repo: str, revision: str) -> list[list[dict[str, Any]]]:
    """The pages of a listing, within the time that one answer may take.

    Raises HubError when they have no end.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    home = f"{api.endpoint}/api/models/{repo}/tree/{quote(revision, safe='')}?recursive=true"
    url: str = home
    pages: list[list[dict[str, Any]]] = []

    def ask() -> tuple[list[dict[str, Any]], str]:
        headers = build_hf_headers(token=api.token, library_name="v4quant")
        answer = get_session().get(url, headers=headers)
        hf_raise_for_status(answer)
        page = answer.json()
        if not isinstance(page, list) or not all(isinstance(item, dict) for item in page):
            raise HubError(f"hf://{repo}: the hub's listing does not have the expected form")
        return page, str(answer.links.get("next", {}).get("url", ""))

    entries, began, seconds = 0, time.monotonic(), patience_seconds()
    for _ in range(_MAX_PAGES):
        left = began + seconds - time.monotonic()
        if left <= SHORTEST_TRY:
            raise HubError(
                f"hf://{repo}: has listed only {entries:,} files within {seconds:.0f} s; try again "
                f"later ({VARIABLE} waits longer)"
            )
        page, following = persistently(f"hf://{repo}: listing files", ask, seconds=left)
        pages.append(page)
        entries += len(page)
        if entries > MAX_FILES:
            break
        if not following:
            return pages
        url = urljoin(url, following)
        if origin(url) != origin(home):
            raise HubError(f"hf://{repo}: its listing goes on at another host; refused")
    raise HubError(f"hf://{repo}: lists more than {MAX_FILES:,} files, or has no end")


def _listed(item: Mapping[str, Any]) -> RemoteFile | None:
    """An entry of a listing; None for a folder. Raises HubError."""
    if item.get("type") != "file":
        return None
    large = item.get("lfs")
    sha = large.get("oid") if isinstance(large, dict) else ""
    found = RemoteFile(item.get("path", 0), item.get("size", ""), sha or "", item.get("oid", 0))
    kinds = [type(value) for value in (found.name, found.size, found.sha256, found.blob)]
    if kinds != [str, int, str, str]:
        raise HubError("the hub's listing does not have the expected form")
    return found


def check_name(repo: str, name: str) -> None:
    """Raise UnsafePath unless a listed name is a plain relative path."""
    parts = name.split("/")
    plain = (
        all(part not in ("", ".", "..") and len(part) <= 255 for part in parts)
        and not any(c in name for c in "\\:\0")
        and name.isprintable()
        and len(name) <= 1024
        and not PurePosixPath(name).is_absolute()
    )
    if not plain:
        raise UnsafePath(f"hf://{repo}: lists {name[:200]!r}, which is not a plain relative path")


def require(remote: Remote, name: str) -> RemoteFile:
    """A file of the commit. Raises HubNotFound."""
    try:
        return remote.files[name]
    except KeyError:
        raise HubNotFound(f"{remote}: has no file {name}") from None
