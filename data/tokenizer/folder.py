"""The files of a tokenizer folder, which checkpoints hold too: their names, tokenizer_config.json and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatmill.run_files import list_checkpoints

from .generation_settings import GENERATION

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", GENERATION)


def tokenizer_folder(place: Path) -> Path:
    """Where the tokenizer of a run (its newest checkpoint) or of a data set lies; any other place is left as it is."""
    if (place / "tokenizer.json").is_file():
        return place
    checkpoints = [folder for folder in list_checkpoints(place) if (folder / "tokenizer.json").is_file()]
    return next(
        (folder for folder in (*checkpoints[::-1], place / "tokenizer") if (folder / "tokenizer.json").is_file()), place
    )


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
