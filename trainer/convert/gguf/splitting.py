"""llama.cpp's names for the rules by which byte-level BPE tokenizers split text (`tokenizer.ggml.pre`).

    rule_of(tokenizer_json)        "qwen2", or None for a rule that is not known here
    byte_level(tokens, types, merges, "qwen2")

smollm: each digit is a word, then GPT-2's rule. gpt-2: GPT-2's rule. llama-bpe (Llama 3): up to three digits are a word, and a
word that is in the vocabulary is not built from merges. qwen2 (Qwen2 to Qwen3): as Llama 3, with single digits, texts in NFC.
llama.cpp does not normalise texts; those in NFC, which is nearly all, get the same ids there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type


def _words(digits: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """before: what splits the text before the bytes become letters: nothing, digits, or a pattern, which then splits alone."""

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False


RULES = {
    "smollm": Rule(digits=True),
    "gpt-2": Rule(),
    "llama-bpe": Rule(_words(r"\p{N}{1,3}"), ignore_merges=True),
    "qwen2": Rule(_words(r"\p{N}"), nfc=True),
}


def rule_of(described: Mapping[str, Any]) -> str | None:
    """The name of the rule of a parsed tokenizer.json; None where it has another one, or changes texts before that."""
    model, pre = described["model"], described.get("pre_tokenizer")
    parts = list(pre.get("pretokenizers", [pre])) if pre else []
    if model.get("type") != "BPE" or not parts or parts[-1]["type"] != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    normalizer = (described.get("normalizer") or {}).get("type")
    for name, rule in RULES.items():
        found = [part for part in parts[:-1] if not _splits_as(part, rule)]
        fits = not found and len(parts) - 1 == (rule.digits or rule.pattern is not None)
        alike = parts[-1].get("use_regex", True) == (rule.pattern is None) and normalizer in (None, *["NFC"] * rule.nfc)
        if fits and alike and bool(model.get("ignore_merges")) == rule.ignore_merges:
            return name
    return None


def _splits_as(part: Mapping[str, Any], rule: Rule) -> bool:
    if rule.digits:
        return part["type"] == "Digits" and bool(part.get("individual_digits"))
    pattern = {"Regex": rule.pattern}
    return part["type"] == "Split" and part["pattern"] == pattern and part["behavior"] == "Isolated" and not part.get("invert")


def byte_level(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], name: str) -> Tokenizer:
    """The tokenizer of a GGUF file, whose rule is RULES[name]."""
    rule = RULES[name]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None)
    if rule.digits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), letters])
    elif rule.pattern is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule.pattern), "isolated"), letters])
    else:
        tokenizer.pre_tokenizer = letters
    tokenizer.decoder = decoders.ByteLevel()
    for kinds, special in (({CONTROL, UNKNOWN}, True), ({USER_DEFINED}, False)):
        added = [
            AddedToken(t, special=special, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind in kinds
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    return tokenizer
