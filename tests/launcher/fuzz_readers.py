"""Mutated files for every other reader of files from outside: nothing comes out but an error that names what is wrong.

    python -m tests.launcher.fuzz_readers 10000 [reader …]        # mutated files per reader

tests/data/importers/fuzz.py does the same for the importers.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tests.data.importers.fuzz import mutate, mutate_bytes
from tests.launcher.tiny_run import make_data, write_recipe

from chatmill.config import ConfigError, read_yaml, validate
from chatmill.data.packing.sources import RECORD, recorded_exclusions
from chatmill.data.recipe import load_data_recipe
from chatmill.data.shards.manifest import read_manifest
from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.launcher.jobs.job import JobSpec
from chatmill.launcher.runs.status import describe, last_launch, show
from chatmill.launcher.sweep.config import load_sweep
from chatmill.trainer.chat.file import read_prompts
from chatmill.trainer.config import load_recipe
from chatmill.trainer.report.reading import read_run

Reader = Callable[[Path], object]

_SWEEP = "recipe: {}\nsearch: {{kind: random, trials: 2}}\nspace:\n  optimizer.lr: {{kind: log, low: 1e-4, high: 1e-2}}\n"
_DATA = "tokenizer: {path: tok}\nsources:\n- {format: auto, path: raw/*.jsonl}\nsplit: {validation: 0.1}\n"


def run_folder(folder: Path) -> None:
    """A run as it stands after two steps."""
    (folder / "logs").mkdir(parents=True)
    (folder / "launches/1").mkdir(parents=True)
    lines = [{"step": k, "loss": 2.5, "lr": 1e-3, "tokens": 100, "time": 1e9 + k, "seconds": 0.1} for k in (1, 2)]
    lines.append({"step": 2, "eval": {"loss": 2.4, "perplexity": 11.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("run: {name: x, dir: runs}\ntrain: {steps: 4}\ndata: {path: nowhere}\n")
    (folder / "environment.json").write_text('{"world_size": 1, "process": {"pid": 1, "host": "a", "started": 1}}')
    (folder / "launches/1/job.json").write_text('{"command": ["true"], "variables": {}, "cwd": ".", "job": "12", "time": 1.0}')
    (folder / "logs/supervisor.jsonl").write_text('{"event": "start", "time": 1.0, "attempt": 1, "pid": 1, "host": "a"}\n')


def make(folder: Path) -> dict[str, tuple[Path, list[str], Reader]]:
    """By reader: the folder that is copied for every mutant, the files that are mutated, and what reads the copy."""
    vocab = make_data(folder / "data", 20)
    recipe = write_recipe(folder, "tiny", folder / "data", vocab)
    made: dict[str, tuple[str, str, Reader]] = {
        "recipe": ("r.yaml", recipe.read_text(), lambda f: load_recipe(str(f / "r.yaml"))),
        "data recipe": ("d.yaml", _DATA, lambda f: load_data_recipe(str(f / "d.yaml"))),
        "sweep": ("s.yaml", _SWEEP.format(recipe), lambda f: load_sweep(f / "s.yaml")),
        "job": ("j.yaml", "nodes: 2\npartition: gpu\ntime_limit: '1:00:00'\nsetup: [module load x]\noptions: {mem: 4G}\n",
                lambda f: validate(JobSpec, read_yaml(f / "j.yaml", empty={}), "j.yaml")),
        "prompts": ("p.jsonl", '{"prompt": "hi"}\n{"messages": [{"role": "user", "content": "q"}]}\n',
                    lambda f: list(read_prompts(f / "p.jsonl"))),
        "exclusions": (RECORD, '{"step": 1, "uids": ["a"], "reason": "spike"}\n', recorded_exclusions),
    }  # fmt: skip
    readers: dict[str, tuple[Path, list[str], Reader]] = {}
    for name, (file, text, reader) in made.items():
        (folder / name).mkdir()
        (folder / name / file).write_text(text)
        readers[name] = (folder / name, [file], reader)
    run_folder(folder / "run")
    names = sorted(str(p.relative_to(folder / "run")) for p in (folder / "run").rglob("*") if p.is_file())
    readers["run"] = (folder / "run", names, lambda f: (show(describe(f, {})), last_launch(f)))
    readers["report"] = (folder / "run", ["metrics.jsonl", "config.yaml", "environment.json"], read_run)
    readers["data manifest"] = (folder / "data", ["manifest.json"], lambda f: read_manifest(f))
    tokens = next(p.parent for p in (folder / "data").rglob("tokenizer.json"))
    files = [p.name for p in sorted(tokens.iterdir()) if p.suffix in (".json", ".jinja")]
    readers["tokenizer"] = (tokens, [f for f in files if f != "manifest.json"], lambda f: ChatTokenizer.load(f))
    return readers


def spoil(file: Path, rng: random.Random) -> None:
    """Change one file, by its values or by its bytes."""
    raw = file.read_bytes()
    text = raw.decode("utf-8", "replace")
    if rng.random() < 0.3 or file.suffix not in (".json", ".jsonl", ".yaml"):
        file.write_bytes(mutate_bytes(raw, rng))
    elif file.suffix == ".yaml":
        value = mutate(yaml.safe_load(text), rng)
        file.write_text(yaml.safe_dump(json.loads(json.dumps(value))), encoding="utf-8", errors="replace")
    elif file.suffix == ".jsonl":
        values: list[Any] = [json.loads(line) for line in text.splitlines()]
        lines = [mutate(value, rng) if rng.random() < 0.7 else value for value in values]
        file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    else:
        file.write_text(json.dumps(mutate(json.loads(text), rng)))


def fuzz(count: int, only: list[str] | None = None, seed: int = 0) -> dict[str, Counter[str]]:
    """By reader: what came out instead of a named error, and how often."""
    wrong: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        readers = make(Path(name))
        for kind, (source, files, reader) in readers.items():
            if only and kind not in only:
                continue
            rng, wrong[kind] = random.Random(f"{kind} {seed}"), Counter()
            copy = Path(name) / "copy"
            for _ in range(count):
                shutil.rmtree(copy, ignore_errors=True)
                copy.mkdir()
                for file in files:
                    (copy / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / file, copy / file)
                spoil(copy / rng.choice(files), rng)
                try:
                    reader(copy)
                except ConfigError:
                    pass
                except Exception as error:  # whatever it is, it must not come out
                    at = traceback.extract_tb(error.__traceback__)[-1]
                    said = f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno} {at.name})"
                    wrong[kind][said[:200]] += 1
    return wrong


def main(arguments: list[str]) -> int:
    """Fuzz the named readers, or all."""
    found = fuzz(int(arguments[0]), arguments[1:])
    for kind, wrong in found.items():
        print(f"{kind}: {wrong.total()} of {arguments[0]} went wrong", flush=True)
        for problem, times in wrong.most_common(8):
            print(f"    {times} x {problem}", flush=True)
    return 1 if sum(wrong.total() for wrong in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
