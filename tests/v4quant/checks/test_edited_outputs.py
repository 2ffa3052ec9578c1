"""A random edit of a finished conversion: `verify` with the source notices each, however sealed."""

from __future__ import annotations

import random
import secrets
import shutil
from pathlib import Path

import pytest

from tests.support.conversion import TINY
from tests.support.output_edits import OUTPUT_EDITS, edit_json, reseal
from v4quant.api.checks import verify
from v4quant.api.conversion import quantize
from v4quant_formats.manifest import MANIFEST_NAME
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import SilentProgress

SCHEMES = ("int4-g32", "nvfp4", "iq4_nl", "fp8")


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("conversions")
    for scheme in SCHEMES:
        quantize(TINY, folder / scheme, scheme=scheme, progress=SilentProgress())
    return {scheme: folder / scheme for scheme in SCHEMES}


def sound(folder: Path, source: Path | None) -> bool:
    try:
        return verify(folder, source=source, progress=SilentProgress()).ok
    except V4QuantError:
        return False


def test_every_edit_is_noticed(conversions: dict[str, Path], tmp_path: Path) -> None:
    for number in range(24):
        seed = secrets.randbits(32)
        rng, folder = random.Random(seed), tmp_path / str(number)
        scheme = rng.choice(SCHEMES)
        shutil.copytree(conversions[scheme], folder)
        told = None
        while told is None:
            told = rng.choice(OUTPUT_EDITS)(rng, folder)
        if is_sealed := rng.random() < 0.6:
            reseal(folder)
        what = f"seed {seed}, {scheme}: {told}{', sealed again' if is_sealed else ''}"
        assert not sound(folder, TINY), f"{what}: passed silently"
        shutil.rmtree(folder)


def test_an_edited_manifest_is_noticed_without_a_source(
    conversions: dict[str, Path], tmp_path: Path
) -> None:
    for number in range(12):
        seed = secrets.randbits(32)
        shutil.copytree(conversions["fp8"], folder := tmp_path / str(number))
        assert sound(folder, None)
        told = edit_json(random.Random(seed), folder / MANIFEST_NAME)
        assert not sound(folder, None), f"seed {seed}: {told}"
