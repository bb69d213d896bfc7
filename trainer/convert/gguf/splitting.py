"""llama.cpp's names for the rules by which byte-level BPE tokenizers split text (`tokenizer.ggml.pre`).

    rule_of(tokenizer_json)        "qwen2", or None for a rule that is not known here
    byte_level(tokens, types, merges, "qwen2")

A rule is the steps of tokenizer.json's pre-tokenizer, and whether a word that is in the vocabulary is built from merges
(ignore_merges). The name of a model says nothing: GLM-4 splits as DBRX does, StarCoder and Granite as SmolLM. llama.cpp does
not normalise texts; those in NFC, which is nearly all, get the same ids there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type

DIGITS, GPT2 = "each digit", "GPT-2's words"  # the steps that are no pattern
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str, letters: str = r"\p{L}", marks: str = "") -> str:
    """As OpenAI's cl100k: contractions, words with the sign before them, numbers, signs, blanks."""
    head = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}|"
    return head + rf" ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*|{_BLANKS}"


def _cases(digits: str, contractions: str) -> str:
    """As OpenAI's o200k: a word ends where small letters are followed by a capital."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    sign = r"[^\r\n\p{L}\p{N}]?"
    word = f"{sign}{upper}*{lower}+{contractions}|{sign}{upper}+{lower}*{contractions}"
    return rf"{word}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"


_SIGNS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK = _SIGNS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SEED = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|" + _BLANKS
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Rule:
    """steps: what splits the text, in order. nfc: published tokenizers with it normalise texts.

    nearly: where llama.cpp's own form of the rule splits otherwise, in words.
    """

    steps: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    nearly: str | None = None


_CASES_NEARLY = "words with capitals inside them outside of ASCII, and combining marks (Hindi, Thai, decomposed accents)"

RULES = {
    "smollm": Rule((DIGITS, GPT2)),
    "gpt-2": Rule((GPT2,)),
    "llama-bpe": Rule((_words(r"\p{N}{1,3}"),), ignore_merges=True),
    "dbrx": Rule((_words(r"\p{N}{1,3}"),)),
    "qwen2": Rule((_words(r"\p{N}"),), nfc=True),
    "qwen35": Rule((_words(r"\p{N}", r"[\p{L}\p{M}]", r"\p{M}"),), nfc=True),
    "deepseek-v3": Rule((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK)),
    "seed-coder": Rule((_SEED,)),
    "bailingmoe": Rule((_BAILING,)),
    "tekken": Rule((_cases(r"\p{N}", ""),), ignore_merges=True, nearly=_CASES_NEARLY),
    "gpt-4o": Rule((_cases(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),), nearly=_CASES_NEARLY),
}
# further names that llama.cpp gives to the same rules
ALIASES = {
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm"),
    **dict.fromkeys(("olmo", "mpt", "phi-2", "jais", "exaone4"), "gpt-2"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3"), "llama-bpe"),
    **dict.fromkeys(("smaug-bpe", "glm4", "chatglm-bpe"), "dbrx"),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), "qwen2"),
    **dict.fromkeys(("hunyuan-dense",), "deepseek-v3"),
    **dict.fromkeys(("llama4",), "gpt-4o"),
}


def rule_of(described: Mapping[str, Any]) -> str | None:
    """The name of the rule of a parsed tokenizer.json; None where it has another one, or changes texts before that."""
    steps = _steps(described)
    if steps is None or (nfc := _normalises(described)) is None:
        return None
    fitting = [name for name, rule in RULES.items() if rule.steps == steps and (rule.nfc or not nfc)]
    ignores = bool(described["model"].get("ignore_merges"))
    exact = [name for name in fitting if RULES[name].ignore_merges == ignores]
    if not exact and fitting and _merges_reach_all(described):
        return fitting[0]  # the setting then changes nothing
    return exact[0] if exact else None


def steps_in_words(described: Mapping[str, Any]) -> str:
    """How a tokenizer.json that has no known rule splits texts, for an error."""
    model, pre = described["model"].get("type"), described.get("pre_tokenizer")
    parts = list(pre.get("pretokenizers", [pre])) if pre else []
    said = [part["pattern"].get("Regex", part["pattern"]) if part["type"] == "Split" else part["type"] for part in parts]
    normalizer = (described.get("normalizer") or {}).get("type")
    return f"{model}; normalizer {normalizer or 'none'}; pre-tokenizer {', then '.join(map(str, said)) or 'none'}"


def _steps(described: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What splits the text of a byte-level BPE, in order."""
    pre = described.get("pre_tokenizer")
    parts = list(pre.get("pretokenizers", [pre])) if pre else []
    if described["model"].get("type") != "BPE" or not parts:
        return None
    last = parts[-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    found = [_step(part) for part in parts[:-1]]
    steps = [step for step in found if step is not None]
    if len(steps) < len(found):
        return None
    return (*steps, GPT2) if last.get("use_regex", True) else tuple(steps)


def _step(part: Mapping[str, Any]) -> str | None:
    if part["type"] == "Digits":
        return DIGITS if part.get("individual_digits") else None
    if part["type"] != "Split" or not isinstance(pattern := part["pattern"].get("Regex"), str):
        return None
    # kept matches and dropped rests are the same where a pattern matches every text, as all do that end with blanks
    isolated = part["behavior"] == "Isolated" and not part.get("invert")
    matches = part["behavior"] == "Removed" and part.get("invert") and pattern.endswith(r"|\s+")
    return pattern.replace("\r", r"\r").replace("\n", r"\n") if isolated or matches else None


def _normalises(described: Mapping[str, Any]) -> bool | None:
    """Does it bring texts into NFC? None where it does anything else to them."""
    found = described.get("normalizer")
    parts = found.get("normalizers", [found]) if found else []
    kinds = [part["type"] for part in parts]
    return bool(kinds) if set(kinds) <= {"NFC"} else None


def _merges_reach_all(described: Mapping[str, Any]) -> bool:
    """Do the merges build every token of the vocabulary?"""
    model, added = described["model"], {token["content"] for token in described.get("added_tokens", ())}
    kept = {"type": "BPE", "vocab": model["vocab"], "merges": model["merges"], "ignore_merges": False}
    bare = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": kept}))
    return all(len(bare.model.tokenize(token)) == 1 for token in model["vocab"] if token not in added)


def byte_level(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], name: str) -> Tokenizer:
    """The tokenizer of a GGUF file, whose rule is RULES[name]."""
    rule = RULES[ALIASES.get(name, name)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True) if step == DIGITS else pre_tokenizers.Split(Regex(step), "isolated")
        for step in rule.steps
        if step != GPT2
    ]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in rule.steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, letters]) if steps else letters
    tokenizer.decoder = decoders.ByteLevel()
    for kinds, special in (({CONTROL, UNKNOWN}, True), ({USER_DEFINED}, False)):
        added = [
            AddedToken(t, special=special, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind in kinds
        ]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    return tokenizer
