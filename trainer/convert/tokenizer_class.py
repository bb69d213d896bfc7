"""The class that transformers takes for an exported tokenizer, and where it takes another one than the folder names.

A class that is named after a model makes its own normaliser and splits text by its own rule; it takes only the vocabulary from
tokenizer.json. PreTrainedTokenizerFast, in transformers 5 another name of TokenizersBackend, reads the file as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..checkpoint.checkpoint import Checkpoint

AS_IT_IS = "PreTrainedTokenizerFast"
# The rule of Qwen2Tokenizer, put in the place of the file's own. AutoTokenizer of transformers 5 takes this class for
# model_type qwen2 whatever the folder names (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS in its tokenization_auto.py).
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def as_it_is(settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with which transformers reads tokenizer.json as it is.

    The classes differ in two more things: the inputs that they give (in transformers 4 this one would add token_type_ids, which
    no model here takes), and whether decoding removes blanks by default. auto_map names code of the source, which an export
    does not hold.
    """
    kept = {key: value for key, value in settings.items() if key != "auto_map"}
    defaults = {"model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
    return {**defaults, **kept, "tokenizer_class": AS_IT_IS}


def is_replaced(checkpoint: Checkpoint) -> bool:
    """Does AutoTokenizer of transformers 5 give other ids than the exported tokenizer.json, and nothing in the folder helps?"""
    file = checkpoint.files().get("tokenizer.json")
    if checkpoint.config.family != "qwen2" or file is None:
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    rule = found.get("pre_tokenizer") or {}
    split = [*rule.get("pretokenizers", ()), {}][0]
    same = (found["model"]["type"], (found.get("normalizer") or {}).get("type")) == ("BPE", "NFC")
    return not (same and split.get("pattern") == {"Regex": QWEN2_SPLIT})
