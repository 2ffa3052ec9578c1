"""Hostile folders: indexes that lead elsewhere, links, shards that disagree with the index."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.conversion import TINY
from tests.support.shard_bytes import INDEX, StoredTensor, honest_shard
from v4quant_formats import errors
from v4quant_formats.model_config import ConfigError
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.system import peak_rss_bytes
from v4quant_kernels.errors import V4QuantError

A, B = "model-1.safetensors", "model-2.safetensors"


def tensor(fill: bytes = b"abcd") -> StoredTensor:
    return StoredTensor("U8", (4,), fill)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint of two shards; `open_checkpoint` accepts it."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / A).write_bytes(honest_shard({"a": tensor()}))
    (path / B).write_bytes(honest_shard({"b": tensor()}))
    set_map(path, {"a": A, "b": B})
    open_checkpoint(path).close()
    return path


def set_map(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refuse(folder: Path, kind: type[V4QuantError], *named: str) -> None:
    started = time.perf_counter()
    with pytest.raises(V4QuantError) as caught:
        open_checkpoint(folder)
    assert time.perf_counter() - started < 2
    message = str(caught.value)
    assert caught.type is kind, message
    assert message.isprintable() and len(message) < 700, message
    for name in (str(folder), *named):
        assert name in message


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/x.safetensors", "C:\\x.safetensors", "C:x.safetensors",
     "sub/x.safetensors", "..\\x.safetensors", "", ".", "..", "a\nb.safetensors",
     "a\x00b.safetensors", "\u202ex.safetensors", "x" * 300 + ".safetensors", "config.json",
     "model-1.safetensors.part", "~/x.pt"],
)  # fmt: skip
def test_index_names_no_plain_shard(folder: Path, name: str) -> None:
    (folder.parent / "outside.safetensors").write_bytes(honest_shard({"b": tensor()}))
    set_map(folder, {"a": A, "b": name})
    refuse(folder, errors.UnsafePath)


def test_link_that_leaves_the_folder(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes((folder / B).read_bytes())
    (folder / B).unlink()
    for target in (outside, Path("../outside.safetensors")):
        (folder / B).symlink_to(target)
        refuse(folder, errors.UnsafePath, B)
        (folder / B).unlink()
    (folder / "real.safetensors").write_bytes(outside.read_bytes())
    (folder / B).symlink_to("real.safetensors")  # a link inside is harmless
    open_checkpoint(folder)


def test_hub_cache_snapshot_links_are_allowed(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, cache / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert set(open_checkpoint(snapshot).tensors) == {"a", "b"}
    (snapshot / B).unlink()
    (snapshot / B).symlink_to(folder / B)  # out of the repository's cache
    refuse(snapshot, errors.UnsafePath, B)


def test_dangling_link_loop_and_missing_shard(folder: Path) -> None:
    (folder / B).unlink()
    refuse(folder, errors.MissingShard, B)
    (folder / B).symlink_to("nowhere.safetensors")
    refuse(folder, errors.MissingShard, B)


def test_two_models_of_one_name_without_an_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    for name in ("model-00001-of-00001", "model-00001-of-00002", "model-00002-of-00002"):
        (folder / f"{name}.safetensors").write_bytes((folder / B).read_bytes())
    refuse(folder, errors.MissingShard, "the parts of one model alone")


def test_shard_and_index_must_agree(folder: Path) -> None:
    set_map(folder, {"a": A, "b": B, "c": B})
    refuse(folder, errors.MissingTensor, B, "'c'")
    set_map(folder, {"a": A, "b": B})
    (folder / B).write_bytes(honest_shard({"b": tensor(), "d": tensor()}))
    refuse(folder, errors.UnexpectedTensor, B, "'d'")
    (folder / B).write_bytes(honest_shard({"b": tensor(), "a": tensor(b"evil")}))
    refuse(folder, errors.DuplicateTensor, A, B, "'a'")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"\x80\x04", b"{}", b'{"weight_map": []}',
     b'{"weight_map": {}}', b'{"weight_map": "x"}', b'{"weight_map": {"a": 1}}',
     b'{"weight_map": {"a": null}}', b'{"weight_map": {"a": ["model-1.safetensors"]}}',
     b'{"weight_map": {"a": {}}}', b'{"weight_map":' + b"[" * 100_000,
     b'{"metadata": {"total_size": ' + b"9" * 100_000 + b'}, "weight_map": {}}',
     b'{"metadata": ' + b"[" * 500 + b"]" * 500 + b', "weight_map": {"a": "x.safetensors"}}'],
    ids=lambda c: c[:24].decode(errors="replace"),
)  # fmt: skip
def test_index_of_the_wrong_form(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)
    refuse(folder, errors.InvalidIndex, INDEX)


def test_sparse_giant_json_is_not_read(folder: Path) -> None:
    for name, kind in ((INDEX, errors.InvalidIndex), ("config.json", ConfigError)):
        kept = (folder / name).read_bytes()
        with (folder / name).open("wb") as file:
            file.truncate(2**40)
        refuse(folder, kind, name)
        (folder / name).write_bytes(kept)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff", b'"x"', b"1" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000],
)
def test_config_of_the_wrong_form(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refuse(folder, ConfigError, "config.json")


def test_folder_without_what_it_needs(folder: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "absent", errors.FormatError)
    (folder / INDEX).unlink()
    refuse(folder, errors.MissingShard, INDEX)
    (folder / "config.json").unlink()
    refuse(folder, ConfigError, "config.json")


def change(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.__setitem__(key, value)


def test_json_that_would_grow_in_memory(folder: Path) -> None:
    started, memory = time.perf_counter(), peak_rss_bytes()
    for name, kind in (("config.json", ConfigError), (INDEX, errors.InvalidIndex)):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(b'{"a":[' + b"[]," * 5_000_000 + b"1]}")
        refuse(folder, kind, name, "more than 4,000,000 values")
        (folder / name).write_bytes(kept)
    assert time.perf_counter() - started < 2 and peak_rss_bytes() - memory < 2**26


@pytest.mark.parametrize("key", ["n_routed_experts", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [10**12, 10**30, -1, 0, 1.5, "4", None, True, [4], {"a": 1}])
def test_config_numbers_meant_to_exhaust(tmp_path: Path, key: str, value: object) -> None:
    """Planning and inspecting end soon, with an error or defects, whatever the numbers claim."""
    from v4quant.checks.inspection import inspect_checkpoint
    from v4quant.conversion.plan import make_plan
    from v4quant.recipe import Recipe
    from v4quant_kernels.progress import SilentProgress

    folder = tmp_path / "model"
    folder.mkdir()
    for file in TINY.iterdir():
        os.link(file, folder / file.name)
    config = json.loads((TINY / "config.json").read_text())
    config[key] = value
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    started = time.perf_counter()
    with open_checkpoint(folder) as checkpoint:
        try:
            plan = make_plan(checkpoint, Recipe("int4-g32"))
        except V4QuantError as caught:
            assert str(caught).isprintable()
        else:  # the tensors decide, and the output says what they say
            assert plan.output_config()[key] == json.loads((TINY / "config.json").read_text())[key]
        found = inspect_checkpoint(checkpoint, SilentProgress(), deep=key == "n_routed_experts")
    assert 1 <= len(found.defects) <= 1000
    assert time.perf_counter() - started < 5
