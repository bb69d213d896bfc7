"""Small exports in every layout that people brought, and what must become of each (cases/; all of it invented)."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.importers.messengers.dated import looks_dated, seconds_of
from chatmill.data.importers.registry import read_file, recognise, source_files
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import SourceSection

CASES = Path(__file__).parent / "cases"

DINNER = ["u 今晚吃什么呀", "a 火锅怎么样？", "u 好啊！七点见", "a 不见不散"]
HIKE = ["u 周末去爬山吗？", "a 去呀，几点集合？", "u 早上八点，东门见\n记得带水", "a 好的没问题"]
HOME = ["u 到家了吗", "a 到了，今天好累"]
FILM = ["u 在吗？周末有空吗", "a 在的，怎么啦", "u 想约你看电影", "a 好呀！看什么"]
TIRED = ["u 今天上班好累啊", "a 辛苦了，早点休息"]
LIBRARY = ["u 你好，请问图书馆几点开门？", "a 早上八点半开门。", "u 周末也开吗？", "a 周末九点开门，晚上十点关门。"]
THANKS = ["u 谢谢你！", "a 不客气。"]
SLEEP = [["u 为什么要早睡", "a 因为熬夜伤身体不好"], ["u 晚上吃什么", "a 我想吃四川火锅啊"]]

# file -> (format, dialogues)
EXPECTED: dict[str, tuple[str, list[list[str]]]] = {
    "wa/zh-android-12h.txt": ("whatsapp", [DINNER]),
    "wa/zh-android-24h.txt": ("whatsapp", [DINNER]),
    "wa/zh-ios-12h.txt": ("whatsapp", [DINNER]),
    "wa/zh-ios-24h.txt": ("whatsapp", [DINNER]),
    "wa/zh-suffix.txt": ("whatsapp", [DINNER]),
    "wa/en-dotted.txt": ("whatsapp", [["u hola", "a hola, que tal"], ["u bien", "a me alegro mucho"]]),
    "wa/en-nnbsp.txt": ("whatsapp", [["u hi there", "a hello you"], ["u sup", "a not much at all"]]),
    "wa/ko.txt": ("kakaotalk", [["u 안녕", "a 응 안녕 잘 지냈어?", "u 그럼", "a 다행이다"]]),
    "win.zip": ("whatsapp", [["u 今晚吃什么呀", "a 火锅怎么样？我知道一家", "u 好啊", "a 七点见"]]),
    "qq/阿杰.txt": ("qq", [HIKE, HOME]),
    "qq_bom/阿杰.txt": ("qq", [HIKE, HOME]),
    "qq_gbk/阿杰.txt": ("qq", [HIKE, HOME]),
    "wechat/copied.txt": ("wechat", [["u 周末有空吗", "a 有空呀，怎么了？", "u 一起看电影吧", "a 好呀看哪部"]]),
    "wechat/memotrace.csv": ("wechat", [FILM, TIRED]),
    "wechat/memotrace.txt": ("wechat", [FILM, TIRED]),
    "wechat/weclone_0_9.csv": ("wechat", [FILM, TIRED]),
    "wechat/weflow.json": ("wechat", [FILM]),
    "zh/对话.txt": ("transcript", [LIBRARY + THANKS]),
    "zh/对话_ascii.txt": ("transcript", [LIBRARY + THANKS]),
    "zh/问答.txt": ("transcript", [LIBRARY]),
    "zh/问答_ascii.txt": ("transcript", [["a 欢迎光临，有什么可以帮您？", "u 请问图书馆几点开门？", *LIBRARY[1:]]]),
    "gbk/alpaca.json": ("alpaca", [["u 为什么要早睡觉呢", "a 因为熬夜伤身体不好"]]),
    "gbk/qa_en_header.csv": ("csv", SLEEP),
    "mixed/readme.md": ("documents", [["a # hi"]]),
    "slack": ("slack", [["u @丽丽 上线时间定了吗？", "a 定了，周五晚上 10 点 <别忘了备份>"]]),
    "tg/result.json": (
        "telegram",
        [["u 在吗？周末有空吗", "a 看这个 https://example.com/a 有空啊", "u 那周六见", "a 好的不见不散"]],
    ),
}


def show(turn: Turn) -> str:
    """`u hi`, `a hello`; a turn without loss as `a- hello`."""
    return f"{turn.role[0]}{'' if turn.loss else '-'} {turn.content}"


def read(path: Path, **options: object) -> tuple[list[Conversation], Ledger]:
    ledger = Ledger()
    section = SourceSection.model_validate({"path": str(path), **options})
    return [c for file in source_files(section) for c in read_file(file, section, ledger)], ledger


@pytest.mark.parametrize("name", EXPECTED)
def test_an_export_becomes_the_dialogues_that_stand_in_it(name: str) -> None:
    kind, dialogues = EXPECTED[name]
    assert [recognise(file) for file in source_files(SourceSection(path=str(CASES / name)))] == [kind]
    found, ledger = read(CASES / name)
    assert [[show(turn) for turn in c.turns] for c in found] == dialogues
    assert not ledger.dropped


@pytest.mark.parametrize(
    "text",
    [
        "会议记录\n2023-05-01 21:15 小明说了什么\n2023-05-01 21:16 丽丽说了什么\n2023-05-01 21:17 完\n",
        "Log of the day\n12.03.2021 10:11 | Ann | hello\n12.03.2021 10:12 | Bob | good day\n13.03.2021 10:12 | Ann | so\n",
        "[9:15 PM] hm\nAnn 2021/03/12 10:11\nhello\nBob 2021/03/12 10:12\ngood day\nAnn 2021/03/12 10:13\nso\n",
        "Chat\n10:11\tAnn\thello\n10:12\tBob\tgood day\n10:13\tAnn\tso\n",
    ],
)
def test_lines_with_dates_and_speakers_are_never_guessed_to_be_a_document(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="look like date and speaker"):
        read(tmp_path / "x.txt")
    assert read(tmp_path / "x.txt", format="documents")[0][0].is_document


def test_an_essay_with_dates_in_it_is_a_document() -> None:
    essay = "On 2023-05-01 it rained.\nAt 9:15 we left.\n\nThe year 2021 was long: it had many days.\n" * 20
    assert not looks_dated(essay.encode()) and not looks_dated(b"# 1.2.0 2023-05-01\n- fixed: x\n" * 20)


@pytest.mark.parametrize(
    ("first", "roles"),
    [("客服", "auau"), ("Support", "auau"), ("用户", "uaua"), ("小明", "uaua"), ("A", "uaua"), ("상담원", "auau")],
)
def test_the_assistant_follows_the_label_not_who_speaks_first(first: str, roles: str, tmp_path: Path) -> None:
    for layout in ("2023/5/1 21:1{k} - {name}: t{k}", "{name}：t{k}"):
        lines = [layout.format(k=k, name=(first, "丽丽")[k % 2]) for k in range(4)]
        (tmp_path / "chat.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (found,), _ = read(tmp_path / "chat.txt")
        assert "".join(turn.role[0] for turn in found.turns) == roles


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1728013321", 1728013321), ("1728013321000", 1728013321), (1728013321.5, 1728013321.5),
        ("2024-10-04T03:42:01Z", 1728013321), ("2024-10-04 03:42:01", 1728013321), ("2024/10/4 上午3:42:01", 1728013321),
        ("2024年10月4日 3:42", 1728013320), ("4.10.2024, 3:42", 1728013320), ("10/4/2024 3:42 AM", 1712720520),
        ("10/24/2024 3:42 PM", 1729784520), ("soon", None), ("", None), (None, None), (True, None), ("1e999", None),
        ("nan", None), ("99999-99-99 99:99", None),
    ],
)  # fmt: skip
def test_times_are_read_in_the_ways_that_tables_print_them(text: object, moment: float | None) -> None:
    assert seconds_of(text) == moment
