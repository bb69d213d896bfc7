"""Replies that follow a JSON schema, token by token. Needs llguidance (in the extra `serve`).

    grammars = Grammars(tokenizer, model.config.vocab_size)          # once per model
    grammar = grammars.json({"type": "object"})                      # per reply; ConfigError for what cannot be enforced
    mask = grammar.allowed(V);  grammar.accept(chosen);  grammar.is_complete

Why llguidance: it needs nothing else (xgrammar needs torch, transformers and tvm-ffi), reads tokenizer.json itself, byte-level
and with byte fallback, knows several stop ids, and refuses the parts of JSON Schema that it does not enforce. Measured:
docs/serving.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chatmill.config import ConfigError

from ...data.tokenizer.tokenizer import ChatTokenizer

# A model that likes blanks would fill its reply with them: in JSON, any number is allowed between two values.
WHITESPACE = {"whitespace_pattern": r"[ \n]{0,20}"}
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class Grammar:
    """Where one reply is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Grammar:
        """The same place, for another reply."""
        return Grammar(self._matcher.deep_copy())

    def allowed(self, vocab_size: int) -> Tensor:
        """Bool["V"]: the tokens that may come next. A stop id is among them where the text may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, count=vocab_size, bitorder="little").view(bool))

    def accept(self, token_id: int) -> None:
        """Advance by one of the allowed tokens."""
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Nothing may follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"no token can continue this JSON: {_reason(self._matcher.get_error())}")


class Grammars:
    """Makes the grammars for one tokenizer. vocab_size: the model's, which may be larger than the tokenizer's."""

    def __init__(self, tokenizer: ChatTokenizer, vocab_size: int) -> None:
        self._source, self._vocab_size = tokenizer, vocab_size
        self._tokenizer: Any = None

    def json(self, schema: Mapping[str, Any] = ANY_OBJECT) -> Grammar:
        """JSON that the schema accepts. Raises ConfigError for a schema that cannot be enforced."""
        library = _library()
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer(library)
        try:
            text = library.LLMatcher.grammar_from_json_schema(dict(schema), defaults=WHITESPACE)
        except ValueError as error:
            raise ConfigError(f"the JSON schema is not valid: {_reason(str(error))}") from None
        matcher = library.LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the JSON schema cannot be enforced: {_reason(matcher.get_error())}")
        if warnings := matcher.get_grammar_warnings():
            raise ConfigError(f"the JSON schema cannot be enforced as it is: {_reason(warnings[0])}")
        start = matcher.deep_copy()
        start.compute_bitmask()
        if start.is_error():  # {"$ref": "#"}: no error comes before the first token
            raise ConfigError(
                "the JSON schema cannot be enforced: no JSON fits it, because it refers to itself without an end."
            )
        return Grammar(matcher)

    def lark(self, text: str) -> Grammar:
        """A grammar in llguidance's form of Lark, with `%json` schemas inside. Raises ConfigError."""
        library = _library()
        if self._tokenizer is None:
            self._tokenizer = self._make_tokenizer(library)
        matcher = library.LLMatcher(self._tokenizer, library.LLMatcher.grammar_from_lark(text), log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the JSON schema cannot be enforced: {_reason(matcher.get_error())}")
        if warnings := matcher.get_grammar_warnings():
            raise ConfigError(f"the JSON schema cannot be enforced as it is: {_reason(warnings[0])}")
        return Grammar(matcher)

    def _make_tokenizer(self, library: Any) -> Any:
        stops = sorted(self._source.stop_ids)
        if not stops:
            raise ConfigError("JSON needs a tokenizer with an end-of-turn token; this one has none.")
        decoding = self._source.decoding
        if not (decoding.is_byte_level or decoding.has_byte_tokens):  # llguidance cannot tell the text of its tokens
            raise ConfigError(
                "JSON is not possible with this model's tokenizer: it has no tokens for bytes (it is of the WordPiece or "
                "Unigram kind). JSON needs a byte-level tokenizer or one with byte fallback."
            )
        source = self._source.files()["tokenizer.json"].decode("utf-8")
        try:
            return library.LLTokenizer(source, n_vocab=self._vocab_size, eos_token=stops)
        except ValueError as error:
            raise ConfigError(f"JSON is not possible with this model's tokenizer: {_reason(str(error))}") from None


def parse_schema(text: str) -> dict[str, Any]:
    """A JSON schema from its text. Raises ConfigError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the JSON schema is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError("the JSON schema must be an object.")
    return found


def _library() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise ConfigError("replies in JSON need llguidance, which is not installed: pip install 'chatmill[serve]'") from None
    return llguidance


def _reason(text: str) -> str:
    """One line of an error of several lines: a regex error names its reason last, behind a picture of the pattern."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "no reason is given"
    reasons = [line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: ")]
    return " ".join([lines[0], *reasons[:1]])[:300]
