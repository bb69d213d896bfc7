"""Data sets of ModelScope's hub, which fsspec does not know: fetched into the hub's own cache and read there.

    modelscope_files("modelscope://datasets/ORG/NAME@REVISION/data/*.jsonl")

Caches, tokens and mirrors: MODELSCOPE_CACHE, MODELSCOPE_API_TOKEN, MODELSCOPE_ENDPOINT.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

from chatmill.config import ConfigError
from chatmill.hub import modelscope_library

MODELSCOPE = "modelscope://"
_NAME = re.compile(r"modelscope://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<files>.+))?")


def modelscope_files(url: str) -> list[Path]:
    """The files that a URL names, fetched where they are not here yet; none where the hub has none. Raises ConfigError."""
    match = _NAME.fullmatch(url.rstrip("/"))
    if match is None:
        return []
    library = modelscope_library()
    api, files = library.HubApi(), match["files"]
    patterns = None if files is None else [files, f"{files}/*"]
    try:
        folder = Path(api.download_repo(match["repo"], "dataset", revision=match["revision"], allow_patterns=patterns))
    except library.NotExistError:
        return []
    except Exception as error:  # its own errors, and those of the HTTP library
        raise ConfigError(f"source {url!r}: cannot be fetched: {type(error).__name__}: {error}") from error
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    wanted = (name for name in found if patterns is None or any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    return [found[name] for name in wanted if not any(part.startswith(".") for part in name.split("/"))]
