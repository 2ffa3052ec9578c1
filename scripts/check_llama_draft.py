"""llama.cpp itself on a draft file: is its MTP stage accepted as often as ours?

Converts the built-in tiny V4, lets llama.cpp run trunk and draft over held-out text (the draft is
given the trunk's streams and the next token, as in speculative decoding), and compares the share of
guesses that are the trunk's own choice with what `v4quant evaluate --draft` finds for the same file
and text. The engine runs in a process of its own, because llama-cpp-python 0.3.36 dies there: its
MTP context has one cache without layers, and `llama_kv_cache::build_input_k_rot` searches a divisor
of that cache's width, 0, until it divides by zero (SIGFPE), whatever the file. That is told apart
from disagreement.

    python scripts/check_llama_draft.py [--windows 6] [--json]

Exit code 0 when both agree, 1 when they do not, 2 without the package, 3 when llama.cpp dies.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file
from script_tools.program import v4quant

SOURCE = "builtin:tiny-v4"
LENGTH = 256
MARGIN = 0.01
"""Guesses that 8-bit activations may turn, as a share of all; seen: 0.0013."""


def main() -> int:
    """Convert, score by both, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--windows", type=int, default=6, help=f"of {LENGTH} tokens")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engine", nargs=2, metavar=("FOLDER", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(agreement(Path(options.engine[0]), Path(options.engine[1]))))
        return 0
    try:
        import llama_cpp
    except (ImportError, RuntimeError, OSError) as error:
        print(f"llama_cpp cannot be imported ({error}); pip install llama-cpp-python")
        return 2
    with tempfile.TemporaryDirectory(prefix="v4quant-draft-") as scratch:
        out, tokens = Path(scratch) / "out", Path(scratch) / "tokens.safetensors"
        v4quant("quantize", SOURCE, str(out), "--scheme", "mxfp4", "--format", "gguf")
        text = ["--tokens", str(options.windows * LENGTH), "--seq-len", str(LENGTH)]
        found = v4quant("evaluate", str(out), "--draft", "--save-logits", str(tokens), *text)
        engine = subprocess.run(
            [sys.executable, __file__, "--engine", str(out), str(tokens)],
            check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    ours = float(found["draft"]["candidate"]["target_agreement"])
    result: dict[str, Any] = {"llama_cpp": llama_cpp.__version__, "ours": ours, "margin": MARGIN}
    if engine.returncode != 0:
        code, text_of = 3, f"llama.cpp {llama_cpp.__version__} died with {engine.returncode}"
        result |= {"died": engine.returncode}
    else:
        theirs = json.loads(engine.stdout)
        result |= theirs
        code = 0 if abs(theirs["agreement"] - ours) < MARGIN else 1
        text_of = f"llama.cpp accepts {theirs['agreement']:.4f} of {theirs['guesses']} guesses"
    print(json.dumps(result) if options.json else f"{text_of}; ours: {ours:.4f}")
    return code


def agreement(folder: Path, tokens: Path) -> dict[str, Any]:
    """Share of the draft's guesses that are the trunk's greedy choice, both run by llama.cpp."""
    import llama_cpp
    from llama_cpp import llama_cpp_ext

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    trunk = llama_cpp.Llama(
        str(min(folder.glob("tiny-v4-*.gguf"))), n_ctx=2 * LENGTH, n_batch=2 * LENGTH,
        logits_all=True, n_threads=2, n_gpu_layers=0, verbose=False,
    )  # fmt: skip
    context = trunk._ctx.ctx
    llama_cpp_ext.llama_set_embeddings_nextn(context, True, False)
    draft = draft_context(llama_cpp, next(folder.glob("mtp-*.gguf")), context)
    width = llama_cpp.llama_model_n_embd_out(llama_cpp.llama_get_model(draft))
    hits = guesses = 0
    for row in load_file(tokens)["input_ids"].tolist():
        trunk.reset()
        trunk.eval(row)
        chosen = np.array(trunk.scores[: len(row)]).argmax(-1)
        streams = llama_cpp_ext.llama_get_embeddings_nextn(context)
        given = np.ctypeslib.as_array(streams, (len(row), width))[:-1].copy()
        guessed = draft_logits(llama_cpp, draft, row[1:], given, trunk.n_vocab()).argmax(-1)
        hits += int((guessed[:-1] == chosen[1:-1]).sum())
        guesses += len(row) - 2
    return {"agreement": hits / guesses, "guesses": guesses}


def draft_context(llama_cpp: Any, path: Path, trunk: Any) -> Any:
    """A context that runs an MTP file beside its trunk."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers, parameters.load_mtp = 0, True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 2 * LENGTH
    options.n_threads = options.n_threads_batch = 2
    options.ctx_type, options.ctx_other = llama_cpp.LLAMA_CONTEXT_TYPE_MTP, trunk
    return llama_cpp.llama_init_from_model(model, options)


def draft_logits(
    llama_cpp: Any, context: Any, ids: list[int], streams: npt.NDArray[np.float32], vocabulary: int
) -> npt.NDArray[np.float32]:
    """Logits [T, vocabulary] of the stage for T next tokens and the streams before them."""
    count = len(ids)
    sequence = (llama_cpp.llama_seq_id * 1)(0)
    batch = llama_cpp.llama_batch()
    batch.n_tokens = count
    batch.token = (llama_cpp.llama_token * count)(*ids)
    batch.embd = streams.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    batch.pos = (llama_cpp.llama_pos * count)(*range(count))
    batch.n_seq_id = (ctypes.c_int32 * count)(*[1] * count)
    batch.seq_id = (ctypes.POINTER(llama_cpp.llama_seq_id) * count)(*[sequence] * count)
    batch.logits = (ctypes.c_int8 * count)(*[1] * count)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    if llama_cpp.llama_decode(context, batch) != 0:
        raise RuntimeError("llama_decode failed")
    logits: npt.NDArray[np.float32] = np.ctypeslib.as_array(
        llama_cpp.llama_get_logits(context), (count, vocabulary)
    ).copy()
    return logits


if __name__ == "__main__":
    sys.exit(main())
