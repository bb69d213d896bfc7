"""Rows of tables and JSON objects become the dialogues that they are rows of, wherever they stand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from chatmill.config import ConfigError

from .test_case_files import read, show


def write_csv(path: Path, names: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
    return path


def shown(path: Path, **options: Any) -> list[list[str]]:
    return [[show(turn) for turn in c.turns] for c in read(path, **options)[0]]


def test_rows_of_a_conversation_that_are_not_adjacent_stay_one_conversation(tmp_path: Path) -> None:
    rows = [[1, "user", "a"], [2, "user", "x"], [1, "assistant", "b"], [2, "assistant", "y"], [1, "user", "c"]]
    path = write_csv(tmp_path / "t.csv", ["conversation_id", "role", "content"], rows)
    assert shown(path) == [["u a", "a b", "u c"], ["u x", "a y"]]


def test_times_put_rows_in_order(tmp_path: Path) -> None:
    rows = [
        ["k", "Bob", "b", "2023/5/1 下午9:16"],
        ["k", "Ann", "a", "2023/5/1 下午9:15"],
        ["k", "Ann", "c", "2023/5/1 下午9:17"],
    ]
    path = write_csv(tmp_path / "t.csv", ["conversation", "sender", "content", "time"], rows)
    assert shown(path) == [["u a", "a b", "u c"]]
    rows[1][3] = "long ago"  # not all have a time: the order of the rows
    assert shown(write_csv(path, ["conversation", "sender", "content", "time"], rows)) == [["u b", "a a\nc"]]


@pytest.mark.parametrize("unit", [1, 1000])
def test_a_chat_log_in_a_table_is_cut_at_silences(unit: int, tmp_path: Path) -> None:
    """60 chats of WeChat in one table, as epoch seconds or milliseconds, are 60 dialogues."""
    rows = [
        [("小红", "我")[k % 2], f"第{n}次第{k}句", (1_700_000_000 + n * 86_400 + k * 60) * unit]
        for n in range(60)
        for k in range(4)
    ]
    path = write_csv(tmp_path / "t.csv", ["who", "said", "at"], rows)
    columns = {"sender": "who", "content": "said", "time": "at"}
    found = shown(path, columns=columns)
    assert len(found) == 60 and all(len(turns) == 4 for turns in found)
    assert len(shown(path, columns=columns, gap_minutes=2_000)) == 1
    # A conversation that the table names stays whole, unless the recipe asks for cuts.
    named = write_csv(tmp_path / "n.csv", ["talker", "who", "said", "at"], [["room", *row] for row in rows])
    assert len(shown(named, columns={"conversation": "talker", **columns})) == 1
    assert len(shown(named, columns={"conversation": "talker", **columns}, gap_minutes=30)) == 60


def test_columns_are_for_json_lines_and_parquet_as_for_csv(tmp_path: Path) -> None:
    rows = [{"frage": "was?", "antwort": "das", "n": {"tief": "wer?"}}, {"frage": "", "antwort": "leer", "n": {}}]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    write_csv(tmp_path / "x.csv", ["frage", "antwort"], [["was?", "das"], ["", "leer"]])
    for name in ("x.jsonl", "x.json", "x.parquet", "x.csv"):
        found, ledger = read(tmp_path / name, columns={"prompt": "frage", "reply": "antwort"})
        assert [[show(turn) for turn in c.turns] for c in found] == [["u was?", "a das"]], name
        assert ledger.dropped == {"empty cell": 1}
    for name in ("x.jsonl", "x.parquet"):
        assert shown(tmp_path / name, columns={"prompt": "n.tief", "reply": "antwort"}) == [["u wer?", "a das"]]
        assert shown(tmp_path / name, columns={"text": "antwort"}) == [["a das"], ["a leer"]]


def test_a_column_may_hold_the_messages_of_a_dialogue(tmp_path: Path) -> None:
    talk = [{"wer": "kunde", "was": "hallo"}, {"wer": "berater", "was": "guten tag"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"log": {"turns": talk}, "alle": ["a", "b", "c"], "regel": "sei nett"}))
    columns = {"messages": "log.turns", "sender": "wer", "content": "was", "system": "regel"}
    assert shown(tmp_path / "x.jsonl", columns=columns) == [["s sei nett", "u hallo", "a guten tag"]]
    assert shown(tmp_path / "x.jsonl", columns=columns, assistant="kunde") == [["s sei nett", "a hallo", "u guten tag"]]
    assert shown(tmp_path / "x.jsonl", columns={"messages": "alle"}) == [["u a", "a b", "u c"]]


def test_a_map_that_makes_no_dialogue_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "b"}')
    for columns, message in (({"prompt": "a"}, "expected prompt and reply"), ({"who": "a"}, "known fields")):
        with pytest.raises(ConfigError, match=message):
            read(tmp_path / "x.jsonl", columns=columns)


def test_what_belongs_to_a_prompt_is_not_lost(tmp_path: Path) -> None:
    row = {"instruction": "summarise", "context": "a long text", "response": "short", "category": "x"}
    (tmp_path / "dolly.jsonl").write_text(json.dumps(row))
    write_csv(tmp_path / "dolly.csv", list(row), [list(row.values())])
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "dolly.parquet")
    for name in ("dolly.jsonl", "dolly.csv", "dolly.parquet"):
        assert shown(tmp_path / name) == [["u summarise\n\na long text", "a short"]], name
    write_csv(tmp_path / "a.csv", ["instruction", "input", "output"], [["do", "this", "done"], ["do", "", "done"]])
    assert shown(tmp_path / "a.csv") == [["u do\n\nthis", "a done"], ["u do", "a done"]]
