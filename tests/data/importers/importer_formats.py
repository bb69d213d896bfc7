"""Renderers: the same dialogues written in every format that an importer reads.

    kind, render, limits = FORMATS["slack zip"]
    path = render(folder, [fit_dialogue(dialogue, limits) for dialogue in real_dialogues()])

limits: what a format cannot say (a line feed, more than two turns ...). Ann is the user, Bob the assistant.
"""

from __future__ import annotations

import bz2
import csv
import email.message
import email.utils
import gzip
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pyarrow
import pyarrow.parquet as parquet

from chatmill.data.conversation import Conversation, Role, Turn, dump_line
from chatmill.data.importers.datasets.chitchat import installed_file
from chatmill.data.importers.datasets.chitchat import read as read_chitchat
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import SourceSection

from .app_formats import APP_FORMATS

_ROLES: tuple[Role, Role] = ("user", "assistant")
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


def render_written(folder: Path, dialogues: list[Dialogue]) -> Path:
    lines = [
        dump_line(Conversation(f"u{n}", tuple(Turn(_ROLES[k % 2], t) for k, t in enumerate(d)), "s", f"r:{n}"))
        for n, d in enumerate(dialogues)
    ]
    (folder / "made.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "made.jsonl"


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


def render_openai_tar(folder: Path, dialogues: list[list[str]]) -> Path:
    """As webdataset writes samples: KEY.json, and a picture beside it."""
    path = folder / "chats-000000.tar"
    with tarfile.open(path, "w") as tar:
        for number, dialogue in enumerate(dialogues):
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(dialogue)]
            for name, data in (
                (f"{number:06d}.json", json.dumps({"messages": messages}).encode()),
                (f"{number:06d}.jpg", b"x"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


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
    "chatmill": ("chatmill", render_written, set()),
    "openai array": ("openai", render_openai_array, set()),
    "openai tar": ("openai", render_openai_tar, set()),
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
    **APP_FORMATS,
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
