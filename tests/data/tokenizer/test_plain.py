"""Plain texts become the ids that transformers makes of them: with BOS where it puts one, special tokens included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, processors

from chatmill.data.tokenizer.plain import PlainText
from chatmill.data.tokenizer.tokenizer import ChatTokenizer, train_bpe

TEXTS = ["the a", "", " two  spaces ", "中文 😀", "a<|im_end|>b <|endoftext|>", "<|bos|>twice"]


def make(folder: Path, config: dict[str, Any], processor: Any) -> ChatTokenizer:
    special = ("<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    made = Tokenizer.from_str(train_bpe(iter(["the a cat"] * 9), 300, special).files()["tokenizer.json"].decode())
    made.post_processor = processor
    made.enable_truncation(3)  # a leftover of somebody's training
    folder.mkdir()
    (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config), encoding="utf-8")
    return ChatTokenizer.load(folder)


BOS_FIRST = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
BOS_AND_EOS = processors.TemplateProcessing(single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", 0), ("<|im_end|>", 3)])


@pytest.mark.parametrize(
    ("config", "processor", "first"),
    [
        ({}, None, False),
        ({}, BOS_FIRST, True),
        ({}, BOS_AND_EOS, True),
        ({}, processors.ByteLevel(trim_offsets=False), False),
        ({"add_bos_token": True, "add_eos_token": True}, None, False),
        ({"add_bos_token": False}, BOS_FIRST, True),
    ],
)
def test_a_text_has_the_ids_of_transformers(tmp_path: Path, config: dict[str, Any], processor: Any, first: bool) -> None:
    tokenizer = make(tmp_path / "made", config, processor)
    plain = PlainText(tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    for text in TEXTS:
        assert plain.encode(text) == theirs(text, truncation=False)["input_ids"]
        assert plain.encode(text, False) == theirs(text, truncation=False, add_special_tokens=False)["input_ids"]
    assert (plain.encode("the a")[0] == tokenizer.bos_id) == first
