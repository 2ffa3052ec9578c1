"""A card followed by the letter: its commands, in an empty folder, give the published bytes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.conversion import TINY, folder_bytes
from tests.support.fake_hub import USER, FakeHub
from tests.support.lora import Lora
from v4quant.builtin import resolve_source
from v4quant.cli import cli
from v4quant.cli._exit import DIFFERENT
from v4quant.conversion.finish import STATISTICS_NAME
from v4quant.publishing.reproduction import RECIPE_NAME, recipe_toml, reproduction

SOURCE, REPO = "maker/V4-Tiny", f"{USER}/V4-Tiny-small"
SHORT = ["--seq-len", "32", "--min-tokens", "2"]


def v4quant(*arguments: str) -> object:
    return cli.main(list(arguments), standalone_mode=False)


def corpus(folder: Path) -> Path:
    """The tiny model's own ids, of which a text cannot be made."""
    ids = load_file(TINY.parent / "tiny-a.reference.safetensors")["input_ids"][0]
    rows = ids[: len(ids) // 2 * 2].reshape(2, -1).contiguous()
    save_file({"input_ids": rows}, folder / "my ids.safetensors")
    return folder / "my ids.safetensors"


def commands_of(card: str) -> list[list[str]]:
    """The lines of the first block behind the heading."""
    block = (
        card.split("## How to reproduce and check")[1]
        .split("```sh\n")[1]
        .split("```", maxsplit=1)[0]
    )
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def follow(card: str, hub: FakeHub) -> list[str]:
    """Do as the card says; the programs that ran."""
    ran = []
    for command in commands_of(card):
        ran.append(" ".join(command[:2]))
        if command[0] == "v4quant":
            assert v4quant(*command[1:]) is None
            continue
        program = Path(sys.executable).with_name(command[0])
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        subprocess.run(
            [str(program), *command[1:]], check=True, capture_output=True, env=environment
        )
    return ran


def publish_source(hub: FakeHub, files: dict[str, bytes]) -> str:
    """The model on the hub, without its tokenizer; returns the commit."""
    ids_only = {name: data for name, data in files.items() if name != "tokenizer.json"}
    return hub.add_repo(SOURCE, ids_only, license="mit")


@pytest.mark.parametrize("kind", ["solved", "statistics, beside other quants"])
def test_a_stranger_follows_the_card(
    kind: str,
    plain_hub: FakeHub,
    model_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    revision = publish_source(plain_hub, model_files)
    source, maker, stranger = f"hf://{SOURCE}@{revision}", tmp_path / "maker", tmp_path / "stranger"
    maker.mkdir()
    stranger.mkdir()
    ids, place, options = corpus(maker), REPO, ["--scheme", "int4-g64"]
    calibrate = ["calibrate", source, "--corpus", str(ids), *SHORT]
    monkeypatch.chdir(maker)
    if kind == "solved":
        v4quant(*calibrate, "--no-propagate", "--solve", "int4-g64", "--out", "codes")
        options += ["--stats", "codes"]
    else:
        v4quant(*calibrate, "--out", "stats.v4q")
        options += ["--stats", "stats.v4q"]
    if kind != "solved":
        place = f"{REPO}:Q4_K"
        options[1:2] = ["q4_k", "--format", "gguf", "--dense", "q8_0"]
    v4quant("quantize", source, "out", *options)
    v4quant("push", "out", place)
    within = "" if kind == "solved" else "Q4_K/"
    published = plain_hub.files(REPO)
    assert (within + STATISTICS_NAME in published) == (kind != "solved")
    card = published[f"{within}README.md"].decode()
    assert published[within + RECIPE_NAME].decode().strip() in card
    ids.rename(stranger / ids.name)  # what the card asks for by its SHA-256, where it does

    monkeypatch.chdir(stranger)
    wanted = ["hf download", "v4quant quantize", "v4quant verify"]
    if kind == "solved":
        wanted.insert(1, "v4quant calibrate")
        assert f"| `{ids.name}` |" in card
    assert follow(card, plain_hub) == wanted
    assert folder_bytes(stranger / "out") == folder_bytes(maker / "out")
    other = tmp_path / "other"
    other.mkdir()
    told = (Path("out") / "v4quant.json").read_text()
    digest = json.loads(told)["files"][0]["sha256"]
    (other / "v4quant.json").write_text(told.replace(digest, "0" * 64))
    assert v4quant("verify", "out", "--same-as", str(other)) == DIFFERENT


@pytest.mark.parametrize("container", ["deepseek", "gguf"])
def test_a_merged_adapter_and_a_given_tokenizer_are_followed_too(
    container: str,
    plain_hub: FakeHub,
    model_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    """By their commits, and by the tokenizer that was published."""
    (tmp_path / "words").mkdir()
    words = json.loads((Path(resolve_source("builtin:tiny-v4")) / "tokenizer.json").read_bytes())
    kept = {word: number for word, number in words["model"]["vocab"].items() if number < 384}
    words["model"] |= {"vocab": kept, "merges": []}
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(words))
    revision = publish_source(plain_hub, model_files)
    lora = folder_bytes(Lora(generator).write(tmp_path / "files"))
    pinned = plain_hub.add_repo("maker/lora-v4", lora)
    maker, stranger = tmp_path / "maker", tmp_path / "stranger"
    maker.mkdir()
    stranger.mkdir()
    monkeypatch.chdir(maker)
    scheme = ["--scheme", "q4_k", "--format", "gguf"] if container == "gguf" else []
    v4quant("quantize", f"hf://{SOURCE}@{revision}", "out", *(scheme or ["--scheme", "fp8"]),
            "--adapter", "hf://maker/lora-v4", "--tokenizer", str(tmp_path / "words"))  # fmt: skip
    v4quant("push", "out", REPO)
    card = plain_hub.files(REPO)["README.md"].decode()
    assert "`maker/lora-v4` was merged into 6 matrices" in card
    monkeypatch.chdir(stranger)
    assert f"--adapter hf://maker/lora-v4@{pinned}" in card
    assert follow(card, plain_hub) == ["hf download", "v4quant quantize", "v4quant verify"]
    assert folder_bytes(stranger / "out") == folder_bytes(maker / "out")
    compared = card.split("To compare every published value")[1].split("```sh\n")[1]
    (command,) = [shlex.split(line) for line in compared.split("```")[0].splitlines()]
    assert v4quant(*command[1:]) is None


LADDER = """
source = "hf://SOURCE"
target = "hf://USER/V4-Tiny"
[calibrate]
corpus = ["my ids.safetensors"]
seq_len = 32
min_tokens = 2
propagate = false
[[quantize]]
scheme = "int4-g64"
solver = "gptq"
[[quantize]]
scheme = "q4_k"
format = "gguf"
dense = "q6_k"
solver = "optimal"
[[quantize]]
scheme = "mxfp4"
[evaluate]
corpus = ["my ids.safetensors"]
[verify]
kernels = false
"""


def test_every_card_of_a_ladder_is_followed(
    plain_hub: FakeHub,
    model_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three sizes of one run: solved, weighed by statistics, and recoded."""
    publish_source(plain_hub, model_files)
    maker = tmp_path / "maker"
    maker.mkdir()
    ids = corpus(maker)
    monkeypatch.chdir(maker)
    Path("ladder.toml").write_text(LADDER.replace("SOURCE", SOURCE).replace("USER", USER))
    assert v4quant("run", "ladder.toml", "--out", "out") is None
    for size in ("int4-g64", "q4_k", "mxfp4"):
        stranger = tmp_path / size
        stranger.mkdir()
        shutil.copy(ids, stranger)
        monkeypatch.chdir(stranger)
        published = plain_hub.files(f"{USER}/V4-Tiny-{size}")
        card = published["README.md"].decode()
        assert all(f"V4-Tiny-{other}" in card for other in ("int4-g64", "q4_k", "mxfp4"))
        follow(card, plain_hub)
        made = folder_bytes(stranger / "out")
        assert {n: d for n, d in published.items() if n in made} == made, size


def manifest(**more: Any) -> dict[str, Any]:
    whole = {
        "tool": {"v4quant": "0.1.0", "commit": "c" * 40, "torch": "2.13.0"},
        "source": {"repo": SOURCE, "revision": "a" * 40},
        "recipe": {"scheme": "int4-g64"},
        "files": [{"name": "model.safetensors", "bytes": 1, "sha256": "0" * 64}],
    }
    return {**whole, **more}


def test_what_others_cannot_have_is_named() -> None:
    text = reproduction(manifest(source={"name": "mine"}, adapter={"digest": "d" * 64}), REPO)
    lines = commands_of(f"## How to reproduce and check\n{text}")
    assert lines[0] == ["SOURCE=..."] and lines[1] == ["ADAPTER=..."]
    assert "$SOURCE" in lines[3] and lines[3][-2:] == ["--adapter", "$ADAPTER"]
    old = reproduction(manifest(stats="e" * 64), REPO)
    assert '--stats "$STATISTICS"' in old and "e" * 64 in old
    assert "commit `" + "c" * 40 + "`" in old


def test_hostile_manifests_reach_no_command() -> None:
    evil = "x; rm -rf ~ `id` $(id)\n```\n# Heading <script>"
    made = {
        "corpus": [{"name": evil, "bytes": 1, "sha256": evil}],
        "options": {"tokens": evil, evil: 1, "mode": evil, "seq-len": 64},
        "solved": {"scheme": evil, "dense": evil},
    }
    text = reproduction(
        manifest(
            stats=evil, calibration=made, tool={"v4quant": evil, "commit": evil},
            source={"repo": evil, "revision": evil}, recipe={"scheme": evil, evil: [evil]},
        ),
        REPO,
    )  # fmt: skip
    assert text.count("```") == 2 and not re.search(r"^# ", text, re.MULTILINE)
    for command in commands_of(f"## How to reproduce and check\n{text}"):
        assert command[0] in ("hf", "v4quant", "SOURCE=...")
        quoted = [word for word in command if "rm -rf" in word]
        assert all("\n" not in word for word in quoted) and len(quoted) <= 1
    assert "--seq-len 64" in text and "--tokens" not in text and "--mode" not in text
    shown = re.sub(r"```.*?```|`[^`\n]*`", "", text.replace(r"\`", ""), flags=re.DOTALL)
    assert "<script>" not in shown
    assert "```" not in recipe_toml({"scheme": evil})
