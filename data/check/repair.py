"""Rebuild damaged token shards from the dialogue shards; a result is used only if its sha256 is the manifest's.

    chatmill data verify DIR --repair

Token shards are a pure function of the dialogues, the tokenizer and the block and shard sizes, all of which the data-set folder
holds: what a disk has flipped, cut or lost in one tier is in the other. Dialogues are encoded again up to the last damaged
shard. Dialogue shards themselves can only be built again: what is damaged is named, with the command that makes the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.files import sha256_file, sync
from chatmill.progress import Report

from ..shards.dialogues import read_dialogues
from ..shards.index import DamagedShardError
from ..shards.manifest import fingerprints, read_manifest
from ..shards.quarantine import find_damage, read_quarantine, write_quarantine
from ..shards.writer import ShardWriter
from ..tokenizer.tokenizer import ChatTokenizer

SCRATCH = ".repair-"
META = ("tokenizer_sha256", "template_sha256", "recipe_sha256", "vocab_size")


def repair_dataset(path: str | Path, progress: Report | None = None) -> list[str]:
    """Restore what can be restored; one line per damaged file that says what became of it."""
    folder = Path(path)
    manifest = read_manifest(folder)
    lines: list[str] = []
    for left_by_a_killed_repair in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(left_by_a_killed_repair)
    for split, part in manifest["splits"].items():
        damaged = [k for k, record in enumerate(part["shards"]) if _damaged(folder / split, record)]
        if damaged:
            lines += _repair_split(folder, manifest, split, damaged, progress)
    _shorten_quarantine(folder, manifest)
    return lines + _lost_dialogues(folder, manifest)


def _lost_dialogues(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """A line per damaged dialogue shard. Tokens alone do not give the texts back: they lack names, times and lineage."""
    place = folder / "dialogues"
    return [
        f"dialogues/{record['name']}: not restored, nothing in this folder holds its texts. Take it from a backup, or build "
        f"the same raw files elsewhere (chatmill data build RECIPE --out {folder.name}-again) and copy "
        f"dialogues/{record['name']} from there: the same Chatmill gives the same bytes, sha256 {record['sha256']}"
        for records in manifest.get("dialogues", {}).values()
        for record in records
        if not (place / record["name"]).is_file() or sha256_file(place / record["name"]) != record["sha256"]
    ]


def _shorten_quarantine(folder: Path, manifest: dict[str, Any]) -> None:
    """What is whole again needs no quarantine."""
    try:
        held = read_quarantine(folder, fingerprints(manifest))
        still = {split: {(b.shard, b.block) for b in find_damage(folder, manifest, split)} for split in held}
    except DamagedShardError:  # `verify` names it
        return
    left = {split: tuple(b for b in blocks if (b.shard, b.block) in still[split]) for split, blocks in held.items()}
    if left != held:
        write_quarantine(folder, left, fingerprints(manifest))


def _damaged(folder: Path, record: dict[str, Any]) -> list[str]:
    expected = ((record["name"], record["sha256"]), (record["index"], record["index_sha256"]))
    return [name for name, sha in expected if not (folder / name).is_file() or sha256_file(folder / name) != sha]


def _repair_split(
    folder: Path,
    manifest: dict[str, Any],
    split: str,
    damaged: list[int],
    progress: Report | None,
) -> list[str]:
    records = manifest["splits"][split]["shards"]
    lines: list[str] = []
    # In the data-set folder: a rename must not cross file systems.
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        made = _write_again(folder, manifest, split, Path(scratch), damaged[-1], lines, progress)
        for k in damaged:
            for name in _damaged(folder / split, records[k]):
                fresh = made / name
                expected = records[k]["sha256" if name == records[k]["name"] else "index_sha256"]
                if not fresh.is_file() or hashlib.sha256(fresh.read_bytes()).hexdigest() != expected:
                    lines.append(f"{split}/{name}: not restored, its dialogues do not give its sha256 again")
                    continue
                # The damaged file stays in place until this rename; the fresh one was synced when it was written.
                shutil.move(fresh, folder / split / name)
                sync(folder / split)
                lines.append(f"{split}/{name}: restored from the dialogue shards, sha256 as in the manifest")
    return lines


def _write_again(
    folder: Path,
    manifest: dict[str, Any],
    split: str,
    scratch: Path,
    last: int,
    lines: list[str],
    progress: Report | None,
) -> Path:
    """Shards 0 .. last of a split below scratch, as far as the dialogues can be read. Returns their folder."""
    sizes, records = manifest["recipe"]["shards"], manifest["splits"][split]["shards"]
    tokenizer = ChatTokenizer.load(folder / "tokenizer")
    wanted, number = sum(record["dialogues"] for record in records[: last + 1]), 0
    texts = read_dialogues(folder, manifest["dialogues"][split])
    for first, end, digest in _generations(manifest, split):  # each began with a shard of its own
        if first > last:
            break
        writer = ShardWriter(
            scratch,
            split,
            vocab_size=manifest["vocab_size"],
            meta={name: manifest[name] for name in META} | {"recipe_sha256": digest},
            block_dialogues=sizes["block_dialogues"],
            shard_bytes=int(sizes["shard_mb"] * (1 << 20)),
            first=first,
        )
        try:
            for conversation in islice(texts, sum(record["dialogues"] for record in records[first:end])):
                if number == wanted:
                    break
                writer.add(tokenizer.encode_dialogue(conversation), conversation.source, conversation.origin)
                number += 1
                if progress:
                    progress(f"repair {split}", number, wanted)
            writer.close()
        except ConfigError as error:
            writer.abandon()
            lines.append(f"{split}: the dialogue shards are damaged too: {error}")
            break
    return scratch / split


def _generations(manifest: dict[str, Any], split: str) -> Iterator[tuple[int, int, str]]:
    """(first shard, shard after the last, recipe_sha256) of what each build or collection wrote of a split."""
    first = 0
    for state in manifest.get("generations", ()):
        end = int(state["splits"][split]["shards"])
        yield first, end, str(state["recipe_sha256"])
        first = end
    if not first:
        yield 0, len(manifest["splits"][split]["shards"]), str(manifest["recipe_sha256"])
