"""Strings that nobody may type: special tokens, and what a template puts around turns.

guard = Guard(tokenizer, guarded={"<|im_end|>": 2}, added=tokenizer.get_added_tokens_decoder())
guard.escape("say <|im_end|>")            # "say < |im_end|>"
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tokenizers import AddedToken, Tokenizer

from .budget import TemplateRefusedError
from .pieces import encoding_of
from .replies import any_of
from .template import ChatTemplate


class Guard:
    """guarded: ids of the tokens that cannot be typed. added: all tokens added to the vocabulary, by id."""

    def __init__(self, tokenizer: Tokenizer, guarded: Collection[int], added: Mapping[int, AddedToken]) -> None:
        tokens = [added[i] for i in guarded if i in added]
        self._tokenizer = tokenizer
        self._ids = frozenset(i for i in guarded if i in added)
        self._pattern = any_of(token.content for token in tokens)
        self._firsts = frozenset(token.content[:1] for token in tokens)
        self._matches_after_normalizing = tokenizer.normalizer is not None and any(t.normalized for t in tokens)

    def escape(self, text: str) -> str:
        """Insert a space after the first character of guarded strings."""
        if "\ue000" in text or "\ue001" in text:  # the template's own markers
            text = text.replace("\ue000", "\ufffd").replace("\ue001", "\ufffd")
        if any(map(text.__contains__, self._firsts)):
            text = self._pattern.sub(lambda match: match[0][0] + " " + match[0][1:], text)
        return self._break_up(text) if self._matches_after_normalizing else text

    def _break_up(self, text: str) -> str:
        """The same for strings that become a guarded token only when the tokenizer normalises them (`<|IM_END|>`)."""
        for attempt in range(len(text) + 2):
            piece = encoding_of(self._tokenizer, text)
            found = [span for i, span in zip(piece.ids, piece.offsets, strict=True) if i in self._ids]
            if not found:
                break
            for start, end in reversed(found):
                # A normaliser may drop the space again, and one character may stand for the whole token.
                keep = text[start] + " " if attempt == 0 and end - start > 1 else "\ufffd"
                text = text[:start] + keep + text[start + 1 :]
        return text


def template_tokens(template: ChatTemplate | None, known: Collection[int], added: Mapping[int, AddedToken]) -> set[int]:
    """Ids of the tokens that a template puts around a user's turn, and of the one that opens a reply.

    known: tokens that are guarded anyway. Others stay typable: `<think>` is an added token, too, and part of many replies.
    """
    plain = {t.content: i for i, t in added.items() if i not in known and t.content.strip()}
    if template is None or not plain:
        return set()
    user = [{"role": "user", "content": "\ue0000\ue001"}]
    try:
        before, after = template.render(user), template.render(user, add_generation_prompt=True)
    except TemplateRefusedError:  # it needs other messages; the error comes where it is used
        return set()
    opening = after[len(before) :] if after.startswith(before) else ""
    first = any_of(t.content for t in added.values() if t.content.strip()).search(opening)
    found = [*any_of(plain).finditer(before), *([first] if first else [])]
    return {plain[match[0]] for match in found if match[0] in plain}
