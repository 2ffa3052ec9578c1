"""Conversions from the hub, to the hub, and from one repository into another."""

from __future__ import annotations

import json
import random
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.conversion import convert, folder_bytes
from tests.support.fake_hub import TOKEN, USER, FakeHub
from tests.support.page_cache import pass_page_cache_by
from v4quant import builtin
from v4quant.cli import cli
from v4quant.hub.errors import HubAccessError, HubError
from v4quant.hub.shard_cache import DiskCapError
from v4quant.publishing.reproduction import RECIPE_NAME
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.errors import OutputError
from v4quant_formats.manifest import SEAL, seal_of
from v4quant_kernels.errors import V4QuantError

SOURCE = "maker/V4-Tiny"
TARGET = f"{USER}/V4-Tiny-INT4"
FAULTS = ("503", "500", "429", "drop", "late drop")
UPLOAD_ROUTES = ("preupload", "commit", "lfs_batch", "lfs_put", "lfs_verify", "tree", "info")


def quantize(source: str, out: str | Path, *options: str) -> None:
    cli.main(
        ["quantize", source, str(out), "--scheme", "int4-g64", "--workers", "2", *options],
        standalone_mode=False,
    )


@pytest.fixture(scope="module")
def expected(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion of the local folder gives."""
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(model_folder, out, "int4-g64")
    return folder_bytes(out)


def same_checkpoint(found: dict[str, bytes], expected: dict[str, bytes], commit: str) -> None:
    """Equal in every byte but the manifest's naming of the source."""
    assert found.keys() - {"README.md", RECIPE_NAME} == expected.keys()
    for name in expected.keys() - {"v4quant.json"}:
        assert found[name] == expected[name], name
    ours, theirs = (json.loads(x["v4quant.json"]) for x in (found, expected))
    assert all(manifest.pop(SEAL) == seal_of(manifest) for manifest in (ours, theirs))
    told = ours.pop("source")
    assert (told.pop("repo"), told.pop("revision"), told.pop("license")) == (SOURCE, commit, "mit")
    assert told == theirs.pop("source") and ours == theirs


@pytest.fixture
def watch(plain_hub: FakeHub, tmp_path: Path) -> list[int]:
    """Bytes of shards, whole or not, on this disk at every request."""
    held: list[int] = []

    def measure(route: str, path: str) -> None:
        total = 0
        for file in tmp_path.rglob("*.safetensors*"):
            with suppress(FileNotFoundError):
                total += file.stat().st_size
        held.append(total)

    plain_hub.on_request = measure
    return held


def shard_sizes(files: dict[str, bytes]) -> list[int]:
    return sorted(len(d) for n, d in files.items() if n.endswith(".safetensors"))


@pytest.mark.parametrize("shards", [1, 2, None])
def test_from_the_hub_under_a_cap(
    shards: int | None, plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path,
    expected: dict[str, bytes], watch: list[int],
) -> None:  # fmt: skip
    commit = plain_hub.add_repo(SOURCE, model_files, license="mit")
    cap = ["--disk-cap", f"{shards * shard_sizes(model_files)[-1]}B"] if shards else []
    # What is written here is not what the cap is about.
    quantize(f"hf://{SOURCE}", tmp_path / "out", *cap, "--scratch", str(tmp_path / "s"))
    same_checkpoint(folder_bytes(tmp_path / "out"), expected, commit)
    source_held = max(watch) - sum(shard_sizes(expected))
    assert source_held <= (shards or 3) * shard_sizes(model_files)[-1]
    asked = [s for s in plain_hub.log if s.route == "resolve" and "inference" in s.path]
    assert not asked
    assert not list((tmp_path / "s").glob("*@*/shards/*")), "what was done is gone"


def test_faults_while_reading(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    commit = plain_hub.add_repo(SOURCE, model_files, license="mit")
    for kind in ("503", "429", "drop", "truncate", "500"):
        plain_hub.fail("resolve", kind, 4)
    quantize(f"hf://{SOURCE}", tmp_path / "out")
    same_checkpoint(folder_bytes(tmp_path / "out"), expected, commit)
    assert plain_hub.pending_faults() == 0


def test_a_moved_branch_does_not_mix_on_resume(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    commit = plain_hub.add_repo(SOURCE, model_files, license="mit")
    plain_hub.on_request = lambda route, path: (
        plain_hub.fail("resolve", "404") if "layers.2" in path and not plain_hub.pending_faults()
        and plain_hub.count("resolve") > 12 else None
    )  # fmt: skip
    with pytest.raises(HubError):
        quantize(f"hf://{SOURCE}", tmp_path / "out")
    plain_hub.on_request = lambda route, path: None
    plain_hub.add_repo(SOURCE, {"model-layers.2.safetensors": b"moved"})
    quantize(f"hf://{SOURCE}", tmp_path / "out")
    same_checkpoint(folder_bytes(tmp_path / "out"), expected, commit)
    before = plain_hub.count("resolve")
    quantize(f"hf://{SOURCE}@{commit}", tmp_path / "out")  # again: confirmed from headers alone
    assert folder_bytes(tmp_path / "out").keys() == expected.keys()
    assert plain_hub.count("resolve") > before


def test_an_output_folder_of_others_is_not_touched(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    plain_hub.add_repo(SOURCE, model_files)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        quantize(f"hf://{SOURCE}", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    assert not plain_hub.log


def test_a_dry_run_reads_headers_only(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plain_hub.add_repo(SOURCE, model_files)
    quantize(f"hf://{SOURCE}", tmp_path / "out", "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["source"].startswith(f"hf://{SOURCE}@")
    assert not (tmp_path / "out").exists()


def never_half_made(hub: FakeHub, expected: dict[str, bytes]) -> None:
    """In no commit of main is there an index without everything it needs."""
    for commit in hub.repos[TARGET].commits:
        if INDEX_NAME in commit.files or "config.json" in commit.files:
            assert expected.keys() <= commit.files.keys() and "README.md" in commit.files


def test_hub_to_hub(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path, expected: dict[str, bytes],
    watch: list[int],
) -> None:  # fmt: skip
    commit = plain_hub.add_repo(SOURCE, model_files, license="mit")
    cap = shard_sizes(model_files)[-1] + shard_sizes(expected)[-1]
    quantize(
        f"hf://{SOURCE}", f"hf://{TARGET}", "--scratch", str(tmp_path / "s"), "--disk-cap", str(cap)
    )
    same_checkpoint(plain_hub.files(TARGET), expected, commit)
    never_half_made(plain_hub, expected)
    assert plain_hub.repos[TARGET].private
    assert 0 < max(watch) <= cap
    assert not (tmp_path / "s").exists()
    card = plain_hub.read(TARGET, "README.md").decode()
    assert f"base_model: {SOURCE}" in card and "base_model_relation: quantized" in card
    # Again: nothing is sent or converted.
    sent = plain_hub.count("commit")
    quantize(f"hf://{SOURCE}", f"hf://{TARGET}", "--scratch", str(tmp_path / "s"))
    assert plain_hub.count("commit") == sent and not (tmp_path / "s").exists()
    # Another recipe would mix.
    with pytest.raises(HubError, match="another source, recipe or version"):
        quantize(
            f"hf://{SOURCE}", f"hf://{TARGET}", "--scheme", "int4-g32", "--scratch",
            str(tmp_path / "s"),
        )  # fmt: skip
    with pytest.raises(DiskCapError, match="too little"):
        quantize(
            f"hf://{SOURCE}", f"hf://{USER}/other", "--scratch", str(tmp_path / "t"), "--disk-cap",
            str(cap - 1),
        )  # fmt: skip


def test_only_what_was_published_leaves_a_users_folder(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    """A work folder that was there before stays, with what its owner puts into it meanwhile."""
    plain_hub.add_repo(SOURCE, model_files, license="mit")
    work = tmp_path / "s"
    work.mkdir()

    def drop_a_file(route: str) -> float:
        if route == "lfs_put":
            (work / "notes.txt").write_text("mine")
        return 0.0

    plain_hub.slow = drop_a_file
    quantize(f"hf://{SOURCE}", f"hf://{TARGET}", "--scratch", str(work))
    assert folder_bytes(work) == {"notes.txt": b"mine"}


def test_thirty_faults_lose_nothing(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path, expected: dict[str, bytes],
    watch: list[int], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Faults on every route, an expired token, runs that die: byte-identical at the end."""
    pass_page_cache_by(monkeypatch, tmp_path)
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    commit = plain_hub.add_repo(SOURCE, model_files, license="mit")
    for _ in range(24):
        route = rng.choice((*UPLOAD_ROUTES, "resolve", "resolve"))
        plain_hub.fail(route, rng.choice(FAULTS))
    for route in ("commit", "lfs_put", "resolve"):
        plain_hub.fail(route, rng.choice(("401", "403")))
        plain_hub.fail(route, "503")
    cap = 2 * (shard_sizes(model_files)[-1] + shard_sizes(expected)[-1])
    for _ in range(10):
        try:
            quantize(
                f"hf://{SOURCE}", f"hf://{TARGET}", "--scratch", str(tmp_path / "s"),
                "--disk-cap", str(cap),
            )  # fmt: skip
        except V4QuantError as error:
            assert TOKEN not in str(error) and "secret" not in str(error)
        else:
            break
    same_checkpoint(plain_hub.files(TARGET), expected, commit)
    never_half_made(plain_hub, expected)
    assert max(watch) <= cap
    puts = [s.path for s in plain_hub.log if s.route == "lfs_put"]
    assert len(puts) <= len(shard_sizes(expected)) + 30


def test_a_second_process_is_kept_out(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    from v4quant.hub.refs import HubRef
    from v4quant.hub.source import open_hub

    plain_hub.add_repo(SOURCE, model_files)
    with (
        open_hub(HubRef(SOURCE), tmp_path),
        pytest.raises(OutputError, match="another v4quant process"),
    ):
        open_hub(HubRef(SOURCE), tmp_path)
    open_hub(HubRef(SOURCE), tmp_path).close()


def test_targets_that_cannot_work_fail_first(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path, model_folder: Path
) -> None:
    scratch = ("--scratch", str(tmp_path / "s"))
    plain_hub.role = "read"
    with pytest.raises(HubAccessError, match="may only read"):
        quantize(str(model_folder), f"hf://{TARGET}", *scratch)
    plain_hub.role = "write"
    for owner in ("stranger", "readers"):
        with pytest.raises(HubAccessError, match=f"may not write for '{owner}'"):
            quantize(str(model_folder), f"hf://{owner}/x", *scratch)
    plain_hub.add_repo(TARGET, {INDEX_NAME: b"{}"})
    with pytest.raises(HubError, match="did not write"):
        quantize(str(model_folder), f"hf://{TARGET}", *scratch)
    assert not plain_hub.count("lfs_put")


def test_transfers_overlap(
    plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    """While one shard is sent, others are fetched and converted: sending waits for the last one."""
    plain_hub.add_repo(SOURCE, model_files)
    sending, fetching = threading.Event(), threading.Event()
    sizes = {n: len(d) for n, d in model_files.items() if n.endswith(".safetensors")}
    whole: set[str] = set()
    met: list[bool] = []

    def seen(route: str, path: str) -> None:
        name = path.rpartition("/")[2]
        if route == "lfs_put" and not fetching.is_set():
            sending.set()
            met.append(fetching.wait(60))
        elif route == "resolve" and name in sizes:
            (asked, *_) = (s for s in reversed(plain_hub.log) if s.path == path)
            if asked.headers["Range"] == f"bytes=0-{sizes[name] - 1}":
                whole.add(name)
            if len(whole) == len(sizes) and not fetching.is_set():
                met.append(sending.wait(60))
                fetching.set()

    plain_hub.on_request = seen
    quantize(f"hf://{SOURCE}", f"hf://{TARGET}", "--scratch", str(tmp_path / "s"))
    assert met and all(met)


def test_the_whole_pipeline_between_repositories(
    plain_hub: FakeHub, tmp_path: Path, watch: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Converted, published and evaluated from what was published."""
    tiny = Path(builtin.__file__).parent / "data" / "tiny-v4"
    files = {p.name: p.read_bytes() for p in tiny.iterdir() if p.is_file()}
    plain_hub.add_repo(SOURCE, files, license="mit")
    (tmp_path / "run.toml").write_text(
        f'source = "hf://{SOURCE}"\ntarget = "hf://{TARGET}"\n'
        '[quantize]\nscheme = "int4-g32"\nsolver = "optimal"\n[verify]\n'
        '[evaluate]\ncorpus = ["builtin:heldout"]\ntokens = 32\nseq_len = 16\n'
    )
    cap = 3 * max(len(d) for d in files.values())
    command = ["run", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run"), "--json"]
    command += ["--disk-cap", str(cap)]
    cli.main(command, standalone_mode=False)
    result = json.loads(capsys.readouterr().out)["evaluation"]
    assert result["candidate"]["path"].startswith(f"hf://{TARGET}@")
    card = plain_hub.read(TARGET, "README.md").decode()
    assert "Perplexity" in card and "Not evaluated" not in card
    assert f"{result['tokens']:,} scored tokens" in card
    assert not list((tmp_path / "run").rglob("*.safetensors")) and max(watch) <= cap
    commits = len(plain_hub.repos[TARGET].commits)
    cli.main(command, standalone_mode=False)
    assert len(plain_hub.repos[TARGET].commits) == commits


@pytest.mark.parametrize("moment", ["shards", "index", "commit"])
def test_a_checkpoint_published_meanwhile_is_left_alone(
    moment: str, plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    """Two conversions into one repository, from two machines: the first to finish stays whole.

    "commit": it appears when the second one has looked for the last time.
    """
    plain_hub.add_repo(SOURCE, model_files, license="mit")
    theirs = {INDEX_NAME: b"{}", "v4quant.json": b"{}", "config.json": b"{}"}
    if moment == "shards":
        theirs |= {n: b"theirs" for n in model_files if n.endswith(".safetensors")}
    total = sum(n.endswith(".safetensors") for n in model_files)

    def publish(route: str, path: str) -> None:
        at = "commit" if moment == "commit" else "tree"
        if route != at or TARGET not in path or INDEX_NAME in plain_hub.files(TARGET):
            return
        there = sum(n.endswith(".safetensors") for n in plain_hub.files(TARGET))
        if there >= (1 if moment == "shards" else total):
            plain_hub.add_repo(TARGET, theirs)

    plain_hub.on_request = publish
    with pytest.raises(HubError, match="somebody else"):
        quantize(f"hf://{SOURCE}", f"hf://{TARGET}", "--scratch", str(tmp_path / "s"))
    found = plain_hub.files(TARGET)
    assert {n: found[n] for n in (INDEX_NAME, "v4quant.json", "config.json")} == {
        n: theirs[n] for n in (INDEX_NAME, "v4quant.json", "config.json")
    }
