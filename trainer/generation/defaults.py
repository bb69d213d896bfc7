"""The sampling settings that a model's makers ship with it.

    sampling_of({"do_sample": True, "temperature": 0.6, "top_k": 20})    # temperature 0.6, top_k 20, top_p and min_p off

They stand in generation_config.json and have the meaning that transformers gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from chatmill.config import ConfigError

from .sampling import Sampling


def sampling_of(settings: Mapping[str, Any]) -> dict[str, float | int | None]:
    """The sampling knobs that a generation_config.json names; empty where it says nothing about sampling.

    Where it names one of temperature, top_k, top_p and min_p, or asks for sampling, those that it does not name are off and the
    temperature is 1. `do_sample: false` is temperature 0. Raises ConfigError for a value that is none.
    """
    found: dict[str, float | int | None] = {}
    for name, kind in (
        ("temperature", float),
        ("top_k", int),
        ("top_p", float),
        ("min_p", float),
        ("repetition_penalty", float),
    ):
        value = settings.get(name)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or kind(value) != value:
            raise ConfigError(f"generation_config.json: {name} is {value!r}; expected a number.")
        found[name] = kind(value)
    sample = settings.get("do_sample")
    if sample is not None or found.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        found = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None} | found
    if sample is False:
        found["temperature"] = 0.0
    if found.get("top_k") in (0, -1):  # written by programs that mean: off
        found["top_k"] = None
    try:
        Sampling(**found)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"generation_config.json: {error}") from None
    return found
