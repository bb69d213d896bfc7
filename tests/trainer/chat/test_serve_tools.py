"""The official client runs a loop of tools against a server whose tiny model has learned a dialogue by heart.

What it learned are the tokens that the data side makes of the dialogues. That it answers shows that they are those of serving.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation
from chatmill.data.importers.datasets.openai_messages import dialogue
from chatmill.data.ledger import Ledger
from chatmill.data.samples.per_reply import in_pieces
from chatmill.data.tokenizer.tokenizer import ChatTokenizer, train_bpe
from chatmill.trainer.chat.chat_model import ChatModel
from chatmill.trainer.chat.settings import Settings
from chatmill.trainer.chat.terminal import answer_with, pipe
from chatmill.trainer.chat.tools.tool_use import ToolUse, read_tools
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.model.decoder import Decoder

from .server import Served  # skips where the extra `serve` is missing

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | map(attribute='function') | map(attribute='name') | join(' ') }}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": CITY}},
    {"type": "function", "function": {"name": "time"}},
]
ASK: dict[str, Any] = {"role": "user", "content": "Oslo?"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TALK = [
    ASK,
    {"role": "assistant", "content": "", "reasoning_content": "ask", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00001", "content": "snow"},
    {"role": "assistant", "content": "It snows.", "reasoning_content": "done"},
]


def trained() -> ChatModel:
    """A model that says TALK by heart."""
    bare = Tokenizer.from_str(train_bpe(iter(["Oslo? It snows. weather time city"] * 9), 290).source)
    bare.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in ("<tool_call>", "</tool_call>", "<think>", "</think>")]
    )
    bare.add_tokens([AddedToken('{"name": "', special=False), AddedToken('", "arguments": ', special=False)])
    tokenizer = ChatTokenizer(bare.to_str(), TEMPLATE, {"eos_token": "<|im_end|>"})
    turns, meta = dialogue({"messages": TALK, "tools": TOOLS}, "x", Ledger())
    conversation = Conversation("u" * 32, tuple(turns), "s", "o", meta)
    (piece,) = in_pieces(conversation, tokenizer)  # every prompt is how the dialogue begins
    made = tokenizer.encode_dialogue(piece)
    assert tokenizer.prove_mask(piece) is None
    shape = {"hidden_size": 48, "intermediate_size": 64, "layers": 1, "heads": 4, "kv_heads": 2, "context": 512}
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.1, **shape))
    model.init_weights(3)
    ids = torch.tensor(made.ids.astype("int64"))
    targets = torch.where(torch.tensor(made.loss_mask), ids, -100)[1:]
    positions, bounds = torch.arange(len(ids) - 1), torch.tensor([0, len(ids) - 1], dtype=torch.int32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(ids[:-1], positions, bounds), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.08:
            break
    assert loss < 0.1, float(loss)
    model.eval().requires_grad_(False)
    return ChatModel(model, tokenizer, Path("tiny"), "tiny")


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return trained()


@pytest.fixture(scope="module")
def served(model: ChatModel) -> Iterator[Served]:
    from chatmill.trainer.chat.serve.batcher import Batcher

    server = Served(Batcher(model))
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0)


def create(client: Any, messages: list[Any], **more: Any) -> Any:
    return client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=60, **{"tools": TOOLS} | more
    )


def test_the_official_client_runs_a_loop_of_two_steps(client: Any) -> None:
    messages: list[Any] = [ASK]
    first = create(client, messages).choices[0]
    (call,) = first.message.tool_calls
    assert first.finish_reason == "tool_calls" and first.message.content is None
    assert first.message.reasoning_content == "ask" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    messages += [first.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "snow"}]
    last = create(client, messages).choices[0]
    assert last.message.content == "It snows." and last.message.tool_calls is None and last.finish_reason == "stop"
    assert last.message.reasoning_content == "done"


def test_a_stream_gives_the_same_call_in_deltas(client: Any) -> None:
    chunks = list(create(client, [ASK], stream=True))
    deltas = [c.choices[0].delta for c in chunks]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert calls[0].function.name == "weather" and calls[0].id and {call.index for call in calls} == {0}
    assert json.loads("".join(call.function.arguments for call in calls)) == {"city": "Oslo"}
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "ask"
    assert not "".join(delta.content or "" for delta in deltas) and chunks[-1].choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(model="tiny", messages=[ASK], tools=TOOLS, temperature=0, max_tokens=60) as stream:
        (whole,) = stream.get_final_completion().choices[0].message.tool_calls
    assert whole.function.name == "weather" and json.loads(whole.function.arguments) == {"city": "Oslo"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "time"}}])
def test_a_call_can_be_required_or_named(client: Any, choice: Any) -> None:
    tools = TOOLS[:1] if choice == "required" else TOOLS
    if choice != "required":
        tools = [TOOLS[0], {"type": "function", "function": {"name": "time", "parameters": CITY}}]
    for seed in range(2):
        given = {"tools": tools, "tool_choice": choice, "seed": seed, "stream": False}
        reply = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "zzz"}], temperature=3, max_tokens=200, **given
        ).choices[0]
        (call,) = reply.message.tool_calls
        assert call.function.name == ("weather" if choice == "required" else "time")
        assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome") and reply.finish_reason == "tool_calls"


def test_without_tools_a_call_is_only_text(client: Any) -> None:
    reply = create(client, [ASK], tool_choice="none").choices[0]
    assert reply.message.tool_calls is None and reply.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "color": 1}}]}, "tools.0.function.color"),
    ],
)
def test_what_cannot_be_called_is_refused_by_name(client: Any, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        create(client, [ASK], **changes)
    assert told.value.param == param


def test_the_terminal_shows_calls_and_takes_results(
    model: ChatModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps({"tools": TOOLS}))
    use = ToolUse.of(model, read_tools(tmp_path / "tools.json"))
    settings, said = Settings(temperature=0.0, max_new_tokens=60), io.StringIO()
    assert pipe(answer_with(model, use), settings, None, io.StringIO("Oslo?\nsnow\n"), said, use) == 0
    assert said.getvalue() == "\nIt snows.\n"  # the call is shown beside it
    assert 'calls weather {"city": "Oslo"}' in capsys.readouterr().err and not use.waiting


@pytest.mark.parametrize("text", ["no JSON", "[]", '[{"function": {"parameters": {}}}]', "5"])
def test_a_file_without_tools_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(text)
    with pytest.raises(ConfigError, match="expected a"):
        read_tools(tmp_path / "tools.json")
