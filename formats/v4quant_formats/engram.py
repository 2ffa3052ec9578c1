"""Engram's constants: which rows of its tables an n-gram of tokens is hashed to.

V4.1 looks rows of large tables up before some layers. All of it follows from a few numbers of the
config and the tokenizer: the token map, prime numbers, and random multipliers of NumPy's generator.

* Token map: ids whose text is the same but for case, accents and white space share a compressed id.
* Primes: every layer has one for every order of n-gram (2 up) and head, the smallest above
  `vocab_size` - 1 that no column before it has, whatever its layer. A table has a row for every
  remainder: the sum of its layer's primes.
* Hash of position s: with c_i the compressed id i tokens back, H_1 = c_0 m_0 and
  H_n = H_{n-1} xor c_{n-1} m_{n-1}; the column of order n and a head reads row H_n mod its prime,
  behind the rows of the columns before it.

The formulas are those of the inference code that came with the release; see docs/architecture.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from v4quant_formats.config_fields import ConfigError
from v4quant_formats.errors import is_library_failure

_SEED = 10007
_INT64_MAX = 2**63 - 1
# Bases that tell primes from composites for every number below 3.3e24 (Sorenson and Webster).
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
_SPACE = "\ue000"
_LONGEST_TOKEN = 2**14  # characters; V4.1's have at most 256


@dataclass(frozen=True)
class EngramTable:
    """One layer's columns, ordered by n-gram order, then head.

    primes, offsets: of every column. multipliers: by distance from the position.
    """

    layer: int
    primes: tuple[int, ...]
    offsets: tuple[int, ...]
    multipliers: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return sum(self.primes)


@lru_cache(maxsize=8)
def engram_tables(
    layers: tuple[int, ...], vocab_size: int, heads: int, max_ngram: int, compressed_size: int
) -> tuple[EngramTable, ...]:
    """The tables of all Engram layers, in order.

    compressed_size: compressed ids there are, from which multipliers get their range.
    """
    used: set[int] = set()
    tables = []
    for layer in layers:
        primes: list[int] = []
        for _ in range(max_ngram - 1):
            candidate = vocab_size - 1
            for _ in range(heads):
                candidate += 1
                while candidate in used or not is_prime(candidate):
                    candidate += 1
                used.add(candidate)
                primes.append(candidate)
        offsets = tuple(accumulate(primes[:-1], initial=0))
        factors = multipliers(layer, max_ngram, compressed_size)
        tables.append(EngramTable(layer, tuple(primes), offsets, factors))
    return tuple(tables)


def multipliers(layer: int, count: int, compressed_size: int) -> tuple[int, ...]:
    """A layer's `count` odd factors, so small that no product with a compressed id overflows."""
    bound = max(1, _INT64_MAX // compressed_size // 2)
    drawn = np.random.default_rng(_SEED * layer).integers(0, bound, size=count, dtype=np.int64)
    return tuple((drawn * 2 + 1).tolist())


def is_prime(number: int) -> bool:
    """Whether a number below 3.3e24 is prime (Miller-Rabin with fixed bases)."""
    if number < 2 or any(number % p == 0 for p in _WITNESSES):
        return number in _WITNESSES
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in _WITNESSES:
        x = pow(base, odd, number)
        if x in (1, number - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % number
            if x == number - 1:
                break
        else:
            return False
    return True


def read_token_map(
    data: bytes | None, tokenizer: Path, vocab_size: int, compressed_size: int
) -> tuple[int, ...]:
    """The compressed id of every token id, from a tokenizer.json: its bytes, and where it lies.

    Raises ConfigError when the file is missing (None) or unreadable, or gives another number of
    compressed ids than `compressed_size`: every multiplier follows from it, and rows would differ.
    """
    from tokenizers import Tokenizer

    if data is None:
        raise ConfigError(
            f"{tokenizer}: file is missing, but Engram's rows are hashed from it; download it "
            "beside the shards"
        )
    try:
        found = token_map(Tokenizer.from_str(data.decode()), vocab_size)
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise ConfigError(f"{tokenizer}: cannot be read as a tokenizer ({error})") from None
    size = max(found) + 1
    if size != compressed_size:
        raise ConfigError(
            f"{tokenizer}: gives {size:,} compressed token ids, config.json says "
            f"engram_compressed_vocab_size {compressed_size:,}; this is not the tokenizer the "
            "Engram tables were trained with"
        )
    return found


def token_map(tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The compressed id of every token id; the first id of a text gets the next number.

    tokenizer: a `tokenizers.Tokenizer`.
    """
    normalizer = _normalizer()
    numbers: dict[str, int] = {}
    found = []
    for token in range(vocab_size):
        text = tokenizer.decode([token], skip_special_tokens=False)
        if len(text) > _LONGEST_TOKEN:
            raise ValueError(f"token {token} has {len(text):,} characters")
        if "\ufffd" in text:  # no text of its own: a piece of a character
            key = tokenizer.id_to_token(token)
        else:
            key = normalizer.normalize_str(text) or text
        found.append(numbers.setdefault(key, len(numbers)))
    return tuple(found)


def _normalizer() -> Any:
    """Case, accents and white space away; a text that is one space stays one."""
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _SPACE),
            normalizers.Strip(),
            normalizers.Replace(_SPACE, " "),
        ]
    )
