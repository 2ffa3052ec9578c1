"""Other people's quantizers and ours: same model, same text, same bits, same measurement.

    scripts/compare_peers.py --work FOLDER --llm-compressor PYTHON --auto-round PYTHON
    scripts/compare_peers.py --work FOLDER ... --schemes int4-g128 --who llm-compressor   some cells

Each peer is optional and named by an interpreter that has it (a virtual environment of its own). It
gets the built-in tiny V4 as BF16 and the calibration windows as token ids, and returns its routed
experts' weights as it would decode them (`scripts/peers/`). These take the experts' places in a
checkpoint, and `evaluate`'s own functions score it against the source on the windows of
docs/quality.md, which nobody calibrated with; our own figures are that table's. What a peer left
in FOLDER is not computed again. Figures and versions go to docs/peers.json, the table to
docs/peers.md; cells not asked for are kept. auto-round's tuning of rounding takes most of the time
(half an hour per scheme and core); `--iterations 50`, its "light" setting, takes a quarter of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_table import FULL, ROOT, TINY, text
from quality_table import STORED as QUALITY
from quality_types import STORED as TYPES
from safetensors.torch import load_file, save_file
from script_tools.figures import figures

import v4quant
from v4quant.builtin import CALIBRATION, HELDOUT, resolve_corpus
from v4quant_calibration.corpus.corpus import CorpusRequest, load_corpus
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.model_config import ModelConfig, parse_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.scheme import get_scheme

STORED = ROOT / "docs" / "peers.json"
PAGE = ROOT / "docs" / "peers.md"
SCHEMES = ("int4-g32", "int4-g128", "int3-g128", "int2-g64")
OURS = {"optimal": "v4quant, optimal scales", "propagated": "v4quant"}
PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class Peer:
    """A quantizer of others: its name and method for people, its package, whose interpreter runs
    it, and the script that does; `tunes`: iterations are an argument of that."""

    name: str
    package: str
    worker: str
    tunes: bool = False


PACKAGES = ("llm-compressor", "auto-round", "gptqmodel")
PEERS = {
    "llm-compressor": Peer("llm-compressor, GPTQ", "llm-compressor", "with_llm_compressor.py"),
    "auto-round": Peer("auto-round, weighted scales", "auto-round", "with_auto_round.py"),
    "auto-round tuned": Peer("auto-round, tuned", "auto-round", "with_auto_round.py", tunes=True),
    "gptqmodel": Peer("GPTQModel", "gptqmodel", "with_gptqmodel.py"),
}


class PeerFailed(Exception):
    """A peer's process ended with an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the peers named, score all, write figures and page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="Folder for what peers return.")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--who", nargs="+", default=tuple(PEERS), choices=tuple(PEERS))
    parser.add_argument("--iterations", type=int, default=200, help="Of auto-round's tuning.")
    for package in PACKAGES:
        parser.add_argument(f"--{package}", metavar="PYTHON", help=f"Interpreter with {package}.")
    options = parser.parse_args(arguments)
    runs = {}
    for who in options.who:
        python = getattr(options, PEERS[who].package.replace("-", "_"))
        sys.stderr.write(f"{who}: {python or 'left out, no interpreter named'}\n")
        if python:
            more = [str(options.iterations)] if PEERS[who].tunes else []
            runs[who] = [python, str(ROOT / "scripts" / "peers" / PEERS[who].worker), *more]
    options.work.mkdir(parents=True, exist_ok=True)
    fresh = compare(options.work.resolve(), options.schemes, runs)
    stored = json.loads(STORED.read_text()) if STORED.exists() else {"rows": [], "trellis": []}
    renewed = {(row["scheme"], row["who"]) for row in fresh["rows"]}
    old = [row for row in stored["rows"] if (row["scheme"], row["who"]) not in renewed]
    found = {**stored, **fresh, "rows": sorted([*old, *fresh["rows"]], key=_order)}
    STORED.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))
    return 0


def _order(row: dict[str, Any]) -> tuple[int, int]:
    return SCHEMES.index(row["scheme"]), list(PEERS).index(row["who"])


def compare(work: Path, schemes: Sequence[str], runs: dict[str, list[str]]) -> dict[str, Any]:
    """Figures of every scheme by every peer named; ours are those of the quality table.

    runs: by peer, the interpreter, the script, and what the script is given behind the file.
    """
    with open_checkpoint(TINY) as source:
        config = parse_model_config(dict(source.config), "config.json")
    given = text(CALIBRATION, FULL.calibration)
    request = CorpusRequest(
        given["seq_len"], given["tokens"], config.bos_token_id, config.vocab_size
    )
    corpus = load_corpus(resolve_corpus([CALIBRATION]), TINY / "tokenizer.json", request)
    (work / "windows.json").write_text(json.dumps([ids.tolist() for ids in corpus.windows]))
    v4quant.quantize(TINY, work / "bf16", scheme="bf16", workers=1)
    made = [
        (scheme, who, *run_peer(who, run, scheme, work, config))
        for scheme in schemes
        for who, run in runs.items()
    ]
    if not made:
        raise PeerFailed("no interpreter of any peer was named; nothing to compare")
    first, *others = (folder for _, _, folder, _ in made)
    heldout = text(HELDOUT, FULL.heldout)
    found = v4quant.evaluate(first, reference=TINY, candidates=others, weights=False, **heldout)
    assert found.floor is not None
    rows = [
        {"scheme": scheme, "who": peer, **figures(one), **facts}
        for (scheme, peer, _, facts), one in zip(made, (found, *found.others), strict=True)
    ]
    return {
        "calibration_tokens": given["tokens"],
        "heldout_tokens": heldout["tokens"],
        "floor_kl": found.floor.kl_mean,
        "rows": rows,
    }


def our_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The quality table's rows. Raises PeerFailed when they are of other text."""
    table = json.loads(QUALITY.read_text())["full"]
    for key in ("calibration_tokens", "heldout_tokens"):
        if table[key] != found[key]:
            raise PeerFailed(f"{QUALITY} has other {key}; run scripts/quality_table.py first")
    return [{**row, "who": row["solver"]} for row in table["rows"] if row["solver"] in OURS]


def run_peer(
    who: str, run: Sequence[str], scheme: str, work: Path, config: ModelConfig
) -> tuple[Path, dict[str, Any]]:
    """A checkpoint with a peer's experts, and what it said of itself. Raises PeerFailed."""
    kind = get_scheme(scheme)
    python, script, *more = run
    name = "-".join([*who.split(), *more, scheme])
    weights, said = work / f"{name}.safetensors", work / f"{name}.json"
    if not (weights.exists() and said.exists()):
        command = [
            python, script, str(work / "bf16"), str(work / "windows.json"), str(kind.bits),
            str(kind.group_size), str(weights), *more,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(  # some leave logs where they are run
            command, capture_output=True, text=True, env=environment, check=False, cwd=work
        )
        if done.returncode:
            raise PeerFailed(f"{who} failed on {scheme}:\n{done.stderr[-2000:]}")
        said.write_text(done.stdout.strip().rpartition("\n")[2])
    folder = work / name
    with open_checkpoint(work / "bf16") as plain:
        put_experts(plain, load_file(weights), folder, config)
    facts: dict[str, Any] = json.loads(said.read_text())
    return folder, facts


def put_experts(
    plain: Checkpoint, found: dict[str, Any], folder: Path, config: ModelConfig
) -> None:
    """A copy of a BF16 checkpoint with the trunk's experts replaced by float32 matrices.

    found: by transformers' names. Raises PeerFailed when one is missing or has another shape.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(plain.path, folder, ignore=shutil.ignore_patterns("v4quant.json"))
    wanted = {
        f"layers.{n}.ffn.experts.{e}.{ours}.weight": f"model.layers.{n}.mlp.experts.{e}.{theirs}"
        for n in range(config.num_hidden_layers)
        for e in range(config.n_routed_experts)
        for theirs, ours in PROJECTIONS.items()
    }
    if missing := [name for name in wanted.values() if name not in found]:
        raise PeerFailed(f"{len(missing)} matrices are missing, the first {missing[0]}")
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in tensors.keys() & wanted.keys():
            if found[wanted[name]].shape != tensors[name].shape:
                raise PeerFailed(f"{wanted[name]} has shape {tuple(found[wanted[name]].shape)}")
            tensors[name] = found[wanted[name]].float().contiguous()
        save_file(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["metadata"]["total_size"] = total
    index.write_text(json.dumps(table))


def _facts(row: dict[str, Any]) -> str:
    # What follows a plus says how a package was built.
    told = [f"{name} {number.partition('+')[0]}" for name, number in row["versions"].items()]
    if row.get("iterations"):
        told.append(f"{row['iterations']} iterations")
    return ", ".join(told)


def _missing(columns: Sequence[str]) -> list[str]:
    """What the page says of peers without figures."""
    found = []
    for who, peer in PEERS.items():
        if who not in columns:
            found += [
                f"{peer.name}: not measured. It runs on V4 with `scripts/peers/{peer.worker}`, but",
                "nobody has run it on the whole text yet.",
                "",
            ]
    return found


def _codebooks(trellis: Sequence[dict[str, Any]], types: dict[str, dict[str, Any]]) -> list[str]:
    """Types with a codebook, by bits, beside a trellis; `types` are the table's of GGUF types."""
    rows = [
        (row["bits"], f"`{name}`", *(_cell(row[way]) for way in ("llama.cpp", "solved")), "")
        for name, row in types.items()
        if {"llama.cpp", "solved"} <= row.keys()
    ]
    rows += [(row["bits"], row["name"], "", "", _cell(row)) for row in trellis]
    return [
        "## Codebooks and a trellis",
        "",
        "The same experts, text and measure at other sizes: GGUF types by llama.cpp's own encoder",
        "with an importance matrix, the same types as `calibrate --solve` finds them",
        "([quality-types.md](quality-types.md), which says where a type is scored on more of that",
        "text), and a trellis in the way of EXL3. The trellis is",
        "a prototype outside v4quant, which writes no such format: 16 bits of state, full Viterbi",
        "search, error feedback between blocks, propagation. Its bits are those of matrices of",
        "Flash's size; on the tiny model its scales make them 2.125 and 3.125.",
        "",
        "| bits per weight | format | llama.cpp, importance matrix | v4quant | trellis |",
        "|---:|---|---|---|---|",
        *(f"| {bits:.4f} | " + " | ".join(cells) + " |" for bits, *cells in sorted(rows)),
        "",
        "So at 2 and 3 bits the trellis is ahead of every GGUF type of about its size, by what 0.2",
        "to 0.4 bit are worth; llama.cpp does not run it.",
        "",
    ]


def _cell(row: dict[str, Any]) -> str:
    return f"{row['kl']:.5f} ± {row['kl_stderr']:.5f}"


def page(found: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    names = {peer: facts.name for peer, facts in PEERS.items()} | OURS
    every = [*found["rows"], *our_rows(found)]
    columns = [who for who in names if any(row["who"] == who for row in every)]
    lines = [
        "# Compared with other quantizers",
        "",
        "Mean KL divergence from the source, nats per token, of the built-in tiny V4 with only its",
        f"routed experts converted, on {found['heldout_tokens']:,} held-out tokens of prose and "
        "code.",
        f"All had the same {found['calibration_tokens']:,} tokens to calibrate with, in "
        "windows of 512, and the",
        "same bits: symmetric integers, one 16-bit scale per group. Weights as each one decodes "
        "them are",
        "scored by `evaluate`'s own functions, so nothing of an engine is in the figures. The "
        "noise floor is",
        f"{found['floor_kl']:.5f}. `scripts/compare_peers.py` writes this page.",
        "",
        "| scheme | " + " | ".join(names[who] for who in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for scheme in SCHEMES:
        rows = {row["who"]: row for row in every if row["scheme"] == scheme}
        cells = [_cell(rows[who]) if who in rows else "not run" for who in columns]
        if rows:
            lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
    lines.append("")
    for who in PEERS:
        if told := sorted({_facts(row) for row in found["rows"] if row["who"] == who}):
            lines.append(f"- {names[who]}: {'; '.join(told)}.")
    lines += [
        "",
        "What each one is. *llm-compressor*: `oneshot` with `GPTQModifier` and its defaults "
        "(static activation",
        "order, damping 0.01, all experts calibrated on all tokens), float32 throughout. "
        "*auto-round*: its search of",
        "scales weighted by activations; *tuned*: its tuning of rounding and range, a block at a "
        "time, by the sign",
        "of gradients (`scripts/peers/with_auto_round.py` hands V4's layers over as it takes them)."
        " *v4quant, optimal",
        "scales*: `optimal` weighted by second moments. *v4quant*: `calibrate --solve` with its "
        "defaults. One model,",
        "one text: a win by less than the error bars is not a win.",
        "",
        *_missing(columns),
        *_codebooks(found["trellis"], json.loads(TYPES.read_text())["types"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
