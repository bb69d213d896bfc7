"""Names of parameters and fields stand out in the docstrings of the page on Python (mkdocs.yml: an extension of griffe)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import griffe


class Names(griffe.Extension):  # type: ignore[misc]
    """Marks `name: …`, `name (N, H): …` and `name Int32["T"]: …` where they begin a line or a sentence."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """After a function was read."""
        mark(func, [parameter.name for parameter in func.parameters])

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """After a class and its members were read."""
        first = cls.members.get("__init__")
        names = [name for name, member in cls.members.items() if member.is_attribute]
        mark(cls, names + ([p.name for p in first.parameters] if isinstance(first, griffe.Function) else []))


def mark(item: griffe.Object, names: Iterable[str]) -> None:
    """Set the names in the item's docstring in bold code."""
    known = [name for name in names if name not in ("self", "cls")]
    if item.docstring is None or not known:
        return
    one = "|".join(map(re.escape, known))
    begins = rf"(?m)(?:^|(?<=[.;] ))((?:{one})(?:, (?:{one}))*)(?=:? |: )(?=: | \(| Int| Float| Bool)"
    item.docstring.value = re.sub(begins, lambda found: f"**`{found[1]}`**", item.docstring.value)
