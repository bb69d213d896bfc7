"""Real conversations rendered into every format and imported again are the same conversations."""

from __future__ import annotations

import bz2
import csv
import email.message
import email.utils
import gzip
import io
import json
import lzma
import re
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.html_text import html_to_text
from chatmill.data.importers.chitchat import installed_file
from chatmill.data.importers.chitchat import read as read_chitchat
from chatmill.data.importers.registry import IMPORTERS, read_file, recognise, source_files
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import SourceSection

Dialogue = list[str]  # contents; Ann (user) and Bob (assistant) take turns
START = datetime(2023, 5, 20, 9, 0, tzinfo=UTC).timestamp()


def said(dialogue: Dialogue, day: int, step_s: int = 61) -> Iterator[tuple[str, str, datetime]]:
    for k, text in enumerate(dialogue):
        yield ("Ann", "Bob")[k % 2], text, datetime.fromtimestamp(START + day * 86_400 + k * step_s, UTC)


def render_openai(folder: Path, dialogues: list[Dialogue]) -> Path:
    lines = [
        json.dumps({"messages": [{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(d)]})
        for d in dialogues
    ]
    (folder / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "chats.jsonl"


def render_preference(folder: Path, dialogues: list[Dialogue]) -> Path:
    said = [[{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(d)] for d in dialogues]
    worse = {"role": "assistant", "content": "No."}
    lines = [json.dumps({"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [worse]}) for turns in said]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "pairs.jsonl"


def render_sharegpt(folder: Path, dialogues: list[Dialogue]) -> Path:
    records = [
        {"id": str(n), "conversations": [{"from": ("human", "gpt")[k % 2], "value": t} for k, t in enumerate(d)]}
        for n, d in enumerate(dialogues)
    ]
    (folder / "share.json").write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder / "share.json"


def render_alpaca(folder: Path, dialogues: list[Dialogue]) -> Path:
    records = [
        {"instruction": d[-2], "input": "", "output": d[-1], "history": [d[k : k + 2] for k in range(0, len(d) - 2, 2)]}
        for d in dialogues
    ]
    (folder / "alpaca.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "alpaca.json"


def render_oasst(folder: Path, dialogues: list[Dialogue]) -> Path:
    path = folder / "x.trees.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for n, dialogue in enumerate(dialogues):
            node: dict[str, Any] | None = None
            for k in range(len(dialogue) - 1, -1, -1):
                replies = [node] if node else []
                role = ("prompter", "assistant")[k % 2]
                node = {"message_id": f"{n}-{k}", "text": dialogue[k], "role": role, "replies": replies, "rank": 0}
            file.write(json.dumps({"message_tree_id": f"{n}", "prompt": node}) + "\n")
    return path


def render_chitchat(folder: Path, dialogues: list[Dialogue]) -> Path:
    chats = {
        f"c{n}": {
            "messages": [[{"text": t, "sender": s, "timestamp": at.strftime("%Y-%m-%dT%H:%M:%SZ")}] for s, t, at in said(d, n)]
        }
        for n, d in enumerate(dialogues)
    }
    (folder / "dataset.json").write_text(json.dumps(chats), encoding="utf-8")
    return folder / "dataset.json"


def whatsapp(layout: str, name: str) -> Callable[[Path, list[Dialogue]], Path]:
    def render(folder: Path, dialogues: list[Dialogue]) -> Path:
        lines = []
        for n, dialogue in enumerate(dialogues):
            for sender, text, at in said(dialogue, n):
                hour = f"{at.hour % 12 or 12}"
                lines.append(
                    at.strftime(layout).replace("{I}", hour).replace("{m}", str(at.month)).replace("{d}", str(at.day))
                    + f"{sender}: {text}"
                )
        path = folder / name
        path.write_bytes("\r\n".join("\r\n".join(line.split("\n")) for line in lines).encode())
        return path

    return render


def render_telegram(folder: Path, dialogues: list[Dialogue]) -> Path:
    messages: list[dict[str, Any]] = [{"id": 1, "type": "service", "action": "create_group"}]
    for n, dialogue in enumerate(dialogues):
        for sender, text, at in said(dialogue, n):
            parts: Any = text if len(text) % 2 else [text[:3], {"type": "bold", "text": text[3:]}]
            entry = {
                "id": len(messages) + 1,
                "type": "message",
                "date": at.strftime("%Y-%m-%dT%H:%M:%S"),
                "from": sender,
                "text": parts,
            }
            messages.append(entry | {"date_unixtime": str(int(at.timestamp())), "from_id": f"user{sender}"})
    chat = {"name": "Bob", "type": "personal_chat", "id": 7, "messages": messages}
    (folder / "result.json").write_text(json.dumps(chat, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder / "result.json"


def render_telegram_account(folder: Path, dialogues: list[Dialogue]) -> Path:
    path = render_telegram(folder, dialogues)
    account = {"about": "Here is the data you requested.", "chats": {"about": "", "list": [json.loads(path.read_text())]}}
    path.write_text(json.dumps(account))
    return path


def render_discord(folder: Path, dialogues: list[Dialogue]) -> Path:
    messages: list[dict[str, Any]] = []
    for n, dialogue in enumerate(dialogues):
        for sender, text, at in said(dialogue, n):
            author = {"id": sender * 3, "name": sender, "nickname": sender, "isBot": False}
            messages.append(
                {"id": str(len(messages)), "type": "Default", "timestamp": at.isoformat(), "content": text, "author": author}
            )
    export = {"guild": {"id": "1"}, "channel": {"id": "2", "name": "c"}, "messages": messages, "messageCount": len(messages)}
    (folder / "channel.json").write_text(json.dumps(export, indent=2), encoding="utf-8")
    return folder / "channel.json"


def render_slack(folder: Path, dialogues: list[Dialogue]) -> Path:
    root = folder / "slack"
    (root / "general").mkdir(parents=True)
    (root / "users.json").write_text(json.dumps([{"id": "U1", "name": "Ann"}, {"id": "U2", "name": "Bob"}]))
    (root / "channels.json").write_text("[]")
    for n, dialogue in enumerate(dialogues):
        entries = []
        for sender, text, at in said(dialogue, n):
            escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            entries.append(
                {"type": "message", "user": {"Ann": "U1", "Bob": "U2"}[sender], "ts": f"{at.timestamp():.6f}", "text": escaped}
            )
        day = datetime.fromtimestamp(START + n * 86_400, UTC).strftime("%Y-%m-%d")
        (root / "general" / f"{day}.json").write_text(json.dumps(entries[::-1]))
    return root


def render_slack_zip(folder: Path, dialogues: list[Dialogue]) -> Path:
    root = render_slack(folder, dialogues)
    with zipfile.ZipFile(folder / "export.zip", "w") as archive:
        for file in sorted(root.rglob("*.json")):
            archive.write(file, file.relative_to(root).as_posix())
    return folder / "export.zip"


def irc(layout: str, day: str | None, name: str) -> Callable[[Path, list[Dialogue]], Path]:
    def render(folder: Path, dialogues: list[Dialogue]) -> Path:
        lines = []
        for n, dialogue in enumerate(dialogues):
            for k, (sender, text, at) in enumerate(said(dialogue, n)):
                if k == 0 and day:
                    lines.append(at.strftime(day))
                lines.append(at.strftime(layout).replace("NICK", sender) + text)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder / name

    return render


def render_transcript(folder: Path, dialogues: list[Dialogue]) -> Path:
    blocks = ["\n".join(f"{('User', 'Assistant')[k % 2]}: {text}" for k, text in enumerate(d)) for d in dialogues]
    (folder / "talk.txt").write_text("\n---\n".join(blocks), encoding="utf-8")
    return folder / "talk.txt"


def render_csv(folder: Path, dialogues: list[Dialogue]) -> Path:
    with (folder / "chats.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["conversation_id", "role", "content"])
        for n, dialogue in enumerate(dialogues):
            writer.writerows([n, ("user", "assistant")[k % 2], text] for k, text in enumerate(dialogue))
    return folder / "chats.csv"


def render_mbox(folder: Path, dialogues: list[Dialogue]) -> Path:
    out = io.BytesIO()
    for n, dialogue in enumerate(dialogues):
        for k, (sender, text, at) in enumerate(said(dialogue, n)):
            mail = email.message.EmailMessage()
            mail["From"], mail["Subject"] = f"{sender} <{sender.lower()}@example.org>", f"talk {n}"
            mail["Message-ID"], mail["Date"] = f"<{n}.{k}@x>", email.utils.format_datetime(at)
            if k:
                mail["In-Reply-To"] = f"<{n}.{k - 1}@x>"
            quoted = "\n".join("> " + line for line in dialogue[k - 1].split("\n")) if k else ""
            mail.set_content(
                f"{text}\n\nOn Sat, 20 May 2023, somebody wrote:\n{quoted}\n\n-- \nsent from my phone\n" if k else text,
                cte="base64",
            )
            out.write(b"From x@y Sat May 20 09:00:00 2023\n" + mail.as_bytes() + b"\n\n")
    (folder / "list.mbox").write_bytes(out.getvalue())
    return folder / "list.mbox"


def render_cornell(folder: Path, dialogues: list[Dialogue]) -> Path:
    lines, talks, number = [], [], 0
    for n, dialogue in enumerate(dialogues):
        keys = []
        for sender, text, _ in said(dialogue, n):
            keys.append(f"L{number}")
            lines.append(f"L{number} +++$+++ {sender} +++$+++ m0 +++$+++ {sender} +++$+++ {text}")
            number += 1
        talks.append(f"Ann +++$+++ Bob +++$+++ m0 +++$+++ {keys}")
    (folder / "cornell").mkdir()
    (folder / "cornell" / "movie_lines.txt").write_text("\n".join(reversed(lines)), encoding="iso-8859-1", errors="replace")
    (folder / "cornell" / "movie_conversations.txt").write_text("\n".join(talks), encoding="iso-8859-1")
    return folder / "cornell"


def render_ubuntu(folder: Path, dialogues: list[Dialogue]) -> Path:
    (folder / "ubuntu").mkdir()
    for n, dialogue in enumerate(dialogues):
        rows = [
            f"{at.strftime('%Y-%m-%dT%H:%M:%S.000Z')}\t{s}\t{'' if s == 'Ann' else 'Ann'}\t{t}"
            for s, t, at in said(dialogue, n)
        ]
        (folder / "ubuntu" / f"{n:03d}.tsv").write_text("\n".join(rows), encoding="utf-8")
    return folder / "ubuntu"


def render_reddit(folder: Path, dialogues: list[Dialogue]) -> Path:
    rows = []
    for n, dialogue in enumerate(dialogues):
        for k, (sender, text, at) in enumerate(said(dialogue, n)):
            parent = f"t3_p{n}" if k == 0 else f"t1_c{n}x{k - 1}"
            escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            row = {"id": f"c{n}x{k}", "link_id": f"t3_p{n}", "parent_id": parent, "author": sender, "body": escaped, "score": 5}
            rows.append(row | {"created_utc": int(at.timestamp())})
            if k:
                rows.append(
                    row | {"id": f"worse{n}x{k}", "score": 1, "body": "a worse reply", "author": "Eve", "created_utc": 0}
                )
    (folder / "RC.ndjson.bz2").write_bytes(bz2.compress("\n".join(json.dumps(r) for r in rows).encode()))
    return folder / "RC.ndjson.bz2"


def render_stack_exchange(folder: Path, dialogues: list[Dialogue]) -> Path:
    def html(text: str) -> str:
        escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return "<p>" + escaped.replace("\n", "<br>") + "</p>"

    rows = []
    for n, d in enumerate(dialogues):
        rows.append(f'<row Id="{10 * n + 1}" PostTypeId="1" Title="" Body={quoteattr(html(d[0]))} OwnerUserId="1" />')
        rows.append(
            f'<row Id="{10 * n + 2}" PostTypeId="2" ParentId="{10 * n + 1}" Score="-3" Body="&lt;p&gt;bad&lt;/p&gt;" />'
        )
        rows.append(f'<row Id="{10 * n + 3}" PostTypeId="2" ParentId="{10 * n + 1}" Score="7" Body={quoteattr(html(d[1]))} />')
    (folder / "Posts.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n<posts>\n' + "\n".join(rows) + "\n</posts>", encoding="utf-8"
    )
    return folder / "Posts.xml"


QUOTES = "quotes"  # lines that begin with > are quotes, those after "-- " a signature


def render_openai_array(folder: Path, dialogues: list[Dialogue]) -> Path:
    lines = render_openai(folder, dialogues).read_text(encoding="utf-8").split("\n")
    (folder / "chats.json").write_text("[" + ",\n ".join(lines) + "\n]\n", encoding="utf-8-sig")
    (folder / "chats.jsonl").unlink()
    return folder / "chats.json"


def render_oasst_flat(folder: Path, dialogues: list[Dialogue]) -> Path:
    rows = [
        {"message_id": f"{n}-{k}", "parent_id": f"{n}-{k - 1}" if k else None, "message_tree_id": f"{n}-0", "text": text}
        | {"role": ("prompter", "assistant")[k % 2], "rank": 0 if k % 2 else None, "deleted": False}
        for n, dialogue in enumerate(dialogues)
        for k, text in enumerate(dialogue)
    ]
    (folder / "x.messages.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder / "x.messages.jsonl"


def render_tsv_of_senders(folder: Path, dialogues: list[Dialogue]) -> Path:
    with (folder / "chats.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["timestamp", "dialogue_id", "speaker", "utterance"])
        for n, dialogue in enumerate(dialogues):
            writer.writerows([at.timestamp(), n, sender, text] for sender, text, at in said(dialogue, n))
    return folder / "chats.tsv"


def render_csv_of_pairs(folder: Path, dialogues: list[Dialogue]) -> Path:
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([["Question", "Answer"], *(d[:2] for d in dialogues)])
    return folder / "pairs.csv"


def render_parquet(folder: Path, dialogues: list[Dialogue]) -> Path:
    rows = [[{"role": ("user", "assistant")[k % 2], "content": t} for k, t in enumerate(d)] for d in dialogues]
    parquet.write_table(pyarrow.table({"messages": rows}), folder / "chats.parquet", row_group_size=2)
    return folder / "chats.parquet"


def render_parquet_of_sharegpt(folder: Path, dialogues: list[Dialogue]) -> Path:
    rows = [json.dumps([{"from": ("human", "gpt")[k % 2], "value": t} for k, t in enumerate(d)]) for d in dialogues]
    parquet.write_table(pyarrow.table({"id": list(range(len(rows))), "conversations": rows}), folder / "chats.parquet")
    return folder / "chats.parquet"


def render_arrow(folder: Path, dialogues: list[Dialogue]) -> Path:
    rows = [(n, ("user", "assistant")[k % 2], t) for n, d in enumerate(dialogues) for k, t in enumerate(d)]
    table = pyarrow.table(dict(zip(("conversation_id", "role", "content"), map(list, zip(*rows, strict=True)), strict=True)))
    with pyarrow.ipc.new_file(folder / "chats.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=3)
    return folder / "chats.arrow"


def render_arrow_stream(folder: Path, dialogues: list[Dialogue]) -> Path:
    table = pyarrow.table({"prompt": [d[0] for d in dialogues], "response": [d[1] for d in dialogues]})
    with pyarrow.ipc.new_stream(folder / "chats.arrow", table.schema) as file:
        file.write_table(table)
    return folder / "chats.arrow"


def render_document_lines(folder: Path, dialogues: list[Dialogue]) -> Path:
    lines = [json.dumps({"text": "\n\n".join(d), "url": "https://example.org"}) for d in dialogues]
    (folder / "pages.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "pages.jsonl"


def render_document_files(folder: Path, dialogues: list[Dialogue]) -> Path:
    (folder / "books").mkdir()
    for n, dialogue in enumerate(dialogues):
        (folder / "books" / f"{n:03d}.md").write_text("\n\n".join(dialogue), encoding="utf-8", newline="\r\n")
    return folder / "books"


ONE_LINE = "one line"  # the format cannot say a line feed
TWO_TURNS = "two turns"
LATIN = "latin"
DOCUMENT = "document"  # no turns: a dialogue becomes one text
FORMATS: dict[str, tuple[str, Callable[[Path, list[Dialogue]], Path], set[str]]] = {
    "openai": ("openai", render_openai, set()),
    "openai array": ("openai", render_openai_array, set()),
    "preference": ("preference", render_preference, set()),
    "sharegpt": ("sharegpt", render_sharegpt, set()),
    "alpaca": ("alpaca", render_alpaca, set()),
    "oasst": ("oasst", render_oasst, set()),
    "oasst messages": ("oasst", render_oasst_flat, set()),
    "chitchat": ("chitchat", render_chitchat, set()),
    "whatsapp android us": ("whatsapp", whatsapp("{m}/{d}/%y, {I}:%M %p - ", "WhatsApp Chat with Bob.txt"), set()),
    "whatsapp android de": ("whatsapp", whatsapp("%d.%m.%y, %H:%M - ", "WhatsApp Chat mit Bob.txt"), set()),
    "whatsapp ios": ("whatsapp", whatsapp("\u200e[%d/%m/%Y, %H:%M:%S] ", "_chat.txt"), set()),
    "whatsapp ios us": ("whatsapp", whatsapp("[{m}/{d}/%y, {I}:%M:%S\u202f%p] ", "_chat.txt"), set()),
    "whatsapp finnish": ("whatsapp", whatsapp("[{d}.{m}.%Y klo %H.%M.%S] ", "_chat.txt"), set()),
    "whatsapp iso": ("whatsapp", whatsapp("%Y-%m-%d, %H:%M - ", "chat.txt"), set()),
    "telegram": ("telegram", render_telegram, set()),
    "telegram account": ("telegram", render_telegram_account, set()),
    "discord": ("discord", render_discord, set()),
    "slack": ("slack", render_slack, set()),
    "slack zip": ("slack", render_slack_zip, set()),
    "irc irssi": ("irc", irc("%H:%M <@NICK> ", "--- Day changed %a %b %d %Y", "channel.log"), {ONE_LINE}),
    "irc znc": ("irc", irc("[%Y-%m-%d %H:%M:%S] <NICK> ", None, "channel.txt"), {ONE_LINE}),
    "irc weechat": ("irc", irc("%Y-%m-%d %H:%M:%S\tNICK\t", None, "x.weechatlog"), {ONE_LINE}),
    "transcript": ("transcript", render_transcript, set()),
    "csv": ("csv", render_csv, set()),
    "csv of pairs": ("csv", render_csv_of_pairs, {TWO_TURNS}),
    "tsv of senders": ("csv", render_tsv_of_senders, set()),
    "parquet": ("parquet", render_parquet, set()),
    "parquet of sharegpt": ("parquet", render_parquet_of_sharegpt, set()),
    "arrow": ("parquet", render_arrow, set()),
    "arrow stream": ("parquet", render_arrow_stream, {TWO_TURNS}),
    "document lines": ("documents", render_document_lines, {DOCUMENT}),
    "document files": ("documents", render_document_files, {DOCUMENT}),
    "mbox": ("mbox", render_mbox, {QUOTES}),
    "cornell": ("corpora", render_cornell, {ONE_LINE, LATIN}),
    "ubuntu": ("corpora", render_ubuntu, {ONE_LINE}),
    "reddit": ("reddit", render_reddit, set()),
    "stack exchange": ("stack_exchange", render_stack_exchange, {TWO_TURNS, ONE_LINE}),
}


@cache
def real_dialogues() -> list[Dialogue]:
    """Chats of the chitchat package, as they are typed by people."""
    out = []
    for chat in read_chitchat(installed_file(), SourceSection(format="chitchat", limit=400), "chitchat", Ledger()):
        texts = [turn.content.replace("\r", "") for turn in chat.turns[:8]]
        if len(texts) >= 4:
            out.append([text.strip() for text in texts[: len(texts) // 2 * 2]])
        if len(out) == 300:
            break
    return out


def fit(text: str, limits: set[str]) -> str:
    if LATIN in limits:
        text = text.encode("iso-8859-1", "ignore").decode("iso-8859-1")
        text = "".join(c for c in text if c.isprintable())
    if ONE_LINE in limits:
        text = " ".join(text.split())
    if QUOTES in limits:
        text = re.sub("^(>|-- ?$)", "x", text, flags=re.MULTILINE)
    return text.strip() or "ok"


def fit_dialogue(dialogue: Dialogue, limits: set[str]) -> Dialogue:
    return [fit(text, limits) for text in (dialogue[:2] if TWO_TURNS in limits else dialogue)]


def turns_of(conversations: list[Conversation]) -> list[list[tuple[str, str]]]:
    return [[(turn.role, turn.content) for turn in c.turns] for c in conversations]


def import_all(path: Path, **options: Any) -> tuple[list[Conversation], Ledger]:
    ledger = Ledger()
    section = SourceSection(path=str(path), **options)
    found = [c for file in source_files(section) for c in read_file(file, section, ledger)]
    return found, ledger


TEXT = (
    st.text(st.sampled_from("ab Zé世🙂👩‍👩‍👧\n\"'<&>\\,;:/_*|{}#@!?.1290-=`"), min_size=1, max_size=30)
    .map(str.strip)
    .filter(bool)
)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_conversation_survives_its_rendering(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind, render, limits = FORMATS[name]
    real = data.draw(st.lists(st.sampled_from(range(len(real_dialogues()))), min_size=2, max_size=5, unique=True))
    dialogues = [fit_dialogue(real_dialogues()[k], limits) for k in real]
    for pairs in data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
        invented = data.draw(st.lists(TEXT, min_size=2 * pairs, max_size=2 * pairs))
        dialogues.append(fit_dialogue([f"x{text} y" for text in invented], limits))
    path = render(tmp_path_factory.mktemp("render"), dialogues)
    found, ledger = import_all(path)
    assert {recognise(file) for file in source_files(SourceSection(path=str(path)))} == {kind}
    expected = [[(("user", "assistant")[k % 2], text) for k, text in enumerate(d)] for d in dialogues]
    if DOCUMENT in limits:
        expected = [[("assistant", "\n\n".join(d))] for d in dialogues]
        assert all(c.is_document for c in found)
    assert turns_of(found) == expected
    assert not ledger.dropped
    assert len({c.uid for c in found}) == len(found)


def test_every_importer_is_rendered_above() -> None:
    # oasst_ranks makes pairs of replies, not dialogues: test_preference.py
    assert {kind for kind, _, _ in FORMATS.values()} == set(IMPORTERS) - {"oasst_ranks"}


def test_times_survive_where_the_format_has_them(tmp_path: Path) -> None:
    dialogues = [d[:4] for d in real_dialogues()[:3]]
    for name, resolution_s in (
        ("whatsapp ios", 1),
        ("whatsapp android us", 60),
        ("telegram", 1),
        ("discord", 1),
        ("irc znc", 1),
    ):
        _, render, limits = FORMATS[name]
        folder = tmp_path / name
        folder.mkdir()
        found, _ = import_all(render(folder, [fit_dialogue(d, limits) for d in dialogues]))
        for n, conversation in enumerate(found):
            times = [turn.time for turn in conversation.turns]
            for got, (_, _, at) in zip(times, said(dialogues[n], n), strict=True):
                assert got is not None and abs(got - at.timestamp()) < resolution_s, name


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zip"])
def test_compressed_files_are_read_as_they_are(tmp_path: Path, suffix: str) -> None:
    plain = render_openai(tmp_path, [["hello there", "good day"]])
    raw, packed = plain.read_bytes(), tmp_path / f"chats.jsonl.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            archive.write(plain, "inner/chats.jsonl")
    else:
        packed.write_bytes({"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[suffix](raw))
    found, _ = import_all(packed)
    assert turns_of(found) == [[("user", "hello there"), ("assistant", "good day")]]


def test_whatsapp_day_and_month_are_inferred_over_the_whole_file(tmp_path: Path) -> None:
    chat = tmp_path / "chat.txt"
    early = "3/4/20, 9:00 - Ann: one\n3/4/20, 9:01 - Bob: two\n"
    chat.write_text(early + "25/4/20, 9:00 - Ann: three\n25/4/20, 9:01 - Bob: four\n")
    assert [datetime.fromtimestamp(c.turns[0].time or 0, UTC).month for c in import_all(chat)[0]] == [4, 4]
    chat.write_text(early + "4/25/20, 9:00 - Ann: three\n4/25/20, 9:01 - Bob: four\n")
    assert [datetime.fromtimestamp(c.turns[0].time or 0, UTC).month for c in import_all(chat)[0]] == [3, 4]
    # No number above 12: time must run forwards. 1/2, 1/3, 2/1 as month/day.
    chat.write_text(
        "".join(f"{d}/20, 9:0{k} - {s}: t{d}\n" for d in ("1/2", "1/3", "2/1") for k, s in enumerate(("Ann", "Bob")))
    )
    assert [datetime.fromtimestamp(c.turns[0].time or 0, UTC).month for c in import_all(chat)[0]] == [1, 1, 2]
    chat.write_text(early)
    assert any("day first assumed" in reason for reason in import_all(chat)[1].changed)


def test_whatsapp_service_lines_media_and_continuations_are_told_apart(tmp_path: Path) -> None:
    chat = tmp_path / "chat.txt"
    chat.write_text(
        "12/05/21, 21:00 - Messages and calls are end-to-end encrypted. No one outside of this chat can read them.\n"
        "12/05/21, 21:01 - Ann: first line\nsecond: line\n\n12 eggs\n"
        "12/05/21, 21:02 - Bob: <Media omitted>\n13/05/21, 21:02 - Bob changed the subject\n"
        "13/05/21, 21:03 - Bob: IMG-1.jpg (file attached)\n12/05/21, 21:03 - Bob: fine\n"
    )
    found, ledger = import_all(chat)
    assert turns_of(found) == [[("user", "first line\nsecond: line\n\n12 eggs"), ("assistant", "fine")]]
    assert ledger.changed["media left out"] == 2 and ledger.changed["service line left out"] == 2


def test_rebuilding_follows_replies_then_threads_then_silences(tmp_path: Path) -> None:
    def message(number: int, author: str, minute: int, text: str, reply: int | None = None) -> dict[str, Any]:
        at = datetime.fromtimestamp(START + minute * 60, UTC).isoformat()
        entry = {
            "id": str(number),
            "type": "Default",
            "timestamp": at,
            "content": text,
            "author": {"id": author, "isBot": author == "bot"},
        }
        return entry | ({"type": "Reply", "reference": {"messageId": str(reply)}} if reply is not None else {})

    log = [
        message(1, "a", 0, "who knows pandas?"),
        message(2, "b", 1, "I do"),
        message(3, "c", 100, "lunch?"),
        message(4, "d", 101, "yes"),
        message(5, "a", 102, "how do I join?", reply=2),
        message(6, "bot", 103, "beep"),
        message(7, "b", 104, "df.merge", reply=5),
    ]
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"guild": {}, "channel": {}, "messages": log, "messageCount": 9}))
    found, ledger = import_all(path)
    assert turns_of(found) == [
        [("user", "who knows pandas?"), ("assistant", "I do"), ("user", "how do I join?"), ("assistant", "df.merge")],
        [("user", "lunch?"), ("assistant", "yes")],
    ]
    assert ledger.changed == {"bot left out": 1, "file announces another number of messages": 1}


MENTIONS = "<@U1> see <https://x.org|the page> &amp; <#C1|ops>"


def test_slack_threads_are_conversations_and_mentions_are_names(tmp_path: Path) -> None:
    root = render_slack(tmp_path, [])
    entries = [
        {"type": "message", "user": "U1", "ts": "1000.1", "text": "who is on call?", "thread_ts": "1000.1"},
        {"type": "message", "user": "U1", "ts": "1001.0", "text": "lunch"},
        {
            "type": "message",
            "user": "U2",
            "ts": "1002.0",
            "text": "<@U1> see <https://x.org|the page> &amp; <#C1|ops>",
            "thread_ts": "1000.1",
        },
        {"type": "message", "user": "U2", "ts": "1003.0", "text": "yes"},
        {"type": "message", "subtype": "channel_join", "user": "U2", "ts": "1004.0", "text": "joined"},
        {"type": "message", "bot_id": "B", "ts": "1005.0", "text": "build ok"},
    ]
    (root / "general" / "2021-01-01.json").write_text(json.dumps(entries))
    found, ledger = import_all(root)
    assert turns_of(found) == [
        [("user", "who is on call?"), ("assistant", "@Ann see the page & #ops")],
        [("user", "lunch"), ("assistant", "yes")],
    ]
    assert ledger.changed == {"channel_join left out": 1, "bot left out": 1}


def test_a_named_assistant_takes_the_role_whoever_speaks_first(tmp_path: Path) -> None:
    path = render_discord(tmp_path, [["hello", "good day", "how are you"]])
    assert [t.role for t in import_all(path, assistant="Ann")[0][0].turns] == ["assistant", "user", "assistant"]
    assert import_all(path, assistant="Zoe")[1].dropped == {"the assistant does not speak": 1}


def test_oasst_trunks_are_learned_once_and_best_replies_come_first(tmp_path: Path) -> None:
    def node(key: str, role: str, rank: int | None, *replies: dict[str, Any], deleted: bool = False) -> dict[str, Any]:
        return {"message_id": key, "text": key, "role": role, "rank": rank, "replies": list(replies), "deleted": deleted}

    tree = node(
        "q", "prompter", None,
        node("worse", "assistant", 1),
        node("best", "assistant", 0, node("more", "prompter", 0, node("a1", "assistant", 0), node("a2", "assistant", 1))),
        node("gone", "assistant", 2, deleted=True),
    )  # fmt: skip
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"message_tree_id": "q", "prompt": tree}))
    found, _ = import_all(path)
    assert [[(t.content, t.loss) for t in c.turns if t.role == "assistant"] for c in found] == [
        [("best", True), ("a1", True)], [("best", False), ("a2", True)], [("worse", True)],
    ]  # fmt: skip
    assert {c.meta["thread"] for c in found} == {"q"}
    flat: list[dict[str, Any]] = []

    def flatten(entry: dict[str, Any], parent: str | None) -> None:
        flat.append({k: v for k, v in entry.items() if k != "replies"} | {"parent_id": parent, "message_tree_id": "q"})
        for reply in entry["replies"]:
            flatten(reply, entry["message_id"])

    flatten(tree, None)
    path.write_text("\n".join(json.dumps(entry) for entry in flat))
    assert turns_of(import_all(path)[0]) == turns_of(found)


def test_openai_parts_weights_and_tools_are_understood(tmp_path: Path) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}], "weight": 0},
        {"role": "tool", "content": "42", "name": "f"},
        {"role": "assistant", "content": "done"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text(
        json.dumps({"messages": messages}) + "\nnot json\n[1]\n" + json.dumps({"messages": [{"role": "alien", "content": ""}]})
    )
    found, ledger = import_all(path)
    assert found[0].turns == (
        Turn("system", "be kind"),
        Turn("user", "hi"),
        Turn("assistant", '{"arguments": "{}", "name": "f"}', loss=False),
        Turn("tool", "42", "f"),
        Turn("assistant", "done"),
    )
    assert ledger.dropped == {"not JSON": 1, "not a JSON object": 1, "bad message": 1}
    assert any(case.startswith("x.jsonl:2") for case in ledger.examples["not JSON"])


def test_documents_carry_no_roles_and_long_files_are_cut_at_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(("a line of a long book\n" * 100 + "\n") * 100)
    found, _ = import_all(tmp_path / "book.txt")
    assert len(found) == 3 and all(c.is_document for c in found)
    assert sum(c.turns[0].content.count("long book") for c in found) == 10_000
    (tmp_path / "pages.jsonl").write_text('{"text": "one page"}\n{"text": ""}\n')
    found, ledger = import_all(tmp_path / "pages.jsonl")
    assert [c.turns[0].content for c in found] == ["one page"] and ledger.dropped == {"no text": 1}


def test_csv_columns_are_mapped_or_the_error_names_them(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('frage,antwort\n"was, wie?","so\nund so"\nnur eins\nleer,\n')
    with pytest.raises(ConfigError, match=r"columns \['frage', 'antwort'\] are not understood"):
        import_all(path)
    with pytest.raises(ConfigError, match="names"):
        import_all(path, columns={"prompt": "x", "reply": "antwort"})
    found, ledger = import_all(path, columns={"prompt": "frage", "reply": "antwort"})
    assert turns_of(found) == [[("user", "was, wie?"), ("assistant", "so\nund so")]]
    assert ledger.dropped == {"row with another number of cells": 1, "empty cell": 1}


def test_what_no_importer_knows_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match=r"x\.bin: format not recognised"):
        import_all(tmp_path / "x.bin")
    with pytest.raises(ConfigError, match=r"unknown\. Known: auto, "):
        import_all(tmp_path / "x.bin", format="nope")


@pytest.mark.parametrize("name", ["telegram", "discord", "chitchat", "stack exchange"])
def test_a_file_that_ends_early_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    path = FORMATS[name][1](tmp_path, [["hello", "good day", "how", "so"]])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=path.name):
        import_all(path)


def test_html_becomes_text_with_its_code() -> None:
    html = "<p>Use <code>x &lt; 1</code>:</p><pre><code>if a:\n    b()\n</code></pre>"
    html += "<ul><li>one</li><li>two</li></ul><script>bad()</script>"
    assert html_to_text(html) == "Use `x < 1`:\n\n```\nif a:\n    b()\n```\n\n- one\n- two"
    assert html_to_text("<blockquote><p>said</p><p>so</p></blockquote><p>no</p>") == "> said\n>\n> so\n\nno"
