"""A text as ids without a chat template, exactly as transformers' tokenizer gives them: what completion servers send.

    plain = PlainText(tokenizer)
    plain.encode("Once upon a")          # BOS first, where the tokenizer puts one; special tokens in the text are special

The post-processor of tokenizer.json says whether a BOS token comes first. Flags such as add_bos_token in tokenizer_config.json
are ignored, as transformers 5 ignores them beside a tokenizer.json.
"""

from __future__ import annotations

from tokenizers import Tokenizer

from .pieces import encoding_of
from .tokenizer import ChatTokenizer


class PlainText:
    """The encoder of plain texts that belongs to a tokenizer."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode("utf-8"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, taken as it is. add_special_tokens=False: without BOS and whatever else would be added."""
        ids: list[int] = encoding_of(self._tokenizer, text, add_special_tokens=add_special_tokens).ids
        return ids
