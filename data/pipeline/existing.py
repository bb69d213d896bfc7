"""A data set that later exports are added to: what it holds, and whether a recipe still describes it.

base = Existing.open(Path("corpora/chats")); base.check(recipe, given); base.formats()
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.files import sha256_file

from ..importers.speakers import together
from ..recipe import DataRecipe, SourceSection
from ..samples.table import SampleTable
from ..shards.manifest import read_manifest
from ..shards.quarantine import QUARANTINE
from .inputs import recipe_facts, source_facts
from .work_folder import load_arrays

SAMPLES = "samples.npz"
FileKey = tuple[str, str, str]  # source_key, sha256, name inside an archive
AGAIN = "Build the data set again: chatmill data build RECIPE"


@dataclass(frozen=True)
class Existing:
    """A data-set folder as it is: its manifest, its report.json, and the table of its samples (data/samples/table.py)."""

    folder: Path
    manifest: dict[str, Any]
    report: dict[str, Any]
    table: SampleTable

    @classmethod
    def open(cls, folder: Path) -> Existing:
        """Raises ConfigError where the set cannot grow."""
        manifest = read_manifest(folder)
        if "given" not in manifest or SAMPLES not in manifest["files"]:
            raise ConfigError(
                f"data set {folder}: built by a version of Chatmill that could not add to a data set.\n{AGAIN}, once. "
                "What is exported later can then be collected."
            )
        for name in (SAMPLES, "report.json"):
            if not (folder / name).is_file() or sha256_file(folder / name) != manifest["files"][name]:
                raise ConfigError(f"data set {folder}: {name} is missing or damaged, so nothing can be added.\n{AGAIN}")
        if (folder / QUARANTINE).is_file():
            raise ConfigError(
                f"data set {folder}: has damaged blocks in its quarantine. Restore them first:\n"
                f"chatmill data verify {folder} --repair"
            )
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return cls(folder, manifest, report, SampleTable.from_arrays(load_arrays(folder / SAMPLES)))

    @property
    def generations(self) -> list[dict[str, Any]]:
        """The states of the set so far; a set that was never added to has one."""
        parts, dialogues = self.manifest["splits"], self.manifest["dialogues"]
        state = {s: {"shards": len(parts[s]["shards"]), "dialogue_shards": len(dialogues[s])} for s in parts}
        first = {"recipe_sha256": self.manifest["recipe_sha256"], "splits": state}
        return list(self.manifest.get("generations") or [first])

    def source_keys(self) -> list[str]:
        """source_key of each source that the inputs of the manifest count."""
        return [json.dumps(source, sort_keys=True) for source in self.manifest["recipe"]["sources"]]

    def speakers(self, source: SourceSection) -> dict[str, dict[str, int]]:
        """Who spoke in the files of a source, where the order of speaking decided the roles: name -> role -> turns."""
        keys, found = self.source_keys(), self.manifest["speakers"]
        return together(found[k] for k, key in enumerate(keys) if key == source_key(source))

    def formats(self) -> dict[FileKey, str]:
        """The format of every raw file that was read."""
        keys = self.source_keys()
        return {file_key(keys[record["source"]], record): record["format"] for record in self.manifest["inputs"]}

    def check(self, recipe: DataRecipe, given: Mapping[str, Any]) -> None:
        """ConfigError that says what the recipe has otherwise than the set. Sources may be added."""
        old, new = dict(self.manifest["recipe"]), recipe_facts(recipe)
        sources = old.pop("sources"), new.pop("sources")
        found = [*_sources_changed(*sources), *_changes(old, new)]
        before = self.manifest["given"]
        if before.get("version") != given["version"]:
            found.append("this version of Chatmill reads or cleans otherwise than the one that built the set")
        if before.get("benchmarks") != given["benchmarks"]:
            found.append("dedup.decontaminate: the evaluation sets are not the same")
        if (before.get("tokenizer"), before.get("template")) != (given.get("tokenizer"), given.get("template")):
            found.append("tokenizer: not the one of the set, or another chat template")
        if found:
            raise ConfigError(
                f"data set {self.folder}: the recipe is not the one that it was built with, and a set has one set of rules:\n"
                + "\n".join(f"  {line}" for line in found)
                + "\nUndo that; or build the set again (chatmill data build RECIPE), here or in another place (out=FOLDER)."
            )


def source_key(source: SourceSection) -> str:
    """What makes two sources the same: all fields but where the files lie."""
    return json.dumps(source_facts(source), sort_keys=True)


def file_key(source: str, record: Mapping[str, Any]) -> FileKey:
    """Of a record of the manifest's inputs. source: source_key of its source."""
    return source, str(record["sha256"]), str(record.get("member", ""))


def _sources_changed(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """What is wrong where the old sources are not among the new ones, in their order."""
    rest = iter(new)
    missing = [number for number, source in enumerate(old, 1) if source not in rest]
    if not missing:
        return []
    if len(new) < len(old):
        return [
            f"sources: {len(old)} in the set, {len(new)} in the recipe; the set holds the dialogues of one that was removed"
        ]
    k = missing[0]
    return [f"sources: source {k}: {line}" for line in _changes(old[k - 1], new[k - 1])] or [
        f"sources: source {k} has gone, or its place among the others has changed"
    ]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """`clean.privacy.mode: was off, is redact` for every field that differs."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(before, after, f"{path}{key}.")
        elif before != after:
            yield f"{path}{key}: was {_word(before)}, is {_word(after)}"


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"
