"""The evaluation report: complete, escaped, honest about gaps, drawn inside its frame."""

from __future__ import annotations

import json
import math
import random
import re
import secrets
import sys
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from v4quant.evaluation import report
from v4quant.evaluation.figures import ResultError, figures_from_dict
from v4quant.evaluation.report import decision
from v4quant.evaluation.report.decision import Decision, distinct_names, recommendations
from v4quant.evaluation.report.svg import even_ticks, log_axis
from v4quant.evaluation.report.text import (
    ReportError,
    escape_markdown,
    plain,
    size,
    with_error,
)
from v4quant.visible import visible

HOSTILE = "</pre><script>alert('x')</script>\"'&<img src=http://evil/ onerror=x>\u202e|`*_\n\x00"
VOID = {"meta", "br", "img", "input", "hr", "link"}


def render_html(result: dict[str, Any]) -> str:
    return report.render_html(figures_from_dict(result))


def render_markdown(result: dict[str, Any]) -> str:
    return report.render_markdown(figures_from_dict(result))


def decisions(result: dict[str, Any]) -> list[Decision]:
    return decision.decisions(figures_from_dict(result))


class Page(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def seeded() -> random.Random:
    seed = secrets.randbits(32)
    sys.stdout.write(f"seed {seed}\n")
    return random.Random(seed)


def measures(draw: random.Random, scale: float) -> dict[str, Any]:
    kl = {k: scale * draw.uniform(0.1, 1) for k in ("kl_mean", "kl_median", "kl_p90", "kl_p99")}
    return {
        "nll": draw.uniform(2, 4),
        "perplexity": draw.uniform(20, 60),
        "perplexity_stderr": draw.uniform(0.1, 1),
        **kl,
        "kl_mean_stderr": scale / 100,
        "kl_p999": scale * draw.uniform(2, 4),
        "kl_max": scale * draw.uniform(5, 9),
        "top1_agreement": draw.uniform(0.8, 1),
        "top5_agreement": draw.uniform(0.9, 1),
        "kl_mean_ci95": [scale * draw.uniform(0.1, 0.4), scale * draw.uniform(0.5, 0.9)],
        "perplexity_ratio_ci95": [draw.uniform(0.9, 1), draw.uniform(1, 1.1)],
        "flips_weighted": draw.uniform(0, 0.1),
        "flips_confident": draw.uniform(0, 0.1),
        "delta_p_rms": draw.uniform(0, 0.1),
        "kl_by_confidence": [
            {"low": 0.0, "high": 0.5, "tokens": 4321, "kl_mean": scale * draw.uniform(1, 9),
             "top1_agreement": draw.uniform(0.5, 1)},
            {"low": 0.5, "high": 1.0, "tokens": 5432, "kl_mean": scale * draw.uniform(1, 9),
             "top1_agreement": draw.uniform(0.5, 1)},
        ],
    }  # fmt: skip


def layer(draw: random.Random, name: str, kind: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "stream_relative_error": draw.uniform(0.001, 0.2),
        "local_relative_error": draw.uniform(0.001, 0.2),
        "router_agreement": draw.uniform(0.5, 1),
        "weight_relative_rms": draw.uniform(0.01, 0.2),
        "weight_largest": draw.uniform(0.2, 0.4),
        "weight_worst": f"{draw.randrange(16)}.w2",
        "index_agreement": draw.uniform(0.5, 1) if kind == "csa" else None,
        "expert_output_median": draw.uniform(0.01, 0.2),
        "expert_output_largest": draw.uniform(0.2, 0.4),
        "expert_output_worst": draw.randrange(16),
    }


def drafts(draw: random.Random) -> dict[str, Any]:
    return {
        "target_agreement": draw.uniform(0.2, 0.9),
        "target_agreement_stderr": 0.02,
        "text_agreement": draw.uniform(0.2, 0.9),
        "text_agreement_stderr": 0.02,
        "accepted_length": draw.uniform(1, 4),
        "accepted_length_stderr": 0.05,
        "by_position": [draw.uniform(0.2, 0.9) for _ in range(5)],
        "confidence_by_position": [draw.uniform(0.2, 0.9) for _ in range(5)],
    }


def sample(draw: random.Random, layers: int = 6, experts: int = 16) -> dict[str, Any]:
    kinds = ["swa", "swa", *(["csa", "hca"] * layers)][:layers]
    fed = [[draw.randrange(4000) for _ in range(experts)] for _ in kinds]
    starved = [
        {"layer": f"layers.{i}", "expert": e, "tokens": t}
        for i, row in enumerate(fed)
        for e, t in enumerate(row)
        if t < 300
    ]
    described = [layer(draw, f"layers.{i}", kind) for i, kind in enumerate(kinds)]
    return {
        "tool": {"version": "9.8.7", "torch": "2.77", "python": "3.99", "command": "v4quant x y"},
        "reference": {
            "path": "models/original",
            "scheme": "mxfp4",
            "bytes": draw.randrange(10**9, 10**12),
            "expert_bits_per_weight": 4.25,
        },
        "candidate": {
            "path": "models/converted",
            "scheme": "int3-g64",
            "bytes": draw.randrange(10**9, 10**12),
            "expert_bits_per_weight": 3.25,
        },
        "tokens": draw.randrange(10**4, 10**6),
        "sequences": draw.randrange(33, 99),
        "seq_len": draw.randrange(333, 999),
        "activations": "official",
        "reference_perplexity": draw.uniform(20, 60),
        "reference_perplexity_stderr": draw.uniform(0.1, 1),
        **measures(draw, 0.01),
        "noise_floor": {"description": "same weights, other rounding", **measures(draw, 1e-5)},
        "verdict": {"above_floor": True, "text": "Clearly worse than the floor."},
        "layers": [*described, layer(draw, "mtp.0", "mtp")],
        "kl_histogram": {
            "log10_edges": [-8 + 0.5 * i for i in range(19)],
            "counts": [draw.randrange(1000) for _ in range(18)],
            "floor_counts": [draw.randrange(1000) for _ in range(18)],
        },
        "coverage": {
            "floor": 300,
            "layers": [
                {"name": f"layers.{i}", "tokens_per_expert": row} for i, row in enumerate(fed)
            ],
            "starved": starved,
        },
        "blocks": 7,
        "findings": [
            {"where": "layers.3.ffn.experts.*.w1", "problem": "error 1.4; looks swapped with w3"},
            {"where": "layers.4.ffn.experts.2.w2", "problem": "multiplied by 2"},
        ],
        "weights": [{"where": "layers.3.ffn.experts.*.w1", "matrices": 16}],
        "reference_logits": {
            "file": "/data/logits.safetensors",
            "checkpoint": "/data/Flash",
            "top_k": 64,
            "kl": "lower bound",
        },
        "draft": {
            "tokens": 4321,
            "block_size": 5,
            "reference": drafts(draw),
            "candidate": drafts(draw),
            "change": draw.uniform(-0.1, 0.1),
            "change_stderr": 0.01,
            "noise_change": 0.0123,
            "noise_change_stderr": 0.0045,
            "noise_accepted_length_change": 0.0678,
            "noise_accepted_length_change_stderr": 0.0034,
            "accepted_length_change": draw.uniform(-0.5, 0.5),
            "accepted_length_change_stderr": 0.03,
        },
        "needle": {
            "seq_len": 65536,
            "depths": [
                {
                    "depth": depth,
                    "tokens": 9,
                    "reference_nll": draw.uniform(0.1, 2),
                    "nll": draw.uniform(0.1, 2),
                    "floor_change": draw.uniform(-0.1, 0.1),
                }
                for depth in (0.0, 0.25, 0.5, 0.75, 1.0, None)
            ],
        },
        "corpora": [
            {
                "name": "heldout-prose",
                "tokens": 8765,
                "perplexity": draw.uniform(20, 60),
                "reference_perplexity": draw.uniform(20, 60),
                "kl_mean": draw.uniform(0.001, 0.01),
                "top1_agreement": draw.uniform(0.8, 1),
            }
        ],
    }


def drawings(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(s) for s in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def check_drawing(svg: ElementTree.Element) -> None:
    """Every coordinate is finite and inside the viewBox, labels with their estimated width."""
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    seen = 0
    for element in svg.iter():
        a = element.attrib
        xs = [float(a[k]) for k in ("x", "x1", "x2", "cx") if k in a]
        ys = [float(a[k]) for k in ("y", "y1", "y2", "cy") if k in a]
        if "width" in a:
            assert float(a["width"]) >= 0 and float(a["height"]) >= 0, a
            xs.append(xs[0] + float(a["width"]))
            ys.append(ys[0] + float(a["height"]))
        for pair in a.get("points", "").split():
            x, y = pair.split(",")
            xs.append(float(x))
            ys.append(float(y))
        if element.tag == "text":
            long = 6.2 * len(element.text or "")
            share = {"start": 0.0, "middle": 0.5, "end": 1.0}[a["text-anchor"]]
            xs += [xs[0] - share * long, xs[0] + (1 - share) * long]
            ys.append(ys[0] - 9)
        assert all(math.isfinite(x) and -0.05 <= x <= width + 0.05 for x in xs), (a, element.text)
        assert all(math.isfinite(y) and -0.05 <= y <= height + 0.05 for y in ys), (a, element.text)
        seen += len(xs)
    assert seen > 10


def test_every_number_appears() -> None:
    result = sample(seeded())
    page, markdown = Page(render_html(result)).text, render_markdown(result)
    floor, corpus = result["noise_floor"], result["corpora"][0]
    expected = [f"{result[k]:,}" for k in ("tokens", "sequences", "seq_len")]
    for part in (result, floor):
        assert with_error(part["perplexity"], part["perplexity_stderr"]) in page
        assert with_error(part["kl_mean"], part["kl_mean_stderr"]) in page
        expected.append(plain(part["kl_p99"], 3))
        expected += [plain(part[k], 3) for k in ("kl_median", "kl_p90", "kl_p999", "kl_max")]
        expected += [f"{100 * part[k]:.2f} %" for k in ("top1_agreement", "top5_agreement")]
    for checkpoint in (result["reference"], result["candidate"]):
        expected += [f"{checkpoint['bytes']:,}", size(checkpoint["bytes"]), checkpoint["path"]]
        expected += [checkpoint["scheme"], plain(checkpoint["expert_bits_per_weight"])]
    for one in result["layers"]:
        expected += [plain(one["local_relative_error"], 3), plain(one["weight_relative_rms"], 3)]
        expected += [plain(one["stream_relative_error"], 3), one["name"]]
        expected.append(f"{100 * one['router_agreement']:.2f} %")
        if one["index_agreement"] is not None:
            expected.append(f"{100 * one['index_agreement']:.2f} %")
        for kind in ("weight", "expert_output"):
            expected.append(f"{plain(one[f'{kind}_largest'], 3)} ({one[f'{kind}_worst']})")
    expected += [f"{one['expert']} ({one['tokens']})" for one in result["coverage"]["starved"]]
    expected += ["heldout-prose", "8,765", plain(corpus["perplexity"]), plain(corpus["kl_mean"], 3)]
    draft = result["draft"]
    for side in (draft["reference"], draft["candidate"]):
        for key in ("by_position", "confidence_by_position"):
            expected += [f"{100 * share:.2f} %" for share in side[key]]
        expected.append(with_error(side["accepted_length"], side["accepted_length_stderr"]))
    expected.append(f"{100 * draft['change']:+.2f} ± 1.00 points")
    expected += ["+1.23 ± 0.45 points", "0.0678 ± 0.0034"]
    expected += ["9.8.7", "2.77", "3.99", "v4quant x y", "Clearly worse than the floor."]
    for value in expected:
        assert value in page, value
        assert value in markdown, value
    for band in (*result["kl_by_confidence"], *floor["kl_by_confidence"]):
        assert plain(band["kl_mean"], 3) in page
    for part in (result, floor):
        shares = [part[k] for k in ("flips_weighted", "flips_confident", "delta_p_rms")]
        assert all(f"{100 * share:.2f} %" in page for share in shares)
        for key in ("kl_mean_ci95", "perplexity_ratio_ci95"):
            assert f"{plain(part[key][0])} to {plain(part[key][1])}" in page
    assert "only 7 blocks" in page
    before = with_error(result["reference_perplexity"], result["reference_perplexity_stderr"])
    assert before in page and before in markdown
    counts = result["kl_histogram"]["counts"]
    assert all(f"{c:,} tokens" in page for c in counts)


def test_defects_stand_at_the_top() -> None:
    result = sample(seeded())
    page, markdown = render_html(result), render_markdown(result)
    for finding in result["findings"]:
        assert page.index(finding["problem"]) < page.index("Summary")
        assert markdown.index(finding["problem"]) < markdown.index("kl\\_mean")
    assert "Suspected defects (2)" in page and "Suspected defects (2)" in markdown
    clean = render_html({**result, "findings": []})
    assert "No defect found in the weights of 16 matrices" in clean
    assert "Suspected" not in clean and "Suspected" not in render_markdown({"findings": []})
    assert "No defect" not in render_html(_without(result, "findings"))


def several(draw: random.Random, count: int = 3) -> dict[str, Any]:
    """A run of `count` candidates with two floors and a draft."""
    result = sample(draw)
    floors = [{"description": f"run {i}", **measures(draw, 1e-5)} for i in range(2)]
    result["noise_floor"]["runs"] = floors
    shares = ("target_agreement", "text_agreement")
    sides = {
        side: {k: draw.random() for key in shares for k in (key, f"{key}_stderr")}
        for side in ("reference", "candidate")
    }
    result["draft"] = {"tokens": 99, "change": -0.0123, "change_stderr": 0.0045, **sides}
    result["others"] = []
    for i in range(1, count):
        other = sample(draw)
        other["candidate"]["path"] = f"models/other-{i}"
        del other["noise_floor"], other["coverage"], other["reference"], other["tool"]
        result["others"].append(other)
    return result


def test_every_candidate_appears() -> None:
    result = several(seeded())
    html, markdown = render_html(result), render_markdown(result)
    page = Page(html).text
    for part in (result, *result["others"]):
        name = part["candidate"]["path"].removeprefix("models/")
        for text in (page, markdown):
            assert name in text and size(part["candidate"]["bytes"]) in text
            assert with_error(part["kl_mean"], part["kl_mean_stderr"]) in text
        ratio = part["kl_mean"] / result["noise_floor"]["kl_mean"]
        assert f"{plain(ratio, 2)} × floor" in page
    assert "Suspected defects (6)" in page and page.count("models/other-2") == 2
    for run in result["noise_floor"]["runs"]:
        assert run["description"] in page and plain(run["kl_p99"], 3) in page
    assert "-1.23 ± 0.45" in page and "Draft stage" in page and "Draft stage" in markdown
    share = result["draft"]["reference"]
    both = f"{100 * share['text_agreement']:.2f} ± {100 * share['text_agreement_stderr']:.2f} %"
    assert both in page
    assert "no classic" in Page(render_html({"draft": {"note": "no classic stage"}})).text


def test_points_lie_where_size_and_kl_say() -> None:
    draw = seeded()
    for count in (2, 3, 9):
        result = several(draw, count)
        parts = [result, *result["others"]]
        if count == 9:
            parts[3]["kl_mean"] = 0.0
            parts[4]["kl_mean"] = math.nan
            parts[5]["candidate"]["bytes"] = parts[6]["candidate"]["bytes"]
            parts[5]["kl_mean"] = parts[6]["kl_mean"]
        svg, narrow = drawings(render_html(result))[:2]
        check_drawing(svg)
        check_drawing(narrow)
        found = {
            e[0].text.split(":")[0]: (float(e.attrib["cx"]), float(e.attrib["cy"]))
            for e in svg.iter("circle")
        }
        assert len(found) == count
        for one in parts:
            for other in parts:
                a, b = (found[p["candidate"]["path"].removeprefix("models/")] for p in (one, other))
                if one["candidate"]["bytes"] > other["candidate"]["bytes"]:
                    assert a[0] >= b[0]
                if one["kl_mean"] > other["kl_mean"]:
                    assert a[1] <= b[1]
        labels = [
            (float(e.attrib["x"]), float(e.attrib["y"]))
            for e in svg.iter("text")
            if (e.text or "").startswith(("other-", "converted"))
        ]
        assert len(set(labels)) == count
    equal = several(draw, 2)
    equal["others"][0]["candidate"]["bytes"] = equal["candidate"]["bytes"] = 0
    check_drawing(drawings(render_html(equal))[0])


def test_hostile_strings_stay_text() -> None:
    """Every string of the result is hostile, and only the report's own elements come out."""
    draw = seeded()
    clean = several(draw)

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v if k == "kind" else poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return HOSTILE + value if isinstance(value, str) else value

    page = render_html(poison(clean))
    parsed, plain_page = Page(page), Page(render_html(clean))
    assert {t for t, _ in parsed.tags} == {t for t, _ in plain_page.tags}
    assert {k for _, a in parsed.tags for k in a} == {k for _, a in plain_page.tags for k in a}
    assert visible(HOSTILE) in parsed.text
    assert not {"\x00", "\u202e"} & set(page)
    page.encode("utf-8")
    for svg in drawings(page):
        check_drawing(svg)
    markdown = render_markdown(poison(clean))
    tables = [row for row in markdown.split("\n") if row.startswith("|")]
    for row in tables:
        assert "<" not in row
        assert not re.search(r"(?<!\\)[`*_\[]", row)
    width = {len(re.findall(r"(?<!\\)\|", row)) for row in tables if "layers" in row}
    assert len(width) <= 4  # findings, layers, their experts, starved experts


def test_command_cannot_leave_its_fence() -> None:
    markdown = render_markdown({"tool": {"command": ["v4quant", "a b", "```\n# not a heading"]}})
    assert markdown.startswith("``````\nv4quant 'a b' '```\\u000a# not")


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (6, 16), (43, 256), (61, 384)])
def test_drawings_stay_inside(layers: int, experts: int) -> None:
    page = render_html(sample(seeded(), layers, experts))
    found = drawings(page)
    assert len(found) == 2 * 3  # wide and narrow
    for number, svg in enumerate(found):
        check_drawing(svg)
        assert (float(svg.attrib["viewBox"].split()[2]) <= 360) == bool(number % 2)
        assert svg.attrib["aria-label"]


def test_extreme_values_are_drawn_and_named() -> None:
    draw = seeded()
    result = sample(draw)
    result["layers"][0]["local_relative_error"] = 0.0
    result["layers"][1]["local_relative_error"] = math.nan
    result["layers"][2]["stream_relative_error"] = math.inf
    result["layers"][3]["stream_relative_error"] = 1e-30
    result["perplexity"] = math.inf
    result["kl_mean"] = math.nan
    page = render_html(result)
    for svg in drawings(page):
        check_drawing(svg)
    told = Page(page).text
    assert "0 exact" in told and "not finite" in told
    assert "NaN" in told and "infinite" in told


def test_lossless_result_has_no_error_plot_but_says_zero() -> None:
    result = {"layers": [{"name": "layers.0", "local_relative_error": 0.0}], "kl_mean": 0.0}
    page = render_html(result)
    assert "<svg" not in page
    assert '<td data-label="Local relative error">0</td>' in page


def test_missing_parts_are_left_out() -> None:
    draw = seeded()
    full = sample(draw)
    titles = {
        "layers": "Error per layer",
        "kl_histogram": "Divergence per token",
        "coverage": "Expert coverage",
        "corpora": "Parts of the evaluation text",
        "verdict": "Clearly worse than the floor.",
        "noise_floor": "Noise floor",
    }
    assert all(title in render_html(full) for title in titles.values())
    for key, title in titles.items():
        for page in (render_html({**full, key: None}), render_html(_without(full, key))):
            Page(page)
            assert title not in page
            assert not re.search(r">(None|nan|NaN|null)<", page)
    bare = Page(render_html({"perplexity": 12.5}))
    assert "12.50" in bare.text
    assert "svg" not in {t for t, _ in bare.tags}
    Page(render_html({}))
    assert render_markdown({}).strip() == ""


def test_no_outside_resources_and_no_scripts() -> None:
    parsed = Page(render_html(sample(seeded())))
    assert not {t for t, _ in parsed.tags} & {"script", "link", "img", "iframe", "object", "a"}
    names = {k for _, a in parsed.tags for k in a}
    assert not names & {"src", "href", "style", "srcset", "data"}
    assert not {k for k in names if k.startswith("on")}
    assert "url(" not in parsed.text


def test_starved_experts_are_marked_in_the_strip() -> None:
    coverage = {
        "floor": 10,
        "layers": [{"name": "layers.0", "tokens_per_expert": [5, 1000, 9, 40, 10]}],
    }
    svg, _ = drawings(render_html({"coverage": coverage}))
    strip = [e for e in svg.iter("rect") if len(e)]
    starved = [e for e in strip if e.attrib["class"] == "starved"]
    assert [e[0].text for e in starved] == ["layers.0: 2 experts with 5 to 9 tokens each"]
    total = sum(float(e.attrib["width"]) for e in strip)
    assert math.isclose(float(starved[0].attrib["width"]), total * 2 / 5, abs_tol=0.2)


def test_histogram_heights_are_shares() -> None:
    draw = seeded()
    counts = [draw.randrange(1, 100) for _ in range(9)]
    histogram = {"log10_edges": list(range(-8, 2)), "counts": counts}
    svg, _ = drawings(render_html({"kl_histogram": histogram}))
    bars = [float(e.attrib["height"]) for e in svg.iter("rect") if len(e)]
    for height, tokens in zip(bars, counts, strict=True):
        assert math.isclose(height / max(bars), tokens / max(counts), abs_tol=0.002)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kl_mean", "0.1"),
        ("perplexity", True),
        ("layers", {"a": 1}),
        ("layers", ["x"]),
        ("candidate", []),
        ("verdict", {"above_floor": "yes"}),
        ("kl_histogram", {"log10_edges": [0, 1], "counts": [1, 2]}),
        ("kl_histogram", {"log10_edges": [0, 1, 1], "counts": [1, 2]}),
        ("kl_histogram", {"log10_edges": [-math.inf, 0, 1], "counts": [1, 2]}),
        ("kl_histogram", {"log10_edges": [-1, 0, 1], "counts": [1, math.nan]}),
        ("coverage", {"layers": [{"name": "n", "tokens_per_expert": [-1]}]}),
        ("others", [{"candidate": 3}]),
        ("others", "x"),
        ("findings", [3]),
        ("draft", []),
        ("noise_floor", {"runs": [1]}),
    ],
)
def test_wrong_kinds_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises((ReportError, ResultError), match=r"result field|kl_histogram|coverage"):
        render_html({"reference": {"path": "x"}, field: value})


def test_survives_the_json_round_trip() -> None:
    result = sample(seeded())
    assert render_html(json.loads(json.dumps(result))) == render_html(result)


def test_number_texts() -> None:
    assert [plain(v, 3) for v in (0.0, 0.00881, 4e-5, 45.66, 1234.5, -2.5e9)] == [
        "0",
        "0.00881",
        "4.00e-5",
        "45.7",
        "1,234",
        "-2.50e9",
    ]
    assert plain(None) == "" and plain(math.nan) == "NaN"
    assert with_error(45.6612, 0.9123) == "45.66 ± 0.91"
    assert with_error(4.04e-5, 4.2e-7) == "(4.040 ± 0.042)e-5"
    assert with_error(2e-8, 3e-7) == "(0.2 ± 3.0)e-7"
    assert with_error(1234.5, 123.4) == "1,234 ± 123"
    assert with_error(0.0, 0.0) == "0"
    assert size(20_717_676) == "20.72 MB"
    assert escape_markdown("a|b`<x>www.z") == "a\\|b\\`&lt;x&gt;www\\.z"


def test_axes() -> None:
    draw = seeded()
    for _ in range(200):
        values = [10 ** draw.uniform(-12, 6) for _ in range(draw.randrange(1, 9))]
        axis = log_axis(values, 300.0, 20.0)
        assert all(20 - 1e-6 <= axis(v) <= 300 + 1e-6 for v in values)
        assert all(20 - 1e-6 <= axis(v) <= 300 + 1e-6 for v, _ in axis.ticks())
        top = 10 ** draw.uniform(-3, 3)
        ticks = even_ticks(top)
        assert ticks[0] == 0 and top <= ticks[-1] * (1 + 1e-9) and 2 <= len(ticks) <= 7


def _without(result: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k != key}


def three() -> dict[str, Any]:
    """Three candidates: the second is larger and worse than the first, the third small and bad."""

    def part(path: str, nbytes: int, kl: float, grade: str) -> dict[str, Any]:
        verdict = {"above_floor": True, "grade": grade, "text": f"{path} is {grade}."}
        stretch = {
            "part": "prose", "window": 3, "start": 512, "tokens": 511, "kl_mean": kl,
            "floor_kl_mean": 1e-4, "kl_max": 2.0, "text": f"words of {path} {HOSTILE}",
        }  # fmt: skip
        return {
            "candidate": {"path": path, "bytes": nbytes, "scheme": "q4_k"},
            "kl_mean": kl, "verdict": verdict, "worst_stretches": [stretch], "findings": [],
            "layers": [{"name": "layers.0", "local_relative_error": kl, "kind": "swa"}],
        }  # fmt: skip

    first = part("/a/out", 100, 0.001, "small")
    others = [part("/b/out", 120, 0.002, "small"), part("/c/out", 60, 0.09, "damaged")]
    return {**first, "noise_floor": {"kl_mean": 1e-4}, "others": others}


def test_candidates_go_by_the_part_of_their_path_that_differs() -> None:
    assert distinct_names(["/a/out", "/b/out"]) == ["a/out", "b/out"]
    assert distinct_names([r"C:\\models\\x", "/models/y"]) == ["x", "y"]


def test_a_dominated_candidate_is_marked_and_the_front_is_recommended() -> None:
    found = {d.name: d for d in decisions(three())}
    assert found["b/out"].dominated_by == "a/out"
    assert not found["a/out"].dominated_by and not found["c/out"].dominated_by
    lines = recommendations(decisions(three()))
    assert len(lines) == 2
    assert "a/out" in lines[0] and "c/out (damaged)" in lines[1] and "not for 100" in lines[1]
    damaged = three() | {"findings": [{"where": "layers.0", "problem": "scales doubled"}]}
    assert not any("a/out" in line for line in recommendations(decisions(damaged)))


def test_every_candidate_has_verdict_charts_and_its_worst_text() -> None:
    result = three()
    html = render_html(result)
    page = Page(html)
    for name in ("a/out", "b/out", "c/out"):
        assert f"{name}." in html and f"Where {name} diverges most" in html
    assert html.count("<svg") == 2 * 4  # sizes, and each one's layers, wide and narrow
    ids = {attrs.get("id") for _, attrs in page.tags}
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert links == {f"#worst-{n}" for n in (1, 2, 3)} and {x[1:] for x in links if x} <= ids
    assert "<script" not in html
    assert html.count("words of /a/out") == 1


def test_the_worst_text_keeps_its_lines() -> None:
    result = three()
    result["worst_stretches"][0]["text"] = "one\n\tif <two>\x1b[31m\nthree"
    html = render_html(result)
    assert "<pre>one\n    if &lt;two&gt;\\u001b[31m\nthree</pre>" in html


def test_on_a_narrow_screen_every_value_has_its_columns_name() -> None:
    html = render_html(three())
    cells = re.findall(r"<td([^>]*)>([^<]*)</td>", html)
    named = [a for a, _ in cells if "data-label" in a]
    assert len(named) > 10 and "max-width:640px" in html
    assert 'data-label="KL mean (nats)"' in html


def test_unusual_figures_are_explained_in_a_sentence() -> None:
    result = three() | {"kl_p99": 1.167, "noise_floor": {"kl_mean": 1e-4, "kl_p99": 0.001}}
    html = render_html(result)
    assert "One in 100 tokens has a KL of 1.2 nats or more, 1,167 times" in html
    assert "What the words mean" in html
