"""Single fields of config.json: read with their type and range, or refused by name.

`where` is what messages call the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from v4quant_kernels.errors import V4QuantError


class ConfigError(V4QuantError):
    """config.json is missing, not JSON, or lacks or contradicts a field."""


def short(value: Any) -> str:
    """A value for a message, however large it is."""
    return repr(value)[:80]


def is_integers(value: Any) -> TypeGuard[list[int]]:
    """Whether a value is a list of whole numbers."""
    return isinstance(value, list) and all(
        isinstance(i, int) and not isinstance(i, bool) for i in value
    )


def integer(
    raw: dict[str, Any], key: str, where: str, minimum: int = 1, default: int | None = None
) -> int:
    """A whole number of at least `minimum`. Raises ConfigError."""
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum or value > 2**40:
        raise ConfigError(f"{where}: '{key}' is {short(value)}, expected an integer >= {minimum}")
    return value


def number(raw: dict[str, Any], key: str, where: str) -> float:
    """A finite number that is not negative. Raises ConfigError."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
        raise ConfigError(f"{where}: '{key}' is {short(value)}, expected a number >= 0")
    return float(value)


def positive(raw: dict[str, Any], key: str, where: str) -> float:
    """A finite number above zero. Raises ConfigError."""
    value = number(raw, key, where)
    if not value:
        raise ConfigError(f"{where}: '{key}' is {short(raw[key])}, expected a number above 0")
    return value


def layer_ids(raw: dict[str, Any], key: str, layers: int, where: str) -> tuple[int, ...]:
    """A list of layers below `layers`. Raises ConfigError."""
    value = raw.get(key)
    if not is_integers(value) or not all(0 <= i < layers for i in value):
        raise ConfigError(f"{where}: '{key}' must list layers between 0 and {layers - 1}")
    return tuple(value)


def raise_first(problems: list[tuple[bool, str]], where: str) -> None:
    """Raise ConfigError with the text of the first problem that is one."""
    for wrong, text in problems:
        if wrong:
            raise ConfigError(f"{where}: {text}")


def check_yarn(scaling: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for keys that make another YaRN than V4's, which scales angles only and
    rounds the range it does that in."""
    plain: dict[str, tuple[Any, ...]] = {
        "attention_factor": (None, 1), "mscale": (None, 0), "mscale_all_dim": (None, 0),
        "truncate": (None, True),
    }  # fmt: skip
    for key, allowed in plain.items():
        if scaling.get(key) not in allowed:
            raise ConfigError(f"{where} has {key} {short(scaling[key])}; V4's YaRN has none")
