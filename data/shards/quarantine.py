"""Blocks that a data set must do without: found by `verify`, written down once, honoured by every reader in the same way.

    chatmill data verify DIR --quarantine 0.001      # names the damaged blocks in DIR/quarantine.json, at most that share
    chatmill train RECIPE data.damaged_blocks=0.001  # without that consent a data set with a quarantine is refused

Nothing is decided while training: a block that turns out damaged then stops the run with its name and that command. The list
carries its own sha256 and the fingerprint of the split it belongs to. A run that is continued leaves the blocks out from the
step on at which it is continued: its past stays as it was, and every rank of any world size skips the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.files import write_durably

from .index import DamagedShardError, ShardIndex, block_hash, decode_block

QUARANTINE = "quarantine.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class HeldBlock:
    """Block `block` of a shard, what is wrong with it, and what is lost with it."""

    shard: str
    block: int
    reason: str
    dialogues: int
    tokens: int
    loss_tokens: int

    @property
    def where(self) -> str:
        """`train-00000.tar, block 3`."""
        return f"{self.shard}, block {self.block}"


Quarantine = Mapping[str, tuple[HeldBlock, ...]]  # by split


def find_damage(folder: Path, manifest: Mapping[str, Any], split: str) -> list[HeldBlock]:
    """Every block of a split that cannot be read as it was written. DamagedShardError where an index is not whole."""
    found = []
    for record in manifest["splits"][split]["shards"]:
        index_file, file = folder / split / record["index"], folder / split / record["name"]
        raw = index_file.read_bytes() if index_file.is_file() else b""
        if hashlib.sha256(raw).hexdigest() != record["index_sha256"]:
            raise DamagedShardError(
                f"{split}/{record['index']}: missing or damaged; what the shard held is not known without it.\n"
                "Restore it with: chatmill data verify DIR --repair"
            )
        index = ShardIndex.from_bytes(raw, str(index_file))
        descriptor = os.open(file, os.O_RDONLY) if file.is_file() else None
        first = 0
        try:
            for b, (start, size, count) in enumerate(zip(index.offset, index.size, index.dialogues, strict=True)):
                reason = _reason(descriptor, int(start), int(size), int(index.xxh3[b]), f"{file}, block {b}")
                span = slice(first, first + int(count))
                first += int(count)
                if reason is not None:
                    tokens, loss = (int(column[span].sum(dtype="int64")) for column in (index.lengths, index.loss_tokens))
                    found.append(HeldBlock(record["name"], b, reason, int(count), tokens, loss))
        finally:
            if descriptor is not None:
                os.close(descriptor)
    return found


def _reason(descriptor: int | None, start: int, size: int, expected: int, where: str) -> str | None:
    if descriptor is None:
        return "the shard is missing"
    try:
        data = os.pread(descriptor, size, start)
    except OSError as error:  # a bad sector
        return f"cannot be read ({error.strerror})"
    if len(data) < size:
        return f"cut short: {len(data)} of {size} bytes"
    if block_hash(data) != expected:
        return "bytes differ from those written (xxh3)"
    try:
        decode_block(data, where)
    except ConfigError as error:
        return str(error)
    return None


def write_quarantine(folder: Path, found: Quarantine, fingerprints: Mapping[str, str]) -> None:
    """Write the list, or remove the old one where there is nothing to hold. fingerprints: by split (manifest.fingerprint)."""
    path = folder / QUARANTINE
    if not any(found.values()):
        path.unlink(missing_ok=True)
        return
    splits = {
        split: {"fingerprint": fingerprints[split], "blocks": [asdict(block) for block in blocks]}
        for split, blocks in found.items()
        if blocks
    }
    content: dict[str, Any] = {"format": FORMAT_VERSION, "splits": splits}
    write_durably(path, (json.dumps(content | {"sha256": _seal(content)}, indent=1) + "\n").encode())


def read_quarantine(folder: Path, fingerprints: Mapping[str, str]) -> Quarantine:
    """The list of a data-set folder, empty where there is none; DamagedShardError where it is not as written or not its own."""
    path = folder / QUARANTINE
    return parse_quarantine(path.read_bytes(), str(path), fingerprints) if path.is_file() else {}


def parse_quarantine(raw: bytes, where: str, fingerprints: Mapping[str, str]) -> Quarantine:
    """Inverse of write_quarantine."""
    advice = "Write it again with: chatmill data verify DIR --quarantine SHARE"
    try:
        content = json.loads(raw)
        seal = content.pop("sha256")
        if content["format"] != FORMAT_VERSION or seal != _seal(content):
            raise ValueError("its sha256 is not that of its content")
        found = {split: tuple(HeldBlock(**b) for b in part["blocks"]) for split, part in content["splits"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedShardError(f"{where}: not the list that was written ({error}). {advice}") from error
    for split, part in content["splits"].items():
        if part["fingerprint"] != fingerprints.get(split):
            raise DamagedShardError(f"{where}: belongs to another build of the data set (split {split}). {advice}")
    return found


def check_consent(where: str, split: str, held: tuple[HeldBlock, ...], blocks: int, allowed: float) -> None:
    """ConfigError where more of the split is held back than the reader agreed to."""
    share = len(held) / blocks
    if share > allowed:
        names = "; ".join(f"{block.where}: {block.reason}" for block in held[:5]) + ("; …" if len(held) > 5 else "")
        raise ConfigError(
            f"data set {where}: {len(held)} of {blocks} blocks of {split} ({share:.3%}) are in its quarantine, "
            f"a share of {allowed:g} is allowed: {names}.\n"
            f"Restore them (chatmill data verify {where} --repair), or agree to do without: "
            f"data.damaged_blocks={_round_up(share):g}."
        )


def _round_up(share: float) -> float:
    return min(0.999, -(-share * 10_000 // 1) / 10_000)


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
