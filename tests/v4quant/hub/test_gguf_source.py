"""Repositories of GGUF files: a quant is chosen by name, read by ranges, converted and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import v4quant
from tests.support.conversion import TINY, convert
from tests.support.fake_hub import FakeHub
from v4quant.cli import cli
from v4quant.hub.errors import HubError, HubOffline
from v4quant.hub.refs import HubRef, HubReferenceError, parse_hub
from v4quant.hub.source import open_hub
from v4quant.recipe import Recipe
from v4quant_formats.errors import FormatError
from v4quant_formats.manifest import ManifestError, read_manifest
from v4quant_formats.opening import open_checkpoint

REPO = "maker/V4-Tiny-GGUF"


@pytest.fixture(scope="module")
def quants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quant with its draft stage, one in parts in a folder, and companions."""
    folder = tmp_path_factory.mktemp("quants")
    for scheme, split in (("q8_0", ""), ("mxfp4", "1MB")):
        out = folder / f"{scheme}-work"
        convert(TINY, out, Recipe(scheme, format="gguf", split_size=split))
        target = folder / "repo" / ("MXFP4" if split else "")
        target.mkdir(parents=True, exist_ok=True)
        for file in out.glob("*.gguf"):
            file.rename(target / file.name)
    (folder / "repo" / "mmproj-F16.gguf").write_bytes(b"GGUF")
    return folder / "repo"


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_references() -> None:
    assert parse_hub("hf://a/b:Q4_K_M") == HubRef("a/b", None, "Q4_K_M")
    assert parse_hub("hf://a/b@refs/pr/1:UD-Q4_K_XL") == HubRef("a/b", "refs/pr/1", "UD-Q4_K_XL")
    for text in ("hf://a/b:Q4_K_M", "hf://a/b@main:folder/in", "hf://a/b:model.gguf"):
        assert str(parse_hub(text)) == text
    for text in ("hf://a/b:", "hf://a/b:../x", "hf://a/b:a:b", "hf://a/b:/x", "hf://a/b:-x"):
        with pytest.raises(HubReferenceError):
            parse_hub(text)


@pytest.mark.parametrize("quant", ["Q8_0", "MXFP4"])
def test_every_byte_is_the_local_one(
    hub: FakeHub, quants: Path, quant: str, tmp_path: Path
) -> None:
    hub.add_repo(REPO, files(quants))
    ref = HubRef(REPO, None, quant)
    with open_checkpoint(f"{quants}:{quant}") as local, open_hub(ref, tmp_path / "s") as remote:
        assert len(remote.files) == len(local.files) > 1
        assert remote.config == local.config
        assert list(remote.tensors.values()) == list(local.tensors.values())
        assert any(name.startswith("mtp.") for name in remote.tensors)
        for name in local.tensors:
            mine, theirs = remote.read(name), local.read(name)
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
        assert remote.digest() == local.digest()


def test_what_is_there_is_told(plain_hub: FakeHub, quants: Path) -> None:
    plain_hub.add_repo(REPO, files(quants))
    for quant in ("", "Q2_K"):
        with pytest.raises(FormatError, match=r"choose one: :MXFP4, :Q8_0"):
            open_hub(HubRef(REPO, None, quant))
    plain_hub.add_repo("maker/none", {"config.json": b"{}", "model.safetensors": b""})
    with pytest.raises(FormatError, match=r"has no \.gguf files"):
        open_hub(HubRef("maker/none", None, "Q8_0"))


def test_only_the_chosen_files_are_asked_for(plain_hub: FakeHub, quants: Path) -> None:
    plain_hub.add_repo(REPO, files(quants))
    with open_hub(HubRef(REPO, None, "MXFP4"), headers_only=True):
        asked = {seen.path for seen in plain_hub.log if seen.route == "resolve"}
    assert asked and all("/MXFP4/" in path for path in asked)


def test_commands_take_a_quant(plain_hub: FakeHub, quants: Path, tmp_path: Path) -> None:
    plain_hub.add_repo(REPO, files(quants))
    run = CliRunner()

    def done(*words: str) -> str:
        found = run.invoke(cli, list(words), catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found.stdout

    named = f"hf://{REPO}:q8_0"
    assert not json.loads(done("inspect", named, "--json"))["defects"]
    ids = tmp_path / "ids.npy"
    np.save(ids, torch.arange(2, 66).view(2, 32).numpy())
    text = ("--corpus", str(ids), "--no-weights", "--json")
    assert json.loads(done("evaluate", named, *text))["tokens"] == 62
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    done("quantize", named, str(tmp_path / "out"), "--scheme", "int8-g32", "--draft", "drop")
    done("verify", str(tmp_path / "out"), "--source", named)
    found = read_manifest(tmp_path / "out")
    assert REPO in json.dumps(found["source"])
    refused = run.invoke(cli, ["quantize", str(TINY), named, "--scheme", "fp8"])
    assert refused.exit_code == 1 and "published on main" in str(refused.exception)


def in_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: dict[str, bytes]) -> None:
    """A hub cache that holds these files of the repository."""
    from huggingface_hub import constants

    commit = "0" * 40
    home = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}"
    for name, data in found.items():
        (home / "snapshots" / commit / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "snapshots" / commit / name).write_bytes(data)
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_offline(
    quants: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    online: Callable[[FakeHub], None],
) -> None:
    """What was downloaded is used; a model whose draft stages may lie elsewhere is not."""
    in_cache(monkeypatch, tmp_path, files(quants))
    with open_hub(HubRef(REPO, None, "Q8_0")) as opened:
        assert any(name.startswith("mtp.") for name in opened.tensors)
        assert opened.origin is not None and opened.origin.repo == REPO
    cached = {n: d for n, d in files(quants).items() if n == "tiny-a-Q8_0.gguf"}
    shutil.rmtree(tmp_path / "cache")
    in_cache(monkeypatch, tmp_path, cached)
    for quant in ("", "Q8_0"):
        with pytest.raises(HubOffline, match=r"draft stages.*:tiny-a-Q8_0\.gguf"):
            open_hub(HubRef(REPO, None, quant))
    with open_hub(HubRef(REPO, None, "tiny-a-Q8_0.gguf")) as opened:
        assert not any(name.startswith("mtp.") for name in opened.tensors)
    with pytest.raises(HubError):
        open_hub(HubRef("maker/other", None, "Q8_0"))


def test_verify_and_push_take_a_quant(plain_hub: FakeHub, quants: Path, tmp_path: Path) -> None:
    """A quant of ours among others: by its folder here, and by its name on the hub."""
    shelf = tmp_path / "shelf"
    shutil.copytree(quants, shelf)
    convert(TINY, shelf / "IQ4_NL", Recipe("iq4_nl", format="gguf"))
    plain_hub.add_repo(REPO, files(shelf))
    for place in (f"{shelf}:IQ4_NL", f"hf://{REPO}:IQ4_NL"):
        assert v4quant.verify(place).ok, place
        assert v4quant.verify(place, source=TINY).ok, place
    planned = v4quant.plan_push(f"{shelf}:IQ4_NL", f"{REPO}:IQ4_NL")
    assert {f.name.partition("/")[0] for f in planned.files} == {"IQ4_NL"}
    with pytest.raises(HubError, match="published already"):
        v4quant.plan_push(f"hf://{REPO}:IQ4_NL", "a/b")
    with pytest.raises(ManifestError, match=r"v4quant\.json"):
        v4quant.verify(f"hf://{REPO}:MXFP4")
    with pytest.raises(FormatError, match="choose one"):
        v4quant.verify(f"{shelf}:Q3_K")
    damaged = files(shelf)
    name = max((n for n in damaged if n.startswith("IQ4_NL/")), key=lambda n: len(damaged[n]))
    damaged[name] = damaged[name][:-1] + bytes([damaged[name][-1] ^ 1])
    plain_hub.add_repo("maker/damaged", damaged)
    found = v4quant.verify("hf://maker/damaged:IQ4_NL").values
    assert found is not None and [f.where for f in found.findings] == [Path(name).name]
