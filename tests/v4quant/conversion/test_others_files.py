"""Files that somebody puts into an output folder, before or while a conversion writes there."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import v4quant
from tests.support.conversion import convert, folder_bytes
from tests.support.fake_hub import FakeHub
from tests.v4quant.conversion.test_job import stop_after
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.errors import OutputError
from v4quant_kernels.progress import SilentProgress

MINE = b"a user's own"


@pytest.fixture(scope="module")
def expected(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(model_folder, out, "int4-g64")
    return folder_bytes(out)


class Once(SilentProgress):
    """Does something in the middle of a conversion."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action, self._steps = action, 0

    def advance(self, amount: int) -> None:
        self._steps += 1
        if self._steps == 3:
            self._action()


@pytest.mark.parametrize("name", ["LICENSE", "config.json", INDEX_NAME, "encoding/chat.py"])
@pytest.mark.parametrize("when", ["between", "while"])
def test_small_files_of_the_same_names(
    when: str, name: str, model_folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def put() -> None:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(MINE)

    if when == "between":
        stop_after(2, model_folder, out)
        put()
    meddler = Once(put) if when == "while" else SilentProgress()
    for progress in (meddler, SilentProgress()):
        with pytest.raises(OutputError, match="move it away"):
            convert(model_folder, out, "int4-g64", progress=progress)
        assert (out / name).read_bytes() == MINE
    (out / name).unlink()
    convert(model_folder, out, "int4-g64")
    assert folder_bytes(out) == expected


@pytest.mark.parametrize("when", ["between", "while"])
def test_shards_of_the_same_names(
    when: str, model_folder: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Of the size that ours will have, too; what a run of ours left there begins as ours does."""
    out = tmp_path / "out"
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    last = max(name for name in expected if name.endswith(".safetensors"))
    bytes_ = rng.choice([MINE, MINE + bytes(len(expected[last]) - len(MINE))])
    if when == "between":
        stop_after(1, model_folder, out)
        (out / last).write_bytes(bytes_)
    meddler = Once(lambda: (out / last).write_bytes(bytes_))
    for progress in (meddler if when == "while" else SilentProgress(), SilentProgress()):
        with pytest.raises(OutputError, match="move it away"):
            convert(model_folder, out, "int4-g64", progress=progress)
        assert (out / last).read_bytes() == bytes_
    left = rng.choice([expected[last], expected[last][:100], bytes(len(expected[last])), b""])
    (out / last).write_bytes(left)
    convert(model_folder, out, "int4-g64")
    assert folder_bytes(out) == expected


@pytest.mark.parametrize("inside", [".", "in", "../out/in"])
def test_no_scratch_in_the_output_folder(
    inside: str, plain_hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path
) -> None:
    """The output would be nobody's folder to finish in."""
    plain_hub.add_repo("maker/V4-Tiny", model_files)
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"--scratch .* lies in .*out, where only"):
        v4quant.quantize("hf://maker/V4-Tiny", out, scheme="mxfp4", scratch=out / inside)
    assert not out.exists()


def test_a_link_that_comes_while_it_runs(model_folder: Path, tmp_path: Path) -> None:
    out, users = tmp_path / "out", tmp_path / "users"
    users.mkdir()
    (users / "chat.py").write_bytes(MINE)
    link = Once(lambda: (out / "encoding").symlink_to(users))
    with pytest.raises(OutputError, match=r"encoding: is a symbolic link"):
        convert(model_folder, out, "int4-g64", progress=link)
    assert [path.read_bytes() for path in users.iterdir()] == [MINE]
