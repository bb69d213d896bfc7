"""Renderers of chat apps' exports; FORMATS of importer_formats.py includes them. Ann is the user, Bob or 我 the assistant."""

from __future__ import annotations

import csv
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


ONE_LINE = "one line"
APP_FORMATS: dict[str, tuple[str, Renderer, set[str]]] = {
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
