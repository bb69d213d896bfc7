"""What the sender of a mail typed: no quotes, no line that introduces them, no signature, in many languages.

    own_words("下周五。\\n\\n----- 原始邮件 -----\\n发件人: 张三 …") == "下周五。"

Quotes are lines that begin with `>`, or all below a rule ("原始邮件", "Original Message"), below a block of headers (发件人:,
From:, Von:), or below a line that introduces them (`在 … 写道：`, `On … wrote:`). Such a line has a verb of writing and a colon
at its end, and a date or an address; before lines with `>` a date or an address and the colon are enough, in any language.
"""

from __future__ import annotations

import re

_RULES = (
    "original message|original appointment|forwarded message|begin forwarded message|原始邮件|原邮件|原始郵件"
    "|原始信件|转发邮件|轉寄郵件|转发的邮件|元のメッセージ|転送メッセージ|원본 메일|원본 메시지"
    "|ursprüngliche nachricht|weitergeleitete nachricht|originalnachricht|message d'origine|message original"
    "|message transféré|mensaje original|mensaje reenviado|mensagem original|messaggio originale"
    "|messaggio inoltrato|oorspronkelijk bericht|doorgestuurd bericht|alkuperäinen viesti|välitetty viesti"
    "|ursprungligt meddelande|originalmeddelande|oprindelig meddelelse|opprinnelig melding"
    "|wiadomość oryginalna|původní zpráva|исходное сообщение|пересылаемое сообщение|вихідне повідомлення"
    "|orijinal mesaj|thư gốc|pesan asli"
)
_VERBS = (
    r"wrote|writes|schrieb\b.*|a écrit|escribió|escreveu|ha scritto|schreef\b.*|skrev\b.*|kirjoitti"
    r"|napisał\(?a?\)?|napsala?\b.*|пишет|написал\(?а?\)?|писал\(?а?\)?|написав\(?ла\)?|yazdı|şunu yazdı"
    r"|ezt írta\b.*|a scris|έγραψε|đã viết|menulis|เขียน(?:ว่า)?|写道|写了|寫道|来信|さん(?:は|が)?書きました"
    r"|のメール|님이 작성|님이 쓴 글|كتب"
)
_NAMES = (
    "from|to|sent|date|subject|cc|发件人|寄件人|寄件者|收件人|收件者|发送时间|寄件日期|日期|时间|抄送|副本"
    "|主题|主旨|差出人|送信者|宛先|送信日時|件名|보낸 사람|보낸사람|받는 사람|보낸 날짜|날짜|제목|von|an"
    "|gesendet|datum|betreff|de|para|à|envoyé|objet|enviado|enviado el|asunto|assunto|da|a|inviato|oggetto"
    "|data|van|aan|verzonden|onderwerp|lähettäjä|lähetetty|vastaanottaja|aihe|från|till|skickat|ämne|fra|til"
    "|sendt|emne|od|do|wysłano|temat|komu|odesláno|předmět|от|от кого|кому|отправлено|дата|тема|від|надіслано"
    "|kimden|kime|gönderildi|gönderme tarihi|konu|từ|tới|ngày|chủ đề"
)
_RULE = re.compile(rf"^\s*[-_=*]{{0,40}}\s*(?:{_RULES})\s*:?\s*[-_=*]{{0,40}}\s*$", re.I)
_HEADER = re.compile(rf"^\s*\*{{0,2}}(?:{_NAMES})\s?\*{{0,2}}\s?[:：]\*{{0,2}}\s*\S", re.I)
_LINE = re.compile(r"^\s*[_-]{10,}\s*$")
_WHO = re.compile(r"\d{4}|\d{1,2}[:.]\d{2}|<[^<>\s]+@[^<>\s]+>|\S+@\S+\.\S+|\d{1,2}[./-]\d{1,2}")
_WROTE = re.compile(rf"(?:{_VERBS})\s*[:：]\s*$", re.I)
_SIGNATURE = re.compile(r"^--\s?$")
_LONGEST_LINE = 1000  # characters of a line that is looked at
_LONGEST = 4  # lines that one introduction may be wrapped into


def own_words(text: str) -> str:
    """The text of a mail without what it quotes and without its signature."""
    lines = text.replace("\r\n", "\n").split("\n")
    kept: list[str] = []
    following = _following(lines)
    k = 0
    while k < len(lines):
        line = lines[k]
        if len(line) > _LONGEST_LINE or not line.strip():
            if not line.startswith(">"):
                kept.append(line)
            k += 1
            continue
        if _SIGNATURE.match(line) or _RULE.match(line) or _headers_begin(lines, k):
            break
        if line.startswith(">"):
            k += 1
            continue
        size, cut = _introduction(lines, k, following)
        if cut:
            break
        if size:
            k += size
            continue
        kept.append(line)
        k += 1
    return "\n".join(kept).strip()


def _following(lines: list[str]) -> list[str | None]:
    """Of each line, the first below that is not blank."""
    found: list[str | None] = []
    below: str | None = None
    for line in reversed(lines):
        found.append(below)
        below = line if line.strip() else below
    return found[::-1]


def _headers_begin(lines: list[str], k: int) -> bool:
    """Do three header lines in a row begin here, maybe below a rule?"""
    start = k + 1 if _LINE.match(lines[k]) else k
    block = [line[:_LONGEST_LINE] for line in lines[start : start + 4]]
    return len(block) >= 3 and bool(_HEADER.match(block[0])) and sum(_HEADER.match(line) is not None for line in block) >= 3


def _introduction(lines: list[str], k: int, following: list[str | None]) -> tuple[int, bool]:
    """(lines of an introduction that begins here, or 0; whether all below it is quoted)."""
    for size in range(1, _LONGEST + 1):
        part = lines[k : k + size]
        if len(part) < size or not part[-1].strip() or part[-1].startswith(">"):
            return 0, False
        if not part[-1].rstrip().endswith((":", "：")):
            continue
        said = " ".join(line.strip() for line in part)
        if len(said) > 300:
            continue
        below = following[k + size - 1]
        quoted = below is not None and below.startswith(">")
        known = _WROTE.search(said) is not None and (_WHO.search(said) is not None)
        if (known and (quoted or below is not None)) or (quoted and _WHO.search(said) is not None):
            return size, not quoted
        if known:  # nothing below
            return size, True
        if quoted and _WROTE.search(said):  # "On Saturday, somebody wrote:"
            return size, False
        return 0, False
    return 0, False
