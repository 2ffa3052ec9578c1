"""Options that several verbs share: corpora and how the forward pass is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from v4quant.cli._types import Choice
from v4quant_calibration.corpus.chat_dialects import DEFAULT_MODE, MODES, is_mode
from v4quant_kernels.near_names import not_one_of

Command = TypeVar("Command", bound=Callable[..., Any])


MODE_NAMES = f"[{'|'.join((*MODES, 'think-N'))}]"


def checked_mode(_: click.Context, parameter: click.Parameter, value: str) -> str:
    """The mode of `--mode` itself: a named one, or `think-N` for V4.1."""
    if not is_mode(value):
        raise click.BadParameter(
            not_one_of(value, (*MODES, "think-1 to think-100")), param=parameter
        )
    return value


def corpus_options(default: str) -> Callable[[Command], Command]:
    """Where text comes from, how much of it, and how activations are rounded."""

    def decorate(command: Command) -> Command:
        for option in (
            click.option(
                "--activations",
                type=Choice(["plain", "kv", "official"]),
                default="plain",
                show_default=True,
                help="plain: weights alone; official: with the release's activation rounding.",
            ),
            click.option("--seq-len", type=int, help="Window length (default 512; ids: as given)."),
            click.option("--tokens", type=int, help="Tokens to use in all (default: everything)."),
            click.option(
                "--mode",
                metavar=MODE_NAMES,
                callback=checked_mode,
                default=DEFAULT_MODE,
                show_default=True,
                help="How to encode chats whose row names no mode.",
            ),
            *_row_options(),
            click.option(
                "--tokenizer",
                type=click.Path(path_type=Path),
                help="A tokenizer.json for the text, or its folder, in place of SOURCE's own.",
            ),
            click.option(
                "--corpus",
                multiple=True,
                default=[default],
                show_default=True,
                help="Text, rows (JSONL, JSON, parquet; text or chats), .npy or .safetensors ids; "
                "may be repeated.",
            ),
        ):
            command = option(command)
        return command

    return decorate


def _row_options() -> tuple[Callable[[Command], Command], ...]:
    """How rows of a corpus are read."""
    return (
        click.option(
            "--chat-keys",
            type=Choice(("messages", "sharegpt", "prompt-completion")),
            default="messages",
            show_default=True,
            help="The keys under which rows hold their chats.",
        ),
        click.option(
            "--skip-bad-rows",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="Unreadable rows per file to leave out before giving up.",
        ),
    )


def row_options(command: Command) -> Command:
    """`--chat-keys` and `--skip-bad-rows`, where the other options of a corpus are written out."""
    for option in _row_options():
        command = option(command)
    return command


def overwrite_option(what: str) -> Callable[[Command], Command]:
    """`--overwrite`. what: of ours it replaces."""
    return click.option(
        "--overwrite",
        is_flag=True,
        help=f"Replace {what} that v4quant wrote, once the new one is whole.",
    )


def threads_option(command: Command) -> Command:
    """`--threads` of a forward pass."""
    return click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        help="Threads of passes and solvers on the CPU (default: all cores, or OMP_NUM_THREADS).",
    )(command)


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
        type=Choice(["f32", "bf16", *more]),
        default="f32",
        show_default=True,
        help=f"{told}.",
    )
