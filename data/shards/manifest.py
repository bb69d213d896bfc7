"""manifest.json of a data-set folder: its splits, shards and hashes, checked when read.

manifest = read_manifest(Path("corpora/chitchat")); fingerprint(manifest, "train")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.files import is_plain_name

from .index import DamagedShardError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


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
    except ValueError as error:
        raise DamagedShardError(f"{where}: not JSON ({error}). Rebuild the data set.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_VERSION:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ConfigError(f"{where}: format {found!r}, this version reads {FORMAT_VERSION}. Rebuild the data set.")
    for name in _names(manifest):
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
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
