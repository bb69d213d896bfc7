"""A conversation keeps its side and its uid, whatever its file is called and however often it is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.build_cases import chats, recipe, write_jsonl

from chatmill.data.check.verify import verify_dataset
from chatmill.data.conversation import Conversation, Turn, make_uid
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.samples.identity import identified, resolve
from chatmill.data.samples.split import in_words
from chatmill.data.shards.dialogues import read_dialogues
from chatmill.data.shards.manifest import read_manifest

DAYS = 60


def log(days: range, speaker: str = "小明") -> list[str]:
    """One conversation a day, three messages each."""
    lines = []
    for k in days:
        day = f"2023/{1 + k // 28}/{1 + k % 28}"
        lines += [
            f"{day} 09:10 - {speaker}: 第{k * 7919 % 1000}个快递什么时候能到，单号{k * 104729}",
            f"{day} 09:11 - 丽丽: 编号{k * 1299709}已经到了，放在{k}号门口",
            f"{day} 09:12 - {speaker}: 好的谢谢{k}",
        ]
    return lines


def build(folder: Path, files: dict[str, list[str]], out: Path, **over: Any) -> dict[str, tuple[str, str]]:
    """{what the first speaker says: (split, uid)} of the data set made from these files."""
    folder.mkdir()
    for name, lines in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    sources = [{"path": str(folder), "assistant": "丽丽"}]  # one that begins in the middle does not say who it is
    build_dataset(recipe(folder, split={"validation": 0.3}, sources=sources, **over), out)
    assert verify_dataset(out) == []
    found = {}
    for split in ("train", "validation"):
        for conversation in read_dialogues(out, read_manifest(out)["dialogues"][split]):
            found[conversation.turns[0].content] = (split, conversation.uid)
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("identity")
    return build(folder / "raw", {"_chat.txt": log(range(DAYS))}, folder / "out")


LATER: dict[str, Callable[[], dict[str, list[str]]]] = {
    "renamed": lambda: {"WhatsApp Chat 2024-02.txt": log(range(DAYS))},
    "longer": lambda: {"_chat.txt": [*log(range(DAYS)), "2023/3/4 09:13 - 丽丽: 不客气，明天见", *log(range(DAYS, DAYS + 9))]},
    "shortened": lambda: {"_chat.txt": log(range(DAYS))[31:]},
    "repeated": lambda: {"a/_chat.txt": log(range(DAYS)), "b/_chat.txt": log(range(DAYS - 5, DAYS + 5))},
    "beside another of the same name": lambda: {"a/_chat.txt": log(range(100, 130), "老王"), "b/_chat.txt": log(range(DAYS))},
}


@pytest.mark.parametrize("how", LATER)
def test_a_later_export_keeps_sides_and_uids(how: str, first: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    later = build(tmp_path / "raw", LATER[how](), tmp_path / "out")
    common = first.keys() & later.keys()
    assert len(common) >= DAYS - 11
    assert {text: later[text] for text in common} == {text: first[text] for text in common}


def talk(*contents: str, time: float | None = None, **meta: Any) -> Conversation:
    turns = tuple(Turn("assistant" if i % 2 else "user", c, time=time) for i, c in enumerate(contents))
    return Conversation(make_uid("s", "o"), turns, "s", "o", meta)


def test_identity_is_how_a_conversation_begins_and_when() -> None:
    short, long = identified(talk("在吗", "在", time=60.0)), identified(talk("在吗", "在\n怎么了", "没事", "哦", time=60.0))
    assert (short.uid, short.meta["thread"]) == (long.uid, long.meta["thread"])
    swapped = tuple(Turn("assistant", t.content, time=60.0) for t in short.turns)
    assert identified(Conversation(make_uid("x", "y"), swapped, "x", "y")).uid == short.uid  # whoever is the assistant now
    other_day = identified(talk("在吗", "在", time=90.0))
    assert other_day.uid != short.uid and other_day.meta["thread"] == short.meta["thread"]  # equal texts stay on one side
    assert identified(talk("在吗", "不在", time=60.0)).meta["thread"] != short.meta["thread"]
    assert identified(short) == short and identified(Conversation("kept", swapped, "x", "y")).uid == "kept"  # restored
    tree = [identified(talk("q", "a", end, thread="t")) for end in ("x", "y")]
    assert {c.meta["thread"] for c in tree} == {"t"} and tree[0].uid != tree[1].uid


def test_of_two_exports_of_one_conversation_the_longest_stays() -> None:
    uids = np.array(["a", "b", "a", "c", "c", "c"], dtype="S32")
    stays, copy = resolve(uids, np.array([9, 5, 12, 0, 0, 0]), np.array([True, True, True, True, False, True]))
    assert stays.tolist() == [False, True, True, True, False, True]  # c has no time: two people may begin alike
    assert copy.tolist() == [0, 0, 0, 0, 0, 1]


def test_people_who_begin_alike_get_uids_of_their_own(tmp_path: Path) -> None:
    records = chats(40)
    for record in records:
        record["messages"] = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello, what can I do for you?"},
            *record["messages"],
            {"role": "assistant", "content": f"so {record['messages'][0]['content']}"},
        ]
    records += chats(60, seed=1)
    build_dataset(recipe(write_jsonl(tmp_path / "raw.jsonl", records), split={"validation": 0.4}), tmp_path / "out")
    assert verify_dataset(tmp_path / "out") == []
    parts = read_manifest(tmp_path / "out")["dialogues"]
    found = [c for split in parts for c in read_dialogues(tmp_path / "out", parts[split])]
    assert sum(c.turns[0].content == "hi" for c in found) > 20 and len({c.uid for c in found}) == len(found)


def test_near_duplicates_are_looked_for_unless_the_recipe_says_no_and_then_the_certificate_says_so(tmp_path: Path) -> None:
    records = chats(60)
    long = " ".join(f"word{k}" for k in range(60))
    for k in range(40):  # one cluster of texts that differ in one word
        records.append(
            {"messages": [{"role": "user", "content": f"{k} {long}"}, {"role": "assistant", "content": f"{long} yes"}]}
        )
    raw = write_jsonl(tmp_path / "raw.jsonl", records)
    found = build_dataset(recipe(raw), tmp_path / "out")["certificate"]
    assert found["asked"][-1] == "near_duplicates" and found["shared"]["near_duplicates"] == 0
    assert found["not_asked"] == ["authors"]
    blind = build_dataset(recipe(raw, dedup={"near": None}), tmp_path / "blind")["certificate"]
    assert blind["not_asked"] == ["near_duplicates", "authors"] and "near_duplicates" not in blind["shared"]
    assert in_words(blind).endswith("; not kept apart: near duplicates, authors (0 shared)")
