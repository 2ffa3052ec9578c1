"""encode: the exact prompt of a chat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4quant.api.arguments import PathLike
from v4quant_calibration.corpus.chat_dialects import RELEASES
from v4quant_calibration.corpus.chat_encoding import encode_messages
from v4quant_calibration.corpus.tokenizer import TextTokenizer


@dataclass(frozen=True)
class EncodedChat:
    """A prompt, BOS included and nothing after it; ids where a tokenizer was given."""

    mode: str
    release: str
    prompt: str
    ids: tuple[int, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        table: dict[str, Any] = {"mode": self.mode, "release": self.release, "prompt": self.prompt}
        return table if self.ids is None else {**table, "ids": list(self.ids)}


def encode(
    messages: Any,
    *,
    mode: str,
    tools: Any = None,
    release: str = RELEASES[0],
    tokenizer: PathLike | None = None,
) -> EncodedChat:
    """The prompt of a list of chat messages, each an object with `role` and `content`.

    With a user's message last, the prompt ends where the model's reply begins. tokenizer: a
    checkpoint's folder or its tokenizer.json, for ids. Raises EncodingError and TokenizerError.
    """
    prompt = encode_messages(messages, mode, tools=tools, release=release)
    if tokenizer is None:
        return EncodedChat(mode, release, prompt)
    file = Path(tokenizer)
    encoder = TextTokenizer(file / "tokenizer.json" if file.is_dir() else file)
    return EncodedChat(mode, release, prompt, tuple(encoder(prompt).tolist()))
