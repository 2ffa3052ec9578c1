"""A fake hub that the real client of this process talks to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tests.support.conversion import TINY
from tests.support.fake_hub import TOKEN, FakeHub
from tests.support.shard_bytes import EditableCheckpoint
from v4quant.hub import lines, patience


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[FakeHub], None]:
    """Point the client at a hub, with a token and an empty cache; retries do not dawdle."""

    def point(hub: FakeHub) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(patience, "pause", lambda seconds, stopped: time.sleep(seconds))
        monkeypatch.setattr(lines, "_DIRECT", 2**14)  # whole shards of the tests are large bodies
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))

    return point


@pytest.fixture(params=[False, True], ids=["plain", "cdn"])
def hub(request: pytest.FixtureRequest, online: Callable[[FakeHub], None]) -> Iterator[FakeHub]:
    """A hub that serves files itself, and one that redirects to another host."""
    with FakeHub(cdn=request.param) as hub:
        online(hub)
        yield hub
    close_session()


@pytest.fixture
def plain_hub(online: Callable[[FakeHub], None]) -> Iterator[FakeHub]:
    """A hub that serves files itself."""
    with FakeHub() as hub:
        online(hub)
        yield hub
    close_session()


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tiny checkpoint as released: a shard per layer, sidecars, and what must stay behind."""
    edited = EditableCheckpoint.read(TINY)
    stages: dict[str, dict[str, object]] = {}
    for shard in edited.shards.values():
        for name, tensor in shard.items():
            stage = ".".join(name.split(".")[:2]) if name.startswith(("layers", "mtp")) else "top"
            stages.setdefault(f"model-{stage}.safetensors", {})[name] = tensor
    edited.shards = stages  # type: ignore[assignment]
    folder = edited.write(tmp_path_factory.mktemp("released") / "tiny")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    return {
        **files,
        "tokenizer.json": b'{"a": 1}',
        "LICENSE": b"MIT License\n\nCopyright (c) 2026 somebody\n",
        "encoding/chat.py": b"# chat\n",
        "inference/model.py": b"raise SystemExit('nobody may run this')\n",
        "README.md": b"---\nlicense: mit\n---\n",
    }


@pytest.fixture(scope="session")
def model_folder(model_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files on disk."""
    folder = tmp_path_factory.mktemp("local") / "V4-Tiny"
    for name, data in model_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
