"""What transformers saves of a BF16 release is a source: its names, its config, its shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.conversion import TINY
from tests.support.other_tools import decode, write_with_index
from tests.support.shard_bytes import EditableCheckpoint
from v4quant.checks.verify import verify
from v4quant.conversion.job import run_job
from v4quant.conversion.plan import make_plan
from v4quant.recipe import Recipe
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.structure import find_defects
from v4quant_formats.weight_reading import read_dense
from v4quant_kernels.progress import SilentProgress

transformers = pytest.importorskip("transformers")

SHARDS = {"one file": "10GB", "several": "2MB"}


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    edited = EditableCheckpoint.read(TINY)
    decode(edited)
    where = {name: file for file, tensors in edited.shards.items() for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    return write_with_index(edited, tmp_path_factory.mktemp("bf16") / "in", index)


@pytest.fixture(scope="module", params=SHARDS)
def saved(
    request: pytest.FixtureRequest, bf16: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("saved") / "out"
    model.save_pretrained(folder, max_shard_size=SHARDS[request.param])
    return folder


def test_every_value_is_the_releases(saved: Path) -> None:
    with open_checkpoint(saved) as theirs, open_checkpoint(TINY) as ours:
        found = find_defects(theirs)
        # transformers loads no draft stages, so it saves none, and its config still counts them.
        assert all("draft stages" in note for note in found.notes)
        assert not [d for d in found.defects if d.blocking]
        modules = {n.module for n in found.names.values() if n}
        wanted = {m for m in find_defects(ours).stored if not m.startswith("mtp.")}
        assert modules == wanted
        for module in sorted(m for m in wanted if m in find_defects(ours).stored):
            if not module.endswith("tid2eid"):
                a, b = read_dense(theirs, module), read_dense(ours, module)
                assert torch.equal(a.bfloat16(), b.bfloat16()), module


@pytest.mark.parametrize("scheme", ["mxfp4", "int8-g32"])
def test_it_converts_as_the_release_does(scheme: str, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_checkpoint(saved) as source:
        run_job(make_plan(source, Recipe(scheme, draft="drop")), out, workers=1)
    assert not verify(out, saved, SilentProgress()).findings
    with open_checkpoint(TINY) as source:
        run_job(make_plan(source, Recipe(scheme, draft="drop")), tmp_path / "release", workers=1)
    with open_checkpoint(out) as mine, open_checkpoint(tmp_path / "release") as other:
        experts = [n for n in other.tensors if ".ffn.experts." in n]
        assert experts and set(experts) <= set(mine.tensors)
        for name in experts:
            assert torch.equal(
                mine.read(name).view(torch.uint8), other.read(name).view(torch.uint8)
            )
    shutil.rmtree(tmp_path / "release")
