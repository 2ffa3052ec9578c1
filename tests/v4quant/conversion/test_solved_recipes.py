"""From a recipe with places through a solution to a file: what is solved, packed and refused."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.support.usage import usage_error
from v4quant.builtin import TINY_V4
from v4quant.cli import cli
from v4quant.conversion.calibrated import load_calibrated, solved_part
from v4quant.recipe import Recipe, RecipeError, recipe_from_table
from v4quant.source import open_source, resolve_source
from v4quant_calibration.solve.solution import load_solution
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weight_reading import read_weight
from v4quant_formats.weights import find_weight
from v4quant_kernels.scheme import SCHEMES

TEXT = """
scheme = "mxfp4"
format = "gguf"
draft = "drop"

[schemes]
"layers.5.dense" = "q4_k"
"layers.5.compressor" = "q6_k"
"head" = "q3_k"
"embed" = "q5_k"
"""
SOLVED = {
    "layers.5.attn.wq_a": "q4_k", "layers.5.attn.wq_b": "q5_0", "layers.5.attn.wo_a": "q4_k",
    "layers.5.ffn.shared_experts.w2": "q4_k", "layers.5.attn.compressor.wgate": "q6_k",
    "head": "q3_k",
}  # fmt: skip


def run(*arguments: object) -> str:
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "r.toml").write_text(TEXT)
    text = (
        "--tokens",
        1024,
        "--seq-len",
        256,
        "--min-tokens",
        1,
        "--corpus",
        "builtin:calibration",
    )
    run("calibrate", TINY_V4, "--recipe", folder / "r.toml", "--out", folder / "solved", *text)
    return folder


def test_the_file_has_the_solutions_codes(folder: Path) -> None:
    """A recipe without a solver packs the solution it is given; the rest is the encoder's."""
    out = folder / "out"
    run("quantize", TINY_V4, out, "--recipe", folder / "r.toml", "--stats", folder / "solved")
    manifest = json.loads((out / "v4quant.json").read_bytes())
    assert manifest["recipe"]["solver"] == "gptq"
    run("quantize", TINY_V4, folder / "plain", "--recipe", folder / "r.toml")
    with open_source(resolve_source(TINY_V4)) as source:
        solution = load_solution(folder / "solved", source.digest())
    with open_checkpoint(out) as mine, open_checkpoint(folder / "plain") as plain:
        for module, scheme in SOLVED.items():
            q, other = (read_weight(c, find_weight(c, module)) for c in (mine, plain))
            codes = solution.solved(module, SCHEMES[scheme], q.shape)
            assert codes is not None and torch.equal(codes.codes, q.codes), module
            assert not torch.equal(q.codes, other.codes), module
        embed, other = (read_weight(c, find_weight(c, "embed")) for c in (mine, plain))
        assert torch.equal(embed.codes, other.codes)
    solution.close()
    run("verify", out, "--source", TINY_V4)


def test_solutions_for_other_recipes_are_refused(folder: Path) -> None:
    recipe = recipe_from_table({**tomllib.loads(TEXT), "solver": "gptq"}, "r.toml")
    with open_source(resolve_source(TINY_V4)) as source:
        evidence, digest = load_calibrated(source, folder / "solved", recipe)
        assert evidence is not None and digest
        for table in ({"schemes": {"head": "q3_k"}}, {"dense": "q8_0"}):
            changed = recipe_from_table({**tomllib.loads(TEXT), "solver": "gptq", **table}, "x")
            if "dense" in table:  # dense matrices without a line were not solved: any type will do
                load_calibrated(source, folder / "solved", changed)
                continue
            with pytest.raises(RecipeError, match="for other dense types or"):
                load_calibrated(source, folder / "solved", changed)
    assert solved_part(recipe) == solved_part(recipe_from_table(tomllib.loads(TEXT), "x"))


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(TEXT)
    base = ["calibrate", TINY_V4, "--out", str(tmp_path / "x")]
    for wrong in (["--recipe", str(tmp_path / "r.toml"), "--solve", "q3_k"], ["--dense", "q4_k"]):
        assert usage_error(CliRunner().invoke(cli, [*base, *wrong]))
    (tmp_path / "exact.toml").write_text('scheme = "mxfp4"\nformat = "gguf"\n')
    exact = CliRunner().invoke(cli, [*base, "--recipe", str(tmp_path / "exact.toml")])
    assert exact.exit_code != 0
    with pytest.raises(RecipeError, match="integers and GGUF's block types"):
        Recipe("mxfp4", "gguf", solver="gptq")
    assert Recipe("mxfp4", "gguf", dense="q4_k", solver="gptq").solver == "gptq"
