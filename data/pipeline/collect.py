"""Add later exports to a data set: what is there stays, what is new comes after it.

    report = collect(load_data_recipe("chats"))         # chatmill data collect chats

Raw files are known by their sha256, so those that were read before are not read again under any name. Of the others,
dialogues that the set has already are dropped and counted; new ones become new shards. Sides and uids of the set stay
(data/samples/placing.py). A conversation that goes on in a later export replaces its shorter form: that stays in its shard,
out of sight of all readers but those who open an earlier generation of the set, as a training does that began before
(data/shards/manifest.py).

It is a command of its own, not a build that finds a set in its way: a build promises that its bytes depend on recipe and files
alone, and so it must make all of them again. What collecting gives depends on what was there, too. Where no set is there, it
builds one.

Contract: the set changes in one step or not at all; a collecting that was killed continues where it stopped.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.files import remove_leftovers, sha256_file
from chatmill.progress import Report, silent

from ..importers.registry import source_files
from ..raw.files import RawFile
from ..recipe import DataRecipe
from ..remote.files import is_url
from ..shards.manifest import MANIFEST
from ..tokenizer.tokenizer import ChatTokenizer
from .existing import Existing, FileKey, file_key, source_key
from .inputs import Sources, describe_inputs, digest_of, given_facts, given_tokenizer, hash_files, raw_files
from .pipeline import HASHES, Build, build_dataset, phases, work_for
from .seen import SeenFiles
from .work_folder import build_lock, remove_work


def phases_of(recipe: DataRecipe, out: str | Path | None = None) -> list[str]:
    """What a collecting will report, in order."""
    goal = str(out or recipe.place)
    return phases(recipe, is_given=not is_url(goal) and (Path(goal) / MANIFEST).is_file())


def collect(recipe: DataRecipe, out: str | Path | None = None, progress: Report | None = None) -> dict[str, Any]:
    """Add what is new in the recipe's sources to its data set. Returns the report of what was read now.

    Beside the fields of a build's report: "known": files that were read before; "gone": labels of files that the set has read
    and that the sources no longer hold; "added": {"files", "train", "validation", "replaced", "samples"} where anything was
    read.
    """
    goal = str(out or recipe.place)
    if is_url(goal):
        raise ConfigError(
            f"{goal}: later exports are added to a folder, not to a URL. Give out=FOLDER here, and copy the folder after it."
        )
    folder = Path(goal).absolute()
    if folder.parent.is_dir():
        remove_leftovers(folder.parent, folder.name)  # of a kill where two folders cannot be exchanged: the old one comes back
    if not (folder / MANIFEST).is_file():
        return build_dataset(recipe, folder, progress)
    with build_lock(folder):
        base = Existing.open(folder)
        given = given_facts(recipe, given_tokenizer(recipe))
        base.check(recipe, given)
        return _Collection(recipe, base, given, progress).run()


class _Collection:
    """What the sources hold now, beside what the set has read."""

    def __init__(self, recipe: DataRecipe, base: Existing, given: dict[str, Any], progress: Report | None) -> None:
        self.recipe, self.base, self.progress = recipe, base, progress
        seen, self.formats = SeenFiles.load(base.folder), base.formats()
        self.keys = [source_key(source) for source in recipe.sources]
        found = [file for source in recipe.sources for file in source_files(source)]
        (progress or silent)(HASHES, 0, 1)
        self.hashes = hash_files(found, seen)
        (progress or silent)(HASHES, 1, 1)
        self.files, left_out = raw_files(recipe, lambda number, file: self._format(number, file) is not None)
        inputs = describe_inputs(recipe, self.files, seen, self._format)
        self.new = [k for k, (number, file) in enumerate(self.files) if self._format(number, file) is None]
        here = {file_key(self.keys[record["source"]], record) for record in inputs}
        self.gone = self._gone(here)
        everything = [*inputs, *self.gone]
        # With files that are gone the set holds more than a build would give: the build must not take it for its own.
        digest = digest_of(recipe, everything, given)
        self.sources = Sources(digest, everything, [inputs[k] for k in self.new], given, left_out, seen)

    def _format(self, number: int, file: RawFile) -> str | None:
        """Of a file that was read for an equal source before; None of a new one."""
        return self.formats.get((self.keys[number], self.hashes.get(file.path, ""), file.member_path))

    def _gone(self, here: set[FileKey]) -> list[dict[str, Any]]:
        """Records of the set's files that the sources do not hold now, with the numbers of today's sources."""
        numbers = {key: number for number, key in reversed(list(enumerate(self.keys)))}
        keys = self.base.source_keys()
        records = [(keys[record["source"]], record) for record in self.base.manifest["inputs"]]
        return [{**record, "source": numbers[key]} for key, record in records if file_key(key, record) not in here]

    def run(self) -> dict[str, Any]:
        """Read, place and publish what is new."""
        folder, recipe = self.base.folder, self.recipe
        more = {"known": len(self.files) - len(self.new), "gone": [record["file"] for record in self.gone]}
        if not self.new:
            remove_work(folder)  # of an attempt that was killed after it had published
            self.sources.seen.save(folder)
            files = {"formats": {}, "left_out": self.sources.left_out}
            known = self.base.report
            kept = {key: known[key] for key in ("splits", "certificate", "repeats", "texts") if key in known}
            return {"name": recipe.name, "files": files, "stages": [], "built": False, "out": str(folder), **kept, **more}
        state = hashlib.sha256(f"{self.sources.digest}{sha256_file(folder / MANIFEST)}".encode()).hexdigest()
        work = work_for(folder, recipe, [self.files[k] for k in self.new], self.sources.read, state)
        tokenizer = ChatTokenizer.load(folder / "tokenizer")
        report = Build(work, folder, self.sources, tokenizer, self.progress, self.base).run("shard")
        remove_work(folder)
        return report | more
