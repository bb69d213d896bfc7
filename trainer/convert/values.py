"""Values of a config.json, checked: each reader takes (settings, key, where) and raises ConfigError for what does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from chatmill.config import ConfigError


def number(raw: Mapping[str, Any], key: str, where: str) -> float | None:
    """A finite number, or None where the key is missing or null. Raises ConfigError for anything else."""
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: {key} is {value!r}; expected a number.")
    return float(value)


def integer(raw: Mapping[str, Any], key: str, where: str) -> int | None:
    """A whole number above 0, or None where the key is missing or null. Raises ConfigError for anything else."""
    value = number(raw, key, where)
    if value is not None and (value != int(value) or value <= 0):
        raise ConfigError(f"{where}: {key} is {raw[key]!r}; expected a whole number above 0.")
    return None if value is None else int(raw[key])


def flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    """True or false; false where the key is missing or null. Raises ConfigError for anything else, such as "false"."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{where}: {key} is {value!r}; expected true or false.")
    return bool(value)
