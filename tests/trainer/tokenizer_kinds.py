"""Small tokenizers of every kind that models come with, and Hugging Face folders of random models that use them.

    save_model("byte-fallback", tmp_path)       # writes the weights, the configs, the tokenizer and its chat template

The models are random but end their replies after a few dozen tokens, so that greedy replies to different prompts differ in text
and length. Their byte tokens come in any order: unfinished and invalid characters are common in their replies.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from chatmill.data.tokenizer.template import TEMPLATES

CORPUS = [
    "Hello there, how are you today? I'm fine, thanks! And you?",
    "Where is the small red boat? The boat is on the quiet river; it doesn't move.",
    "今天天气很好。你想去公园吗？好的，我们走吧！",
    "Grüße aus Köln: naïve café, 12 + 34 = 46.",
    "def f(x):\n    return x + 1\n",
] * 8
SUBJECTS = ("the moon", "a red boat", "tea 🍵", "今天的天气", "Köln", "rain", "x + 1", "你", "two cats 🐈🐈", "sleep")
QUESTIONS = ("What is {}?", "Tell me about {}.", "{}：是什么？", "Why {}?!", "  {}\n")
PROMPTS = [question.format(subject) for question in QUESTIONS for subject in SUBJECTS]  # 50


@dataclass(frozen=True, slots=True)
class Kind:
    """make: the tokenizer. config: tokenizer_config.json. end: the token that closes a reply, not always eos_token."""

    make: Callable[[], Tokenizer]
    config: dict[str, Any]
    template: str
    end: str


def _byte_level() -> Tokenizer:
    """As Qwen's: ChatML, whose <|im_end|> is not the end of a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """As Llama 2's, Mistral 7B's, Yi's and TinyLlama's: "▁" before the text, a token of each byte for what has no other."""
    vocab = {token: i for i, token in enumerate(("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))))}
    words = ("▁the", "▁a", "▁is", "▁boat", "▁you", "▁red", "ing", "天气", "▁<|", "|>")
    for letter in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;!?'[]/<|>+=0123456789é天气好你的":
        vocab.setdefault(letter, len(vocab))
    merges = []
    for word in words:
        for size in range(1, len(word)):
            if word[: size + 1] not in vocab:
                vocab[word[: size + 1]] = len(vocab)
                merges.append((word[:size], word[size]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def _wordpiece() -> Tokenizer:
    """As BERT's: pieces of words with ##, and blanks that decoding guesses."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[USER]", "[BOT]"]
    letters = [letter for letter in dict.fromkeys("".join(CORPUS)) if not letter.isspace()]
    words = dict.fromkeys(word for line in CORPUS for word in line.split() if word.isalpha() and word.isascii())
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words, "##ing", "##n", "##ed"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _unigram() -> Tokenizer:
    """As T5's, in its own way of showing blanks ("▁" before every text)."""
    special = ["<unk>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    letters = dict.fromkeys("▁" + "".join(line.replace(" ", "") for line in CORPUS))
    words = dict.fromkeys("▁" + word for line in CORPUS for word in line.split() if word.isalpha())
    pieces = [(word, -4.0 - i / 64) for i, word in enumerate(words)] + [
        (letter, -9.0 - i / 64) for i, letter in enumerate(letters)
    ]
    tokenizer = Tokenizer(models.Unigram([*((token, 0.0) for token in special), *pieces], unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


_BERT = (
    "[CLS]{% for m in messages %}{{ ('[USER]' if m['role'] == 'user' else '[BOT]') + ' ' + m['content'] + ' [SEP]' }}"
    "{% endfor %}{% if add_generation_prompt %}[BOT]{% endif %}"
)
_FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
KINDS = {
    "byte-level": Kind(_byte_level, {"eos_token": "<|endoftext|>"}, TEMPLATES["chatml"], "<|im_end|>"),
    "byte-fallback": Kind(
        _byte_fallback, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, TEMPLATES["zephyr"], "</s>"
    ),
    "wordpiece": Kind(
        _wordpiece,
        {"eos_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]", "clean_up_tokenization_spaces": True},
        _BERT,
        "[SEP]",
    ),
    "unigram": Kind(
        _unigram, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, TEMPLATES["llama3"], "<|eot_id|>"
    ),
}


def save_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """Write the tokenizer's files as a Hugging Face folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = KINDS[kind].make()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = _FAST | {"clean_up_tokenization_spaces": False} | KINDS[kind].config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(KINDS[kind].template, encoding="utf-8")
    return tokenizer


def save_model(kind: str, folder: Path, *, seed: int = 0, end_scale: float = 1.7) -> None:
    """Write a random two-layer Llama with its tokenizer. end_scale: how large the output row of the end of turn is made.

    generation_config.json names the end of turn and, where it differs, eos_token.
    """
    tokenizer, spec = save_tokenizer(kind, folder), KINDS[kind]
    ends = [tokenizer.token_to_id(token) for token in dict.fromkeys((spec.config["eos_token"], spec.end))]
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=ends[0],
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[ends[-1]] *= end_scale
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends)
    model.save_pretrained(folder)
