"""Precision and recall of the search for private data, on planted data among look-alikes.

    python -m chatmill.data.bench.privacy        # the tables of docs/data.md

Every text is a sentence of chat with one planted item, or with something harmless that a careless pattern takes for one. A find
counts when kind and borders are exact. The items are made up by rule, from fixed seeds; real texts are messier.
"""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from ..cleaning.privacy import find, iban_is_valid, luhn
from ..cleaning.privacy_chinese import id_card_is_valid

Plant = Callable[[random.Random], str]
_ALPHANUMERIC = string.ascii_letters + string.digits
_HEX = "0123456789abcdef"


def _digits(rng: random.Random, n: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(n))


def _letters(rng: random.Random, n: int, alphabet: str = _ALPHANUMERIC) -> str:
    return "".join(rng.choice(alphabet) for _ in range(n))


def _grouped(text: str, *sizes: int, by: str = " ") -> str:
    edges = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    return by.join(text[a:b] for a, b in pairwise(edges))


def _card(rng: random.Random) -> str:
    start, length = rng.choice([("4", 16), ("51", 16), ("55", 16), ("6011", 16), ("34", 15), ("37", 15)])
    body = start + _digits(rng, length - 1 - len(start))
    number = body + next(d for d in string.digits if luhn(body + d))
    sizes = (4, 4, 4, 4) if length == 16 else (4, 6, 5)
    return rng.choice([number, _grouped(number, *sizes), _grouped(number, *sizes, by="-")])


def _iban(rng: random.Random) -> str:
    country, account = rng.choice(
        [("DE", _digits(rng, 18)), ("AT", _digits(rng, 16)), ("FR", _digits(rng, 23)), ("ES", _digits(rng, 20)),
         ("NL", _letters(rng, 4, string.ascii_uppercase) + _digits(rng, 10)), ("CH", _digits(rng, 17)),
         ("GB", _letters(rng, 4, string.ascii_uppercase) + _digits(rng, 14)), ("PL", _digits(rng, 24)),
         ("BE", _digits(rng, 12)),         ("IT", _letters(rng, 1, string.ascii_uppercase) + _digits(rng, 22)),
         ("NO", _digits(rng, 11))]
    )  # fmt: skip
    number = next(f"{country}{c:02d}{account}" for c in range(2, 99) if iban_is_valid(f"{country}{c:02d}{account}"))
    return rng.choice([number, " ".join(number[k : k + 4] for k in range(0, len(number), 4))])


def _jwt(rng: random.Random) -> str:
    return f"eyJ{_letters(rng, 30)}.eyJ{_letters(rng, 60)}.{_letters(rng, 43)}"


def _pem(rng: random.Random) -> str:
    body = "\n".join(_letters(rng, 64) for _ in range(4))
    kind = rng.choice(["", "RSA ", "OPENSSH ", "EC "])
    return f"-----BEGIN {kind}PRIVATE KEY-----\n{body}\n-----END {kind}PRIVATE KEY-----"


def _user_password(rng: random.Random) -> str:
    return f"{_letters(rng, rng.randint(3, 8))}:{_letters(rng, 8)}{rng.choice(['', '!', '%40', '-_.'])}"


PLANTS: dict[str, list[Plant]] = {
    "email": [
        lambda r: f"{_letters(r, 6)}.{_letters(r, 5)}@{_letters(r, 7).lower()}.{r.choice(['com', 'co.uk', 'de', 'museum'])}",
        lambda r: f"{_letters(r, 4)}+news_{_digits(r, 2)}@mail-{_digits(r, 1)}.org",
        lambda r: f"{r.choice(['info', 'ann', 'j.doe', 'x_y'])}@{_letters(r, 3).lower()}.{_letters(r, 6).lower()}.com.br",
        lambda r: f"{_letters(r, 5).lower()}@{r.choice(['münchen.de', 'example.рф', 'post.xn--p1ai'])}",
    ],
    "phone": [
        lambda r: f"({r.randint(201, 989)}) {r.randint(200, 999)}-{_digits(r, 4)}",  # United States
        lambda r: f"{r.randint(201, 989)}-{r.randint(200, 999)}-{_digits(r, 4)}",
        lambda r: f"{r.randint(201, 989)}.{r.randint(200, 999)}.{_digits(r, 4)}",
        lambda r: f"+1{r.randint(201, 989)}{r.randint(200, 999)}{_digits(r, 4)}",
        lambda r: f"+49 {r.randint(151, 179)} {_grouped(_digits(r, 8), 4, 4)}",  # Germany
        lambda r: f"030/{r.randint(200, 999)}{_digits(r, 4)}",
        lambda r: f"+44 20 7{_digits(r, 3)} {_digits(r, 4)}",  # United Kingdom
        lambda r: f"07{_digits(r, 3)} {_digits(r, 6)}",
        lambda r: f"+33 6 {_grouped(_digits(r, 8), 2, 2, 2, 2)}",  # France
        lambda r: f"06 {_grouped(_digits(r, 8), 2, 2, 2, 2)}",
        lambda r: f"+34 6{_digits(r, 2)} {_grouped(_digits(r, 6), 3, 3)}",  # Spain
        lambda r: f"+39 3{_digits(r, 2)} {_digits(r, 7)}",  # Italy
        lambda r: f"+31 6 {_digits(r, 8)}",  # Netherlands
        lambda r: f"+41 79 {_grouped(_digits(r, 7), 3, 2, 2)}",  # Switzerland
        lambda r: f"+91 {_grouped('9' + _digits(r, 9), 5, 5)}",  # India
        lambda r: f"+86 {_grouped('13' + _digits(r, 9), 3, 4, 4)}",  # China
        lambda r: f"+81 90-{_digits(r, 4)}-{_digits(r, 4)}",  # Japan
        lambda r: f"+55 (11) 9{_digits(r, 4)}-{_digits(r, 4)}",  # Brazil
        lambda r: f"+7 9{_digits(r, 2)} {_grouped(_digits(r, 7), 3, 2, 2, by='-')}",  # Russia
        lambda r: f"+61 4{_digits(r, 2)} {_grouped(_digits(r, 6), 3, 3)}",  # Australia
        lambda r: f"+27 8{_digits(r, 1)} {_digits(r, 3)} {_digits(r, 4)}",  # South Africa
        lambda r: f"0151{_digits(r, 8)}",  # nothing but digits: any number could be meant, and none of these is found
    ],
    "ip": [
        lambda r: f"{r.randint(1, 126)}.{r.randint(0, 255)}.{r.randint(0, 255)}.{r.randint(1, 254)}",
        lambda r: f"{r.randint(128, 223)}.{r.randint(0, 255)}.{r.randint(0, 255)}.{r.randint(1, 254)}",
        lambda r: ":".join(f"{r.randint(1, 65535):x}" for _ in range(8)),
        lambda r: f"2a01:{r.randint(256, 65535):x}::{r.randint(256, 65535):x}",
    ],
    "card": [_card],
    "iban": [_iban],
    "key": [
        lambda r: "sk-" + _letters(r, 48),
        lambda r: "sk-proj-" + _letters(r, 64, _ALPHANUMERIC + "_-") + "x",
        lambda r: "sk-ant-api03-" + _letters(r, 80, _ALPHANUMERIC + "_-") + "AA",
        lambda r: r.choice(["ghp_", "gho_", "ghs_"]) + _letters(r, 36),
        lambda r: "github_pat_" + _letters(r, 22) + "_" + _letters(r, 59),
        lambda r: "glpat-" + _letters(r, 20),
        lambda r: "AKIA" + _letters(r, 16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
        lambda r: "AIza" + _letters(r, 35),
        lambda r: "xoxb-" + _digits(r, 12) + "-" + _letters(r, 24),
        lambda r: "hf_" + _letters(r, 34),
        lambda r: "npm_" + _letters(r, 36),
        lambda r: r.choice(["sk_live_", "rk_test_"]) + _letters(r, 24),
        lambda r: f"SG.{_letters(r, 22)}.{_letters(r, 43)}",
        _jwt,
        _pem,
    ],
    "credentials": [_user_password],
}
SCHEMES = ("https", "http", "ftp", "postgres", "postgresql", "mysql", "mongodb+srv", "redis", "amqp", "ssh")
FRAMES = (
    "you can reach me at {} tomorrow",
    "{}",
    "it is {}, ok?",
    "my old one was ({}) I think",
    "write this down: {}.",
    "see {}\nthanks",
    "was sagst du zu {}?",
    "这是 {} 请记下",
    "请记下{}谢谢",
)
HARMLESS: list[Plant] = [
    lambda r: f"20{_digits(r, 2)}-0{r.randint(1, 9)}-1{_digits(r, 1)}",
    lambda r: f"{r.randint(1, 12)}/{r.randint(1, 28)}/20{_digits(r, 2)}",
    lambda r: f"{r.randint(10, 28)}.{r.randint(10, 12)}.20{_digits(r, 2)}",
    lambda r: f"version {r.randint(1, 9)}.{r.randint(0, 9)}.{r.randint(0, 9)}.{r.randint(0, 9)}",
    lambda r: f"order {_digits(r, 9)}",
    lambda r: f"{r.randint(1, 999)},{_digits(r, 3)},{_digits(r, 3)}.{_digits(r, 2)} dollars",
    lambda r: f"pi is 3.{_digits(r, 12)}",
    lambda r: f"{r.randint(10, 23)}:{r.randint(10, 59)}:{r.randint(10, 59)}",
    lambda r: f"lol @{_letters(r, 8)} you and me @ home.",
    lambda r: f"isbn 978-{_digits(r, 1)}-{_digits(r, 2)}-{_digits(r, 6)}-{_digits(r, 1)}",
    lambda r: f"scored {r.randint(10, 99)}-{r.randint(10, 99)} in {r.randint(1950, 2020)}-{_digits(r, 2)}",
    lambda r: f"std::vector<int>::iterator at ::{_letters(r, 5)}",
    lambda r: f"sha {_letters(r, 40, _HEX)}",
    lambda r: f"uuid {'-'.join(_letters(r, n, _HEX) for n in (8, 4, 4, 4, 12))}",
    lambda r: f"ask-me-anything-about-{_letters(r, 12).lower()}",
    lambda r: "localhost is 127.0.0.1 or ::1",
    lambda r: f"https://example.com/a:{_digits(r, 3)}/b@c",
    lambda r: f"https://example.com:{r.randint(1024, 9999)}/path?x={_digits(r, 6)}",
    lambda r: (
        f"from {r.randint(1900, 1999)} to {r.randint(2000, 2024)}, {r.randint(1, 9)} {_digits(r, 3)} {_digits(r, 3)} people"
    ),
    lambda r: f"MAC {':'.join(_letters(r, 2, _HEX) for _ in range(6))}",
    lambda r: f"parcel {_digits(r, 16)}",  # one in ten passes the checksum of cards
    lambda r: f"lottery {' '.join(f'{r.randint(1, 49):02d}' for _ in range(6))}",
    lambda r: f"at {r.randint(10, 80)}.{_digits(r, 4)}, {r.randint(10, 80)}.{_digits(r, 4)}",
    lambda r: f"base64 {_letters(r, 60, _ALPHANUMERIC + '+/')}==",
    lambda r: f"sk-learn-{_letters(r, 6).lower()} and hf_hub_download",
    lambda r: f"row {' '.join(_digits(r, 3) for _ in range(6))}",
    lambda r: f"@media (max-width: {_digits(r, 3)}px) and @user{_digits(r, 3)}",
]


def _mobile(rng: random.Random) -> str:
    number = "1" + rng.choice("3456789") + _digits(rng, 9)
    return rng.choice([number, number, _grouped(number, 3, 4, 4), _grouped(number, 3, 4, 4, by="-"), f"+86 {number}"])


def _id_card(rng: random.Random) -> str:
    region = rng.choice(("110101", "310115", "440305", "510107", "330106", "650102"))
    body = f"{region}{rng.randint(1950, 2009)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}{_digits(rng, 3)}"
    return next(body + check for check in "0123456789X" if id_card_is_valid(body + check))


def _bank_card(rng: random.Random) -> str:
    body = rng.choice(("622848", "621700", "622202", "436742")) + _digits(rng, rng.choice((9, 12)))
    number = body + next(d for d in string.digits if luhn(body + d))
    return rng.choice([number, _grouped(number, 4, 4, 4, len(number) - 12)])


def _address(rng: random.Random) -> str:
    place = rng.choice(
        ("浙江省杭州市西湖区", "北京市朝阳区", "上海市静安区", "成都市武侯区", "海淀区", "广东省深圳市南山区", "")
    )
    street = rng.choice(("文三路", "中山路", "长安街", "解放大道", "学院南路", "桂花巷"))
    flat = rng.choice(("", "3号楼2单元501室", "5栋1203室", "A座12层"))
    return f"{place}{street}{rng.randint(1, 999)}号{flat}"


def full_width(text: str) -> str:
    """ASCII signs as an input method in full-width mode writes them."""
    return "".join("　" if c == " " else chr(ord(c) + 0xFEE0) if c.isascii() else c for c in text)


CHINESE_PLANTS: dict[str, list[Plant]] = {
    "phone": [
        _mobile,
        _mobile,
        _mobile,
        lambda r: full_width(_mobile(r)),
        lambda r: f"0{r.choice(('10', '21', '28'))}{r.choice(('', '-', ' '))}{r.randint(2, 8)}{_digits(r, 7)}",
        lambda r: f"0{r.randint(310, 998)}-{r.randint(2, 8)}{_digits(r, 6)}",
        lambda r: f"09{_digits(r, 2)}-{_digits(r, 3)}-{_digits(r, 3)}",  # Taiwan
    ],
    "id": [_id_card, _id_card, lambda r: full_width(_id_card(r))],
    "card": [_bank_card, lambda r: full_width(_bank_card(r))],
    "email": [
        lambda r: f"{_digits(r, 9)}@qq.com",
        lambda r: f"{_letters(r, 8).lower()}＠{r.choice(('163', 'qq', 'sina'))}．com",
        lambda r: full_width(f"{_letters(r, 6)}@126.com"),
    ],
    "plate": [lambda r: f"{r.choice('京沪粤浙苏川')}{r.choice('ABCDEF')}{r.choice('ABCDEFGHJK')}{_digits(r, 4)}"],
    "address": [_address],
}
CHINESE_FRAMES = (
    "打我{}",
    "有事找我 {}",
    "{}，谢谢",
    "就是这个：{}。",
    "我的是{}",
    "收件人张三，{}，别写错",
    "王师傅 {}",
    "请记下{}谢谢",
    "（{}）发我一下",
    "是 {} 吗？",
)
CHINESE_HARMLESS: list[Plant] = [
    lambda r: f"订单号{_digits(r, 11)}",
    lambda r: f"快递单号：1{r.randint(3, 9)}{_digits(r, 9)}",
    lambda r: f"营收1{r.randint(3, 9)}{_digits(r, 9)}元",
    lambda r: f"20{_digits(r, 2)}年{r.randint(1, 12)}月{r.randint(1, 28)}日{r.randint(10, 23)}点",
    lambda r: f"20{_digits(r, 2)}-0{r.randint(1, 9)}-1{_digits(r, 1)} 1{_digits(r, 1)}:3{_digits(r, 1)}",
    lambda r: f"时间戳1{_digits(r, 12)}",
    lambda r: f"坐{r.randint(1, 20)}路公交到{r.randint(1, 9)}号线",
    lambda r: f"走到路口右转{r.randint(100, 900)}米",
    lambda r: f"我在{r.randint(1, 9)}号楼下等你",
    lambda r: f"房价{_digits(r, 5)}一平，首付{_digits(r, 7)}",
    lambda r: f"身高1{r.randint(50, 90)}，体重{r.randint(45, 90)}",
    lambda r: f"圆周率3.{_digits(r, 12)}",
    lambda r: f"成绩{r.randint(60, 99)}-{r.randint(60, 99)}",
    lambda r: f"版本{r.randint(1, 9)}.{r.randint(0, 9)}.{r.randint(0, 9)}.{r.randint(0, 9)}",
    lambda r: f"共{_digits(r, 8)}条记录",
    lambda r: f"群里有{_digits(r, 3)}人，QQ音乐{r.randint(10, 99)}首",
    lambda r: f"微信支付{_digits(r, 3)}元",
    lambda r: f"第{r.randint(1, 20)}条街{r.randint(1, 9)}号店",
    lambda r: "一二三四五六七八九十",
]


@dataclass(frozen=True, slots=True)
class Score:
    """Of one kind: planted, found as planted, and found in all."""

    planted: int
    right: int
    found: int

    @property
    def precision(self) -> float:
        """Share of the finds that are right."""
        return self.right / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """Share of the planted that is found."""
        return self.right / self.planted if self.planted else 1.0


def texts(per_kind: int, seed: int = 0, chinese: bool = False) -> Iterator[tuple[str, str | None, int, int]]:
    """(text, kind or None where harmless, start, end of the item), in a fixed order; a third of them harmless."""
    rng = random.Random(seed)
    plants, frames, harmless = (CHINESE_PLANTS, CHINESE_FRAMES, CHINESE_HARMLESS) if chinese else (PLANTS, FRAMES, HARMLESS)
    for kind, makers in plants.items():
        for k in range(per_kind):
            item = makers[k % len(makers)](rng)
            framed = f"{rng.choice(SCHEMES)}://{item}@db{_digits(rng, 1)}.example.com/x" if kind == "credentials" else item
            text = rng.choice(frames).format(framed)
            yield text, kind, text.index(item), text.index(item) + len(item)
    for k in range(per_kind * len(plants) // 2):
        yield rng.choice(frames).format(harmless[k % len(harmless)](rng)), None, 0, 0


def measure(per_kind: int = 1000, seed: int = 0, chinese: bool = False) -> dict[str, Score]:
    """Scores by kind, and under `all` their sum. chinese: of Chinese texts, with full-width forms among them."""
    planted, right, found = Counter[str](), Counter[str](), Counter[str]()
    for text, kind, start, end in texts(per_kind, seed, chinese):
        if kind is not None:
            planted[kind] += 1
        for finding in find(text):
            found[finding.kind] += 1
            right[finding.kind] += (finding.kind, finding.start, finding.end) == (kind, start, end)
    scores = {kind: Score(planted[kind], right[kind], found[kind]) for kind in (CHINESE_PLANTS if chinese else PLANTS)}
    return scores | {"all": Score(planted.total(), right.total(), found.total())}


def table(scores: dict[str, Score]) -> str:
    """Markdown."""
    lines = ["| kind | planted | precision | recall |", "|---|---|---|---|"]
    lines += [f"| {kind} | {s.planted:,} | {s.precision:.3f} | {s.recall:.3f} |" for kind, s in scores.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(measure()), "In Chinese texts:", table(measure(chinese=True)), sep="\n\n")
