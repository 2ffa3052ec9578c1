"""Small JSON files from strangers, each of which must hold one object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from v4quant_formats.config_fields import ConfigError
from v4quant_formats.json_limits import (
    MAX_JSON_DEPTH,
    MAX_JSON_VALUES,
    has_too_many_values,
    is_too_deep,
)
from v4quant_formats.system import open_regular

MAX_CONFIG_BYTES = 16 * 2**20


def read_json_object(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON file that must hold one object. Raises ConfigError with file and reason."""
    try:
        # A size proves nothing for a device or a pipe, so what is read is bounded too.
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: is not a regular file")
        with open_regular(path) as file:
            data = b"" if path.stat().st_size > limit else file.read(limit + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: file is missing; download it beside the shards") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not data or len(data) > limit:
        raise ConfigError(f"{path}: is empty or above this file's limit of {limit:,} bytes")
    return json_object(data, path)


def json_object(data: bytes, path: Path) -> dict[str, Any]:
    """The one object that JSON text from `path` must hold. Raises ConfigError."""
    if has_too_many_values(data):
        raise ConfigError(f"{path}: holds more than {MAX_JSON_VALUES:,} values; not our file")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    if is_too_deep(value):
        raise ConfigError(f"{path}: is nested deeper than {MAX_JSON_DEPTH} levels")
    return value
