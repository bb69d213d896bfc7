"""New special tokens for a tokenizer that exists, and what one tokenizer has beyond another.

    chat = with_special_tokens(ChatTokenizer.load("models/base", TEMPLATES["chatml"]), ["<|im_start|>", "<|im_end|>"])
    tokens_beyond(ChatTokenizer.load("models/base"), chat)        # {"<|im_start|>": 32000, "<|im_end|>": 32001}

Everything else of the tokenizer stays: every text without the new tokens has the same ids as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer

from chatmill.config import ConfigError

from .tokenizer import ChatTokenizer


def with_special_tokens(tokenizer: ChatTokenizer, tokens: Iterable[str]) -> ChatTokenizer:
    """The tokenizer with these special tokens; those that it has already stay as they are. Raises ConfigError.

    A new token gets an id that no other token has; an ordinary token of the vocabulary becomes a special one under its own id.
    """
    wanted = [token for token in dict.fromkeys(tokens) if token not in tokenizer.special]
    if not wanted:
        return tokenizer
    if bad := [token for token in wanted if not token.strip()]:
        raise ConfigError(f"new special token {bad[0]!r}: expected a string that is not blank.")
    inner = Tokenizer.from_str(tokenizer.source)
    before = inner.get_vocab(with_added_tokens=True)
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in wanted])
    found = {token: index for token in wanted if (index := inner.token_to_id(token)) is not None}
    taken = {index: token for token, index in before.items()}
    if clash := [token for token, index in found.items() if taken.get(index, token) != token]:
        raise ConfigError(
            f"special token {clash[0]!r} cannot be added: {taken[found[clash[0]]]!r} has the id {found[clash[0]]} already.\n"
            "The vocabulary of this tokenizer has gaps; use a template whose tokens it holds."
        )
    config = dict(tokenizer.config)
    if isinstance(listed := config.get("added_tokens_decoder"), dict):  # transformers' own copy of the list
        config["added_tokens_decoder"] = {**listed, **{str(index): _described(token) for token, index in found.items()}}
    return ChatTokenizer(inner.to_str(), tokenizer.template_source, config, tokenizer.generation)


def tokens_beyond(base: ChatTokenizer, other: ChatTokenizer) -> dict[str, int] | None:
    """The special tokens that `other` has beyond `base`, with their ids; None where the two differ in anything else."""
    if base.tokenizer_sha256 == other.tokenizer_sha256:
        return {}
    ours, theirs = _normal_form(other), _normal_form(base)
    added = {token["content"]: token for token in ours.pop("added_tokens")}
    known = {token["content"]: token for token in theirs.pop("added_tokens")}
    if ours != theirs or any(added.get(content) != token for content, token in known.items()):
        return None
    new = {content: token for content, token in added.items() if content not in known}
    return {content: int(token["id"]) for content, token in new.items()} if all(t["special"] for t in new.values()) else None


def _normal_form(tokenizer: ChatTokenizer) -> dict[str, Any]:
    """tokenizer.json as the library writes it, whichever program wrote the file."""
    found: dict[str, Any] = json.loads(Tokenizer.from_str(tokenizer.source).to_str())
    return found


def _described(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": True}
