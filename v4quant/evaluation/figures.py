"""Every figure of an evaluation, typed: what the JSON of `evaluate` holds, read in one place.

The classes are the JSON's objects and their fields its keys. What a run did not measure is None or
empty, so that whoever shows figures asks once. Numbers are floats, counts too, because a broken
checkpoint yields NaN. Files come from anywhere: `figures_from_dict` checks every kind, and nobody
behind it reads a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from v4quant_kernels.errors import V4QuantError

T = TypeVar("T")
Number = float | None


class ResultError(V4QuantError):
    """An object that is no evaluation."""


@dataclass(frozen=True)
class Facts:
    """A checkpoint: name, schemes of its experts, bytes of its files."""

    path: str = ""
    scheme: str = ""
    bytes: Number = None
    expert_bits_per_weight: Number = None


@dataclass(frozen=True)
class Band:
    """Tokens of which the reference's best guess had a probability in (low, high]."""

    low: Number = None
    high: Number = None
    tokens: Number = None
    kl_mean: Number = None
    top1_agreement: Number = None


@dataclass(frozen=True)
class Scores:
    """Means over scored tokens, in nats, shares or ratios; `_stderr`: one standard error, `_ci95`:
    the ends of a 95 % interval."""

    tokens: Number = None
    blocks: Number = None
    nll: Number = None
    perplexity: Number = None
    perplexity_stderr: Number = None
    reference_perplexity: Number = None
    reference_perplexity_stderr: Number = None
    perplexity_ratio: Number = None
    perplexity_ratio_stderr: Number = None
    perplexity_ratio_ci95: tuple[float, ...] = ()
    kl_mean: Number = None
    kl_mean_stderr: Number = None
    kl_mean_ci95: tuple[float, ...] = ()
    kl_median: Number = None
    kl_p90: Number = None
    kl_p99: Number = None
    kl_p999: Number = None
    kl_max: Number = None
    top1_agreement: Number = None
    top5_agreement: Number = None
    flips_weighted: Number = None
    flips_confident: Number = None
    confident_tokens: Number = None
    delta_p_mean: Number = None
    delta_p_rms: Number = None
    kl_by_confidence: tuple[Band, ...] = ()


@dataclass(frozen=True)
class PartScores(Scores):
    """One file of the text."""

    name: str = ""


@dataclass(frozen=True)
class FloorScores(Scores):
    """A noise floor, and all that ran: the reference again under another rounding."""

    description: str = ""
    runs: tuple[FloorScores, ...] = ()


@dataclass(frozen=True)
class Stretch:
    """A piece of text that diverges most: its number, part, window and first token, its words."""

    block: Number = None
    part: str = ""
    window: Number = None
    start: Number = None
    tokens: Number = None
    kl_mean: Number = None
    floor_kl_mean: Number = None
    kl_max: Number = None
    text: str = ""


@dataclass(frozen=True)
class VerdictFigures:
    """Grade, whether above the floor (None: cannot be told), sentences for people.

    everywhere, in_places: chances that rounding alone looks like this; places: stretches of
    `blocks` that stand out; worst: those with the largest mean KL.
    """

    grade: str = ""
    above_floor: bool | None = None
    everywhere: Number = None
    in_places: Number = None
    places: Number = None
    blocks: Number = None
    text: str = ""
    worst: tuple[Stretch, ...] = ()


@dataclass(frozen=True)
class DefectFigures:
    """A matrix that looks damaged, and why."""

    where: str = ""
    problem: str = ""


@dataclass(frozen=True)
class WeightGroup:
    """Matrices whose relative errors were compared with each other, and the one with the largest;
    expected: the error of coding the median matrix by the same scheme."""

    stage: str = ""
    where: str = ""
    scheme: str = ""
    matrices: Number = None
    mean: Number = None
    median: Number = None
    largest: Number = None
    worst: str = ""
    expected: Number = None


@dataclass(frozen=True)
class LayerFigures:
    """One layer: relative errors, choices that stayed, and the worst matrix and expert."""

    name: str = ""
    kind: str = ""
    stream_relative_error: Number = None
    local_relative_error: Number = None
    router_agreement: Number = None
    index_agreement: Number = None
    weight_relative_rms: Number = None
    weight_largest: Number = None
    weight_worst: str = ""
    expert_output_median: Number = None
    expert_output_largest: Number = None
    expert_output_worst: str = ""
    expert_gain: Number = None
    expert_gain_stderr: Number = None


@dataclass(frozen=True)
class Histogram:
    """Tokens by log10 of their KL."""

    log10_edges: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()
    floor_counts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Fed:
    """Tokens that each expert of a layer was given."""

    name: str = ""
    tokens_per_expert: tuple[float, ...] = ()


@dataclass(frozen=True)
class Starved:
    """An expert that saw fewer tokens than the floor."""

    layer: str = ""
    expert: str = ""
    tokens: Number = None


@dataclass(frozen=True)
class Coverage:
    """What the experts saw of a text."""

    measured_on: str = ""
    floor: Number = None
    layers: tuple[Fed, ...] = ()
    starved: tuple[Starved, ...] = ()


@dataclass(frozen=True)
class DraftShares:
    """How often a draft guessed right; positions: by the guess's place in its block."""

    target_agreement: Number = None
    target_agreement_stderr: Number = None
    text_agreement: Number = None
    text_agreement_stderr: Number = None
    accepted_length: Number = None
    accepted_length_stderr: Number = None
    by_position: tuple[float, ...] = ()
    confidence_by_position: tuple[float, ...] = ()


@dataclass(frozen=True)
class Draft:
    """Draft stages before and after, and what noise changes; `note`: why there are no figures."""

    tokens: Number = None
    block_size: Number = None
    note: str = ""
    reference: DraftShares = DraftShares()
    candidate: DraftShares = DraftShares()
    change: Number = None
    change_stderr: Number = None
    noise_change: Number = None
    noise_change_stderr: Number = None
    accepted_length_change: Number = None
    accepted_length_change_stderr: Number = None
    noise_accepted_length_change: Number = None
    noise_accepted_length_change_stderr: Number = None


@dataclass(frozen=True)
class Depth:
    """Loss of the hidden sentence's answer; depth None: without the sentence."""

    depth: Number = None
    tokens: Number = None
    reference_nll: Number = None
    nll: Number = None
    floor_change: Number = None


@dataclass(frozen=True)
class Needle:
    """A sentence hidden in windows of `seq_len` tokens."""

    seq_len: Number = None
    depths: tuple[Depth, ...] = ()


@dataclass(frozen=True)
class SavedReference:
    """Logits that stood for the reference."""

    file: str = ""
    checkpoint: str = ""
    top_k: Number = None
    kl: str = ""


@dataclass(frozen=True)
class Tool:
    """Versions, the command (one string, or its words), and who multiplies float32."""

    version: str = ""
    torch: str = ""
    python: str = ""
    command: str | tuple[str, ...] = ""
    float32_products: str = ""


_SHARED = (
    "reference", "sequences", "seq_len", "skipped_rows", "activations", "products", "device",
    "tool", "reference_logits", "noise_floor", "coverage",
)  # fmt: skip


@dataclass(frozen=True)
class Figures(Scores):
    """One candidate's figures and what it shares with `others`, further candidates of the run.

    findings: None where weights were not compared.
    """

    candidate: Facts = Facts()
    reference: Facts = Facts()
    sequences: Number = None
    seq_len: Number = None
    skipped_rows: Number = None
    activations: str = ""
    products: str = ""
    device: str = ""
    tool: Tool = Tool()
    reference_logits: SavedReference = SavedReference()
    noise_floor: FloorScores = FloorScores()
    verdict: VerdictFigures = VerdictFigures()
    findings: tuple[DefectFigures, ...] | None = None
    weights: tuple[WeightGroup, ...] = ()
    worst_stretches: tuple[Stretch, ...] = ()
    layers: tuple[LayerFigures, ...] = ()
    kl_histogram: Histogram = Histogram()
    coverage: Coverage = Coverage()
    corpora: tuple[PartScores, ...] = ()
    draft: Draft = Draft()
    needle: Needle = Needle()
    others: tuple[Figures, ...] = ()

    @property
    def everyone(self) -> tuple[Figures, ...]:
        """All candidates, each as it would be alone: with the run's reference and floor."""
        shared = {name: getattr(self, name) for name in _SHARED}
        return (replace(self, others=()), *(replace(other, **shared) for other in self.others))


def figures_from_dict(table: Mapping[str, Any]) -> Figures:
    """The figures of a result's JSON. Raises ResultError naming the field of a wrong kind."""
    try:
        return _object(Figures, table, "")
    except RecursionError:
        raise ResultError("the result is nested too deeply") from None


def _object(kind: type[T], table: Any, where: str) -> T:
    if not isinstance(table, Mapping):
        raise _wrong(where, table, "an object")
    hints = _hints(kind)
    assert is_dataclass(kind)
    given = {
        one.name: _value(hints[one.name], table[one.name], f"{where}.{one.name}".strip("."))
        for one in fields(kind)
        if table.get(one.name) is not None
    }
    return kind(**given)


_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def _value(kind: Any, value: Any, where: str) -> Any:
    """`value`, which is not None, as `kind`."""
    if get_origin(kind) is UnionType:
        choices = [k for k in get_args(kind) if k is not NoneType]
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        listed = [k for k in choices if get_origin(k) is tuple]
        kind = listed[0] if is_list and listed else choices[0]
    if get_origin(kind) is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise _wrong(where, value, "a list")
        inner = get_args(kind)[0]
        return tuple(_value(inner, each, f"{where}[{i}]") for i, each in enumerate(value))
    if kind is bool:
        if not isinstance(value, bool):
            raise _wrong(where, value, "true, false or null")
        return value
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(where, value, "a number")
        return _float(value, where)
    if kind is str:
        if isinstance(value, Mapping | list | tuple):
            raise _wrong(where, value, "a text")
        return str(value)
    return _object(kind, value, where)


def _float(value: float, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ResultError(f"result field '{where}' is a number beyond all measure") from None


def _wrong(where: str, value: Any, wanted: str) -> ResultError:
    told = f"result field '{where}'" if where else "the result"
    return ResultError(f"{told} is of type {type(value).__name__}, expected {wanted}")
