"""The typed result: the figures of the JSON under names, and nothing taken for an evaluation."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import v4quant
from tests.support.conversion import TINY, convert
from v4quant.evaluation.figures import figures_from_dict
from v4quant.evaluation.result import Evaluation, ResultError, evaluation_from_dict


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Two conversions of the tiny checkpoint beside it."""
    folder = tmp_path_factory.mktemp("result")
    for scheme in ("int8-g32", "int2-g64"):
        convert(TINY, folder / scheme, scheme)
    ids = Path(TINY).parent / "tiny-a.reference.safetensors"
    return v4quant.evaluate(
        folder / "int2-g64",
        reference=TINY,
        candidates=[folder / "int8-g32"],
        corpus=ids,
        draft=True,
    )


def test_names_hold_the_figures(found: Evaluation) -> None:
    table = found.as_dict()
    assert found.distance is not None and found.floor is not None and found.verdict is not None
    assert found.distance.kl_mean == table["kl_mean"] > found.floor.kl_mean >= 0
    assert found.floor.kl_mean == table["noise_floor"]["kl_mean"]
    assert found.verdict.text == table["verdict"]["text"]
    assert found.perplexity.value == table["perplexity"]
    assert found.reference is not None and found.reference.path == table["reference"]["path"]
    assert found.findings == () and not found.is_damaged
    small, large = found.candidates
    assert small.candidate.scheme == "int2-g64" and large.candidate.scheme == "int8-g32"
    assert large.distance is not None and large.distance.kl_mean < found.distance.kl_mean


def test_it_survives_json(found: Evaluation) -> None:
    again = evaluation_from_dict(json.loads(json.dumps(found.as_dict())))
    assert again == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": "many"}, "not an evaluation"),
        ({"candidate": {}}, "'path' of a checkpoint is missing"),
        ({"noise_floor": 3}, "not an evaluation"),
        ({"others": [1]}, r"field 'others\[0\]' is of type int, expected an object"),
        ({"tokens": None}, "'tokens' is missing"),
        ({"tokens": 10**400}, "beyond all measure"),
        ({"perplexity_stderr": None}, "'perplexity_stderr' is missing"),
    ],
)
def test_other_objects_are_refused(found: Evaluation, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ResultError, match=message):
        evaluation_from_dict({**found.as_dict(), **change})


def test_every_figure_of_the_json_has_a_name(found: Evaluation) -> None:
    """What is added to the JSON is added to the tree."""

    def missing(table: Any, typed: Any, where: str) -> set[str]:
        if isinstance(table, list) and isinstance(typed, tuple):
            return {m for a, b in zip(table, typed, strict=True) for m in missing(a, b, where)}
        if not isinstance(table, dict) or not is_dataclass(typed):
            return set()
        names = {f.name for f in fields(typed)}
        own = {f"{where}{key}" for key in table.keys() - names}
        return own.union(*(missing(table[k], getattr(typed, k), f"{where}{k}.")
                           for k in table.keys() & names))  # fmt: skip

    assert not missing(found.as_dict(), found.figures, "")


def test_each_candidate_gets_the_result_as_its_own() -> None:
    """With the floor and the reference that all share, and nobody's other candidates."""
    floor, others = {"kl_mean": 1}, [{"kl_mean": 3}, {"kl_mean": 4, "layers": [{"name": "a"}]}]
    result = {"noise_floor": floor, "kl_mean": 2, "reference": {"path": "x"}, "others": others}
    alone = [{k: v for k, v in result.items() if k != "others"} | own for own in ({}, *others)]
    assert figures_from_dict(result).everyone == tuple(map(figures_from_dict, alone))


def test_nested_without_end_is_refused() -> None:
    table: dict[str, Any] = {}
    for _ in range(5000):
        table = {"others": [table]}
    with pytest.raises(ResultError, match="nested too deeply"):
        evaluation_from_dict(table)


def test_without_a_reference() -> None:
    ids = Path(TINY).parent / "tiny-a.reference.safetensors"
    alone = v4quant.evaluate(TINY, corpus=ids)
    assert alone.distance is alone.floor is alone.verdict is alone.findings is None
    assert alone.perplexity.value > 1 and not alone.is_damaged
