"""The importers by name, and detection of a file's format.

An importer is a module with `recognise(head, name)` and `read(file, options, source, ledger)`; see the Protocol below.
Adding one: write the module, add its name here and a renderer in tests/data/importers/importer_formats.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Protocol, cast

from chatmill.config import ConfigError

from ..conversation import Conversation
from ..ledger import Ledger, shorten
from ..raw.files import RawFile
from ..raw.finding import find_files
from ..raw.json_lines import first_object
from ..recipe import SourceSection
from .messengers.dated import looks_dated

# Asked in this order, the strictest first.
IMPORTERS: dict[str, str] = {
    "parquet": "plain.parquet",
    "mbox": "forums.mbox",
    "stack_exchange": "forums.stack_exchange",
    "discord": "messengers.discord",
    "chitchat": "datasets.chitchat",
    "telegram": "messengers.telegram",
    "slack": "messengers.slack",
    "deepseek": "assistants.deepseek",
    "chatgpt": "assistants.chatgpt",
    "chatmill": "datasets.written",
    "claude": "assistants.claude",
    "gemini": "assistants.gemini",
    "messenger": "messengers.messenger",
    "signal": "messengers.signal",
    "wechat": "messengers.wechat",
    "kakaotalk": "messengers.kakaotalk",
    "preference": "datasets.preference",
    "openai": "datasets.openai_messages",
    "sharegpt": "datasets.sharegpt",
    "oasst": "datasets.oasst",
    "oasst_ranks": "datasets.oasst_ranks",
    "reddit": "forums.reddit",
    "alpaca": "datasets.alpaca",
    "pairs": "datasets.pairs",
    "utterances": "datasets.utterances",
    "corpora": "datasets.dialogue_corpora",
    "csv": "plain.table",
    "irc": "messengers.irc",
    "whatsapp": "messengers.whatsapp",
    "qq": "messengers.qq",
    "line": "messengers.line",
    "transcript": "plain.transcript",
    "documents": "plain.documents",
}


# Formats with independent records, one per line: several processes read a large file.
LINE_FORMATS = ("chatmill", "openai", "preference", "sharegpt", "alpaca", "pairs", "utterances", "documents")
SPAN_BYTES = 32 << 20
MEMBERS_TRIED = 100  # of a tar, to find its format


class Importer(Protocol):
    """What an importer module offers."""

    def recognise(self, head: bytes, name: str) -> bool:
        """Is a file that begins like this, with this name, of my format?"""
        ...

    def read(self, file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
        """Conversations of one file, streamed; whatever is dropped is counted in the ledger."""
        ...


def importer(name: str) -> Importer:
    """The importer of a format."""
    if name not in IMPORTERS:
        raise ConfigError(f"source format {name!r}: unknown. Known: auto, {', '.join(IMPORTERS)}.")
    return cast(Importer, importlib.import_module(f"chatmill.data.importers.{IMPORTERS[name]}"))


def recognise(file: RawFile, columns: Mapping[str, str] | None = None) -> str:
    """Name of the format of a file; ConfigError if none fits. JSON with sources.columns is `pairs`, or documents."""
    if name := _fitting(file, columns):
        return name
    if file.is_tar:
        raise ConfigError(
            f"source {file.label}: no chats in it. Expected members KEY.json, KEY.jsonl or KEY.txt of a known format."
        )
    head = file.head()
    if not head:
        raise ConfigError(f"source {file.path}: the file is empty. Take it out of the recipe's sources.")
    start = shorten(head[:200].decode("utf-8", "replace"), 60)
    if looks_dated(head):
        raise ConfigError(
            f"source {file.label}: its lines look like date and speaker, as in a chat, but no importer knows the layout; it "
            f"begins {start!r}. Set `format:` of this source to the app it comes from, or to documents, to learn all of it "
            "as one text."
        )
    raise ConfigError(
        f"source {file.label}: format not recognised; it begins {start!r}. Set `format:` of this source to one of "
        f"{', '.join(IMPORTERS)}; docs/data.md says what each looks like."
    )


def is_recognised(file: RawFile, columns: Mapping[str, str] | None = None) -> bool:
    """Would `recognise` name a format? A file that cannot be read (damaged, or its package is absent) is an error here, too."""
    return _fitting(file, columns) is not None


def _fitting(file: RawFile, columns: Mapping[str, str] | None = None) -> str | None:
    """The format of a file; of a tar, that of the first of its members that has one."""
    for member in islice(file.members(), MEMBERS_TRIED):
        head = member.head()
        if columns and first_object(head) is not None:
            return "documents" if set(columns) == {"text"} else "pairs"
        if name := next((name for name in IMPORTERS if importer(name).recognise(head, member.stem)), None):
            return name
    return None


def source_files(options: SourceSection) -> list[RawFile]:
    """Raw files of a source, in a fixed order."""
    if options.path is None:
        from .datasets.chitchat import installed_file

        return [installed_file()]
    return find_files(options.path)


def spans(file: RawFile, kind: str, options: SourceSection) -> list[RawFile]:
    """A large file in pieces for parallel reading, where its format allows; the conversations are the same either way."""
    lines = kind in LINE_FORMATS and options.limit is None and file.stem.lower().endswith((".jsonl", ".ndjson", ".json"))
    array = lines and file.head(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return file.spans(SPAN_BYTES) if lines and not array else [file]


def read_file(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of one raw file, at most options.limit."""
    for count, conversation in enumerate(_read(file, options, ledger), 1):
        yield conversation
        if options.limit is not None and count >= options.limit:
            ledger.change("file cut at sources.limit", file.label)
            return


def _read(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[Conversation]:
    kind = options.format if options.format != "auto" else recognise(file, options.columns)
    for member in file.members():
        if file.is_tar and options.format == "auto":
            found = _fitting(member, options.columns)
            if found is None:
                ledger.drop("member of a tar in no known format", member.label)
                continue
            kind = found
        yield from importer(kind).read(member, options, options.name or kind, ledger)
