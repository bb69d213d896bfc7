"""Template arguments, `enable_thinking: false` for example, written into the template as its defaults.

    source = with_arguments(source, {"enable_thinking": False})

The template then prints the same as the original one with these arguments, wherever it goes: in the data set, in checkpoints,
in exports, in this server and in others. An argument of a request (`chat_template_kwargs`) still wins, because only what is
not defined is set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from chatmill.config import ConfigError

from ..template import ChatTemplate


def with_arguments(source: str, arguments: Mapping[str, Any]) -> str:
    """The template with defaults for its arguments. Raises ConfigError for arguments that it does not read."""
    if not arguments:
        return source
    try:
        ChatTemplate(source, dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"))).check_variables(arguments)
    except ConfigError as error:
        raise ConfigError(f"tokenizer.template_arguments: {error}") from None
    lines = [
        f"{{%- set {name} = {name} if {name} is defined else {_literal(value, name)} -%}}\n"
        for name, value in sorted(arguments.items())
    ]
    return "".join(lines) + source


def _literal(value: Any, name: str) -> str:
    """A JSON value as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_literal(item, name) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k), ensure_ascii=False)}: {_literal(v, name)}" for k, v in value.items()) + "}"
    raise ConfigError(f"tokenizer.template_arguments.{name}: expected a text, number, true, false, null, list or mapping.")
