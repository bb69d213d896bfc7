"""Real conversations rendered into every format and imported again are the same conversations."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatmill.config import ConfigError
from chatmill.data.cleaning.html_text import html_to_text
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.importers.registry import IMPORTERS, read_file, recognise, source_files
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import SourceSection

from .importer_formats import (
    DOCUMENT,
    FORMATS,
    START,
    fit_dialogue,
    real_dialogues,
    render_discord,
    render_openai,
    render_slack,
    said,
)


def turns_of(conversations: list[Conversation]) -> list[list[tuple[str, str]]]:
    return [[(turn.role, turn.content) for turn in c.turns] for c in conversations]


def import_all(path: Path, **options: Any) -> tuple[list[Conversation], Ledger]:
    ledger = Ledger()
    section = SourceSection(path=str(path), **options)
    found = [c for file in source_files(section) for c in read_file(file, section, ledger)]
    return found, ledger


TEXT = (
    st.text(st.sampled_from("ab Zé世🙂👩‍👩‍👧\n\"'<&>\\,;:/_*|{}#@!?.1290-=`"), min_size=1, max_size=30)
    .map(str.strip)
    .filter(bool)
)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_conversation_survives_its_rendering(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind, render, limits = FORMATS[name]
    real = data.draw(st.lists(st.sampled_from(range(len(real_dialogues()))), min_size=2, max_size=5, unique=True))
    dialogues = [fit_dialogue(real_dialogues()[k], limits) for k in real]
    for pairs in data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
        invented = data.draw(st.lists(TEXT, min_size=2 * pairs, max_size=2 * pairs))
        dialogues.append(fit_dialogue([f"x{text} y" for text in invented], limits))
    path = render(tmp_path_factory.mktemp("render"), dialogues)
    found, ledger = import_all(path)
    assert {recognise(file) for file in source_files(SourceSection(path=str(path)))} == {kind}
    expected = [[(("user", "assistant")[k % 2], text) for k, text in enumerate(d)] for d in dialogues]
    if DOCUMENT in limits:
        expected = [[("assistant", "\n\n".join(d))] for d in dialogues]
        assert all(c.is_document for c in found)
    assert turns_of(found) == expected
    assert not ledger.dropped
    assert len({c.uid for c in found}) == len(found)


def test_every_importer_is_rendered_above() -> None:
    # oasst_ranks makes pairs of replies, not dialogues: test_preference.py
    assert {kind for kind, _, _ in FORMATS.values()} == set(IMPORTERS) - {"oasst_ranks"}


def test_times_survive_where_the_format_has_them(tmp_path: Path) -> None:
    dialogues = [d[:4] for d in real_dialogues()[:3]]
    for name, resolution_s in (
        ("whatsapp ios", 1),
        ("whatsapp android us", 60),
        ("telegram", 1),
        ("discord", 1),
        ("irc znc", 1),
    ):
        _, render, limits = FORMATS[name]
        folder = tmp_path / name
        folder.mkdir()
        found, _ = import_all(render(folder, [fit_dialogue(d, limits) for d in dialogues]))
        for n, conversation in enumerate(found):
            times = [turn.time for turn in conversation.turns]
            for got, (_, _, at) in zip(times, said(dialogues[n], n), strict=True):
                assert got is not None and abs(got - at.timestamp()) < resolution_s, name


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zip"])
def test_compressed_files_are_read_as_they_are(tmp_path: Path, suffix: str) -> None:
    plain = render_openai(tmp_path, [["hello there", "good day"]])
    raw, packed = plain.read_bytes(), tmp_path / f"chats.jsonl.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            archive.write(plain, "inner/chats.jsonl")
    else:
        packed.write_bytes({"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[suffix](raw))
    found, _ = import_all(packed)
    assert turns_of(found) == [[("user", "hello there"), ("assistant", "good day")]]


def test_whatsapp_day_and_month_are_inferred_over_the_whole_file(tmp_path: Path) -> None:
    chat = tmp_path / "chat.txt"
    early = "3/4/20, 9:00 - Ann: one\n3/4/20, 9:01 - Bob: two\n"
    chat.write_text(early + "25/4/20, 9:00 - Ann: three\n25/4/20, 9:01 - Bob: four\n")
    assert [datetime.fromtimestamp(c.turns[0].time or 0, UTC).month for c in import_all(chat)[0]] == [4, 4]
    chat.write_text(early + "4/25/20, 9:00 - Ann: three\n4/25/20, 9:01 - Bob: four\n")
    assert [datetime.fromtimestamp(c.turns[0].time or 0, UTC).month for c in import_all(chat)[0]] == [3, 4]
    # No number above 12: time must run forwards. 1/2, 1/3, 2/1 as month/day.
    chat.write_text(
        "".join(f"{d}/20, 9:0{k} - {s}: t{d}\n" for d in ("1/2", "1/3", "2/1") for k, s in enumerate(("Ann", "Bob")))
    )
    assert [datetime.fromtimestamp(c.turns[0].time or 0, UTC).month for c in import_all(chat)[0]] == [1, 1, 2]
    chat.write_text(early)
    assert any("day first assumed" in reason for reason in import_all(chat)[1].changed)


def test_whatsapp_service_lines_media_and_continuations_are_told_apart(tmp_path: Path) -> None:
    chat = tmp_path / "chat.txt"
    chat.write_text(
        "12/05/21, 21:00 - Messages and calls are end-to-end encrypted. No one outside of this chat can read them.\n"
        "12/05/21, 21:01 - Ann: first line\nsecond: line\n\n12 eggs\n"
        "12/05/21, 21:02 - Bob: <Media omitted>\n13/05/21, 21:02 - Bob changed the subject\n"
        "13/05/21, 21:03 - Bob: IMG-1.jpg (file attached)\n12/05/21, 21:03 - Bob: fine\n"
    )
    found, ledger = import_all(chat)
    assert turns_of(found) == [[("user", "first line\nsecond: line\n\n12 eggs"), ("assistant", "fine")]]
    assert ledger.changed["media left out"] == 2 and ledger.changed["service line left out"] == 2


def test_rebuilding_follows_replies_then_threads_then_silences(tmp_path: Path) -> None:
    def message(number: int, author: str, minute: int, text: str, reply: int | None = None) -> dict[str, Any]:
        at = datetime.fromtimestamp(START + minute * 60, UTC).isoformat()
        entry = {
            "id": str(number),
            "type": "Default",
            "timestamp": at,
            "content": text,
            "author": {"id": author, "isBot": author == "bot"},
        }
        return entry | ({"type": "Reply", "reference": {"messageId": str(reply)}} if reply is not None else {})

    log = [
        message(1, "a", 0, "who knows pandas?"),
        message(2, "b", 1, "I do"),
        message(3, "c", 100, "lunch?"),
        message(4, "d", 101, "yes"),
        message(5, "a", 102, "how do I join?", reply=2),
        message(6, "bot", 103, "beep"),
        message(7, "b", 104, "df.merge", reply=5),
    ]
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"guild": {}, "channel": {}, "messages": log, "messageCount": 9}))
    found, ledger = import_all(path)
    assert turns_of(found) == [
        [("user", "who knows pandas?"), ("assistant", "I do"), ("user", "how do I join?"), ("assistant", "df.merge")],
        [("user", "lunch?"), ("assistant", "yes")],
    ]
    assert ledger.changed == {"bot left out": 1, "file announces another number of messages": 1}


MENTIONS = "<@U1> see <https://x.org|the page> &amp; <#C1|ops>"


def test_slack_threads_are_conversations_and_mentions_are_names(tmp_path: Path) -> None:
    root = render_slack(tmp_path, [])
    entries = [
        {"type": "message", "user": "U1", "ts": "1000.1", "text": "who is on call?", "thread_ts": "1000.1"},
        {"type": "message", "user": "U1", "ts": "1001.0", "text": "lunch"},
        {
            "type": "message",
            "user": "U2",
            "ts": "1002.0",
            "text": "<@U1> see <https://x.org|the page> &amp; <#C1|ops>",
            "thread_ts": "1000.1",
        },
        {"type": "message", "user": "U2", "ts": "1003.0", "text": "yes"},
        {"type": "message", "subtype": "channel_join", "user": "U2", "ts": "1004.0", "text": "joined"},
        {"type": "message", "bot_id": "B", "ts": "1005.0", "text": "build ok"},
    ]
    (root / "general" / "2021-01-01.json").write_text(json.dumps(entries))
    found, ledger = import_all(root)
    assert turns_of(found) == [
        [("user", "who is on call?"), ("assistant", "@Ann see the page & #ops")],
        [("user", "lunch"), ("assistant", "yes")],
    ]
    assert ledger.changed == {"channel_join left out": 1, "bot left out": 1}


def test_a_named_assistant_takes_the_role_whoever_speaks_first(tmp_path: Path) -> None:
    path = render_discord(tmp_path, [["hello", "good day", "how are you"]])
    assert [t.role for t in import_all(path, assistant="Ann")[0][0].turns] == ["assistant", "user", "assistant"]
    assert import_all(path, assistant="Zoe")[1].dropped == {"the assistant does not speak": 1}


def test_oasst_trunks_are_learned_once_and_best_replies_come_first(tmp_path: Path) -> None:
    def node(key: str, role: str, rank: int | None, *replies: dict[str, Any], deleted: bool = False) -> dict[str, Any]:
        return {"message_id": key, "text": key, "role": role, "rank": rank, "replies": list(replies), "deleted": deleted}

    tree = node(
        "q", "prompter", None,
        node("worse", "assistant", 1),
        node("best", "assistant", 0, node("more", "prompter", 0, node("a1", "assistant", 0), node("a2", "assistant", 1))),
        node("gone", "assistant", 2, deleted=True),
    )  # fmt: skip
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"message_tree_id": "q", "prompt": tree}))
    found, _ = import_all(path)
    assert [[(t.content, t.loss) for t in c.turns if t.role == "assistant"] for c in found] == [
        [("best", True), ("a1", True)], [("best", False), ("a2", True)], [("worse", True)],
    ]  # fmt: skip
    assert {c.meta["thread"] for c in found} == {"q"}
    flat: list[dict[str, Any]] = []

    def flatten(entry: dict[str, Any], parent: str | None) -> None:
        flat.append({k: v for k, v in entry.items() if k != "replies"} | {"parent_id": parent, "message_tree_id": "q"})
        for reply in entry["replies"]:
            flatten(reply, entry["message_id"])

    flatten(tree, None)
    path.write_text("\n".join(json.dumps(entry) for entry in flat))
    assert turns_of(import_all(path)[0]) == turns_of(found)


def test_openai_parts_weights_and_tools_are_understood(tmp_path: Path) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}], "weight": 0},
        {"role": "tool", "content": "42", "name": "f"},
        {"role": "assistant", "content": "done"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text(
        json.dumps({"messages": messages}) + "\nnot json\n[1]\n" + json.dumps({"messages": [{"role": "alien", "content": ""}]})
    )
    found, ledger = import_all(path)
    assert found[0].turns == (
        Turn("system", "be kind"),
        Turn("user", "hi"),
        Turn("assistant", '{"name": "f", "arguments": {}}', loss=False, calls=1),
        Turn("tool", "42", "f"),
        Turn("assistant", "done"),
    )
    assert ledger.dropped == {"not JSON": 1, "not a JSON object": 1, "bad message": 1}
    assert any(case.startswith("x.jsonl:2") for case in ledger.examples["not JSON"])


def test_documents_carry_no_roles_and_long_files_are_cut_at_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(("a line of a long book\n" * 100 + "\n") * 100)
    found, _ = import_all(tmp_path / "book.txt")
    assert len(found) == 3 and all(c.is_document for c in found)
    assert sum(c.turns[0].content.count("long book") for c in found) == 10_000
    (tmp_path / "pages.jsonl").write_text('{"text": "one page"}\n{"text": ""}\n')
    found, ledger = import_all(tmp_path / "pages.jsonl")
    assert [c.turns[0].content for c in found] == ["one page"] and ledger.dropped == {"no text": 1}


def test_csv_columns_are_mapped_or_the_error_names_them(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('frage,antwort\n"was, wie?","so\nund so"\nnur eins\nleer,\n')
    with pytest.raises(ConfigError, match=r"columns \['frage', 'antwort'\] have no usual names"):
        import_all(path)
    with pytest.raises(ConfigError, match="names"):
        import_all(path, columns={"prompt": "x", "reply": "antwort"})
    found, ledger = import_all(path, columns={"prompt": "frage", "reply": "antwort"})
    assert turns_of(found) == [[("user", "was, wie?"), ("assistant", "so\nund so")]]
    assert ledger.dropped == {"row with another number of cells": 1, "empty cell": 1}


def test_what_no_importer_knows_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match=r"x\.bin: format not recognised"):
        import_all(tmp_path / "x.bin")
    with pytest.raises(ConfigError, match=r"unknown\. Known: auto, "):
        import_all(tmp_path / "x.bin", format="nope")


@pytest.mark.parametrize("name", ["telegram", "discord", "chitchat", "stack exchange"])
def test_a_file_that_ends_early_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    path = FORMATS[name][1](tmp_path, [["hello", "good day", "how", "so"]])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=path.name):
        import_all(path)


def test_html_becomes_text_with_its_code() -> None:
    html = "<p>Use <code>x &lt; 1</code>:</p><pre><code>if a:\n    b()\n</code></pre>"
    html += "<ul><li>one</li><li>two</li></ul><script>bad()</script>"
    assert html_to_text(html) == "Use `x < 1`:\n\n```\nif a:\n    b()\n```\n\n- one\n- two"
    assert html_to_text("<blockquote><p>said</p><p>so</p></blockquote><p>no</p>") == "> said\n>\n> so\n\nno"
