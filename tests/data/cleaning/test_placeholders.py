"""What chat clients write in place of a message is told from what people write."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from chatmill.data.cleaning import placeholders
from chatmill.data.cleaning.placeholders import placeholder


def test_every_text_of_the_list_is_known_with_marks_around_it() -> None:
    lists = yaml.safe_load(Path(placeholders.__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    assert set(lists) == {"media", "call", "deleted", "things"} and len(lists["deleted"]) > 90
    for kind in ("media", "call", "deleted"):
        for text in lists[kind]:
            assert placeholder(text) == placeholder(f"\u200e{text}.") == kind, text
    for thing in lists["things"]:
        assert placeholder(f"[{thing}]") == placeholder(f"【{thing}】") == "media", thing


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("<省略影音内容>", "media"), ("<Medien ausgeschlossen>", "media"), ("<Mediaa ei sisällytetty>", "media"),
        ("IMG-1.jpg (file attached)", "media"), ("报告.pdf (附件)", "media"), ("[图片][图片]", "media"),
        ("[链接: https://example.com]", "media"), ("사진 3장", "media"),
        ("Missed video call", "call"), ("Vastaamaton videopuhelu", "call"), ("通话时长 01:23", "call"),
        ("Voice call, 5 min", "call"), ("☎ 通話時間 1:23", "call"),
        ("这条消息已删除", "deleted"), ('"小红" 撤回了一条消息', "deleted"), ("你撤回了一条消息", "deleted"),
        ("小红收回了一則訊息", "deleted"), ("Ann recalled a message", "deleted"),
        ('"小红" 拍了拍 "我"', "notice"), ("以上是打招呼的内容", "notice"),
    ],
)  # fmt: skip
def test_clients_texts_are_known(text: str, kind: str) -> None:
    assert placeholder(text) == kind


@pytest.mark.parametrize(
    "text",
    [
        "hello", "[微笑]", "[捂脸][捂脸]", "<b>", "<3", "a < b and c > d", "语音通话质量不好", "看图片", "[链接] 看这个",
        "我撤回了我的话，你别生气", "see x.py (it works)", "He deleted this message", "未接", '<a href="x y">', "사진",
    ],
)  # fmt: skip
def test_what_people_write_stays(text: str) -> None:
    assert placeholder(text) is None
