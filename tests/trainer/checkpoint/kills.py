"""kill -9 at random operations on the disk: of a save, an import, a build, and a training that rolls back.

    python -m tests.trainer.checkpoint.kills 100 [save import build rollback]        # kills of each

Each kill: the command runs until its N-th operation (make, open, rename, sync; half of a file that was to be synced is lost)
and is killed there. What a reader then finds is the old state or the new one, whole. The same command then ends as if nothing
had happened, bit for bit, and leaves nothing hidden.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.trainer.checkpoint.broken_disk import KILL, BrokenDisk

from chatmill.data.check.verify import verify_dataset
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe
from chatmill.data.shards.manifest import SEEN
from chatmill.run_files import list_checkpoints, read_jsonl
from chatmill.trainer.checkpoint.checkpoint import CheckpointWriter, config_bytes, open_checkpoint, prune
from chatmill.trainer.checkpoint.files import Share
from chatmill.trainer.checkpoint.saver import CheckpointSaver
from chatmill.trainer.config import Recipe
from chatmill.trainer.convert.hf import export_hf, import_hf
from chatmill.trainer.distributed.world import World
from chatmill.trainer.engine.engine import StepSums
from chatmill.trainer.engine.torch_engine import TorchEngine
from chatmill.trainer.loop.loop import train
from chatmill.trainer.model.decoder import Decoder
from chatmill.trainer.model_config import ModelConfig

SHAPE = ModelConfig(vocab_size=320, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, context=128)
STEPS, EVERY, SPIKE = 8, 5, 6


@dataclass(frozen=True)
class Subject:
    """prepare: the state before; run: what is killed, and afterwards run to its end; check: what a reader may find then."""

    prepare: Callable[[Path], None]
    run: Callable[[Path], None]
    check: Callable[[Path, bool], None]


def in_child(work: Callable[[], Any]) -> int:
    """Run it in a fork of this process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            with Path(os.devnull).open("w") as nothing:
                os.dup2(nothing.fileno(), 1)
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    return os.waitpid(child, 0)[1]


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*") if p.name != ".set.lock"]


# ---------------------------------------------------------------- save


def _save(folder: Path, step: int) -> None:
    saver = CheckpointSaver(World(0, 1, 0, 1, torch.device("cpu"), "none"), lambda result: None, asynchronous=False)
    tensors = {name: torch.full((50, 3), float(step)) for name in ("a", "b", "c")}
    shares = [Share("model", name, (50, 3), 0, tensor) for name, tensor in tensors.items()]
    files = {"config.json": config_bytes(SHAPE), "state.json": json.dumps({"step": step}).encode()}
    saver.save(folder / "out" / "checkpoints" / f"step-{step:08d}", shares, {"step": step}, files)
    assert not saver.wait()
    prune(folder / "out", keep=2)


def _check_save(folder: Path, ended: bool) -> None:
    found = open_checkpoint(folder / "out")
    step = found.meta["step"]
    assert step == 2 if ended else step in (1, 2)
    assert all(bool((found.tensor(name) == float(step)).all()) for name in ("a", "b", "c"))
    assert json.loads((found.path / "state.json").read_text()) == {"step": step}


# ---------------------------------------------------------------- import


def _source(folder: Path, name: str, seed: int) -> None:
    model = Decoder(SHAPE)
    model.init_weights(seed)
    with CheckpointWriter(folder / "ours", SHAPE) as writer:
        for parameter, tensor in model.named_parameters():
            writer.add(parameter, tensor)
    export_hf(folder / "ours", folder / name)
    shutil.rmtree(folder / "ours")


def _prepare_import(folder: Path) -> None:
    _source(folder, "old", 1)
    _source(folder, "new", 2)
    import_hf(folder / "old", folder / "out" / "model")


def _check_import(folder: Path, ended: bool) -> None:
    found = open_checkpoint(folder / "out" / "model")
    source = found.meta["source"]["imported_from"]
    assert source == "new" if ended else source in ("old", "new")
    wanted = Decoder(SHAPE)
    wanted.init_weights({"old": 1, "new": 2}[source])
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in wanted.named_parameters())


# ---------------------------------------------------------------- build


def _recipe(folder: Path, dialogues: int) -> DataRecipe:
    raw = folder / f"raw-{dialogues}.jsonl"
    if not raw.is_file():
        rng = random.Random(dialogues)
        lines = []
        for n in range(dialogues):
            question = {"role": "user", "content": f"Where is thing number {n} of {rng.randint(1, 999)}?"}
            lines.append({"messages": [question, {"role": "assistant", "content": f"It is at {rng.randint(1, 99)}, here."}]})
        raw.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"name": "set", "out": str(folder / "out" / "set"), "sources": [{"format": "openai", "path": str(raw)}]}
    more = {"split": {"validation": 0.2}, "workers": 1, "tokenizer": {"train": {"vocab_size": 300}}}
    return DataRecipe.model_validate(values | more)


def _bytes(folder: Path) -> dict[str, bytes]:
    left_out = ("timings.json", "report.html", SEEN)  # times of this build and of its raw files
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in left_out}


def _prepare_build(folder: Path) -> None:
    build_dataset(_recipe(folder, 40), folder / "whole")
    build_dataset(_recipe(folder, 30))
    shutil.copytree(folder / "out" / "set", folder / "before")


def _check_build(folder: Path, ended: bool) -> None:
    assert verify_dataset(folder / "out" / "set") == []
    found = _bytes(folder / "out" / "set")
    assert found == _bytes(folder / "whole") or (not ended and found == _bytes(folder / "before"))


# ---------------------------------------------------------------- a training that rolls back


def _training(folder: Path, name: str) -> Recipe:
    fields = ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "context")
    shape = {name: getattr(SHAPE, name) for name in fields}
    return Recipe.model_validate(
        {
            "run": {"name": name, "dir": str(folder / "out")},
            "data": {"path": str(folder / "data"), "sequence_length": 128},
            "model": shape,
            "optimizer": {"lr": 3e-3},
            "train": {"steps": STEPS, "precision": "fp32", "cpu_threads": 1},
            "checkpoint": {"every_steps": EVERY, "keep": 9},
            "evaluation": {"at_start": False, "at_end": False},
            "guard": {"on_spike": "rollback", "min_history": 4, "spike_z": 50.0},
            "logging": {"trackers": []},
        }
    )


def _train(folder: Path, name: str = "run") -> None:
    """The dialogues of step SPIKE make a spike whenever they are trained on, as damaged ones would."""
    real, note, count = TorchEngine.forward_backward, folder / "bad", [0]

    def forward_backward(engine: Any, batches: Any) -> StepSums:
        count[0] += 1
        key = str(batches[0].tokens[:40].tolist())
        if count[0] == SPIKE and not note.is_file():
            note.write_text(key)
        sums = real(engine, batches)
        return StepSums(sums.loss_sum * 1000, sums.correct) if note.is_file() and key == note.read_text() else sums

    TorchEngine.forward_backward = forward_backward  # type: ignore[method-assign]
    train(_training(folder, name))


def _prepare_rollback(folder: Path) -> None:
    recipe = _recipe(folder, 200).model_copy(update={"name": "data"})
    tokenizer = {"train": {"vocab_size": 320}}
    build_dataset(DataRecipe.model_validate(recipe.model_dump() | {"tokenizer": tokenizer}), folder / "data")
    assert in_child(lambda: _train(folder, "whole")) == 0
    assert [e["event"] for e in read_jsonl(folder / "out" / "whole" / "events.jsonl")].count("rollback") == 1
    shutil.move(folder / "out" / "whole", folder / "whole")


def _losses(run: Path) -> list[Any]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


def _check_rollback(folder: Path, ended: bool) -> None:
    run = folder / "out" / "run"
    if not ended:
        if list_checkpoints(run):
            open_checkpoint(run)
        return
    assert _losses(run) == _losses(folder / "whole"), (_losses(run), _losses(folder / "whole"))
    found, wanted = open_checkpoint(run), open_checkpoint(folder / "whole")
    assert found.meta["step"] == STEPS and found.index.keys() == wanted.index.keys()
    # Python's and numpy's generators begin anywhere: nothing in a training draws from them
    drawn = [name for name in wanted.index if not name.startswith(("rng.python", "rng.numpy"))]
    assert not (other := [name for name in drawn if not torch.equal(found.tensor(name), wanted.tensor(name))]), other


SUBJECTS = {
    "save": Subject(lambda f: _save(f, 1), lambda f: _save(f, 2), _check_save),
    "import": Subject(_prepare_import, lambda f: import_hf(f / "new", f / "out" / "model") and None, _check_import),
    "build": Subject(_prepare_build, lambda f: build_dataset(_recipe(f, 40)) and None, _check_build),
    "rollback": Subject(_prepare_rollback, _train, _check_rollback),
}


def kill(name: str, count: int, seed: int = 0) -> int:
    """Kill one subject so often, each time from its state before; how many operations it has. Raises AssertionError."""
    subject, chance = SUBJECTS[name], random.Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory(prefix="chatmill-kills-") as place:
        folder = Path(place)
        (folder / "out").mkdir()
        assert in_child(lambda: subject.prepare(folder)) == 0
        shutil.copytree(folder / "out", folder / "start")

        def run(moment: int) -> None:
            with BrokenDisk(folder / "out", KILL if moment else 0, moment) as disk:
                subject.run(folder)
            (folder / "operations").write_text(str(disk.operations))

        assert in_child(lambda: run(0)) == 0
        total = int((folder / "operations").read_text())
        for number in range(count):
            shutil.rmtree(folder / "out")
            shutil.copytree(folder / "start", folder / "out")
            moment = chance.randint(1, total)
            status = in_child(lambda moment=moment: run(moment))  # type: ignore[misc]
            assert status in (9, 0), f"{name}, operation {moment} of {total}: status {status}"  # 0: it had fewer
            subject.check(folder, False)
            again = in_child(lambda: subject.run(folder))
            assert again == 0, f"{name}, after a kill at operation {moment} of {total}: status {again}"
            subject.check(folder, True)
            assert not hidden(folder / "out"), f"{name}, operation {moment} of {total}: {hidden(folder / 'out')}"
            if (number + 1) % 10 == 0:
                print(f"{name}: {number + 1} kills survived", file=sys.stderr, flush=True)
    return total


if __name__ == "__main__":
    for chosen in sys.argv[2:] or SUBJECTS:
        operations = kill(chosen, int(sys.argv[1]))
        print(
            f"{chosen}: {sys.argv[1]} kills at one of {operations} operations each: old or new, whole, and the same end",
            flush=True,
        )
