"""The terminal chat: commands, history, interruption, pipes, one-shot and files of prompts."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chatmill.config import ConfigError
from chatmill.data.tokenizer.tokenizer import ChatTokenizer, train_bpe
from chatmill.launcher.__main__ import main as chatmill
from chatmill.trainer.chat.chat_model import load_chat_model
from chatmill.trainer.chat.file import generate_file, read_prompts
from chatmill.trainer.chat.terminal import Chat, Settings, generate_one, pipe, printable
from chatmill.trainer.checkpoint.checkpoint import CheckpointWriter
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.generation import replies as many_replies
from chatmill.trainer.generation.replies import Reply, reply_to
from chatmill.trainer.generation.sampling import Sampling
from chatmill.trainer.model.decoder import Decoder

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "context": 256}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with a tokenizer."""
    tokenizer: ChatTokenizer = train_bpe(iter(["hello there, how are you?"] * 20), 300)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **SHAPE)
    model = Decoder(config)
    model.init_weights(1)
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    with CheckpointWriter(folder, config) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
        for name, data in tokenizer.files().items():
            writer.add_file(name, data)
    return folder


def echo(messages: list[dict[str, str]], settings: Settings, on_text: Callable[[str], None]) -> Reply:
    """Answers with what it was asked: the roles' letters, the last question and the seed."""
    if messages[-1]["content"] == "interrupt":
        on_text("half a")
        raise KeyboardInterrupt
    if messages[-1]["content"] == "too long":
        raise ConfigError("Shorten it.")
    roles = "".join(m["role"][0] for m in messages)
    text = f"{roles}|{messages[-1]['content']}|{settings.seed}"
    on_text(text)
    return Reply(text, "stop", 1, 1)


def talk(*lines: str, system: str | None = None, settings: Settings | None = None) -> tuple[Chat, list[str], list[str]]:
    """(chat, replies, words of the program) after the lines."""
    said: list[str] = []
    chat = Chat(echo, settings or Settings(), system, said.append)
    replies = [reply.text for line in lines if (reply := chat.take(line, lambda _: None)) is not None]
    return chat, replies, said


def test_history_and_system_message_are_part_of_every_prompt() -> None:
    chat, replies, _ = talk("a", "b", system="be kind")
    assert replies == ["su|a|None", "suau|b|None"]
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_reset_forgets_turns_and_keeps_the_system_message() -> None:
    assert talk("a", "/reset", "b", system="x")[1][-1] == "su|b|None"


def test_the_system_message_can_be_set_shown_and_removed() -> None:
    chat, replies, said = talk("/system be [kind]", "a", "/system", "/system -", "b")
    assert replies == ["su|a|None", "uau|b|None"]
    assert "be \\[kind]" in said[0] and said[0] == said[1]
    assert chat.system is None


def test_regenerate_answers_the_same_question_with_another_seed() -> None:
    chat, replies, said = talk("/regenerate", "a", "/regenerate", settings=Settings(seed=5))
    assert replies == ["u|a|5", "u|a|6"]
    assert len(chat.turns) == 2 and said == ["Nothing to answer yet."]


def test_params_change_what_follows_and_refuse_nonsense() -> None:
    chat, replies, _ = talk("/params seed=3 temperature=0 top_p=none", "a")
    assert replies == ["u|a|3"]
    assert (chat.settings.temperature, chat.settings.top_p) == (0.0, None)
    for words, match in (
        ("heat=1", "NAME=VALUE"),
        ("top_k=x", "not a number"),
        ("top_p=7", "top_p"),
        ("temperature=none", "not a"),
    ):
        with pytest.raises(ConfigError, match=match):
            chat.take(f"/params {words}", lambda _: None)
    assert chat.settings.temperature == 0.0


def test_an_interrupted_reply_stays_in_the_history() -> None:
    chat, replies, _ = talk("interrupt", "go on")
    assert replies == ["uau|go on|None"]
    assert chat.turns[1] == {"role": "assistant", "content": "half a"}


def test_a_refused_question_leaves_no_trace() -> None:
    chat, _, _ = talk("a")
    with pytest.raises(ConfigError):
        chat.take("too long", lambda _: None)
    assert [t["content"] for t in chat.turns] == ["a", "u|a|None"]


def test_saved_conversations_are_read_back_by_the_importers(tmp_path: Path) -> None:
    talk("a", f"/save {tmp_path / 'c.jsonl'}", system="s")
    (row,) = (json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines())
    assert [m["content"] for m in row["messages"]] == ["s", "a", "su|a|None"]


def test_a_pipe_gets_replies_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    sink = io.StringIO()
    code = pipe(echo, Settings(), None, io.StringIO("a\n\n/reset\n/nonsense\nb\n/quit\nc\n"), sink)
    assert sink.getvalue() == "u|a|None\nu|b|None\n"
    errors = capsys.readouterr().err
    assert "starts over" in errors and "/nonsense: no such command" in errors
    assert code == 2


def test_half_a_character_is_refused_and_the_next_line_is_answered(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sink, save = io.StringIO(), tmp_path / "saved.jsonl"
    bad = b"caf\xe9".decode("utf-8", "surrogateescape")
    source = io.StringIO(f"a\n{bad}\n/system {bad}\n/save {save}{bad}\n/save {save}\nb\n\ud83d\n")
    assert pipe(echo, Settings(), None, source, sink) == 2
    assert sink.getvalue() == "u|a|None\nuau|b|None\n"
    assert capsys.readouterr().err.count("not valid Unicode") == 4
    assert [p.name for p in tmp_path.iterdir()] == ["saved.jsonl"] and json.loads(save.read_text(encoding="utf-8"))


def test_bytes_that_are_no_utf8_never_end_in_a_traceback(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\ncaf\xe9\nho\n"), "utf-8", "strict"))
    code = chatmill(["chat", str(checkpoint), "--max-new-tokens", "2"])
    told = capfd.readouterr()
    assert code == 2 and "Traceback" not in told.err and "not valid Unicode" in told.err
    assert len(told.out.splitlines()) >= 2


@pytest.mark.parametrize(("name", "value"), [("prompt", "\udce9"), ("system", "\ud83d"), ("stop", ("\ud83d",))])
def test_bad_text_on_the_command_line_is_refused_by_name(checkpoint: Path, name: str, value: Any) -> None:
    given: dict[str, Any] = {"prompt": "hi", name: value}
    with pytest.raises(ConfigError, match=f"{name}: not valid Unicode"):
        generate_one(checkpoint, **given)


def test_lines_of_a_prompts_file_are_cut_at_newlines_alone(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes('\ufeff{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}\n'.encode())
    assert [row["prompt"] for row, _ in read_prompts(file)] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    "knobs",
    [
        {"seed": 2**63},
        {"min_tokens": 300},
        {"presence_penalty": 3.0},
        {"logit_bias": ((1, 101.0),)},
        {"temperature": float("nan")},
    ],
)
def test_settings_beyond_their_limits_are_refused_by_name(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        Settings(**knobs)


def test_control_characters_cannot_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\r\x9bc\n\té你") == "a[31mbc\n\té你"


def test_one_prompt_is_answered_the_same_with_the_same_seed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = []
    for seed in (1, 1, 2):
        assert generate_one(checkpoint, "hello", max_new_tokens=12, temperature=1.0, seed=seed) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


def test_a_file_of_prompts_becomes_a_file_of_replies(checkpoint: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "p.jsonl", tmp_path / "sub/r.jsonl"
    rows = [{"prompt": "hello", "id": 7}, {"messages": [{"role": "user", "content": "how"}]}]
    source.write_text("\n\n".join(json.dumps(r) for r in rows))
    assert generate_file(checkpoint, source, out, max_new_tokens=8, temperature=0.0) == 0
    replies = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r.get("id") for r in replies] == [7, None]
    assert all(0 <= r["tokens"] <= 8 and r["finish_reason"] in ("stop", "length") for r in replies)
    assert [p.name for p in out.parent.iterdir()] == ["r.jsonl"]


def test_a_file_of_prompts_goes_on_where_it_was_killed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"hello {n}", "id": n}) + "\n" for n in range(9)))
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seed": 5, "batch": 4}
    assert generate_file(checkpoint, source, tmp_path / "whole.jsonl", **settings) == 0
    whole = (tmp_path / "whole.jsonl").read_text()
    chat = load_chat_model(checkpoint)
    for n, row in enumerate(map(json.loads, whole.splitlines())):
        messages = [{"role": "user", "content": f"hello {n}"}]
        alone = reply_to(chat.model, chat.tokenizer, messages, max_new_tokens=6, sampling=Sampling(1.0, None, 0.95), seed=5 + n)
        assert (row["id"], row["reply"], row["tokens"]) == (n, alone.text, alone.tokens)

    real, made = many_replies.replies_to_many, list[int]()

    def dying(*args: Any, **options: Any) -> Iterator[tuple[int, Reply]]:
        for index, reply in real(*args, **options):
            if len(made) == 5:
                raise KeyboardInterrupt
            made.append(index)
            yield index, reply

    monkeypatch.setattr("chatmill.trainer.chat.file.replies_to_many", dying)
    with pytest.raises(KeyboardInterrupt):
        generate_file(checkpoint, source, out, **settings)
    assert not out.exists()
    progress = tmp_path / ".r.jsonl.progress"
    progress.write_text(progress.read_text() + '[7, {"reply": "cut sho')  # killed while it wrote
    made.clear()
    monkeypatch.setattr("chatmill.trainer.chat.file.replies_to_many", lambda *a, **o: made.append(len(a[2])) or real(*a, **o))
    assert generate_file(checkpoint, source, out, **settings) == 0
    assert made == [4]
    assert "5 of 9 replies are done already" in capsys.readouterr().err
    assert out.read_text() == whole
    assert not progress.exists()
    progress.write_text("another key\n[0, {}]\n")
    assert generate_file(checkpoint, source, out, **settings | {"seed": 6}) == 0
    assert made == [4, 9]
    assert out.read_text() != whole


def test_the_command_line_hands_every_knob_on(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(checkpoint), "hello", "--max-new-tokens", "30", "--seed", "3"]
    assert chatmill([*words, "--temperature", "1.5", "--repetition-penalty", "1.3", "--min-p", "0.02", "--top-k", "50"]) == 0
    text = capsys.readouterr().out.rstrip("\n")
    chat = load_chat_model(checkpoint)
    knobs = Sampling(1.5, 50, 0.95, 0.02, 1.3)
    messages = [{"role": "user", "content": "hello"}]
    assert text == reply_to(chat.model, chat.tokenizer, messages, max_new_tokens=30, sampling=knobs, seed=3).text.rstrip("\n")
    assert chatmill([*words, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    stop = greedy[6:9]
    assert chatmill([*words, "--temperature", "0", "--stop", "never there", "--stop", stop]) == 0
    assert capsys.readouterr().out == greedy[: greedy.index(stop)] + "\n"
    rules = ("--presence-penalty", "0.5", "--frequency-penalty", "0.4", "--logit-bias", "70=3", "--logit-bias", "71=-9")
    ends = ("--min-tokens", "4", "--stop-token-id", "72", "--ignore-eos")
    assert chatmill([*words, "--temperature", "1", *rules, *ends]) == 0
    bias = ((70, 3.0), (71, -9.0))
    knobs = Sampling(1.0, None, 0.95, None, 1.0, 0.5, 0.4, bias, 4, (72,), True)
    whole = reply_to(chat.model, chat.tokenizer, messages, max_new_tokens=30, sampling=knobs, seed=3).text
    assert capsys.readouterr().out.rstrip("\n") == whole.rstrip("\n")


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}'])
def test_a_bad_line_of_prompts_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "ok"}\n' + line)
    with pytest.raises(ConfigError, match=r"p.jsonl:2"):
        list(read_prompts(path))


def test_replies_fit_the_json_schema_that_was_asked_for(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    words = ["generate", str(checkpoint), "Hi!", "--max-new-tokens", "60"]
    assert chatmill([*words, "--json-schema", str(schema), "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out) in ("yes", "no")
    prompts, out = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    prompts.write_text('{"prompt": "Hi"}\n{"prompt": "Ho"}\n')
    files = ["generate", str(checkpoint), "--file", str(prompts), "--out", str(out), "--max-new-tokens", "60"]
    assert chatmill([*files, "--json-schema", '{"enum": ["yes", "no"]}', "--quiet"]) == 0
    assert [json.loads(json.loads(line)["reply"]) in ("yes", "no") for line in out.read_text().splitlines()] == [True, True]
    assert capsys.readouterr().err == ""
    for given, message in (
        ("nowhere.json", "expected a schema, a file with one, or `object`"),
        ("{", "not JSON"),
        ('{"type": "nothing"}', "JSON schema"),
    ):
        assert chatmill([*words, "--json-schema", given]) == 2
        assert message in capsys.readouterr().err
    assert chatmill([*words, "--json-schema", "object", "--ignore-eos"]) == 2
    assert "a reply in JSON ends where the JSON ends" in capsys.readouterr().err


def test_a_foreign_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=100, **SHAPE)
    model = Decoder(config)
    model.init_weights(0)
    with CheckpointWriter(tmp_path / "bad", config) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
        for name, data in ChatTokenizer.load(checkpoint).files().items():
            writer.add_file(name, data)
    with pytest.raises(ConfigError, match="do not belong together"):
        load_chat_model(tmp_path / "bad")


# The real loop and loading, with replies slow enough to be interrupted for certain.
SLOW_CHAT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests started in the background by a shell inherit it ignored
from chatmill.trainer.chat import terminal as chat_terminal
from chatmill.trainer.chat.file import generate_file, read_prompts
from chatmill.trainer.generation.replies import Reply, reply_to

def answer_with(chat_model, tool_use=None):
    def answer(messages, settings, on_text):
        for number in range(settings.max_new_tokens):
            on_text(f"{number} ")
            time.sleep(0.1)
        return Reply("", "stop", 1, settings.max_new_tokens)
    return answer

chat_terminal.answer_with = answer_with
sys.exit(chat_terminal.run_chat(sys.argv[1], max_new_tokens=2000))
"""


@pytest.mark.slow
def test_a_real_terminal_streams_and_ctrl_c_stops_the_reply_not_the_program(checkpoint: Path) -> None:
    master, slave = pty.openpty()
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[3] / "src"),
        "TERM": "dumb",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_CHAT, str(checkpoint)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        start_new_session=True,
    )
    os.close(slave)
    seen = ""

    def wait_for(words: str, timeout_s: float = 600) -> None:
        nonlocal seen
        until = time.monotonic() + timeout_s
        while words not in seen:
            assert time.monotonic() < until, seen
            if select.select([master], [], [], 0.2)[0]:
                seen += os.read(master, 4096).decode("utf-8", "replace")
        seen = seen.split(words, 1)[1]

    try:
        wait_for("you ")
        os.write(master, b"hello\n")
        wait_for("tiny 0 1 2")
        process.send_signal(signal.SIGINT)
        wait_for("stopped")
        os.write(master, b"/params max_new_tokens=3\n")
        wait_for("max_new_tokens=3")
        os.write(master, b"again\n")
        wait_for("per second")
        os.write(master, b"/quit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(master)
