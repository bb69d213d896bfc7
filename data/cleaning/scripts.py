"""What depends on the script of a text: how much a character says, Chinese or Japanese, simplified or traditional, full width.

    weight("今天吃什么？")      -> 21.0   # about as much as an English text of 21 letters
    half_width("Ａ１＠ｂ．ｃ")   -> "A1@b.c"

Weights are the ratio of lengths in parallel texts, rounded: a Chinese text has a quarter of the characters of its English
translation, a Japanese or Korean one a half. Thresholds that count characters count these.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache, lru_cache

HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_HANGUL = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"
# Thai, Lao, Burmese and Khmer: alphabets, but written without spaces.
_OTHER_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
UNSPACED = KANA + HAN + _OTHER_UNSPACED

HAN_WEIGHT, KANA_WEIGHT = 4.0, 2.0
# A word of a script without spaces has about one and a half characters.
CHARACTERS_PER_WORD = 1.5
# Japanese prose is more than a third kana; a Chinese text may borrow a の.
LEAST_KANA = 0.1

_HAN_RUN, _KANA_RUN, _SYLLABLES = re.compile(f"[{HAN}]+"), re.compile(f"[{KANA}]+"), re.compile(f"[{KANA}{_HANGUL}]+")


def _count(pattern: re.Pattern[str], text: str) -> int:
    return sum(map(len, pattern.findall(text)))


def has_han(text: str) -> bool:
    """Is there a Chinese character?"""
    return _HAN_RUN.search(text) is not None


def weight(text: str) -> float:
    """Length in letters of an alphabet: a Chinese character counts as four, a kana or Hangul syllable as two."""
    if text.isascii():
        return float(len(text))
    return len(text) + (HAN_WEIGHT - 1) * _count(_HAN_RUN, text) + (KANA_WEIGHT - 1) * _count(_SYLLABLES, text)


def letter_weight(text: str) -> float:
    """As weight, of the letters alone."""
    return weight("".join(filter(str.isalpha, text)))


def has_letters(text: str, least: float) -> bool:
    """Is the letter_weight at least this? Of a long text, only the beginning is read."""
    return letter_weight(text[: 4 * int(least)]) >= least or letter_weight(text) >= least


def is_japanese(text: str) -> bool:
    """Does a text with Chinese characters hold enough kana to be Japanese? A text of kana alone is."""
    kana, han = _count(_KANA_RUN, text), _count(_HAN_RUN, text)
    return kana > 0 and kana >= LEAST_KANA * (kana + han)


def is_chinese(text: str) -> bool:
    """Are most letters Chinese characters, and hardly any of them kana?"""
    if text.isascii():
        return False
    twice = 2 * _count(_HAN_RUN, text)
    if not twice or (twice <= len(text) and twice <= sum(map(str.isalpha, text))):
        return False
    return not is_japanese(text)


def chinese_script(text: str) -> str | None:
    """`zh-hans` or `zh-hant`, whichever has more characters that only it uses; None where no character tells them apart."""
    simplified, traditional = _one_sided()
    score = sum(map(simplified.__contains__, text)) - sum(map(traditional.__contains__, text))
    return "zh-hans" if score > 0 else "zh-hant" if score < 0 else None


@cache
def _one_sided() -> tuple[frozenset[str], frozenset[str]]:
    """Characters of GB 2312 that Big5 lacks, and the reverse; what both have (后, 里, 台) says nothing."""

    def has(charset: str, character: str) -> bool:
        try:
            return len(character.encode(charset)) == 2
        except UnicodeEncodeError:
            return False

    known = [(c, has("gb2312", c), has("big5", c)) for c in map(chr, range(0x4E00, 0xA000))]
    return frozenset(c for c, gb, big5 in known if gb and not big5), frozenset(c for c, gb, big5 in known if big5 and not gb)


@lru_cache(maxsize=8)  # several rules ask for the same text in a row
def half_width(text: str) -> str:
    """Full-width letters, digits and the signs inside numbers in ASCII, digits of other scripts as 0-9. The length stays.

    Commas, semicolons and full stops stay, because they end a number and never stand inside one.
    """
    if text.isascii():
        return text
    table, occurs = _half_width_table()
    return occurs.sub(lambda match: table[match[0]], text)


@cache
def _half_width_table() -> tuple[dict[str, str], re.Pattern[str]]:
    table = {code: str(unicodedata.decimal(chr(code))) for code in range(0x10000) if chr(code).isdecimal()}
    table |= {0xFEE0 + ord(c): c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz@.+-/:_()#%=&?~[]"}
    table |= dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63"), "-")
    table |= dict.fromkeys(map(ord, "\u3000\u00a0\u2002\u2003\u2009\u202f"), " ")
    wide = {chr(code): c for code, c in table.items() if code > 127}
    return wide, re.compile("[" + "".join(wide) + "]")
