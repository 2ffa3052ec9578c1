"""Preflight: every good output passes for its engines, every seeded defect is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.conversion import SCHEMES, TINY, VARIANTS
from tests.support.defects import DEFECTS, Defect
from tests.support.more_defects import MORE_DEFECTS, WARNED
from tests.support.shard_bytes import EditableCheckpoint, StoredTensor
from tests.support.synthetic import RELEASES, make_small
from v4quant_formats.engines import ENGINES
from v4quant_formats.model_config import ConfigError
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.preflight import Finding, Preflight, UnknownEngine, preflight

Converted = Callable[[str], Path]
ALL = ("vllm", "sglang", "transformers")
# What each output is for: the matrix of docs/serving.md.
GOOD: dict[str, tuple[str, ...]] = dict.fromkeys((*SCHEMES, *VARIANTS), ALL)
GOOD |= dict.fromkeys(("mxfp4", "fp8", "bf16"), (*ALL, "tensorrt-llm"))
GOOD |= {"nvfp4": ("vllm", "tensorrt-llm"), "nvfp4@sglang": ("sglang",)}
GOOD |= dict.fromkeys(
    [c for c in GOOD if c.startswith(("int2", "int3", "mxfp8", "mxfp4/"))],
    ("vllm", "transformers"),
)
GOOD |= dict.fromkeys([c for c in GOOD if c.endswith("@vllm")], ("vllm", "transformers"))
GOOD |= {"mxfp8": ("vllm",), "mxfp8@vllm": ("vllm",)}
GOOD |= dict.fromkeys([c for c in GOOD if c.endswith("@sglang")], ("sglang",))
PAIRS = [(case, engine) for case, engines in GOOD.items() for engine in engines]
BAD_PAIRS = [(c, e) for c in GOOD for e in ALL if e not in GOOD[c]]


def check(folder: Path, engine: str, **more: int) -> Preflight:
    with open_checkpoint(folder) as checkpoint:
        return preflight(checkpoint, engine, **more)


def wrong(found: Preflight) -> list[Finding]:
    return [f for f in found.findings if f.severity != "note"]


def alarms(found: Preflight) -> list[str]:
    return [f"{f.rule} {f.tensor}: {f.problem}" for f in wrong(found)]


@pytest.mark.parametrize(("case", "engine"), PAIRS)
def test_no_false_alarm_on_good_outputs(case: str, engine: str, converted: Converted) -> None:
    found = check(converted(case), engine)
    assert found.loads and not alarms(found), alarms(found)
    assert found.gpus and 1 in found.splits


@pytest.mark.parametrize(("case", "engine"), BAD_PAIRS)
def test_outputs_for_other_engines_are_refused(
    case: str, engine: str, converted: Converted
) -> None:
    found = check(converted(case), engine)
    assert not found.loads and not found.gpus
    assert all(f.remedy for f in found.findings)


@pytest.mark.parametrize("engine", [*ALL, "tensorrt-llm"])
@pytest.mark.parametrize("release", [r for r in RELEASES if not r.startswith("pro")])
def test_no_false_alarm_on_releases(release: str, engine: str, tmp_path: Path) -> None:
    found = check(make_small(tmp_path / release, release), engine)
    if (release, engine) == ("v41", "transformers"):
        assert [f.rule for f in wrong(found)] == ["release"] and not found.loads
        return
    assert found.loads and not alarms(found), alarms(found)


def seeded(defect: Defect, converted: Converted, folder: Path) -> Preflight:
    edited = EditableCheckpoint.read(converted(defect.case))
    defect.damage(edited)
    return check(edited.write(folder), defect.engine)


def test_there_are_enough_different_defects() -> None:
    assert len({d.name for d in DEFECTS}) == len(DEFECTS) >= 50
    assert {d.engine for d in DEFECTS} == {"vllm", "sglang", "transformers", "tensorrt-llm"}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_every_seeded_defect_is_found(defect: Defect, converted: Converted, tmp_path: Path) -> None:
    found = seeded(defect, converted, tmp_path)
    assert alarms(found), defect.name
    harmless = ("BF16", "promised", "left in an INT4", "another model's")
    if not any(word in defect.name for word in harmless) or "numbers" in defect.name:
        assert not found.loads, alarms(found)


@pytest.mark.parametrize("defect", MORE_DEFECTS, ids=lambda d: d.name)
def test_every_later_defect_is_found(defect: Defect, converted: Converted, tmp_path: Path) -> None:
    found = seeded(defect, converted, tmp_path)
    assert alarms(found), defect.name
    assert found.loads == (defect in WARNED), alarms(found)


@pytest.mark.parametrize("ratios", [[0, 4], []])
def test_truncated_ratios_are_refused(ratios: list[int], tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    edited.config["compress_ratios"] = ratios
    with pytest.raises(ConfigError, match="at least 4 layers"):
        check(edited.write(tmp_path), "vllm")


@pytest.mark.parametrize(
    "table",
    [
        {"modules_to_not_convert": ["lm_head", "model.layers.0.attn.wq_b"]},
        {"ignored_layers": ["layers.0.attn.wq_b"]},
    ],
)
def test_an_excluded_matrix_that_is_bf16_is_no_alarm(
    table: dict[str, list[str]], converted: Converted, tmp_path: Path
) -> None:
    edited = EditableCheckpoint.read(converted("mxfp4"))
    rows, columns = edited["layers.0.attn.wq_b.weight"].shape
    edited.remove("layers.0.attn.wq_b.scale")
    edited["layers.0.attn.wq_b.weight"] = StoredTensor(
        "BF16", (rows, columns), bytes(2 * rows * columns)
    )
    assert not check(edited.write(tmp_path / "without"), "vllm").loads
    edited.config["quantization_config"].update(table)
    found = check(edited.write(tmp_path / "with"), "vllm")
    assert found.loads and not alarms(found), alarms(found)


def test_findings_name_the_tensor_and_merge(converted: Converted, tmp_path: Path) -> None:
    defect = next(d for d in DEFECTS if d.name == "global scales of w1 and w3 differ")
    (finding,) = wrong(seeded(defect, converted, tmp_path / "a"))
    assert finding.tensor == "layers.1.ffn.experts.2.w3.weight_scale_2"
    assert "keep w1's" in finding.problem and finding.remedy
    defect = next(d for d in DEFECTS if d.name == "input_scale absent")
    (finding,) = wrong(seeded(defect, converted, tmp_path / "b"))
    assert finding.rule == "missing-part" and finding.count == 60


def test_splits_follow_heads_groups_and_scales(converted: Converted) -> None:
    assert check(converted("mxfp4"), "vllm").splits == (1, 2)  # two heads
    assert check(converted("int4-g128"), "vllm").splits == (1,)  # experts 128 wide
    found = check(converted("int4-g128"), "vllm", tp=2)
    assert not found.loads
    assert "multiple of 128" in found.findings[0].problem and "--tp 1" in found.findings[0].remedy


def test_memory_counts_shares_and_context(converted: Converted) -> None:
    folder = converted("mxfp4")
    one, two = (check(folder, "vllm", tp=n).memory for n in (1, 2))
    assert one is not None and two is not None
    with open_checkpoint(folder) as checkpoint:
        assert one.weights == checkpoint.nbytes
    assert one.weights / 2 < two.weights < one.weights
    short, longer = (check(folder, "tensorrt-llm", context=n).memory for n in (8192, 16384))
    assert short is not None and longer is not None and longer.weights == one.weights
    assert longer.kv_cache - short.kv_cache == 8192 * (128 * 2 // 4 * 2 + 128 * 2 // 128 + 2 * 64)
    decoded = check(folder, "transformers").memory
    assert decoded is not None and decoded.weights > 1.5 * one.weights


@pytest.mark.parametrize("kept", ["tokenizer.json", "tokenizer_config.json"])
def test_half_a_tokenizer_is_found(kept: str, converted: Converted, tmp_path: Path) -> None:
    folder = EditableCheckpoint.read(converted("mxfp4")).write(tmp_path)
    assert [f.severity for f in check(folder, "vllm").findings] == ["note"]
    (folder / kept).write_text("{}")
    (finding,) = check(folder, "vllm").findings
    assert finding.severity == "warning" and finding.tensor != kept
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    assert not check(folder, "vllm").findings


def test_gpus_and_containers(converted: Converted) -> None:
    with open_checkpoint(converted("mxfp4")) as checkpoint:
        bad = preflight(checkpoint, "vllm", gpu="sm86")
        assert not bad.loads and any("sm90" in f.problem for f in bad.findings)
        assert preflight(checkpoint, "transformers", gpu="sm86").loads
        for engine in ("llama.cpp", "onnxruntime"):
            found = preflight(checkpoint, engine)
            assert not found.loads and found.findings[0].rule == "container"
        with pytest.raises(UnknownEngine, match="vllm, sglang"):
            preflight(checkpoint, "vlllm")


@pytest.mark.parametrize("value", ["text", [], {"quant_method": 7}, {"quant_method": "fp8"}])
def test_foreign_quantization_configs_are_findings(value: object, tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    edited.config["quantization_config"] = value
    for engine in ALL:
        assert not check(edited.write(tmp_path / engine), engine).loads


def test_hostile_groups_do_not_crash(converted: Converted, tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(converted("int4-g32"))
    for number, groups in enumerate(
        (7, [], {"g": 3}, {"g": {"targets": 5}}, {"g": {"targets": ["re:("], "weights": []}})
    ):
        edited.config["quantization_config"]["config_groups"] = groups
        edited.config["quantization_config"]["ignore"] = number
        for engine in ALL:
            assert not check(edited.write(tmp_path / f"{number}{engine}"), engine).loads


def test_every_engine_has_rules_that_agree_with_its_tables() -> None:
    for engine in ENGINES.values():
        assert engine.name in ENGINES and engine.experts and engine.dense
        assert set(engine.wo_a) & set(engine.dense) or engine.container != "safetensors"
        json.dumps([r.key for r in engine.config])
