"""Solving while the streams pass: exports, resumption, rejection, and that it pays."""

from __future__ import annotations

import json
import secrets
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.model.numerics import NonFiniteActivation
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.rounding.measure import measured
from v4quant_calibration.rounding.solvers import optimal, rtn
from v4quant_calibration.solve.models import SolvedParams
from v4quant_calibration.solve.settings import SolveSettings
from v4quant_calibration.solve.solution import (
    SOLUTION_NAME,
    Solution,
    SolutionError,
    begin_solution,
    load_solution,
    stage_file,
)
from v4quant_calibration.solve.solve import SolveTarget, solve, solve_several
from v4quant_calibration.solve.stage_writer import StageWriter, remove_parts
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import FormatError
from v4quant_formats.model_config import load_model_config
from v4quant_formats.shard_files import LocalShards
from v4quant_formats.weight_reading import read_weight
from v4quant_formats.weights import find_weight
from v4quant_kernels.codec import dequantize
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.progress import Progress, SilentProgress
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import SCHEMES

TINY = Path(__file__).parents[2] / "data" / "tiny-a"
CONFIG = load_model_config(TINY)
STAGES = ["layers.0", "layers.1", "layers.2", "layers.3", "mtp.0"]
SCHEME = SCHEMES["int3-g64"]


def run(
    checkpoint: Checkpoint,
    windows: list[Tensor],
    folder: Path,
    settings: SolveSettings | None = None,
) -> Solution:
    chosen = settings or SolveSettings(SCHEME)
    return solve(checkpoint, CONFIG, windows, ForwardOptions(), 8, chosen, folder, SilentProgress())


@pytest.fixture(scope="module")
def solved(
    checkpoint: Checkpoint, windows: list[Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("solved") / "out"
    run(checkpoint, windows, folder).close()
    return folder


def test_every_expert_of_every_stage(checkpoint: Checkpoint, solved: Path) -> None:
    solution = load_solution(solved, checkpoint.digest())
    assert list(solution.stages) == STAGES and solution.scheme == SCHEME.name
    for stage in STAGES:
        for expert in range(CONFIG.n_routed_experts):
            for projection in ("w1", "w2", "w3"):
                module = f"{stage}.ffn.experts.{expert}.{projection}"
                source = read_weight(checkpoint, find_weight(checkpoint, module))
                found = solution.solved(module, SCHEME, source.shape)
                assert found is not None and found.scheme == SCHEME
                values = dequantize(source)
                error = measured(values, found).relative_rms
                # Worse than the best plain scales in the plain norm, but of the same size.
                assert error < 4 * optimal(source, SCHEME).relative_rms
                assert error != pytest.approx(rtn(source, SCHEME).relative_rms)
    assert solution.solved("layers.9.ffn.experts.0.w1", SCHEME, (1, 1)) is None
    assert solution.importance("layers.0.ffn.experts.0.w1") is not None
    with pytest.raises(SolutionError, match=r"as int3-g64.*not as int4-g32.*--solve int4-g32"):
        solution.solved("layers.0.ffn.experts.0.w1", SCHEMES["int4-g32"], source.shape)
    solution.close()


def test_resumes_where_it_stopped(
    checkpoint: Checkpoint, windows: list[Tensor], solved: Path, tmp_path: Path
) -> None:
    """Killed after two layers: those are kept, the rest comes out the same."""
    folder = tmp_path / "out"
    shutil.copytree(solved, folder)
    header = json.loads((folder / SOLUTION_NAME).read_bytes())
    del header["stages"]
    (folder / SOLUTION_NAME).write_text(json.dumps({**header, "finished": False}))
    for stage in STAGES[2:]:
        stage_file(folder, stage).unlink()
    with pytest.raises(SolutionError, match="unfinished; run the same calibrate command again"):
        load_solution(folder, checkpoint.digest())
    kept = stage_file(folder, STAGES[0]).stat().st_mtime_ns
    run(checkpoint, windows, folder).close()
    assert stage_file(folder, STAGES[0]).stat().st_mtime_ns == kept
    for file in solved.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_only_our_own_parts_are_removed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / SOLUTION_NAME).write_text('{"version": 1}')
    for name in ("notes.rank1.txt", "film.0123abcd.part"):
        (tmp_path / name).write_text("mine")
    for name in ("layers.0.safetensors.rank1", "layers.0.safetensors.0123abcd.part"):
        (tmp_path / name).write_text("left by a killed process")
    begin_solution(tmp_path, {"version": 1})
    remove_parts(tmp_path)
    left = {"notes.rank1.txt", "film.0123abcd.part", SOLUTION_NAME}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_batches_do_not_change_the_codes(
    checkpoint: Checkpoint, windows: list[Tensor], solved: Path, tmp_path: Path
) -> None:
    """The memory cap decides how many experts are solved at once, and nothing else."""
    run(checkpoint, windows, tmp_path / "small", SolveSettings(SCHEME, memory=1)).close()
    solution = load_solution(tmp_path / "small", checkpoint.digest())
    whole = load_solution(solved, checkpoint.digest())
    module = "layers.0.ffn.experts.1.w2"
    shape = find_weight(checkpoint, module).shape
    a, b = (s.solved(module, SCHEME, (shape[0], shape[1])) for s in (solution, whole))
    assert a is not None and b is not None
    same = (dequantize(a) == dequantize(b)).float().mean()
    assert float(same) > 0.99  # batched products may round ties apart
    solution.close()
    whole.close()


def test_propagation_is_a_switch(
    checkpoint: Checkpoint, windows: list[Tensor], solved: Path, tmp_path: Path
) -> None:
    """Without it the first expert-bearing layer's w1 is the same and later layers are not."""
    alone = run(checkpoint, windows, tmp_path / "out", SolveSettings(SCHEME, propagate=False))
    with_it = load_solution(solved, checkpoint.digest())
    same = {}
    for module in ("layers.0.ffn.experts.0.w1", "layers.3.ffn.experts.0.w1"):
        shape = find_weight(checkpoint, module).shape
        a, b = (s.solved(module, SCHEME, (shape[0], shape[1])) for s in (alone, with_it))
        assert a is not None and b is not None
        same[module] = torch.equal(dequantize(a), dequantize(b))
    assert list(same.values()) == [True, False]
    alone.close()
    with_it.close()


def test_provider_answers_solved_experts(checkpoint: Checkpoint, solved: Path) -> None:
    params, original = SolvedParams(checkpoint, solved), CheckpointParams(checkpoint)
    module = "layers.2.ffn.experts.3.w3"
    assert not torch.equal(params(module), original(module))
    for dense in ("layers.2.ffn.shared_experts.w1", "embed", "layers.2.ffn.gate"):
        assert torch.equal(params(dense), original(dense))
    params.close()


def test_experts_without_tokens_are_solved_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Three tokens of one id: most experts see nothing and get the pool's moments."""
    found = run(checkpoint, [torch.full((3,), 7)], tmp_path / "out")
    assert sum(count == 0 for *_, count in found.stats.starved()) > 5
    for expert in range(CONFIG.n_routed_experts):
        module = f"layers.0.ffn.experts.{expert}.w2"
        source = read_weight(checkpoint, find_weight(checkpoint, module))
        q = found.solved(module, SCHEME, source.shape)
        assert q is not None
        ratio = measured(dequantize(source), q).relative_rms / optimal(source, SCHEME).relative_rms
        assert ratio < 3
    found.close()


def test_nan_activations_are_named(
    checkpoint: Checkpoint,
    windows: list[Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer that computes NaN is named, and leaves no file to be taken for solved."""

    class Broken(CheckpointParams):
        def __call__(self, base: str, /) -> Tensor:
            value = super().__call__(base)
            return value * torch.nan if base == "layers.2.ffn_norm" else value

    monkeypatch.setattr("v4quant_calibration.solve.solve.CheckpointParams", Broken)
    for propagate in (True, False):
        folder = tmp_path / str(propagate)
        with pytest.raises(NonFiniteActivation, match=r"layers\.2"):
            run(checkpoint, windows[:1], folder, SolveSettings(SCHEME, propagate))
        assert stage_file(folder, "layers.1").exists()
        assert not [f.name for f in folder.iterdir() if "layers.2" in f.name]


def test_wrong_schemes_and_folders(
    checkpoint: Checkpoint, windows: list[Tensor], solved: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedScheme, match=r"nvfp4.*cannot be solved"):
        run(checkpoint, windows, tmp_path / "a", SolveSettings(SCHEMES["nvfp4"]))
    with pytest.raises(SolutionError, match="begun for another checkpoint, corpus or setting"):
        run(checkpoint, windows[:1], solved)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("")
    with pytest.raises(SolutionError, match="not empty"):
        run(checkpoint, windows, tmp_path / "b")
    with pytest.raises(SolutionError, match="was solved for another checkpoint"):
        load_solution(solved, "0" * 64)


def test_block_types(checkpoint: Checkpoint, windows: list[Tensor], tmp_path: Path) -> None:
    """GGUF's types, where rows fit none of 256 columns: the types that stand in for them."""
    settings = SolveSettings(SCHEMES["q3_k"], sweeps=2)
    with closing(run(checkpoint, windows, tmp_path / "out", settings)) as solution:
        assert solution.scheme == "q3_k"
        for projection in ("w1", "w2", "w3"):
            module = f"layers.1.ffn.experts.2.{projection}"
            source = read_weight(checkpoint, find_weight(checkpoint, module))
            q = solution.solved(module, SCHEMES["q4_0"], source.shape)
            assert q is not None and q.scheme.name == "q4_0"
            assert 0 < measured(dequantize(source), q).relative_rms < 0.3
        with pytest.raises(SolutionError, match=r"as q4_0.*not as q3_k"):
            solution.solved(module, SCHEMES["q3_k"], source.shape)


def test_schemes_by_module(checkpoint: Checkpoint, windows: list[Tensor], tmp_path: Path) -> None:
    """Only named modules are solved, each for its own scheme; the provider answers the rest."""
    down = [f"layers.1.ffn.experts.{e}.w2" for e in range(CONFIG.n_routed_experts)]
    gate_up = [
        f"layers.2.ffn.experts.{e}.{p}"
        for e in range(CONFIG.n_routed_experts)
        for p in ("w1", "w3")
    ]
    schemes = dict.fromkeys(down, SCHEMES["q4_0"]) | dict.fromkeys(gate_up, SCHEMES["q5_0"])
    settings = SolveSettings(SCHEMES["mxfp4"], sweeps=1, schemes=schemes)
    folder = tmp_path / "out"
    with closing(run(checkpoint, windows, folder, settings)) as solution:
        for module in ("layers.1.ffn.experts.0.w2", "layers.2.ffn.experts.0.w3"):
            shape = find_weight(checkpoint, module).shape
            assert solution.solved(module, schemes[module], (shape[0], shape[1])) is not None
        for module in (
            "layers.1.ffn.experts.0.w1",
            "layers.2.ffn.experts.0.w2",
            "layers.0.ffn.experts.0.w2",
        ):
            assert solution.solved(module, SCHEMES["q4_0"], (128, 128)) is None
    params, original = SolvedParams(checkpoint, folder), CheckpointParams(checkpoint)
    for module in ("layers.1.ffn.experts.0.w1", "layers.1.ffn.experts.0.w2"):
        same = torch.equal(params(module), original(module))
        assert same == (module not in schemes)
    params.close()
    others = SolveSettings(SCHEMES["mxfp4"], sweeps=1, schemes={down[0]: SCHEMES["q5_0"]})
    with pytest.raises(SolutionError, match="another checkpoint, corpus or setting"):
        run(checkpoint, windows, folder, others)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(version=99),
        lambda h: h.update(stages=3),
        lambda h: h.update(stages={"../evil": {}}),
        lambda h: h.update(stages={"": {}}),
        lambda h: h["stages"]["layers.0"].pop("sha256"),
        lambda h: h.update(scheme=7),
        lambda h: h.update(finished="yes"),
        lambda h: h.pop("source_digest"),
    ],
)
def test_damaged_headers(
    change: object, checkpoint: Checkpoint, solved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(solved, folder)
    header = json.loads((folder / SOLUTION_NAME).read_bytes())
    assert callable(change)
    change(header)
    (folder / SOLUTION_NAME).write_text(json.dumps(header))
    with pytest.raises(SolutionError, match="out"):
        load_solution(folder, checkpoint.digest())


def test_damaged_stage_files(checkpoint: Checkpoint, solved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(solved, folder)
    file = stage_file(folder, "layers.1")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match=r"layers\.1\.safetensors"):
        load_solution(folder, checkpoint.digest())
    file.unlink()
    with pytest.raises(FormatError, match=r"layers\.1\.safetensors"):
        load_solution(folder, checkpoint.digest())


def test_files_must_be_those_that_were_solved(
    checkpoint: Checkpoint, solved: Path, tmp_path: Path
) -> None:
    """A flipped bit, or two layers' files exchanged: refused when the first matrix is asked for,
    not packed, and not taken for a layer without codes."""

    def ask(folder: Path) -> QTensor | None:
        module = "layers.1.ffn.experts.2.w3"
        with closing(load_solution(folder, checkpoint.digest())) as solution:
            shape = find_weight(checkpoint, module).shape
            return solution.solved(module, SCHEME, (shape[0], shape[1]))

    folder = tmp_path / "out"
    shutil.copytree(solved, folder)
    assert ask(folder) is not None
    mine, other = stage_file(folder, "layers.1"), stage_file(folder, "layers.2")
    data = bytearray(mine.read_bytes())
    data[-1] ^= 1
    mine.write_bytes(data)
    with pytest.raises(SolutionError, match=r"layers\.1\.safetensors: is not the file"):
        ask(folder)
    mine.write_bytes(other.read_bytes())
    with pytest.raises(SolutionError, match=r"layers\.1\.safetensors: is not the file"):
        ask(folder)


class Bars(SilentProgress):
    """What a bar would show: label, total and how far it came."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def start(self, label: str, total: int, unit: str) -> None:
        self.told.append((label, total, 0))

    def advance(self, amount: int) -> None:
        label, total, done = self.told.pop()
        self.told.append((label, total, done + amount))


def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of all reads of the source's tensors from now on."""
    seen, read = list[int](), LocalShards.read_into

    def count(self: LocalShards, file: str, view: memoryview, offset: int, what: str) -> None:
        if self._folder == TINY:
            seen.append(view.nbytes)
        read(self, file, view, offset, what)

    monkeypatch.setattr(LocalShards, "read_into", count)
    return seen


@pytest.mark.parametrize("propagate", [True, False])
def test_several_targets_share_one_pass(
    propagate: bool,
    checkpoint: Checkpoint,
    windows: list[Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Codes of each are those it has alone; interrupted anywhere and resumed too."""
    windows, seen = windows[:1], bytes_read(monkeypatch)
    wanted = [SolveSettings(SCHEMES[s], propagate, sweeps=1) for s in ("int4-g128", "int2-g64")]
    for settings in wanted:
        run(checkpoint, windows, tmp_path / settings.scheme.name, settings).close()
    apart = sum(seen)
    targets = [SolveTarget(s, tmp_path / f"{s.scheme.name}-2") for s in wanted]

    def together(progress: Progress) -> None:
        for one in solve_several(
            checkpoint, CONFIG, windows, ForwardOptions(), 8, targets, progress
        ):
            one.close()

    closing_time, calls = StageWriter.close, secrets.randbelow(9) + 1
    print("interrupted at stage", calls)

    def interrupted(self: StageWriter) -> None:
        nonlocal calls
        calls -= 1
        if not calls:
            raise KeyboardInterrupt
        closing_time(self)

    with monkeypatch.context() as patch:
        patch.setattr(StageWriter, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            together(SilentProgress())
    seen.clear()
    bars = Bars()
    together(bars)
    assert sum(seen) < 0.85 * apart
    assert bars.told[-1][0] == "Solving" and all(total == done for _, total, done in bars.told)
    for target in targets:
        alone = tmp_path / target.settings.scheme.name
        names = {p.name for p in target.folder.iterdir()}
        assert names == {p.name for p in alone.iterdir()}
        for name in names:
            assert (target.folder / name).read_bytes() == (alone / name).read_bytes(), name
