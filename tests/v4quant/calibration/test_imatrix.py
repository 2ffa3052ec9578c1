"""Importance matrices: what llama.cpp reads and writes, both ways, and beside a model."""

from __future__ import annotations

import secrets
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

import v4quant
from tests.support.conversion import TINY, convert
from v4quant.api.calibration import CalibrationResult
from v4quant.builtin import CALIBRATION
from v4quant.checks.verify import verify
from v4quant.conversion.calibrated import load_calibrated
from v4quant.recipe import Recipe, RecipeError
from v4quant_calibration.statistics.imatrix import load_imatrix
from v4quant_calibration.statistics.stats import Stats, StatsError, write_stats
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import FormatError
from v4quant_formats.gguf.imatrix import Inputs, read_imatrix, write_imatrix
from v4quant_formats.gguf.names import place_of
from v4quant_formats.model_config import ModelConfig, parse_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.errors import OptionError
from v4quant_kernels.progress import SilentProgress

TINY_V4 = Path(v4quant.__file__).parent / "data" / "tiny-v4"
LAYER, EXPERT = "layers.3", "layers.3.ffn.experts.5"


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return open_checkpoint(TINY_V4)


@pytest.fixture(scope="module")
def config(source: Checkpoint) -> ModelConfig:
    return parse_model_config(dict(source.config), "config.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CalibrationResult]:
    folder = tmp_path_factory.mktemp("imatrix")
    found = v4quant.calibrate(
        TINY_V4, folder / "stats.v4q", corpus=CALIBRATION, tokens=256, seq_len=128, min_tokens=1,
        imatrix=folder / "imatrix.gguf", progress=SilentProgress(),
    )  # fmt: skip
    return folder / "imatrix.gguf", found


def test_llama_cpps_reader_finds_every_matrix_it_would_quantize(
    made: tuple[Path, CalibrationResult], source: Checkpoint, config: ModelConfig
) -> None:
    path, found = made
    reader = GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_size"].contents() == 128
    tensors = {t.name: t for t in reader.tensors}
    names = {n.removesuffix(".in_sum2") for n in tensors if n.endswith(".in_sum2")}
    assert tensors.keys() == {n + s for n in names for s in (".in_sum2", ".counts")}
    trunk = {
        place.tensor
        for spec in source
        if spec.name.startswith("layers.")
        and ("attn.w" in spec.name or "compressor.w" in spec.name or "experts" in spec.name)
        and (place := place_of(spec.name.rpartition(".")[0], config.num_hidden_layers))
    }
    assert trunk <= names
    for projection in ("gate", "up", "down"):
        sums = tensors[f"blk.3.ffn_{projection}_exps.weight.in_sum2"]
        counts = tensors[f"blk.3.ffn_{projection}_exps.weight.counts"]
        stage = found.stats.stages[LAYER]
        wanted = stage.sums["w2" if projection == "down" else "w13"]
        # ggml lists dimensions last first: channels, then experts.
        assert list(sums.shape) == [wanted.shape[1], wanted.shape[0]]
        assert list(counts.shape) == [1, wanted.shape[0]]
        assert np.array_equal(sums.data, wanted.float().numpy())
        assert np.array_equal(counts.data.reshape(-1), stage.tokens.float().numpy())


def test_dense_inputs_are_those_the_experts_see(made: tuple[Path, CalibrationResult]) -> None:
    """Every token's row goes to the shared expert once and to top_k routed ones."""
    path, found = made
    seen = dict(read_imatrix(path))
    shared = seen["blk.3.ffn_up_shexp.weight"]
    stage = found.stats.stages[LAYER]
    tokens, top_k = float(shared.counts), int(stage.tokens.sum()) / float(shared.counts)
    assert tokens == found.tokens and top_k == round(top_k)
    torch.testing.assert_close(shared.sums[0], stage.sums["w13"].sum(0) / top_k, rtol=1e-6, atol=0)
    rows = seen["blk.3.attn_kv.weight"]
    assert torch.equal(rows.sums, seen["blk.3.attn_q_a.weight"].sums)
    assert float(rows.counts) == found.tokens


def test_own_file_comes_back_as_statistics(
    made: tuple[Path, CalibrationResult], source: Checkpoint, config: ModelConfig
) -> None:
    path, found = made
    stats = load_imatrix(path, config, source.digest(), 1)
    assert stats.stages.keys() >= {f"layers.{i}" for i in range(config.num_hidden_layers)}
    for module in (f"{EXPERT}.w1", f"{EXPERT}.w2", f"{LAYER}.attn.wo_b"):
        ours, theirs = found.stats.importance(module), stats.importance(module)
        assert ours is not None and theirs is not None
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)
    assert stats.input_amax(f"{EXPERT}.w1") is None, "llama.cpp's files have no magnitudes"


def _as_dat(path: Path, inputs: dict[str, Inputs], calls: int) -> Path:
    """What llama.cpp's save_imatrix_legacy writes of these."""
    data = struct.pack("<i", len(inputs))
    for name, found in inputs.items():
        counts = found.counts.unsqueeze(1)
        means = torch.where(counts > 0, found.sums / counts.clamp_min(1), 1.0)
        values = (means * calls).float().flatten()
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", calls, len(values)) + values.numpy().tobytes()
    path.write_bytes(data + struct.pack("<ii", calls, 4) + b"text")
    return path


@pytest.mark.parametrize("form", ["dat", "converted"])
def test_the_older_form_says_the_same(
    form: str, made: tuple[Path, CalibrationResult], source: Checkpoint, tmp_path: Path
) -> None:
    """As llama.cpp wrote it, and as its tool converts it: stacks in one row, one count. Tensors of
    other endings, which newer tools add, are overlooked."""
    inputs = dict(read_imatrix(made[0]))
    old = _as_dat(tmp_path / "imatrix.dat", inputs, 7)
    if form == "converted":
        writer = GGUFWriter(old := tmp_path / "imatrix.gguf_file", "")
        writer.add_type("imatrix")
        for name, found in read_imatrix(tmp_path / "imatrix.dat"):
            assert found.sums.shape == (1, inputs[name].sums.numel())
            for ending, values in (
                ("in_sum2", found.sums), ("in_sum", found.sums), ("counts", found.counts[:, None]),
            ):  # fmt: skip
                writer.add_tensor(f"{name}.{ending}", values.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    stats, _ = load_calibrated(source, old, Recipe("iq1_m"))
    assert isinstance(stats, Stats)
    seen = made[1].stats.stages[LAYER].tokens
    expert = f"{LAYER}.ffn.experts.{int(seen.argmax())}"
    for module in (f"{expert}.w1", f"{expert}.w2", f"{LAYER}.attn.wo_b"):
        ours, theirs = made[1].stats.importance(module), stats.importance(module)
        assert ours is not None and theirs is not None
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-12)
    tokens = stats.stages[LAYER].tokens
    assert torch.equal(tokens > 0, seen > 0) and int(tokens.max()) == stats.floor


def test_layers_nobody_saw(
    made: tuple[Path, CalibrationResult], source: Checkpoint, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A file of some layers, and experts without tokens."""
    inputs = {n: f for n, f in read_imatrix(made[0]) if not n.startswith("blk.3.")}
    name = "blk.2.ffn_down_exps.weight"
    inputs[name] = replace(inputs[name], sums=inputs[name].sums * 0)
    for matrix in ("gate", "up"):
        counts = torch.zeros_like(inputs[f"blk.1.ffn_{matrix}_exps.weight"].counts)
        counts[4] = 40
        inputs[f"blk.1.ffn_{matrix}_exps.weight"] = replace(
            inputs[f"blk.1.ffn_{matrix}_exps.weight"], counts=counts
        )
    write_imatrix(tmp_path / "i.gguf", inputs, ["x"], 1, 1)
    with pytest.raises(RecipeError, match=r"5 of 6 layers' experts, and iq1_m for layers.3 needs"):
        load_calibrated(source, tmp_path / "i.gguf", Recipe("iq1_m"))
    other = Recipe("iq1_m", schemes=(("layers.3.experts", "q2_k"),))
    stats, _ = load_calibrated(source, tmp_path / "i.gguf", other)
    assert "5 of 6 layers' experts; the others, from layers.3 on" in caplog.text
    assert stats is not None
    pooled = stats.importance("layers.1.ffn.experts.0.w1")
    assert pooled is not None and bool((pooled > 0).any())


def test_somebody_elses_file_weighs_errors(
    made: tuple[Path, CalibrationResult], source: Checkpoint, tmp_path: Path
) -> None:
    path, _ = made
    recipe = Recipe("q2_k", "gguf", dense="q2_k")
    stats, digest = load_calibrated(source, path, recipe)
    assert stats is not None and len(digest) == 64
    out, plain = tmp_path / "out", tmp_path / "plain"
    convert(TINY_V4, out, recipe, stats=stats)
    convert(TINY_V4, plain, recipe)
    assert verify(out, source, SilentProgress()).findings == ()
    with open_checkpoint(out) as weighed, open_checkpoint(plain) as even:
        for module in (f"{EXPERT}.w1", f"{LAYER}.attn.wo_b"):
            name = f"{module}.weight"
            assert not torch.equal(weighed.read(name), even.read(name)), module


def test_one_bit_needs_a_text(made: tuple[Path, CalibrationResult], source: Checkpoint) -> None:
    """Also of dense matrices, which importance matrices know and statistics do not."""
    folder = made[0].parent
    write_stats(folder / "stats.v4q", replace(made[1].stats, dense={}))
    dense = (("layers.1.dense", "iq1_s"),)
    for recipe in (
        Recipe("iq1_m"), Recipe("mxfp4", "gguf", dense="iq1_m"), Recipe("q2_k", schemes=dense),
        Recipe("q2_k", schemes=(("layers.0-2.down", "iq1_s"),)),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=r"iq1_.* run `v4quant calibrate SOURCE --out"):
            load_calibrated(source, None, recipe)
        assert load_calibrated(source, made[0], recipe)[0] is not None
        if recipe.dense or recipe.schemes == dense:
            with pytest.raises(RecipeError, match=r"experts only, .*--imatrix FILE"):
                load_calibrated(source, folder / "stats.v4q", recipe)
        else:
            assert load_calibrated(source, folder / "stats.v4q", recipe)[0] is not None
    for scheme in ("iq2_xxs", "q2_k"):
        load_calibrated(source, None, Recipe(scheme, "gguf", schemes=(("embed", "iq1_m"),)))


def test_a_file_beside_a_model_is_not_a_model(
    made: tuple[Path, CalibrationResult], tmp_path: Path
) -> None:
    convert(TINY, tmp_path / "out", Recipe("mxfp4", "gguf"))
    with open_checkpoint(tmp_path / "out") as alone:
        tensors = set(alone.tensors)
    shutil.copy(made[0], tmp_path / "out" / "imatrix.gguf")
    with open_checkpoint(tmp_path / "out") as beside:
        assert set(beside.tensors) == tensors
    (tmp_path / "only").mkdir()
    shutil.copy(made[0], tmp_path / "only" / "model.gguf")
    with pytest.raises(FormatError, match="give the model as the source"):
        open_checkpoint(tmp_path / "only")


def test_solved_inputs_are_no_importance_matrix(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="without --solve"):
        v4quant.calibrate(TINY_V4, tmp_path / "x", solve="q3_k", imatrix=tmp_path / "imatrix.gguf")


def _file(path: Path, sums: torch.Tensor, counts: torch.Tensor) -> Path:
    write_imatrix(path, {"blk.0.ffn_up_exps.weight": Inputs(sums, counts)}, ["x"], 1, 1)
    return path


def test_bad_files_are_refused(source: Checkpoint, config: ModelConfig, tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    experts, columns = config.n_routed_experts, config.hidden_size
    sums, counts = torch.rand(experts, columns, generator=generator), torch.ones(experts)

    def refuse(path: Path, match: str) -> None:
        with pytest.raises(StatsError, match=match):
            load_calibrated(source, path, Recipe("q2_k"))

    refuse(_file(tmp_path / "a", sums[:, 1:], counts), "made for another model")
    refuse(_file(tmp_path / "b", sums, counts), "covers no layer")
    damaged = sums.clone()
    damaged[3, 7] = float("nan")
    refuse(_file(tmp_path / "c", damaged, counts), "NaN")
    refuse(_file(tmp_path / "d", -sums, counts), "negative")
    writer = GGUFWriter(tmp_path / "e", "")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", sums.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuse(tmp_path / "e", "pairs")
    convert(TINY, tmp_path / "out", Recipe("mxfp4", "gguf"))
    (model,) = (tmp_path / "out").glob("tiny-*.gguf")
    refuse(model, "is not an importance matrix")
    inputs = {"blk.0.ffn_up_exps.weight": Inputs(sums, counts)}
    dat = _as_dat(tmp_path / "h", inputs, 3).read_bytes()
    refuse(tmp_path / "h", "covers no layer")
    (tmp_path / "i").write_bytes(dat[:-40])
    refuse(tmp_path / "i", "cannot be read as an importance matrix .*values.*get the file again")
    refuse(tmp_path, "is a folder without a solution")
    infinite = {"blk.0.ffn_up_exps.weight": Inputs(sums.fill_diagonal_(torch.inf), counts)}
    refuse(_as_dat(tmp_path / "j", infinite, 3), "NaN, infinity")
    whole = _file(tmp_path / "f", sums, counts).read_bytes()
    (tmp_path / "g").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path / "g", "incomplete")
