"""llama.cpp itself on every GGUF type: it loads them, splits text alike, and gives our logits.

Converts the built-in tiny V4 to each type, loads the files in llama.cpp through its Python package
(`pip install llama-cpp-python`, built from its source; an architecture `deepseek4` is needed),
evaluates held-out text token by token, and compares the logits with those of v4quant's reference
forward *on the same file*. What remains is llama.cpp's arithmetic: it rounds the activations of
every product to 8 bits (blocks of 32 or 256) or to BF16, where the reference computes in float32,
and where a rounded router or indexer score changes a choice, one token differs visibly. The floor
is what the reference itself changes when it rounds its streams to BF16; the limit is the floor and
a margin for 8-bit activations (see `MARGIN`).

    python scripts/check_llama_cpp.py [--schemes mxfp4,q4_k] [--windows 4] [--json]
    python scripts/check_llama_cpp.py --together
    python scripts/check_llama_cpp.py --schemes "" --recipe recipe.toml --stats solved

`--together` puts as many types into one file as the model has places (a layer's w1 and w3, or its
w2), so that all of them take two conversions: a type that llama.cpp decodes otherwise spoils its
file. Every tensor passes llama.cpp's own check of its blocks (`ggml_validate_row_data`) on loading.

Exit code 0 when all agree, 1 when one does not, 2 without the package.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file
from script_tools.program import v4quant

from v4quant.builtin import resolve_source
from v4quant_formats.layouts.gguf import GGUF
from v4quant_kernels.ggml_types import get_type

SOURCE = "builtin:tiny-v4"
LENGTH = 256
# Mean KL that 8-bit activations may cost over the floor, in nats: ten times what was measured on
# this model for types without an error of their own, so that another CPU's kernels pass and a
# wrong tensor (0.5 and more) does not.
MARGIN = 2e-3
TEXT = (
    "Def f(x):\n    return 123456 + x  # ünïcode, 中文字 and  two  spaces\r\n\r\n"
    "<｜User｜>it's<think>"
)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """llama.cpp against the reference forward on one conversion."""

    scheme: str
    dense: str
    files: int
    mean_kl: float
    median_kl: float
    largest_kl: float
    kl_to_source: float
    same_top: float
    perplexity: float
    perplexity_reference: float
    same_tokens: bool
    files_valid: bool

    def passes(self, floor: float) -> bool:
        """Whether nothing but arithmetic differs."""
        return self.mean_kl < floor + MARGIN and self.same_tokens and self.files_valid


def main() -> int:
    """Check the types asked for and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--schemes", default=",".join(GGUF.schemes))
    parser.add_argument("--together", action="store_true", help="many types in a file")
    parser.add_argument("--recipe", help="a recipe to convert by as well")
    parser.add_argument("--stats", help="what calibrate made for that recipe")
    parser.add_argument("--windows", type=int, default=4, help=f"of {LENGTH} tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        import llama_cpp
    except (ImportError, RuntimeError, OSError) as error:
        print(f"llama_cpp cannot be imported ({error}); pip install llama-cpp-python")
        return 2
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    floor = noise_floor(options.windows)
    results = []
    with tempfile.TemporaryDirectory(prefix="v4quant-llama-") as scratch:
        source = logits_of(SOURCE, Path(scratch) / "source.safetensors", options.windows)
        for name, more in conversions(options, Path(scratch)):
            results.append(check(llama_cpp, name, more, Path(scratch), source, options))
            if not options.json:
                print(line(results[-1], floor), flush=True)
    passed = all(r.passes(floor) for r in results)
    if options.json:
        facts = {"llama_cpp": llama_cpp.__version__, "floor": floor, "margin": MARGIN}
        print(json.dumps({**facts, "passed": passed, "types": [asdict(r) for r in results]}))
    return 0 if passed else 1


def conversions(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, list[str]]]:
    """What to convert: a name, and options of `quantize`."""
    schemes = [scheme for scheme in options.schemes.split(",") if scheme]
    if any(get_type(scheme).text for scheme in schemes):
        text = ["--tokens", "4096", "--min-tokens", "1"]
        v4quant("calibrate", SOURCE, "--out", str(scratch / "stats.v4q"), *text)
    if options.together:
        for number, table in enumerate(mixes(schemes), 1):
            file = scratch / f"mix-{number}.toml"
            file.write_text('scheme = "mxfp4"\nformat = "gguf"\n[schemes]\n' + table)
            yield f"mix-{number}", ["--recipe", str(file), *given(scratch / "stats.v4q")]
    for number, scheme in enumerate(() if options.together else schemes):
        # One conversion in pieces and one with 8-bit dense matrices are enough.
        more = {1: ["--split-size", "8MB"], 2: ["--dense", "q8_0"]}.get(number, [])
        more += given(scratch / "stats.v4q") if get_type(scheme).text else []
        yield scheme, ["--scheme", scheme, "--format", "gguf", *more]
    if options.recipe:
        stats = given(Path(options.stats)) if options.stats else []
        yield "recipe", ["--recipe", options.recipe, *stats]


def given(stats: Path) -> list[str]:
    """The option for statistics that are there."""
    return ["--stats", str(stats)] if stats.exists() else []


def mixes(schemes: Sequence[str]) -> list[str]:
    """Lines of [schemes]: all types, each in one place, in as few files as that takes."""
    config = json.loads((resolve_source(SOURCE) / "config.json").read_text())
    layers = range(config["num_hidden_layers"])
    places = [f"layers.{n}.{group}" for n in layers for group in ("gate_up", "down")]
    found = []
    for start in range(0, len(schemes), len(places)):
        pairs = zip(places, schemes[start : start + len(places)], strict=False)
        found.append("".join(f'"{place}" = "{scheme}"\n' for place, scheme in pairs))
    return found


def line(found: Agreement, floor: float) -> str:
    """One row of the table."""
    verdict = "agrees" if found.passes(floor) else "DIFFERS"
    return (
        f"{found.scheme:6} dense {found.dense:5} {found.files} files: mean KL {found.mean_kl:.2e} "
        f"(median {found.median_kl:.1e}, largest {found.largest_kl:.1e}; floor {floor:.2e}), "
        f"to the source {found.kl_to_source:.2e}, same top {100 * found.same_top:.2f} %, "
        f"perplexity {found.perplexity:.3f} / {found.perplexity_reference:.3f}, "
        f"tokens {found.same_tokens}, files valid {found.files_valid}: {verdict}"
    )


def noise_floor(windows: int) -> float:
    """Mean KL between two computations of the source's own weights."""
    tokens = ["--tokens", str(windows * LENGTH), "--seq-len", str(LENGTH)]
    found = v4quant("evaluate", SOURCE, "--reference", SOURCE, "--no-weights", *tokens)
    return float(found["noise_floor"]["kl_mean"])


def logits_of(source: str, file: Path, windows: int) -> dict[str, Any]:
    """`logits` and `input_ids` of the reference forward on held-out text."""
    tokens = ["--tokens", str(windows * LENGTH), "--seq-len", str(LENGTH)]
    v4quant("evaluate", source, *tokens, "--save-logits", str(file))
    return load_file(file)


def check(
    llama_cpp: Any,
    scheme: str,
    more: list[str],
    scratch: Path,
    source: dict[str, Any],
    options: argparse.Namespace,
) -> Agreement:
    """Convert, score by both, compare."""
    out = scratch / scheme
    v4quant("quantize", SOURCE, str(out), *more)
    held = logits_of(str(out), scratch / f"{scheme}.safetensors", options.windows)
    main_file = min(out.glob("tiny-v4-*.gguf"))
    model = load(llama_cpp, main_file, options.threads)
    reference, other = [], []
    for ids, wanted in zip(held["input_ids"], held["logits"], strict=True):
        model.reset()
        model.eval(ids.tolist())
        reference.append(log_softmax(wanted))
        other.append(log_softmax(np.array(model.scores[: len(ids)])))
    a, b = np.stack(reference), np.stack(other)
    kl, lost = divergence(a, b), divergence(log_softmax(source["logits"]), b)
    return Agreement(
        scheme=scheme,
        dense="q8_0" if "--dense" in more else "mixed" if "--recipe" in more else "bf16",
        files=len(list(out.glob("tiny-v4-*.gguf"))),
        mean_kl=float(kl.mean()),
        median_kl=float(np.median(kl)),
        largest_kl=float(kl.max()),
        kl_to_source=float(lost.mean()),
        same_top=float((a.argmax(-1) == b.argmax(-1)).mean()),
        perplexity=perplexity(b, held["input_ids"]),
        perplexity_reference=perplexity(a, held["input_ids"]),
        same_tokens=same_tokens(model),
        files_valid=all(loads(llama_cpp, f) for f in (main_file, *out.glob("mtp-*.gguf"))),
    )


def load(llama_cpp: Any, path: Path, threads: int) -> Any:
    """A model on the CPU, all logits kept."""
    return llama_cpp.Llama(
        str(path), n_ctx=2 * LENGTH, n_batch=2 * LENGTH, logits_all=True, n_threads=threads,
        n_gpu_layers=0, verbose=False,
    )  # fmt: skip


def loads(llama_cpp: Any, path: Path) -> bool:
    """Whether a file's tensors are all found, of the right shapes, with blocks that llama.cpp calls
    valid (no context is made: a draft stage computes only beside its trunk)."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.load_mtp = parameters.check_tensors = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        return False
    llama_cpp.llama_model_free(model)
    return True


def same_tokens(model: Any) -> bool:
    """Whether llama.cpp's pre-tokenizer and merges give the ids of tokenizer.json."""
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(resolve_source(SOURCE) / "tokenizer.json"))
    ours = model.tokenize(TEXT.encode(), add_bos=False, special=True)
    return bool(ours == theirs.encode(TEXT, add_special_tokens=False).ids)


def log_softmax(logits: npt.NDArray[np.float32]) -> Array:
    """Log-probabilities in float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    shifted: Array = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return shifted


def divergence(a: Array, b: Array) -> Array:
    """KL(a || b) of every token, in nats."""
    kl: Array = (np.exp(a) * (a - b)).sum(-1)
    return kl


def perplexity(log_probabilities: Array, ids: npt.NDArray[np.int64]) -> float:
    """Of every token after the first."""
    chosen = np.take_along_axis(log_probabilities[:, :-1], ids[:, 1:, None], -1)
    return float(np.exp(-chosen.mean()))


if __name__ == "__main__":
    sys.exit(main())
