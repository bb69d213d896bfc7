"""The stages of a data build as functions of one chunk: what the worker processes run.

    import_file -> chunks of conversations; prepare_chunk: clean, pair, hash; tokenize_chunk -> ids and masks

Each reads its input files, writes its output files durably, and returns its ledger(s) as JSON. Nothing else leaves a worker.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError
from chatmill.files import write_durably

from ..cleaning.clean import Cleaner
from ..conversation import Conversation, TokenizedDialogue, dump_line, load_line, part_uid
from ..importers.registry import read_file
from ..ledger import Ledger
from ..report.text_counts import TextCounts
from ..samples.decontaminate import contaminated
from ..samples.dedup import text_hash
from ..samples.identity import began, identified, size_of
from ..samples.near_duplicates import dialogue_text, signatures
from ..samples.pair import make_samples
from ..samples.per_reply import per_reply
from ..samples.split import author_hashes, key_hash, thread_key
from ..tokenizer.calls.messages import has_structure, not_printed
from ..tokenizer.tokenizer import ChatTokenizer
from .work_folder import WorkFolder, load_arrays, save_arrays

CHUNK_BYTES = 2 << 20
BATCH_CHARS = 1 << 17  # encoded together


@dataclass(frozen=True)
class ImportFile:
    """Task `f00007`: raw file 7 to chunks `c00007-00000.jsonl` … of about CHUNK_BYTES."""

    work: WorkFolder

    def __call__(self, name: str) -> dict[str, Any]:
        number = int(name[1:])
        source, file = self.work.files[number]
        ledger, chunks = Ledger("conversations"), list[str]()
        lines, size = list[bytes](), 0

        def flush() -> None:
            nonlocal lines, size
            chunk = f"c{number:05d}-{len(chunks):05d}"
            write_durably(self.work.path("import", f"{chunk}.jsonl"), b"".join(lines))
            chunks.append(chunk)
            lines, size = [], 0

        for conversation in read_file(file, self.work.recipe.sources[source], ledger):
            if any("\ufffd" in turn.content for turn in conversation.turns):
                ledger.change("with characters that could not be decoded (another sources.encoding?)", conversation.origin)
            lines.append(encode_line(identified(conversation)))
            size += len(lines[-1])
            if size >= CHUNK_BYTES:
                flush()
        if lines:
            flush()
        return {"chunks": chunks, "import": ledger.to_dict(), "speakers": ledger.speakers}


@dataclass(frozen=True)
class PrepareChunk:
    """Task `c…`: clean and pair one chunk of conversations, and hash every sample for the stages that see all of them."""

    work: WorkFolder

    def __call__(self, name: str) -> dict[str, Any]:
        recipe = self.work.recipe
        cleaner, clean, pair = Cleaner(recipe.clean), Ledger("conversations"), Ledger("samples")
        lines, exact, thread, authors, author_counts = list[bytes](), list[int](), list[int](), list[int](), list[int]()
        texts, foul, uids, sizes, times = list[str](), list[bool](), list[str](), list[int](), list[float]()
        known = self.work.benchmarks()
        tokenizer = load_tokenizer(self.work.folder / "template")
        for conversation in read_lines(self.work.path("import", f"{name}.jsonl")):
            cleaned = cleaner.apply(conversation, clean)
            if cleaned is None:
                continue
            for sample in (part for s in make_samples(cleaned, recipe.pair, pair) for part in per_reply(s, tokenizer, pair)):
                lines.append(encode_line(sample))
                uids.append(sample.uid)
                sizes.append(size_of(sample))
                times.append(math.inf if began(sample) is None else float(began(sample) or 0.0))
                exact.append(text_hash(sample))
                thread.append(key_hash(thread_key(sample)))
                found = author_hashes(sample)
                authors += found
                author_counts.append(len(found))
                foul.append(known is not None and contaminated(sample, known, recipe.dedup.overlap_words))
                if recipe.dedup.near is not None:
                    texts.append(dialogue_text(sample))
        write_durably(self.work.path("prepare", f"{name}.jsonl"), b"".join(lines))
        near = {} if recipe.dedup.near is None else {"signature": signatures(texts)}
        save_arrays(
            self.work.path("prepare", f"{name}.npz"),
            uid=np.array(uids, dtype="S32"),
            size=np.array(sizes, dtype=np.int64),
            time=np.array(times, dtype=np.float64),
            exact=np.array(exact, dtype=np.uint64),
            thread=np.array(thread, dtype=np.uint64),
            authors=np.array(authors, dtype=np.uint64),
            author_counts=np.array(author_counts, dtype=np.int64),
            contaminated=np.array(foul, dtype=bool),
            **near,
        )
        return {"samples": len(lines), "clean": clean.to_dict(), "pair": pair.to_dict()}


@dataclass(frozen=True)
class TokenizeChunk:
    """Task `c…`: ids and masks of the samples that stay. side: 0 train, 1 validation, 2 dropped before."""

    work: WorkFolder

    def __call__(self, name: str) -> dict[str, Any]:
        tokenizer = load_tokenizer(self.work.folder / "tokenizer")
        assigned = load_arrays(self.work.path("assign", f"{name}.npz"))
        sides, copies = assigned["side"], assigned["copy"].tolist()
        ledger, texts = Ledger("samples"), (TextCounts(), TextCounts())
        ids, masks, rows = list[NDArray[np.uint32]](), list[NDArray[np.bool_]](), list[list[Any]]()
        for number, side, conversation, dialogue in self._encoded(name, tokenizer, sides.tolist()):
            if isinstance(dialogue, ConfigError):
                ledger.drop(_reason(dialogue), f"{conversation.origin}: {dialogue}")
                continue
            ids.append(dialogue.ids)
            masks.append(dialogue.loss_mask)
            uid = part_uid(conversation.uid, -copies[number]) if copies[number] else conversation.uid
            rows.append([number, side, uid, conversation.source, conversation.origin])
            for turn in conversation.turns:
                if tokenizer.escape_special(turn.content) != turn.content:
                    ledger.change("special-token string escaped", f"{conversation.origin}: {turn.content}")
            _note_unused(conversation, tokenizer, ledger)
            texts[side].add(conversation)
            ledger.keep()
        save_arrays(
            self.work.path("tokenize", f"{name}.npz"),
            ids=np.concatenate([np.zeros(0, np.uint32), *ids]),
            mask=np.packbits(np.concatenate([np.zeros(0, np.bool_), *masks])),
            lengths=np.array([len(x) for x in ids], dtype=np.int64),
        )
        write_durably(self.work.path("tokenize", f"{name}.json"), json.dumps(rows).encode())
        return {"tokenize": ledger.to_dict(), "texts": [counts.to_dict() for counts in texts]}

    def _encoded(
        self, name: str, tokenizer: ChatTokenizer, sides: list[int]
    ) -> Iterator[tuple[int, int, Conversation, TokenizedDialogue | ConfigError]]:
        """(line, side, sample, its ids and mask or why there are none) of the samples that stay, encoded in batches."""
        samples = enumerate(zip(sides, read_lines(self.work.path("prepare", f"{name}.jsonl")), strict=True))
        left = ((number, side, conversation) for number, (side, conversation) in samples if side != 2)
        while batch := _some(left, BATCH_CHARS):
            found = tokenizer.encode_dialogues(conversation for _, _, conversation in batch)
            yield from ((*sample, dialogue) for sample, dialogue in zip(batch, found, strict=True))


def _some(samples: Iterator[tuple[int, int, Conversation]], chars: int) -> list[tuple[int, int, Conversation]]:
    """The next samples, of so many characters or a little more; none at the end."""
    batch = list[tuple[int, int, Conversation]]()
    for sample in samples:
        batch.append(sample)
        chars -= sum(len(turn.content) for turn in sample[2].turns)
        if chars <= 0:
            break
    return batch


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer of a folder, read once per process: a large vocabulary takes longer to load than a chunk to encode."""
    return _tokenizer(str(folder), (folder / "tokenizer.json").stat().st_mtime_ns)


def _note_unused(conversation: Conversation, tokenizer: ChatTokenizer, ledger: Ledger) -> None:
    """Count what the chat template does not print, or not as it is meant; the dialogue shards keep it."""
    thoughts = sum(turn.reasoning is not None for turn in conversation.turns)
    if not thoughts and not has_structure(conversation):
        return
    for what, often in not_printed(conversation, tokenizer.abilities):
        ledger.change(what, conversation.origin, often)
    if thoughts and (unsaid := tokenizer.unsaid_thoughts(conversation)):
        ledger.change(
            "thought beside a learned reply kept, not learned: the chat template does not print it", conversation.origin, unsaid
        )


@lru_cache(maxsize=1)
def _tokenizer(folder: str, written_ns: int) -> ChatTokenizer:
    return ChatTokenizer.load(folder)


def _reason(error: ConfigError) -> str:
    text = str(error).split("\n")[0]
    return text.partition(": ")[2] if text.startswith("dialogue ") else text


def encode_line(conversation: Conversation) -> bytes:
    """A JSON line in UTF-8; a lone surrogate, which UTF-8 cannot say, becomes U+FFFD."""
    line = dump_line(conversation)
    try:
        return line.encode()
    except UnicodeEncodeError:
        return line.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()


def read_lines(path: Path) -> Iterator[Conversation]:
    """Conversations of a chunk."""
    with path.open("rb") as file:
        for line in file:
            yield load_line(line)
