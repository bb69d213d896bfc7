"""manifest.json of a data-set folder: its splits, shards and hashes, checked when read.

manifest = read_manifest(Path("corpora/chitchat")); fingerprint(manifest, "train")

A set to which `chatmill data collect` added later exports has generations. Shards are only ever added. A dialogue that a
longer export replaced stays in its shard and is listed as dropped, from a generation on. So every earlier state of the set
can still be read exactly: `as_of(manifest, "train", fingerprint)` is its manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.files import is_plain_name

from .index import DamagedShardError

MANIFEST = "manifest.json"
SEEN = "seen.json"  # of raw files: size, time of change and sha256, so that collecting need not read them again
FORMAT_VERSION = 1
COLLECTED_VERSION = 2  # with generations: a reader that does not know them would learn from replaced dialogues


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a data-set folder; ConfigError where it is missing or damaged."""
    file = path / MANIFEST
    if not file.is_file():
        what = "has no manifest.json" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"data set {path}: {what}. Build it with: chatmill data build RECIPE\n"
            "If it was moved: data.path=FOLDER for training, --data FOLDER for `chatmill eval`."
        )
    return parse_manifest(file.read_bytes(), str(file))


def parse_manifest(raw: bytes, where: str) -> dict[str, Any]:
    """A manifest whose format is known and whose names stay inside the data-set folder."""
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedShardError(f"{where}: not JSON ({error}). Rebuild the data set.") from error
    if not isinstance(manifest, dict) or manifest.get("format") not in (FORMAT_VERSION, COLLECTED_VERSION):
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        known = f"{FORMAT_VERSION} and {COLLECTED_VERSION}"
        raise ConfigError(f"{where}: format {found!r}, this version reads {known}. Rebuild the data set.")
    try:
        names = list(_names(manifest))
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedShardError(f"{where}: not a manifest ({type(error).__name__}: {error}). Rebuild the data set.") from error
    for name in names:
        if not is_plain_name(name):
            raise DamagedShardError(f"{where}: names a file outside the folder: {name!r}. Rebuild the data set.")
    return manifest


def _names(manifest: Mapping[str, Any]) -> Iterator[Any]:
    """Every file or folder name in a manifest, path part by path part."""
    for split, part in manifest.get("splits", {}).items():
        yield split
        for record in part["shards"]:
            yield from (record["name"], record["index"])
    for records in manifest.get("dialogues", {}).values():
        yield from (record["name"] for record in records)
    for path in manifest.get("files", {}):
        yield from path.split("/")


def fingerprints(manifest: Mapping[str, Any]) -> dict[str, str]:
    """fingerprint() of every split."""
    return {split: fingerprint(manifest, split) for split in manifest["splits"]}


def fingerprint(manifest: Mapping[str, Any], split: str) -> str:
    """sha256 that changes with any token, mask, order, tokenizer or template of the split."""
    parts = [str(manifest["tokenizer_sha256"]), str(manifest["template_sha256"]), split]
    parts += [record["sha256"] for record in manifest["splits"][split]["shards"]]
    if gone := dropped(manifest, split):
        parts.append("dropped " + ",".join(map(str, gone)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def dropped(manifest: Mapping[str, Any], split: str) -> list[int]:
    """Places, counted from 0 over all shards of a split, of the dialogues that are in them but no longer in the set."""
    return sorted(int(place) for _, place, _, _ in manifest["splits"][split].get("dropped", ()))


def totals(shards: Sequence[Mapping[str, Any]], gone: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
    """The record of a split. shards: their records; gone: [generation, place, tokens, loss tokens] of each dropped dialogue."""
    counts = {key: sum(int(record[key]) for record in shards) for key in ("dialogues", "tokens", "loss_tokens", "blocks")}
    if not gone:
        return {"shards": list(shards), **counts}
    counts["dialogues"] -= len(gone)
    counts["tokens"] -= sum(int(entry[2]) for entry in gone)
    counts["loss_tokens"] -= sum(int(entry[3]) for entry in gone)
    return {"shards": list(shards), **counts, "dropped": [list(entry) for entry in gone]}


def generation(manifest: dict[str, Any], number: int) -> dict[str, Any]:
    """The manifest as it was after generation `number` (0: the first build); the last one is the set as it is."""
    state = manifest["generations"][number]["splits"]
    splits, dialogues = {}, {}
    for split, part in manifest["splits"].items():
        gone = [entry for entry in part.get("dropped", ()) if entry[0] <= number]
        splits[split] = totals(part["shards"][: state[split]["shards"]], gone)
        dialogues[split] = manifest["dialogues"][split][: state[split]["dialogue_shards"]]
    return {**manifest, "splits": splits, "dialogues": dialogues}


def as_of(manifest: dict[str, Any], split: str, wanted: str) -> dict[str, Any] | None:
    """The manifest of the newest generation in which the split has this fingerprint; None where no generation has."""
    if fingerprint(manifest, split) == wanted:
        return manifest
    earlier = range(len(manifest.get("generations", ())) - 2, -1, -1)
    states = (generation(manifest, number) for number in earlier)
    return next((state for state in states if fingerprint(state, split) == wanted), None)
