"""push: commits that never mislead, nothing sent twice, faults survived, digests compared."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from tests.support.conversion import TINY, convert, folder_bytes
from tests.support.fake_hub import TOKEN, USER, FakeHub
from v4quant.cli import cli
from v4quant.hub.errors import HubAccessError, HubError, HubOffline
from v4quant.hub.refs import HubRef, HubReferenceError
from v4quant.hub.source import open_hub
from v4quant.publishing.publisher import NotPublished
from v4quant.publishing.reproduction import RECIPE_NAME
from v4quant.recipe import Recipe
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.errors import UnsafePath
from v4quant_kernels.errors import V4QuantError

REPO = f"{USER}/V4-Tiny-INT4"


@pytest.fixture(scope="module")
def out(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "out"
    convert(model_folder, folder, "int4-g64")
    return folder


def push(out: Path, *options: str, repo: str = REPO) -> None:
    cli.main(["push", str(out), repo, *options], standalone_mode=False)


def holds(hub: FakeHub, out: Path, repo: str = REPO) -> None:
    found = hub.files(repo)
    assert found.pop("README.md").startswith(b"---\n")
    assert b"scheme = " in found.pop(RECIPE_NAME)
    assert found == folder_bytes(out)


def half_made(hub: FakeHub, repo: str = REPO) -> bool:
    """Whether any commit of main showed an index or config without all shards."""
    commits = hub.repos[repo].commits
    shards = {n for n in commits[-1].files if n.endswith(".safetensors")}
    return any(
        (INDEX_NAME in c.files or "config.json" in c.files) and not shards <= c.files.keys()
        for c in commits
    )


def test_push_and_push_again(
    plain_hub: FakeHub, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(out, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["private"] and told["repo"] == REPO and told["commits"] == 2
    assert told["sent_bytes"] == told["nbytes"]
    holds(plain_hub, out)
    assert not half_made(plain_hub)
    assert {"config.json", INDEX_NAME, "README.md", "v4quant.json"} & {
        n for c in plain_hub.repos[REPO].commits[:-1] for n in c.files
    } == set()
    before = len(plain_hub.repos[REPO].commits), plain_hub.count("lfs_put")
    push(out, "--json")
    assert json.loads(capsys.readouterr().out)["sent_bytes"] == 0
    assert before == (len(plain_hub.repos[REPO].commits), plain_hub.count("lfs_put"))


def test_public_only_when_asked(plain_hub: FakeHub, out: Path) -> None:
    push(out, "--public")
    assert not plain_hub.repos[REPO].private


@pytest.mark.parametrize("kind", ["503", "429", "drop", "late drop"])
def test_faults_on_every_route(kind: str, plain_hub: FakeHub, out: Path) -> None:
    routes = (
        "whoami", "create", "info", "tree", "preupload", "commit", "lfs_batch", "lfs_put",
        "lfs_verify",
    )  # fmt: skip
    for route in routes:
        plain_hub.fail(route, kind, 2)
    push(out)
    holds(plain_hub, out)
    assert plain_hub.pending_faults() == 0 and not half_made(plain_hub)
    # A commit whose answer was lost is not made twice.
    assert len(plain_hub.repos[REPO].commits) == 1 + 2


def test_thirty_faults(plain_hub: FakeHub, out: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    kinds = ("503", "500", "429", "drop", "late drop", "401", "502")
    for _ in range(30):
        plain_hub.fail(
            rng.choice(("preupload", "commit", "lfs_batch", "lfs_put", "tree", "whoami")),
            rng.choice(kinds),
        )
    for _ in range(31):
        try:
            push(out)
        except V4QuantError as error:
            assert TOKEN not in str(error) and "secret" not in str(error)
        else:
            break
    holds(plain_hub, out)
    assert not half_made(plain_hub)


def test_resuming_sends_only_what_is_missing(plain_hub: FakeHub, out: Path) -> None:
    def expire(route: str, path: str) -> None:
        if route == "lfs_put" and plain_hub.count("lfs_put") > 3:
            plain_hub.tokens.clear()

    plain_hub.on_request = expire
    with pytest.raises(HubAccessError, match="hf auth login") as caught:
        push(out)
    assert TOKEN not in str(caught.value)
    stored, before = set(plain_hub.blobs), len(plain_hub.log)
    plain_hub.on_request = lambda route, path: None
    plain_hub.tokens.add(TOKEN)
    push(out)
    holds(plain_hub, out)
    sent = {s.path for s in plain_hub.log[before:] if s.route == "lfs_put"}
    shards = {
        f"/lfs/{hashlib.sha256(p.read_bytes()).hexdigest()}" for p in out.glob("*.safetensors")
    }
    again = {path.partition("?")[0] for path in sent}
    assert again < shards and not again & {f"/lfs/{sha}" for sha in stored}


def test_preflight_comes_before_the_first_byte(
    plain_hub: FakeHub, out: Path, tmp_path: Path
) -> None:
    plain_hub.role = "read"
    with pytest.raises(HubAccessError, match="may only read"):
        push(out)
    plain_hub.role = "write"
    with pytest.raises(HubAccessError, match="may not write for 'other'"):
        push(out, repo="other/model")
    with pytest.raises(HubReferenceError):
        push(out, repo="../x")
    damaged = tmp_path / "out"
    damaged.mkdir()
    for name, data in folder_bytes(out).items():
        (damaged / name).parent.mkdir(exist_ok=True)
        (damaged / name).write_bytes(data)
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(HubError, match="does not pass `v4quant verify`"):
        push(damaged)
    manifest = json.loads((out / "v4quant.json").read_text())
    manifest["files"][0]["name"] = "../../etc/passwd"
    (damaged / "v4quant.json").write_text(json.dumps(manifest))
    with pytest.raises(UnsafePath):
        push(damaged)
    assert REPO not in plain_hub.repos and not plain_hub.count("preupload")


def test_other_checkpoints_are_replaced_in_one_commit_or_not_at_all(
    plain_hub: FakeHub, out: Path, model_folder: Path, tmp_path: Path
) -> None:
    push(out)
    convert(model_folder, tmp_path / "int8", "int8-g32")
    with pytest.raises(HubError, match="already holds another checkpoint"):
        push(tmp_path / "int8")
    plain_hub.add_repo(REPO, {"old.safetensors": b"old", "notes.md": b"mine"})
    before = len(plain_hub.repos[REPO].commits)
    plain_hub.fail("lfs_put", "503", 3)
    plain_hub.fail("commit", "drop", 2)
    push(tmp_path / "int8", "--replace")
    assert len(plain_hub.repos[REPO].commits) == before + 1
    found = plain_hub.files(REPO)
    assert "old.safetensors" not in found and found.pop("notes.md") == b"mine"
    del found["README.md"], found[RECIPE_NAME]
    assert found == folder_bytes(tmp_path / "int8")


def test_what_arrived_is_compared(plain_hub: FakeHub, out: Path) -> None:
    def corrupt(route: str, path: str) -> None:
        if route == "info" and INDEX_NAME in plain_hub.repos[REPO].commits[-1].files:
            pass
        if route == "tree" and "README.md" in plain_hub.repos[REPO].commits[-1].files:
            files = plain_hub.repos[REPO].commits[-1].files
            files["config.json"] = plain_hub.store("config.json", b"{}")

    plain_hub.on_request = corrupt
    with pytest.raises(NotPublished, match=r"config\.json"):
        push(out)


def test_a_dry_run_asks_no_hub(
    plain_hub: FakeHub, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(out, "--dry-run")
    shown = capsys.readouterr().out
    for name in folder_bytes(out):
        assert name in shown
    assert "Config, index, manifest and card" in shown and "# V4-Tiny-INT4" in shown
    push(out, "--dry-run", "--json")
    told = json.loads(capsys.readouterr().out)
    assert [c["title"] for c in told["commits"]][-1] == "Config, index, manifest and card"
    assert {n for c in told["commits"] for n in c["files"]} == {f["name"] for f in told["files"]}
    assert not plain_hub.log


def test_offline(plain_hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubOffline):
        push(out)
    assert not plain_hub.log


def test_no_token_in_anything_written(
    plain_hub: FakeHub, out: Path, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for route in ("lfs_put", "commit", "preupload"):
        plain_hub.fail(route, "503", 2)
        plain_hub.fail(route, "drop", 2)
    push(out)
    said = "".join(capfd.readouterr()) + caplog.text
    published = b"".join(plain_hub.files(REPO).values())
    assert TOKEN not in said and "secretsignature" not in said and TOKEN.encode() not in published


def test_a_quant_beside_others(
    plain_hub: FakeHub, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder of its own: what lies there already keeps its bytes, whoever made it."""
    for scheme in ("q8_0", "mxfp4"):
        convert(TINY, tmp_path / scheme, Recipe(scheme, format="gguf"))
    repo = f"{USER}/V4-Tiny-GGUF"
    plain_hub.add_repo(repo, {"V4-Q2_K.gguf": b"GGUF others'", "v4quant.json": b"{}"})
    with pytest.raises(HubError, match=f"beside it, in a folder: {repo}:QUANT"):
        push(tmp_path / "q8_0", repo=repo)
    push(tmp_path / "q8_0", "--json", repo=f"{repo}:Q8_0")
    told = json.loads(capsys.readouterr().out)
    assert told["repo"] == f"{repo}:Q8_0" and told["sent_bytes"] == told["nbytes"]
    before = plain_hub.files(repo)
    assert before["V4-Q2_K.gguf"] == b"GGUF others'" and before["v4quant.json"] == b"{}"
    assert before["README.md"] == before["Q8_0/README.md"]
    push(tmp_path / "mxfp4", repo=f"hf://{repo}:MXFP4")
    after = plain_hub.files(repo)
    assert {n: after[n] for n in before} == before
    for folder, scheme in (("Q8_0", "q8_0"), ("MXFP4", "mxfp4")):
        own = folder_bytes(tmp_path / scheme)
        assert {n: after[f"{folder}/{n}"] for n in own} == own
        with open_hub(HubRef(repo, None, folder)) as opened:
            assert len(opened.files) == 2
    capsys.readouterr()
    push(tmp_path / "mxfp4", "--json", repo=f"{repo}:MXFP4")
    assert json.loads(capsys.readouterr().out)["sent_bytes"] == 0
    with pytest.raises(HubError, match="already holds another checkpoint"):
        push(tmp_path / "q8_0", repo=f"{repo}:MXFP4")
    push(tmp_path / "q8_0", "--replace", repo=f"{repo}:MXFP4")
    last = plain_hub.files(repo)
    assert "MXFP4/tiny-a-Q8_0.gguf" in last and "MXFP4/tiny-a-MXFP4.gguf" not in last
    assert {n: last[n] for n in before} == before
    for place, told_ in ((f"{repo}:a/b", "names one folder"), (f"{repo}@main", "on main")):
        with pytest.raises(HubError, match=told_):
            push(tmp_path / "q8_0", repo=place)
    with pytest.raises(HubError, match="only GGUF quants"):
        push(out, repo=f"{repo}:INT4")
