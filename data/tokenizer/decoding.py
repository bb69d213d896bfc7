"""Ids back to text as transformers' `decode` does it, and how much of a text that still grows is certain.

    decoding = Decoding(tokenizer, config)
    decoding.text(ids)                                    # the whole text
    growing = GrowingText(decoding)                       # the same text, id by id
    for i in ids: print(growing.push(i), end="")
    print(growing.rest())

A piece of text is certain when no later id can change it. What may still change depends on the decoder of tokenizer.json:

    ByteLevel       the last character, while its UTF-8 bytes are incomplete
    ByteFallback    a whole run of byte tokens (`<0xF0><0x9F>…`): one invalid byte turns each byte of the run into U+FFFD
    clean-up        blanks before punctuation, which `clean_up_tokenization_spaces` removes
    anything else   nothing, for the decoders listed in _LOCAL; with others no text is certain before the end
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

WINDOW = 32  # ids decoded again per step, so that a long reply costs linear time
CONTEXT = 8  # of them, kept on the left: the first token of a text may be decoded without its leading blank
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Each looks at one token at a time, whatever follows. (BPEDecoder does not: it decodes the last token in its own way.)
_LOCAL = frozenset(("ByteLevel", "ByteFallback", "Fuse", "Strip", "Replace", "Metaspace", "WordPiece"))
_WHOLE = ("Fuse", "ByteLevel")  # after these, the text is one token
# transformers' PreTrainedTokenizerBase.clean_up_tokenization: in this order. Only blanks are removed.
_CLEAN = {
    " .": ".",
    " ?": "?",
    " !": "!",
    " ,": ",",
    " ' ": "'",
    " n't": "n't",
    " 'm": "'m",
    " 's": "'s",
    " 've": "'ve",
    " 're": "'re",
}
_CLEAN_EDGE = " 'nvr"  # characters after which one of these may go on


class Decoding:
    """How one tokenizer turns ids into text. config: its tokenizer_config.json."""

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        steps = _steps(json.loads(tokenizer.to_str())["decoder"])
        kinds = [step["type"] for step in steps]
        self.has_byte_tokens = "ByteFallback" in kinds
        self.is_byte_level = "ByteLevel" in kinds
        self.can_stream = _is_local(steps)
        self.cleans_up = _cleans_up(tokenizer, config)
        added = tokenizer.get_added_tokens_decoder()
        self._added = frozenset(added)
        named = {name: tokenizer.token_to_id(content) for name in _NAMES if (content := token_content(config.get(name)))}
        self.skipped = frozenset(i for i, token in added.items() if token.special) | frozenset(
            i for i in named.values() if i is not None and i not in added
        )
        self._word = next((i for i in range(tokenizer.get_vocab_size()) if self._is_word(i)), None)

    def text(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids; those that the tokenizer lacks are left out."""
        text = self.raw([int(i) for i in ids if not (skip_special and int(i) in self.skipped)])
        return clean_up(text) if self.cleans_up else text

    def raw(self, ids: Sequence[int]) -> str:
        """Text before the clean-up."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def is_byte(self, token_id: int) -> bool:
        """Is this the token of one byte, next to which other bytes count?"""
        return self.has_byte_tokens and _BYTE.fullmatch(self._tokenizer.id_to_token(token_id) or "") is not None

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token inside a text: with its leading blank, and where it is only part of a character."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.has_byte_tokens and (match := _BYTE.fullmatch(token)):
            return bytes.fromhex(match[1])
        if self.is_byte_level:
            values = [_BYTE_LEVEL.get(character) for character in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        left = [] if self._word is None else [self._word]
        return self.raw([*left, token_id])[len(self.raw(left)) :].encode("utf-8", "replace")

    def unfinished(self, ids: Sequence[int]) -> bytes:
        """The bytes at the end of ids that begin a character whose other bytes are missing."""
        if not (self.is_byte_level or self.has_byte_tokens):
            return b""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(map(self.token_bytes, ids[-4:])))  # four bytes are the longest character
        return decoder.getstate()[0]

    def shown(self, unfinished: bytes) -> int:
        """How many U+FFFD stand for an unfinished character."""
        return min(1, len(unfinished)) if self.is_byte_level else len(unfinished)

    def exists(self, token_id: int) -> bool:
        """Does the tokenizer know this id? A model may have more rows than its tokenizer has tokens."""
        return self._tokenizer.id_to_token(token_id) is not None

    def _is_word(self, token_id: int) -> bool:
        if token_id in self._added or self.is_byte(token_id):
            return False
        text = self.raw([token_id])
        return text.isalnum() and text.isascii()


class GrowingText:
    """Text of ids that come one after the other.

    skip_special: leave out special tokens. before: ids that the text continues, whose own text is not repeated; without
    them the first token loses its leading blank where the tokenizer's decoder says so.
    """

    def __init__(self, decoding: Decoding, *, skip_special: bool = True, before: Sequence[int] = ()) -> None:
        self._decoding, self._skip = decoding, skip_special
        self._ids: list[int] = []  # the newest, decoded again at every step
        self._done = 0  # characters of their raw text that were taken over
        self._raw = ""  # raw text that the clean-up may still change
        self._ids = self._tail([i for i in before if decoding.exists(i) and not (skip_special and i in decoding.skipped)])
        self._done = len(decoding.raw(self._ids)) - decoding.shown(decoding.unfinished(self._ids))

    def push(self, token_id: int) -> str:
        """Text that became certain with this id; often empty."""
        self._push(token_id)
        if not self._decoding.cleans_up:
            text, self._raw = self._raw, ""
            return text
        cut = next((at for at in range(len(self._raw), 0, -1) if self._raw[at - 1] not in _CLEAN_EDGE), 0)
        text, self._raw = clean_up(self._raw[:cut]), self._raw[cut:]
        return text

    def rest(self) -> str:
        """What follows the certain text if no more ids come."""
        text = self._raw + self._decoding.raw(self._ids)[self._done :]
        return clean_up(text) if self._decoding.cleans_up else text

    def overlap(self, token_id: int) -> int:
        """How many U+FFFD at the end of rest() this id would replace, because it goes on with an unfinished character."""
        begun = self._decoding.unfinished(self._ids)
        try:
            codecs.getincrementaldecoder("utf-8")().decode(begun + self._decoding.token_bytes(token_id)[:1])
        except UnicodeDecodeError:
            return 0
        return self._decoding.shown(begun)

    def close(self) -> None:
        """Nothing follows any more: rest() is empty from now on."""
        self._ids, self._done, self._raw = [], 0, ""

    def _tail(self, ids: list[int]) -> list[int]:
        """The last of many ids: enough that those to come are decoded as they would be after all of them."""
        decoding, count = self._decoding, 2 * WINDOW
        while decoding.can_stream and count < len(ids):
            start = len(ids) - count
            while start and decoding.is_byte(ids[start - 1]):  # bytes count together
                start -= 1
            if decoding.raw(ids[start:]).strip(" \n\ufffd"):
                return ids[start:]
            count *= 2
        return ids

    def _push(self, token_id: int) -> None:
        decoding = self._decoding
        if (self._skip and token_id in decoding.skipped) or not decoding.exists(token_id):
            return
        self._ids.append(token_id)
        if not decoding.can_stream or decoding.is_byte(token_id):
            return
        text = decoding.raw(self._ids)
        # An unfinished UTF-8 sequence decodes to exactly one replacement character, at the very end.
        end = len(text) - (decoding.is_byte_level and text.endswith("\ufffd"))
        if end > self._done:
            self._raw += text[self._done : end]
            self._done = end
        if end == len(text) and len(self._ids) > WINDOW:
            self._shorten()

    def _shorten(self) -> None:
        """Keep enough ids on the left that the next ones are decoded as they would be after the whole text."""
        for count in range(CONTEXT, len(self._ids), CONTEXT):
            text = self._decoding.raw(self._ids[-count:])
            if text.strip():
                self._ids = self._ids[-count:]
                self._done = len(text)
                return


def clean_up(text: str) -> str:
    """Without the blanks that transformers' clean_up_tokenization removes."""
    for found, kept in _CLEAN.items():
        text = text.replace(found, kept)
    return text


def token_content(value: Any) -> str | None:
    """Token text of a tokenizer_config entry, which is a string or {"content": …}."""
    return value.get("content") if isinstance(value, dict) else value


def _cleans_up(tokenizer: Tokenizer, config: Mapping[str, Any]) -> bool:
    """As transformers decides it: a BPE vocabulary is left alone unless a setting of its own insists."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    is_bpe = type(tokenizer.model).__name__ == "BPE"
    return bool(config.get("clean_up_tokenization_spaces", False)) and (not is_bpe or bool(config.get(forced, False)))


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The decoders of a sequence, one after the other."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


def _is_local(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Does text stay as it is when more tokens follow, but for what GrowingText holds back?"""
    is_whole = False
    for step in steps:
        if step["type"] not in _LOCAL or (is_whole and step["type"] in ("ByteFallback", "Metaspace", "WordPiece")):
            return False
        if step["type"] == "Replace" and is_whole and len(step["pattern"].get("String", "")) != 1:
            return False  # may match across tokens
        is_whole = is_whole or step["type"] in _WHOLE
    return True


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for 256 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()
