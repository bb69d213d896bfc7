"""Which encoding a text without a byte-order mark is in: UTF-8, or gb18030 as Chinese spreadsheets write it, or unknown.

    text_encoding(head) -> "utf-8", "gb18030" or None

Unknown texts are refused by whoever reads them: a wrong encoding must not pass as text. A UTF-8 text with a few damaged
characters is UTF-8. gb18030 is recognised by what Chinese is made of: of the characters beyond ASCII most are among the 3,755
of GB 2312's first level, which is ordered by pronunciation, so that a good part stands behind the last row that Korean (EUC-KR)
uses; Japanese (EUC-JP) shows by its kana.
"""

from __future__ import annotations

import codecs
import re

SAMPLE_BYTES = 1 << 18
# Valid sequences of two to four bytes; overlong forms and surrogates are not worth telling apart here.
_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_HIGH = re.compile(rb"[\x80-\xff]")
COMMON = ("gb18030", "big5", "cp1252", "cp1251", "cp932", "euc_jp", "cp949")


def text_encoding(sample: bytes) -> str | None:
    """utf-8 or gb18030, judged by the beginning of a file; None for neither. ASCII is utf-8; binary data passes as utf-8."""
    if b"\0" in sample[:4096]:
        return "utf-8"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        pass
    else:
        return "utf-8"
    rest = _UTF8.sub(b"", sample)
    if len(_HIGH.findall(rest)) * 4 <= len(sample) - len(rest):
        return "utf-8"
    return "gb18030" if _is_chinese(sample) else None


def _is_chinese(sample: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(sample)
    except UnicodeDecodeError:
        return False
    level_one = late = other = kana = 0
    for character in text:
        if character < "\x80":
            continue
        code = character.encode("gb18030")
        if len(code) == 2 and 0xB0 <= code[0] <= 0xD7 and code[1] >= 0xA1:
            level_one += 1
            late += code[0] > 0xC8
        elif len(code) == 2 and code[0] in (0xA4, 0xA5):
            kana += 1
        elif len(code) != 2 or code[0] not in (0xA1, 0xA3):  # but punctuation and full-width forms
            other += 1
    return level_one > 0 and late * 6 >= level_one and (other + kana) * 4 <= level_one + other + kana


def likely_encodings(sample: bytes) -> list[str]:
    """Those of the common ones in which the sample can be decoded, for an error message."""
    found = []
    for name in COMMON:
        try:
            codecs.getincrementaldecoder(name)().decode(sample)
        except UnicodeDecodeError:
            continue
        found.append(name)
    return found
