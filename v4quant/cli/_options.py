"""Options that several verbs share: corpora and how the forward pass is run."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
import torch

from v4quant import __version__
from v4quant.builtin import resolve_corpus
from v4quant_calibration.corpus.chat_encoding import DEFAULT_MODE, MODES
from v4quant_calibration.corpus.corpus import Corpus, CorpusRequest, load_corpus
from v4quant_calibration.model.options import ForwardOptions
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.model_config import ModelConfig

Command = TypeVar("Command", bound=Callable[..., Any])


def corpus_options(default: str) -> Callable[[Command], Command]:
    """`--corpus`, `--mode`, `--tokens`, `--seq-len`, `--activations`."""

    def decorate(command: Command) -> Command:
        for option in (
            click.option(
                "--activations",
                type=click.Choice(["plain", "official"]),
                default="plain",
                show_default=True,
                help="plain: weights alone; official: with the release's activation rounding.",
            ),
            click.option("--seq-len", type=int, help="Window length (default 512; ids: as given)."),
            click.option("--tokens", type=int, help="Tokens to use in all (default: everything)."),
            click.option(
                "--mode",
                type=click.Choice(MODES),
                default=DEFAULT_MODE,
                show_default=True,
                help="How chats are encoded whose JSONL row names no mode.",
            ),
            click.option(
                "--corpus",
                multiple=True,
                default=[default],
                show_default=True,
                help="Text, JSONL (text or chats), .npy or .safetensors ids; may be repeated.",
            ),
        ):
            command = option(command)
        return command

    return decorate


def read_corpus(
    names: Sequence[str],
    checkpoint: Checkpoint,
    config: ModelConfig,
    seq_len: int | None,
    tokens: int | None,
    mode: str,
) -> Corpus:
    """Load the corpus the options name, with the checkpoint's tokenizer."""
    request = CorpusRequest(seq_len, tokens, config.bos_token_id, config.vocab_size, mode)
    return load_corpus(resolve_corpus(list(names)), checkpoint.path / "tokenizer.json", request)


def products_option(*more: str) -> Callable[[Command], Command]:
    """`--products`; more: "kernels" where nobody watches single experts."""
    told = (
        "f32: exact operands; bf16: rounded to BF16, sums in float32, faster where the processor "
        "multiplies BF16"
    )
    if "kernels" in more:
        told += "; kernels: as bf16, the routed experts by the kernels that serve them"
    return click.option(
        "--products",
        type=click.Choice(["f32", "bf16", *more]),
        default="f32",
        show_default=True,
        help=f"{told}.",
    )


def forward_options(activations: str, products: str = "f32") -> ForwardOptions:
    """Options of the forward pass."""
    return ForwardOptions(
        activations="official" if activations == "official" else "plain",
        matmul_dtype=torch.float32 if products == "f32" else torch.bfloat16,
        expert_kernels=products == "kernels",
    )


def tool_facts() -> dict[str, str]:
    """Versions and the command, for reports."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["v4quant", *sys.argv[1:]]),
    }
