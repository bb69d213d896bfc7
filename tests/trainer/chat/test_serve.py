"""The server over real sockets: protocol, limits, disconnects, concurrency; the official client; the page in Chromium."""

from __future__ import annotations

import copy
import http.client
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from chatmill.config import ConfigError
from chatmill.data.tokenizer.plain import PlainText
from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.trainer.chat.chat_model import ChatModel
from chatmill.trainer.chat.serve.run import check_address
from chatmill.trainer.generation.generation import Generation
from chatmill.trainer.generation.prompt import most_bytes
from chatmill.trainer.generation.sampling import Sampling

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from chatmill.trainer.chat.serve.app import Limits
from chatmill.trainer.chat.serve.batcher import Batcher

from .server import HELLO, POST, Served, events_of, expected


def test_a_reply_is_what_generation_gives(served: Served, chat_model: ChatModel) -> None:
    status, answer = served.chat()
    assert status == 200
    choice = answer["choices"][0]
    assert choice["message"]["content"] == expected(chat_model, "hello", 12)
    assert choice["finish_reason"] in ("stop", "length")
    prompt = len(chat_model.tokenizer.prompt_ids(HELLO["messages"]))
    assert answer["usage"]["prompt_tokens"] == prompt
    assert answer["usage"]["total_tokens"] == prompt + answer["usage"]["completion_tokens"] <= prompt + 12


def test_a_stream_carries_the_same_reply_in_pieces(served: Served, chat_model: ChatModel) -> None:
    body = HELLO | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 40}
    status, text, response = served.send("POST", "/v1/chat/completions", body)
    assert status == 200 and response.headers.get_content_type() == "text/event-stream"
    events = events_of(text)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    pieces = [e["choices"][0]["delta"].get("content", "") for e in events if e["choices"]]
    assert "".join(pieces) == expected(chat_model, "hello", 40)
    assert len(pieces) > 5
    assert events[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] > 5
    assert len({e["id"] for e in events}) == 1


def test_an_echo_scores_the_prompt_as_a_full_forward_pass_does(served: Served, chat_model: ChatModel) -> None:
    texts = ["hello there", "how are you? I am fine."]
    prompts = [chat_model.tokenizer.encode(text) for text in texts]
    for given in (texts, prompts):
        body = {"model": "tiny", "prompt": given, "echo": True, "logprobs": 2, "max_tokens": 1, "temperature": 0}
        status, answer, _ = served.send("POST", "/v1/completions", body)
        assert status == 200
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        for ids, text, choice in zip(prompts, texts, answer["choices"], strict=True):
            told = choice["logprobs"]
            with torch.no_grad():
                logits = chat_model.model(
                    torch.tensor(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)
                )
            truth = logits.log_softmax(-1)
            best = truth.max(-1)
            scored = [*ids[1:], int(best.indices[-1])]
            assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
            assert told["token_logprobs"][1:] == pytest.approx([float(truth[t, i]) for t, i in enumerate(scored)], abs=1e-4)
            assert [max(top.values()) for top in told["top_logprobs"][1:]] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert told["tokens"] == [chat_model.tokenizer.decode([i]) for i in (*ids, scored[-1])]
            assert choice["text"].startswith(text)
            assert [choice["text"][at:].startswith(t) for at, t in zip(told["text_offset"], told["tokens"], strict=True)][:-1]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_an_echo_ends_with_the_stop_token_and_may_generate_nothing(served: Served, chat_model: ChatModel) -> None:
    ids = chat_model.tokenizer.encode("hello there")
    following = int(next(Generation(chat_model.model, ids, max_new_tokens=1)).id)
    stopping = replace(chat_model, tokenizer=copy.copy(chat_model.tokenizer))
    stopping.tokenizer.stop_ids = frozenset({following})
    server = Served(Batcher(stopping))
    try:
        body = {"model": "tiny", "prompt": ids, "echo": True, "logprobs": 1, "temperature": 0}
        _, answer, _ = server.send("POST", "/v1/completions", body | {"max_tokens": 3})
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["text"] == "hello there"
        assert len(choice["logprobs"]["tokens"]) == len(ids) + 1  # what lm-evaluation-harness cuts off at the end
        assert answer["usage"]["completion_tokens"] == 0
        _, answer, _ = server.send("POST", "/v1/completions", body | {"max_tokens": 0})
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(ids)
        assert answer["choices"][0]["text"] == "hello there"
    finally:
        server.close()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"max_tokens": 0}, "only with echo"),
        ({"stream": True, "echo": True}, "stream"),
        ({"stream": True, "prompt": ["a", "b"]}, "several prompts"),
        ({"prompt": ["a"] * 65}, "at most 64"),
        ({"prompt": ["a", ""]}, "empty"),
        ({"prompt": [[1], [999]]}, "999"),
        ({"prompt": [1, "a"]}, "prompt"),
    ],
)
def test_an_impossible_plain_completion_is_refused(served: Served, changes: dict[str, Any], word: str) -> None:
    status, answer, _ = served.send("POST", "/v1/completions", {"model": "tiny", "prompt": "a"} | changes)
    assert status == 400
    assert word in answer["error"]["message"]


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    served: Served, chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """context 512, longest token below 20 bytes: 11,000 bytes cannot fit, whatever they say."""
    most = most_bytes(chat_model.tokenizer, 512)
    assert 512 * 4 <= most <= 512 * 20

    def tokenise(*_: object) -> list[int]:
        raise AssertionError("was tokenised")

    monkeypatch.setattr(ChatTokenizer, "prompt_ids", tokenise)
    monkeypatch.setattr(PlainText, "encode", tokenise)
    text = "是" * (most // 3 + 1)
    messages = [{"role": "user", "content": text[:100]}, {"role": "user", "content": [{"type": "text", "text": text[100:]}]}]
    for path, changes in (("chat/completions", {"messages": messages}), ("completions", {"prompt": ["a", text]})):
        status, answer, _ = served.send("POST", f"/v1/{path}", {"model": "tiny"} | changes)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        assert f"context is 512 tokens, which no text of more than {most:,} bytes fits" in answer["error"]["message"]


def test_the_longest_text_that_fits_is_not_refused(chat_model: ChatModel) -> None:
    tokenizer = chat_model.tokenizer
    longest = max(tokenizer.ids() - set(tokenizer.special.values()), key=lambda i: len(tokenizer.token(i)))
    text = tokenizer.decode([longest]) * 512
    assert len(tokenizer.encode(text)) <= 512 and len(text.encode()) <= most_bytes(tokenizer, 512)


def test_the_same_seed_gives_the_same_sampled_reply(served: Served, chat_model: ChatModel) -> None:
    knobs = {"temperature": 1.2, "top_p": 0.9, "top_k": 50, "seed": 11}
    first, again, other = (served.chat(**knobs | {"seed": s})[1]["choices"][0]["message"]["content"] for s in (11, 11, 12))
    assert first == again != other
    assert first == expected(chat_model, "hello", 12, **knobs)


def test_several_replies_to_one_request_are_those_of_consecutive_seeds(served: Served, chat_model: ChatModel) -> None:
    knobs = {"temperature": 1.5, "max_tokens": 10}
    alone = [served.chat(seed=7 + k, **knobs)[1] for k in range(3)]
    texts = [answer["choices"][0]["message"]["content"] for answer in alone]
    assert len(set(texts)) == 3
    status, answer = served.chat(seed=7, n=3, **knobs)
    assert status == 200 and [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in answer["choices"]] == texts
    assert answer["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]  # counted once
    assert answer["usage"]["completion_tokens"] == sum(one["usage"]["completion_tokens"] for one in alone)
    told = {"stream": True, "stream_options": {"include_usage": True}}
    events = events_of(served.chat(seed=7, n=3, **knobs, **told)[1])
    assert events[-1]["usage"] == answer["usage"] and events[-1]["choices"] == []
    streamed, ends = ["", "", ""], [0, 0, 0]
    for choice in (event["choices"][0] for event in events[:-1]):
        assert not ends[choice["index"]]  # nothing of a reply comes after its end
        streamed[choice["index"]] += choice["delta"].get("content", "")
        ends[choice["index"]] += choice["finish_reason"] is not None
    assert streamed == texts and ends == [1, 1, 1]
    body = {"prompt": ["hello there", "how are"], "n": 2, "seed": 7, "temperature": 1.5, "max_tokens": 6, "echo": True}
    status, plain, _ = served.send("POST", "/v1/completions", body)
    starts = [choice["text"][:7] for choice in plain["choices"]]
    assert status == 200 and starts == ["hello t", "hello t", "how are", "how are"]
    assert plain["choices"][0]["text"] != plain["choices"][1]["text"]


def test_a_stop_string_ends_the_reply_before_it(served: Served, chat_model: ChatModel) -> None:
    whole = expected(chat_model, "hello", 40)
    stop = whole[6:9]
    _, answer = served.chat(stop=[stop], max_tokens=40)
    assert answer["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_logprobs_are_those_of_generation(served: Served, chat_model: ChatModel) -> None:
    _, answer = served.chat(logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    ids = chat_model.tokenizer.prompt_ids(HELLO["messages"])
    steps = list(
        Generation(
            chat_model.model, ids, max_new_tokens=12, stop_ids=chat_model.tokenizer.stop_ids, sampling=Sampling(), logprobs=2
        )
    )
    assert [c["logprob"] for c in content] == pytest.approx([s.logprob for s in steps], abs=1e-5)
    assert all(len(c["top_logprobs"]) == 2 and c["top_logprobs"][0]["logprob"] == pytest.approx(c["logprob"]) for c in content)


def test_plain_completions_continue_text_and_token_ids(served: Served, chat_model: ChatModel) -> None:
    ids = chat_model.tokenizer.encode("how are")
    truth = [step.id for step in Generation(chat_model.model, ids, max_new_tokens=16, stop_ids=chat_model.tokenizer.stop_ids)]
    for prompt in ("how are", ids):
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, "logprobs": 1}
        status, answer, _ = served.send("POST", "/v1/completions", body)
        assert status == 200
        choice = answer["choices"][0]
        assert choice["text"] == chat_model.tokenizer.decode(truth)
        assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) == len(truth)
        assert choice["logprobs"]["text_offset"][0] == 0


@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({"model": "gpt"}, 404, "'gpt' is not served"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text content"),
        ({"messages": [{"role": "user", "content": "hello there " * 600}]}, 400, "context is 512"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 65}, 400, "n:"),
        ({"messages": [{"role": "tool", "content": "4", "tool_call_id": "a"}]}, 400, "no form for tools"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}]},
            400,
            "tool_calls.0.function: it is",
        ),
        ({"stop": ["", "a"]}, 400, "stop"),
        ({"stop": 1}, 400, "stop: expected a text or a list"),
        ({"messages": ["hello"]}, 400, "messages.0: expected an object"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content: expected a text or a list"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content: it is missing"),
        ({"stream": "yes"}, 400, "stream: expected true or false"),
        ({"logit_bias": {"5": 1, "05": 2}}, 400, "logit_bias: expected token ids"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}}, 400, "itself"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(served: Served, changes: dict[str, Any], status: int, word: str) -> None:
    got, answer = served.chat(**changes)
    assert got == status and word in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"[" * 15_000, "the body is nested too deeply"),
        (b'{"model": "\xff"}', "not UTF-8: byte 11"),
        (b'{"seed": ' + b"9" * 9000 + b"}", "a number has 9,000 digits"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_without_words_of_python(served: Served, body: bytes, told: str) -> None:
    status, answer, _ = served.send("POST", "/v1/chat/completions", body)
    assert status == 400 and told in answer["error"]["message"]


def test_a_client_that_sends_too_much_at_once_still_sees_the_answer(served: Served) -> None:
    link = socket.create_connection(("127.0.0.1", served.port), timeout=300)
    link.sendall((POST.format("completions") + "Content-Length: 300000\r\n\r\n").encode())
    link.sendall(b" " * 100_000)
    link.settimeout(0.3)
    with pytest.raises(TimeoutError):  # an answer now could end in a broken connection
        link.recv(4096)
    link.settimeout(300)
    link.sendall(b" " * 200_000)
    assert b" 413 " in link.recv(4096)
    link.close()


def test_a_reply_that_its_own_grammar_ends_is_the_clients_error(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance", reason="needs the extra `serve`")

    def fail(*_: Any) -> Any:
        raise ConfigError("no token can continue this JSON")

    monkeypatch.setattr("chatmill.trainer.generation.grammar.Grammar.allowed", fail)
    status, answer = served.chat(response_format={"type": "json_object"})
    assert status == 400 and answer["error"]["message"] == "no token can continue this JSON"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 15_000, b'{"model": NaN}', b'{"a": "\\ud800"}']
)
def test_malformed_bodies_are_refused(served: Served, body: bytes) -> None:
    status, answer, _ = served.send("POST", "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


def test_oversized_bodies_and_other_types_are_refused(served: Served) -> None:
    assert served.send("POST", "/v1/chat/completions", b" " * 30_000)[0] == 413
    assert served.send("POST", "/v1/chat/completions", HELLO, Content_Type="text/plain")[0] == 415
    assert served.send("GET", "/v1/chat/completions")[0] == 405
    assert served.send("GET", "/nothing")[0] == 404
    link = socket.create_connection(("127.0.0.1", served.port), timeout=300)  # no length is declared
    link.sendall((POST.format("completions") + "Transfer-Encoding: chunked\r\n\r\n").encode())
    for _ in range(3):
        link.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
    assert b" 413 " in link.recv(4096)
    link.close()


def test_a_foreign_host_name_and_foreign_origins_get_nothing(served: Served) -> None:
    assert served.send("GET", "/v1/models", Host="evil.example")[0] == 403
    status, _, response = served.send(
        "OPTIONS", "/v1/chat/completions", Origin="http://evil.example", Access_Control_Request_Method="POST"
    )
    assert status == 405 and not any(k.lower().startswith("access-control") for k in response.headers)


def test_models_health_and_metrics_tell_the_truth(served: Served) -> None:
    served.wait_idle()
    assert served.send("GET", "/v1/models")[1]["data"][0]["id"] == "tiny"
    assert served.send("GET", "/health")[1] == {"status": "ok", "model": "tiny", "active": 0, "waiting": 0}
    before = served.batcher.counts.finished
    served.chat()
    assert f"chatmill_finished_total {before + 1}\n" in served.send("GET", "/metrics")[1]


def test_a_client_that_leaves_stops_the_work(served: Served) -> None:
    served.wait_idle()
    before = served.batcher.counts.cancelled
    for link in [served.start_stream(messages=[{"role": "user", "content": str(k)}]) for k in range(3)]:
        link.close()
    served.wait_idle()
    assert served.batcher.counts.cancelled + served.batcher.counts.finished > before
    body = json.dumps(HELLO | {"max_tokens": 450}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    connection.close()
    served.wait_idle()


def test_a_full_line_is_told_and_frees_itself(chat_model: ChatModel) -> None:
    batcher = Batcher(chat_model, max_active=1, max_waiting=1)
    hold = threading.Event()
    forward = chat_model.model.cached_logits
    server = Served(batcher)
    try:
        chat_model.model.cached_logits = lambda *a, **k: (hold.wait(30), forward(*a, **k))[1]  # type: ignore[method-assign]
        first = server.start_stream()
        while batcher.load != (1, 0):
            time.sleep(0.01)
        second = server.start_stream()
        status, answer = server.chat()
        assert status == 429 and answer["error"]["code"] == "queue_full"
        first.close()
        second.close()
        time.sleep(0.5)
        hold.set()
        server.wait_idle()
        assert batcher.counts.cancelled == 2
        assert server.chat()[0] == 200
    finally:
        hold.set()
        del chat_model.model.cached_logits
        server.close()


def test_a_reply_past_its_time_ends_with_an_error(chat_model: ChatModel) -> None:
    server = Served(Batcher(chat_model), limits=Limits(timeout_s=0.0))
    try:
        status, answer = server.chat()
        assert status == 504 and answer["error"]["code"] == "timeout"
    finally:
        server.close()


def test_a_failure_inside_ends_one_reply_and_not_the_server(chat_model: ChatModel) -> None:
    server = Served(Batcher(chat_model))
    try:
        chat_model.model.cached_logits = lambda *a, **k: 1 / 0  # type: ignore[method-assign,assignment]
        assert server.chat()[0] == 500
        del chat_model.model.cached_logits
        assert server.chat()[0] == 200
    finally:
        server.close()


def test_a_token_opens_the_api_and_its_absence_does_not(chat_model: ChatModel) -> None:
    server = Served(Batcher(chat_model), token="a-long-secret")
    try:
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "a-long-secret"},
            {"Authorization": "Bearer é"},
        ):
            assert server.send("GET", "/v1/models", **header)[0] == 401
            assert server.send("GET", "/metrics", **header)[0] == 401
        assert server.send("POST", "/v1/chat/completions", HELLO)[0] == 401
        assert server.send("GET", "/v1/models", Authorization="Bearer a-long-secret", Host="box.example")[0] == 200
        assert server.send("GET", "/health")[0] == 200
    finally:
        server.close()


def test_an_open_address_without_a_token_is_refused() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.4", "box.example"):
        with pytest.raises(ConfigError, match="token is required"):
            check_address(host, None)
        check_address(host, "a-long-secret")
        with pytest.raises(ConfigError, match="at least 8"):
            check_address(host, "short")


@pytest.mark.slow
def test_two_hundred_clients_with_disconnects_and_rubbish_leave_the_rest_right(served: Served, chat_model: ChatModel) -> None:
    questions = [f"hello {k}" for k in range(8)]
    truth = {q: expected(chat_model, q, 20) for q in questions}
    served.wait_idle()

    def client(number: int) -> str:
        rng = random.Random(number)
        question = rng.choice(questions)
        body = HELLO | {"messages": [{"role": "user", "content": question}], "max_tokens": 20}
        match number % 5:
            case 0:  # leaves at a random moment
                link = served.start_stream(messages=body["messages"])
                time.sleep(rng.random() * 0.2)
                link.close()
                return "left"
            case 1:
                junk = rng.choice([b"{", rng.randbytes(500), b"x" * 25_000, b'{"model": "tiny"}'])
                assert served.send("POST", "/v1/chat/completions", junk)[0] in (400, 413)
                return "refused"
            case 2:
                _, text, _ = served.send("POST", "/v1/chat/completions", body | {"stream": True})
                said = "".join(e["choices"][0]["delta"].get("content", "") for e in events_of(text))
                assert said == truth[question]
            case _:
                _, answer, _ = served.send("POST", "/v1/chat/completions", body)
                assert answer["choices"][0]["message"]["content"] == truth[question]
        return "answered"

    threads = threading.active_count()
    with ThreadPoolExecutor(64) as pool:
        outcomes = list(pool.map(client, range(200)))
    assert {o: outcomes.count(o) for o in set(outcomes)} == {"left": 40, "refused": 40, "answered": 120}
    served.wait_idle()
    assert served.chat()[0] == 200
    assert threading.active_count() <= threads + 45  # the server's own thread pool, no thread per request


def test_the_official_client_works_unchanged(served: Served, chat_model: ChatModel) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny"]
    messages = [{"role": "user", "content": "hello"}]
    truth = expected(chat_model, "hello", 20)
    whole = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_completion_tokens=20, seed=1)
    assert whole.choices[0].message.content == truth
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=20, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == truth
    told = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    assert len(told.choices[0].logprobs.content[0].top_logprobs) == 3
    stopped = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=20, stop=truth[5:7])
    assert stopped.choices[0].message.content == truth[: truth.index(truth[5:7])]
    text = client.completions.create(model="tiny", prompt="how are", temperature=0, max_tokens=8)
    assert text.usage.completion_tokens <= 8
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(model="other", messages=messages)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=messages, temperature=-3)
