"""One bad record never ends a build: it is dropped, counted and shown with its place. Files are hostile until read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation, Turn, dump_line, load_line
from chatmill.data.importers.plain import columnar
from chatmill.data.importers.registry import IMPORTERS, importer
from chatmill.data.samples.pair import merge_same_role

from .fuzz import fuzz, mutate_bytes, outcome
from .test_case_files import CASES, read, show

BAD_LINES = {
    "openai": [{"messages": "x"}, {"messages": [None]}, {"messages": [{"role": "user", "content": 5}]}, [1], "x",
               {"messages": [{"role": "assistant", "content": "", "tool_calls": "[{"}]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": None}]}, {"conversations": [{"from": {}, "value": "x"}]},
                 {"conversations": [{"from": "gpt", "value": "x", "weight": "heavy"}]}, None],
    "alpaca": [{"instruction": "x", "output": "y", "history": "[1"}, {"instruction": "x", "output": "y", "history": [["a"]]},
               {"instruction": None, "output": "y"}, {"instruction": "x", "output": "y", "system": 5}],
    "pairs": [{"query": "x", "response": 5}, {"prompt": [{"role": "alien", "content": "x"}], "completion": "y"}],
    "claude": [{"chat_messages": [{"sender": "human", "text": 5}]}, {"chat_messages": [None]}],
    "chatgpt": [{"mapping": {"a": {"parent": None, "message": 5, "children": 7}}, "current_node": []}, {"mapping": []}],
}  # fmt: skip
GOOD = {
    "openai": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "pairs": {"query": "q", "response": "a"},
    "claude": {"chat_messages": [{"sender": "human", "text": "q"}, {"sender": "assistant", "text": "a"}]},
    "chatgpt": {"mapping": {
        "u": {"parent": None, "message": {"author": {"role": "user"}, "content": {"parts": ["q"]}}},
        "a": {"parent": "u", "message": {"author": {"role": "assistant"}, "content": {"parts": ["a"]}}},
    }, "current_node": "a"},
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_record_is_dropped_counted_and_shown_with_its_line(kind: str, tmp_path: Path) -> None:
    lines = [GOOD[kind], *BAD_LINES[kind], "[" * 100_000, GOOD[kind]]
    text = "\n".join(line if isinstance(line, str) and line.startswith("[[") else json.dumps(line) for line in lines)
    (tmp_path / "x.jsonl").write_text(text)
    found, ledger = read(tmp_path / "x.jsonl", format=kind)
    assert [[show(turn) for turn in c.turns] for c in found] == [["u q", "a a"]] * 2
    assert ledger.dropped.total() == len(lines) - 2
    shown = [case for cases in ledger.examples.values() for case in cases]
    assert any(case.startswith("x.jsonl:2") for case in shown)


# Mutants in CI of formats whose exports are not read many at once, because all of a file is refused, or costs more.
ONE_BY_ONE = {"chitchat": 500, "corpora": 500, "mbox": 60, "stack_exchange": 300}


@pytest.mark.parametrize("kind", sorted(set(IMPORTERS) - {"parquet"}))
def test_mutated_exports_raise_nothing_but_the_named_error_and_lose_nothing(kind: str) -> None:
    wrong, mutants = fuzz(kind, ONE_BY_ONE.get(kind, 2000))
    assert not wrong and mutants >= ONE_BY_ONE.get(kind, 2000)


@pytest.mark.parametrize("kind", IMPORTERS)
def test_no_beginning_of_a_file_upsets_the_search_for_its_format(kind: str) -> None:
    module = importer(kind)
    heads = (
        b"", b"{", b"[", b"\xff\xfe", b"{}", b"[[]]", b"[1,2]", b'{"messages": 5}', b'[{"messages": {}}]', b"[" * 70_000,
        b'{"conversations": [5]}', b'{"prompt": 1, "responses": [{"rating": []}, {}]}', b"\x00" * 64, b'"', b"a,b\n\x00",
    )  # fmt: skip
    for head in heads:
        for name in ("x.json", "x.csv", "x.txt", "x.md", "x"):
            assert module.recognise(head, name) in (True, False)


def table(rows: int = 400) -> Any:
    return pyarrow.table({"prompt": [f"frage {k}" for k in range(rows)], "response": [f"答え {k}" for k in range(rows)]})


def test_columnar_files_are_read_in_a_process_of_their_own_that_may_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet.write_table(table(), tmp_path / "x.parquet")
    found, ledger = read(tmp_path / "x.parquet")
    assert len(found) == 400 and not ledger.dropped and found[7].turns[1].content == "答え 7"
    assert "pyarrow" not in imported_by("chatmill.data.importers.plain.parquet")
    # A process that dies amid its work, as one does that reads beyond its memory.
    dying = tmp_path / "dying.py"
    dying.write_text("import os, signal\nprint('{\"row\": {\"prompt\": \"a\", \"response\": \"b\"}}', flush=True)\n"
                     "print('{\"row\"', end='', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)\n")  # fmt: skip
    monkeypatch.setattr("chatmill.data.importers.plain.parquet.SCRIPT", dying)
    with pytest.raises(
        ConfigError, match=r"x\.parquet: damaged: the process that read it ended after 1 rows \(exit status -11\)"
    ):
        read(tmp_path / "x.parquet")


def imported_by(module: str) -> list[str]:
    code = f"import sys, {module}\nprint(*sys.modules)"
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path}
    )
    return done.stdout.split()


def test_mutated_columnar_files_are_read_or_refused_by_name(tmp_path: Path) -> None:
    import random

    rng = random.Random(5)
    parquet.write_table(table(30), tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "b.arrow", table(30).schema) as file:
        file.write_table(table(30))
    for name in ("a.parquet", "b.arrow"):
        raw = (tmp_path / name).read_bytes()
        for _ in range(6):
            (tmp_path / f"m-{name}").write_bytes(raw[:4] + mutate_bytes(raw[4:], rng))
            kept, ledger, refused = outcome(tmp_path / f"m-{name}", "parquet")
            assert refused.startswith(f"m-{name}: ") or kept + ledger.dropped.total() == 30


def test_cells_that_json_cannot_say_are_said_otherwise() -> None:
    assert columnar.plain(b"ab") == "ab" and columnar.plain(b"\xff") is None and columnar.plain(object).startswith("<class")


def test_loss_flags_tools_and_thoughts_are_carried_through() -> None:
    (found,), _ = read(CASES / "oai/tools.jsonl")
    call = found.turns[1]
    assert call.calls == 1 and call.said == "" and call.tool_calls == [{"name": "get_weather", "arguments": {"city": "北京"}}]
    assert found.turns[2].name == "get_weather" and found.meta["tools"][0]["function"]["name"] == "get_weather"
    (found,), _ = read(CASES / "sharegpt/tools.jsonl")
    assert [t.role for t in found.turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.turns[2].tool_calls == call.tool_calls and found.meta["tools"][0]["type"] == "function"
    for name in ("oai/reasoning.jsonl", "oai/thinking_part.jsonl"):
        (found,), ledger = read(CASES / name)
        assert found.turns[1].reasoning == "17*3=51" and found.turns[1].content == "等于 51，这是答案。" and not ledger.changed


def test_what_is_kept_beside_the_words_survives_joining() -> None:
    line = '{"name": "f", "arguments": {}}'
    turns = (
        Turn("user", "q"), Turn("assistant", "Let me see.", reasoning="hm"), Turn("assistant", line, calls=1),
        Turn("tool", "42"), Turn("assistant", line, calls=1), Turn("assistant", "It is 42.", reasoning="so"),
    )  # fmt: skip
    _, first, _, last = merge_same_role(turns)
    assert first.said == "Let me see." and first.tool_calls == [{"name": "f", "arguments": {}}] and first.reasoning == "hm"
    assert last.content == f"{line}\nIt is 42." and last.calls == 0 and last.reasoning == "so"
    conversation = Conversation("u", turns, "s", "o", {"tools": [{}]})
    assert load_line(dump_line(conversation)) == conversation


def test_calls_that_stand_in_texts_are_read_as_calls(tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    talk = [
        {"from": "human", "value": "q"}, {"from": "gpt", "value": f"Let me see.\n{call}\n{call}"},
        {"from": "tool", "value": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"},
        {"from": "gpt", "value": "It is 1; <tool_call> is a mark."},
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": talk, "tools": "[]"}]))
    (found,), ledger = read(tmp_path / "a.json")
    _, first, one, two, last = found.turns
    assert first.said == "Let me see." and first.tool_calls == [{"name": "f", "arguments": {"a": 1}}] * 2
    assert (one.content, two.content, last.calls, last.content) == ("1", "2", 0, talk[3]["value"])
    assert ledger.changed["call of a tool in the text of a reply read as a call"] == 2
