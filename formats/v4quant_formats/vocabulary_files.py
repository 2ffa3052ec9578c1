"""What a checkpoint's small files say of its vocabulary, against each other and config.json.

A tokenizer that was swapped, or edited in one of its four files, converts without complaint and
makes other text of the same ids. Weights tell nothing of it; but the files repeat one another, and
every V4 has the same marks. Nothing here stops anything: each contradiction is named.

A GGUF file's vocabulary is judged from its pairs (gguf/pairs.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.config_fields import ConfigError, short
from v4quant_formats.errors import FormatError
from v4quant_formats.json_object import json_object
from v4quant_formats.sidecars import CHAT_TEMPLATE, MAX_SIDECAR_BYTES, TOKENIZER, place_of
from v4quant_formats.small_files import read_small

_BOS, _EOS, _USER = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"
_MARKS = {"bos": _BOS, "eos": _EOS}
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_DOES = {"bos": "begin", "eos": "end"}
_SHOWN = 3


@dataclass(frozen=True)
class _Vocabulary:
    """tokenizer.json's tokens: ids by content, and the contents of special ones."""

    ids: Mapping[str, int]
    special: frozenset[str]


def odd_vocabulary(checkpoint: Checkpoint) -> Iterator[str]:
    """Contradictions among tokenizer.json, its companions and config.json, one sentence each."""
    if checkpoint.container:
        return
    files: dict[str, dict[str, Any]] = {}
    for name in (TOKENIZER, *_SETTINGS, "added_tokens.json", "generation_config.json"):
        try:
            found = _read(checkpoint, name)
        except FormatError as error:
            yield str(error)
            continue
        if found is not None:
            files[name] = found
    text = checkpoint.config.get("text_config")
    config = {**(text if isinstance(text, Mapping) else {}), **checkpoint.config}
    yield from _of_generation(config, files.get("generation_config.json", {}))
    yield from _of_templates(checkpoint, files.get("tokenizer_config.json", {}))
    if TOKENIZER not in files:
        return
    try:
        vocabulary = _vocabulary(files[TOKENIZER])
    except (KeyError, TypeError, ValueError, AttributeError):
        yield f"{TOKENIZER} is not byte-level BPE as V4's is, with a vocabulary and merges"
        return
    yield from _of_model(files[TOKENIZER], vocabulary)
    yield from _of_ids(config, vocabulary)
    for name in _SETTINGS:
        yield from _of_settings(name, files.get(name, {}), config, vocabulary)
    for token, number in files.get("added_tokens.json", {}).items():
        if vocabulary.ids.get(token) != number:
            said = f"token {token[:40]!r} is number {short(number)}"
            yield f"added_tokens.json says {said}, {TOKENIZER} has {vocabulary.ids.get(token)}"


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    path = place_of(checkpoint, name)
    if not path.is_file():
        return None
    try:
        return json_object(read_small(path, MAX_SIDECAR_BYTES), path)
    except ConfigError as error:
        raise FormatError(str(error)) from None


def _vocabulary(tokenizer: Mapping[str, Any]) -> _Vocabulary:
    """Raises what other things than a vocabulary raise."""
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise ValueError
    ids = {str(token): int(number) for token, number in model["vocab"].items()}
    added = [(str(a["content"]), int(a["id"]), a.get("special")) for a in _added(tokenizer)]
    ids |= {content: number for content, number, _ in added}
    return _Vocabulary(ids, frozenset(content for content, _, special in added if special))


def _added(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(tokenizer.get("added_tokens") or ())


def _of_model(tokenizer: Mapping[str, Any], vocabulary: _Vocabulary) -> Iterator[str]:
    """The rules of splitting and merging."""
    if _steps(tokenizer.get("normalizer"), "normalizers"):
        yield f"{TOKENIZER} changes text before it splits it (a normalizer), V4's does not"
    if "ByteLevel" not in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        yield f"{TOKENIZER} does not split text into bytes, as V4's does"
    lost = 0
    for merge in tokenizer["model"].get("merges") or ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        known = isinstance(pair, list) and len(pair) == 2
        lost += not (known and all(str(t) in vocabulary.ids for t in (*pair, "".join(pair))))
    if lost:
        yield f"{TOKENIZER} merges tokens that its vocabulary has not ({lost:,} merges)"
    if len(tokenizer["model"]["merges"] or ()) < len(vocabulary.ids) // 2 - 256:
        yield f"{TOKENIZER} lacks the merges of most of its tokens"


def _steps(step: object, key: str) -> list[str]:
    """The kinds of a step, which may be a sequence of some; none for null."""
    if not isinstance(step, Mapping):
        return []
    inner = step.get(key) if step.get("type") == "Sequence" else [step]
    return [str(s.get("type")) for s in inner or () if isinstance(s, Mapping)]


def _of_ids(config: Mapping[str, Any], vocabulary: _Vocabulary) -> Iterator[str]:
    size = config.get("vocab_size")
    beyond = [t for t, n in vocabulary.ids.items() if isinstance(size, int) and not 0 <= n < size]
    if beyond:
        told = ", ".join(f"{t[:40]!r} is {vocabulary.ids[t]}" for t in beyond[:_SHOWN])
        yield f"{TOKENIZER} has numbers beyond config.json's vocab_size {size} ({told})"
    if (twice := len(vocabulary.ids) - len({*vocabulary.ids.values()})) > 0:
        yield f"{TOKENIZER} has {twice} numbers for two tokens each"
    for name, mark in _MARKS.items():
        key, number = f"{name}_token_id", vocabulary.ids.get(mark)
        said = config.get(key)
        if number is None:
            yield f"{TOKENIZER} has no {mark}, with which V4's texts {_DOES[name]}"
        elif said is not None and number not in (said if isinstance(said, list) else [said]):
            yield f"config.json's {key} is {short(said)}, {TOKENIZER} has {mark} as {number}"
        elif mark not in vocabulary.special:
            yield f"{TOKENIZER} has {mark} as plain text, V4's is a special token"


def _of_settings(
    name: str, settings: Mapping[str, Any], config: Mapping[str, Any], vocabulary: _Vocabulary
) -> Iterator[str]:
    """bos_token and eos_token of a companion, which are texts or objects with one."""
    for kind in _MARKS:
        said = settings.get(f"{kind}_token")
        token = said.get("content") if isinstance(said, Mapping) else said
        if token is None:
            continue
        number, wanted = vocabulary.ids.get(str(token)), config.get(f"{kind}_token_id")
        ids = wanted if isinstance(wanted, list) else [wanted]
        if number is None:
            yield f"{name}'s {kind}_token is {short(token)}, which {TOKENIZER} has not"
        elif wanted is not None and number not in ids:
            told = f"{short(token)}, token {number}"
            yield f"{name}'s {kind}_token is {told}; config.json says {short(wanted)}"


def _of_generation(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Iterator[str]:
    for kind in _MARKS:
        key = f"{kind}_token_id"
        said, wanted = (_ids(table.get(key)) for table in (generation, config))
        if said and wanted and not said & wanted:
            told = f"{short(generation[key])}, config.json's {short(config[key])}"
            yield f"generation_config.json's {key} is {told}"


def _ids(value: object) -> set[str]:
    return {str(v) for v in (value if isinstance(value, list) else [value]) if v is not None}


def _of_templates(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[str]:
    """Chat templates: the file's and tokenizer_config.json's, of which one is enough."""
    path, inner = place_of(checkpoint, CHAT_TEMPLATE), settings.get("chat_template")
    try:
        file = read_small(path, MAX_SIDECAR_BYTES).decode() if path.is_file() else None
    except (FormatError, UnicodeDecodeError) as error:
        yield f"{CHAT_TEMPLATE} cannot be read ({error})"
        return
    if file is not None and isinstance(inner, str) and file.strip() != inner.strip():
        yield f"{CHAT_TEMPLATE} and tokenizer_config.json hold two different chat templates"
    for name, template in ((CHAT_TEMPLATE, file), ("tokenizer_config.json", inner)):
        if template is not None and _USER not in json.dumps(template, ensure_ascii=False):
            yield f"{name}'s chat template does not say {_USER}, so it is not V4's"
