"""Reading from a repository: ranges, pinned commits, faults, caches and hostile listings."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from tests.support.fake_hub import TOKEN, FakeHub
from tests.support.page_cache import pass_page_cache_by
from v4quant.cli import cli
from v4quant.hub import client, lines
from v4quant.hub.download import part_path
from v4quant.hub.errors import HubAccessError, HubError, HubNotFound, HubOffline
from v4quant.hub.refs import HubRef, HubReferenceError, parse_hub
from v4quant.hub.shard_cache import DiskCapError
from v4quant.hub.source import open_hub
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.errors import (
    FormatError,
    MissingShard,
    OutputError,
    SourceChanged,
    UnsafePath,
)
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.errors import V4QuantError

REF = HubRef("maker/V4-Tiny")


def test_references() -> None:
    assert parse_hub("hf://a/B-1.x") == HubRef("a/B-1.x")
    assert parse_hub("hf://a/b@refs/pr/1") == HubRef("a/b", "refs/pr/1")
    assert str(parse_hub("hf://a/b@main")) == "hf://a/b@main"
    for text in (
        "hf://a", "hf://a/b/c", "hf://a/../b", "hf:///b", "hf://a/b@", "hf://a/b@../x", "hf://-a/b",
        "hf://a/b?x=1", "hf://a\\b/c", "hf://a/b#c", "hf://u:p@h/b", "hf://a/..", "hf://a/b\n",
    ):  # fmt: skip
        with pytest.raises(HubReferenceError):
            parse_hub(text)


def test_every_byte_is_the_local_one(
    hub: FakeHub, model_files: dict[str, bytes], model_folder: Path, tmp_path: Path
) -> None:
    hub.add_repo(REF.repo, model_files, license="mit")
    with open_checkpoint(model_folder) as local, open_hub(REF, tmp_path / "s") as remote:
        assert list(remote.tensors.values()) == list(local.tensors.values())
        assert remote.config == local.config and remote.file_bytes == local.file_bytes
        assert remote.digest() == local.digest()
        assert hub.count("lfs_put") == 0
        for name in local.tensors:
            assert torch.equal(
                remote.read(name).view(torch.uint8), local.read(name).view(torch.uint8)
            )
        assert remote.origin is not None and remote.origin.license == "mit"
        assert remote.label == f"hf://{REF.repo}@{remote.origin.revision}"
    present = {p.name for p in (tmp_path / "s").rglob("*") if p.is_file()}
    assert "tokenizer.json" in present and "chat.py" in present
    assert "model.py" not in present, "only the allow-list travels"


def test_inspect_reads_headers_only(
    hub: FakeHub, model_files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    big = {n: d for n, d in model_files.items() if n.endswith(".safetensors")}
    hub.add_repo(REF.repo, model_files)
    cli.main(["inspect", f"hf://{REF.repo}", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["path"].startswith(f"hf://{REF.repo}@") and not found["defects"]
    asked = [s for s in hub.log if s.route in ("resolve", "cdn")]
    ranges = [s.headers["Range"] for s in asked if ".safetensors" in s.path]
    assert all(len(d) > 64 * 1024 for d in big.values()), "a range is less than a file"
    assert ranges and all(int(r.rpartition("-")[2]) < 64 * 1024 for r in ranges)
    assert not any("tokenizer" in s.path for s in asked)


def test_a_long_header_is_read_whole(plain_hub: FakeHub, model_files: dict[str, bytes]) -> None:
    name = "model-top.safetensors"
    content = model_files[name]
    length = struct.unpack("<Q", content[:8])[0]
    padded = struct.pack("<Q", length + 200_000) + content[8 : 8 + length] + b" " * 200_000
    plain_hub.add_repo(REF.repo, {**model_files, name: padded + content[8 + length :]})
    with open_hub(REF, headers_only=True) as remote:
        assert remote.spec("embed.weight").offset > 200_000


def test_a_single_file_without_an_index(plain_hub: FakeHub, model_files: dict[str, bytes]) -> None:
    shard = model_files["model-top.safetensors"]
    files = {"config.json": model_files["config.json"], "model.safetensors": shard}
    plain_hub.add_repo(REF.repo, files)
    with open_hub(REF) as remote:
        assert "embed.weight" in remote and list(remote.files) == ["model.safetensors"]
    plain_hub.add_repo("maker/none", {"config.json": model_files["config.json"]})
    with pytest.raises(MissingShard):
        open_hub(HubRef("maker/none"))


def test_tokens_never_reach_another_host(hub: FakeHub, model_files: dict[str, bytes]) -> None:
    hub.add_repo(REF.repo, model_files, private=True)
    with open_hub(REF) as remote:
        remote.read("embed.weight")
    first = hub.url.partition("//")[2]
    assert any(s.headers["Authorization"] == f"Bearer {TOKEN}" for s in hub.log if s.host == first)
    others = [s for s in hub.log if s.host != first]
    assert bool(others) == bool(hub.cdn)
    for seen in others:
        assert TOKEN not in str(seen.headers) and "Authorization" not in seen.headers


@pytest.mark.parametrize("kind", ["503", "500", "429", "drop", "truncate"])
def test_what_passes_is_survived(
    kind: str, hub: FakeHub, model_files: dict[str, bytes], model_folder: Path
) -> None:
    hub.add_repo(REF.repo, model_files)
    route = "cdn" if hub.cdn else "resolve"
    for name in ("info", "tree", route):
        hub.fail(name, kind, 3)
    with open_checkpoint(model_folder) as local, open_hub(REF) as remote:
        hub.fail(route, kind, 5)
        name = max(local, key=lambda s: s.nbytes).name
        assert torch.equal(remote.read(name), local.read(name))
        assert remote.digest() == local.digest()
    assert hub.pending_faults() == 0


def shelf(scratch: Path) -> Path:
    """Where the shards of the one repository in a scratch folder lie."""
    (folder,) = scratch.glob("*@*/shards")
    return folder


def on_disk(scratch: Path) -> int:
    """Bytes of fetched shards, while others come and go and get their names."""
    total = 0
    for path in scratch.glob("*@*/shards/*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("past_the_page_cache", [False, True])
def test_a_broken_download_goes_on_where_it_broke(
    plain_hub: FakeHub,
    model_files: dict[str, bytes],
    tmp_path: Path,
    past_the_page_cache: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if past_the_page_cache:
        pass_page_cache_by(monkeypatch, tmp_path)
    plain_hub.add_repo(REF.repo, model_files)
    direct: list[int] = []
    read_into = lines._Line.read_into

    def counted(line: Any, view: memoryview, timeout: float | None) -> int:
        direct.append(read_into(line, view, timeout))
        return direct[-1]

    monkeypatch.setattr(lines._Line, "read_into", counted)
    with open_hub(REF, tmp_path) as remote:
        plain_hub.fail("resolve", "drop", 2)
        plain_hub.log.clear()
        file = remote.spec("layers.1.attn_norm.weight").file
        remote.shards.acquire([file])
        starts = [int(s.headers["Range"][6:].partition("-")[0]) for s in plain_hub.log]
        size = len(model_files[file])
        assert starts == [0, size // 2, size // 2 + (size - size // 2) // 2]
        assert sum(direct) > size // 4, "large bodies pass the client by"
    # What an earlier process left: a good part is continued, a damaged one fetched anew.
    (whole,) = shelf(tmp_path).iterdir()
    assert whole.name.endswith(f"-{file}") and re.match(r"[0-9a-f]{16}-", whole.name)
    for damage in (b"", b"x"):
        whole.unlink()
        part = part_path(whole)
        part.write_bytes((damage + model_files[file])[:1000])
        plain_hub.log.clear()
        with open_hub(REF, tmp_path) as remote:
            plain_hub.log.clear()
            remote.shards.acquire([file])
        starts = [int(s.headers["Range"][6:].partition("-")[0]) for s in plain_hub.log]
        assert starts == ([1000, 0] if damage else [1000])
        assert whole.read_bytes() == model_files[file] and not part.exists()


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_download_is_never_written_through_a_link(
    link: str, plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    plain_hub.add_repo(REF.repo, model_files)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    with open_hub(REF, tmp_path / "s") as remote:
        file = remote.spec("embed.weight").file
        remote.shards.acquire([file])
        (whole,) = shelf(tmp_path / "s").iterdir()
    whole.unlink()
    getattr(part_path(whole), link)(victim)
    with open_hub(REF, tmp_path / "s") as remote, pytest.raises(OutputError, match=r"embed|top"):
        remote.shards.acquire([file])
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["encoding", "shards"])
def test_a_fetched_folder_swapped_for_a_link(
    name: str, plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    """Between two runs in one scratch folder."""
    plain_hub.add_repo(REF.repo, model_files)
    with open_hub(REF, tmp_path / "s") as remote:
        remote.shards.acquire([remote.spec("embed.weight").file])
    users = tmp_path / "users"
    users.mkdir()
    (users / "chat.py").write_text("mine")
    fetched = shelf(tmp_path / "s").parent / name
    fetched.rename(tmp_path / "ours")
    fetched.symlink_to(users)
    with (
        pytest.raises(OutputError, match=rf"{name}: is a symbolic link"),
        open_hub(REF, tmp_path / "s") as remote,
    ):
        remote.shards.acquire([remote.spec("embed.weight").file])
    assert [path.read_text() for path in users.iterdir()] == ["mine"]


def test_what_is_left_of_one_repository_is_never_taken_for_another(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    """Two fine-tunes have the same names and sizes."""
    other = {n: d[:-1] + bytes([d[-1] ^ 1]) if n.endswith("ors") else d
             for n, d in model_files.items()}  # fmt: skip
    plain_hub.add_repo(REF.repo, model_files)
    plain_hub.add_repo("maker/other", other)
    files = [n for n in model_files if n.endswith(".safetensors")]
    with open_hub(REF, tmp_path) as remote:
        remote.shards.acquire(files[:2])
        left = shelf(tmp_path)
    assert len(list(left.iterdir())) == 2
    with open_hub(HubRef("maker/other"), tmp_path) as remote:
        assert not left.exists(), "the folder is the other's now"
        remote.shards.acquire(files[:2])
        held = {p.name.partition("-")[2]: p.read_bytes() for p in shelf(tmp_path).iterdir()}
    assert held == {n: other[n] for n in files[:2]}


def test_a_leftover_of_other_bytes_is_fetched_anew(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    plain_hub.add_repo(REF.repo, model_files)
    with open_hub(REF, tmp_path) as remote:
        file = remote.spec("embed.weight").file
        remote.shards.acquire([file])
    (whole,) = shelf(tmp_path).iterdir()
    whole.write_bytes(bytes(len(model_files[file])))
    with open_hub(REF, tmp_path) as remote:
        remote.shards.acquire([file])
        assert whole.read_bytes() == model_files[file]


def test_leftovers_of_later_shards_neither_break_the_cap_nor_block(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    plain_hub.add_repo(REF.repo, model_files)
    files = sorted(n for n in model_files if n.endswith(".safetensors"))
    cap = sum(len(model_files[n]) for n in files[-2:])
    cap = max(cap, *(len(model_files[n]) for n in files))
    with open_hub(REF, tmp_path, cap) as remote:
        remote.shards.acquire(files[-2:])
    held: list[int] = []

    def measure(route: str, path: str) -> None:
        held.append(on_disk(tmp_path))

    plain_hub.on_request = measure
    with open_hub(REF, tmp_path, cap) as remote:
        remote.shards.expect(files, once=True)
        for file in files:
            remote.shards.acquire([file])
            measure("", "")
            remote.shards.release(file)
    assert 0 < max(held) <= cap


def test_wrong_bytes_are_refused(
    hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add_repo(REF.repo, model_files)
    with open_hub(REF, tmp_path) as remote:
        hub.fail("cdn" if hub.cdn else "resolve", "flip")
        file = remote.spec("embed.weight").file
        with pytest.raises(SourceChanged, match="digest"):
            remote.shards.acquire([file])
        assert not list(shelf(tmp_path).iterdir())
    hub.fail("resolve", "flip")  # config.json, not in large storage
    with pytest.raises(SourceChanged, match=r"config\.json"):
        open_hub(REF)


def test_a_file_longer_or_shorter_than_announced(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    plain_hub.add_repo(REF.repo, model_files)
    entry = plain_hub.repos[REF.repo].commits[-1].files["model-top.safetensors"]
    honest = plain_hub.blobs[entry.sha256]
    for lie in (honest + b"x" * 100_000, honest[:-10]):
        with open_hub(REF, tmp_path) as remote:
            plain_hub.blobs[entry.sha256] = lie
            with pytest.raises(SourceChanged, match=r"model-top.*announces"):
                remote.shards.acquire(["model-top.safetensors"])
            plain_hub.blobs[entry.sha256] = honest
        assert sum(p.stat().st_size for p in shelf(tmp_path).iterdir()) <= len(honest)


def test_a_branch_that_moves_cannot_mix(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    commit = plain_hub.add_repo(REF.repo, model_files)
    with open_hub(REF, tmp_path) as remote:
        plain_hub.add_repo(REF.repo, dict.fromkeys(model_files, b"moved"))
        assert remote.read("embed.weight").isfinite().all()
        assert remote.origin is not None and remote.origin.revision == commit
    with open_hub(REF, tmp_path) as again:  # an unfinished job goes on with its commit
        assert again.origin is not None and again.origin.revision == commit
    with open_hub(HubRef(REF.repo, commit)) as named:
        assert named.origin is not None and named.origin.revision == commit
    with pytest.raises(V4QuantError):
        open_hub(REF)  # a new one sees the branch as it is


def test_refusals_are_clear_and_at_once(
    plain_hub: FakeHub, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubAccessError, match="token") as caught:
        plain_hub.tokens.clear()
        open_hub(REF)
    assert TOKEN not in str(caught.value) and plain_hub.count("info") == 1
    plain_hub.tokens.add(TOKEN)
    with pytest.raises(HubNotFound):
        open_hub(REF)
    plain_hub.add_repo(REF.repo, model_files)
    with pytest.raises(HubNotFound):
        open_hub(HubRef(REF.repo, "no-such-branch"))
    plain_hub.fail("info", "503", 20)
    with pytest.raises(HubError, match=r"failed \d+ times in a row.*503"):
        open_hub(REF)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"failed \d+ times in a row.*refused"):
        open_hub(REF)


def fill_cache(commit: str, files: dict[str, bytes]) -> None:
    """Lay files out as the hub client's cache does: blobs, and links to them."""
    root = Path(constants.HF_HUB_CACHE) / f"models--{REF.repo.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for name, data in files.items():
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = root / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def test_offline_is_an_error_at_once(
    plain_hub: FakeHub, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, model_folder: Path,
) -> None:  # fmt: skip
    commit = plain_hub.add_repo(REF.repo, model_files)
    fill_cache(commit, model_files)
    with open_hub(REF, tmp_path / "s") as cached, open_checkpoint(model_folder) as local:
        cached.shards.acquire(list(cached.files))
        assert cached.digest() == local.digest()
        cached.shards.release("model-top.safetensors")
    assert plain_hub.count("resolve") == 0, "all of it came from the cache"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    plain_hub.log.clear()
    with open_hub(REF) as cached:
        assert cached.digest() == local.digest() and cached.origin == cached.origin
    with pytest.raises(HubOffline, match="nothing of it"):
        open_hub(HubRef("maker/other"))
    (Path(cached.path) / "model-top.safetensors").unlink()
    with pytest.raises(HubOffline, match="not all of it"):
        open_hub(REF)
    assert not plain_hub.log


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "a//b", "./a", "a\0b", "a\nb"],
)
def test_hostile_names_in_the_listing(
    name: str, plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    plain_hub.add_repo(REF.repo, {**model_files, name: b"evil"})
    with pytest.raises(UnsafePath):
        open_hub(REF, tmp_path / "deep" / "s")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["lock"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin"])
def test_hostile_names_in_the_index(
    name: str, plain_hub: FakeHub, model_files: dict[str, bytes]
) -> None:
    index = json.loads(model_files[INDEX_NAME])
    index["weight_map"]["embed.weight"] = name
    plain_hub.add_repo(REF.repo, {**model_files, INDEX_NAME: json.dumps(index).encode()})
    with pytest.raises(FormatError):
        open_hub(REF)
    assert all(name not in seen.path for seen in plain_hub.log)


def test_caps(plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path) -> None:
    """Random reads of whole shards: never more on disk than the cap."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    plain_hub.add_repo(REF.repo, model_files)
    shards = {n: len(d) for n, d in model_files.items() if n.endswith(".safetensors")}
    cap = max(shards.values()) + sorted(shards.values())[1]
    held: list[int] = []

    def measure(route: str, path: str) -> None:
        held.append(on_disk(tmp_path))

    plain_hub.on_request = measure
    with open_hub(REF, tmp_path, cap) as remote:
        for _ in range(40):
            spec = rng.choice(list(remote.tensors.values()))
            remote.read(spec.name)
            measure("", "")
    assert 0 < max(held) <= cap
    with pytest.raises(DiskCapError, match="--disk-cap"):
        open_hub(REF, tmp_path, max(shards.values()) - 1)
    with open_hub(REF, tmp_path, cap) as remote, pytest.raises(DiskCapError):
        remote.shards.acquire(list(shards))


def test_messages_hold_no_secrets(
    plain_hub: FakeHub, model_files: dict[str, bytes], online: Callable[[FakeHub], None]
) -> None:
    text = f"GET http://h/x?X-Amz-Signature=abc Authorization: Bearer {TOKEN} and hf_AbCdEf123456"
    clean = client.scrub(text)
    for secret in ("abc", TOKEN, "hf_AbCdEf123456", "Signature"):
        assert secret not in clean
    assert "http://h/x?***" in clean


def test_the_shard_that_work_waits_for_is_fetched_alone(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    """Nothing shares the line with the first one; afterwards two come at a time."""
    plain_hub.add_repo(REF.repo, model_files)
    names = sorted((n for n in model_files if n.endswith(".safetensors")), key=len)
    with open_hub(REF, tmp_path) as checkpoint:
        whole: dict[str, bool] = {}

        def seen(route: str, path: str) -> None:
            name = path.rpartition("/")[2]
            if route == "resolve" and name in names and name not in whole:
                whole[name] = bool(list(tmp_path.rglob(f"*-{names[0]}")))

        plain_hub.on_request = seen
        checkpoint.shards.expect(names[:3], once=True)
        checkpoint.shards.acquire(names[:3])
    assert whole == {names[0]: False, names[1]: True, names[2]: True}


@pytest.mark.parametrize("content", [b"mine", b'{"repo": "../x"}', b"{}", b"[]"], ids=str)
def test_somebody_elses_pin_is_not_replaced(
    content: bytes, plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    plain_hub.add_repo(REF.repo, model_files)
    (tmp_path / "pin.json").write_bytes(content)
    with pytest.raises(OutputError, match="is not what v4quant writes there"):
        open_hub(REF, tmp_path)
    assert (tmp_path / "pin.json").read_bytes() == content
    (tmp_path / "pin.json").unlink()
    open_hub(REF, tmp_path).close()
