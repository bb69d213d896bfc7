"""generation_config.json: the tokens that end a reply, and how the model's makers sample it.

    settings = read_settings(Path("models/llama-1b"))            # {} where the folder has none
    end_ids(settings)                                            # (128001, 128008, 128009)
    with_ids(settings, stops=[128009, 128001], bos=128000)       # the same settings, with these tokens

The file belongs to transformers, vLLM reads it too, and both end a reply at every token of its eos_token_id. What else it says
is kept as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError

GENERATION = "generation_config.json"
# Marks of the program that wrote the file. transformers replaces the settings by its own guess where it reads the first one.
_MARKS = ("_from_model_config", "transformers_version")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder; empty where it has no such file. Raises ConfigError for a file that is no JSON object."""
    path = folder / GENERATION
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(found).__name__}.")
    end_ids(found, str(path))
    return found


def end_ids(settings: Mapping[str, Any], where: str = GENERATION) -> tuple[int, ...]:
    """The tokens of `eos_token_id`, which is missing, a number or a list. Raises ConfigError for anything else."""
    found = settings.get("eos_token_id")
    ids = [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
    wrong = [i for i in ids if not isinstance(i, int) or isinstance(i, bool)]
    if wrong:
        raise ConfigError(f"{where}: eos_token_id holds {wrong[0]!r}; expected a token id, or a list of them.")
    return tuple(dict.fromkeys(ids))


def as_setting(ids: Iterable[int]) -> int | list[int] | None:
    """The value of `eos_token_id` for these tokens: nothing, one number, or a list."""
    found = list(dict.fromkeys(ids))
    return None if not found else found[0] if len(found) == 1 else found


def with_ids(
    settings: Mapping[str, Any], stops: Iterable[int], bos: int | None = None, pad: int | None = None
) -> dict[str, Any]:
    """The settings with these tokens: stops replace eos_token_id; bos and pad are added where they are missing."""
    found = {key: value for key, value in settings.items() if key not in _MARKS and key != "eos_token_id"}
    for name, value in (("bos_token_id", bos), ("pad_token_id", pad)):
        if value is not None and found.get(name) is None:
            found[name] = value
    ends = as_setting(stops)
    return found if ends is None else {**found, "eos_token_id": ends}


def to_bytes(settings: Mapping[str, Any]) -> bytes:
    """The file."""
    return (json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
