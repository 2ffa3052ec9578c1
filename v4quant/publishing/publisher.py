"""Publishing: the files of a finished conversion into a repository, in commits that never mislead.

Shards go first, a few a commit; config, index, manifest and card come in the last commit, so what
`main` shows before is not a checkpoint. A repository whose `main` already is one gets all
changes in a single commit. Every attempt begins with what the repository holds: a file that is
there with the right size and digest is not sent again, which is also how an interrupted push goes
on and how a commit whose answer was lost is recognised. Every commit names the one it was decided
upon as its parent, so that nothing that appears between listing and commit is ever overwritten. At
the end all digests are compared.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4quant.hub.client import client, persistently
from v4quant.hub.download import download
from v4quant.hub.errors import HubAccessError, HubError, HubNotFound, PassingFailure
from v4quant.hub.patience import current_patience
from v4quant.hub.refs import HubRef
from v4quant.hub.remote import RemoteFile, check_name, list_files, open_remote, require
from v4quant.hub.stopping import Stop, current, is_stopped
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.file_hash import hash_file
from v4quant_formats.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

CARD_NAME = "README.md"
SHARD_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".onnx_data")
MAX_FILE_BYTES = 500 * 10**9  # the hub's hard limit
COMMIT_BYTES, COMMIT_FILES = 20 * 10**9, 8
_UPLOADS = 4  # files of one commit at a time
_MOVED = 412  # HTTP: `main` is no longer the parent that a commit names


class NotPublished(HubError):
    """The repository does not hold what was sent; nobody should use it yet."""


@dataclass(frozen=True)
class RepoFile:
    """One file to publish: its name in the repository, and where its bytes are."""

    name: str
    size: int
    sha256: str
    content: Path | bytes

    @property
    def is_shard(self) -> bool:
        """Whether it holds tensors; everything else goes into the last commit."""
        return self.name.endswith(SHARD_SUFFIXES)

    def is_same(self, remote: RemoteFile | None) -> bool:
        """Whether the repository's file has these bytes."""
        if remote is None or remote.size != self.size:
            return False
        if remote.sha256:
            return remote.sha256 == self.sha256
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        return remote.blob == blob.hexdigest()


@dataclass(frozen=True)
class CommitPlan:
    """One commit to be made."""

    title: str
    files: tuple[RepoFile, ...]
    deletions: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(p.size for p in self.files)


def repo_files(out: Path, manifest: dict[str, Any]) -> list[RepoFile]:
    """Every file of a converted checkpoint, as its manifest lists them, and the manifest."""
    found = []
    for row in manifest["files"]:
        check_name(str(out), row["name"])
        found.append(RepoFile(row["name"], row["bytes"], row["sha256"], out / row["name"]))
    path = out / MANIFEST_NAME
    found.append(RepoFile(MANIFEST_NAME, path.stat().st_size, hash_file(path), path))
    for file in found:
        if file.size > MAX_FILE_BYTES:
            raise HubError(
                f"{file.name}: {file.size:,} bytes are more than the hub takes in one file"
            )
    return found


def card_file(card: str) -> RepoFile:
    """The card as a file of the repository."""
    text = card.encode()
    return RepoFile(CARD_NAME, len(text), hashlib.sha256(text).hexdigest(), text)


def plan_commits(files: Sequence[RepoFile], update: bool, stale: Iterable[str]) -> list[CommitPlan]:
    """Shards in groups, everything else last; one commit when `main` already is a checkpoint."""
    stale = tuple(sorted(stale))
    if update:
        return [CommitPlan("Replace the checkpoint", tuple(files), stale)]
    groups: list[list[RepoFile]] = []
    shards = [p for p in files if p.is_shard]
    for file in shards:
        last = groups[-1] if groups else []
        full = sum(p.size for p in last) + file.size > COMMIT_BYTES or len(last) >= COMMIT_FILES
        if not last or full:
            groups.append([])
        groups[-1].append(file)
    done, plans = 0, []
    for group in groups:
        first, done = done + 1, done + len(group)
        span = f"{first}" if first == done else f"{first}-{done}"
        plans.append(CommitPlan(f"Shards {span} of {len(shards)}", tuple(group)))
    rest = tuple(p for p in files if not p.is_shard)
    return [*plans, CommitPlan("Config, index, manifest and card", rest, stale)]


class Publisher:
    """Writes to one repository."""

    def __init__(self, repo: str, stopped: Callable[[], bool] = is_stopped) -> None:
        """Asks nothing yet. Raises HubOffline."""
        self.repo, self._stopped = repo, stopped
        self._api: HfApi = client()
        self._committing = threading.Lock()
        self._known: dict[str, RemoteFile] | None = None
        self._made: dict[str, RepoFile | None] = {}  # by our commits; None: deleted

    def preflight(self, private: bool) -> None:
        """Check token and owner, and create the repository unless it exists.

        Raises HubAccessError before anything is sent when this cannot work.
        """
        user = self._ask("checking the token", self._api.whoami)
        if not isinstance(user, dict) or not isinstance(user.get("name"), str):
            raise HubError(f"{self}: the hub does not say whose token this is")
        if _inside(_inside(user.get("auth")).get("accessToken")).get("role") == "read":
            raise HubAccessError(
                f"{self}: the token of '{user['name']}' may only read; make one with write access "
                "and `hf auth login` with it"
            )
        owner = self.repo.partition("/")[0]
        told = user.get("orgs")
        each = map(_inside, told if isinstance(told, list) else ())
        orgs = {str(o.get("name")): o.get("roleInOrg") for o in each}
        if owner != user["name"] and (owner not in orgs or orgs[owner] == "read"):
            raise HubAccessError(
                f"{self}: '{user['name']}', whose token this is, may not write for '{owner}'; use "
                f"another token, or publish as {user['name']}/{self.repo.partition('/')[2]}"
            )
        self._ask(
            "creating the repository",
            lambda: self._api.create_repo(self.repo, private=private, exist_ok=True),
        )

    def is_private(self) -> bool:
        """Whether only its owners see the repository."""
        return bool(self._ask("asking", lambda: self._api.model_info(self.repo)).private)

    def files(self) -> dict[str, RemoteFile]:
        """What `main` holds now; nothing when there is no repository."""
        try:
            return list_files(self._api, self.repo, "main")
        except HubNotFound:
            return {}

    def look(self) -> dict[str, RemoteFile]:
        """What `main` holds now, and from here on what only this publisher may change.

        To be called once, before anything is decided upon it. Raises HubError.
        """
        there: dict[str, RemoteFile] = self._ask("listing", self._head)[1]
        with self._committing:
            self._known = dict(there)
        return there

    def commit(self, plan: CommitPlan, within: str = "") -> int:
        """Make one commit of what differs; the bytes that had to be sent (0: nothing did).

        within: the folder that the plan's checkpoint is in, with its slash. Raises HubError, also
        when somebody else has meanwhile published a checkpoint there or changed a file of the plan.
        """
        sent = 0

        def attempt() -> None:
            nonlocal sent
            from huggingface_hub import CommitOperationAdd, CommitOperationDelete

            _, there = self._head()
            self._refuse_changes(plan, within, there)
            todo = [p for p in plan.files if not p.is_same(there.get(p.name))]
            stale = [n for n in plan.deletions if n in there]
            if not todo and not stale:
                return
            operations: list[Any] = [CommitOperationDelete(n) for n in stale]
            for file in todo:
                content = file.content
                add = CommitOperationAdd(
                    file.name, content if isinstance(content, bytes) else str(content)
                )
                add.upload_info.sha256 = bytes.fromhex(file.sha256)
                operations.append(add)
            sent = sum(p.size for p in todo)
            self._send([o for o in operations if isinstance(o, CommitOperationAdd)])
            with self._committing:  # bytes travel side by side, commits follow one another
                parent, there = self._head()  # other commits came while the bytes travelled
                self._refuse_changes(plan, within, there)
                self._create(f"{plan.title} (v4quant)", operations, parent)

        self._ask(plan.title, attempt)
        with self._committing:
            self._made |= {p.name: p for p in plan.files}
            self._made |= dict.fromkeys(plan.deletions)
        return sent

    def _send(self, adds: Sequence[CommitOperationAdd]) -> None:
        """Bring the bytes of large files to the hub, each tried again by itself."""
        stop = current() or Stop()

        def send(some: Sequence[CommitOperationAdd]) -> None:
            with stop.governs():
                self._ask(
                    f"sending {some[0].path_in_repo}",
                    lambda: self._api.preupload_lfs_files(self.repo, list(some), num_threads=1),
                )

        alone = [add for add in adds if add.path_in_repo.endswith(SHARD_SUFFIXES)]
        rest = [add for add in adds if add not in alone]
        groups = [[add] for add in alone] + ([rest] if rest else [])
        if len(groups) == 1:
            send(groups[0])
            return
        with ThreadPoolExecutor(_UPLOADS) as pool:
            sendings = [pool.submit(send, group) for group in groups]
            try:
                for sending in as_completed(sendings):
                    sending.result()
            except BaseException:
                stop.set()  # what else is being sent would be for nothing
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if patience := current_patience():
            patience.answered()

    def _create(self, title: str, operations: list[Any], parent: str) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self._api.create_commit(
                self.repo, operations, commit_message=title, parent_commit=parent
            )
        except HfHubHTTPError as error:
            if error.response.status_code != _MOVED:
                raise
            raise PassingFailure("somebody else has committed meanwhile") from None

    def _head(self) -> tuple[str, dict[str, RemoteFile]]:
        """The commit that `main` is, and its files."""
        commit = str(self._api.model_info(self.repo).sha)
        return commit, list_files(self._api, self.repo, commit)

    def _refuse_changes(
        self, plan: CommitPlan, within: str, there: Mapping[str, RemoteFile]
    ) -> None:
        """Raise HubError when a file that matters is neither as it was nor as we made it."""
        known = self._known
        if known is None:
            return
        ours = {**self._made, **{p.name: p for p in plan.files}, **dict.fromkeys(plan.deletions)}
        for name in {within + MANIFEST_NAME, within + INDEX_NAME, *ours} - self._made.keys():
            made, now = ours.get(name), there.get(name)
            as_made = now is None if made is None else made.is_same(now)
            if now != known.get(name) and not as_made:
                raise HubError(
                    f"{self}: somebody else has published {name} there meanwhile; nothing of it "
                    "was changed; name a new repository"
                )

    def compare(self, files: Iterable[RepoFile]) -> None:
        """Compare what the repository lists with what was to be sent. Raises NotPublished."""
        there = self.files()
        wrong = [p.name for p in files if not p.is_same(there.get(p.name))]
        if wrong:
            raise NotPublished(
                f"{self}: {len(wrong)} files are not as the manifest says ({wrong[0]}, ...); do "
                "not use the repository before the same command, run again, ends well"
            )

    def read_small(self, name: str, into: Path) -> None:
        """Fetch one file of main."""
        remote = open_remote(HubRef(self.repo))
        download(remote, require(remote, name), into)

    def __str__(self) -> str:
        return f"hf://{self.repo}"

    def _ask(self, what: str, action: Callable[[], Any]) -> Any:
        return persistently(f"{self}: {what}", action, self._stopped)


def _inside(value: object) -> dict[str, Any]:
    """An object of the hub's answer; empty where it is something else."""
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class PushResult:
    """What `push` reports (`--json`)."""

    repo: str
    private: bool
    files: int
    nbytes: int
    sent_bytes: int
    commits: int


def beside_others(files: Sequence[RepoFile], folder: str) -> list[RepoFile]:
    """The files in a folder of the repository, where they touch nothing of others."""
    return [rename(file, f"{folder}/{file.name}") for file in files]


def rename(file: RepoFile, name: str) -> RepoFile:
    """The same bytes under another name."""
    return replace_fields(file, name=name)


def push_plan(
    files: Sequence[RepoFile],
    there: dict[str, RemoteFile],
    replace: bool,
    repo: str,
    folder: str = "",
) -> list[CommitPlan]:
    """The commits that bring a repository, or a folder of it, to these files.

    Raises HubError for foreign shards.
    """
    names, within = {p.name for p in files}, f"{folder}/" if folder else ""
    shards = [n for n in there if n.endswith(SHARD_SUFFIXES) and n.startswith(within)]
    foreign = [n for n in shards if n not in names]
    differs = any(not p.is_same(there.get(p.name)) for p in files if p.is_shard)
    finished = within + MANIFEST_NAME in there or within + INDEX_NAME in there
    if (foreign or (finished and differs)) and not replace:
        example = foreign[0] if foreign else within + INDEX_NAME
        raise HubError(
            f"hf://{repo}: already holds another checkpoint ({example}); name a new repository, "
            "replace it in one commit with --replace, or put a GGUF quant beside it, in a folder: "
            f"{repo.partition(':')[0]}:QUANT"
        )
    return plan_commits(files, finished, foreign)


def push(
    repo: str,
    files: Sequence[RepoFile],
    private: bool = True,
    replace: bool = False,
    advance: Callable[[int], None] = lambda count: None,
    folder: str = "",
) -> PushResult:
    """Publish; the same call again resumes or confirms.

    folder: the files are in this folder, beside other quants; their card becomes the repository's
    where it has none. advance(count) is told bytes as they are known to be there. Raises HubError
    and its kinds.
    """
    publisher = Publisher(repo)
    publisher.preflight(private)
    sent = commits = 0
    there = publisher.look()
    if folder and CARD_NAME not in there:
        card = next(p for p in files if p.name == f"{folder}/{CARD_NAME}")
        files = [*files, rename(card, CARD_NAME)]
    told = f"{repo}:{folder}" if folder else repo
    for plan in push_plan(files, there, replace, told, folder):
        count = publisher.commit(plan, f"{folder}/" if folder else "")
        sent, commits = sent + count, commits + bool(count)
        advance(plan.nbytes)
    publisher.compare(files)
    return PushResult(
        told, publisher.is_private(), len(files), sum(p.size for p in files), sent, commits
    )
