"""The card: valid metadata, measured numbers only, hostile names harmless."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.support.conversion import convert
from v4quant.evaluation.figures import figures_from_dict
from v4quant.hub.errors import HubError
from v4quant.publishing.card import CardRequest, license_of, render_card
from v4quant.publishing.serving import accepted_engines
from v4quant.recipe import Recipe
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.preflight import Preflight

REPO = "tester/V4-Tiny-INT4"
ENGINES_ACCEPTED: list[Preflight] = []


@pytest.fixture(scope="module")
def manifest(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(model_folder, out, "int4-g64")
    found: dict[str, Any] = json.loads((out / "v4quant.json").read_bytes())
    with open_checkpoint(out) as checkpoint:
        ENGINES_ACCEPTED[:] = accepted_engines(checkpoint)
    found["source"] |= {"repo": "maker/V4-Tiny", "revision": "a" * 40, "license": "mit"}
    return found


def shard_bytes(manifest: dict[str, Any]) -> int:
    return sum(f["bytes"] for f in manifest["files"] if f["name"].endswith(".safetensors"))


def evaluation_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """An evaluation with numbers that occur nowhere else."""
    return {
        "candidate": {"path": "out", "bytes": shard_bytes(manifest), "scheme": "int4-g64"},
        "reference": {"path": "src", "bytes": 987654321, "scheme": "mxfp4"},
        "tokens": 31337, "activations": "plain", "perplexity": 7.7123, "reference_perplexity": 7.6,
        "kl_mean": 0.012345, "top1_agreement": 0.9731,
        "noise_floor": {"kl_mean": 1.25e-06, "top1_agreement": 0.9999, "description": "bf16 noise"},
        "verdict": {"text": "Above the floor, and small.", "above_floor": True},
    }  # fmt: skip


def test_metadata_is_what_the_hub_reads(manifest: dict[str, Any]) -> None:
    card = ModelCard(render_card(manifest, CardRequest(REPO)))
    data = card.data.to_dict()
    assert data["base_model"] == "maker/V4-Tiny" and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers" and data["license"] == "mit"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["deepseek_v4", "int4", "int4-g64", "compressed-tensors", "v4quant"]


def test_what_a_reader_must_decide_on(manifest: dict[str, Any]) -> None:
    request = CardRequest(
        REPO, figures_from_dict(evaluation_of(manifest)), engines=tuple(ENGINES_ACCEPTED)
    )
    text = render_card(manifest, request)
    records = manifest["tensors"]
    total = sum(f["bytes"] for f in manifest["files"])
    assert f"{total / 1e6:.1f} MB in {len(manifest['files'])} files" in text
    for part in (
        "7.712", "0.0123", "97.31", "1.25e-6", "31,337 scored tokens", "Above the floor",
        f"Of {len(records):,} modules", 'scheme = "int4-g64"', f"vllm serve {REPO}",
        f"SGLANG_DSV4_FP4_EXPERTS=0 python -m sglang.launch_server --model-path {REPO}",
        f'from_pretrained("{REPO}"', "hf://maker/V4-Tiny@" + "a" * 40, "routed experts",
        "v4quant verify published", "no Jinja chat template",
    ):  # fmt: skip
        assert part in text, part
    losses = [r["relative_rms"] for r in records if not r["exact"]]
    assert f"{max(losses):.4f} at worst" in text
    classes = sum(c["bytes_out"] for c in manifest["classes"])
    headers = shard_bytes(manifest) - classes
    assert 0 < headers < 0.02 * classes, "the classes are all of the tensors"


def test_the_recipe_on_the_card_is_the_recipe(manifest: dict[str, Any], tmp_path: Path) -> None:
    from v4quant.recipe import read_toml, recipe_from_table

    text = render_card(manifest, CardRequest(REPO))
    (tmp_path / "recipe.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    table = read_toml(tmp_path / "recipe.toml")
    assert recipe_from_table(table, "card") == Recipe("int4-g64")


def numbers_in(text: str) -> set[str]:
    return set(re.findall(r"\d[\d,]*\.\d+", text))


def test_a_number_that_was_not_measured_is_not_there(manifest: dict[str, Any]) -> None:
    """Every figure with a point on the card is the manifest's, rounded; quality is absent."""
    text = render_card(manifest, CardRequest(REPO))
    assert "Not evaluated" in text and "Quality was not measured" in text
    for word in ("erplexity", "KL", "top-1"):
        assert word not in text
    bare = {**manifest, "tensors": [r for r in manifest["tensors"] if r["exact"]], "classes": []}
    left = numbers_in(render_card(bare, CardRequest(REPO)).split("## What was done")[0])
    total = sum(f["bytes"] for f in manifest["files"])
    wanted = {f"{total / 1e6:.1f}", f"{manifest['source']['bytes'] / 1e6:.1f}"}
    assert left - wanted - {manifest["tool"]["v4quant"].rpartition(".")[0]} == set()


def test_an_evaluation_of_something_else_is_refused(manifest: dict[str, Any]) -> None:
    other = evaluation_of(manifest)
    other["candidate"]["bytes"] += 1
    with pytest.raises(HubError, match="the evaluation is of a checkpoint of"):
        render_card(manifest, CardRequest(REPO, figures_from_dict(other)))


def test_local_sources_name_no_base_model_by_guess(manifest: dict[str, Any]) -> None:
    local = {**manifest, "source": {**manifest["source"], "repo": "", "license": ""}}
    data = ModelCard(render_card(local, CardRequest(REPO))).data.to_dict()
    assert "base_model" not in data and "license" not in data
    assert "base_model_relation" not in data
    told = CardRequest(REPO, base_model="deepseek-ai/DeepSeek-V4-Flash", license="mit")
    data = ModelCard(render_card(local, told)).data.to_dict()
    assert data["base_model"] == "deepseek-ai/DeepSeek-V4-Flash" and data["license"] == "mit"
    assert license_of("MIT License\n\nCopyright") == "mit" and license_of("My terms") == ""


def test_hostile_names_do_no_harm(manifest: dict[str, Any]) -> None:
    evil = "</td><script>alert(1)</script>|`[x](javascript:1)\n---\nlicense: evil"
    bad = json.loads(json.dumps(manifest))
    bad["source"] |= {
        "name": evil,
        "release": evil,
        "repo": evil,
        "revision": evil,
        "license": evil,
    }
    bad["tool"] |= {"v4quant": evil, "torch": evil}
    bad["recipe"] |= {"scheme": evil, "extra": "```\n# Heading"}
    bad["classes"][0]["role"] = evil
    bad["dropped"] = [{"name": evil, "reason": evil}]
    bad["stats"] = evil
    text = render_card(bad, CardRequest(REPO))
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    assert "<script>" not in outside and not re.search(r"(?<!\\)\]\(javascript", outside)
    assert "alert" not in text.split("```sh")[-1].partition("```")[0]
    front = yaml.safe_load(text.split("---\n")[1])
    assert "license" not in front and "base_model" not in front
    assert text.count("\n# ") == 1, "nobody adds a heading"
