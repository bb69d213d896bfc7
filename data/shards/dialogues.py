"""Dialogue shards, the auditable tier: one `<uid>.json` per sample in ordinary tars, readable by plain webdataset.

writer = DialogueWriter(folder, "train"); writer.add(uid, line); records = writer.close()
for conversation in read_dialogues(folder, records): ...
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from chatmill.files import sync

from ..conversation import Conversation, load_line
from .index import TAR_END, DamagedShardError, tar_member, walk_members


class DialogueWriter:
    """Numbered tars `<split>-NNNNN.tar` under folder/dialogues."""

    def __init__(self, folder: Path, split: str, shard_bytes: int = 256 << 20) -> None:
        self.folder, self.split, self.shard_bytes = folder / "dialogues", split, shard_bytes
        self._records: list[dict[str, Any]] = []
        self._file: Any = None
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, uid: str, line: bytes) -> None:
        """Append one sample: its JSON line as made by conversation.dump_line."""
        if self._file is None:
            self._name = f"{self.split}-{len(self._records):05d}.tar"
            self._file = (self.folder / f".{self._name}.partial").open("wb")
            self._digest, self._bytes, self._samples = hashlib.sha256(), 0, 0
        self._put(tar_member(f"{uid}.json", line.rstrip(b"\n")))
        self._samples += 1
        if self._bytes >= self.shard_bytes:
            self._finish()

    def close(self) -> list[dict[str, Any]]:
        """Finish the last tar; one manifest record per tar."""
        if self._file is not None:
            self._finish()
        return self._records

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def _finish(self) -> None:
        self._put(TAR_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        (self.folder / f".{self._name}.partial").replace(self.folder / self._name)
        sync(self.folder)
        self._records.append(
            {"name": self._name, "bytes": self._bytes, "sha256": self._digest.hexdigest(), "samples": self._samples}
        )


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
