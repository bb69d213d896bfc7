"""What chat programs write in place of a message: media left out of an export, deleted and recalled messages, calls.

    placeholder("<省略影音内容>") == "media"; placeholder("Tämä viesti poistettiin") == "deleted"; placeholder("hello") is None

The texts are those of WhatsApp's, WeChat's, QQ's, LINE's and KakaoTalk's clients in their languages (placeholders.yaml). A text
counts only if it is the whole message. `<…>` with a blank or a letter beyond ASCII inside is WhatsApp's "<Media omitted>" in
any language.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

Kind = Literal["media", "deleted", "call", "notice"]

_INVISIBLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\u00ad]")
_LONGEST = 300  # characters; no client writes more
_ATTACHED = "attached|adjunto|anexado|angehängt|Anhang|joint|allegato|bijgevoegd|bijlage|liite|liitetty|bifoga[dt]"
_ATTACHED += "|附件|附加|添付|첨부|прикреплен|вложен|ekli|مرفق"
_ASCII_SIGNS = ("[", "<", ")", "call", "message")  # of what the layouts find in ASCII
_CALL = "未接|已取消|已拒绝|对方已取消|对方已拒绝|对方无应答|对方忙线中|通话中断|通话时长|通話時長|通話時間"
_CALL += "|语音通话|视频通话|語音通話|視訊通話"


@cache
def _known() -> tuple[dict[str, Kind], re.Pattern[str], tuple[Kind, ...]]:
    """(folded texts, one pattern with a group for each layout, the kinds of the groups)."""
    lists = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    kinds: tuple[Kind, ...] = ("media", "call", "deleted")
    things = "|".join(map(re.escape, lists["things"]))
    bracketed = rf"[\[【](?:{things})(?:[:：,，\s][^\]】\n]{{0,200}})?[\]】]"
    someone = r"[\"“「']?.{0,40}?[\"”」']?\s?"  # whoever did it, in quotation marks or not
    patterns: tuple[tuple[str, Kind], ...] = (
        (rf"(?:{bracketed}\s*)+", "media"),
        (r"<(?=[^<>\n]*(?:\s|[^\x00-\x7f]))[^<>\n=\"/]{2,80}>", "media"),
        (rf"<(?:{_ATTACHED})[^<>\n]*>", "media"),
        (rf"[^\n]{{1,200}}\.[A-Za-z0-9]{{1,5}} ?[(（][^()（）\n]{{0,30}}(?:{_ATTACHED})[^()（）\n]{{0,20}}[)）]", "media"),
        (r"(?:사진|동영상) \d+(?:장|개)|파일: .{1,200}|샵검색: .{1,100}", "media"),
        (r"(?:보이스톡|페이스톡|라이브톡)(?: .{1,30})?|☎ ?.{0,60}", "call"),
        (rf"(?:{_CALL})(?:[:：,， ]?\s?[\d:：]{{1,8}}|通话|.{{1,4}}(?:来电|來電|通話|通话))", "call"),
        (r"(?:Missed )?(?:group )?(?:voice|video) call(?:[,.·] ?.{1,40})?", "call"),
        (rf"{someone}(?:撤回|收回)(?:了|一|已)了?一?(?:条|條|則|个)?(?:成员的)?(?:消息|訊息|信息).{{0,30}}", "deleted"),
        (r".{1,40}さんがメッセージの送信を取り消しました|.{1,40}님이 메시지를 삭제했습니다", "deleted"),
        (r"(?:.{1,40} )?(?:has )?(?:recalled|unsent) a message", "deleted"),
        (rf"{someone}拍了拍.{{1,40}}", "notice"),
        (r"(?:我通过了你的(?:朋友|好友)验证请求，)?(?:现在)?我们可以开始聊天了|以上是打招呼的(?:内容|消息)", "notice"),
        (r"你已添加了.{1,40}，现在可以开始聊天了|我们已经是好友了.{0,20}|收到一条.{1,20}，请在手机上查看", "notice"),
        (r"请使用(?:最新版)?手机QQ(?:进行)?查看.{0,20}", "notice"),
    )
    texts = {_fold(text): kind for kind in kinds for text in lists[kind]}
    return texts, re.compile("|".join(f"({p})" for p, _ in patterns), re.IGNORECASE), tuple(kind for _, kind in patterns)


def _fold(text: str) -> str:
    """A text without marks of direction, case and a last full stop."""
    if not text.isascii():
        text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    text = text.strip().rstrip(".。।۔").strip()
    return " ".join(text.casefold().split())


def placeholder(text: str) -> Kind | None:
    """What stands in place of the message, or None for words that somebody wrote."""
    if len(text) > _LONGEST:
        return None
    texts, layouts, kinds = _known()
    if found := texts.get(_fold(text)):
        return found
    if text.isascii() and not any(map(text.lower().__contains__, _ASCII_SIGNS)):
        return None
    match = layouts.fullmatch((text if text.isascii() else _INVISIBLE.sub("", text)).strip().rstrip(".。"))
    return None if match is None else kinds[(match.lastindex or 1) - 1]
