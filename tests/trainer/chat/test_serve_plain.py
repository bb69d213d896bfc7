"""/v1/completions with every kind of tokenizer: prompt and continuation are one text, streamed, whole and echoed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.trainer.chat.chat_model import ChatModel
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.generation.generation import Generation
from chatmill.trainer.generation.sampling import Sampling
from chatmill.trainer.model.decoder import Decoder

from ..tokenizer_kinds import KINDS, save_tokenizer
from .server import Batcher, Served, events_of

PROMPTS = ("the boat is", "Hello there", "the quiet river 天", "a")
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "context": 256}


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_continuation_are_the_text_of_all_ids(kind: str, tmp_path: Path) -> None:
    save_tokenizer(kind, tmp_path)
    theirs, tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path), ChatTokenizer.load(tmp_path)
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.1, **SHAPE))
    model.init_weights(1)
    server = Served(Batcher(ChatModel(model.eval(), tokenizer, Path("tiny"), "tiny")))
    word, begins = tokenizer.encode("a boat")[-1], ""
    try:
        for seed, prompt in enumerate(PROMPTS):
            ids = tokenizer.encode(prompt)
            knobs: dict[str, Any] = {"temperature": 1.5, "ignore_eos": True}
            sampling = Sampling(**knobs, logit_bias=((word, 9.0),))  # about every second token
            steps = Generation(model, ids, max_new_tokens=30, sampling=sampling, seed=seed)
            truth = theirs.decode([*ids, *(step.id for step in steps)], skip_special_tokens=True)
            body = knobs | {"logit_bias": {word: 9}, "seed": seed, "max_tokens": 30, "logprobs": 0}

            def ask(**changes: Any) -> Any:
                status, told, _ = server.send("POST", "/v1/completions", body | changes)  # noqa: B023
                assert status == 200, told
                return events_of(told) if "stream" in changes else told["choices"][0]

            whole, echo = ask(prompt=ids), ask(prompt=prompt, echo=True)
            assert theirs.decode(ids) == prompt and prompt + whole["text"] == truth == echo["text"]
            begins += whole["text"][0]
            pieces = [event["choices"][0] for event in ask(prompt=prompt, stream=True)]
            assert "".join(piece["text"] for piece in pieces) == whole["text"]
            at = whole["logprobs"]["text_offset"]
            assert [i for piece in pieces if piece["logprobs"] for i in piece["logprobs"]["text_offset"]] == at
            assert echo["logprobs"]["text_offset"][len(ids) :] == [len(prompt) + i for i in at] and len(at) == 30
            special = set(tokenizer.special)
            first, *others = zip(echo["logprobs"]["text_offset"], echo["logprobs"]["tokens"], strict=True)
            assert first[0] == 0
            shown = [(i, token) for i, token in others if "\ufffd" not in token and token not in special]
            if kind != "wordpiece":  # whose clean-up moves blanks between tokens
                found = [truth[i:].startswith(token) for i, token in shown]
                assert sum(found) > 5  # a byte between invalid ones is shown as one of them
                assert all(is_there or truth[i] == "\ufffd" for is_there, (i, _) in zip(found, shown, strict=True))
        assert " " in begins
    finally:
        server.close()


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_json_mode_is_refused_in_words_where_tokens_are_no_bytes(kind: str, tmp_path: Path, chat_model: ChatModel) -> None:
    pytest.importorskip("llguidance", reason="needs the extra `serve`")
    save_tokenizer(kind, tmp_path)
    server = Served(Batcher(ChatModel(chat_model.model, ChatTokenizer.load(tmp_path), Path("tiny"), "tiny")))
    try:
        status, answer = server.chat(response_format={"type": "json_object"})
        assert status == 400 and answer["error"]["param"] == "response_format"
        assert "WordPiece or Unigram" in answer["error"]["message"] and "byte-level tokenizer" in answer["error"]["message"]
    finally:
        server.close()


def test_stop_strings_wait_for_min_tokens(served: Served, chat_model: ChatModel) -> None:
    whole = served.chat(max_tokens=30)[1]["choices"][0]["message"]["content"]
    early = next(letter for letter in whole[:4] if letter in whole[10:])
    for min_tokens in (0, 12):
        answer = served.chat(max_tokens=30, stop=[early], min_tokens=min_tokens)[1]
        text, used = answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
        assert used >= min_tokens and whole.startswith(text) and (early in text) == (min_tokens > 0)
