"""Invented raw chats of any size in several formats, for benchmarks. Constant memory; the same seed, the same bytes.

    write_mix(Path("/tmp/raw"), megabytes=1024)      -> folder with openai, sharegpt, alpaca, csv, whatsapp and document files

The texts are sentences over a Zipf vocabulary of made-up words; a twentieth of the conversations repeat earlier ones, some
carry e-mail addresses, HTML, code and emoji, so that every rule of cleaning has something to do.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

FILE_BYTES = 32 << 20
SYLLABLES = "ba ce di fo gu ka le mi no pu ra se ti vo xu ya ze lo ne ri sta tre mon ken dal pro".split()  # noqa: SIM905
EXTRAS = (
    "Write to ann.lee@example.org or call +44 20 7946 0958.",
    "<p>See <b>this</b> page &amp; tell me.</p>",
    "```python\nfor i in range(3):\n    print(i)\n```",
    "That is great 🙂👍",
    "Naïve café, déjà vu; 你好，世界。",
)
Chat = list[str]  # texts in turn, the user's first


class Chats:
    """An endless source of conversations."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        words = sorted({"".join(self._random.choices(SYLLABLES, k=self._random.randint(1, 4))) for _ in range(60_000)})
        chances = 1 / (10 + np.arange(len(words)))
        self._random.shuffle(words)
        rng = np.random.default_rng(seed)
        picks = rng.choice(len(words), size=(20_000, 12), p=chances / chances.sum()).tolist()
        lengths = rng.integers(4, 13, 20_000).tolist()
        self._sentences = [
            " ".join(words[w] for w in row[:n]).capitalize() + "." for row, n in zip(picks, lengths, strict=True)
        ]
        self._earlier: list[Chat] = []

    def next(self, turns: int | None = None) -> Chat:
        """turns: how many (None: 2 to 10, even)."""
        draw = self._random
        if turns is None and self._earlier and draw.random() < 0.05:
            return draw.choice(self._earlier)
        chat = [" ".join(draw.choices(self._sentences, k=draw.randint(1, 6))) for _ in range(turns or 2 * draw.randint(1, 5))]
        if draw.random() < 0.1:
            chat[-1] += "\n" + draw.choice(EXTRAS)
        if turns is None:
            if len(self._earlier) < 1000:
                self._earlier.append(chat)
            else:
                self._earlier[draw.randrange(1000)] = chat
        return chat


def _openai(chats: Chats, number: int) -> str:
    messages = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(chats.next())]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def _sharegpt(chats: Chats, number: int) -> str:
    turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(chats.next())]
    return json.dumps({"id": f"s{number}", "conversations": turns}, ensure_ascii=False) + "\n"


def _alpaca(chats: Chats, number: int) -> str:
    question, answer = chats.next(2)
    return json.dumps({"instruction": question, "input": "", "output": answer}, ensure_ascii=False) + "\n"


def _documents(chats: Chats, number: int) -> str:
    return json.dumps({"text": "\n\n".join(chats.next())}, ensure_ascii=False) + "\n"


def _csv(chats: Chats, number: int) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(chats.next(2) if number else ("prompt", "response"))
    return line.getvalue()


def _whatsapp(chats: Chats, number: int) -> str:
    begin = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(hours=2 * number)
    lines = []
    for k, text in enumerate(chats.next()):
        when = begin + datetime.timedelta(minutes=k)
        lines.append(f"{when:%d/%m/%Y, %H:%M} - {('Ann Lee', 'Bob')[k % 2]}: {text}\n")
    return "".join(lines)


# name, record, share of the bytes
FORMATS: tuple[tuple[str, Callable[[Chats, int], str], float], ...] = (
    ("openai-{}.jsonl", _openai, 0.3),
    ("openai-{}.jsonl.gz", _openai, 0.1),
    ("sharegpt-{}.jsonl", _sharegpt, 0.2),
    ("alpaca-{}.jsonl", _alpaca, 0.1),
    ("documents-{}.jsonl", _documents, 0.1),
    ("tickets-{}.csv", _csv, 0.1),
    ("WhatsApp Chat with Bob-{}.txt", _whatsapp, 0.1),
)


def write_mix(folder: Path, megabytes: float, seed: int = 0) -> Path:
    """Files of at most FILE_BYTES each, `megabytes` MiB of uncompressed text altogether."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, (name, record, share) in enumerate(FORMATS):
        left, number, part = int(share * megabytes * (1 << 20)), 0, 0
        chats = Chats(seed + kind)
        while left > 0:
            path = folder / name.format(f"{part:04d}")
            size = 0
            with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as file:
                number = 0 if path.suffix == ".csv" else number
                while size < min(left, FILE_BYTES):
                    size += file.write(record(chats, number).encode())
                    number += 1
            left, part = left - size, part + 1
    return folder
