"""Which raw files a path, URL, folder or glob names, and which of them belong together in an app's export.

files = distinct(find_files("exports/")); aside = uploads(files)
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from chatmill.config import ConfigError

from ..remote.files import RemotePath, find_remote, is_url
from ..remote.modelscope import MODELSCOPE, modelscope_files
from .compressed import zip_files
from .files import RawFile

_DAY_FILE = re.compile(r"(^|/)\d{4}-\d\d-\d\d\.json$")
_SLACK_LISTS = re.compile(r"(^|/)(users|channels|groups|dms|mpims|integration_logs)\.json$")
# ChatGPT's export: its conversations, what is always beside them, and names of files that people uploaded.
_CONVERSATIONS = re.compile(r"conversations(-\d+)?\.json")
_BESIDE = {"chat.html", "message_feedback.json", "shared_conversations.json", "export_manifest.json"}
_UPLOAD = re.compile(r"file[-_][0-9A-Za-z]{3,}.*")
_UPLOADS = re.compile(r"dalle-generations|user-\w+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

Folder = tuple[Path | RemotePath, tuple[str, ...], str]  # file or folder, zips inside it, folder in the last of them


def find_files(pattern: str) -> list[RawFile]:
    """Files named by a path, URL, folder (all files in it) or glob, sorted; members of zips, and of zips in them, singly."""
    path = Path(pattern).expanduser()
    paths: list[Path] | list[RemotePath]
    if pattern.startswith(MODELSCOPE):
        paths = modelscope_files(pattern)
    elif is_url(pattern):
        paths = find_remote(pattern)
    elif path.is_dir():
        paths = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]  # noqa: PTH207 (a pattern)
    if not paths:
        raise ConfigError(f"source {pattern!r}: no such file, folder or matching glob{_hub_forms(pattern)}")
    files: list[RawFile] = []
    for p in paths:
        if p.suffix.lower() == ".zip":
            files += [RawFile(p, name, inside=inside) for inside, name in zip_files(p)]
        else:
            files.append(RawFile(p))
    return _channels(files)


def _hub_forms(pattern: str) -> str:
    """How data sets of a hub are named, where somebody may have meant one."""
    if not pattern.startswith(("hf://", "modelscope://")) and not re.fullmatch(r"[\w.-]+/[\w.-]+", pattern):
        return ""
    return (
        ". A data set of a hub is hf://datasets/ORG/NAME or modelscope://datasets/ORG/NAME, followed by @REVISION and /FILES "
        "where wanted; a private one needs HF_TOKEN or MODELSCOPE_API_TOKEN."
    )


def distinct(files: list[RawFile]) -> list[RawFile]:
    """The same files; those of one name get the folders that tell them apart: `2023/x.jsonl`, `2024/x.jsonl`."""
    files = list(files)
    for _ in range(max((str(file.path).count("/") for file in files), default=0)):
        labels = Counter(file.label for file in files)
        if labels.total() == len(labels):
            break
        files = [replace(f, folders=f.folders + 1) if labels[f.label] > 1 else f for f in files]
    return files


def uploads(files: Iterable[RawFile]) -> set[RawFile]:
    """The files of a ChatGPT export that are no conversations: uploaded texts, pictures, lists. They are nobody's documents.

    In its zip that is all but the conversations. In a folder, to which people add files, it is what has the name of an upload
    or lies in a folder that the export made.
    """
    beside: dict[Folder, set[str]] = {}
    files = list(files)
    for file in files:
        beside.setdefault(_folder(file), set()).add(_name(file))
    roots = {f for f, names in beside.items() if names & _BESIDE and any(map(_CONVERSATIONS.fullmatch, names))}
    found = set()
    for file in files:
        folders = str(file.path).split("/")[:-1]
        if not any(_is_below(file, root) for root in roots) or _CONVERSATIONS.fullmatch(_name(file)):
            continue
        if file.member is not None or _UPLOAD.fullmatch(_name(file)) or any(map(_UPLOADS.fullmatch, folders)):
            found.add(file)
    return found


def _name(file: RawFile) -> str:
    return (file.member or file.path.name).rpartition("/")[2]


def _folder(file: RawFile) -> Folder:
    """The folder that a file is in."""
    if file.member is None:
        return file.path.parent, (), ""
    return file.path, file.inside, file.member.rpartition("/")[0]


def _is_below(file: RawFile, root: Folder) -> bool:
    """Is a file in a folder, or in a folder of it?"""
    path, inside, folder = root
    if file.member is None:
        return not inside and not folder and str(file.path).startswith(f"{path}/")
    if (file.path, file.inside[: len(inside)]) != (path, inside):
        return False
    member = (*file.inside, file.member)[len(inside)]
    return not folder or member.startswith(f"{folder}/")


def _channels(files: list[RawFile]) -> list[RawFile]:
    """The day files of a Slack export (YYYY-MM-DD.json below users.json), one RawFile per channel; other files unchanged."""
    roots = {_folder(file) for file in files if file.stem.endswith("users.json")}
    out: dict[RawFile, None] = {}
    for file in files:
        folder = _folder(file)
        if file.member is not None:
            owner: Folder = (file.path, file.inside, folder[2].rpartition("/")[0])
            channel = RawFile(file.path, folder[2] + "/", inside=file.inside)
        else:
            owner, channel = (file.path.parent.parent, (), ""), RawFile(file.path.parent)
        day = _DAY_FILE.search(file.stem) is not None
        if owner in roots and day:
            out[channel] = None
        elif not (_SLACK_LISTS.search(file.stem) and (owner in roots or folder in roots)):
            out[file] = None
    return list(out)
