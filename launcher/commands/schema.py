"""JSON schemas of the recipes, by which editors complete and check them (`# yaml-language-server: $schema=FILE`).

chatmill schema train > schema.json      # the files beside the shipped recipes are these
"""

from __future__ import annotations

import json

from chatmill.config import Section

KINDS = ("train", "data", "sweep")


def schema_of(kind: str) -> str:
    """The schema of a kind of recipe, as JSON text."""
    if kind == "data":
        from ...data.recipe import DataRecipe

        found: type[Section] = DataRecipe
    elif kind == "sweep":
        from ..sweep.config import SweepConfig

        found = SweepConfig
    else:
        from ...trainer.config import Recipe

        found = Recipe
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **found.model_json_schema()}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
