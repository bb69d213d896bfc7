"""Chinese personal data: mobile and landline numbers, ID cards, number plates, accounts of messengers, street addresses.

    list(phones("有事找我 138 1234 5678"))  ->  [(5, 18)]

Used by data/cleaning/privacy.py; texts come with full-width signs already in half width. A number with a checksum is found
anywhere. One without a checksum is found where the text is Chinese, or after a word that says what it is. Sources: GB 11643
(ID cards), the Ministry of Industry's numbering plan (1[3-9]x mobiles), ISO 7812 (cards).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .scripts import HAN, has_han

Spans = Iterator[tuple[int, int]]

_MOBILE = re.compile(
    r"(?:(?<![0-9A-Za-z_./=+-])|(?<=[vVwW][xX])|(?<=[vVwW][xX]:)|(?<=[Tt][Ee][Ll])|(?<=[^0-9A-Za-z]-))"
    r"(?:(?:\+|00)?86[ -]?)?(?:1[3-9]\d[ -]?\d{4}[ -]?\d{4}|1[3-9]\d[ -]\d{3}[ -]\d{5}|1[3-9]\d{2}[ -]\d{3}[ -]\d{4}"
    r"|1[3-9]\d{3}[ -]\d{6})(?![0-9A-Za-z_=/]|[.-]\d)(?! ?(?:元|块|美元|日元|韩元|人民币|亿|万|次|字节|毫秒|秒))",
    re.A,
)
_LANDLINE = re.compile(
    r"(?<![0-9A-Za-z_./=+-])(?:\((?:0\d{2,3})\) ?|(?:010|02\d|0[3-9]\d{2})[ -]?)[2-8]\d{2,3}[ -]?\d{4}(?![0-9A-Za-z_=/]|[.-]\d)"
    r"|(?<![0-9A-Za-z_./=+-])09\d{2}[ -]?\d{3}[ -]?\d{3}(?![0-9A-Za-z_=/]|[.-]\d)",  # Taiwan's mobiles
    re.A,
)
_NUMERALS = "零〇一二三四五六七八九幺"
_IN_CHARACTERS = re.compile(rf"(?<![{_NUMERALS}])[一幺][三四五六七八九][{_NUMERALS}]{{9}}(?![{_NUMERALS}])")
_NO_PHONE = re.compile(
    r"(?:单号|單號|编号|編號|流水号|学号|工号|货号|型号|订单|訂單|运单|快递|金额|价格|总计|共|约|版本|ISBN|ID)"
    r"[是为為号码:： #]*$"
)

_ID = re.compile(
    r"(?<![0-9A-Za-z])[1-9]\d{5} ?(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]) ?\d{3}[\dXx](?![0-9A-Za-z])", re.A
)
_OLD_ID = re.compile(r"(?<![0-9A-Za-z])[1-9]\d{7}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}(?![0-9A-Za-z])", re.A)
_ID_WORD = re.compile(r"(?:身份证|身份證|证件|證件|居住证|户口本)(?:号码|号|號碼|號)?[^0-9A-Za-z]{0,6}$")
_PASSPORT = re.compile(
    r"(?:护照|護照|通行证|通行證|回乡证|台胞证)(?:号码|号|號碼|號)?[^0-9A-Za-z\n]{0,6}(?P<number>[A-Z]{1,2}\d{7,10})(?![0-9A-Za-z])",
    re.I | re.A,
)
_TAIWAN_ID = re.compile(r"(?<![0-9A-Za-z])[A-Z][1289]\d{8}(?![0-9A-Za-z])", re.A)
_HONG_KONG_ID = re.compile(r"(?<![0-9A-Za-z])([A-Z]{1,2})(\d{6}) ?\(([0-9A])\)", re.A)
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)

_PLATE = re.compile(
    r"[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼][A-HJ-NP-Z][·• ]?"
    r"(?=[A-Z]{0,6}\d)[A-HJ-NP-Z0-9]{5,6}(?![0-9A-Za-z])"
)

_SAYS = r"(?:号码|账号|号|號|同号|id)?\s{0,2}(?:是|为|就是)?\s{0,2}[:：]?\s{0,2}"
_ACCOUNT = re.compile(
    rf"(?:qq|扣扣|企鹅)(?:邮箱|群)?{_SAYS}(?P<qq>[1-9]\d{{4,10}})(?![0-9A-Za-z@.])"
    rf"|(?:微信|威信|薇信|V信|wechat|(?<![A-Za-z])[vw]x|(?<=加)v){_SAYS}(?P<wechat>(?=[a-z_-]*\d|[a-z\d-]*_)[a-z][a-z0-9_-]{{5,19}})(?![a-z0-9_@-])"
    r"|(?:微信|威信|薇信|V信|抖音|小红书|快手|微博)(?:号码|账号|号|id)\s{0,2}(?:(?:是|为)[:：]?|[:：])\s{0,2}(?P<named>[a-z0-9][a-z0-9_.-]{4,19})"
    r"(?![a-z0-9_@-])",
    re.I | re.A,
)

_CARD = re.compile(r"(?:卡号|卡號|银行卡|账号|账户|帐号|帐户|帳號)\D{0,8}?(?P<number>\d(?:[ -]?\d){14,18})(?!\d)", re.A)

# A street or village with a house number; then building, stairs, floor, flat. What stands before the street is found by _start.
_HOUSE = re.compile(
    r"(?:大道|大街|胡同|(?<!条)[路街道巷里村屯])(?:[东西南北中]段?|[一二三四五六七八九十\d]段)?"
    r"[\dA-Za-z甲乙丙丁-]{1,8}(?:号楼|号院|号(?!线)|號(?!線)|弄|栋|幢|座)"
    r"(?:[^\s，。,;；!！?？\d]{0,12}?[\dA-Za-z一二三四五六七八九十-]{1,6}(?:号楼|号|號|栋|幢|座|单元|单位|层|楼|室|户|房|梯)){0,6}"
)
_PROVINCE = re.compile(
    "(?:北京|天津|上海|重庆|河北|山西|辽宁|吉林|黑龙江|江苏|浙江|安徽|福建|江西|山东|河南|湖北|湖南|广东|海南|四川|贵州|云南|陕西|甘肃"
    f"|青海|台湾|内蒙古|广西|西藏|宁夏|新疆|香港|澳门)[{HAN}]*$"
)
# Characters of verbs and pronouns: an address begins after them.
_NO_ADDRESS = "在到往至去住是寄送给我你他她它们的了就叫这那个"
_DISTRICT = re.compile("[市区區县縣镇鎮乡鄉州盟旗]|街道")
_LOOK_BACK, _STREET_NAME = 40, 4


def phones(text: str) -> Spans:
    """Numbers that need no word for telephone, in Chinese texts and in texts without any letters."""
    chinese = has_han(text)
    if chinese or not any(c.isalpha() for c in text):
        for pattern in (_MOBILE, _LANDLINE) if chinese else (_MOBILE,):
            for match in pattern.finditer(text):
                if not _NO_PHONE.search(text[max(0, match.start() - 12) : match.start()]):
                    yield match.span()
    if chinese:
        yield from (match.span() for match in _IN_CHARACTERS.finditer(text))


def id_numbers(text: str) -> Spans:
    """ID cards of the mainland (by checksum, or after their word), Hong Kong and Taiwan (by checksum), and passports."""
    for match in _ID.finditer(text):
        if id_card_is_valid(match[0].replace(" ", "")) or _after_word(text, match):
            yield match.span()
    if has_han(text):
        yield from (match.span() for match in _OLD_ID.finditer(text) if _after_word(text, match))
        yield from (match.span("number") for match in _PASSPORT.finditer(text))
        yield from (match.span() for match in _TAIWAN_ID.finditer(text) if _taiwan_id_is_valid(match[0]))
    yield from (match.span() for match in _HONG_KONG_ID.finditer(text) if _hong_kong_id_is_valid(*match.groups()))


def plates(text: str) -> Spans:
    """Number plates of cars."""
    yield from (match.span() for match in _PLATE.finditer(text))


def accounts(text: str) -> Spans:
    """QQ numbers and names in WeChat and other messengers, after the messenger's name."""
    for match in _ACCOUNT.finditer(text):
        yield match.span(str(match.lastgroup))


def card_numbers(text: str) -> Spans:
    """Account and card numbers after their word; not every Chinese bank card has Luhn's check digit."""
    yield from (match.span("number") for match in _CARD.finditer(text))


def addresses(text: str) -> Spans:
    """Streets with a house number."""
    for match in _HOUSE.finditer(text):
        start = _start(text, match.start())
        if match.start() - start >= 2:
            yield start, match.end()


def _start(text: str, street: int) -> int:
    """Where the address begins whose street's last character is at `street`: at a province, or after what cannot be a name."""
    before = text[max(0, street - _LOOK_BACK) : street]
    if province := _PROVINCE.search(before):
        return street - len(before) + province.start()
    name = re.search(rf"[{HAN}]*$", re.split(f"[{_NO_ADDRESS}]", before)[-1])
    assert name is not None
    found = re.sub("^(?:请|麻烦|帮忙|记下|收件|地址|搬家)+", "", name[0])
    return street - (len(found) if _DISTRICT.search(found) else min(len(found), _STREET_NAME))


def id_card_is_valid(number: str) -> bool:
    """GB 11643: the last of 18 digits is a checksum modulo 11, X for ten."""
    total = sum(int(digit) * factor for digit, factor in zip(number, _ID_WEIGHTS, strict=False))
    return len(number) == 18 and "10X98765432"[total % 11] == number[17].upper()


def _after_word(text: str, match: re.Match[str]) -> bool:
    return _ID_WORD.search(text[max(0, match.start() - 16) : match.start()]) is not None


def _taiwan_id_is_valid(number: str) -> bool:
    first = "ABCDEFGHJKLMNPQRSTUVXYWZIO".index(number[0]) + 10
    digits = [first // 10, first % 10, *map(int, number[1:])]
    return sum(d * f for d, f in zip(digits, (1, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1), strict=True)) % 10 == 0


def _hong_kong_id_is_valid(letters: str, digits: str, check: str) -> bool:
    values = [36 if len(letters) == 1 else ord(letters[0]) - 55, ord(letters[-1]) - 55, *map(int, digits)]
    total = sum(value * factor for value, factor in zip(values, range(9, 1, -1), strict=True))
    return (total + (10 if check == "A" else int(check))) % 11 == 0
