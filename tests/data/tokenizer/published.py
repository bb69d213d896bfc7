"""Chat templates against twelve shapes of dialogues: what each reply is trained behind, and what the server would send.

Published templates are read where they are: in a folder that CHATMILL_TEMPLATES names, or in an installed trl
(`pip install --no-deps trl`). `check` compares with transformers' own rendering.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation
from chatmill.data.importers.datasets.openai_messages import dialogue
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import PairSection
from chatmill.data.samples.pair import make_samples
from chatmill.data.samples.per_reply import in_pieces
from chatmill.data.tokenizer.tokenizer import ChatTokenizer, supervised_turns, train_bpe

Message = dict[str, Any]
_TOKEN = re.compile(r"<\|[^|<>{}\s]+\|>|<｜[^｜<>]+｜>|</?[a-z_]+>|<[a-z_]+>|\[/?[A-Z_]{3,}\]|<\|?[a-z_]+\|?>|\|\w+\|")
NOT_SPECIAL = re.compile(r"</?(think|tool|arg|response|parameter|function|answer|TOOL|tools)\w*>")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "城市"}, "days": {"type": "integer", "description": "n"}},
            "required": ["city"],
        },
    },
}


def call(city: str, days: int, number: int) -> Message:
    arguments = {"city": city, "days": days}
    return {"id": f"call0000{number}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def result(text: str, number: int) -> Message:
    return {"role": "tool", "name": "get_weather", "tool_call_id": f"call0000{number}", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def reply(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


ASKS = [user("Weather in Köln?"), reply("", tool_calls=[call("Köln", 2, 1)]), result('{"sky": "rain"}', 1)]
SHAPES: dict[str, list[Message]] = {
    "one exchange": [user("hello"), reply("Hi there!")],
    "three exchanges": [user("one"), reply("first"), user("two"), reply("second"), user("three"), reply("third")],
    "system": [{"role": "system", "content": "Be kind."}, user("a question"), reply("answer A"), user("more"), reply("B")],
    "thought in the text": [
        user("17*3"), reply("<think>\nthirds\n</think>\n\nIt is 51."),
        user("and 18*3"), reply("<think>\nmore\n</think>\n\nIt is 54."),
    ],
    "thought": [user("17*3"), reply("It is 51.", reasoning_content="seventeen by three")],
    "two thoughts": [
        user("17*3"), reply("It is 51.", reasoning_content="seventeen by three"),
        user("18*3"), reply("It is 54.", reasoning_content="eighteen by three"),
    ],
    "call": [*ASKS, reply("It rains.")],
    "words and a call": [
        user("Weather?"), reply("Let me look.", tool_calls=[call("Paris", 1, 1)]), result("sun", 1), reply("Sunny."),
        user("Thanks"), reply("Welcome."),
    ],
    "two calls at once": [
        user("Both?"), reply("", tool_calls=[call("北京", 1, 1), call('O"Fallon', 3, 2)]),
        result("晴", 1), result("wind", 2), reply("晴 and wind."),
    ],
    "steps with thoughts": [
        user("Plan"), reply("", reasoning_content="look first", tool_calls=[call("Rome", 1, 1)]), result("hot", 1),
        reply("", reasoning_content="look again", tool_calls=[call("Oslo", 1, 2)]), result("cold", 2),
        reply("Oslo.", reasoning_content="it is cooler"), user("Sure?"), reply("Yes.", reasoning_content="sure"),
    ],
    "a reply that is not learned": [*[m | {"weight": 0} if m["role"] == "assistant" else m for m in ASKS], reply("It rains.")],
    "中文": [user("你好，\n今天怎么样？ 😀"), reply("我很好！\n\n  你呢？"), user("也好"), reply("那就好 👍")],
}  # fmt: skip


def folders() -> list[Path]:
    """Where published templates lie."""
    named = [Path(name) for name in os.environ.get("CHATMILL_TEMPLATES", "").split(os.pathsep) if name]
    found = importlib.util.find_spec("trl")
    return (
        named or [Path(place) / "chat_templates" for place in (found.submodule_search_locations or [])]
        if found or named
        else []
    )


def published() -> dict[str, str]:
    """Name and source."""
    return {path.stem: path.read_text(encoding="utf-8") for folder in folders() for path in sorted(folder.glob("*.jinja"))}


def tokenizer_for(source: str) -> ChatTokenizer:
    """Bytes as tokens, and what looks like a special token of the template."""
    bare = Tokenizer.from_str(train_bpe(iter(()), 259).source)
    found = list(dict.fromkeys([*_TOKEN.findall(source), "<s>", "</s>", "<think>", "</think>"]))
    bare.add_tokens([AddedToken(t, special=not NOT_SPECIAL.fullmatch(t), normalized=False) for t in found])
    ends = [t for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "<|return|>") if t in found]
    return ChatTokenizer(bare.to_str(), source, {"bos_token": "<s>", "eos_token": ends[0] if ends else "</s>"})


def truth(source: str, tokenizer: ChatTokenizer, messages: list[Message], tools: list[Message] | None, opens: bool) -> str:
    """transformers' rendering."""
    names = {key: tokenizer.config[key] for key in ("bos_token", "eos_token")}
    ((text,), _) = render_jinja_template([messages], tools=tools, chat_template=source, add_generation_prompt=opens, **names)  # type: ignore[no-untyped-call]
    now, fixed = datetime.now(), datetime(2024, 1, 1)  # data are rendered on a fixed day
    for layout in ("%Y-%m-%d", "%d %b %Y", "%d %B %Y", "%B %d, %Y"):
        text = text.replace(now.strftime(layout), fixed.strftime(layout))
    return str(text)


def check(source: str, shape: str, tokenizer: ChatTokenizer | None = None) -> Counter[str]:
    """kept: replies behind the prompt of transformers; refused: with their reason. Raises AssertionError for anything else."""
    tokenizer = tokenizer or tokenizer_for(source)
    record = {"messages": SHAPES[shape]}
    has_tools = any("tool_calls" in m for m in SHAPES[shape])
    if has_tools:
        record["tools"] = [WEATHER]  # type: ignore[assignment]
    turns, meta = dialogue(json.loads(json.dumps(record)), "x", Ledger())
    conversation = Conversation("u" * 32, tuple(turns), "s", "o", meta)
    (sample,) = make_samples(conversation, PairSection(), Ledger())
    wanted, found = len(supervised_turns(sample)), Counter[str]()
    given = [{k: v for k, v in m.items() if k not in ("weight", "reasoning")} for m in SHAPES[shape]]
    can = tokenizer.abilities
    if has_tools and can.calls is None:  # lines of JSON in the text
        parts, more = tokenizer.prompt_parts(sample)
        given, tools = [dict(m) for m in parts], more.get("tools")
    else:
        tools = [WEATHER] if has_tools and can.tools else None
        if can.calls == "string":
            given = json.loads(json.dumps(given))
            for message in given:
                for made in message.get("tool_calls", ()):
                    made["function"]["arguments"] = json.dumps(made["function"]["arguments"], ensure_ascii=False)
    for piece in in_pieces(sample, tokenizer):
        replies = supervised_turns(piece)
        try:
            encoded = tokenizer.encode_dialogue(piece)
        except ConfigError as error:
            found[f"refused: {str(error).splitlines()[0]}"] += len(replies)
            continue
        fault = tokenizer.prove_mask(piece)
        assert fault is None, fault
        starts = {i: len(tokenizer.prompt_ids(*prompt_before(tokenizer, piece, i))) for i in replies}
        for i in replies:
            want = truth(source, tokenizer, given[:i], tools, opens=True)
            prompt = tokenizer.decode(encoded.ids[: starts[i]].tolist())
            assert prompt == want, (prompt, want)
            assert encoded.loss_mask[starts[i]] and not encoded.loss_mask[starts[i] - 1 if i == replies[0] else 0]
            stop = starts[i]
            while stop < len(encoded.ids) and encoded.loss_mask[stop]:
                stop += 1
            said = tokenizer.decode(encoded.ids[starts[i] : stop].tolist())
            for text in said_by(given[i], can.calls is not None):
                assert "".join(text.split()) in "".join(said.split()), (text, said)
            found["kept"] += 1
    assert found.total() == wanted, (found, wanted)
    return found


def prompt_before(tokenizer: ChatTokenizer, piece: Conversation, i: int) -> tuple[list[Message], dict[str, Any]]:
    parts, more = tokenizer.prompt_parts(piece)
    return parts[:i], more


def said_by(message: Message, calls: bool) -> list[str]:
    """What must be learned of a reply."""
    texts = [message["content"].split("</think>")[-1]]
    return texts + [made["function"]["name"] for made in message.get("tool_calls", ()) if calls]
