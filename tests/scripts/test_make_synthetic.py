"""The synthetic checkpoints: their inventories against the published totals, their values, their
planted faults, and that the same seed gives the same bytes."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.conversion import convert, folder_bytes
from tests.support.scripts import SCRIPTS
from tests.support.synthetic import (
    Faults,
    Request,
    RequestError,
    make_config,
    make_small,
    pieces,
    shards_of,
    write_checkpoint,
)
from v4quant.checks.inspection import Inspection, inspect_checkpoint
from v4quant.checks.verify import verify
from v4quant.conversion.plan import make_plan
from v4quant.recipe import Recipe
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.engram import read_token_map
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.spec import TensorSpec
from v4quant_kernels.errors import NonFiniteWeight
from v4quant_kernels.progress import SilentProgress

# files, tensors, bytes as published for each release, or computed where that is not known.
TOTALS = {
    "flash": (46, 69_187, 159_609_485_896),
    "pro": (64, 145_116, 864_704_792_696),
    "flash-base": (46, 69_189, 294_673_469_000),
    "flash-dspark": (48, 72_317, 166_878_536_440),
    "vision": (48, 72_633, None),
    "v41": (48, 96_085, 510_286_023_000),
}
DTYPES = {
    "flash": {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I64": 3, "I8": 33_792},
    "pro": {"BF16": 619, "F32": 590, "F8_E4M3": 528, "F8_E8M0": 71_952, "I64": 3, "I8": 71_424},
    "flash-dspark": {
        "BF16": 445, "F32": 433, "F8_E4M3": 390, "F8_E8M0": 35_718, "I64": 3, "I8": 35_328,
    },
}  # fmt: skip
# Per shard: tensors and bytes of layers 0 and 1, 2, odd ones, even ones, and the classic MTP stage.
SHARDS = {
    "flash": [
        (1_565, 3_566_148_952), (1_576, 3_596_055_640), (1_569, 3_568_596_312),
        (1_576, 3_589_851_224), (1_575, 3_593_787_756),
    ],
    "pro": [
        (2_337, 13_874_466_328), (2_344, 13_909_746_200), (2_337, 13_868_262_424),
        (2_344, 13_903_542_296), (2_343, 13_956_587_692),
    ],
}  # fmt: skip
CLASSES = {
    "flash": {
        "routed experts": 147_169_738_752,
        "attention": 4_599_346_048,
        "embedding and head": 2_118_123_520,
        "shared experts": 1_082_196_480,
        "compressor": 525_722_624,
        "indexer": 275_353_344,
        "hyper-connection": 135_537_756,
        "router": 108_834_816,
        "norm": 844_800,
        "draft: routed experts": 3_422_552_064,
        "draft: rest": 3_593_787_756 - 3_422_552_064,
    },
    "pro": {
        "routed experts": 822_054_223_872,
        "attention": 18_294_604_672,
        "embedding and head": 3_706_716_160,
        "shared experts": 4_029_923_520,
        "compressor": 1_344_566_272,
        "indexer": 625_367_040,
        "hyper-connection": 336_278_412,
        "router": 354_511_872,
        "norm": 2_013_184,
        "draft: routed experts": 13_476_298_752,
        "draft: rest": 13_956_587_692 - 13_476_298_752,
    },
}
KV_BYTES = {"flash": 6_880, "pro": 9_848}
MODULES = ("layers.0.ffn.experts.0.w1", "mtp.0.ffn.experts.1.w2")


def fresh_seed() -> int:
    seed = secrets.randbits(31)
    sys.stdout.write(f"seed {seed}\n")
    return seed


def deep(folder: Path) -> Inspection:
    with open_checkpoint(folder) as checkpoint:
        return inspect_checkpoint(checkpoint, SilentProgress(), deep=True)


@pytest.mark.parametrize("release", TOTALS)
def test_inventories_have_the_published_totals(release: str) -> None:
    shards = shards_of(release, make_config(release, False, {}))
    specs = [spec for shard in shards for spec in shard]
    files, tensors, nbytes = TOTALS[release]
    assert (len(shards), len(specs)) == (files, tensors)
    assert len({s.name for s in specs}) == tensors
    if nbytes is not None:
        assert sum(s.nbytes for s in specs) == nbytes
    if release in DTYPES:
        assert Counter(s.dtype for s in specs) == DTYPES[release]


def test_draft_stages_hold_what_was_seen_in_headers() -> None:
    shards = shards_of("flash-dspark", make_config("flash-dspark", False, {}))
    assert [len(s) for s in shards[-3:]] == [1_568, 1_565, 1_572]
    vision = {s.name for x in shards_of("vision", make_config("vision", False, {})) for s in x}
    plain = {s.name for x in shards for s in x}
    extra = vision - plain
    assert plain < vision
    assert sum(n.startswith("vision.") for n in extra) == 259
    assert sum(n.endswith("gate.bias_vl") for n in extra) == 46
    assert sum(n.endswith("gate.bias") for n in extra) == 3


@pytest.mark.parametrize("release", ["flash", "pro"])
def test_a_full_size_release_is_inspected_and_planned_from_headers(
    release: str, tmp_path: Path
) -> None:
    folder = tmp_path / release
    written = write_checkpoint(folder, Request(release, tiny=False, headers_only=True))
    assert (written.files, written.tensors, written.bytes) == TOTALS[release]
    assert sum(p.stat().st_blocks * 512 for p in folder.iterdir()) < 64 * 2**20
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.bytes
    with open_checkpoint(folder) as checkpoint:
        assert Counter(s.dtype for s in checkpoint) == DTYPES[release]
        assert shard_facts(checkpoint) == SHARDS[release]
        found = inspect_checkpoint(checkpoint, SilentProgress())
        # Without data the routing tables are holes, which read as expert 0 for every token.
        tables = [d for d in found.defects if "tid2eid' names an expert twice" in d]
        assert found.defects == tables and len(tables) == found.hash_layers
        assert found.release == "V4"
        assert {c.role: c.nbytes for c in found.classes} == CLASSES[release]
        assert found.kv_bytes_per_token == KV_BYTES[release]
        plan = make_plan(checkpoint, Recipe("mxfp4"))
    assert sum(len(s.outputs) for s in plan.shards) == written.tensors
    assert plan.bytes_in == written.bytes
    assert 0 < plan.bytes_out - written.bytes < 32 * 2**20  # headers


def test_a_full_size_v41_has_the_released_tensors_and_bytes(tmp_path: Path) -> None:
    """Counts and bytes of a public scan of the release's headers, by class, dtype and shard."""
    folder = tmp_path / "v41"
    written = write_checkpoint(folder, Request("v41", tiny=False, headers_only=True))
    assert (written.files, written.tensors, written.bytes) == (48, 96_085, 510_286_023_000)
    with open_checkpoint(folder) as checkpoint:
        found = inspect_checkpoint(checkpoint, SilentProgress())
        shards: dict[str, list[TensorSpec]] = {}
        for spec in checkpoint:
            shards.setdefault(spec.file, []).append(spec)
        facts = [(len(s), sum(x.nbytes for x in s)) for _, s in sorted(shards.items())]
        dtypes = {d: (n, 0) for d, n in Counter(s.dtype for s in checkpoint).items()}
        for spec in checkpoint:
            count, nbytes = dtypes[spec.dtype]
            dtypes[spec.dtype] = (count, nbytes + spec.nbytes)
    assert found.defects == []
    assert dtypes == {
        "BF16": (520, 3_952_883_712),
        "F32": (387, 169_229_128),
        "F8_E4M3": (357, 204_015_223_296),
        "F8_E8M0": (47_589, 23_563_015_184),
        "I8": (47_232, 278_585_671_680),
    }
    plain, reindex = (2334, 7_389_500_888), (2337, 7_395_076_568)
    layers = dict.fromkeys(range(40), plain) | dict.fromkeys((24, 28, 32, 36), reindex)
    layers |= {1: (2338, 7_547_022_808), 14: (2346, 7_563_216_600), 20: (2341, 7_400_451_800)}
    layers |= dict.fromkeys((2, 8), (2342, 7_405_694_680))
    assert facts[2:42] == [layers[i] for i in range(40)]
    assert facts[0] == (263, 970_506_240)
    assert [count for count, _ in facts[43:46]] == [801, 798, 802]
    assert facts[46:] == [(2, 101_377_628_352), (2, 101_380_404_048)]
    classes = {c.role: (c.tensors, c.nbytes) for c in found.classes}
    assert classes["routed experts"] == (92_160, 288_777_830_400)
    assert classes["engram tables"] == (4, 202_758_032_400)
    assert classes["engram"] == (8, 315_043_840)
    assert (found.kv_bytes_per_token, found.kv_bytes_packed) == (3200, 890)
    assert found.layer_kinds == {"swa": 2, "csa2/2": 18, "csa2/1": 20}
    assert found.layer_roles["source"] == [2, 8, 14, 20]
    assert found.layer_roles["reindex"] == [24, 28, 32, 36]
    assert found.layer_roles["candidate source"] == [20]
    assert found.layer_roles["Engram"] == [1, 14]
    assert len(found.layer_roles["reuse"]) == 30
    tokenizer = folder / "tokenizer.json"
    assert max(read_token_map(tokenizer.read_bytes(), tokenizer, 129_280, 99_092)) == 99_091


def shard_facts(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """(tensors, bytes) of layers 0, 2, 3 and 4 and of the last shard; like layers must agree."""
    specs: dict[str, list[TensorSpec]] = {}
    for spec in checkpoint:
        specs.setdefault(spec.file, []).append(spec)
    facts = [(len(s), sum(x.nbytes for x in s)) for _, s in sorted(specs.items())]
    layers = facts[1:-2]
    assert layers[1] == layers[0]
    assert set(layers[3::2]) == {layers[3]}
    assert set(layers[4::2]) == {layers[4]}
    return [layers[0], layers[2], layers[3], layers[4], facts[-1]]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    seed = fresh_seed()
    small = {"layers": 1, "experts": 2}
    first = make_small(tmp_path / "a", "flash-dspark", seed=seed, **small)
    again = make_small(tmp_path / "b", "flash-dspark", seed=seed, **small)
    other = make_small(tmp_path / "c", "flash-dspark", seed=seed + 1, **small)
    assert folder_bytes(first) == folder_bytes(again)
    more = make_small(tmp_path / "d", "flash-dspark", seed=seed, layers=1, experts=3)
    name = "layers.0.ffn.experts.1.w2.weight"
    with open_checkpoint(first) as a, open_checkpoint(more) as b, open_checkpoint(other) as c:
        assert torch.equal(a.read(name), b.read(name))
        assert not torch.equal(a.read(name), c.read(name))


def test_values_have_released_magnitudes(tmp_path: Path) -> None:
    folder = make_small(tmp_path / "x", "flash", seed=fresh_seed())
    with open_checkpoint(folder) as checkpoint:
        codes = checkpoint.read(f"{MODULES[0]}.weight").view(torch.uint8)
        scale = checkpoint.read(f"{MODULES[0]}.scale")
        nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1).long()
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        groups = table[nibbles & 7].view(*scale.shape, 32)
        largest = groups.amax(-1)
        assert float((largest >= 4).double().mean()) > 0.9
        deviation = float((groups * scale.float()[..., None]).square().mean().sqrt())
        assert 5e-3 < deviation < 4e-2
        dense = checkpoint.read("layers.3.attn.wq_b.weight").float()
        tile = checkpoint.read("layers.3.attn.wq_b.scale").float()
        wide = tile.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, : dense.shape[1]]
        assert 5e-3 < float((dense * wide[: dense.shape[0]]).std()) < 4e-2
        ids = checkpoint.read("layers.0.ffn.gate.tid2eid").sort(1).values
        assert ids.dtype == torch.int64
        assert 0 <= int(ids.min()) <= int(ids.max()) < 2
        assert bool((ids[:, 1:] != ids[:, :-1]).all())
        norm = checkpoint.read("layers.0.attn_norm.weight").float()
        assert abs(float(norm.mean()) - 1) < 0.05


def test_large_tensors_come_in_bounded_pieces() -> None:
    for spec in (
        TensorSpec("embed.weight", "BF16", (129280, 7168)),
        TensorSpec("layers.0.ffn.gate.tid2eid", "I64", (129280, 6)),
        TensorSpec("layers.1.engram.embed.weight", "F8_E4M3", (384_006_168, 256)),
    ):
        first = next(iter(pieces(spec, 0, 384, Faults())))
        assert 0 < first.numel() * first.element_size() <= 32 * 2**20, spec
    small = TensorSpec("x.tid2eid", "I64", (100_000, 6))
    ids = torch.cat(list(pieces(small, fresh_seed(), 384, Faults()))).view(-1, 6).sort(1).values
    assert ids.shape == (100_000, 6)
    assert bool((ids[:, 1:] > ids[:, :-1]).all())
    assert int(ids.max()) == 383


@pytest.mark.parametrize(
    ("spread", "fp8_exact", "nvfp4_exact"),
    [(14, True, True), (15, False, True), (17, False, True), (18, False, False)],
)
def test_planted_spreads_reach_the_limits_of_exact_casts(
    spread: int, fp8_exact: bool, nvfp4_exact: bool, tmp_path: Path
) -> None:
    faults = Faults(MODULES, spread=spread)
    folder = make_small(tmp_path / "x", "flash", layers=1, seed=fresh_seed(), faults=faults)
    found = deep(folder)
    assert found.defects == []
    assert found.scales is not None
    assert (found.scales.span_fp8, found.scales.span_nvfp4) == (spread, spread)
    for scheme, exact in (("fp8", fp8_exact), ("nvfp4", nvfp4_exact), ("int8-g32", True)):
        result = convert(folder, tmp_path / scheme, scheme)
        assert result.lossy_tensors == (0 if exact else len(MODULES)), scheme
        assert (result.altered_elements == 0) == exact
        assert verify(tmp_path / scheme, folder, SilentProgress()).findings == ()


@pytest.mark.parametrize("scheme", ["mxfp4", "fp8", "nvfp4", "int8-g32", "int4-g128"])
def test_zero_groups_and_edge_bytes_convert_and_verify(scheme: str, tmp_path: Path) -> None:
    faults = Faults(MODULES, zero_groups=True, edge_bytes=True)
    folder = make_small(tmp_path / "x", "flash", layers=1, seed=fresh_seed(), faults=faults)
    with open_checkpoint(folder) as checkpoint:
        for module in MODULES:
            scale = checkpoint.read(f"{module}.scale").view(torch.uint8)
            assert scale[2:8, 0].tolist() == [0, 254, 0, 1, 253, 254]
            codes = checkpoint.read(f"{module}.weight").view(torch.uint8)
            assert codes[2:4, :16].unique().tolist() == [0, 0x88]
    assert deep(folder).defects == []
    convert(folder, tmp_path / "out", scheme)
    assert verify(tmp_path / "out", folder, SilentProgress()).findings == ()


def test_a_nan_scale_is_found_and_refused(tmp_path: Path) -> None:
    faults = Faults(MODULES[:1], nan_scale=True)
    folder = make_small(tmp_path / "x", "flash", layers=1, seed=fresh_seed(), faults=faults)
    defects = deep(folder).defects
    assert len(defects) == 1
    assert f"'{MODULES[0]}.scale' holds NaN" in defects[0]
    with pytest.raises(NonFiniteWeight, match=r"experts\.0\.w1\.scale"):
        convert(folder, tmp_path / "out", "int8-g32")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("flash", overrides=(("hidden_sizes", 64),)), "no whole number 'hidden_sizes'"),
        (Request("flash", overrides=(("hidden_size", 100),)), "multiple of 32"),
        (Request("flash", overrides=(("n_routed_experts", 1),)), "at least num_experts_per_tok"),
        (Request("flash", headers_only=True, faults=Faults(spread=3)), "no data"),
        (Request("flash", faults=Faults(spread=122)), "between 0 and 121"),
        (Request("flash-base", faults=Faults(MODULES, spread=3)), "not an FP4 expert matrix"),
        (Request("flash", faults=Faults(("layers.0.attn.wkv",), spread=3)), "not an FP4 expert"),
    ],
)
def test_impossible_requests_are_refused(request_: Request, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        write_checkpoint(tmp_path / "x", request_)
    assert not (tmp_path / "x").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(RequestError, match="not an empty folder"):
        write_checkpoint(tmp_path, Request("flash"))
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]


def test_the_command_writes_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "make_synthetic.py"), "--release", "v41", "--json"]
    command += ["--layers", "3", "--experts", "3", "--width", "64", "--inner", "32"]
    command += ["--vocab", "128", "--engram-rows", "40", "--set", "num_experts_per_tok=3"]
    run = subprocess.run(
        [*command, "--out", str(tmp_path / "x")], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    said = json.loads(run.stdout)
    found = deep(tmp_path / "x")
    assert found.defects == []
    assert (said["tensors"], said["bytes"], said["files"]) == (
        found.tensors, found.nbytes, found.files,
    )  # fmt: skip
    assert said["bytes"] < 2 * 2**20
    assert (found.experts, found.experts_per_token) == (3, 3)
    again = subprocess.run(
        [*command, "--out", str(tmp_path / "x")], capture_output=True, text=True, check=False
    )
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("Error: ") and again.stderr.count("\n") == 1
