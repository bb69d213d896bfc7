"""Renderers of chat apps' exports; FORMATS of importer_formats.py includes them. Ann is the user, Bob or 我 the assistant."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Dialogue = list[str]
Renderer = Callable[[Path, list[Dialogue]], Path]
START = datetime(2023, 5, 20, 9, 0, tzinfo=UTC).timestamp()


def said(dialogues: list[Dialogue], step_s: int = 61) -> Iterator[tuple[str, str, datetime]]:
    """(speaker, text, when) of all messages; a day between dialogues."""
    for n, dialogue in enumerate(dialogues):
        for k, text in enumerate(dialogue):
            yield ("Ann", "Bob")[k % 2], text, datetime.fromtimestamp(START + n * 86_400 + k * step_s, UTC)


def chinese(at: datetime) -> str:
    """下午9:15"""
    return f"{'上午' if at.hour < 12 else '下午'}{at.hour % 12 or 12}:{at.minute:02d}"


def korean(at: datetime) -> str:
    """오후 9:15"""
    return f"{'오전' if at.hour < 12 else '오후'} {at.hour % 12 or 12}:{at.minute:02d}"


def lines(name: str, line: Callable[[str, str, datetime], str], day: Callable[[datetime], str] | None = None) -> Renderer:
    """One line (or block) per message; day: a line above the first message of a day."""

    def render(folder: Path, dialogues: list[Dialogue]) -> Path:
        out, last = list[str](), None
        for sender, text, at in said(dialogues):
            if day is not None and at.date() != last:
                out.append(day(at))
            last = at.date()
            out.append(line(sender, text, at))
        (folder / name).write_bytes(("\n".join(out) + "\n").encode())
        return folder / name

    return render


def mine(sender: str) -> str:
    return "我" if sender == "Bob" else sender


def render_weclone(folder: Path, dialogues: list[Dialogue]) -> Path:
    with (folder / "wechat.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "MsgSvrID", "type_name", "is_sender", "talker", "room_name", "msg", "src", "CreateTime"])
        for n, (sender, text, at) in enumerate(said(dialogues)):
            writer.writerow(
                [n, n, "文本", int(sender == "Bob"), f"wxid_{sender}", "Ann", text, "", at.strftime("%Y-%m-%d %H:%M:%S")]
            )
    return folder / "wechat.csv"


def render_memotrace(folder: Path, dialogues: list[Dialogue]) -> Path:
    names = "localId,TalkerId,Type,SubType,IsSender,CreateTime,Status,StrContent,StrTime,Remark,NickName,Sender"
    with (folder / "messages.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(names.split(","))
        for n, (sender, text, at) in enumerate(said(dialogues)):
            when = at.strftime("%Y-%m-%d %H:%M:%S")
            writer.writerow([n, 3, 1, 0, int(sender == "Bob"), int(at.timestamp()), "", text, when, sender, sender, sender])
    return folder / "messages.csv"


def render_weflow(folder: Path, dialogues: list[Dialogue]) -> Path:
    messages: list[dict[str, Any]] = [
        {"localId": n, "createTime": int(at.timestamp()), "type": "文本消息", "content": text, "isSend": int(sender == "Bob")}
        | {"senderUsername": f"wxid_{sender}", "senderDisplayName": sender}
        for n, (sender, text, at) in enumerate(said(dialogues))
    ]
    export = {"weflow": {"version": "1"}, "session": {"displayName": "Ann"}, "messages": messages}
    (folder / "weflow.json").write_text(json.dumps(export, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder / "weflow.json"


def render_line(folder: Path, dialogues: list[Dialogue]) -> Path:
    def line(sender: str, text: str, at: datetime) -> str:
        body = '"' + text.replace('"', '""') + '"' if "\n" in text else text
        return f"{at:%H:%M}\t{sender}\t{body}"

    path = lines("line.txt", line, lambda at: f"\n{at:%Y/%m/%d}（{'一二三四五六日'[at.weekday()]}）")(folder, dialogues)
    path.write_text("[LINE] 与Ann的聊天记录\n保存日期：2023/06/01 21:15\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    return path


def render_line_of_computers(folder: Path, dialogues: list[Dialogue]) -> Path:
    return lines(
        "[LINE]Ann.txt",
        lambda s, t, at: f"{at:%H:%M} {s} {t}",
        lambda at: f"{at:%Y.%m.%d} 星期{'一二三四五六日'[at.weekday()]}",
    )(folder, dialogues)


def render_chatgpt(folder: Path, dialogues: list[Dialogue]) -> Path:
    records = []
    for n, dialogue in enumerate(dialogues):
        mapping: dict[str, Any] = {"root": {"id": "root", "parent": None, "children": [f"{n}m0"], "message": None}}
        for k, text in enumerate(dialogue):
            body = {"content_type": "text", "parts": [text]}
            message = {
                "author": {"role": ("user", "assistant")[k % 2]},
                "recipient": "all",
                "content": body,
                "create_time": k,
            }
            parent = f"{n}m{k - 1}" if k else "root"
            mapping[f"{n}m{k}"] = {
                "id": f"{n}m{k}",
                "parent": parent,
                "children": [f"{n}m{k + 1}"],
                "message": message | {"metadata": {}},
            }
        mapping[f"{n}m{len(dialogue) - 1}"]["children"] = []
        records.append({"title": "t", "current_node": f"{n}m{len(dialogue) - 1}", "mapping": mapping})
    (folder / "conversations.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "conversations.json"


def render_deepseek(folder: Path, dialogues: list[Dialogue]) -> Path:
    records = []
    for dialogue in dialogues:
        mapping: dict[str, Any] = {"root": {"id": "root", "parent": None, "children": ["1"], "message": None}}
        for k, text in enumerate(dialogue):
            fragments = [{"type": ("REQUEST", "RESPONSE")[k % 2], "content": text}]
            if k % 2:
                fragments.insert(0, {"type": "THINK", "content": "hm"})
            message = {
                "files": [],
                "model": "deepseek-chat",
                "inserted_at": "2025-04-29T11:59:11.6+08:00",
                "fragments": fragments,
            }
            children = [f"{k + 2}"] if k + 1 < len(dialogue) else []
            mapping[f"{k + 1}"] = {
                "id": f"{k + 1}",
                "parent": f"{k}" if k else "root",
                "children": children,
                "message": message,
            }
        records.append({"id": "x", "title": "t", "inserted_at": "2025-04-29T11:59:11+08:00", "mapping": mapping})
    (folder / "conversations.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return folder / "conversations.json"


def render_claude(folder: Path, dialogues: list[Dialogue]) -> Path:
    records = [
        {"uuid": f"c{n}", "name": "t", "created_at": "2025-01-02T03:04:05Z", "chat_messages": [
            {"uuid": f"m{k}", "sender": ("human", "assistant")[k % 2], "text": text,
             "content": [{"type": "text", "text": text}], "created_at": "2025-01-02T03:04:05Z", "attachments": []}
            for k, text in enumerate(dialogue)
        ]}
        for n, dialogue in enumerate(dialogues)
    ]  # fmt: skip
    (folder / "conversations.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return folder / "conversations.json"


def render_gemini(folder: Path, dialogues: list[Dialogue]) -> Path:
    entries = [
        {"header": "Gemini Apps", "title": f"Prompted {d[0]}", "time": "2025-01-02T03:04:05.6Z", "products": ["Gemini Apps"]}
        | {"safeHtmlItem": [{"html": "<p>" + html.escape(d[1]).replace("\n", "<br>") + "</p>"}]}
        for d in dialogues
    ]
    (folder / "MyActivity.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return folder / "MyActivity.json"


def render_messenger(folder: Path, dialogues: list[Dialogue]) -> Path:
    """As Facebook writes it: UTF-8 in Latin-1 characters, the newest first."""
    messages = [
        {"sender_name": sender, "timestamp_ms": int(at.timestamp() * 1000), "content": text.encode().decode("latin-1")}
        for sender, text, at in said(dialogues)
    ]
    export = {"participants": [{"name": "Ann"}, {"name": "Bob"}], "messages": messages[::-1], "title": "Ann", "magic_words": []}
    (folder / "message_1.json").write_text(json.dumps(export, indent=2), encoding="ascii")
    return folder / "message_1.json"


def render_messenger_encrypted(folder: Path, dialogues: list[Dialogue]) -> Path:
    messages = [
        {
            "isUnsent": False,
            "media": [],
            "reactions": [],
            "senderName": sender,
            "text": text,
            "timestamp": int(at.timestamp() * 1000),
        }
        for sender, text, at in said(dialogues)
    ]
    export = {"participants": ["Ann", "Bob"], "threadName": "Ann_1", "messages": messages[::-1]}
    (folder / "Ann_1.json").write_text(json.dumps(export, ensure_ascii=False), encoding="utf-8")
    return folder / "Ann_1.json"


def render_signal(folder: Path, dialogues: list[Dialogue]) -> Path:
    rows = [{"date": f"{at:%Y-%m-%dT%H:%M:%S}", "sender": "Me" if s == "Bob" else s, "body": t} for s, t, at in said(dialogues)]
    (folder / "data.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder / "data.json"


def json_lines(name: str, record: Callable[[Dialogue], Any]) -> Renderer:
    """One JSON value per dialogue and line."""

    def render(folder: Path, dialogues: list[Dialogue]) -> Path:
        text = "\n".join(json.dumps(record(d), ensure_ascii=False) for d in dialogues)
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return render


def query(d: Dialogue) -> dict[str, Any]:
    return {"query": d[-2], "response": d[-1], "history": [d[k : k + 2] for k in range(0, len(d) - 2, 2)]}


def human(d: Dialogue) -> dict[str, Any]:
    return {"conversation": [{"human": d[k], "assistant": d[k + 1]} for k in range(0, len(d), 2)]}


def role_content(d: Dialogue) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(d)]


TWO_TURNS = "two turns"
ONE_LINE = "one line"
APP_FORMATS: dict[str, tuple[str, Renderer, set[str]]] = {
    "chatgpt": ("chatgpt", render_chatgpt, set()),
    "deepseek": ("deepseek", render_deepseek, set()),
    "claude": ("claude", render_claude, set()),
    "gemini": ("gemini", render_gemini, {TWO_TURNS, ONE_LINE}),
    "messenger": ("messenger", render_messenger, set()),
    "messenger encrypted": ("messenger", render_messenger_encrypted, set()),
    "signal": ("signal", render_signal, set()),
    "signal text": ("signal", lines("chat.md", lambda s, t, at: f"[{at:%Y-%m-%d %H:%M}] {s}: {t}"), {ONE_LINE}),
    "query and response": ("pairs", json_lines("q.jsonl", query), set()),
    "prompt and completion": (
        "pairs",
        json_lines("p.jsonl", lambda d: {"prompt": role_content(d)[:-1], "completion": role_content(d)[-1:]}),
        set(),
    ),
    "firefly": ("pairs", json_lines("f.jsonl", lambda d: {"kind": "NLI", "input": d[0], "target": d[1]}), {TWO_TURNS}),
    "lists of texts": ("utterances", json_lines("l.jsonl", lambda d: d), set()),
    "dialogs": ("utterances", json_lines("l.jsonl", lambda d: {"dialog": d}), set()),
    "human and assistant": ("sharegpt", json_lines("h.jsonl", human), set()),
    "role and content": ("openai", json_lines("r.jsonl", lambda d: {"conversations": role_content(d)}), set()),
    "messages alone": ("openai", json_lines("m.jsonl", role_content), set()),
    "whatsapp chinese": (
        "whatsapp",
        lines("chat.txt", lambda s, t, at: f"{at.year}/{at.month}/{at.day} {chinese(at)} - {s}: {t}"),
        set(),
    ),
    "whatsapp chinese ios": (
        "whatsapp",
        lines("_chat.txt", lambda s, t, at: f"[{at.year}/{at.month}/{at.day} {chinese(at)}:{at:%S}] {s}: {t}"),
        set(),
    ),
    "whatsapp korean": (
        "whatsapp",
        lines("chat.txt", lambda s, t, at: f"{at.year}년 {at.month}월 {at.day}일 {korean(at)} - {s}: {t}"),
        set(),
    ),
    "qq": (
        "qq",
        lines("Ann.txt", lambda s, t, at: f"\n{at:%Y-%m-%d %H:%M:%S} {mine(s)}({10001 + len(mine(s))})\n{t}\n"),
        set(),
    ),
    "wechat text": ("wechat", lines("Ann.txt", lambda s, t, at: f"\n{at:%Y-%m-%d %H:%M:%S} {mine(s)}\n{t}\n"), set()),
    "wechat copied": ("wechat", lines("Ann.txt", lambda s, t, at: f"{mine(s)} {at:%Y/%m/%d} {chinese(at)}\n{t}\n"), set()),
    "wechat weclone": ("wechat", render_weclone, set()),
    "wechat memotrace": ("wechat", render_memotrace, set()),
    "wechat weflow": ("wechat", render_weflow, set()),
    "line": ("line", render_line, set()),
    "line of computers": ("line", render_line_of_computers, set()),
    "kakaotalk": (
        "kakaotalk",
        lines("talk.txt", lambda s, t, at: f"{at.year}. {at.month}. {at.day}. {korean(at)}, {s} : {t}"),
        set(),
    ),
    "kakaotalk android": (
        "kakaotalk",
        lines("talk.txt", lambda s, t, at: f"{at.year}년 {at.month}월 {at.day}일 {korean(at)}, {s} : {t}"),
        set(),
    ),
    "kakaotalk english": (
        "kakaotalk",
        lines("talk.txt", lambda s, t, at: f"{at:%B} {at.day}, {at.year}, {at.hour % 12 or 12}:{at:%M %p}, {s} : {t}"),
        set(),
    ),
    "kakaotalk of computers": (
        "kakaotalk",
        lines(
            "talk.txt",
            lambda s, t, at: f"[{s}] [{korean(at)}] {t}",
            lambda at: f"{'-' * 15} {at.year}년 {at.month}월 {at.day}일 토요일 {'-' * 15}",
        ),
        set(),
    ),
}
