"""What a dry run accepts converts, and what converts verifies: random variants of a V4 and a V4.1.

Every round edits the checkpoint as tools do (dtypes of some matrices, scales in float, values off
the grid, other names, drafts left out or doubled, a tensor nobody knows), draws a recipe, and asks.
A refusal is an answer as well; nothing else may end a round but a verified output.
"""

from __future__ import annotations

import random
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

import v4quant
from tests.formats.test_naming import theirs
from tests.support.conversion import TINY
from tests.support.other_tools import coded_modules, decode, stored
from tests.support.shard_bytes import EditableCheckpoint, StoredTensor
from tests.support.synthetic import make_small
from v4quant.checks.verify import verify
from v4quant.recipe import Recipe
from v4quant_formats.layouts.table import LAYOUTS
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import SCHEMES

SECONDS, LEAST_ROUNDS = 12, 8
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

Edit = Callable[[EditableCheckpoint, random.Random], str]


def _as_released(c: EditableCheckpoint) -> list[str]:
    """Modules that no earlier edit has taken."""
    coded = [m for m in coded_modules(c) if f"{m}.weight" in c.names]
    return [m for m in coded if c[f"{m}.scale"].dtype == "F8_E8M0"]


def unquantized(c: EditableCheckpoint, rng: random.Random) -> str:
    """Some modules, or all, in a float dtype; a part of them changed."""
    share, moved, dtype = rng.choice((0.1, 0.5, 1)), rng.choice((0, 0, 0.5)), rng.choice(FLOATS)
    noise = torch.Generator().manual_seed(rng.randrange(2**31))

    def change(module: str, values: torch.Tensor) -> torch.Tensor:
        if rng.random() >= moved:
            return values
        size = values.abs().mean() * 0.05
        return values + torch.randn(values.shape, generator=noise) * size

    chosen = {m for m in _as_released(c) if rng.random() < share}
    decode(c, chosen.__contains__, dtype, change)
    return f"{len(chosen)} modules in {dtype}, changed by {moved}"


def scales_in_float(c: EditableCheckpoint, rng: random.Random) -> str:
    """Scales as floats, powers of two or not, under one of three names."""
    factor, dtype = rng.choice((1.0, 1.2345)), rng.choice((torch.float32, torch.bfloat16))
    ending, share = rng.choice(("scale", "weight_scale_inv")), rng.choice((0.2, 1))
    count = 0
    for module in [m for m in _as_released(c) if rng.random() < share]:
        scale = c[f"{module}.scale"]
        powers = torch.frombuffer(bytearray(scale.data), dtype=torch.uint8).double() - 127
        c.remove(f"{module}.scale")
        c[f"{module}.{ending}"] = stored((torch.exp2(powers) * factor).view(scale.shape).to(dtype))
        count += 1
    return f"{count} scales in {dtype} times {factor}, named {ending}"


def renamed(c: EditableCheckpoint, rng: random.Random) -> str:
    """A share of the tensors under transformers' names."""
    share = rng.choice((0.3, 1))
    for name in [n for n in c.names if rng.random() < share]:
        if theirs(name) != name:
            c.rename(name, theirs(name))
    return f"{share} of the names are transformers'"


def without_draft(c: EditableCheckpoint, rng: random.Random) -> str:
    """The draft stage left out, or some of its tensors; config.json told or not."""
    share, told = rng.choice((0.3, 1)), rng.random() < 0.5
    for name in [n for n in c.names if n.startswith("mtp.") and rng.random() < share]:
        c.remove(name)
    if told:
        c.config["num_nextn_predict_layers"] = 0
    return f"{share} of the draft left out, told {told}"


def doubled_draft(c: EditableCheckpoint, rng: random.Random) -> str:
    """A second draft stage, a copy of the first; config.json told or not."""
    for name in [n for n in c.names if n.startswith("mtp.0.")]:
        old = c[name]
        copied = StoredTensor(old.dtype, old.shape, bytes(old.data))
        c.add(name.replace("mtp.0.", "mtp.1."), copied.dtype, copied.shape, copied.data)
    if told := rng.random() < 0.5:
        c.config["num_nextn_predict_layers"] = 2
    return f"the draft twice, told {told}"


def stranger(c: EditableCheckpoint, rng: random.Random) -> str:
    """A tensor that no release has."""
    name = rng.choice(("layers.1.attn.rotation", "extra.weight", "layers.0.ffn.experts.0.w1.bias"))
    c.add(name, "F32", (4,), bytes(16))
    return f"{name} added"


EDITS: tuple[Edit, ...] = (
    unquantized, scales_in_float, without_draft, doubled_draft, renamed, stranger,
)  # fmt: skip


def some_recipe(rng: random.Random, tables: bool) -> Recipe:
    """A recipe of any kind. Raises RecipeError or UnsupportedPair for impossible ones."""
    scheme = rng.choice(sorted(SCHEMES))
    layout = rng.choice(sorted(SCHEMES[scheme].formats or LAYOUTS))
    more = {}
    if layout == "gguf" and rng.random() < 0.4:
        more["dense"] = rng.choice(("f16", "q8_0", "q4_k"))
    if tables and layout == "gguf" and rng.random() < 0.4:
        more["engram"] = rng.choice(("f16", "q8_0", "iq4_nl", "q4_k"))
    return Recipe(
        scheme,
        format=layout,
        draft=rng.choice(("convert", "drop")),
        on_inexact=rng.choice(("nearest", "keep", "refuse")),
        unknown=rng.choice(("refuse", "copy")),
        engine="neutral" if layout == "gguf" else rng.choice(("neutral", "vllm", "sglang")),
        solver=rng.choice(("rtn", "optimal")),
        **more,
    )


def one_round(rng: random.Random, work: Path, origin: Path) -> str:
    """The outcome in a word. Raises AssertionError for what was accepted and then failed."""
    checkpoint = EditableCheckpoint.read(origin)
    done = []
    edits = EDITS if origin == TINY else tuple(e for e in EDITS if e is not doubled_draft)
    for edit in sorted(rng.sample(edits, rng.randrange(1, 4)), key=EDITS.index):
        done.append(f"{edit.__name__}: {edit(checkpoint, rng)}")
    source = checkpoint.write(work / "in")
    if origin != TINY:  # Engram's rows are hashed from it
        shutil.copy(origin / "tokenizer.json", source)
    try:
        recipe = some_recipe(rng, tables=origin != TINY)
        v4quant.plan_quantize(source, work / "out", recipe=recipe)
    except V4QuantError:
        return "refused"
    try:
        v4quant.quantize(source, work / "out", recipe=recipe, workers=1, progress=SilentProgress())
    except V4QuantError as error:
        if recipe.on_inexact == "refuse" and "--on-inexact" in str(error):
            return "inexact"  # what only the data tells
        raise AssertionError(f"accepted, but not converted: {recipe}, {done}: {error}") from error
    findings = verify(work / "out", source, SilentProgress()).findings
    assert not findings, (recipe, done, findings[:3])
    return "verified"


def test_what_a_dry_run_accepts(tmp_path: Path) -> None:
    v41 = make_small(tmp_path / "v41", "v41")
    end, outcomes = time.monotonic() + SECONDS, list[str]()
    while time.monotonic() < end or len(outcomes) < LEAST_ROUNDS:
        seed, work = secrets.randbits(32), tmp_path / str(len(outcomes))
        print(f"seed {seed}")
        outcomes.append(one_round(random.Random(seed), work, (TINY, v41)[seed % 2]))
        shutil.rmtree(work)
    counts = {word: outcomes.count(word) for word in sorted(set(outcomes))}
    print(counts)
    assert counts.get("verified", 0) > 0
