"""Arguments as people write them, and what they mean: sources, sizes, corpora, arithmetic.

What needs torch is imported where it is used: `plan` reads a source's name here, and no more.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from v4quant import __version__
from v4quant.builtin import resolve_corpus
from v4quant.hub.refs import HubRef, is_hub, parse_hub
from v4quant.shell import command_line
from v4quant.sizes import parse_size
from v4quant.source import Source, resolve_source
from v4quant_calibration.corpus.chat_keys import CHAT_KEYS, MESSAGES
from v4quant_formats.errors import OutputError
from v4quant_kernels.errors import OptionError
from v4quant_kernels.late import torch

if TYPE_CHECKING:
    from v4quant_calibration.corpus.corpus import Corpus
    from v4quant_calibration.model.options import ForwardOptions
    from v4quant_formats.checkpoint import Checkpoint
    from v4quant_formats.model_config import ModelConfig

PathLike = str | os.PathLike[str]
SourceLike = PathLike | HubRef
"""A checkpoint: its folder, `hf://owner/name[@revision]`, or `builtin:tiny-v4`; `:QUANT` behind a
folder or repository chooses among GGUF files."""
Size = str | int | None
"""Bytes, or a text like "6GB"; None for no limit."""


def source_of(value: SourceLike) -> Source:
    """Raises BuiltinError or HubReferenceError."""
    return value if isinstance(value, Path | HubRef) else resolve_source(os.fspath(value))


def adapter_of(value: SourceLike | None) -> Source | None:
    """A folder or a repository; None stays None. Raises HubReferenceError."""
    if value is None or isinstance(value, Path | HubRef):
        return value
    text = os.fspath(value)
    return parse_hub(text) if is_hub(text) else Path(text)


def destination_of(value: SourceLike) -> Path | HubRef:
    """A folder, or a repository's name. Raises HubReferenceError."""
    if isinstance(value, HubRef):
        return value
    text = os.fspath(value)
    return parse_hub(text) if is_hub(text) else output_of(text)


def path_of(value: PathLike | None) -> Path | None:
    """None stays None."""
    return None if value is None else Path(value)


def output_of(value: PathLike) -> Path:
    """Where something is to be written; `.` and `x/..` by the names they lead to, for files and
    folders beside are named after it. Raises OutputError where there is no name."""
    path = Path(value)
    if path.name in ("", ".."):
        path = Path(os.path.realpath(path))
    if not path.name or "\0" in str(path):
        raise OutputError(f"{str(path)!r}: cannot be a result's name; give another one")
    return path


def size_of(value: Size) -> int | None:
    """Bytes. Raises SizeError."""
    return parse_size(value) if isinstance(value, str) else value


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """The checkpoint's config.json, complete enough to run the model. Raises ConfigError."""
    from v4quant_calibration.forward.checkpoint_params import model_config  # torch

    return model_config(checkpoint)


_CHANGE_NOTHING = ("progress", "overwrite", "threads", "max_memory", "scratch")


def asked_of(command: str, given: Mapping[str, object]) -> dict[str, object]:
    """What a command is asked, from its arguments by name (`locals()` before anything else): those
    that decide its result, alike however they were written."""
    wanted = {k: _plain(v) for k, v in given.items() if k not in _CHANGE_NOTHING}
    return {"command": command, **wanted}


def _plain(value: object) -> object:
    if isinstance(value, os.PathLike | HubRef):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


# What a process holds before it reads a text.
_BASE_BYTES = 300 * 2**20


def read_corpus(
    names: PathLike | Sequence[PathLike],
    checkpoint: Checkpoint,
    config: ModelConfig,
    seq_len: int | None,
    tokens: int | None,
    mode: str,
    chat_keys: str = MESSAGES,
    skip_bad_rows: int = 0,
    enough: int | None = None,
    max_memory: int | None = None,
) -> Corpus:
    """Load the corpus that files or `builtin:` names make up, with the checkpoint's tokenizer.

    enough: tokens of a long text that will do, where not `tokens`. max_memory: of the process.
    Raises BuiltinError, OptionError, CorpusError or TokenizerError.
    """
    from v4quant_calibration.corpus.chat_dialects import DEFAULT_RELEASE  # torch
    from v4quant_calibration.corpus.corpus import CorpusRequest, load_corpus
    from v4quant_calibration.corpus.tokenizer import tokenizer_of

    files = listed_files(names)
    release = "v41" if checkpoint.config.get("model_type") == "deepseek_v41" else DEFAULT_RELEASE
    request = CorpusRequest(
        seq_len,
        tokens,
        config.bos_token_id,
        config.vocab_size,
        mode,
        release,
        chat_keys_of(chat_keys),
        rows_of(skip_bad_rows),
        enough,
        None if max_memory is None else max_memory - _BASE_BYTES,
    )
    return load_corpus(files, tokenizer_of(checkpoint), request)


def chat_keys_of(value: str) -> str:
    """Under which keys rows have their chats. Raises OptionError."""
    if value not in CHAT_KEYS:
        raise OptionError(f"--chat-keys {value!r}: choose one of {', '.join(CHAT_KEYS)}")
    return value


def rows_of(value: int) -> int:
    """How many bad rows may be left out. Raises OptionError."""
    if value < 0:
        raise OptionError(f"--skip-bad-rows {value} is below zero")
    return value


def listed_files(names: PathLike | Sequence[PathLike]) -> list[Path]:
    """The files that names, or one name, of a corpus mean. Raises BuiltinError."""
    return resolve_corpus(given_names(names))


def given_names(names: PathLike | Sequence[PathLike]) -> list[str]:
    """What a corpus was given as: one name, or several."""
    listed = [names] if isinstance(names, str | os.PathLike) else names
    return [os.fspath(name) for name in listed]


def corpus_names(names: PathLike | Sequence[PathLike]) -> list[str]:
    """What a corpus is called, without the folders it lies in."""
    return [Path(name).name for name in given_names(names)]


def forward_options(activations: str, products: str = "f32") -> ForwardOptions:
    """How the forward pass multiplies: activations "plain", "kv" or "official"; products "f32",
    "bf16" or "kernels"."""
    from v4quant_calibration.model.options import ACTIVATIONS, ForwardOptions  # torch

    return ForwardOptions(
        activations=activations if activations in ACTIVATIONS else "plain",
        matmul_dtype=torch.float32 if products == "f32" else torch.bfloat16,
        expert_kernels=products == "kernels",
    )


def tool_facts() -> dict[str, str]:
    """Versions and the command (empty in a Python program), for reports."""
    from v4quant_kernels import cpu_products  # torch

    library = cpu_products.decided()
    own = Path(sys.argv[0]).name in ("v4quant", "__main__.py") if sys.argv else False
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": command_line(["v4quant", *sys.argv[1:]]) if own else "",
        **({"float32_products": library} if library else {}),
    }
