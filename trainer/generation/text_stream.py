"""Token ids in, text out, piece by piece: what has been released never changes.

text = TextStream(tokenizer, stop_strings=["\\nUser:"])
for token_id in ids: print(text.push(token_id), end="")
print(text.finish())

The text is that of the whole reply decoded at once, as transformers' `decode(ids, skip_special_tokens=True)` decodes it
(data/tokenizer/decoding.py), cut at the first stop string.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from chatmill.config import ConfigError

from ...data.tokenizer.decoding import GrowingText
from ...data.tokenizer.tokenizer import ChatTokenizer


class TextStream:
    """Ids in, text out, safe to show at once.

    push(id) returns the text that is certain by now; finish() the rest. Held back: characters that later ids may still change,
    and any tail that could still grow into a stop string. `stopped` turns True with the first id after which the text contains
    a stop string, or with a special token that is one: nothing of it, and nothing after it, is ever released.

    min_tokens: a stop string counts only if it ends behind the text of that many ids, as in vLLM.
    skip_special: leave out special tokens. before: ids of a text that the reply continues (none in a chat: a turn begins anew).
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        stop_strings: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        skip_special: bool = True,
        before: Sequence[int] = (),
    ) -> None:
        if any(not s for s in stop_strings):
            raise ConfigError("stop_strings: an empty string would stop every reply at once; remove it.")
        self._growing = GrowingText(tokenizer.decoding, skip_special=skip_special, before=before)
        self._stops = tuple(stop_strings)
        self._stop_tokens = {tokenizer.special[stop] for stop in self._stops if skip_special and stop in tokenizer.special}
        self._held = ""  # certain, but perhaps the start of a stop string
        self._left = min_tokens  # ids to come whose text cannot stop the reply
        self._early = ""  # the text that the first min_tokens ids had
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; often empty."""
        if self.stopped:
            return ""
        is_early, self._left = self._left > 0, max(0, self._left - 1)
        if token_id in self._stop_tokens and not is_early:
            last = self.finish()
            self.stopped = True
            return last
        self._held += self._growing.push(token_id)
        # A stop string may end with text that is not certain yet; if the reply ends here, it is.
        rest = self._growing.rest() if self._stops else ""
        if is_early:
            self._early = self.text + self._held + rest if self._left == 0 else ""
        elif (piece := self._cut(self._held + rest.rstrip("\ufffd"))) is not None:
            return piece
        return self._release(len(self._held) - _possible_start(self._held, self._stops))

    def finish(self) -> str:
        """Whatever was still held back: after this the text is complete."""
        if self.stopped:
            return ""
        self._held += self._growing.rest()
        self._growing.close()
        piece = self._cut(self._held) if self._left == 0 else None
        return self._release(len(self._held)) if piece is None else piece

    def _cut(self, text: str) -> str | None:
        """What precedes the first stop string in the text that was not released; None if it holds none."""
        early = 0  # characters of the text that the first min_tokens ids had, and that later ones did not change
        if len(self.text) < len(self._early):
            early = _shared(self._early[len(self.text) :], text)
        found = [at for stop in self._stops if (at := text.find(stop, max(0, early + 1 - len(stop)))) >= 0]
        if not found:
            return None
        self.stopped, self._held = True, text
        piece = self._release(min(found))
        self._held = ""
        return piece

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece


def _shared(first: str, second: str) -> int:
    """Length of the longest beginning that both texts have."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def _possible_start(text: str, stops: Sequence[str]) -> int:
    """Length of the longest tail of text that is a proper beginning of a stop string."""
    longest = max((len(s) - 1 for s in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stops):
            return size
    return 0


class TokenStarts:
    """Where the text of each token begins in a text that grows by tokens, in characters.

    A token that is only part of a character begins where the character does. before, skip_special: as for TextStream.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, skip_special: bool = True, before: Sequence[int] = ()) -> None:
        self._growing = GrowingText(tokenizer.decoding, skip_special=skip_special, before=before)
        self._done = 0

    def add(self, ids: Iterable[int]) -> list[int]:
        """The starts of the next tokens."""
        found = []
        for i in ids:
            found.append(self._done + len(self._growing.rest()) - self._growing.overlap(i))
            self._done += len(self._growing.push(i))
        return found
