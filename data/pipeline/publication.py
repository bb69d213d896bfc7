"""Write what the stages made as a data-set folder, certify it, and put it in its place in one step.

    public = publish(made, work, chunks, folder, base, progress)

With a base, the new folder holds the base's shards (hard links, where the file system has them) and new shards after them;
nothing of the base is written again. A kill leaves the old folder or the new one, and readers of either go on: shards keep
names and bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError
from chatmill.files import naming, publish_folder, sha256_file, sync, write_durably
from chatmill.progress import Report

from ..conversation import Conversation, TokenizedDialogue, load_line
from ..ledger import Ledger
from ..report.page import html_report
from ..report.text_counts import TextCounts
from ..samples.dedup import REFUSED
from ..samples.repeats import repeats
from ..samples.split import Facts, certificate
from ..samples.table import SampleTable
from ..shards.dataset import TokenDataset
from ..shards.dialogues import DialogueWriter, read_dialogues
from ..shards.index import ShardIndex
from ..shards.manifest import COLLECTED_VERSION, FORMAT_VERSION, MANIFEST, totals
from ..shards.writer import ShardWriter
from ..tokenizer.tokenizer import ChatTokenizer
from .existing import SAMPLES, Existing
from .inputs import Sources, recipe_facts
from .stages import encode_line
from .work_folder import WorkFolder, load_arrays, save_arrays

SPLITS = ("train", "validation")


@dataclass
class Made:
    """What the stages made.

    speakers: by source, in chats whose roles nothing but the order of speaking decides (data/importers/speakers.py).
    table: with the base's rows first; replaced: {row of the base: new row in its place}; stages, texts,
    seconds: for the report.
    """

    sources: Sources
    speakers: list[dict[str, dict[str, int]]]
    tokenizer: ChatTokenizer
    table: SampleTable
    replaced: dict[int, int]
    stages: list[dict[str, Any]]
    texts: dict[str, Any]
    seconds: dict[str, float]


def publish(
    made: Made, work: WorkFolder, chunks: list[str], out: Path, base: Existing | None, progress: Report
) -> dict[str, Any]:
    """Write, certify and publish. Returns {"splits", "certificate", "repeats", "texts", "written", and for a base "added"}."""
    recipe, table, started = work.recipe, made.table, time.perf_counter()
    final = work.folder / "final"
    if final.exists():
        shutil.rmtree(final)
    final.mkdir()
    before = {split: Before.of(base, split) for split in SPLITS}
    if base is not None:
        _link(base, final)
    hashes = {"tokenizer_sha256": made.tokenizer.tokenizer_sha256, "template_sha256": made.tokenizer.template_sha256}
    shard_bytes = int(recipe.shards.shard_mb * (1 << 20))
    meta = {**hashes, "recipe_sha256": made.sources.digest, "vocab_size": made.tokenizer.vocab_size}
    tokens = [
        ShardWriter(
            final, split, vocab_size=made.tokenizer.vocab_size, meta=meta, block_dialogues=recipe.shards.block_dialogues,
            shard_bytes=shard_bytes, first=len(before[split].shards),
        )
        for split in SPLITS
    ]  # fmt: skip
    texts = [DialogueWriter(final, split, shard_bytes, len(before[split].dialogues)) for split in SPLITS]
    places = _copy(made, work, chunks, tokens, texts, [before[split].count for split in SPLITS], progress)
    written, generation = _settle(made, base, places), len(base.generations) if base is not None else 0
    gone = _gone(made, base, before, generation)
    shards = {split: [*before[split].shards, *writer.close()] for split, writer in zip(SPLITS, tokens, strict=True)}
    splits = {split: totals(shards[split], gone[split]) for split in SPLITS}
    dialogues = {split: [*before[split].dialogues, *writer.close()] for split, writer in zip(SPLITS, texts, strict=True)}
    near = recipe.dedup.near
    proof = certificate(*_facts(table), recipe.split.by_author, near.threshold if near else None)
    if not proof["valid"]:  # an invariant of the placing; never publish without it
        raise ConfigError(f"data {recipe.name}: the split leaks: {proof['shared']}")
    if base is None:
        with naming(final / "tokenizer"):
            made.tokenizer.save(final / "tokenizer")
    public = {key: splits[key] | {"shards": len(splits[key]["shards"])} for key in splits}
    for part in public.values():
        part.pop("dropped", None)
    added = {"files": [record["file"] for record in made.sources.read], **written}
    report = _report(recipe.name, made, base, public, proof, written, added)
    save_arrays(final / SAMPLES, **table.arrays())
    manifest: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "name": recipe.name,
        "recipe_sha256": made.sources.digest,
        "recipe": recipe_facts(recipe),
        "given": made.sources.given,
        "inputs": made.sources.inputs,
        "speakers": made.speakers,
        **hashes,
        "vocab_size": made.tokenizer.vocab_size,
        "splits": splits,
        "dialogues": dialogues,
        "certificate": proof,
    }
    if base is not None:
        state = {s: {"shards": len(shards[s]), "dialogue_shards": len(dialogues[s])} for s in SPLITS}
        manifest["format"] = COLLECTED_VERSION
        manifest["generations"] = [*base.generations, {"recipe_sha256": made.sources.digest, "splits": state}]
    if recipe.pair.mode == "preference":
        manifest["preference"] = True
    datasets = {split: TokenDataset.from_manifest(final, manifest, split) for split in SPLITS}
    if recipe.pair.mode != "preference":  # a pair's tokens with loss are not one reply
        manifest["repeats"] = report["repeats"] = repeats(datasets["train"], datasets["validation"])
    write_durably(final / "report.json", (json.dumps(report, ensure_ascii=False, indent=1) + "\n").encode())
    write_durably(final / "report.html", html_report(report, datasets, made.tokenizer).encode())
    for dataset in datasets.values():
        dataset.close()
    loose = [*(final / "tokenizer").iterdir(), *(final / name for name in ("report.json", "report.html", SAMPLES))]
    manifest["files"] = {path.relative_to(final).as_posix(): sha256_file(path) for path in sorted(loose)}
    timings = made.seconds | {"shard": round(time.perf_counter() - started, 3)}
    write_durably(final / "timings.json", (json.dumps(timings, indent=1) + "\n").encode())
    made.sources.seen.save(final)
    write_durably(final / MANIFEST, (json.dumps(manifest, ensure_ascii=False, indent=1) + "\n").encode())
    publish_folder(final, out)
    progress("shard", len(chunks) + 1, len(chunks) + 1)
    more = {"added": added} if base is not None else {}
    shown: dict[str, Any] = {key: report[key] for key in ("splits", "certificate", "repeats", "texts") if key in report}
    return {**shown, "written": sum(map(len, places)), **more}


@dataclass(frozen=True)
class Before:
    """What a split holds already: records of its shards, lengths and loss tokens of all that they hold; nothing for a build."""

    shards: list[dict[str, Any]]
    dialogues: list[dict[str, Any]]
    dropped: list[list[int]]
    lengths: NDArray[np.uint32]
    loss_tokens: NDArray[np.uint32]

    @property
    def count(self) -> int:
        """Dialogues in the shards."""
        return len(self.lengths)

    @classmethod
    def of(cls, base: Existing | None, split: str) -> Before:
        """From the manifest and the indices of the base."""
        empty = np.zeros(0, np.uint32)
        if base is None:
            return cls([], [], [], empty, empty)
        part, place = base.manifest["splits"][split], base.folder / split
        found = [ShardIndex.from_bytes((place / r["index"]).read_bytes(), r["index"]) for r in part["shards"]]
        lengths, loss = (np.concatenate([empty, *(getattr(i, name) for i in found)]) for name in ("lengths", "loss_tokens"))
        return cls(part["shards"], base.manifest["dialogues"][split], part.get("dropped", []), lengths, loss)


def _link(base: Existing, final: Path) -> None:
    """The base's shards and tokenizer in the new folder, without copying them where the file system can."""
    for name in ("dialogues", "tokenizer", *SPLITS):
        (final / name).mkdir()
        for file in sorted((base.folder / name).iterdir()):
            if not file.is_file() or file.name.startswith("."):
                continue
            try:
                os.link(file, final / name / file.name)
            except OSError:  # no hard links there
                shutil.copyfile(file, final / name / file.name)
                sync(final / name / file.name)
        sync(final / name)


def _copy(
    made: Made,
    work: WorkFolder,
    chunks: list[str],
    tokens: list[ShardWriter],
    texts: list[DialogueWriter],
    counts: list[int],
    progress: Report,
) -> tuple[list[int], list[int]]:
    """Write the samples of all chunks; the rows of the table that were written to each side, in order.

    counts: dialogues that each side holds already. Fills `place` of the rows.
    """
    rows: tuple[list[int], list[int]] = ([], [])
    first = len(made.table) - sum(len(load_arrays(work.path("assign", f"{chunk}.npz"))["side"]) for chunk in chunks)
    for number, chunk in enumerate(chunks):
        for local, side, dialogue, line, source, origin in _samples(work, chunk):
            tokens[side].add(dialogue, source, origin)
            texts[side].add(dialogue.uid, line)
            made.table.place[first + local] = counts[side] + len(rows[side])
            rows[side].append(first + local)
        first += len(load_arrays(work.path("assign", f"{chunk}.npz"))["side"])
        progress("shard", number + 1, len(chunks) + 1)  # the last part: certificate and page
    return rows


def _samples(work: WorkFolder, chunk: str) -> Iterator[tuple[int, int, TokenizedDialogue, bytes, str, str]]:
    """(number in the chunk, side, dialogue, line, source, origin) of each sample that was tokenised."""
    arrays = load_arrays(work.path("tokenize", f"{chunk}.npz"))
    rows = iter(json.loads(work.path("tokenize", f"{chunk}.json").read_bytes()))
    mask = np.unpackbits(arrays["mask"], count=len(arrays["ids"])).view(np.bool_)
    edges = np.concatenate([[0], np.cumsum(arrays["lengths"])]).tolist()
    row, k = next(rows, None), 0
    with work.path("prepare", f"{chunk}.jsonl").open("rb") as file:
        for number, line in enumerate(file):
            if row is None or row[0] != number:
                continue
            _, side, uid, source, origin = row
            span = slice(edges[k], edges[k + 1])
            if not line.startswith(f'{{"uid":"{uid}"'.encode()):  # it shares its uid with an earlier sample
                line = encode_line(replace(load_line(line), uid=uid))
            yield number, side, TokenizedDialogue(uid, arrays["ids"][span], mask[span]), line, source, origin
            row, k = next(rows, None), k + 1


def _settle(made: Made, base: Existing | None, places: tuple[list[int], list[int]]) -> dict[str, int]:
    """Mark what the tokenizer refused; what it should have replaced stays in the set. Returns counts for the report."""
    table, known = made.table, 0 if base is None else len(base.table)
    refused = (table.reason == 0) & (table.place < 0)
    for old, new in list(made.replaced.items()):
        if refused[new]:
            table.reason[old] = 0
            del made.replaced[old]
    table.reason[refused] = REFUSED
    counts = {split: len(rows) for split, rows in zip(SPLITS, places, strict=True)}
    return {**counts, "replaced": len(made.replaced), "samples": len(table) - known}


def _gone(made: Made, base: Existing | None, before: dict[str, Before], generation: int) -> dict[str, list[list[int]]]:
    """Per split [generation, place, tokens, loss tokens] of what is no longer in the set, the new ones last."""
    gone = {split: list(before[split].dropped) for split in SPLITS}
    for old in sorted(made.replaced):
        split, place = SPLITS[int(made.table.side[old])], int(made.table.place[old])
        lengths = int(before[split].lengths[place]), int(before[split].loss_tokens[place])
        gone[split].append([generation, place, *lengths])
    return gone


def _facts(table: SampleTable) -> tuple[Facts, Facts]:
    """What each side of the set holds, for the certificate."""
    owner = np.repeat(np.arange(len(table)), table.author_counts)
    sides = Facts(), Facts()
    for side, facts in enumerate(sides):
        chosen = (table.reason == 0) & (table.side == side)
        facts.hashes["conversations"].extend(table.thread[chosen].tolist())
        facts.hashes["exact_texts"].extend(table.exact[chosen].tolist())
        facts.hashes["authors"].extend(table.authors[chosen[owner]].tolist())
        if table.signature.shape[1]:
            facts.add_signatures(table.signature[chosen])
    return sides


def _report(
    name: str,
    made: Made,
    base: Existing | None,
    public: dict[str, Any],
    proof: dict[str, Any],
    written: dict[str, int],
    added: dict[str, Any],
) -> dict[str, Any]:
    """report.json: the funnel of all that was ever read for the set."""
    last = Ledger("samples", kept=written["train"] + written["validation"] - written["replaced"])
    if written["replaced"]:
        last.drop("replaced by a longer export of its conversation", n=written["replaced"])
    stages, texts = [*made.stages, {"name": "shard", **last.to_dict()}], made.texts
    if base is not None:
        both = zip(base.report["stages"], stages, strict=True)
        stages = [{"name": new["name"], **Ledger.total(new["unit"], (old, new)).to_dict()} for old, new in both]
        texts = _texts_with(made, base)
    report = {"name": name, "stages": stages, "splits": public, "certificate": proof, "texts": texts}
    if base is not None:
        report["collected"] = [*base.report.get("collected", ()), added]
    return report


def _texts_with(made: Made, base: Existing) -> dict[str, Any]:
    """Counts of texts, of old and new together, without what was replaced."""
    texts = {}
    for side, split in enumerate(SPLITS):
        counts = TextCounts.total([base.report["texts"][split], made.texts[split]])
        wanted = {int(made.table.place[old]) for old in made.replaced if made.table.side[old] == side}
        for conversation in _at(base, split, wanted):
            counts.add(conversation, -1)
        texts[split] = counts.to_dict()
    return texts


def _at(base: Existing, split: str, places: Iterable[int]) -> Iterator[Conversation]:
    """The dialogues at these places of a split; only the tars that hold them are read."""
    wanted, first = sorted(places), 0
    for record in base.manifest["dialogues"][split]:
        end = first + int(record["samples"])
        here = {place - first for place in wanted if first <= place < end}
        if here:
            yield from (c for k, c in enumerate(read_dialogues(base.folder, [record])) if k in here)
        first = end
