"""A recipe by its file or by the name of a shipped one.

    recipe_file("tiny", Path("trainer/recipes"))

Standard library only: a typo is named before anything that takes time is imported.
"""

from __future__ import annotations

import difflib
from pathlib import Path


class UnknownRecipeError(LookupError):
    """Neither a file nor the name of a shipped recipe. The message lists those and names the nearest."""


def recipe_file(name: str, folder: Path) -> Path:
    """Path of the recipe. Raises UnknownRecipeError."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = folder / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    near = difflib.get_close_matches(name, [*names, *(str(file) for file in Path().glob("*.y*ml"))], n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownRecipeError(
        f"recipe not found: {name!r} is neither a file nor a shipped recipe.{hint}\nShipped: {', '.join(names)}."
    )
