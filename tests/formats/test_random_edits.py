"""A random walk of edits over a checkpoint: nothing may pass silently.

Every edit says what it did: kept the meaning (another dtype that holds the same values, another
tool's name), or changed it. What kept it must be read as the same values; what changed it must be
refused, or named by a note. No edit undoes another: each takes tensors that none has touched.
"""

from __future__ import annotations

import random
import secrets
from pathlib import Path

import pytest
import torch

from tests.support.conversion import TINY
from tests.support.edits import CHANGING, KEEPING, Walk
from tests.support.more_edits import MORE_CHANGING, MORE_KEEPING, OPEN
from tests.support.shard_bytes import EditableCheckpoint
from v4quant.checks.soundness import require_sound
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.structure import find_defects
from v4quant_formats.weight_reading import read_dense
from v4quant_kernels.errors import V4QuantError


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every module's values. Raises what reading raises."""
    return {m: read_dense(checkpoint, m) for m in find_defects(checkpoint).stored}


@pytest.fixture(scope="module")
def release() -> dict[str, torch.Tensor]:
    with open_checkpoint(TINY) as opened:
        require_sound(opened)
        assert find_defects(opened).defects == ()
        return values(opened)


def walk(seed: int, folder: Path, release: dict[str, torch.Tensor]) -> None:
    rng = random.Random(seed)
    w = Walk(EditableCheckpoint.read(TINY), rng)
    edits = [rng.choice(KEEPING + MORE_KEEPING) for _ in range(rng.randrange(3))]
    kind = rng.choice(((), OPEN, CHANGING, MORE_CHANGING, CHANGING + MORE_CHANGING))
    edits += [rng.choice(kind)] if kind else []
    rng.shuffle(edits)
    for edit in edits:
        try:
            edit(w)
        except (IndexError, KeyError):
            continue  # nothing left that this edit could touch
    where = f"seed {seed}: {'; '.join(w.done)}"
    w.write(folder)
    try:
        with open_checkpoint(folder) as opened:
            require_sound(opened)
            notes = find_defects(opened).notes
            found = values(opened)
    except V4QuantError as error:
        assert not w.keeps, f"{where}: refused without cause: {error}"
        return
    assert notes or w.keeps is not False, f"{where}: passed silently"
    if notes and not w.keeps:
        return
    assert notes == (), where
    assert found.keys() == release.keys(), where
    for module, wanted in release.items():
        assert torch.equal(found[module], wanted), f"{where}: {module}"


def test_nothing_passes_silently(tmp_path: Path, release: dict[str, torch.Tensor]) -> None:
    for number in range(60):
        walk(secrets.randbits(32), tmp_path / str(number), release)
