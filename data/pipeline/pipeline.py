"""Raw conversations to a certified data-set folder: import, clean, pair, dedup, split, tokenize, shard.

    report = build_dataset(load_data_recipe("chitchat"))

Contract: the folder appears whole or not at all; a build from the same inputs and recipe is not repeated; one that was killed
continues where it stopped; the bytes of everything but timings.json do not depend on the number of workers or on interruptions.
Intermediate files live in `.<name>.work-<digest>` beside the data set and go when it is published.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from chatmill.config import ConfigError
from chatmill.files import naming, publish_folder, sha256_file, write_durably

from ..conversation import TokenizedDialogue, load_line
from ..importers.registry import spans
from ..importers.speakers import assistants, check_one_assistant, together
from ..ledger import Ledger, shorten
from ..recipe import DataRecipe
from ..remote.files import is_url, staging_folder
from ..report.page import html_report
from ..report.text_counts import TextCounts
from ..samples.decontaminate import benchmark_hashes
from ..samples.dedup import CONTAMINATED, REASONS, SUPERSEDED, deduplicate
from ..samples.identity import resolve
from ..samples.near_duplicates import near_pairs
from ..samples.split import Facts, assign, certificate, crossing, group, group_keys, join
from ..shards.dataset import TokenDataset
from ..shards.dialogues import DialogueWriter
from ..shards.manifest import FORMAT_VERSION, MANIFEST
from ..shards.writer import ShardWriter
from ..tokenizer.tokenizer import ChatTokenizer, train_bpe
from .destination import Progress, built_report, copy_out, published_report
from .dialogues_file import check_dialogues_file, write_dialogues
from .executor import Task, available_cores, run_tasks
from .inputs import build_digest, given_tokenizer, raw_files, recipe_facts, template_tokenizer, trained_template, trained_tokens
from .stages import ImportFile, PrepareChunk, TokenizeChunk, encode_line
from .work_folder import WorkFolder, build_lock, load_arrays, remove_work, save_arrays

Stage = Literal["import", "clean", "pair", "dedup", "split", "tokenize", "shard"]
STAGES: tuple[Stage, ...] = ("import", "clean", "pair", "dedup", "split", "tokenize", "shard")
SPLITS = ("train", "validation")


def build_dataset(
    recipe: DataRecipe,
    out: str | Path | None = None,
    progress: Progress | None = None,
    until: Stage = "shard",
    dialogues: str | Path | None = None,
) -> dict[str, Any]:
    """Build the data set of a recipe, or bring it as far as the stage `until`. Returns the report.

    dialogues: JSONL to write what the stage import, clean or pair made (data/pipeline/dialogues_file.py).
    Report: {"stages": [{"name", "unit", "kept", "dropped", "changed", "examples", "seconds"}], "built": bool, "out": str, …}.
    """
    if dialogues is not None:
        check_dialogues_file(dialogues, until)
    place = str(out or recipe.place)
    url = place.rstrip("/") if is_url(place) else None
    folder = (staging_folder(url) if url else Path(place)).absolute()
    files, left_out = raw_files(recipe)
    tokenizer = given_tokenizer(recipe)
    digest, inputs = build_digest(recipe, files, tokenizer)
    if until == "shard" and (found := published_report(url, digest) if url else built_report(folder, digest)):
        return found | {"built": False, "out": url or str(folder)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with build_lock(folder):
        if until == "shard" and url and (found := built_report(folder, digest)):  # killed while it was copied
            return copy_out(folder, url, found | {"built": True}, progress)
        parts = [
            (n, part)
            for (n, file), found in zip(files, inputs, strict=True)
            for part in spans(file, found["format"], recipe.sources[n])
        ]
        work = WorkFolder(folder.parent / f".{folder.name}.work-{digest[:12]}", recipe, tuple(parts))
        for stage in ("import", "prepare", "assign", "tokenize"):
            (work.folder / stage).mkdir(parents=True, exist_ok=True)
        build = _Build(work, folder, digest, inputs, left_out, tokenizer, progress or (lambda stage, done, total: None))
        report = build.run(until)
        if dialogues is not None:
            report["dialogues"] = write_dialogues(work, until, Path(dialogues))
        if until == "shard":
            remove_work(folder)
            if url:
                return copy_out(folder, url, report, progress)
    return report


class _Build:
    """One run through the stages."""

    def __init__(
        self,
        work: WorkFolder,
        out: Path,
        digest: str,
        inputs: list[dict[str, Any]],
        left_out: list[str],
        tokenizer: ChatTokenizer | None,
        progress: Progress,
    ) -> None:
        self.work, self.out, self.digest, self.inputs, self.progress = work, out, digest, inputs, progress
        self.left_out = left_out
        self.recipe, self.tokenizer = work.recipe, tokenizer
        self.workers = work.recipe.workers or available_cores()
        self.stages: list[dict[str, Any]] = []
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.texts: dict[str, Any] = {}
        self.assistants: list[str] = []
        self.own_system: str | None = None

    def run(self, until: Stage) -> dict[str, Any]:
        """Stages up to `until`."""
        chunks = self._import()
        if until == "import":
            return self._report()
        samples = self._prepare(chunks)
        if until in ("clean", "pair"):
            if until == "clean":
                self.stages.pop()
            return self._report()
        facts = self._assign(chunks, samples)
        if until in ("dedup", "split"):
            if until == "dedup":
                self.stages.pop()
            return self._report()
        self._tokenize(chunks)
        if until == "tokenize":
            return self._report()
        return self._shard(chunks, facts)

    def _run(self, name: str, shown: str, tasks: list[str], function: Task) -> list[dict[str, Any]]:
        """A stage whose tasks are independent, by the recipe's executor."""
        folder, executor = self.work.folder / name, self.recipe.executor
        return run_tasks(folder, tasks, function, self.workers, lambda done, n: self.progress(shown, done, n), executor)

    def _note(self, name: str, ledger: Ledger) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self.started, 3)
        self.started = now
        self.stages.append({"name": name, **ledger.to_dict()})

    def _refuse_nothing(self, ledger: Ledger, what: str) -> None:
        if not ledger.kept:
            found = "; ".join(f"{reason}: {count}" for reason, count in ledger.dropped.most_common(5)) or "nothing was there"
            raise ConfigError(f"data {self.recipe.name}: {what}. Dropped: {shorten(found, 400)}")

    def _report(self, **more: Any) -> dict[str, Any]:
        stages = [stage | {"seconds": self.seconds.get(stage["name"], 0.0)} for stage in self.stages]
        formats = dict(Counter(record["format"] for record in self.inputs).most_common())
        files = {"formats": formats, "left_out": self.left_out, "assistants": self.assistants, "own_system": self.own_system}
        return {"name": self.recipe.name, "files": files, "stages": stages, "built": True, "out": str(self.out), **more}

    def _import(self) -> list[str]:
        names = [f"f{number:05d}" for number in range(len(self.work.files))]
        results = self._run("import", "import", names, ImportFile(self.work))
        ledger = Ledger.total("conversations", (r["import"] for r in results))
        self._note("import", ledger)
        self._check_speakers(results)
        self._refuse_nothing(ledger, f"no conversation in {len(names)} file{'s' if len(names) > 1 else ''}")
        return [chunk for result in results for chunk in result["chunks"]]

    def _check_speakers(self, results: list[dict[str, Any]]) -> None:
        """ConfigError where the people of a chat would take turns as the assistant; the one who always replies is noted."""
        for number, source in enumerate(self.recipe.sources):
            files = zip(self.work.files, results, strict=True)
            speakers = together(result.get("speakers", {}) for (n, _), result in files if n == number)
            if not source.mix_speakers:
                check_one_assistant(speakers, number, source.path)
                self.assistants += [f"{name} (sources.{number}), who always replies" for name in assistants(speakers)]

    def _prepare(self, chunks: list[str]) -> list[int]:
        dedup = self.recipe.dedup
        if dedup.decontaminate and not self.work.path("prepare", "benchmarks.npz").is_file():
            hashes = benchmark_hashes(dedup.decontaminate, dedup.overlap_words)
            save_arrays(self.work.path("prepare", "benchmarks.npz"), hashes=hashes)
        tokenizer = template_tokenizer(self.recipe, self.tokenizer)
        tokenizer.save(self.work.folder / "template")
        self.own_system = None if self.recipe.pair.system else tokenizer.template.own_system_message()
        results = self._run("prepare", "clean + pair", chunks, PrepareChunk(self.work))
        for name, unit in (("clean", "conversations"), ("pair", "samples")):
            ledger = Ledger.total(unit, (r[name] for r in results))
            self._note(name, ledger)
            self._refuse_nothing(ledger, f"`{name}` left nothing")
        return [r["samples"] for r in results]

    def _assign(self, chunks: list[str], samples: list[int]) -> tuple[Facts, Facts]:
        """Duplicates out, sides drawn; one small file of sides per chunk."""
        self.progress("dedup", 0, 1)
        parts = [load_arrays(self.work.path("prepare", f"{chunk}.npz")) for chunk in chunks]
        exact = np.concatenate([part["exact"] for part in parts])
        thread = np.concatenate([part["thread"] for part in parts])
        near = self.recipe.dedup.near
        signature = np.concatenate([part["signature"] for part in parts]) if near else None
        pairs = near_pairs(signature, near.threshold) if near and signature is not None else None
        reason, cluster = deduplicate(exact, self.recipe.dedup.exact, pairs, near is not None and near.drop)
        reason[np.concatenate([part["contaminated"] for part in parts])] = CONTAMINATED
        uids, sizes = (np.concatenate([part[name] for part in parts]) for name in ("uid", "size"))
        stays, copy = resolve(uids, sizes, reason == 0)
        reason[(reason == 0) & ~stays] = SUPERSEDED
        keep = reason == 0
        ledger = Ledger("samples", kept=int(keep.sum()))
        bounds = np.cumsum([0, *samples])
        for i in np.flatnonzero(~keep).tolist():
            name = REASONS[int(reason[i])]
            ledger.drop(name, self._text_of(chunks, bounds, i) if ledger.dropped[name] < 3 else "")
        self._note("dedup", ledger)
        self.progress("dedup", 1, 1)

        author_counts = np.concatenate([part["author_counts"] for part in parts])
        flat = np.concatenate([part["authors"] for part in parts]).tolist()
        edges = np.concatenate([[0], np.cumsum(author_counts)]).tolist()
        authors = [flat[edges[i] : edges[i + 1]] for i in range(len(author_counts))] if self.recipe.split.by_author else None
        times = np.concatenate([part["time"] for part in parts])
        while True:
            groups = group(cluster, thread, authors)
            validation = assign(group_keys(groups, thread, times, keep), self.recipe.split)
            side = np.where(keep, validation.astype(np.uint8), np.uint8(2))
            before = cluster
            if near and signature is not None:
                cluster = join(cluster, crossing(signature, side, near.threshold))
            if np.array_equal(cluster, before):
                break
        if (side == 0).sum() == 0 or (side == 1).sum() == 0:
            largest = int(np.bincount(groups).max())
            raise ConfigError(
                f"data {self.recipe.name}: the split left {int((side == 0).sum())} training and "
                f"{int((side == 1).sum())} validation samples out of "
                f"{len(np.unique(groups))} groups (the largest holds {largest}).\n"
                "Give more data, another split.seed, a larger split.validation, or switch split.by_author off."
            )
        for k, chunk in enumerate(chunks):
            part = slice(bounds[k], bounds[k + 1])
            save_arrays(self.work.path("assign", f"{chunk}.npz"), side=side[part], copy=copy[part])
        ledger = Ledger("samples", kept=int((side < 2).sum()))
        ledger.change("to train", n=int((side == 0).sum()))
        ledger.change("to validation", n=int((side == 1).sum()))
        self._note("split", ledger)
        owner = np.repeat(np.arange(len(side)), author_counts)
        facts = _facts(side == 0, exact, thread, flat, owner), _facts(side == 1, exact, thread, flat, owner)
        if signature is not None:
            facts[0].add_signatures(signature[side == 0])
            facts[1].add_signatures(signature[side == 1])
        return facts

    def _text_of(self, chunks: list[str], bounds: NDArray[np.int64], i: int) -> str:
        """First words of sample i, for the report."""
        k = int(np.searchsorted(bounds, i, side="right")) - 1
        with self.work.path("prepare", f"{chunks[k]}.jsonl").open("rb") as file:
            line = next(line for number, line in enumerate(file) if number == i - int(bounds[k]))
        conversation = load_line(line)
        return f"{conversation.origin}: {' / '.join(turn.content for turn in conversation.turns)}"

    def _tokenize(self, chunks: list[str]) -> None:
        folder = self.work.folder / "tokenizer"
        if not (folder / "tokenizer.done").is_file():
            if self.tokenizer is None:
                assert self.recipe.tokenizer.train is not None
                self.progress("train tokenizer", 0, 1)
                train = self.recipe.tokenizer.train
                texts = self._training_texts(chunks, int(train.sample_mb * 1e6))
                self.tokenizer = train_bpe(texts, train.vocab_size, trained_tokens(self.recipe), trained_template(self.recipe))
                self.progress("train tokenizer", 1, 1)
                now = time.perf_counter()
                self.seconds["train tokenizer"], self.started = round(now - self.started, 3), now
            self.tokenizer.save(folder)
            write_durably(folder / "tokenizer.done", b"")
        self.tokenizer = ChatTokenizer.load(folder)
        results = self._run("tokenize", "tokenize", chunks, TokenizeChunk(self.work))
        ledger = Ledger.total("samples", (r["tokenize"] for r in results))
        for side, split in enumerate(SPLITS):
            self.texts[split] = TextCounts.total(r["texts"][side] for r in results).to_dict()
        self._note("tokenize", ledger)
        self._refuse_nothing(ledger, "`tokenize` left nothing")

    def _training_texts(self, chunks: list[str], most: int) -> Iterator[str]:
        """Contents of the training samples alone: a vocabulary must not know the validation texts either. Of more than `most`
        bytes, a sample drawn by uid."""
        size = sum(self.work.path("prepare", f"{chunk}.jsonl").stat().st_size for chunk in chunks)
        for chunk in chunks:
            side = load_arrays(self.work.path("assign", f"{chunk}.npz"))["side"]
            with self.work.path("prepare", f"{chunk}.jsonl").open("rb") as file:
                for number, line in enumerate(file):
                    if side[number] == 0 and xxhash.xxh3_64_intdigest(line[:40]) * size < most << 64:
                        yield from (turn.content for turn in load_line(line).turns)

    def _shard(self, chunks: list[str], facts: tuple[Facts, Facts]) -> dict[str, Any]:
        assert self.tokenizer is not None
        final = self.work.folder / "final"
        if final.exists():
            shutil.rmtree(final)
        final.mkdir()
        hashes = {"tokenizer_sha256": self.tokenizer.tokenizer_sha256, "template_sha256": self.tokenizer.template_sha256}
        sizes = self.recipe.shards
        shard_bytes = int(sizes.shard_mb * (1 << 20))
        meta = {**hashes, "recipe_sha256": self.digest, "vocab_size": self.tokenizer.vocab_size}
        tokens = [
            ShardWriter(
                final, split, vocab_size=self.tokenizer.vocab_size, meta=meta, block_dialogues=sizes.block_dialogues,
                shard_bytes=shard_bytes,
            )
            for split in SPLITS
        ]  # fmt: skip
        texts = [DialogueWriter(final, split, shard_bytes) for split in SPLITS]
        for number, chunk in enumerate(chunks):
            self._copy_chunk(chunk, tokens, texts)
            self.progress("shard", number + 1, len(chunks))
        splits = {split: _totals(writer.close()) for split, writer in zip(SPLITS, tokens, strict=True)}
        dialogues = {split: writer.close() for split, writer in zip(SPLITS, texts, strict=True)}
        ledger = Ledger("samples", kept=sum(split["dialogues"] for split in splits.values()))
        self._note("shard", ledger)
        near = self.recipe.dedup.near
        proof = certificate(facts[0], facts[1], self.recipe.split.by_author, near.threshold if near else None)
        if not proof["valid"]:  # an invariant of `group`; never publish without it
            raise ConfigError(f"data {self.recipe.name}: the split leaks: {proof['shared']}")
        with naming(final / "tokenizer"):
            self.tokenizer.save(final / "tokenizer")
        public = {key: splits[key] | {"shards": len(splits[key]["shards"])} for key in splits}
        stages = {"name": self.recipe.name, "stages": self.stages, "splits": public, "certificate": proof, "texts": self.texts}
        write_durably(final / "report.json", (json.dumps(stages, ensure_ascii=False, indent=1) + "\n").encode())
        manifest: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "name": self.recipe.name,
            "recipe_sha256": self.digest,
            "recipe": recipe_facts(self.recipe),
            "inputs": self.inputs,
            **hashes,
            "vocab_size": self.tokenizer.vocab_size,
            "splits": splits,
            "dialogues": dialogues,
            "certificate": proof,
        }
        if self.recipe.pair.mode == "preference":
            manifest["preference"] = True
        datasets = {split: TokenDataset.from_manifest(final, manifest, split) for split in SPLITS}
        write_durably(final / "report.html", html_report(stages, datasets, self.tokenizer).encode())
        for dataset in datasets.values():
            dataset.close()
        loose = [*(final / "tokenizer").iterdir(), final / "report.json", final / "report.html"]
        manifest["files"] = {path.relative_to(final).as_posix(): sha256_file(path) for path in sorted(loose)}
        write_durably(final / "timings.json", (json.dumps(self.seconds, indent=1) + "\n").encode())
        write_durably(final / MANIFEST, (json.dumps(manifest, ensure_ascii=False, indent=1) + "\n").encode())
        publish_folder(final, self.out)
        return self._report(splits=public, certificate=proof, texts=self.texts)

    def _copy_chunk(self, chunk: str, tokens: list[ShardWriter], texts: list[DialogueWriter]) -> None:
        arrays = load_arrays(self.work.path("tokenize", f"{chunk}.npz"))
        rows = iter(json.loads(self.work.path("tokenize", f"{chunk}.json").read_bytes()))
        mask = np.unpackbits(arrays["mask"], count=len(arrays["ids"])).view(np.bool_)
        edges = np.concatenate([[0], np.cumsum(arrays["lengths"])]).tolist()
        row, k = next(rows, None), 0
        with self.work.path("prepare", f"{chunk}.jsonl").open("rb") as file:
            for number, line in enumerate(file):
                if row is None or row[0] != number:
                    continue
                _, side, uid, source, origin = row
                span = slice(edges[k], edges[k + 1])
                if not line.startswith(f'{{"uid":"{uid}"'.encode()):  # it shares its uid with an earlier sample
                    line = encode_line(replace(load_line(line), uid=uid))
                tokens[side].add(TokenizedDialogue(uid, arrays["ids"][span], mask[span]), source, origin)
                texts[side].add(uid, line)
                row, k = next(rows, None), k + 1


def _totals(records: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("dialogues", "tokens", "loss_tokens", "blocks")
    return {"shards": records, **{key: sum(record[key] for record in records) for key in keys}}


def _facts(
    chosen: NDArray[np.bool_],
    exact: NDArray[np.uint64],
    thread: NDArray[np.uint64],
    authors: list[int],
    owner: NDArray[np.int64],
) -> Facts:
    facts = Facts()
    facts.hashes["conversations"].extend(thread[chosen].tolist())
    facts.hashes["exact_texts"].extend(exact[chosen].tolist())
    facts.hashes["authors"].extend(np.array(authors, dtype=np.uint64)[chosen[owner]].tolist())
    return facts
