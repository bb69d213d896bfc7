"""A broken element of a JSON array costs this element alone, and what cannot be found again is counted as lost."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from chatmill.data.ledger import Ledger
from chatmill.data.raw import json_text
from chatmill.data.raw.files import RawFile
from chatmill.data.raw.json_lines import json_lines
from chatmill.data.raw.json_text import JsonText


def record(n: int) -> dict[str, Any]:
    """A dialogue with text in it that looks like the end of an element."""
    return {
        "id": n,
        "messages": [{"role": "user", "content": f'say "}}, {{" {n}'}, {"role": "assistant", "content": "今天, [x]"}],
    }


BROKEN = {
    "a misspelt word": lambda text: text.replace('"id": ', '"id": tru', 1),
    "a quote too many": lambda text: text.replace("今天", '今"天', 1),
    "a quote too few": lambda text: text.replace('"assistant"', '"assistant', 1),
    "a bracket too few": lambda text: text.replace("}]}", "}", 1).replace("}\n    ]\n  }", "}\n  }", 1),
    "a bracket too many": lambda text: text.replace('"id"', '{"id"', 1),
    "a control character": lambda text: text.replace("今天", "今\x01天", 1),
    "nothing but its beginning": lambda text: text[:12],
}
LAYOUTS = {
    "one line": lambda parts: "[" + ", ".join(parts) + "]",
    "one line each": lambda parts: "[\n" + ",\n".join(parts) + "\n]",
    "indented": lambda parts: "[\n" + ",\n".join(parts) + "\n]\n",
}


def written(n: int, layout: str) -> str:
    """An element as it stands in an array of this layout."""
    if layout != "indented":
        return json.dumps(record(n), ensure_ascii=False)
    return "\n".join("  " + line for line in json.dumps(record(n), ensure_ascii=False, indent=2).split("\n"))


def read(path: Path) -> tuple[list[int], Ledger]:
    """(ids of the records, ledger) of a file."""
    ledger = Ledger()
    return [value.get("id", -1) for _, value in json_lines(RawFile(path), "utf-8", ledger)], ledger


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", BROKEN)
def test_the_elements_behind_a_broken_one_are_read(fault: str, layout: str, tmp_path: Path) -> None:
    parts = [written(n, layout) for n in range(9)]
    parts[3] = BROKEN[fault](parts[3])
    (tmp_path / "a.json").write_text(LAYOUTS[layout](parts), encoding="utf-8")
    found, ledger = read(tmp_path / "a.json")
    assert found == [0, 1, 2, 4, 5, 6, 7, 8] and ledger.dropped == {"not JSON": 1}
    assert ledger.examples["not JSON"][0].startswith("a.json: after element 3:")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_and_two_in_a_row_may_be_broken(layout: str, tmp_path: Path) -> None:
    parts = [written(n, layout) for n in range(9)]
    for n in (0, 4, 5, 8):
        parts[n] = BROKEN["a misspelt word"](parts[n])
    (tmp_path / "a.json").write_text(LAYOUTS[layout](parts), encoding="utf-8")
    found, ledger = read(tmp_path / "a.json")
    assert found == [1, 2, 3, 6, 7] and ledger.dropped == {"not JSON": 4}


def test_a_first_element_that_turns_texts_inside_out_hides_no_other(tmp_path: Path) -> None:
    parts = [BROKEN["a quote too few"](written(0, "one line")), *(written(n, "one line") for n in (1, 2))]
    (tmp_path / "a.json").write_text(LAYOUTS["one line"](parts), encoding="utf-8")
    found, ledger = read(tmp_path / "a.json")
    assert found == [1, 2] and ledger.dropped == {"not JSON": 1}


def test_what_is_not_found_again_is_counted_as_lost(tmp_path: Path) -> None:
    text = LAYOUTS["one line"]([written(n, "one line") for n in range(3)])
    (tmp_path / "a.json").write_text(text[:-30], encoding="utf-8")
    found, ledger = read(tmp_path / "a.json")
    left = len(text) - 30 - text.index('{"id": 2')
    assert found == [0, 1] and ledger.dropped == {"not JSON": 1}
    assert ledger.changed == {"characters of an array from what is not JSON to its end left out": left}


def test_pieces_of_any_size_are_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [written(n, "indented") for n in range(6)]
    parts[2] = BROKEN["a quote too few"](parts[2])
    for size in (7, 64, 10_000):
        monkeypatch.setattr(json_text, "_PIECE_CHARS", size)
        text, found = JsonText(io.StringIO(LAYOUTS["indented"](parts))), list[int]()
        assert text.peek() == "["
        text.position += 1
        while text.peek() != "]":
            try:
                found.append(text.value()["id"])
            except ValueError:
                assert text.resume(lambda value: isinstance(value, dict) and "id" in value, True)
        assert found == [0, 1, 3, 4, 5]
