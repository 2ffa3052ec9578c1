"""What other tools store is a source: unquantized, mixed, packed, under other scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.conversion import TINY, convert, folder_bytes
from tests.support.other_tools import (
    coded_modules,
    decode,
    is_expert,
    pack_words,
    random_integers,
    stored,
    values_of,
)
from tests.support.shard_bytes import EditableCheckpoint, StoredTensor
from v4quant.builtin import resolve_source
from v4quant.checks.verify import verify
from v4quant.conversion.plan import make_plan
from v4quant.recipe import Recipe
from v4quant_formats.errors import WrongDtype
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_dense
from v4quant_formats.weights import find_weight
from v4quant_kernels.progress import SilentProgress

TARGETS = ("int4-g32", "nvfp4", "fp8", "bf16", "mxfp4")
EXPERT = "layers.2.ffn.experts.1.w2"
Change = Callable[[EditableCheckpoint], None]


def edited(folder: Path, *changes: Change) -> Path:
    checkpoint = EditableCheckpoint.read(TINY)
    for change in changes:
        change(checkpoint)
    return checkpoint.write(folder)


def records(out: Path) -> dict[str, dict[str, object]]:
    manifest = json.loads((out / "v4quant.json").read_text())
    return {r["module"]: r for r in manifest["tensors"]}


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, whatever file it is in."""
    checkpoint = EditableCheckpoint.read(folder)
    return {n: checkpoint[n].data for n in checkpoint.names}


@pytest.mark.parametrize("scheme", TARGETS)
def test_bf16_gives_what_the_release_gives(scheme: str, tmp_path: Path) -> None:
    source = edited(tmp_path / "bf16", decode)
    convert(source, tmp_path / "out", scheme)
    assert not verify(tmp_path / "out", source, SilentProgress()).findings
    convert(TINY, tmp_path / "release", scheme)
    assert weights(tmp_path / "out") == weights(tmp_path / "release")


def test_our_own_bf16_comes_back_as_the_release(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "bf16", "bf16")
    convert(tmp_path / "bf16", tmp_path / "back", "mxfp4")
    assert weights(tmp_path / "back") == weights(TINY)
    found = folder_bytes(tmp_path / "back")
    assert json.loads(found["config.json"]) == json.loads((TINY / "config.json").read_text())


def test_the_trained_model_comes_back_to_the_byte(tmp_path: Path) -> None:
    """Its rounding left groups and tiles whose scales the values alone do not tell."""
    source = resolve_source("builtin:tiny-v4")
    convert(source, tmp_path / "bf16", "bf16")
    convert(tmp_path / "bf16", tmp_path / "back", "mxfp4")
    assert weights(tmp_path / "back") == weights(source)
    assert any("scales" in r for r in records(tmp_path / "bf16").values())


def test_a_fine_tune_stays_exact_where_nobody_trained(
    tmp_path: Path, generator: torch.Generator
) -> None:
    def train(module: str, values: torch.Tensor) -> torch.Tensor:
        touched = module.startswith("layers.2.") and is_expert(module)
        noise = torch.randn(values.shape, generator=generator) * values.std() * 0.05
        return values + noise * touched

    def half(module: str) -> bool:
        return module.startswith("layers.2.") or ".wo_b" in module or ".w2" in module

    source = edited(tmp_path / "tuned", lambda c: decode(c, half, change=train))
    result = convert(source, tmp_path / "out", "mxfp4")
    assert not verify(tmp_path / "out", source, SilentProgress()).findings
    found = records(tmp_path / "out")
    lossy = {m for m, r in found.items() if not r["exact"]}
    assert lossy == {m for m in found if m.startswith("layers.2.") and is_expert(m)}
    recoded = {m for m, r in found.items() if r.get("grid") == "mxfp4"}
    assert recoded == {m for m in found if is_expert(m) and half(m)} - lossy
    assert result.lossy_tensors == len(lossy) > 0
    counts = json.loads((tmp_path / "out" / "v4quant.json").read_text())["experts"]
    assert counts["bf16"] == len(lossy)
    assert counts["bf16, values of mxfp4"] == len(recoded)
    assert sum(counts.values()) == sum(is_expert(m) for m in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("target", ["q4_k/gguf", "mxfp4/gguf", "nvfp4@sglang", "int3-g64"])
def test_mixed_dtypes(dtype: torch.dtype, target: str, tmp_path: Path) -> None:
    source = edited(
        tmp_path / "mixed", lambda c: decode(c, lambda m: sum(m.encode()) % 3 > 0, dtype)
    )
    convert(source, tmp_path / "out", target)
    assert not verify(tmp_path / "out", source, SilentProgress()).findings


def pack(
    checkpoint: EditableCheckpoint, tool: str, bits: int, rng: torch.Generator, **more: object
) -> dict[str, torch.Tensor]:
    """Experts as a tool's integers; their values by the tool's own formula."""
    values = {}
    for module in filter(is_expert, coded_modules(checkpoint)):
        rows, columns = values_of(checkpoint, module).shape
        scale = more.get("scale", torch.float16)
        assert isinstance(scale, torch.dtype)
        codes, zeros, scales = random_integers((rows, columns), bits, 32, scale, rng)
        groups = torch.arange(columns) // 32
        if more.get("index"):
            groups = groups[torch.randperm(columns, generator=rng)]
        checkpoint.remove(f"{module}.weight")
        checkpoint.remove(f"{module}.scale")
        parts: dict[str, torch.Tensor] = {}
        if tool == "compressed-tensors":
            parts["weight_packed"] = pack_words(codes, bits)
            parts["weight_scale"] = scales
            parts["weight_zero_point"] = pack_words(zeros.mT.contiguous(), bits).mT
            if more.get("shape", True):
                parts["weight_shape"] = torch.tensor([rows, columns])
            if more.get("index"):
                parts["weight_g_idx"] = groups.int()
        elif tool == "gptq":
            parts["qweight"] = pack_words(codes, bits).mT
            less = 0 if more.get("v2") else 1
            parts["qzeros"] = pack_words(zeros.mT.contiguous() - less, bits)
            parts["scales"] = scales.mT
            parts["g_idx"] = groups.int()
        else:
            order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

            def along(x: torch.Tensor) -> torch.Tensor:
                shuffled = x.view(x.shape[0], -1, 8)[..., order]  # noqa: B023
                return pack_words(shuffled.reshape(x.shape), 4)

            parts["qweight"] = along(codes.mT.contiguous())
            parts["qzeros"] = along(zeros.mT.contiguous())
            parts["scales"] = scales.mT
        for part, value in parts.items():
            checkpoint[f"{module}.{part}"] = stored(value)
        values[module] = (codes - zeros[:, groups]).float() * scales.float()[:, groups]
    return values


PACKS = [
    ("compressed-tensors", 4, {}),
    ("compressed-tensors", 3, {"scale": torch.bfloat16, "shape": False}),
    ("compressed-tensors", 8, {"scale": torch.float32, "index": True}),
    ("gptq", 4, {}),
    ("gptq", 4, {"v2": True, "index": True}),
    ("gptq", 3, {}),
    ("gptq", 8, {"index": True}),
    ("awq", 4, {}),
]


@pytest.mark.parametrize(("tool", "bits", "more"), PACKS, ids=str)
def test_integers_of_other_tools(
    tool: str, bits: int, more: dict[str, object], tmp_path: Path, generator: torch.Generator
) -> None:
    checkpoint = EditableCheckpoint.read(TINY)
    values = pack(checkpoint, tool, bits, generator, **more)
    if more.get("v2"):
        checkpoint.config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    source = checkpoint.write(tmp_path / "source")
    with open_checkpoint(source) as opened:
        for module, wanted in values.items():
            assert torch.equal(read_dense(opened, module), wanted), module
    convert(source, tmp_path / "out", "int8-g32")
    assert not verify(tmp_path / "out", source, SilentProgress()).findings
    found = {r["source"] for m, r in records(tmp_path / "out").items() if is_expert(m)}
    assert found == {f"int{bits}-g32 ({tool})"}


def replaced(module: str, **parts: torch.Tensor | StoredTensor) -> EditableCheckpoint:
    """The tiny checkpoint with other parts in place of a module's."""
    checkpoint = EditableCheckpoint.read(TINY)
    checkpoint.remove(f"{module}.weight")
    checkpoint.remove(f"{module}.scale")
    for part, value in parts.items():
        raw = stored(value) if isinstance(value, torch.Tensor) else value
        checkpoint[f"{module}.{part}"] = raw
    return checkpoint


def read_and_verified(checkpoint: EditableCheckpoint, wanted: torch.Tensor, folder: Path) -> None:
    """The expert has these values, and a conversion verifies against the independent decoder."""
    source = checkpoint.write(folder / "source")
    with open_checkpoint(source) as opened:
        assert torch.equal(read_dense(opened, EXPERT), wanted)
    convert(source, folder / "out", "int8-g32")
    assert not verify(folder / "out", source, SilentProgress()).findings


@pytest.mark.parametrize("group", [128, 32])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_int8_is_not_taken_for_pairs_of_fp4(
    group: int, asymmetric: bool, tmp_path: Path, generator: torch.Generator
) -> None:
    codes = torch.randint(-128, 128, (128, 128), generator=generator)
    zeros = torch.randint(-128, 128, (128, 128 // group), generator=generator) * asymmetric
    scales = torch.rand(128, 128 // group, generator=generator).bfloat16()

    def signed(x: torch.Tensor) -> StoredTensor:
        return StoredTensor("I8", tuple(x.shape), x.to(torch.int8).numpy().tobytes())

    parts = {"weight": signed(codes), "weight_scale": scales}
    if asymmetric:
        parts["weight_zero_point"] = signed(zeros)
    wide = [x.float().repeat_interleave(group, 1) for x in (zeros, scales)]
    read_and_verified(replaced(EXPERT, **parts), (codes - wide[0]) * wide[1], tmp_path)


def gptq(zeros: torch.Tensor, rng: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A GPTQ expert whose zero points are stored so, and its values if they mean 8."""
    codes, _, scales = random_integers((128, 128), 4, 32, torch.float16, rng)
    parts = {
        "qweight": pack_words(codes, 4).mT,
        "qzeros": pack_words(zeros.mT.contiguous(), 4),
        "scales": scales.mT,
    }
    return parts, (codes - 8).float() * scales.float().repeat_interleave(32, 1)


def test_symmetric_gptq_tells_how_zero_points_are_stored(
    tmp_path: Path, generator: torch.Generator
) -> None:
    for number in (7, 8):
        parts, wanted = gptq(torch.full((128, 4), number), generator)
        read_and_verified(replaced(EXPERT, **parts), wanted, tmp_path / str(number))
    parts, _ = gptq(torch.full((128, 4), 7), generator)
    checkpoint = replaced(EXPERT, **parts)
    said = checkpoint.config["quantization_config"] = {"quant_method": "gptq"}
    for key, value, text in (
        ("format", "gptq_v2", "checkpoint_format makes it 8"),
        ("checkpoint_format", "marlin", "'marlin', not gptq"),
    ):
        said[key] = value
        opened = open_checkpoint(checkpoint.write(tmp_path / key))
        with opened, pytest.raises(WrongDtype, match=text):
            read_dense(opened, EXPERT)


def test_gptq_may_say_its_version_in_a_file_of_its_own(
    tmp_path: Path, generator: torch.Generator
) -> None:
    zeros = torch.randint(1, 16, (128, 4), generator=generator)
    parts, middle = gptq(zeros, generator)
    scales = parts["scales"].mT.float().repeat_interleave(32, 1)
    checkpoint = replaced(EXPERT, **parts)
    checkpoint.config["quantization_config"] = {"quant_method": "gptq"}
    source = checkpoint.write(tmp_path)
    (source / "quantize_config.json").write_text('{"checkpoint_format": "gptq_v2"}')
    with open_checkpoint(source) as opened:
        found = read_dense(opened, EXPERT)
    wanted = middle - (zeros - 8).repeat_interleave(32, 1) * scales
    assert torch.allclose(found, wanted, atol=1e-6)


def test_an_index_of_minus_one_is_none(tmp_path: Path, generator: torch.Generator) -> None:
    codes, _, scales = random_integers((128, 128), 4, 32, torch.float16, generator)
    checkpoint = replaced(
        EXPERT, weight_packed=pack_words(codes, 4), weight_scale=scales,
        weight_shape=torch.tensor([128, 128]), weight_g_idx=torch.full((128,), -1).int(),
    )  # fmt: skip
    wanted = (codes - 8).float() * scales.float().repeat_interleave(32, 1)
    read_and_verified(checkpoint, wanted, tmp_path)


@pytest.mark.parametrize("names", [("weight", "weight_scale_2", 1e4),
                                   ("weight_packed", "weight_global_scale", 1e-4)])  # fmt: skip
def test_reciprocal_scales_are_refused(
    names: tuple[str, str, float], tmp_path: Path, generator: torch.Generator
) -> None:
    """NVFP4's second scale by the other tool's convention."""
    codes = torch.randint(0, 256, (128, 64), generator=generator).to(torch.uint8)
    blocks = (torch.rand(128, 8, generator=generator) * 400 + 20).to(torch.float8_e4m3fn)
    raw = StoredTensor("F8_E4M3", (128, 8), blocks.view(torch.uint8).numpy().tobytes())
    parts = {names[0]: codes, "weight_scale": raw, names[1]: torch.tensor([names[2]])}
    source = replaced(EXPERT, **parts).write(tmp_path / "source")
    with open_checkpoint(source) as opened, pytest.raises(WrongDtype, match="reciprocals"):
        read_dense(opened, EXPERT)
    with pytest.raises(WrongDtype, match=rf"{EXPERT}' would reach"):
        convert(source, tmp_path / "out", "int8-g32")


def test_a_pack_that_fits_no_layout_is_refused(tmp_path: Path, generator: torch.Generator) -> None:
    checkpoint = EditableCheckpoint.read(TINY)
    pack(checkpoint, "gptq", 4, generator)
    weight = checkpoint[f"{EXPERT}.qweight"]
    weight.shape = (weight.shape[1], weight.shape[0])  # compressed-tensors' codes under GPTQ's name
    source = checkpoint.write(tmp_path / "source")
    with open_checkpoint(source) as opened:
        with pytest.raises(WrongDtype, match=r"neither GPTQ's layout nor AWQ's"):
            find_weight(opened, EXPERT)
        with pytest.raises(WrongDtype, match=EXPERT):
            make_plan(opened, Recipe("int4-g32"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.2345])
def test_scales_in_float(factor: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """Powers of two are MXFP4 and FP8 as released; others are read as they are, and counted."""

    def widen(c: EditableCheckpoint) -> None:
        for module in coded_modules(c):
            scale = c[f"{module}.scale"]
            powers = torch.frombuffer(bytearray(scale.data), dtype=torch.uint8).double() - 127
            wide = torch.exp2(powers).view(scale.shape) * factor
            c.remove(f"{module}.scale")
            c[f"{module}.weight_scale_inv"] = stored(wide.to(dtype))

    source = edited(tmp_path / "source", widen)
    for scheme in ("mxfp4", "int8-g32", "bf16"):
        out = tmp_path / scheme
        result = convert(source, out, scheme)
        assert not verify(out, source, SilentProgress()).findings
        assert (result.lossy_tensors == 0) == (factor == 1.0)
    if factor == 1.0:
        assert weights(tmp_path / "mxfp4") == weights(TINY)


def test_integers_without_their_shape(tmp_path: Path) -> None:
    """config.json says it; what is copied then is what is compared."""
    convert(TINY, tmp_path / "first", "int4-g32")
    checkpoint = EditableCheckpoint.read(tmp_path / "first")
    for name in [n for n in checkpoint.names if n.endswith(".weight_shape")]:
        checkpoint.remove(name)
    source = checkpoint.write(tmp_path / "source")
    convert(source, tmp_path / "out", "int4-g32")
    assert not verify(tmp_path / "out", source, SilentProgress()).findings
    assert weights(tmp_path / "out") == weights(tmp_path / "first")


@pytest.mark.parametrize("first", ["nvfp4", "int4-g32", "int8-g128", "mxfp4/compressed-tensors"])
@pytest.mark.parametrize("second", ["int4-g64", "mxfp4", "nvfp4"])
def test_conversions_are_sources(first: str, second: str, tmp_path: Path) -> None:
    convert(TINY, tmp_path / "first", first)
    result = convert(tmp_path / "first", tmp_path / "second", second)
    assert not verify(tmp_path / "second", tmp_path / "first", SilentProgress()).findings
    if first != "int4-g32" and second == "mxfp4":
        assert result.lossy_tensors == 0
        assert weights(tmp_path / "second") == weights(TINY)


def test_w1_and_w3_share_an_nvfp4_scale_whatever_the_source_has(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "first", "nvfp4")
    checkpoint = EditableCheckpoint.read(tmp_path / "first")
    name = "layers.2.ffn.experts.1.w3.weight_scale_2"
    value = torch.frombuffer(bytearray(checkpoint[name].data), dtype=torch.float32)
    checkpoint[name].data = stored(value * 2).data
    source = checkpoint.write(tmp_path / "source")
    convert(source, tmp_path / "out", "nvfp4")
    assert not verify(tmp_path / "out", source, SilentProgress()).findings
    with open_checkpoint(tmp_path / "out") as out:
        scales = [out.read(name.replace("w3", w)) for w in ("w1", "w3")]
        assert torch.equal(*scales)
