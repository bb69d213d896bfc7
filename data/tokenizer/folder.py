"""The files of a tokenizer folder, which checkpoints hold too: their names, tokenizer_config.json and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .generation_settings import GENERATION

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", GENERATION)


def config_in(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none."""
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config


def template_in(folder: Path) -> str | None:
    """The source of the chat template: chat_template.jinja, else the one in tokenizer_config.json; None where there is none."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    found = config_in(folder).get("chat_template")
    if isinstance(found, list):  # several named templates
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found
