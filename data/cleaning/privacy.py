"""Personal data and secrets in texts: found by pattern, confirmed by checksum where one exists, then redacted or replaced.

    Privacy(PrivacySection(mode="surrogate")).apply(turns, note)      # the same address becomes the same stand-in in a dialogue

E-mail, phone, IP, payment card (Luhn), IBAN (mod 97), credentials in URLs, API keys and private keys; Chinese ID cards, number
plates, messenger accounts and street addresses (privacy_chinese.py). Full-width letters, digits and signs count as their ASCII
forms. Stand-ins come from ranges reserved for examples (RFC 2606, RFC 5737, 555-01xx), so they belong to nobody. Code fences
are searched too, because they often contain keys (`privacy.code`). Names of people, and street addresses in other languages,
are not found: that would need a model, which makes mistakes. Reports never quote what was found.
"""

from __future__ import annotations

import bisect
import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..conversation import Turn
from ..recipe import PrivacySection
from .fences import split_fences
from .privacy_chinese import accounts, addresses, card_numbers, id_numbers, phones, plates
from .scripts import half_width

# Word boundaries are ASCII (re.A): in Chinese or Japanese an address has no spaces around it.
_LETTER = "A-Za-z0-9\u00c0-\u052f"  # and of Latin, Greek and Cyrillic names
_EMAIL = re.compile(
    rf"(?<![{_LETTER}_.+/-])[{_LETTER}_][{_LETTER}_.+-]{{0,63}}@(?:[{_LETTER}](?:[{_LETTER}-]{{0,61}}[{_LETTER}])?\.)+"
    rf"(?:xn--[a-z0-9-]{{2,59}}|[A-Za-z]{{2,24}}|[\u0370-\u052f]{{2,24}})(?![{_LETTER}_-])"
)
_CREDENTIALS = re.compile(r"(?<=://)[^\s:/@?#\"'<>]{1,80}:[^\s/@\"'<>]{1,120}(?=@[\w\[])")
_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)", re.A)
_IPV6 = re.compile(
    r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){0,6}(?![\w:])"
    r"|(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){1,6}(?::[0-9A-Fa-f]{1,4}){1,6}(?![\w:])",
    re.A,
)
_CARD = re.compile(r"(?<![\d.,-])[3-6]\d{3}(?:[ -]?\d){9,15}(?![\d-]|[.,]\d)")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_PHONE = re.compile(
    r"(?<![\w.+/=-])(?:\+\d{1,3}[\s.-]?(?:\(\d{1,4}\)[\s.-]?)?\d{1,4}(?:[\s./-]?\d{2,4}){1,4}"
    r"|(?:\+?1[\s.-]?)?(?:\(\d{3}\)\s?|\d{3}[.-])\d{3}[\s.-]\d{4}|(?:1 )?\d{3} \d{3} \d{4}"
    r"|(?:\(0\d{2,4}\)|0\d{2,4})[\s/-]\d{3,4}[\s-]?\d{3,5}|(?<!\d[ .])0\d(?:[ .]\d{2}){4}(?![ .]\d\d(?!\d)))(?![\w/=-]|\.\d)",
    re.A,
)
_SPOKEN_PHONE = re.compile(
    r"(?:\b(?:call|phone|ring|text|tel|telephone|mobile|cell|whats ?app|number is|handy|telefon|nummer|anrufen|numéro|téléphone"
    r"|tel[ée]fono|móvil|telefone|celular|телефон|номер|[vw]x)\b|电话|手机|電話|手機|致电|致電|联系方式|聯繫方式|携帯)"
    r"[^\d\n]{0,25}?(?P<number>\+?\d[\d .-]{6,16}\d)(?![A-Za-z0-9_-])",
    re.I,
)
_KEY = re.compile(
    r"(?<![\w-])(?:sk-(?:proj-|ant-|or-)?[A-Za-z0-9_-]{20,200}|(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,100}|gh[pousr]_[A-Za-z0-9]{36,255}"
    r"|github_pat_\w{22,255}|glpat-[\w-]{20,50}|xox[abeoprs]-[A-Za-z0-9-]{10,200}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}|hf_[A-Za-z0-9]{30,60}"
    r"|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,250}|SG\.[\w-]{16,40}\.[\w-]{30,60}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})(?![\w-])"
    r"|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\s\S]{20,8000}?-----END (?:[A-Z]+ )*PRIVATE KEY-----",
    re.A,
)
_VERSION = re.compile(r"(?:\b(?:version|release|build|firmware|v|ver|section|chapter|driver)\.?|版本)\s*$", re.I | re.A)


MAX_PASSES = 8


@dataclass(frozen=True, slots=True)
class PrivateSpan:
    """text[start:end] is of this kind."""

    kind: str
    start: int
    end: int


def find(text: str, kinds: frozenset[str] | None = None) -> list[PrivateSpan]:
    """Findings in order, none overlapping: the earlier kind in the list wins. kinds: only these."""
    taken: list[PrivateSpan] = []  # in order
    plain = half_width(text)  # as long as the text
    for kind, search in _SEARCHES.items():
        if (kinds is not None and kind not in kinds) or not _NEEDED[kind](plain):
            continue
        for start, end in search(plain):
            place = bisect.bisect_right(taken, start, key=lambda finding: finding.start)
            before, after = taken[place - 1 : place] if place else [], taken[place : place + 1]
            if all(end <= other.start or start >= other.end for other in (*before, *after)):
                taken.insert(place, PrivateSpan(kind, start, end))
    return taken


# What the stand-ins below look like; they identify nobody.
_STAND_IN = {
    "email": re.compile(r"person\d+@example\.org"),
    "phone": re.compile(r"\+1-202-555-01\d\d"),
    "ip": re.compile(r"192\.0\.2\.\d{1,3}"),
    "credentials": re.compile(r"user\d+:password"),
}


def is_stand_in(kind: str, found: str) -> bool:
    """Is this one of the stand-ins that Privacy writes?"""
    return kind in _STAND_IN and _STAND_IN[kind].fullmatch(found) is not None


def luhn(digits: str) -> bool:
    """The checksum of payment cards."""
    total = 0
    for k, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + k % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def iban_is_valid(text: str) -> bool:
    """ISO 13616: rearranged and read as a number, it is 1 mod 97."""
    compact = text.replace(" ", "")
    return 15 <= len(compact) <= 34 and int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


class Privacy:
    """Replaces what find() finds, as a PrivacySection says."""

    def __init__(self, config: PrivacySection) -> None:
        self.mode, self.kinds, self.code = config.mode, frozenset(config.kinds), config.code

    def apply(self, turns: list[Turn], note: Callable[[str], None]) -> list[Turn]:
        """The turns without private data; note(kind) is called once per replacement."""
        if self.mode == "off":
            return turns
        known: dict[tuple[str, str], str] = {}
        counts: dict[str, int] = {}
        out = []
        for turn in turns:
            text = turn.content
            # A replacement may uncover what was next to it: repeat until nothing is found.
            for _ in range(MAX_PASSES):
                findings = self.leftovers(text)
                if not findings:
                    break
                pieces, position = [], 0
                for finding in findings:
                    pieces += [text[position : finding.start], self._stand_in(finding, text, known, counts)]
                    position = finding.end
                    note(finding.kind)
                text = "".join([*pieces, text[position:]])
            out.append(replace(turn, content=text) if text != turn.content else turn)
        return out

    def leftovers(self, text: str) -> list[PrivateSpan]:
        """What apply() would replace; nothing in a text that it has already treated."""
        return [f for f in self._find(text) if self.mode == "redact" or not is_stand_in(f.kind, text[f.start : f.end])]

    def _find(self, text: str) -> Iterator[PrivateSpan]:
        position = 0
        for is_code, part in [(False, text)] if self.code else split_fences(text):
            if not is_code:
                yield from (replace(f, start=f.start + position, end=f.end + position) for f in find(part, self.kinds))
            position += len(part)

    def _stand_in(self, finding: PrivateSpan, text: str, known: dict[tuple[str, str], str], counts: dict[str, int]) -> str:
        kind = finding.kind
        if self.mode == "redact":
            return f"[{kind.upper()}]"
        found = text[finding.start : finding.end]
        found = half_width(found).lower()
        key = (kind, re.sub(r"[\s.()/-]", "", found) if kind in ("phone", "card", "iban", "id") else found)
        if key not in known:
            counts[kind] = n = counts.get(kind, 0) + 1
            known[key] = _SURROGATES[kind](n)
        return known[key]


_SURROGATES: dict[str, Callable[[int], str]] = {
    "email": lambda n: f"person{n}@example.org",
    "phone": lambda n: f"+1-202-555-01{n % 100:02d}",
    "ip": lambda n: f"192.0.2.{n % 254 + 1}",
    "card": lambda n: f"[CARD {n}]",
    "iban": lambda n: f"[IBAN {n}]",
    "credentials": lambda n: f"user{n}:password",
    "key": lambda n: f"[KEY {n}]",
    "id": lambda n: f"[ID {n}]",
    "account": lambda n: f"[ACCOUNT {n}]",
    "plate": lambda n: f"[PLATE {n}]",
    "address": lambda n: f"[ADDRESS {n}]",
}


def _plain(
    pattern: re.Pattern[str], accept: Callable[[str], bool] = lambda found: True
) -> Callable[[str], Iterator[tuple[int, int]]]:
    def search(text: str) -> Iterator[tuple[int, int]]:
        for match in pattern.finditer(text):
            if accept(match[0]):
                yield match.span()

    return search


def _ips(text: str) -> Iterator[tuple[int, int]]:
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                continue
            common = address.is_loopback or address.is_unspecified or str(address).startswith("255.")
            if not common and not _VERSION.search(text[max(0, match.start() - 16) : match.start()]):
                yield match.span()


def _phones(text: str) -> Iterator[tuple[int, int]]:
    for match in _PHONE.finditer(text):
        digits = sum(c.isdigit() for c in match[0])
        least = 10 if match[0].lstrip("(").startswith("0") else 8  # with their leading 0, national numbers have ten or more
        if least <= digits <= 15 and not re.fullmatch(r"(19|20)\d\d[-. /]\d\d[-. /]\d\d.*", match[0]):
            yield match.span()
    yield from phones(text)
    for match in _SPOKEN_PHONE.finditer(text):
        if 7 <= sum(c.isdigit() for c in match["number"]) <= 15:
            yield match.span("number")


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if luhn(digits) and len(set(digits)) > 2:
            yield match.span()
    yield from card_numbers(text)


_SEARCHES: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {
    "key": _plain(_KEY),
    "credentials": _plain(_CREDENTIALS),
    "email": _plain(_EMAIL),
    "iban": _plain(_IBAN, iban_is_valid),
    "id": id_numbers,
    "card": _cards,
    "ip": _ips,
    "phone": _phones,
    "account": accounts,
    "plate": plates,
    "address": addresses,
}
# What a text must hold for a search to be worth its time: most chat turns have none of it.
_DIGIT = re.compile(r"\d")
_BESIDE_POINT = re.compile(r"\d\.\d", re.A)
_SPOKEN_MOBILE = re.compile("[一幺][三四五六七八九]")
_KEY_SIGNS = (
    "sk-", "_live_", "_test_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "AKIA", "ASIA", "AIza",
    "hf_", "npm_", "pypi-", "SG.", "eyJ", "PRIVATE KEY",
)  # fmt: skip


@lru_cache(maxsize=2)  # most searches ask
def _has_digit(text: str) -> bool:
    return any(map(text.__contains__, "0123456789")) or (not text.isascii() and _DIGIT.search(text) is not None)


_NEEDED: dict[str, Callable[[str], bool]] = dict.fromkeys(_SEARCHES, _has_digit) | {
    "key": lambda text: any(map(text.__contains__, _KEY_SIGNS)),
    "credentials": lambda text: "://" in text,
    "email": lambda text: "@" in text,
    "ip": lambda text: text.count(":") >= 2 or ("." in text and _BESIDE_POINT.search(text) is not None),
    "phone": lambda text: _has_digit(text) or (not text.isascii() and _SPOKEN_MOBILE.search(text) is not None),
}
