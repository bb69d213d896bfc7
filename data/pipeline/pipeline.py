"""Raw conversations to a certified data-set folder: import, clean, pair, dedup, split, tokenize, shard.

    report = build_dataset(load_data_recipe("chitchat"))

Contract: the folder appears whole or not at all; a build from the same inputs and recipe is not repeated; one that was killed
continues where it stopped; the bytes of everything but timings.json do not depend on the number of workers or on interruptions.
Intermediate files live in `.<name>.work-<digest>` beside the data set and go when it is published.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from chatmill.config import ConfigError
from chatmill.files import write_durably
from chatmill.progress import Report, silent

from ..conversation import load_line
from ..importers.registry import spans
from ..importers.speakers import FORUMS, WHOEVER_ANSWERS, assistants, check_one_assistant, together
from ..ledger import Ledger, shorten
from ..raw.files import RawFile
from ..recipe import DataRecipe
from ..remote.files import is_url, staging_folder
from ..report.text_counts import TextCounts
from ..samples.decontaminate import benchmark_hashes
from ..samples.dedup import REASONS
from ..samples.placing import place
from ..samples.table import NEITHER, SampleTable
from ..tokenizer.tokenizer import ChatTokenizer, train_bpe
from .destination import built_report, copy_out, published_report
from .dialogues_file import check_dialogues_file, write_dialogues
from .executor import Task, available_cores, run_tasks
from .existing import Existing
from .inputs import (
    Sources,
    build_digest,
    given_tokenizer,
    raw_files,
    template_tokenizer,
    trained_template,
    trained_tokens,
)
from .publication import SPLITS, Made, publish
from .seen import SeenFiles
from .stages import ImportFile, PrepareChunk, TokenizeChunk
from .work_folder import WorkFolder, build_lock, load_arrays, remove_rest, remove_work, save_arrays

Stage = Literal["import", "clean", "pair", "dedup", "split", "tokenize", "shard"]
STAGES: tuple[Stage, ...] = ("import", "clean", "pair", "dedup", "split", "tokenize", "shard")
HASHES, TRAIN = "hash files", "train tokenizer"
# The phases that people see, in order, and the last stage of each.
PHASES = {HASHES: "", "import": "import", "clean + pair": "pair", "dedup": "split", TRAIN: "", "tokenize": "tokenize"}
PHASES["shard"] = "shard"


def phases(recipe: DataRecipe, until: Stage = "shard", is_given: bool = False) -> list[str]:
    """What a build will report, in order. is_given: its tokenizer is, even where the recipe names none."""
    last = next(k for k, stage in enumerate(PHASES.values()) if stage and STAGES.index(stage) >= STAGES.index(until))
    trains = recipe.tokenizer.path is None and not is_given
    copies = ["copy"] if until == "shard" and is_url(str(recipe.place)) else []
    return [name for name in [*PHASES][: last + 1] if name != TRAIN or trains] + copies


def build_dataset(
    recipe: DataRecipe,
    out: str | Path | None = None,
    progress: Report | None = None,
    until: Stage = "shard",
    dialogues: str | Path | None = None,
) -> dict[str, Any]:
    """Build the data set of a recipe, or bring it as far as the stage `until`. Returns the report.

    dialogues: JSONL to write what the stage import, clean or pair made (data/pipeline/dialogues_file.py).
    Report: {"stages": [{"name", "unit", "kept", "dropped", "changed", "examples", "seconds"}], "built": bool, "out": str, …}.
    """
    if dialogues is not None:
        check_dialogues_file(dialogues, until)
    goal, seen = str(out or recipe.place), SeenFiles()
    url = goal.rstrip("/") if is_url(goal) else None
    folder = (staging_folder(url) if url else Path(goal)).absolute()
    files, left_out = raw_files(recipe)
    tokenizer = given_tokenizer(recipe)
    (progress or silent)(HASHES, 0, 1)
    digest, inputs, given = build_digest(recipe, files, tokenizer, seen)
    (progress or silent)(HASHES, 1, 1)
    if until == "shard" and (found := published_report(url, digest) if url else built_report(folder, digest)):
        remove_rest(folder, is_staged=url is not None)
        return found | {"built": False, "out": url or str(folder)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with build_lock(folder):
        if until == "shard" and url and (found := built_report(folder, digest)):  # killed while it was copied
            return copy_out(folder, url, found | {"built": True}, progress)
        work = work_for(folder, recipe, files, inputs, digest)
        build = Build(work, folder, Sources(digest, inputs, inputs, given, left_out, seen), tokenizer, progress)
        report = build.run(until)
        if dialogues is not None:
            report["dialogues"] = write_dialogues(work, until, Path(dialogues))
        if until == "shard":
            remove_work(folder)
            if url:
                return copy_out(folder, url, report, progress)
    return report


def work_for(
    folder: Path, recipe: DataRecipe, files: list[tuple[int, RawFile]], inputs: list[dict[str, Any]], digest: str
) -> WorkFolder:
    """The work folder of a build of these files, large ones in spans. inputs: their records; digest: of all that shapes it."""
    parts = [
        (number, part)
        for (number, file), found in zip(files, inputs, strict=True)
        for part in spans(file, found["format"], recipe.sources[number])
    ]
    work = WorkFolder(folder.parent / f".{folder.name}.work-{digest[:12]}", recipe, tuple(parts))
    for stage in ("import", "prepare", "assign", "tokenize"):
        (work.folder / stage).mkdir(parents=True, exist_ok=True)
    return work


class Build:
    """One run through the stages. base: the data set that what is new is added to; its tokenizer is the given one then."""

    def __init__(
        self,
        work: WorkFolder,
        out: Path,
        sources: Sources,
        tokenizer: ChatTokenizer | None,
        progress: Report | None,
        base: Existing | None = None,
    ) -> None:
        self.work, self.out, self.sources, self.base = work, out, sources, base
        self.progress: Report = progress or silent
        self.replaced: dict[int, int] = {}  # row of the set that goes -> new row that comes in its place
        self.recipe, self.tokenizer = work.recipe, tokenizer
        self.workers = work.recipe.workers or available_cores()
        self.stages: list[dict[str, Any]] = []
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.texts: dict[str, Any] = {}
        self.assistants: list[str] = []
        self.speakers: list[dict[str, dict[str, int]]] = []  # by source, those of the base among them
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
        self._assign(chunks, samples)
        if until in ("dedup", "split"):
            if until == "dedup":
                self.stages.pop()
            return self._report()
        self._tokenize(chunks)
        if until == "tokenize":
            return self._report()
        return self._publish(chunks)

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
        if not ledger.kept and self.base is None:
            found = "; ".join(f"{reason}: {count}" for reason, count in ledger.dropped.most_common(5)) or "nothing was there"
            raise ConfigError(f"data {self.recipe.name}: {what}. Dropped: {shorten(found, 400)}")

    def _report(self, **more: Any) -> dict[str, Any]:
        stages = [stage | {"seconds": self.seconds.get(stage["name"], 0.0)} for stage in self.stages]
        formats = dict(Counter(record["format"] for record in self.sources.read).most_common())
        files = {
            "formats": formats, "left_out": self.sources.left_out, "assistants": self.assistants, "own_system": self.own_system,
        }  # fmt: skip
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
            known = [self.base.speakers(source)] if self.base is not None else []
            speakers = together([*known, *(result.get("speakers", {}) for (n, _), result in files if n == number)])
            self.speakers.append(speakers)
            if not source.mix_speakers:
                check_one_assistant(speakers, number, source.path)
                self.assistants += [f"{name} (sources.{number}), who always replies" for name in assistants(speakers)]
            if source.assistant is None and any(r["source"] == number and r["format"] in FORUMS for r in self.sources.read):
                self.assistants.append(f"{WHOEVER_ANSWERS} (sources.{number})")

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

    def _assign(self, chunks: list[str], samples: list[int]) -> None:
        """Duplicates out, sides drawn; one small file of sides per chunk."""
        self.progress("dedup", 0, 1)
        dedup, split = self.recipe.dedup, self.recipe.split
        parts = [load_arrays(self.work.path("prepare", f"{chunk}.npz")) for chunk in chunks]
        self.table = SampleTable.of(parts, dedup.near is not None)
        known = 0
        if self.base is not None:
            known, self.table = len(self.base.table), self.base.table.followed_by(self.table)
        self.replaced = place(self.table, dedup, split, known)
        table = self.table
        keep = table.reason[known:] == 0
        ledger = Ledger("samples", kept=int(keep.sum()))
        bounds = np.cumsum([0, *samples])
        for i in np.flatnonzero(~keep).tolist():
            name = REASONS[int(table.reason[known + i])]
            ledger.drop(name, self._text_of(chunks, bounds, i) if ledger.dropped[name] < 3 else "")
        if self.replaced:
            ledger.change("replaces a shorter export of its conversation", n=len(self.replaced))
        self._note("dedup", ledger)
        self.progress("dedup", 1, 1)
        side, copy = np.where(keep, table.side[known:], np.uint8(NEITHER)), table.copy[known:]
        if self.base is None and ((side == 0).sum() == 0 or (side == 1).sum() == 0):
            raise ConfigError(
                f"data {self.recipe.name}: the split left {int((side == 0).sum())} training and "
                f"{int((side == 1).sum())} validation samples out of {int(keep.sum())}.\n"
                "Give more data, another split.seed, a larger split.validation, or switch split.by_author off."
            )
        for k, chunk in enumerate(chunks):
            part = slice(bounds[k], bounds[k + 1])
            save_arrays(self.work.path("assign", f"{chunk}.npz"), side=side[part], copy=copy[part])
        ledger = Ledger("samples", kept=int((side < 2).sum()))
        ledger.change("to train", n=int((side == 0).sum()))
        ledger.change("to validation", n=int((side == 1).sum()))
        self._note("split", ledger)

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
                self.progress(TRAIN, 0, 1)
                train = self.recipe.tokenizer.train
                texts = self._training_texts(chunks, int(train.sample_mb * 1e6))
                self.tokenizer = train_bpe(texts, train.vocab_size, trained_tokens(self.recipe), trained_template(self.recipe))
                self.progress(TRAIN, 1, 1)
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

    def _publish(self, chunks: list[str]) -> dict[str, Any]:
        assert self.tokenizer is not None
        made = Made(
            self.sources, self.speakers, self.tokenizer, self.table, self.replaced, self.stages, self.texts, self.seconds
        )  # fmt: skip
        public = publish(made, self.work, chunks, self.out, self.base, self.progress)
        self._note("shard", Ledger("samples", kept=public.pop("written")))
        return self._report(**public)
