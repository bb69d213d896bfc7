"""New special tokens: the tokenizer stays itself, the tables get rows, and another tokenizer is refused.

Truth: transformers' tokenizers, and means computed in plain torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from chatmill.config import ConfigError
from chatmill.data.tokenizer.new_tokens import tokens_beyond, with_special_tokens
from chatmill.data.tokenizer.template import TEMPLATES
from chatmill.data.tokenizer.tokenizer import ChatTokenizer, train_bpe
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from chatmill.trainer.checkpoint.vocabulary import WiderTables, rows_for, with_new_rows
from chatmill.trainer.model.decoder import Decoder
from chatmill.trainer.model_config import ModelConfig

from ..tokenizer_kinds import CORPUS, KINDS, save_tokenizer

NEW = ("<|turn|>", "<|over|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|over|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_any_kind_gets_new_tokens_and_stays_itself(kind: str, tmp_path: Path) -> None:
    save_tokenizer(kind, tmp_path / "base")
    base = ChatTokenizer.load(tmp_path / "base")
    more = with_special_tokens(ChatTokenizer.load(tmp_path / "base", TEMPLATE), NEW)
    ids = {token: base.vocab_size + i for i, token in enumerate(NEW)}
    assert tokens_beyond(base, more) == ids and more.vocab_size == base.vocab_size + 2
    assert more.stops[0] == ids["<|over|>"] and more.stop_ids >= base.stop_ids & {base.eos_id}
    assert all(more.encode(text) == base.encode(text) for text in CORPUS[:5])
    assert more.encode(more.escape_special("a <|over|> b")) != more.encode("a <|over|> b")  # nobody can type it
    more.save(tmp_path / "more")
    again = ChatTokenizer.load(tmp_path / "more")
    assert again.fingerprint == more.fingerprint and with_special_tokens(again, NEW) is again
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "more")
    messages = [{"role": "user", "content": "Where is the red boat?"}]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert again.prompt_ids(messages) == wanted and wanted.count(ids["<|turn|>"]) == 2


def test_what_differs_in_more_than_new_special_tokens_is_another_tokenizer(tmp_path: Path) -> None:
    base = train_bpe(iter(CORPUS), 300)
    raw = json.loads(base.source)
    other = json.loads(base.source)
    other["model"]["merges"] = other["model"]["merges"][:-1]
    plain = Tokenizer.from_str(base.source)
    plain.add_tokens(["an ordinary one"])
    without = raw | {"added_tokens": raw["added_tokens"][:-1]}
    for source in (json.dumps(other), plain.to_str(), json.dumps(without)):
        assert tokens_beyond(base, ChatTokenizer(source, None)) is None
    assert tokens_beyond(base, ChatTokenizer(json.dumps(raw, indent=1), None)) == {}  # as another program writes it


def test_a_vocabulary_with_gaps_refuses_a_token_that_would_take_anothers_place() -> None:
    gaps = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 3}, unk_token="a"))
    tokenizer = ChatTokenizer(gaps.to_str(), None)
    assert tokenizer.vocab_size == 4
    with pytest.raises(ConfigError, match="'<x>' cannot be added: 'c' has the id 3"):
        with_special_tokens(tokenizer, ["<x>"])
    with pytest.raises(ConfigError, match="not blank"):
        with_special_tokens(tokenizer, [" "])


# ---------------------------------------------------------------- rows


def base_model(folder: Path, rows: int, dtype: torch.dtype = torch.float32, **shape: Any) -> Checkpoint:
    """A random model with `rows` rows and a byte-level tokenizer of 300 tokens without a template."""
    trained = train_bpe(iter(CORPUS), 300, ("<|endoftext|>",))
    tokenizer = ChatTokenizer(trained.source, None, trained.config | {"eos_token": "<|endoftext|>"})
    assert tokenizer.vocab_size == 300
    size = {"hidden_size": 6, "intermediate_size": 8, "layers": 1, "heads": 1, "kv_heads": 1, "context": 64}
    config = ModelConfig(vocab_size=rows, **{**size, **shape})
    model = Decoder(config)
    model.init_weights(5)
    with CheckpointWriter(folder, config) as writer:
        for name, tensor in model.named_parameters():
            writer.add(name, tensor.detach().to(dtype))
        for name, data in tokenizer.files().items():
            writer.add_file(name, data)
    return open_checkpoint(folder)


def chatml(base: Checkpoint) -> ChatTokenizer:
    """The base model's tokenizer with ChatML and its two tokens, 300 and 301."""
    return with_special_tokens(ChatTokenizer.load(base.path, TEMPLATES["chatml"]), ["<|im_start|>", "<|im_end|>"])


@pytest.mark.parametrize(
    ("held", "needed"), [(300, 304), (301, 302), (302, 302), (384, 384)], ids=["grows", "odd", "fits", "padded"]
)
def test_padding_is_used_before_tables_grow_and_their_multiple_stays(held: int, needed: int, tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", held)
    assert rows_for(base, chatml(base), "data") == needed
    assert rows_for(base, ChatTokenizer.load(base.path, TEMPLATES["zephyr"]), "data") == held


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", 384)
    with pytest.raises(ConfigError, match="data was tokenised with another tokenizer than"):
        rows_for(base, train_bpe(iter(CORPUS[:2]), 290), "data")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rows", [300, 384], ids=["grown", "in padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_new_rows_are_the_mean_of_the_trained_ones_and_all_others_stay(
    tied: bool, rows: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = base_model(tmp_path / "base", rows, dtype, tied_embeddings=tied)
    tokenizer = chatml(base)
    config = base.config.model_copy(update={"vocab_size": rows_for(base, tokenizer, "data")})
    source = with_new_rows(base, config, tokenizer)
    assert isinstance(source, WiderTables)
    model = Decoder(config)
    tables = {"embed.weight"} | (set() if tied else {"head.weight"})
    for name, parameter in model.named_parameters():
        assert source.shape(name) == tuple(parameter.shape)
        found, before = source.tensor(name), base.tensor(name)
        assert found.dtype == dtype
        if name not in tables:
            assert torch.equal(found, before)
            continue
        mean = before[:300].double().mean(0).to(dtype)
        fresh = [300, 301, *range(rows, config.vocab_size)]
        assert torch.equal(found[fresh], mean.expand(len(fresh), -1))
        kept = [i for i in range(rows) if i not in fresh]
        assert torch.equal(found[kept], before[kept])
        flat, width = found.flatten(), found.shape[1]
        for start, stop in ((0, 7), (299 * width + 1, 301 * width + 5), (len(flat) - 3, len(flat)), (302 * width, 302 * width)):
            assert torch.equal(source.read(name, start, stop), flat[start:stop])  # as a sharded engine reads it


def test_a_tokenizer_without_new_tokens_leaves_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", 384)
    assert with_new_rows(base, base.config, ChatTokenizer.load(base.path, TEMPLATES["zephyr"])) is base
