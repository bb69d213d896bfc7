"""Objects of a JSON Lines file, or of JSON arrays, with the line or position each came from.

Lines are streamed; an array is decoded element by element from a sliding window, so memory holds one element, not the file.
A line or element that is itself a list of messages or of texts, `[{"role": …}, …]` or `["hi", "hello"]`, counts as the object
{"messages": […]} or {"dialog": […]}; any other list of objects stands for these. All of a file is read: several arrays behind
each other, objects behind an array, several values in a line, and objects that are printed over several lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from ..ledger import Ledger
from .files import RawFile
from .json_text import JsonText, TooLongError
from .limits import RECORD_CHARS, TOO_LONG, bounded_lines

Place = int | str  # a number from 1, or `3.2` for the second of several records there
_LINES_TRIED = 5
_DEPTH_TRIED = 3  # lists in lists
_FIRST_LINE_BYTES = 1 << 18
_SPEAKERS = ("role", "from", "sender", "speaker")


def json_lines(file: RawFile, encoding: str, ledger: Ledger) -> Iterator[tuple[Place, dict[str, Any]]]:
    """(line number from 1, object); for an array, (element number from 1, object). What is not an object is counted."""
    numbered = _arrays(file, encoding, ledger) if _is_array(file) else _lines(file.lines(encoding), file, ledger)
    for place, value in numbered:
        record = _as_object(value)
        if record is not None:
            yield place, record
        elif _is_list_of_records(value):
            for k, item in enumerate(value, 1):
                if (record := _as_object(item)) is not None:
                    yield f"{place}.{k}", record
                else:
                    ledger.drop("not a JSON object", f"{file.label}:{place}.{k}: {type(item).__name__}")
        else:
            ledger.drop("not a JSON object", f"{file.label}:{place}: {type(value).__name__}")


def _is_array(file: RawFile) -> bool:
    """Arrays rather than lines? A span was cut at line ends, so it is never an array."""
    if file.span is not None:
        return False
    with file.open() as raw:
        start = raw.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not start.startswith(b"["):
            return False
        first = start if b"\n" in start else start + raw.readline(_FIRST_LINE_BYTES)
    try:
        value = json.loads(first.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return True
    return not _is_dialogue(value)  # else each line is a dialogue


def _is_dialogue(value: Any) -> bool:
    """A list of messages or of texts."""
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(item, str) for item in value):
        return True
    return all(isinstance(item, dict) and any(key in item for key in _SPEAKERS) for item in value)


def _is_list_of_records(value: Any) -> bool:
    """A list of objects, none of which is a message, or of lists."""
    items = value if isinstance(value, list) else []
    if any(isinstance(item, dict) and any(key in item for key in _SPEAKERS) for item in items):
        return False
    return any(isinstance(item, dict | list) for item in items)


def _as_object(value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict):
        return value
    if _is_dialogue(value):
        return {"dialog": value} if isinstance(value[0], str) else {"messages": value}
    return None


def _lines(lines: Iterable[tuple[int, str | None]], file: RawFile, ledger: Ledger) -> Iterator[tuple[Place, Any]]:
    """The values of lines; one that opens an object or list and does not end is read on to the line that closes it."""
    held: list[str] = []
    first = size = 0

    def give_up(reason: object) -> None:
        ledger.drop("not JSON", f"{file.label}:{first}: {reason}", len(held))
        held.clear()

    for number, line in lines:
        if line is None:
            give_up("an object that does not end") if held else None
            ledger.drop(TOO_LONG, f"{file.label}:{number}")
        elif held and line[:1] not in ("{", "["):
            size += len(line)
            held.append(line)
            if size > RECORD_CHARS:
                give_up(TOO_LONG)
            elif line[:1] in ("}", "]"):
                text = "".join(held).rstrip().rstrip(",")
                held.clear()
                yield from _values(text, first, file, ledger)
        elif line.strip():
            if held:
                give_up("an object that does not end")
            try:
                yield number, json.loads(line)
            except RecursionError as error:
                ledger.drop("not JSON", f"{file.label}:{number}: {error}")
            except json.JSONDecodeError as error:
                if line[0] in "{[" and error.pos >= len(line.rstrip()):
                    held, first, size = [line], number, len(line)
                else:
                    yield from _values(line.strip(), number, file, ledger)
    if held:
        give_up("an object that does not end")


def _values(text: str, number: int, file: RawFile, ledger: Ledger) -> Iterator[tuple[Place, Any]]:
    """Several values behind each other; what is none ends them and is counted."""
    decoder, end, k = json.JSONDecoder(), 0, 0
    while end < len(text):
        k += 1
        try:
            value, end = decoder.raw_decode(text, end)
        except (ValueError, RecursionError) as error:
            ledger.drop("not JSON", f"{file.label}:{number}: {error}")
            return
        yield (number if k == 1 else f"{number}.{k}"), value
        while text[end : end + 1] in (" ", "\t", ",", "\r", "\n"):
            end += 1


def _arrays(file: RawFile, encoding: str, ledger: Ledger) -> Iterator[tuple[Place, Any]]:
    """The elements of an array, and of those behind it, numbered through; then the values of the lines behind them.

    A broken element is counted, and the next one is looked for by what the elements before have in common. Where none is found,
    the rest is counted as lost.
    """
    number, common = 0, set[str]()

    def fits(value: Any) -> bool:
        return common <= value.keys() if isinstance(value, dict) else _is_dialogue(value)

    with file.text(encoding) as stream:
        text = JsonText(stream)
        while text.peek() == "[":
            text.position += 1
            while (following := text.peek()) != "]":
                number += 1
                try:
                    value = text.value()
                except TooLongError:
                    ledger.drop(TOO_LONG, f"{file.label}:{number}")
                    text.skip_value()
                except ValueError as error:
                    reason = error if following else "the array does not end"
                    ledger.drop("not JSON", f"{file.label}: after element {number - 1}: {reason}")
                    if not text.resume(fits, bool(common)):
                        if left := text.rest():
                            lost = "characters of an array from what is not JSON to its end left out"
                            ledger.change(lost, f"{file.label}: after element {number - 1}", left)
                        return
                else:
                    if isinstance(value, dict):
                        common = common & value.keys() if common else set(value)
                    yield number, value
            text.position += 1
        yield from _lines(bounded_lines(text, number + 1), file, ledger)


@lru_cache(maxsize=2)  # every importer asks for it
def first_object(head: bytes) -> dict[str, Any] | None:
    """The first object of JSON lines or of an array, if the head contains it completely. Broken lines before it are skipped."""
    text = head.decode("utf-8-sig", "ignore").lstrip()
    decoder = json.JSONDecoder()
    for _ in range(_DEPTH_TRIED):
        if not text.startswith("["):
            break
        try:
            value, _ = decoder.raw_decode(text.split("\n")[0])
        except (ValueError, RecursionError):
            value = None
        if _is_dialogue(value):
            return _as_object(value)
        text = text[1:].lstrip()
    for start in (text, *text.split("\n")[1:_LINES_TRIED]):
        try:
            value, _ = decoder.raw_decode(start.lstrip())
        except RecursionError:
            return None
        except ValueError:
            if not start.lstrip().startswith("{"):
                return None
            continue
        return _as_object(value)
    return None
