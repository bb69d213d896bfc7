"""Mutated inputs for every importer: whatever a file holds, an importer raises nothing but ConfigError, and loses nothing.

    python -m tests.data.importers.fuzz 10000 [format …]        # mutated inputs per format

A mutant is a record, a message or a whole export (importer_formats.py, cases/) in which values were replaced, taken out,
doubled or wrapped, or bytes were changed. AT_ONCE mutants of one export are read as one file, because to open a file costs more
than to read one; a file that is refused as a whole counts as one. Where a mutant's records can still be counted, records in =
dialogues kept + records dropped, or messages in = messages kept + messages counted.
"""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.data.importers.messengers import discord, messenger, slack, telegram, wechat
from chatmill.data.importers.registry import read_file, source_files
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import SourceSection

from .importer_formats import FORMATS, fit_dialogue

TALKS = [["hello there", "good day", "how are you?", "fine, thanks"], ["was ist das?", "今天天气\n不错", "so", "ok"]]
ODD: list[Any] = [
    None, True, 0, -1, 1.5, 1e308, 10**400, float("nan"), float("inf"), "", " ", "x", "[]", "{}", "\ud83d", "null", "1e999",
    [], {}, [None], [[]], [{}], {"x": 1}, {"id": None}, [["a"]], "2023-99-99", "[[1]]", "\x00", "99" * 3000,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutate(value: Any, rng: random.Random) -> Any:
    """A copy with one to three values replaced, taken out, doubled or wrapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            return value
        *above, key = rng.choice(found)
        holder = value
        for step in above:
            holder = holder[step]
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 2:
            holder[key] = rng.choice(([holder[key]], {"text": holder[key]}, str(holder[key])))
        elif kind == 3 and isinstance(holder, dict):
            holder[rng.choice(("x", "id", "text", "role", key + "s"))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
    return value


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A copy with bytes changed, taken out, doubled, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 4, 16))):
        if not out:
            break
        at = rng.randrange(len(out))
        kind = rng.randrange(5)
        if kind == 0:
            out[at] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + rng.randrange(1, 20)]
        elif kind == 2:
            out[at:at] = out[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            out[at:at] = rng.choice((b"\x00", b"\r", b'"', b"\xff\xfe", b"\n\n", b"99999", b"{", b"]", "年：".encode(), b"\t"))
        elif rng.random() < 0.1:
            del out[at:]
    return bytes(out)


def outcome(path: Path, kind: str, **options: Any) -> tuple[int, Ledger, str]:
    """(dialogues, ledger, "" or the ConfigError) of an import."""
    ledger, section = Ledger(), SourceSection(path=str(path), format=kind, **options)
    try:
        count = sum(1 for file in source_files(section) for _ in read_file(file, section, ledger))
    except ConfigError as error:
        return 0, ledger, str(error)
    return count, ledger, ""


# Formats of one object per dialogue: the number of records is what json_lines hands out.
RECORDS = (
    "chatmill",
    "openai",
    "sharegpt",
    "alpaca",
    "preference",
    "pairs",
    "utterances",
    "chatgpt",
    "deepseek",
    "claude",
    "gemini",
)


AT_ONCE = 50  # mutants in a file
# Formats of text whose exports can stand one behind the other in a file.
TEXTS = ("whatsapp", "irc", "line", "kakaotalk", "qq", "transcript", "wechat", "signal", "csv")


def records_of(text: str) -> list[Any]:
    """JSON values of a file of lines or of an array."""
    try:
        whole = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return whole if isinstance(whole, list) else [whole]


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)


def mutate_messages(value: Any, rng: random.Random) -> tuple[Any, int]:
    """(a mutant of a chat's export, how many mutated messages it has)."""
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages or rng.random() < 0.2:
        return mutate(value, rng), 1
    many = [mutate([rng.choice(messages)], rng) for _ in range(AT_ONCE)]
    found = [message for few in many for message in few]
    return (found if messages is value else {**value, "messages": found}), AT_ONCE


def check(kind: str, path: Path, rng: random.Random, folder: Path) -> tuple[str | None, int]:
    """Import mutants of an export as one file: (None or what is wrong, how many they are)."""
    raw = path.read_bytes()
    target = folder / path.name
    lines = kind in (*RECORDS, "signal", "oasst", "oasst_ranks", "reddit", "documents")
    structured = path.suffix in (".json", ".jsonl", ".ndjson") and rng.random() < 0.8
    records: list[Any] = []
    mutants = 1
    if structured and lines:
        whole = records_of(raw.decode("utf-8-sig"))
        if rng.random() < 0.9:
            whole = [rng.choice(whole) for _ in range(AT_ONCE)]
        records = [mutate(record, rng) if rng.random() < 0.9 else record for record in whole]
        mutants = len(records)
        target.write_text("\n".join(dumped(record) for record in records), encoding="utf-8")
        target = target.rename(target.with_suffix(".jsonl"))
    elif structured:
        mutant, mutants = mutate_messages(json.loads(raw), rng)
        target.write_text(dumped(mutant), encoding="utf-8")
    else:
        if kind in TEXTS and rng.random() < 0.9:
            mutants = AT_ONCE
        target.write_bytes(b"\n".join(mutate_bytes(raw, rng) for _ in range(mutants)))
    try:
        kept, ledger, refused = outcome(target, kind)
        messages = lost_messages(kind, target) if structured and not lines and not refused else None
    except Exception as error:  # whatever it is, it must not come out
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno} {at.name})", 1
    finally:
        target.unlink(missing_ok=True)
    mutants = 1 if refused else mutants
    if messages:
        return messages, mutants
    counted = kept + ledger.dropped.total()
    lists = any(isinstance(record, list) for record in records)  # a list of records counts as all of them
    if kind in RECORDS and structured and not refused and (counted < len(records) if lists else counted != len(records)):
        return f"{len(records)} records in, {kept} kept, {dict(ledger.dropped)} dropped", mutants
    return None, mutants


def lost_messages(kind: str, path: Path) -> str | None:
    """Of a chat's export: whether entries in = messages out + entries counted."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    ledger, section = Ledger(), SourceSection(path=str(path), format=kind)
    (file,) = source_files(section)
    if kind == "discord" and isinstance(whole.get("messages"), list):
        entries, out = len(whole["messages"]), len(list(discord.messages(file, section, ledger)))
        ledger.changed.pop("file announces another number of messages", None)
    elif kind == "telegram" and isinstance(whole.get("messages"), list) and "chats" not in whole:
        entries = len(whole["messages"])
        out = len(list(telegram.messages((entry for *_, entry in telegram.entries(file, "utf-8")), file, ledger)))
    elif kind in ("messenger", "wechat") and isinstance(whole.get("messages"), list):
        module = {"messenger": messenger, "wechat": wechat}[kind]
        entries, out = len(whole["messages"]), len(list(module.messages(file, section, ledger)))
    elif kind == "slack" and isinstance(whole, list):
        entries, out = len(whole), len(list(slack.messages(file, section, ledger)))
    else:
        return None
    counted = ledger.changed.total()
    return None if entries == out + counted else f"{entries} messages in, {out} out, {dict(ledger.changed)} counted"


CASES = Path(__file__).parent / "cases"
# Exports that no renderer makes, and the format to read them as.
BY_CASE = {
    "chatgpt": "more/conversations.json", "claude": "claude/conversations.json", "pairs": "zhsets/swift_query.jsonl",
    "utterances": "zhsets/kdconv.jsonl", "openai": "oai/tools.jsonl", "sharegpt": "sharegpt/tools.jsonl",
    "alpaca": "alpaca/llamafactory.jsonl", "telegram": "tg/result.json", "mbox": "more/zh.mbox", "wechat": "wechat/weflow.json",
}  # fmt: skip


OPENED = {".gz": gzip.decompress, ".bz2": bz2.decompress}


def exports(kind: str, folder: Path) -> list[Path]:
    """Files to mutate, of one format."""
    made_for = {"oasst_ranks": "oasst"}.get(kind, kind)
    found = [render for known, render, _ in FORMATS.values() if known == made_for]
    limits = [limit for known, _, limit in FORMATS.values() if known == made_for]
    paths: list[Path] = []
    for k, (render, limit) in enumerate(zip(found, limits, strict=True)):
        (folder / str(k)).mkdir()
        path = render(folder / str(k), [fit_dialogue(talk, limit) for talk in TALKS])
        paths += [p for p in sorted(path.rglob("*")) if p.is_file() and p.name not in ("users.json", "channels.json")] or [path]
    if BY_CASE.get(kind):
        paths.append(CASES / BY_CASE[kind])
    plain = [path for path in paths if path.suffix not in (".zip", ".tar", *OPENED)]
    for path in paths:
        if path.suffix in OPENED:
            name = path.with_suffix("" if path.with_suffix("").suffix else ".jsonl")
            name.write_bytes(OPENED[path.suffix](path.read_bytes()))
            plain.append(name)
    return plain


def fuzz(kind: str, count: int, seed: int = 0) -> tuple[Counter[str], int]:
    """(failures by what went wrong, mutants, at least `count`) of a format."""
    rng, wrong = random.Random(f"{kind} {seed}"), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "from").mkdir()
        (folder / "to").mkdir()
        paths = exports(kind, folder / "from")
        made = 0
        assert paths, f"{kind}: nothing to mutate"
        while made < count:
            problem, mutants = check(kind, rng.choice(paths), rng, folder / "to")
            made += mutants
            if problem:
                wrong[problem[:200]] += 1
    return wrong, made


def main(arguments: list[str]) -> int:
    """Fuzz the named formats, or all."""
    from chatmill.data.importers.registry import IMPORTERS

    total = 0
    for kind in arguments[1:] or IMPORTERS:
        wrong, made = fuzz(kind, int(arguments[0]))
        total += wrong.total()
        print(f"{kind}: {wrong.total()} files of {made} mutants went wrong", flush=True)
        for problem, times in wrong.most_common(5):
            print(f"    {times} x {problem}", flush=True)
    return 1 if total else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
