"""A server that is open to others: every promise of SECURITY.md about it (promise 3) is a test here or in the mixed load."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from chatmill.config import ConfigError
from chatmill.trainer.chat.chat_model import ChatModel
from chatmill.trainer.chat.serve.run import serve

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from chatmill.trainer.chat.serve import bodies, connections, listening
from chatmill.trainer.chat.serve.app import Limits
from chatmill.trainer.chat.serve.batcher import Batcher
from chatmill.trainer.chat.serve.bounded_log import PER_MINUTE, Bounded
from chatmill.trainer.chat.serve.errors import RequestError
from chatmill.trainer.chat.serve.jobs import Job
from chatmill.trainer.chat.serve.protocol import ChatRequest, TextRequest, parse
from chatmill.trainer.generation.prefix_store import WORTHWHILE, is_out_of_memory
from chatmill.trainer.generation.sampling import Sampling

from .server import HELLO, POST, Served, expected

SHORT = Limits(max_connections=6, max_body_bytes=200_000, head_timeout_s=0.6, body_timeout_s=0.6, send_timeout_s=0.6)


@pytest.fixture(scope="module")
def short(chat_model: ChatModel) -> Iterator[Served]:
    """A server with few places and short times."""
    server = Served(Batcher(chat_model, max_active=4, max_waiting=300), limits=SHORT)
    yield server
    server.close()


@contextlib.contextmanager
def held(chat_model: ChatModel) -> Iterator[None]:
    """No reply goes on inside, for 20 s at most."""
    go_on, forward = threading.Event(), chat_model.model.cached_logits
    chat_model.model.cached_logits = lambda *a, **k: (go_on.wait(20), go_on.set(), forward(*a, **k))[2]  # type: ignore[method-assign]
    try:
        yield
    finally:
        go_on.set()
        del chat_model.model.cached_logits


def connect(server: Served, data: bytes = b"") -> socket.socket:
    link = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    link.sendall(data)
    return link


def seconds_until_closed(link: socket.socket, drip: bytes = b"") -> tuple[float, bytes]:
    """(seconds, what came) until the server closes; until then drip is sent every 0.1 s."""
    start, came = time.monotonic(), b""
    link.settimeout(0.1)
    while time.monotonic() - start < 30:
        try:
            if drip:
                link.sendall(drip)
            more = link.recv(1 << 16)
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return time.monotonic() - start, came
        if not more:
            return time.monotonic() - start, came
        came += more
        if drip:
            time.sleep(0.05)
    raise AssertionError(f"still open after 30 s: {came[:200]!r}")


HEAD = POST.format("chat/completions")


@pytest.mark.parametrize(
    ("first", "drip"),
    [
        (b"", b""),  # half-open
        (b"GET /health HTTP/1.1\r\n", b"X: y\r\n"),  # a header that never ends
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET", b"T"),  # the same after an answer
        ((HEAD + "Content-Length: 9000\r\n\r\n").encode(), b" "),  # a body that never ends
        (b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n", b" "),  # one that nobody wants
    ],
)
def test_a_request_that_never_ends_arriving_is_closed(short: Served, first: bytes, drip: bytes) -> None:
    took, came = seconds_until_closed(connect(short, first), drip)
    assert took < 0.6 + connections.GRACE_S + 5
    if b"9000" in first and b"nothing" not in first:
        assert b" 408 " in came and b"did not arrive within" in came
    elif b"\r\n\r\n" not in first:
        assert not came and took > 0.3


def test_an_answer_that_nobody_reads_is_dropped(short: Served) -> None:
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    link.connect(("127.0.0.1", short.port))
    link.settimeout(0.2)
    with contextlib.suppress(TimeoutError, ConnectionError):
        while True:  # answers of 12 kB each, until the server takes no more
            link.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
    wait_for(lambda: not short.server.server_state.connections)
    link.close()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_half_open_connections_shut_nobody_out(chat_model: ChatModel) -> None:
    """Ten times as many as there are places, before their time is over: the ones that have waited longest make room."""
    server = Served(Batcher(chat_model), limits=Limits(max_connections=6, head_timeout_s=600))
    try:
        links = [connect(server, b"POST" * (k % 2)) for k in range(60)]
        for _ in range(3):
            status, answer = server.chat()
            assert status == 200 and answer["choices"][0]["message"]["content"] == expected(chat_model, "hello", 12)
        wait_for(lambda: len(server.server.server_state.connections) <= 6 + connections.KEPT)
        assert len(server.server.server_state.connections) > connections.KEPT
        for link in links:
            link.close()
    finally:
        server.close()


def test_with_all_places_taken_there_is_a_plain_refusal_and_health_answers(short: Served, chat_model: ChatModel) -> None:
    with held(chat_model):
        streams = [short.start_stream() for _ in range(SHORT.max_connections)]
        started = time.monotonic()
        for _ in range(connections.KEPT + 2):
            status, answer, response = short.send("POST", "/v1/chat/completions", HELLO)
            assert (status, answer["error"]["code"]) == (503, "overloaded") and response.headers["Retry-After"]
            assert response.headers["Connection"] == "close"
            assert short.send("GET", "/health")[0] == 200
        assert time.monotonic() - started < 20
        for stream in streams:
            stream.close()
    short.wait_idle()
    wait_for(lambda: short.chat()[0] == 200)


def test_a_slow_body_gives_its_place_up_when_there_is_no_other(chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SLOW_BODY_S", 60)
    server = Served(Batcher(chat_model), limits=Limits(max_connections=2))
    try:
        links = [connect(server, (HEAD + "Content-Length: 9000\r\n\r\n").encode()) for _ in range(2)]
        wait_for(lambda: server.server.config.http.door.busy == 2)  # type: ignore[union-attr]
        assert server.chat()[0] == 503
        monkeypatch.setattr(connections, "SLOW_BODY_S", 0)
        assert server.chat()[0] == 200
        for link in links:
            link.close()
    finally:
        server.close()


def test_large_bodies_together_hold_a_limited_amount(chat_model: ChatModel) -> None:
    """8 times 200 kB: of 12 bodies that lack their last byte four find no room, and a small one does."""
    server = Served(Batcher(chat_model), limits=Limits(max_body_bytes=200_000))
    body = json.dumps(HELLO | {"messages": [{"role": "user", "content": "a" * 199_000}]}).encode()
    head = f"{HEAD}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    try:
        links = [connect(server, head + body[:-1]) for _ in range(12)]
        wait_for(lambda: server.server._service._bodies._held > (bodies.HELD - 1) * 199_000)
        assert server.chat()[0] == 200
        time.sleep(0.3)
        assert server.server._service._bodies._held <= bodies.HELD * 200_000
        answers = []
        for link in links:
            link.sendall(body[-1:])
            answers.append(link.recv(4096)[9:12])
            link.close()
        assert sorted(set(answers)) == [b"400", b"503"] and answers.count(b"400") <= bodies.HELD, answers
        assert server.chat()[0] == 200 and server.server._service._bodies._held == 0
    finally:
        server.close()


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [[]] * 300_000},
        {"prompt": [1] * 100_000 + ["a"]},
        {"prompt": "a", "logit_bias": {str(k): 1 for k in range(60_000)}},
        {"prompt": "a", "response_format": {str(k): 1 for k in range(60_000)}},
    ],
)
def test_a_body_of_too_many_values_is_refused_before_they_cost_much(body: Any) -> None:
    """One of 2 MB made a million errors in pydantic: 74 s during which nobody got a token, and 2 GB."""
    data = json.dumps(body).encode()
    started = time.thread_time()
    with pytest.raises(RequestError, match="more than 50,000 values"):
        bodies.parse_json(data)
    assert time.thread_time() - started < 2


def test_many_values_that_are_right_are_read_and_of_wrong_ones_the_first_is_told() -> None:
    text = json.dumps("[{" * 60_000 + '\\"')
    asked = parse(TextRequest, bodies.parse_json(f'{{"prompt": {text}}}'.encode()))
    assert asked.prompt_bytes == 120_002  # brackets in a text are no lists
    assert len(parse(TextRequest, bodies.parse_json(json.dumps({"prompt": [1] * 600_000}).encode())).given[0]) == 600_000
    messages = [{"role": "user", "content": "a"}] * 9_999
    assert parse(ChatRequest, bodies.parse_json(json.dumps({"messages": messages}).encode())).prompt_bytes == 9_999
    for kind, wrong in (
        (TextRequest, {"prompt": [1] * 40_000 + ["a"]}),
        (TextRequest, {"prompt": [[1]] * 20_000 + ["a"]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 40_000}]}),
        (ChatRequest, {"messages": [{"role": "x", "content": 5}] * 9_000}),
        (TextRequest, {"prompt": "a", "stop": [1] * 40_000}),
        (TextRequest, {"prompt": "a", "stop_token_ids": ["a"] * 40_000}),
        (TextRequest, {"prompt": "a", "logit_bias": {str(k): "a" for k in range(40_000)}}),
    ):
        with pytest.raises(RequestError) as refused:
            parse(kind, wrong)
        problems = refused.value.__context__
        assert isinstance(problems, ValidationError) and problems.error_count() <= 4, kind


def test_a_small_request_does_not_wait_for_large_ones(short: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    prepare = type(short.server._service)._prepare

    def slow(self: Any, kind: Any, body: bytes) -> Any:
        if len(body) > bodies.SMALL:
            go_on.wait(60)
        return prepare(self, kind, body)

    monkeypatch.setattr(type(short.server._service), "_prepare", slow)
    large = HELLO | {"messages": [{"role": "user", "content": "a" * 100_000}]}
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(short.send, "POST", "/v1/chat/completions", large) for _ in range(3)]
        try:
            assert short.chat()[0] == 200
            assert not any(one.done() for one in waiting)
        finally:
            go_on.set()
        assert [one.result()[0] for one in waiting] == [400] * 3


def test_the_end_is_told_to_everyone_at_once(chat_model: ChatModel) -> None:
    """A stream, a whole reply and a body that has not arrived, while a step takes very long."""
    server = Served(Batcher(chat_model, max_active=1))
    with held(chat_model), ThreadPoolExecutor(2) as pool:
        stream, body = server.start_stream(), connect(server, (HEAD + "Content-Length: 9000\r\n\r\n").encode())
        whole = pool.submit(server.chat)
        wait_for(lambda: server.batcher.load == (1, 1))
        started = time.monotonic()
        server.server.should_exit = True
        text = b""
        while more := stream.recv(4096):
            text += more
        told = json.loads(text.decode().rpartition("data: {")[2].partition("\n\n")[0].join(("{", "")))
        assert told["error"]["code"] == "shutting_down" and text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        status, answer = whole.result(60)
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert b" 503 " in body.recv(4096)
        assert time.monotonic() - started < 3, "the step in progress is not waited for"
        server.close()
        assert time.monotonic() - started < listening.EXIT_S
    with pytest.raises(ConnectionRefusedError):
        connect(server)


def test_a_taken_port_is_found_before_the_model_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of 127.0.0.1 is taken .* --port"):
            serve("no/such/checkpoint", port=port)
    with pytest.raises(ConfigError, match="no/such/checkpoint"):  # and the port is free again
        serve("no/such/checkpoint", port=port)
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("host", "port", "number", "word"),
    [
        ("nowhere.invalid", 0, None, "not known"),
        ("192.0.2.1", 0, errno.EADDRNOTAVAIL, "no address 192.0.2.1"),
        ("127.0.0.1", 80, errno.EACCES, "from 1024 on"),
    ],
)
def test_an_address_that_cannot_be_opened_is_named(
    host: str, port: int, number: int | None, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        assert number is not None
        raise OSError(number, "refused")

    if number is not None:
        monkeypatch.setattr(listening.Listener, "bind", refuse)
    with pytest.raises(ConfigError, match=word):
        listening.open_sockets(host, port)


def test_localhost_is_opened_on_all_its_addresses_with_one_port() -> None:
    found = listening.open_sockets("localhost", 0)
    names = {entry[4][0] for entry in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    assert {opened.getsockname()[1] for opened in found} == {found[0].getsockname()[1]}
    assert {opened.getsockname()[0] for opened in found} <= names
    for opened in found:
        opened.close()


def test_connections_fit_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = {"now": (256, 256)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.update(now=new))
    assert listening.most_connections(512) == 256 - connections.KEPT - listening.RESERVE
    limits["now"] = (256, 4096)
    assert listening.most_connections(512) == 512 and limits["now"][1] == 4096
    limits["now"] = (64, 64)
    with pytest.raises(ConfigError, match="ulimit -n"):
        listening.most_connections(512)


def test_a_flood_of_one_message_is_counted_not_written() -> None:
    now = [0.0]
    bound, written = Bounded(lambda: now[0]), list[str]()

    def log(text: str, *values: Any, error: Exception | None = None) -> None:
        info = None if error is None else (type(error), error, None)
        record = logging.LogRecord("asyncio", logging.ERROR, "", 0, text, values, info)
        if bound.filter(record):
            written.append(record.getMessage())

    for k in range(3000):
        log("socket.accept() out of system resource\nsocket: %d", k)
        log("failed\n", error=ValueError())
    log("failed\n", error=KeyError())
    log("something else")
    assert len(written) == 2 * PER_MINUTE + 2
    now[0] = 61.0
    log("socket.accept() out of system resource\nsocket: %d", 7)
    assert written[-1].endswith(f"socket: 7 ({3000 - PER_MINUTE:,} more like the last ones were not written)")
    for k in range(1000):
        log(f"a text of its own: {k}")
    assert len(written) < 150


BAD = [
    {"temperature": 1e-300},
    {"temperature": 1e300},
    {"top_p": 1e-320},
    {"repetition_penalty": 0.0},
    {"logit_bias": {"99999999": 1}},
    {"logit_bias": {str(k): -100 for k in range(300)}},
    {"min_p": 1.0, "top_k": 1, "temperature": 100},
    {"stop_token_ids": [-5]},
    {"seed": -(2**63)},
    {"min_tokens": 10**30},
]


def kept_and_told(server: Served) -> tuple[int, str]:
    """(reused tokens, reply) of a conversation of which a server remembers the beginning."""
    before = server.batcher.counts.reused_tokens
    text = server.chat(messages=[{"role": "user", "content": "hello there, how are you? I am fine. " * 6}])[1]
    return server.batcher.counts.reused_tokens - before, text["choices"][0]["message"]["content"]


def test_a_bad_value_or_a_failing_step_clears_nobody_elses_cache(short: Served) -> None:
    kept_and_told(short)
    reused, truth = kept_and_told(short)
    assert reused >= WORTHWHILE
    for changes in BAD:
        status, _ = short.chat(**changes)
        assert status in (200, 400), changes
    for error in (ValueError("in a step"), RuntimeError("probability tensor contains either inf or nan")):
        seen = list[Any]()
        job = Job([5, 6, 7], 5, seen.append, Sampling(), logprobs=1)

        def fail(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        job.grammar = type("Failing", (), {"allowed": fail, "accept": fail, "copy": lambda self: self})()  # type: ignore[assignment]
        stream = short.start_stream(max_tokens=60)
        short.batcher.submit(job)
        wait_for(lambda: bool(seen))  # noqa: B023
        assert seen[0].kind == "error" and str(error) in seen[0].message
        text = b""
        while b"[DONE]" not in text:
            text += stream.recv(4096)
        assert b'"error"' not in text
        stream.close()
    assert kept_and_told(short) == (reused, truth)


def test_short_memory_is_recognised_on_every_device() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:115] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
        ),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("probability tensor contains either inf or nan"))
    assert not is_out_of_memory(ValueError("allocate memory"))


def test_impossible_limits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1 for max_active, max_waiting and max_connections"):
        serve(tmp_path, max_connections=0)
