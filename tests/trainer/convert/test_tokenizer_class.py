"""Whatever class a source names for its tokenizer, the export's tokenizer gives our ids. Truth: transformers' AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.launcher.__main__ import main as chatmill
from chatmill.trainer.checkpoint.checkpoint import open_checkpoint
from chatmill.trainer.convert.hf import export_hf
from chatmill.trainer.convert.tokenizer_class import QWEN2_SPLIT, is_replaced

from ..tokenizer_kinds import KINDS, PROMPTS, save_tokenizer
from .test_stops import json_of, save_checkpoint

CLASSES = [
    ("byte-fallback", "LlamaTokenizer", "llama"),  # as in Llama 2, Mistral 7B, Yi and TinyLlama
    ("byte-fallback", "LlamaTokenizerFast", "mistral"),
    ("byte-fallback", "TokenizersBackend", "phi3"),  # written by transformers 5, unknown to transformers 4
    ("byte-fallback", None, "llama"),
    ("byte-level", "LlamaTokenizerFast", "qwen3"),  # as in DeepSeek's
    ("byte-level", "Qwen2Tokenizer", "qwen3"),
    ("byte-level", "GPT2Tokenizer", "seed_oss"),
    ("byte-level", "NoSuchTokenizer", "llama"),
    ("wordpiece", "BertTokenizer", "llama"),
    ("unigram", "T5Tokenizer", "llama"),
    ("unigram", "XLMRobertaTokenizer", "qwen3"),
]


SHAPES: dict[str, dict[str, Any]] = {"qwen3": {"qk_norm": True}, "qwen2": {"qkv_bias": True}}


def export(kind: str, name: str | None, folder: Path, family: str = "llama", **more: Any) -> ChatTokenizer:
    """Export a small model to folder / "out" whose source named this class; returns our tokenizer of it."""
    save_tokenizer(kind, folder / "source")
    config = json_of(folder / "source" / "tokenizer_config.json") | more
    config.pop("tokenizer_class")
    (folder / "source" / "tokenizer_config.json").write_text(json.dumps(config | ({"tokenizer_class": name} if name else {})))
    checkpoint = save_checkpoint(
        folder / "ours", ChatTokenizer.load(folder / "source"), family=family, **SHAPES.get(family, {})
    )
    export_hf(checkpoint, folder / "out")
    return ChatTokenizer.load(folder / "ours")


@pytest.mark.parametrize(("kind", "name", "family"), CLASSES)
def test_the_tokenizer_of_an_export_gives_our_ids_whatever_class_the_source_named(
    kind: str, name: str | None, family: str, tmp_path: Path
) -> None:
    ours = export(kind, name, tmp_path, family)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(PROMPTS[::2]) >= 20
    for prompt in PROMPTS[::2]:
        clean = ours.escape_special(prompt)
        for text in (clean, KINDS[kind].end + clean, f"{clean} {KINDS[kind].end}{clean}"):
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ids == ours.encode(text), text
            assert theirs.decode(ids) == ours.decode(ids), text
        talk = [{"role": role, "content": prompt} for role in ("user", "assistant", "user")]
        asked = theirs.apply_chat_template(
            [turn | {"content": clean} for turn in talk], add_generation_prompt=True, return_dict=True
        )
        assert asked["input_ids"] == ours.prompt_ids(talk), prompt
        assert set(asked) == {"input_ids", "attention_mask"}


def test_the_export_reads_tokenizer_json_as_it_is_in_transformers_4_too(tmp_path: Path) -> None:
    """Its PreTrainedTokenizerFast gives token_type_ids and removes blanks where nothing else is written."""
    export("byte-fallback", "LlamaTokenizer", tmp_path, auto_map={"AutoTokenizer": ["tokenization_x.X", None]}, legacy=False)
    written = json_of(tmp_path / "out" / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in written
    assert written["model_input_names"] == ["input_ids", "attention_mask"] and written["clean_up_tokenization_spaces"] is False
    assert written["bos_token"] == "<s>" and written["legacy"] is False
    for given in (True, False):
        folder = tmp_path / str(given)
        export("wordpiece", "BertTokenizer", folder, clean_up_tokenization_spaces=given, model_input_names=["input_ids"])
        written = json_of(folder / "out" / "tokenizer_config.json")
        assert written["clean_up_tokenization_spaces"] is given and written["model_input_names"] == ["input_ids"]


@pytest.mark.parametrize("kind", ["byte-level", "unigram"])
def test_an_export_says_where_autotokenizer_replaces_its_tokenizer(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = export(kind, "LlamaTokenizerFast", tmp_path, "qwen2")
    text = ours.escape_special("Why today's 12 boats?!")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] != ours.encode(text)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert "PreTrainedTokenizerFast.from_pretrained(FOLDER)" in (tmp_path / "out" / "README.md").read_text()
    assert chatmill(["export", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    assert "transformers.PreTrainedTokenizerFast" in capsys.readouterr().out


def test_a_tokenizer_with_the_rules_of_qwen2_is_not_replaced(tmp_path: Path) -> None:
    export("byte-level", "Qwen2Tokenizer", tmp_path, "qwen2")
    raw = json_of(tmp_path / "ours" / "tokenizer.json")
    rules = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer  # Qwen2Tokenizer's
    raw |= {part: json.loads(rules.to_str())[part] for part in ("normalizer", "pre_tokenizer")}
    assert raw["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": QWEN2_SPLIT}
    ours = ChatTokenizer(json.dumps(raw), KINDS["byte-level"].template, json_of(tmp_path / "ours" / "tokenizer_config.json"))
    checkpoint = save_checkpoint(tmp_path / "same", ours, family="qwen2", **SHAPES["qwen2"])
    assert not is_replaced(checkpoint) and is_replaced(open_checkpoint(tmp_path / "ours"))
    theirs = transformers.AutoTokenizer.from_pretrained(export_hf(checkpoint, tmp_path / "same-out"))
    for prompt in PROMPTS[::2]:
        message = [{"role": "user", "content": ours.escape_special(prompt)}]
        asked = theirs.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        assert asked["input_ids"] == ours.prompt_ids(message), prompt
