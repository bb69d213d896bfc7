"""Where a data set goes, a folder or a URL, and whether the same one is there already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.progress import Report

from ..remote.files import publish_remotely, read_remote_json, remote_files
from ..shards.manifest import MANIFEST, read_manifest


def built_report(folder: Path, digest: str) -> dict[str, Any] | None:
    """The report of a data-set folder that came from the same inputs and recipe and is all there."""
    try:
        manifest = read_manifest(folder)
    except ConfigError:
        return None
    report = folder / "report.json"
    files = [report, *(folder / split / record["name"] for split, record in _shards(manifest))]
    if manifest.get("recipe_sha256") != digest or not all(file.is_file() for file in files):
        return None
    content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return content


def published_report(url: str, digest: str) -> dict[str, Any] | None:
    """built_report of a data set at a URL."""
    manifest = read_remote_json(url, MANIFEST)
    if manifest is None or manifest.get("recipe_sha256") != digest:
        return None
    found = remote_files(url)
    whole = set(manifest["files"]) <= set(found) and all(
        found.get(f"{split}/{record['name']}") == record["bytes"] for split, record in _shards(manifest)
    )
    return read_remote_json(url, "report.json") if whole else None


def copy_out(folder: Path, url: str, report: dict[str, Any], progress: Report | None) -> dict[str, Any]:
    """Move a data set from the folder where it was built to its URL; its report."""
    publish_remotely(folder, url, (lambda done, total: progress("copy", done, total)) if progress else None)
    shutil.rmtree(folder)
    return report | {"out": url}


def _shards(manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(split, record) for split, part in manifest["splits"].items() for record in part["shards"]]
