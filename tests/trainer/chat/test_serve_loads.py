"""Forty mixed loads at once: slow headers, slow bodies, dropped connections, rubbish, and plain requests that must be right.

And a small run of the load that `python -m tests.trainer.chat.mixed_load` makes in full (docs/serving.md has its figures).
"""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chatmill.trainer.chat.chat_model import ChatModel

from .mixed_load import measure, tiny_checkpoint
from .server import HELLO, POST, Served, events_of, expected

SLOW, DROPPED = ("slow header", "slow body"), ("dropped header", "dropped body", "dropped stream")
KINDS = (*SLOW, *DROPPED, "rubbish", "whole", "stream", "text", "wait")


def sent_slowly(served: Served, data: bytes, pieces: int, rng: random.Random) -> bytes:
    """The answer to bytes that arrive bit by bit."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=300) as link:
        size = -(-len(data) // pieces)
        for at in range(0, len(data), size):
            link.sendall(data[at : at + size])
            time.sleep(rng.random() * 0.02)
        answer = b""
        while more := link.recv(65536):
            answer += more
        return answer


def test_forty_mixed_loads_leave_every_whole_request_right(served: Served, chat_model: ChatModel) -> None:
    questions = [f"hello {k}" for k in range(4)]
    truth = {question: expected(chat_model, question, 8) for question in questions}

    def load(number: int) -> str:
        kind, rng = KINDS[number % len(KINDS)], random.Random(number)
        question = rng.choice(questions)
        body = HELLO | {"messages": [{"role": "user", "content": question}], "max_tokens": 8}
        data = json.dumps(body).encode()
        head = f"{POST.format('chat/completions')}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
        if kind in SLOW:
            early = head if kind == "slow body" else b""
            raw = sent_slowly(served, early + (data if early else head + data), 25, rng)
            assert raw.startswith(b"HTTP/1.1 200")
            assert json.loads(raw[raw.index(b"\r\n\r\n") + 4 :])["choices"][0]["message"]["content"] == truth[question]
        elif kind in ("dropped header", "dropped body"):
            part = head + data if kind == "dropped body" else head
            with socket.create_connection(("127.0.0.1", served.port), timeout=300) as link:
                link.sendall(part[: rng.randrange(1, len(part))])
        elif kind == "dropped stream":
            served.start_stream(messages=body["messages"]).close()
        elif kind == "rubbish":
            junk = rng.choice([rng.randbytes(300), b"GET /\r\n\r\n", b"\x16\x03\x01" * 40])
            with socket.create_connection(("127.0.0.1", served.port), timeout=300) as link:
                link.sendall(junk + b"\r\n\r\n")
                assert b" 500 " not in link.recv(65536)
        elif kind == "stream":
            _, text, _ = served.send("POST", "/v1/chat/completions", body | {"stream": True})
            assert "".join(e["choices"][0]["delta"].get("content", "") for e in events_of(text)) == truth[question]
        elif kind == "text":
            status, answer, _ = served.send("POST", "/v1/completions", {"prompt": question, "max_tokens": 3, "n": 2})
            assert status == 200 and len(answer["choices"]) == 2
        else:
            time.sleep(rng.random() * 0.2 if kind == "wait" else 0)
            _, answer, _ = served.send("POST", "/v1/chat/completions", body)
            assert answer["choices"][0]["message"]["content"] == truth[question]
        return kind

    with ThreadPoolExecutor(40) as pool:
        done = list(pool.map(load, range(40)))
    assert [done.count(kind) for kind in KINDS] == [4] * len(KINDS)
    served.wait_idle()
    assert served.batcher.counts.failed == 0
    assert served.chat()[1]["choices"][0]["message"]["content"] == expected(chat_model, "hello", 12)


def test_hostile_clients_hold_up_nobody_and_leave_nothing_behind(tmp_path: Path) -> None:
    """24 places for 40 clients. The server may work for a second between two tokens; busy machines may take five for it."""
    checkpoint, log = tiny_checkpoint(tmp_path / "tiny"), tmp_path / "log"
    found = measure(checkpoint, log, rounds=1, clients=40, seconds=3.0, open_files=160, tokens=40)
    assert not found.problems(gap_s=5.0), log.read_text()
    assert sum(found.answers.values()) == 40, found.answers
