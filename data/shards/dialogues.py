"""Dialogue shards, the auditable tier: one `<uid>.json` per sample in ordinary tars, readable by plain webdataset.

writer = DialogueWriter(folder, "train"); writer.add(uid, line); records = writer.close()
for conversation in read_dialogues(folder, records): ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..conversation import Conversation, load_line
from .index import TAR_END, DamagedShardError, tar_member, walk_members
from .manifest import dropped
from .writer import SHARD_BYTES, TarFile


class DialogueWriter:
    """Numbered tars `<split>-NNNNN.tar` under folder/dialogues, counted from `first`."""

    def __init__(self, folder: Path, split: str, shard_bytes: int = SHARD_BYTES, first: int = 0) -> None:
        self.folder, self.split, self.shard_bytes, self.first = folder / "dialogues", split, shard_bytes, first
        self._records: list[dict[str, Any]] = []
        self._tar: TarFile | None = None
        self._samples = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, uid: str, line: bytes) -> None:
        """Append one sample: its JSON line as made by conversation.dump_line."""
        if self._tar is None:
            self._tar = TarFile(self.folder, f"{self.split}-{self.first + len(self._records):05d}.tar")
        self._tar.put(tar_member(f"{uid}.json", line.rstrip(b"\n")))
        self._samples += 1
        if self._tar.size >= self.shard_bytes:
            self.close()

    def close(self) -> list[dict[str, Any]]:
        """Finish the last tar; one manifest record per tar."""
        if self._tar is not None:
            self._records.append(self._tar.finish() | {"samples": self._samples})
            self._tar, self._samples = None, 0
        return self._records


def present_dialogues(folder: Path, manifest: Mapping[str, Any], split: str) -> Iterator[Conversation]:
    """The dialogues of a split in order, as training sees them: without those that a longer export has replaced."""
    gone = set(dropped(manifest, split))
    for place, conversation in enumerate(read_dialogues(folder, manifest["dialogues"][split])):
        if place not in gone:
            yield conversation


def read_dialogues(folder: Path, records: Iterable[Mapping[str, Any]]) -> Iterator[Conversation]:
    """All samples of the given tars in order; DamagedShardError where a tar holds fewer or others than its record says."""
    for record in records:
        path = folder / "dialogues" / record["name"]
        if not path.is_file():
            raise DamagedShardError(f"{path} is missing. Rebuild the data set.")
        count = 0
        data = path.read_bytes()
        if not data.endswith(TAR_END):
            raise DamagedShardError(f"{path}: the end marker is missing; the file is cut short. Rebuild the data set.")
        for name, start, size in walk_members(data, str(path)):
            try:
                conversation = load_line(data[start : start + size])
            except (ValueError, KeyError) as error:
                raise DamagedShardError(f"{path}, member {name}: not a dialogue ({error})") from error
            if name != f"{conversation.uid}.json":
                raise DamagedShardError(f"{path}, member {name}: holds dialogue {conversation.uid}")
            yield conversation
            count += 1
        if count != record["samples"]:
            raise DamagedShardError(f"{path}: {count} samples, the manifest says {record['samples']}")
