"""Small exports in every layout that people brought, and what must become of each (cases/; all of it invented)."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.importers.messengers.dated import looks_dated, seconds_of
from chatmill.data.importers.registry import read_file, recognise, source_files
from chatmill.data.ledger import Ledger
from chatmill.data.raw.files import RawFile
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
OPEN = ["u 你们几点开门？", "a 早上九点开门，欢迎光临。"]
INTRODUCED = ["u 你好，请介绍一下自己", "a- 第一个回答不好", "u 再说一次好吗", "a 我是助手，很高兴认识你。"]
WEATHER = [
    "u 北京今天多少度？", 'a {"name": "get_weather", "arguments": {"city": "北京"}}', 't {"temp": 21}', "a 今天北京 21 度。",
]  # fmt: skip
LCCC = [["u 我饿了", "a 去食堂吃吧", "u 好呀走"], ["u 明天会下雨吗", "a 天气预报说会"]]

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
    "gbk/qa.csv": ("csv", SLEEP),
    "alpaca/llamafactory.jsonl": (
        "alpaca",
        [["s 你是讲故事的人", "u 讲个故事", "a 从前有座庙。", "u 再讲一个", "a 有一天……从前有座山。"]],
    ),
    "claude/conversations.json": ("claude", [["u 法国的首都是哪里？", "a 巴黎。"]]),
    "more/alpaca_history_str.jsonl": (
        "alpaca",
        [["u 写一句问候的话给我", "a 祝您一切顺利！"], ["u 第二条正常的数据", "a 这一条应该保留下来。"]],
    ),
    "more/alpaca_input_null.jsonl": ("alpaca", [["u 写一句问候的话给我", "a 祝您一切顺利，天天开心！"]]),
    "more/anthropic.jsonl": ("openai", [["s 你是一名严谨的中文客服。", *OPEN]]),
    "more/gemini_tune.jsonl": ("openai", [["s 你是客服", *OPEN]]),
    "more/conversations.json": (
        "chatgpt",
        [["u 今年诺贝尔奖颁给了谁？", "a 今年的奖颁给了三位科学家。", "u 这张图里是什么？", "a 图里是一只猫。"]],
    ),
    "more/openai_toolcall_str.jsonl": (
        "openai",
        [["u 一加一等于几？请回答", 'a {"name": "add", "arguments": {}}'], ["u 第二条正常的数据", "a 这一条应该保留下来。"]],
    ),
    "more/openai_toolcalls_null.jsonl": ("openai", [["u 一加一等于几？请回答", "a 等于二，很简单的。"]]),
    "more/sharegpt_weight_null.jsonl": ("sharegpt", [OPEN]),
    "more/zh.mbox": (
        "mbox",
        [["u 李老师您好，请问报告什么时候交？", "a 下周五之前交就可以。", "u 好的，谢谢李老师！", "a 不客气。"]],
    ),
    "oai/loss_flag.jsonl": ("openai", [INTRODUCED]),
    "oai/loss_int.jsonl": ("openai", [INTRODUCED]),
    "oai/weight_null.jsonl": ("openai", [INTRODUCED]),
    "oai/prompt_completion.jsonl": ("pairs", [["u 天空为什么是蓝色的？", "a 因为瑞利散射。"]]),
    "oai/prompt_completion_chat.jsonl": ("pairs", [["u 天空为什么是蓝色的？", "a 因为瑞利散射。"]]),
    "oai/toplevel_array_lines.jsonl": ("openai", [["u 天空为什么是蓝色的？", "a 因为瑞利散射，蓝光散射得多。"]]),
    "oai/tool_last.jsonl": (
        "openai",
        [["u 北京今天多少度？", 'a 我查一下天气再告诉你\n{"name": "get_weather", "arguments": {"city": "北京"}}']],
    ),
    "oai/tools.jsonl": ("openai", [WEATHER]),
    "sharegpt/tools.jsonl": ("sharegpt", [["s 你是天气助手", *WEATHER]]),
    "sharegpt/gpt_first.jsonl": ("sharegpt", [["a 欢迎！我能帮您什么？", "u 我想订一张机票", "a 请问去哪里？"]]),
    "zhsets/belle35.jsonl": ("sharegpt", [["u 推荐一本书", "a 可以看看《三体》。"]]),
    "zhsets/belle_multi.jsonl": (
        "alpaca",
        [["u 推荐一本书", "a 可以看看《三体》。", "u 讲什么的？", "a 讲人类与三体文明的故事。"]],
    ),
    "zhsets/chatglm.jsonl": ("pairs", [["u 你好", "a 你好！", "u 长城有多长？", "a 两万多公里。"]]),
    "zhsets/crosswoz.jsonl": ("openai", [["u 想找家酒店", "a 请问价位？"]]),
    "zhsets/deepctrl.jsonl": ("alpaca", [["u 你好", "a 你好！", "u 写一句问候", "a 祝您一切顺利！"]]),
    "zhsets/firefly.jsonl": (
        "pairs",
        [["u 前提：猫在睡觉。问题：猫醒着吗？", "a 没有，猫在睡觉。"], ["u 写一句春天的诗", "a 春风又绿江南岸"]],
    ),
    "zhsets/kdconv.jsonl": ("utterances", [["u 看过这部电影吗", "a 看过，很好看", "u 谁演的", "a 记不清了"]]),
    "zhsets/lccc.json": ("utterances", LCCC),
    "zhsets/lccc.jsonl": ("utterances", LCCC),
    "zhsets/lccc_hf.jsonl": ("utterances", LCCC),
    "zhsets/minimind.json": ("openai", [["u 你好呀朋友", "a 你好！很高兴见到你"]]),
    "zhsets/moss.json": ("pairs", [["u 你好", "a 你好！", "u 再见", "a 再见！"]]),
    "zhsets/naturalconv.json": ("utterances", [["u 你好，在干嘛呢？", "a 在看新闻，你呢？", "u 我在看球赛。"]]),
    "zhsets/ptt.csv": ("csv", [["u 为什么要早睡", "a 因为熬夜伤身"], ["u 晚上吃什么", "a 我想吃火锅"]]),
    "zhsets/question_answer_zh.csv": ("csv", [["u 为什么要早睡", "a 因为熬夜伤身"], ["u 晚上吃什么", "a 我想吃火锅"]]),
    "zhsets/sharegpt_rolecontent.json": ("openai", [["u 你好", "a 你好！有什么可以帮您？"]]),
    "zhsets/swift_conv.jsonl": (
        "sharegpt",
        [["s 你是助手", "u 你好", "a 你好！有什么可以帮您？", "u 再见", "a 再见，祝您愉快！"]],
    ),
    "zhsets/swift_query.jsonl": (
        "pairs",
        [["s 你是助手", "u 你好", "a 你好！有什么可以帮您？", "u 中国的首都是哪里？", "a 北京。"]],
    ),
    "zhsets/xiaohuangji.conv": ("transcript", [["u 你在干什么", "a 在等你呀"], ["u 晚安", "a 好梦哦"]]),
    "zhsets/zhihu_kol.jsonl": ("pairs", [["u 怎么看待早睡早起？", "a 对身体好。"]]),
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


def test_a_table_without_a_header_is_read_by_numbers() -> None:
    for name in ("zhsets/qingyun.csv", "zhsets/tieba.tsv"):
        with pytest.raises(ConfigError, match="Where the first row is no header"):
            read(CASES / name)
        found, _ = read(CASES / name, columns={"prompt": "1", "reply": "2"})
        assert len(found) == 2 and all(len(c.turns) == 2 for c in found)
    assert [show(turn) for turn in found[0].turns] == ["u 今天心情不好", "a 怎么了说来听听"]


def test_a_bad_message_drops_its_dialogue_and_no_other() -> None:
    found, ledger = read(CASES / "more/openai_content_int.jsonl")
    assert [[show(turn) for turn in c.turns] for c in found] == [["u 第二条正常的数据", "a 这一条应该保留下来。"]]
    assert ledger.dropped == {"bad message": 1} and ledger.examples["bad message"][0].startswith("openai_content_int.jsonl:1")


def test_names_in_zips_of_chinese_windows_are_readable() -> None:
    (file,) = source_files(SourceSection(path=str(CASES / "win.zip")))
    assert file.label == "win.zip!与丽丽的 WhatsApp 聊天.txt"
    assert RawFile(Path("x.zip"), "Übung é.txt").label == "x.zip!Übung é.txt"
