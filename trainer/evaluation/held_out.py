"""Held-out dialogues as an evaluation reads them: tokenised again with the checkpoint's own tokenizer, turn by turn.

    dialogues = read_held_out(["corpora/chitchat"], tokenizer, split="validation", limit=2048)

This keeps the turns apart, which token shards do not, and lets a model be measured on data that was built with another
tokenizer. With the tokenizer of the data, tokens and mask are those of the shards. Of a preference pair, the dialogue with the
chosen reply is read.

Shapes: L tokens of a dialogue.
"""

from __future__ import annotations

import heapq
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError

from ...data.conversation import Conversation
from ...data.preference import without_rejected
from ...data.samples.per_reply import in_pieces
from ...data.shards.dialogues import present_dialogues
from ...data.tokenizer.tokenizer import ChatTokenizer

LEAST = 8  # dialogues of a sample: an interval of fewer says nothing
SHORTEST = 16  # tokens of a dialogue, about


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One dialogue, or one of its samples where the template asks for one per reply; these have the dialogue's uid.

    turns: the turn of each token, -1 for the template's own. text_bytes: UTF-8 bytes of the supervised text. cut: tokens beyond
    the limit, which were left out. since: the first turn that no earlier sample of the dialogue holds.
    """

    uid: str
    source: str  # the data-set folder
    conversation: Conversation
    ids: NDArray[np.int64]  # (L,)
    loss_mask: NDArray[np.bool_]  # (L,)
    turns: NDArray[np.int32]  # (L,)
    text_bytes: int
    cut: int
    since: int = 0

    def replies(self) -> list[int]:
        """Indices of the assistant turns that are supervised and whole."""
        if self.conversation.is_document:
            return []
        return sorted(set(self.turns[self.loss_mask].tolist()) - ({int(self.turns[-1])} if self.cut else set()))

    def reply_ids(self, turn: int) -> list[int]:
        """The tokens of a reply, its end-of-turn token included."""
        picked: list[int] = self.ids[self.loss_mask & (self.turns == turn)].tolist()
        return picked

    def prompt_parts(self, tokenizer: ChatTokenizer, before: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(messages of a prompt, variables of the template): the turns before one, and the tools."""
        messages, more = tokenizer.prompt_parts(self.conversation)
        return messages[:before], more


def read_held_out(
    folders: Sequence[str | Path],
    tokenizer: ChatTokenizer,
    *,
    split: str = "validation",
    limit: int,
    max_dialogues: int | None = None,
    only: Collection[str] | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
) -> list[HeldOut]:
    """The first max_dialogues of each folder's split, in its order; at most `limit` tokens of each. Raises ConfigError.

    A dialogue in several folders counts once. only: the dialogues with these uids. max_tokens: a random sample of dialogues,
    drawn by seed, that together have about so many tokens, the same share of each folder; at least LEAST of each.
    """
    found: list[HeldOut] = []
    seen: set[str] = set()
    for folder in folders:
        taken = tokens = 0
        room = None if max_tokens is None else max_tokens // len(folders)
        parts = list[tuple[int, list[HeldOut]]]()
        for place, conversation in _in_turn(Path(folder), split, room, seed):
            enough = room is not None and taken >= LEAST and tokens >= room
            if enough or (max_dialogues is not None and taken >= max_dialogues):
                break
            if conversation.uid in seen or (only is not None and conversation.uid not in only):
                continue
            seen.add(conversation.uid)
            samples = samples_of(conversation, tokenizer, limit, str(folder))
            parts.append((place, samples))
            taken += bool(samples)
            tokens += sum(len(sample.ids) for sample in samples)
        found += [sample for _, samples in sorted(parts, key=lambda part: part[0]) for sample in samples]
    if not found:
        raise ConfigError(
            f"{', '.join(map(str, folders))}: the split {split} holds no supervised token; nothing can be measured."
        )
    return found


def _in_turn(folder: Path, split: str, room: int | None, seed: int) -> Iterator[tuple[int, Conversation]]:
    """(place in the split, conversation) in the split's order; for a sample of `room` tokens in an order drawn by seed."""
    found = enumerate(_conversations(folder, split))
    if room is None:
        return found
    most = max(LEAST, room // SHORTEST)  # bounds the memory

    def lot(one: tuple[int, Conversation]) -> tuple[int, int]:
        return zlib.crc32(f"{seed} sample {one[1].uid}".encode()), one[0]

    return iter(heapq.nsmallest(most, found, key=lot))


def count_held_out(folders: Sequence[str | Path], split: str) -> int:
    """Dialogues of a split in all folders, by their manifests; 0 where one is missing."""
    try:
        manifests = [json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8")) for folder in folders]
        return sum(int(manifest["splits"][split]["dialogues"]) for manifest in manifests)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def samples_of(conversation: Conversation, tokenizer: ChatTokenizer, limit: int, source: str = "") -> list[HeldOut]:
    """A conversation as the samples that its template asks for; those without a supervised token are left out."""
    found, since = list[HeldOut](), 0
    for part in in_pieces(without_rejected(conversation), tokenizer):
        sample = replace(held_out(part, tokenizer, limit, source), uid=conversation.uid, since=since)
        since = len(part.turns)
        if sample.loss_mask.any():
            found.append(sample)
    return found


def held_out(conversation: Conversation, tokenizer: ChatTokenizer, limit: int, source: str = "") -> HeldOut:
    """A conversation tokenised for measuring."""
    conversation = without_rejected(conversation)
    dialogue, turns = tokenizer.encode_turns(conversation)
    ids, mask, whole = dialogue.ids[:limit].astype(np.int64), dialogue.loss_mask[:limit], len(dialogue.ids)
    turns = turns[:limit]
    size = 0
    for turn in np.unique(turns[mask]):
        # of a turn that is cut, only the measured part counts; special tokens are not text
        kept = mask & (turns == turn)
        if whole > limit and turn == turns[-1]:
            size += _spoken_bytes(tokenizer, ids[kept].tolist(), conversation.turns[turn].content)
        else:
            said = conversation.turns[turn]
            thought = said.reasoning if said.reasoning and said.thought_loss else ""
            size += len((thought + said.content).encode("utf-8", "replace"))
    return HeldOut(conversation.uid, source, conversation, ids, mask, turns, size, max(0, whole - limit))


def _spoken_bytes(tokenizer: ChatTokenizer, ids: Sequence[int], content: str) -> int:
    """UTF-8 bytes of the tokens with which a turn begins, without the blank that some tokenizers put before a text."""
    said = b"".join(tokenizer.decoding.token_bytes(i) for i in ids if i not in tokenizer.decoding.skipped)
    return len(said) - (said.startswith(b" ") and not content.startswith(" "))


def choose_turn(samples: Sequence[HeldOut], seed: int) -> tuple[HeldOut, int] | None:
    """One supervised reply of a dialogue, given as its samples; the same for every model, machine and order. None: it has none.

    Never the first turn, which answers nothing.
    """
    turns = [(sample, turn) for sample in samples for turn in sample.replies() if turn > 0]
    if not turns:
        return None
    return turns[zlib.crc32(f"{seed} turn {samples[0].uid}".encode()) % len(turns)]


def _conversations(folder: Path, split: str) -> Iterator[Conversation]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        _ = manifest["dialogues"][split], manifest["splits"][split]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{folder} holds no dialogues of a split {split!r}: expected a data-set folder made by `chatmill data build`.\n"
            "If the data set lies elsewhere, name it: --data FOLDER"
        ) from None
    return present_dialogues(folder, manifest, split)
