"""Token ids in, text out, piece by piece: what has been released never changes.

text = TextStream(tokenizer.decode, stop_strings=["\\nUser:"])
for token_id in ids: print(text.push(token_id), end="")
print(text.finish())
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from chatmill.config import ConfigError

WINDOW = 32  # tokens decoded again per step at most, so that a long reply costs linear time


class TextStream:
    """Ids in, text out, safe to show at once.

    push(id) returns the text that is certain by now; finish() the rest. Held back: a last character whose UTF-8
    bytes are incomplete, and any tail that could still grow into a stop string. `stopped` turns True when one
    is met: nothing of it, and nothing after it, is ever released.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = ()) -> None:
        if any(not s for s in stop_strings):
            raise ConfigError("stop_strings: an empty string would stop every reply at once; remove it.")
        self._decode = decode
        self._stops = tuple(stop_strings)
        self._ids: list[int] = []
        self._done = 0  # characters of decode(self._ids) that were taken over
        self._held = ""  # decoded, but perhaps the start of a stop string
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; often empty."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        # An unfinished UTF-8 sequence decodes to exactly one replacement character, at the very end.
        end = len(text) - text.endswith("\ufffd")
        piece, self._done = text[self._done : end], max(self._done, end)
        if len(self._ids) > WINDOW and end == len(text):
            # Some tokens stay as left context: the first token of a text may be decoded without its leading space.
            self._ids = self._ids[-WINDOW // 4 :]
            self._done = len(self._decode(self._ids))
        return self._release(piece)

    def finish(self) -> str:
        """Whatever was still held back: after this the text is complete."""
        if self.stopped:
            return ""
        rest = self._decode(self._ids)[self._done :] if self._ids else ""
        self._ids, self._done = [], 0
        piece = self._release(rest)
        if not self.stopped:
            self.text += self._held
            piece, self._held = piece + self._held, ""
        return piece

    def _release(self, piece: str) -> str:
        pending = self._held + piece
        found = [at for at in (pending.find(s) for s in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            out = pending[: min(found)]
        else:
            keep = _possible_start(pending, self._stops)
            out, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += out
        return out


def _possible_start(text: str, stops: Sequence[str]) -> int:
    """Length of the longest tail of text that is a proper beginning of a stop string."""
    longest = max((len(s) - 1 for s in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stops):
            return size
    return 0
