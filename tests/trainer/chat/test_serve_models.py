"""Several models in one server: `model` chooses, and each answers as it would alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatmill.config import ConfigError
from chatmill.trainer.chat.chat_model import ChatModel
from chatmill.trainer.chat.serve.run import can_open_pages, names_of, serve

from .server import Served, expected


@pytest.fixture(scope="module")
def pair(chat_model: ChatModel) -> dict[str, ChatModel]:
    other = copy.deepcopy(chat_model.model)
    other.init_weights(4)
    other.eval().requires_grad_(False)
    return {"before": replace(chat_model, name="before"), "之后": replace(chat_model, name="之后", model=other)}


@pytest.fixture(scope="module")
def two(pair: dict[str, ChatModel]) -> Iterator[Served]:
    from chatmill.trainer.chat.serve.batcher import Batcher

    served = Served(*(Batcher(chat) for chat in pair.values()))
    yield served
    served.close()


def said(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_the_model_that_is_asked_answers(two: Served, pair: dict[str, ChatModel]) -> None:
    replies = {name: expected(chat, "hello", 12, temperature=0.0) for name, chat in pair.items()}
    assert len(set(replies.values())) == 2
    for name, reply in replies.items():
        status, answer = two.chat(model=name)
        assert (status, answer["model"], said(answer)) == (200, name, reply)
    _, answer = two.chat(model=None)
    assert (answer["model"], said(answer)) == ("before", replies["before"])  # the first, unless one is named


def test_both_are_listed_and_another_is_refused(two: Served) -> None:
    assert [entry["id"] for entry in two.send("GET", "/v1/models")[1]["data"]] == ["before", "之后"]
    assert two.send("GET", "/v1/models/before")[1]["id"] == "before"
    assert two.send("GET", "/v1/models/%E4%B9%8B%E5%90%8E")[1]["id"] == "之后"
    status, answer = two.chat(model="tiny")
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert "'before' or '之后'" in answer["error"]["message"]


def test_each_is_counted_by_itself(two: Served) -> None:
    def finished() -> list[int]:
        told = two.send("GET", "/metrics")[1]
        assert told.count("# TYPE chatmill_finished_total counter\n") == 1
        return [int(told.split(f'chatmill_finished_total{{model="{name}"}} ')[1].split("\n")[0]) for name in ("before", "之后")]

    counts = finished()
    two.chat(model="之后")
    two.wait_idle()
    assert finished() == [counts[0], counts[1] + 1]
    assert two.send("GET", "/health")[1]["status"] == "ok"


def test_a_checkpoint_may_be_given_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    assert names_of(["runs/a", "new=runs/a", "lr=1", "小米=runs/b=c"]) == [
        *((None, Path("runs/a")), ("new", Path("runs/a")), (None, Path("lr=1")), ("小米", Path("runs/b=c"))),
    ]  # fmt: skip


def test_two_of_one_name_are_refused(chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatmill.trainer.chat.chat_model.load_chat_models", lambda *_, **__: [[chat_model], [chat_model]])
    with pytest.raises(ConfigError, match=r"would be called 'tiny'\. Name them: chatmill serve one=FOLDER two=FOLDER"):
        serve("runs/tiny", "other/tiny", port=0)


def test_a_page_opens_only_where_somebody_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    assert can_open_pages({"DISPLAY": ":0"}, "linux") and can_open_pages({}, "darwin")
    for environment in ({}, {"DISPLAY": ":0", "CI": "true"}, {"DISPLAY": ":0", "SSH_CONNECTION": "1 2 3 4"}):
        assert not can_open_pages(environment, "linux")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert not can_open_pages({"DISPLAY": ":0"}, "linux")  # a pipe
