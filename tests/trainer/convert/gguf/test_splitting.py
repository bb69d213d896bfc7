"""The rules by which tokenizers split texts have the names with which llama.cpp gives the same ids."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from chatmill.trainer.checkpoint.checkpoint import CheckpointWriter
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.convert.gguf.exporting import export_gguf
from chatmill.trainer.convert.gguf.splitting import DIGITS, GPT2, RULES, rule_of
from chatmill.trainer.convert.proof.cases import TEXTS
from chatmill.trainer.convert.proof.llama_cpp import token_ids
from chatmill.trainer.model.shapes import parameter_shapes

LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def mixed(count: int) -> list[str]:
    """Texts of pieces that rules treat differently, in any order."""
    draw = random.Random(0)
    pieces = [*"aB1é中あ한Жя٣!?.,'-_/(\n\r\t ", "  ", "\n\n", "'s", "'LL", "'Ve", "12345", "Word", "ǅ", "😀"]
    pieces += ["…", "“", "x=", "\r\n", "ß", "€"]
    return ["".join(draw.choices(pieces, k=draw.randint(2, 24))) for _ in range(count)]


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, Any]:
    """A BPE whose merges cross the borders of words, so that every other way of splitting gives other ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, *mixed(400)] * 2, trainer)
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def described_by(name: str, vocabulary: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json as models with that rule are published."""
    rule = RULES[name]
    steps: list[dict[str, Any]] = [
        {"type": "Digits", "individual_digits": True}
        if step == DIGITS
        else {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        for step in rule.steps
        if step != GPT2
    ]
    last = {**LETTERS, "use_regex": GPT2 in rule.steps}
    return {
        **vocabulary,
        "normalizer": {"type": "NFC"} if rule.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, last]} if steps else last,
        "model": {**vocabulary["model"], "ignore_merges": rule.ignore_merges},
    }


def write(described: dict[str, Any], folder: Path) -> Path:
    """The GGUF file of a tiny model with this tokenizer."""
    config = ModelConfig(vocab_size=1504, hidden_size=32, intermediate_size=32, layers=1, heads=1, kv_heads=1, context=64)
    with CheckpointWriter(folder / "c", config) as writer:
        for name, shape in parameter_shapes(config).items():
            writer.add(name, torch.zeros(shape))
        writer.add_file("tokenizer.json", json.dumps(described).encode())
    return export_gguf(folder / "c", folder / "m.gguf", dtype="fp32")


def test_llama_cpp_gives_the_ids_of_every_rule(llama_cpp: None, vocabulary: dict[str, Any], tmp_path: Path) -> None:
    texts = [*TEXTS, *mixed(400)]
    files = []
    for name in RULES:
        (tmp_path / name).mkdir()
        files.append(write(described_by(name, vocabulary), tmp_path / name))
    for name, found in zip(RULES, token_ids(files, texts), strict=True):
        tokenizer = Tokenizer.from_str(json.dumps(described_by(name, vocabulary)))
        wrong = [text for text, ids in zip(texts, found, strict=True) if tokenizer.encode(text).ids != ids]
        if RULES[name].nfc:  # llama.cpp does not normalise texts
            wrong = [text for text in wrong if unicodedata.is_normalized("NFC", text)]
        if RULES[name].nearly is None:
            assert not wrong, (name, wrong[:3])
        else:
            assert 0 < len(wrong) < len(texts) / 20


def test_a_rule_is_known_by_its_steps_and_what_changes_ids_is_another(vocabulary: dict[str, Any]) -> None:
    for name in RULES:
        assert rule_of(described_by(name, vocabulary)) == name
    llama = described_by("llama-bpe", vocabulary)
    split, letters = llama["pre_tokenizer"]["pretokenizers"]
    for changed in (
        {**split, "invert": True},
        {**split, "behavior": "MergedWithNext"},
        {**split, "pattern": {"Regex": split["pattern"]["Regex"].replace("{1,3}", "{1,2}")}},
    ):
        assert rule_of({**llama, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [changed, letters]}}) is None
    published = {**split, "behavior": "Removed", "invert": True}  # as Phi-4 and GPT-4o write it
    published["pattern"] = {"Regex": split["pattern"]["Regex"].replace(r"\r", "\r").replace(r"\n", "\n")}
    assert rule_of({**llama, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [published, letters]}}) == "llama-bpe"
    assert rule_of({**llama, "normalizer": {"type": "Sequence", "normalizers": []}}) == "llama-bpe"  # as DeepSeek writes it
    assert rule_of({**llama, "normalizer": {"type": "NFKC"}}) is None


def test_the_setting_for_whole_words_counts_only_where_merges_do_not_reach_a_token(vocabulary: dict[str, Any]) -> None:
    described = described_by("qwen2", vocabulary)
    whole = {**described, "model": {**described["model"], "ignore_merges": True}}
    assert rule_of(whole) == "qwen2"
    whole["model"] = {**whole["model"], "vocab": {**whole["model"]["vocab"], "Ġunreachable": 1500}}
    assert rule_of(whole) is None
