"""Speed and memory of every stage of a data build, against datatrove's own steps and Hugging Face datasets, in one run.

    python -m chatmill.data.bench.build [--mb 1024] [--workers 2] [--python /venv/bin/python] [--json results.json]

Builds an invented mix of formats (raw_mix.py), with the chitchat chats beside it where that package is installed. MB are
10^6 bytes of raw text (unpacked); per core: divided by the processes that worked. Peak memory is sampled: resident bytes of
the building process and of its largest worker (the pages that they share count in both). The others do comparable work on
`--compare-mb` of the same conversations, as JSON lines with `text`: read and write, a repetition filter, encode. Ours does
more in its time: roles, ledgers, lineage, hashes for duplicates, loss masks.
--python: one that has datatrove, orjson, datasets and tokenizers; their requirements need not fit this one's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Self

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..pipeline.executor import available_cores
from ..pipeline.pipeline import build_dataset
from ..recipe import DataRecipe
from ..shards.dialogues import read_dialogues
from ..shards.manifest import read_manifest
from ..tokenizer.tokenizer import ChatTokenizer
from .raw_mix import write_mix

# Cleaning and pairing are one pass, timed as `clean`.
TOGETHER = "pair"
SERIAL = {"dedup", "split", "train tokenizer", "shard"}
SAMPLE_S = 0.1


class MemoryWatch:
    """Peak resident bytes of this process and of its largest child, from beginning to end of the `with`."""

    def __init__(self) -> None:
        self.parent = self.worker = self.baseline = 0
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self.baseline = psutil.Process().memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(SAMPLE_S):
            self.parent = max(self.parent, me.memory_info().rss)
            for child in me.children():
                try:
                    self.worker = max(self.worker, child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue


def bench(
    megabytes: float,
    workers: int,
    compare_mb: float,
    python: str,
    folder: Path,
    chitchat: bool,
    show: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """All figures; `folder` is filled with raw files, the data set and the others' outputs."""
    show("raw files", 0, 1)
    write_mix(folder / "raw", megabytes)
    show("raw files", 1, 1)
    recipe = DataRecipe.model_validate(
        {
            "name": "bench",
            "sources": [{"path": str(folder / "raw"), "mix_speakers": True}, *([{"format": "chitchat"}] if chitchat else [])],
            "tokenizer": {"train": {"vocab_size": 16_384}},
            "clean": {"html": True, "privacy": {"mode": "surrogate"}},
            "workers": workers,
        }
    )
    begun = time.perf_counter()
    with MemoryWatch() as memory:
        report = build_dataset(recipe, folder / "set", show)
    wall_s = time.perf_counter() - begun
    seconds = json.loads((folder / "set/timings.json").read_bytes())
    tokens = sum(split["tokens"] for split in report["splits"].values())
    inputs = read_manifest(folder / "set")["inputs"]
    raw_mb = megabytes * 1.048576 + sum(record["bytes"] for record in inputs if record["format"] == "chitchat") / 1e6
    stages = [
        _figures(name, s, 1 if name in SERIAL else workers, raw_mb, tokens) for name, s in seconds.items() if name != TOGETHER
    ]
    sample, sample_mb, sample_tokens = _texts(folder, compare_mb)
    others: list[dict[str, Any]] = []
    for name, run in (("datatrove", _datatrove), ("datasets", _datasets)) if sample_mb else ():
        show(name, 0, 1)
        found = run(sample, folder, workers, python)
        others += [_figures(f"{name}: {step}", s, workers, sample_mb, sample_tokens) for step, s in found.items()]
        show(name, 1, 1)
    return {
        "machine": f"{platform.processor() or platform.machine()}, {available_cores()} cores",
        "megabytes": raw_mb,
        "workers": workers,
        "tokens": tokens,
        "dialogues": sum(split["dialogues"] for split in report["splits"].values()),
        "wall_s": wall_s,
        "stages": stages,
        "compare_mb": sample_mb,
        "others": others,
        "peak_mib": {name: getattr(memory, name) / 2**20 for name in ("baseline", "parent", "worker")},
    }


def _figures(name: str, seconds: float, cores: int, megabytes: float, tokens: int) -> dict[str, Any]:
    spent = max(seconds, 1e-9)
    return {
        "stage": name,
        "seconds": seconds,
        "cores": cores,
        "mb_per_s": megabytes / spent,
        "mb_per_s_core": megabytes / spent / cores,
        "tokens_per_s_core": tokens / spent / cores,
    }


def _texts(folder: Path, megabytes: float) -> tuple[Path, float, int]:
    """(JSON lines of dialogues as texts, their MB, tokens of these dialogues), in files for several readers."""
    out = folder / "texts"
    out.mkdir()
    manifest = read_manifest(folder / "set")
    tokenizer = ChatTokenizer.load(folder / "set/tokenizer")
    size = tokens = part = 0
    dialogues = read_dialogues(folder / "set", manifest["dialogues"]["train"])
    while size < megabytes * 1e6:
        batch = list(islice(dialogues, 2000))
        if not batch:
            break
        rows = [
            json.dumps({"id": c.uid, "text": "\n".join(turn.content for turn in c.turns)}, ensure_ascii=False) for c in batch
        ]
        data = ("\n".join(rows) + "\n").encode()
        (out / f"{part:05d}.jsonl").write_bytes(data)
        tokens += sum(len(tokenizer.encode_dialogue(c).ids) for c in batch)
        size, part = size + len(data), part + 1
    return out, size / 1e6, tokens


def _datatrove(texts: Path, folder: Path, workers: int, python: str) -> dict[str, float]:
    """Seconds of three of datatrove's own pipelines, each by its local executor."""
    if importlib.util.find_spec("datatrove") is None:
        return {}
    code = """
import sys, time
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
texts, out, workers, tokenizer = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
def write():
    from datatrove.pipeline.writers import JsonlWriter
    return JsonlWriter(out + "/a", compression=None)
def repetition():
    from datatrove.pipeline.filters import GopherRepetitionFilter
    return GopherRepetitionFilter()
def encode():
    from datatrove.pipeline.tokens import DocumentTokenizer
    return DocumentTokenizer(out + "/b", tokenizer_name_or_path=tokenizer, eos_token=None, shuffle_documents=False)
if __name__ == "__main__":
    for name, step in (("read, write", write), ("repetition filter", repetition), ("encode", encode)):
        try:
            begun = time.perf_counter()
            LocalPipelineExecutor([JsonlReader(texts), step()], tasks=workers, workers=workers, start_method="fork",
                logging_dir=out + "/log " + name).run()
            print("seconds", name, time.perf_counter() - begun, sep="\\t", flush=True)
        except ImportError as error:
            print("absent", name, " ".join(str(error).split()), sep="\\t", flush=True)
"""
    return _elsewhere(python, code, "datatrove", texts, folder, workers)


def _datasets(texts: Path, folder: Path, workers: int, python: str) -> dict[str, float]:
    """Seconds of datasets: reading JSON lines into Arrow, and map with a batched encode."""
    code = """
import os, sys, time
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=sys.argv[2])
import datasets, glob
from tokenizers import Tokenizer
datasets.disable_progress_bars()
texts, out, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = Tokenizer.from_file(sys.argv[4])
def encode(batch): return {"ids": [e.ids for e in tokenizer.encode_batch(batch["text"])]}
if __name__ == "__main__":
    begun = time.perf_counter()
    files = sorted(glob.glob(texts + "/*.jsonl"))
    rows = datasets.load_dataset("json", data_files=files, split="train", num_proc=min(workers, len(files)))
    print("seconds", "load_dataset", time.perf_counter() - begun, sep="\\t", flush=True)
    begun = time.perf_counter()
    rows.map(encode, batched=True, num_proc=workers, remove_columns=rows.column_names)
    print("seconds", "map, encode", time.perf_counter() - begun, sep="\\t", flush=True)
"""
    return _elsewhere(python, code, "datasets", texts, folder, workers)


def _elsewhere(python: str, code: str, name: str, texts: Path, folder: Path, workers: int) -> dict[str, float]:
    """Run a script in a process of its own, one thread per process as ours; what it printed as seconds."""
    script, out = folder / f"run_{name}.py", folder / name
    script.write_text(code, encoding="utf-8")
    out.mkdir()
    words = [python, str(script), str(texts), str(out), str(workers), str(folder / "set/tokenizer/tokenizer.json")]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: {''.join(done.stderr.strip().splitlines()[-1:])}", file=sys.stderr)
    for line in done.stdout.split("\n"):
        if line.startswith("absent\t"):
            print(f"{name}: {line}", file=sys.stderr)
    rows = [line.split("\t") for line in done.stdout.split("\n") if line.startswith("seconds\t")]
    shutil.rmtree(out)
    return {row[1]: float(row[2]) for row in rows}


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    peak = results["peak_mib"]
    lines = [
        f"{results['megabytes']:,.0f} MB raw text, {results['dialogues']:,} dialogues, {results['tokens']:,} tokens in "
        f"{results['wall_s']:,.1f} s ({results['megabytes'] / results['wall_s']:.2f} MB/s); {results['machine']}",
        f"peak memory: building process {peak['parent']:,.0f} MiB (at its start {peak['baseline']:,.0f}), "
        f"largest of {results['workers']} workers {peak['worker']:,.0f} MiB",
        f"{'stage':<28} {'seconds':>9} {'cores':>6} {'MB/s':>8} {'MB/s/core':>10} {'tokens/s/core':>14}",
    ]
    for title, rows in (("", results["stages"]), (f"on {results['compare_mb']:,.0f} MB of them:", results["others"])):
        lines += [title] if title and rows else []
        lines += [
            f"{r['stage']:<28} {r['seconds']:>9.1f} {r['cores']:>6} {r['mb_per_s']:>8.2f} {r['mb_per_s_core']:>10.2f} "
            f"{r['tokens_per_s_core']:>14,.0f}"
            for r in rows
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="chatmill bench build", description="Speed and memory of a data build.")
    parser.add_argument("--mb", type=float, default=64, help="MiB of raw text (default 64; the figures in docs: 1024)")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (default: one per core)")
    parser.add_argument(
        "--compare-mb", type=float, default=100, help="MB for datatrove and datasets (default 100; 0: leave out)"
    )
    parser.add_argument("--python", default=sys.executable, help="runs datatrove and datasets (default: this one)")
    parser.add_argument("--folder", type=Path, help="work here and leave everything there (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>15}"), BarColumn(32), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with tempfile.TemporaryDirectory(prefix="chatmill-") as temporary, Progress(*columns, console=console) as bar:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        folder = options.folder or Path(temporary)
        chitchat = importlib.util.find_spec("chitchat_dataset") is not None
        results = bench(options.mb, options.workers, options.compare_mb, options.python, folder, chitchat, show)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
