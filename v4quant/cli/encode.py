"""`v4quant encode`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

import v4quant
from v4quant.cli import _output
from v4quant.cli._options import MODE_NAMES, checked_mode
from v4quant.cli._types import Choice
from v4quant_calibration.corpus.chat_dialects import RELEASES
from v4quant_calibration.corpus.chat_marks import EncodingError

MAX_MESSAGES_BYTES = 2**28


@click.command(
    epilog="Example: v4quant encode chat.json --mode think-high --ids --tokenizer DeepSeek-V4-Flash"
)
@click.argument("messages", metavar="MESSAGES.json")
@click.option(
    "--mode",
    metavar=MODE_NAMES,
    callback=checked_mode,
    required=True,
    help="How the model is to think.",
)
@click.option("--ids", is_flag=True, help="Print token ids instead of text; needs --tokenizer.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="A checkpoint's folder, or a tokenizer.json.",
)
@click.option(
    "--release",
    type=Choice(RELEASES),
    default=RELEASES[0],
    show_default=True,
    help="preview: V4 of April; 0731: its high is the preview's max; v41: V4.1.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def encode(
    messages: str, mode: str, ids: bool, tokenizer: Path | None, release: str, as_json: bool
) -> None:
    """Print the exact prompt of a chat, BOS included and nothing after it.

    MESSAGES.json holds a list of messages, or an object with `messages` and `tools`; `-` reads
    stdin. With a user's message last, the prompt ends where the model's reply begins.
    """
    if ids and tokenizer is None:
        raise click.UsageError("--ids needs --tokenizer, a checkpoint's folder or tokenizer.json")
    chat, tools = _read_chat(messages)
    found = v4quant.encode(
        chat, mode=mode, tools=tools, release=release, tokenizer=tokenizer if ids else None
    )
    if as_json:
        _output.emit(found.as_dict())
    elif found.ids is not None:
        _output.data(" ".join(map(str, found.ids)))
    else:
        _output.exact(found.prompt)


def _read_chat(name: str) -> tuple[Any, Any]:
    """Messages and tools as the file has them; encoding checks what they are."""
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_MESSAGES_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(MAX_MESSAGES_BYTES + 1)
        if len(data) > MAX_MESSAGES_BYTES:
            raise EncodingError(f"{name}: larger than {MAX_MESSAGES_BYTES >> 20} MiB, no one chat")
        value = json.loads(data)
    except OSError as error:
        raise EncodingError(f"{name}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise EncodingError(f"{name}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        return value, None
    if "messages" not in value or not set(value) <= {"messages", "tools"}:
        raise EncodingError(f"{name}: must be a list, or an object with 'messages' and 'tools'")
    return value["messages"], value.get("tools")
