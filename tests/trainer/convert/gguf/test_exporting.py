"""What export --to gguf writes is read back by our reader and by transformers' own, and the model card tells what is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from chatmill.config import ConfigError
from chatmill.data.tokenizer.template import TEMPLATES
from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.launcher.__main__ import main
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from chatmill.trainer.config import ModelConfig, load_recipe
from chatmill.trainer.convert.gguf.exporting import export_gguf
from chatmill.trainer.convert.gguf.importing import import_gguf, reorder_rotary_rows
from chatmill.trainer.convert.gguf.splitting import rule_of
from chatmill.trainer.convert.hf import export_hf
from chatmill.trainer.convert.model_card import model_card
from chatmill.trainer.convert.names import parameter_shapes
from chatmill.trainer.loop.loop import train
from chatmill.trainer.model.decoder import Decoder

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"tied_embeddings": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 128, "tied_embeddings": False},  # transformers does not read another head_dim
}


def make(folder: Path, tokenizer: ChatTokenizer, **shape: Any) -> Checkpoint:
    config = ModelConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, layers=2, heads=4, kv_heads=2, context=128,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id, **shape,
    )  # fmt: skip
    model = Decoder(config)
    model.init_weights(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases that a wrong mapping could not hide
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
            else:
                parameter.mul_(8)
    with CheckpointWriter(folder, config, {"run": "small"}) as writer:
        for name, parameter in model.named_parameters():
            writer.add(name, parameter.detach())
        for name, data in tokenizer.files().items():
            writer.add_file(name, data)
    return open_checkpoint(folder)


def logits(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    model = Decoder(checkpoint.config)
    checkpoint.load_into(model)
    n = len(tokens)
    with torch.no_grad():
        out: torch.Tensor = model(tokens, torch.arange(n), torch.tensor([0, n], dtype=torch.int32))
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_file_to_the_same_logits(family: str, tiny_data: Path, tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "c", ChatTokenizer.load(tiny_data / "tokenizer"), family=family, **FAMILIES[family])
    export_gguf(checkpoint, tmp_path / "m.gguf", dtype="fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    tokens = torch.randint(0, 384, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    assert float(expected.std()) > 0.3
    torch.testing.assert_close(logits(checkpoint, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [("q8_0", 0.01), ("q5_0", 0.06), ("q4_0", 0.12), ("mxfp4", 0.16)])
def test_weights_of_few_bits_come_back_with_the_error_of_their_type(
    dtype: str, error: float, tiny_data: Path, tmp_path: Path
) -> None:
    checkpoint = make(tmp_path / "c", ChatTokenizer.load(tiny_data / "tokenizer"), tied_embeddings=False)
    back = import_gguf(export_gguf(checkpoint, tmp_path / "m.gguf", dtype=dtype), tmp_path / "back")
    held = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert (held["blk.0.ffn_up.weight"], held["token_embd.weight"], held["output.weight"]) == (dtype.upper(), "Q8_0", "Q8_0")
    for name in parameter_shapes(checkpoint.config):
        ours, theirs = checkpoint.tensor(name), back.tensor(name)
        share = float((ours - theirs).norm() / ours.norm())
        most = 0 if ours.ndim == 1 else 0.01 if name.startswith(("embed", "head")) else error
        assert most / 4 <= share <= most, (name, share)


def test_our_reader_gets_back_every_bit_and_every_token(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_data / "tokenizer")
    checkpoint = make(tmp_path / "c", tokenizer)
    export_gguf(checkpoint, tmp_path / "m.gguf", dtype="fp32")
    back = import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    assert back.config.model_dump(exclude={"initializer_range"}) == checkpoint.config.model_dump(exclude={"initializer_range"})
    assert all(torch.equal(tensor, back.tensor(name)) for name, tensor in checkpoint.tensors())
    again = ChatTokenizer.load(back.path)
    messages = [{"role": "user", "content": "Where is the 17th cat? <|im_end|> ☃"}]
    assert again.prompt_ids(messages) == tokenizer.prompt_ids(messages)
    assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 2**-8), ("fp16", 2**-10), ("q8_0", 1 / 120)])
def test_narrow_types_round_as_they_say(dtype: str, tolerance: float, tiny_data: Path, tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "c", ChatTokenizer.load(tiny_data / "tokenizer"))
    export_gguf(checkpoint, tmp_path / "m.gguf", dtype=dtype)
    back = import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    changed = 0
    for name, tensor in checkpoint.tensors():
        error = (back.tensor(name) - tensor).abs()
        if tensor.ndim == 1:
            assert not error.any()
        assert float(error.max()) <= tolerance * float(tensor.abs().max())
        changed += bool(error.any())
    assert changed > 5


def test_rotary_rows_go_there_and_back() -> None:
    weight = torch.arange(24.0).reshape(12, 2).numpy()
    assert reorder_rotary_rows(weight, 2, to_gguf=True)[:, 0].tolist() == [0, 6, 2, 8, 4, 10, 12, 18, 14, 20, 16, 22]
    assert (reorder_rotary_rows(reorder_rotary_rows(weight, 2, to_gguf=True), 2, to_gguf=False) == weight).all()


def test_what_gguf_cannot_say_is_refused_and_nothing_is_left(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_data / "tokenizer")
    with pytest.raises(ConfigError, match="sliding_window is set"):
        export_gguf(make(tmp_path / "w", tokenizer, family="mistral", sliding_window=16), tmp_path / "m.gguf")
    checkpoint = make(tmp_path / "c", tokenizer)
    (tmp_path / "there.gguf").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_gguf(checkpoint, tmp_path / "there.gguf")
    described = json.loads((checkpoint.path / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {"type": "Whitespace"}
    with CheckpointWriter(tmp_path / "o", checkpoint.config) as writer:
        for name, tensor in checkpoint.tensors():
            writer.add(name, tensor)
        writer.add_file("tokenizer.json", json.dumps(described).encode())
    with pytest.raises(ConfigError, match="splits text by a rule"):
        export_gguf(tmp_path / "o", tmp_path / "m.gguf")
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    assert [p.name for p in tmp_path.glob("*.gguf*")] == ["there.gguf"] and not list(tmp_path.glob(".m.gguf*"))


# as in the tokenizer.json of Qwen2; Llama 3's takes three digits together
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt-2": {"pre": pre_tokenizers.ByteLevel(add_prefix_space=False)},
    "qwen2": {"pattern": QWEN, "normalizer": normalizers.NFC()},
    "llama-bpe": {"pattern": QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|"), "ignore_merges": True},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tokenizers_of_the_usual_families_come_back_from_gguf_with_every_id(name: str, tmp_path: Path) -> None:
    given = PUBLISHED[name]
    trained = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = [pre_tokenizers.Split(Regex(given["pattern"]), "isolated"), letters] if "pattern" in given else []
    trained.pre_tokenizer = given["pre"] if "pre" in given else pre_tokenizers.Sequence(split)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = ["It's 1234567, isn't it?\n\n  你好，世界。 don't 2024 1234", "the cats\r\n the dogs  are 12 and 345"] * 5
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    raw = json.loads(trained.to_str())
    raw["model"]["ignore_merges"] = bool(given.get("ignore_merges"))
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.decoder = decoders.ByteLevel()
    if "normalizer" in given:
        tokenizer.normalizer = given["normalizer"]
    chat = ChatTokenizer(tokenizer.to_str(), TEMPLATES["chatml"], {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    checkpoint = make(tmp_path / "c", chat)
    export_gguf(checkpoint, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    back = ChatTokenizer.load(import_gguf(tmp_path / "m.gguf", tmp_path / "back").path)
    for text in (*texts[:2], "a\t\n b's 98765 <|im_end|> ☃ 中文 e\u0301"):
        assert back.encode(text) == chat.encode(text)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
    ],
    ids=["another text", "a blank before the text", "no splitting"],
)
def test_a_tokenizer_that_gguf_would_change_is_no_known_rule(change: dict[str, Any], tiny_data: Path) -> None:
    described = json.loads((tiny_data / "tokenizer" / "tokenizer.json").read_text())
    assert rule_of(described) == "smollm" and rule_of(described | change) is None


def test_the_command_writes_both_kinds(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "c", ChatTokenizer.load(tiny_data / "tokenizer"))
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "m.gguf"), "--to", "gguf", "--dtype", "q8_0"]) == 0
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "hf"), "--dtype", "bf16"]) == 0
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF" and (tmp_path / "hf" / "README.md").is_file()
    capsys.readouterr()
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "my-model"), "--to", "gguf"]) == 0
    assert f"{tmp_path / 'my-model.gguf'}: GGUF file" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "my-model.gguf"), str(tmp_path / "back")]) == 0
    assert main(["import", str(tmp_path / "no-such.gguf"), str(tmp_path / "other")]) != 0
    assert "no-such.gguf: neither a file" in capsys.readouterr().err


def test_the_card_tells_lineage_and_figures_of_a_run(write_recipe, tiny_data: Path, tmp_path: Path) -> None:
    train(load_recipe(str(write_recipe("carded", train={"steps": 2}, checkpoint={"every_steps": 2}))))
    checkpoint = open_checkpoint(tmp_path / "runs" / "carded")
    export_hf(checkpoint, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card == model_card(checkpoint)
    manifest = json.loads((tiny_data / "manifest.json").read_text())
    for fact in (
        "library_name: transformers", "# carded", "| step | 2 |", "| optimizer.lr | 0.005 |", manifest["recipe_sha256"],
        f"{manifest['splits']['train']['dialogues']:,} dialogues", manifest["inputs"][0]["sha256"], "| validation perplexity |",
    ):  # fmt: skip
        assert fact in card, fact
