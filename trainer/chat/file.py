"""Replies to every line of a JSONL file: `chatmill generate CHECKPOINT --file prompts.jsonl --out replies.jsonl`.

A line is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}; whatever else it holds is copied.
Line n (from 0) gets its reply with seed + n, so any part can be repeated. `out` appears when all lines are done, in their
order; until then finished replies are kept beside it, and the same command continues where it was stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from chatmill.config import ConfigError
from chatmill.files import naming, replace_text
from chatmill.progress import LongWork

from ..generation.prompt import Prompt, bad_text, check_text, fit_messages
from ..generation.replies import replies_to_many
from .chat_model import load_chat_model
from .settings import Settings, grammar_of

Messages = list[dict[str, str]]


def generate_file(
    checkpoint: str | Path,
    prompts: str | Path,
    out: str | Path,
    *,
    system: str | None = None,
    batch: int = 8,
    quiet: bool = False,
    **settings: Any,
) -> int:
    """Reply to each line of a JSONL file, `batch` at a time; the prompts are checked before anything loads."""
    Settings(**settings)  # refuses before anything loads
    check_text(system or "", "--system")
    target = Path(out)
    if batch < 1:
        raise ConfigError(f"--batch {batch}: expected at least 1.")
    rows = list(read_prompts(Path(prompts), system))
    if not rows:
        raise ConfigError(f"{prompts}: no prompts in it.")
    with LongWork(["load", "replies"], quiet) as show:
        show("load", 0, 1)
        chat = load_chat_model(checkpoint)
        start = Settings.of(chat, settings)
        target.parent.mkdir(parents=True, exist_ok=True)
        manifest = (chat.path / "manifest.json").read_text(encoding="utf-8")
        made_from = json.dumps((str(start), [messages for _, messages in rows], manifest)).encode("utf-8", "surrogatepass")
        kept = Kept(target, hashlib.sha256(made_from).hexdigest())
        left = [number for number in range(len(rows)) if number not in kept.done]
        if kept.done and left:
            show.say(f"{len(kept.done)} of {len(rows)} replies are done already")
        context, grammar = chat.model.config.context, grammar_of(chat, start)
        asked = [
            Prompt(
                fit_messages(chat.tokenizer, rows[number][1], context, start.max_new_tokens)[0],
                start.max_new_tokens,
                start.sampling,
                None if start.seed is None else start.seed + number,
                start.stop,
                grammar,
            )
            for number in left
        ]
        with kept:
            show("replies", len(kept.done), len(rows))
            for index, reply in replies_to_many(chat.model, chat.tokenizer, asked, batch=batch):
                found = {"reply": reply.text, "finish_reason": reply.finish_reason, "tokens": reply.tokens}
                kept.add(left[index], found)
                show("replies", len(kept.done), len(rows))
        kept.publish([rows[number][0] | kept.done[number] for number in range(len(rows))])
    return 0


class Kept:
    """The replies made so far, in a hidden file beside `target`; those of other prompts, settings or weights do not count."""

    def __init__(self, target: Path, key: str) -> None:
        self.target, self._key = target, key
        self.path = target.with_name(f".{target.name}.progress")
        self.done: dict[int, dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return
        if not lines or lines[0] != self._key:
            return
        for line in lines[1:]:
            try:
                number, found = json.loads(line)
            except ValueError:  # the last line of a killed process
                continue
            self.done[number] = found

    def __enter__(self) -> Self:
        """Rewrite the file with the valid lines: a line cut short would spoil the next one."""
        kept = [self._key, *(json.dumps([number, found]) for number, found in self.done.items())]
        with naming(self.path):
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self.path):
            self._file.close()

    def add(self, number: int, found: dict[str, Any]) -> None:
        """Keep one reply."""
        self.done[number] = found
        with naming(self.path):
            self._file.write(json.dumps([number, found]) + "\n")
            self._file.flush()

    def publish(self, rows: list[Mapping[str, Any]]) -> None:
        """Write all replies to the target and remove the progress file."""
        replace_text(self.target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.path.unlink(missing_ok=True)


def read_prompts(path: Path, system: str | None = None) -> Iterator[tuple[dict[str, Any], list[dict[str, str]]]]:
    """(the line's object, its messages) of a prompts file; ConfigError names the invalid line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut inside a text: at U+2028, for example
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            place = bad_text(row)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}:{number}: not JSON ({error}).") from None
        if place is not None:
            raise ConfigError(f"{path}:{number}: {place}: not valid Unicode: it holds half of a character (a lone surrogate).")
        messages = row.get("messages") if isinstance(row, dict) else None
        if isinstance(row, dict) and isinstance(row.get("prompt"), str):
            messages = [{"role": "user", "content": row["prompt"]}]
        if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
            raise ConfigError(f'{path}:{number}: expected {{"prompt": "..."}} or {{"messages": [{{"role", "content"}}, ...]}}.')
        lead = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
        yield row, lead + [{"role": m["role"], "content": m["content"]} for m in messages]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
