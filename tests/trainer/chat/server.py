"""A running server, what a test needs to talk to it, and the replies it must give."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from typing import Any

import pytest

from chatmill.trainer.chat.chat_model import ChatModel
from chatmill.trainer.generation.generation import Generation
from chatmill.trainer.generation.sampling import Sampling

pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from chatmill.trainer.chat.serve.batcher import Batcher
from chatmill.trainer.chat.serve.listening import make_server, open_sockets

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 12}

POST = "POST /v1/{} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Served:
    """A running server and what a test needs to talk to it."""

    def __init__(self, *batchers: Batcher, **options: Any) -> None:
        self.batcher = batchers[0]
        sockets = open_sockets("127.0.0.1", 0)
        self.port: int = sockets[0].getsockname()[1]
        self.server = make_server(*batchers, log_level="error", **options)
        self._thread = threading.Thread(target=self.server.run, args=(sockets,), daemon=True)
        self._thread.start()
        until = time.monotonic() + 300
        while not self.server.started:
            assert time.monotonic() < until
            time.sleep(0.01)

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join(300)
        assert not self._thread.is_alive()

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, http.client.HTTPResponse]:
        """(status, JSON or text, response)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3000)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, data, {**kind, **{k.replace("_", "-"): v for k, v in headers.items()}})
        response = connection.getresponse()
        raw = response.read().decode()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(raw) if is_json else raw, response

    def chat(self, **changes: Any) -> tuple[int, Any]:
        status, answer, _ = self.send("POST", "/v1/chat/completions", HELLO | changes)
        return status, answer

    def start_stream(self, **changes: Any) -> socket.socket:
        """An open connection whose reply has begun."""
        body = json.dumps(HELLO | {"stream": True, "max_tokens": 400} | changes).encode()
        head = f"{POST.format('chat/completions')}Content-Length: {len(body)}\r\n\r\n"
        link = socket.create_connection(("127.0.0.1", self.port), timeout=300)
        link.sendall(head.encode() + body)
        seen = b""
        while b"data:" not in seen:
            more = link.recv(4096)
            assert more, seen
            seen += more
        return link

    def wait_idle(self) -> None:
        until = time.monotonic() + 600
        while self.batcher.load != (0, 0):
            assert time.monotonic() < until, self.batcher.load
            time.sleep(0.02)


def expected(chat_model: ChatModel, content: str, new: int, *, seed: int | None = None, **knobs: Any) -> str:
    ids = chat_model.tokenizer.prompt_ids([{"role": "user", "content": content}])
    options: dict[str, Any] = {"stop_ids": chat_model.tokenizer.stop_ids, "sampling": Sampling(**knobs), "seed": seed}
    return chat_model.tokenizer.decode([s.id for s in Generation(chat_model.model, ids, max_new_tokens=new, **options)])


def events_of(text: str) -> list[Any]:
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]
