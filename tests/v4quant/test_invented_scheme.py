"""A number format is one row: a made-up one goes through the program as it is registered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.conversion import convert
from v4quant.builtin import HELDOUT, resolve_corpus
from v4quant.checks.verify import verify
from v4quant.evaluation.evaluate import evaluate_checkpoint
from v4quant.recipe import Recipe, RecipeError
from v4quant_calibration.corpus.corpus import Corpus, CorpusRequest, load_corpus
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.rounding.coders import coder_of
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.layouts.table import LAYOUTS, choose_layout
from v4quant_formats.model_config import parse_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.weights import find_weight
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.ggml_types import GGML_TYPES, GgmlType, block_type
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import SCHEMES, Scheme, register

TINY_V4 = Path(__file__).parents[2] / "v4quant" / "data" / "tiny-v4"
EXPERT = "layers.0.ffn.experts.0.w1"


@pytest.fixture
def invented() -> Iterator[Scheme]:
    """Three bits in groups of 32, which the table does not have."""
    row = Scheme(
        "odd3-g32", "int", 3, (1, 32), "bf16", formats=("compressed-tensors",),
        keeps_negative_zero=False, coder="integer",
    )  # fmt: skip
    yield register(row)
    del SCHEMES[row.name]


def _text(checkpoint: Checkpoint) -> Corpus:
    config = parse_model_config(dict(checkpoint.config), "config.json")
    request = CorpusRequest(128, 128, config.bos_token_id, config.vocab_size)
    return load_corpus(resolve_corpus([HELDOUT]), TINY_V4 / "tokenizer.json", request)


def test_an_invented_scheme_is_planned_written_verified_and_evaluated(
    invented: Scheme, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = convert(TINY_V4, out, Recipe(invented.name))
    assert result.scheme == invented.name and result.format == "compressed-tensors"
    assert verify(out, open_checkpoint(TINY_V4), SilentProgress()).findings == ()
    with open_checkpoint(TINY_V4) as source, open_checkpoint(out) as converted:
        stored = find_weight(converted, EXPERT)
        assert stored.scheme == invented
        words = stored.parts["weight_packed"].nbytes * 8 / (stored.shape[0] * stored.shape[1])
        assert words == 3
        found = evaluate_checkpoint(
            converted, source, _text(source), ForwardOptions(), SilentProgress()
        )
    assert 0 < found["kl_mean"] < 0.05
    assert found["candidate"]["expert_bits_per_weight"] == pytest.approx(3.5, abs=0.01)


def test_the_invented_schemes_facts_are_asked_everywhere(invented: Scheme) -> None:
    assert invented.name in LAYOUTS["compressed-tensors"].schemes
    assert choose_layout(invented, None).name == "compressed-tensors"
    assert coder_of(invented).scheme is invented
    assert Recipe(invented.name, solver="gptq").solver == "gptq"
    with pytest.raises(RecipeError, match="keep"):
        Recipe(invented.name, on_inexact="keep")


def test_a_type_of_ggufs_registered_late_is_known_everywhere() -> None:
    kind = GgmlType("q9_x", 99, 64, 74, 9, "q8_0", 99, "block")
    try:
        scheme = register(kind)
        assert scheme.bits_per_weight == 9.25
        assert not scheme.keeps_negative_zero and scheme.coder == "block"
        assert "q9_x" in LAYOUTS["gguf"].schemes and "q9_x" in LAYOUTS["gguf"].dense_types
        assert block_type("Q9_X") is kind and block_type("q9_x") is None
        fallback = scheme.fitting(32)
        assert fallback is not None and fallback.name == "q8_0"
        assert scheme.fitting(128) is scheme and scheme.fitting(8) is None
        assert LAYOUTS["gguf"].expert_parts(scheme, (4, 128)) == {"weight": ("Q9_X", (4, 148))}
    finally:
        del GGML_TYPES["q9_x"], SCHEMES["q9_x"]


def test_a_name_is_taken_once(invented: Scheme) -> None:
    with pytest.raises(UnsupportedScheme, match="already"):
        register(invented)
