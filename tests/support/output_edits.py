"""Single edits of a finished conversion's folder, each of which `verify` must notice.

An edit takes a random generator and the folder and says what it did, or None where it does not
apply. `reseal` then makes every digest of the manifest true again, as a careful editor would.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.shard_bytes import StoredTensor, honest_shard, split_shard
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.manifest import MANIFEST_NAME, SEAL, sealed

Edit = Callable[[random.Random, Path], str | None]
_UNSAID = ("tool", SEAL)
"""What no source and recipe tell: only the manifest's own digest holds it."""
_FREE = ("source", "name")
"""A folder's name, which may change at any time."""


def reseal(folder: Path) -> None:
    """Make all digests true again, of whatever is there."""
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text())
        for row in manifest["files"]:
            data = (folder / row["name"]).read_bytes()
            row.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # it was edited beyond that, or has lost a file
    path.write_text(json.dumps(sealed(manifest)))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Any = value.items() if isinstance(value, dict) else ()
    items = enumerate(value[:50]) if isinstance(value, list) else items
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def _changed(rng: random.Random, value: Any) -> Any:
    """Another value, of the same kind or of another."""
    same: dict[type, Any] = {
        bool: lambda: not value,
        int: lambda: value + rng.choice((-1, 1, 17)),
        float: lambda: value * 1.5 + 0.1,
        str: lambda: value + "x",
    }
    others = [v for v in (None, "x", 7, 1.5, True, [], {}, [1]) if v != value]
    if type(value) in same and rng.random() < 0.6:
        return same[type(value)]()
    return rng.choice(others)


def edit_json(rng: random.Random, path: Path, spared: tuple[str, ...] = ()) -> str:
    """Drop, change, retype or add one value anywhere in a JSON file."""
    table = json.loads(path.read_text())
    top = rng.choice([key for key in table if key not in spared])
    place = rng.choice([p for p in _places(table) if p[0] == top and p != _FREE])
    parent = table
    for key in place[:-1]:
        parent = parent[key]
    before, how = copy.deepcopy(parent[place[-1]]), rng.choice(("drop", "change", "add"))
    if how == "drop" and before is not None:
        parent.pop(place[-1])
    elif how == "add" and isinstance(parent, dict):
        parent[f"added_{rng.randrange(99)}"] = 1
    else:
        parent[place[-1]] = _changed(rng, before)
    path.write_text(json.dumps(table))
    return f"{how} {path.name} {'/'.join(map(str, place))} (was {str(before)[:40]})"


def _config(rng: random.Random, folder: Path) -> str | None:
    return edit_json(rng, folder / "config.json")


def _manifest(rng: random.Random, folder: Path) -> str | None:
    return edit_json(rng, folder / MANIFEST_NAME, (*_UNSAID, "files"))


def _index(rng: random.Random, folder: Path) -> str | None:
    path = folder / INDEX_NAME
    return edit_json(rng, path) if path.exists() else None


def _bit(rng: random.Random, folder: Path) -> str:
    path = rng.choice(sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf")))
    if path.suffix == ".gguf":
        data = bytearray(path.read_bytes())
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
        return f"a bit of {path.name}, byte {at}"
    tensors = split_shard(path.read_bytes())
    name = rng.choice([n for n, t in tensors.items() if t.data])
    data = bytearray(tensors[name].data)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    tensors[name].data = bytes(data)
    path.write_bytes(honest_shard(tensors))
    return f"a bit of {name}"


def _swap_tensors(rng: random.Random, folder: Path) -> str | None:
    shards = sorted(folder.glob("*.safetensors"))
    tensors = split_shard(rng.choice(shards).read_bytes()) if shards else {}
    for path in rng.sample(shards, len(shards)):
        tensors = split_shard(path.read_bytes())
        first = rng.choice(list(tensors))
        facts = tensors[first].dtype, tensors[first].shape
        alike = [n for n, t in tensors.items()
                 if (t.dtype, t.shape) == facts and t.data != tensors[first].data]  # fmt: skip
        if alike:
            other = rng.choice(alike)
            tensors[first], tensors[other] = tensors[other], tensors[first]
            path.write_bytes(honest_shard(tensors))
            return f"{first} and {other} swapped"
    return None


def _swap_shards(rng: random.Random, folder: Path) -> str | None:
    shards = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf"))
    if len(shards) < 2:
        return None
    a, b = rng.sample(shards, 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    return f"{a.name} and {b.name} swapped"


def _stray(rng: random.Random, folder: Path) -> str | None:
    name = rng.choice(("chat_template.jinja", "generation_config.json", "added_tokens.json",
                       "extra.safetensors", "hf_quant_config.json", "model.safetensors",
                       "quantize_config.json", "pytorch_model.bin", "tokenizer.model"))  # fmt: skip
    if (folder / name).exists():
        return None
    one = honest_shard({"w": StoredTensor("F32", (1,), bytes(4))})
    (folder / name).write_bytes(one if name.endswith("safetensors") else b'{"a": 1}')
    return f"{name} put beside"


def _lost(rng: random.Random, folder: Path) -> str:
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    path.unlink()
    return f"{path.name} removed"


OUTPUT_EDITS: tuple[Edit, ...] = (
    _config, _config, _manifest, _manifest, _index, _bit, _bit, _swap_tensors, _swap_shards,
    _stray, _lost,
)  # fmt: skip
