"""The checkpoints of one run: find and restore the newest good one; save new ones and delete old ones.

checkpoints = RunCheckpoints(run)
found = checkpoints.newest()                        # all ranks verify it together; damaged ones are reported and set aside
state = checkpoints.restore(found, engine, stream)
checkpoints.save(engine, stream, state)             # returns once the copy is made; a thread writes it
problem = checkpoints.wait()
"""

from __future__ import annotations

import contextlib
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from chatmill.config import ConfigError, dump_yaml
from chatmill.run_files import list_checkpoints, step_of

from ...data.stream import PackedStream
from ..adapters.merging import META, check_base, facts_of
from ..adapters.sources import AdaptedSource
from ..checkpoint.checkpoint import (
    BEST,
    Checkpoint,
    CheckpointError,
    best_of,
    config_bytes,
    open_checkpoint,
    prune,
    set_aside_after,
    verify_files,
)
from ..checkpoint.files import Share
from ..checkpoint.random_state import random_state, restore_random_state
from ..checkpoint.saver import CheckpointSaver, SaveResult
from ..checkpoint.sharding import TensorSource
from ..config import Recipe
from ..distributed.world import World
from ..engine.engine import Engine
from ..run.state import TrainState
from .context import RunContext


class RunCheckpoints:
    """Finds, restores, saves and prunes. On exit it waits for a save in progress."""

    def __init__(self, run: RunContext) -> None:
        self.run, self.folder, self.world = run, run.folder, run.world
        self.saved_step = -1
        self._saver = CheckpointSaver(run.world, self._done, asynchronous=run.recipe.checkpoint.asynchronous)

    # ---------------------------------------------------------------- finding and restoring

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint, or None before the first; every rank must call it. Waits for a save in progress.

        The ranks share the reading: each hashes a part of the files. Raises CheckpointError when none of them is good.
        """
        self.wait()
        names: list[str] = self.world.gather([path.name for path in list_checkpoints(self.folder.path)])[0]
        problems: list[str] = []
        for name in reversed(names):
            path = self.folder.path / "checkpoints" / name
            found = self.world.gather(verify_files(path, (self.world.rank, self.world.world_size)))
            damage = sorted({problem for part in found for problem in part})
            if not damage:
                if problems:
                    self._set_aside(path, problems)
                return open_checkpoint(path, verify=False)
            problems += damage
        if problems:
            raise CheckpointError(f"{self.folder.path}: no good checkpoint.\n" + "\n".join(problems))
        return None

    def _set_aside(self, good: Path, problems: list[str]) -> None:
        if self.world.is_main:
            set_aside_after(self.folder.path, step_of(good))
            self.folder.event("damaged_checkpoint", problems=problems, using=good.name)
        for problem in problems:
            self.run.display.say(f"warning: {problem}\nwarning: using the older {good} instead")
        self.world.barrier()

    def restore(self, checkpoint: Checkpoint, engine: Engine, stream: PackedStream) -> TrainState:
        """Put engine, stream and random generators where the checkpoint left them; returns the rest."""
        state, position = _read_state(checkpoint)
        engine.load_model(self._weights(checkpoint))
        engine.load_optimizer(checkpoint)
        if engine.average is not None:
            engine.load_average(checkpoint)
        stream.load_state_dict(position)
        restore_random_state(_random_tensors(checkpoint, self.world.rank), self.world.device)
        checkpoint.close()
        self.saved_step = state.step
        noted = _step_of_best(self.folder.path)
        # of steps that are now computed again, or of a validation that was NaN
        if self.world.is_main and (state.best_step <= state.step < noted or state.best_step < 0 <= noted):
            (self.folder.path / "checkpoints" / BEST).unlink()
        return state

    def _weights(self, checkpoint: Checkpoint) -> TensorSource:
        """All weights of the model: those of an adapter checkpoint with those of its base."""
        facts = self.run.adapter_facts()
        if facts is None:
            return checkpoint
        assert self.run.base is not None
        saved = facts_of(checkpoint)
        if saved is None:
            raise CheckpointError(f"{checkpoint.path} holds a whole model, but the recipe trains an adapter.")
        check_base(self.run.base, saved, checkpoint.path)
        return AdaptedSource(self.run.base, checkpoint, facts.settings.scale)

    # ---------------------------------------------------------------- saving

    def save(self, engine: Engine, stream: PackedStream, state: TrainState, best: bool = False) -> None:
        """Begin to save the state after `state.step` steps; every rank must call it. best: the best validation so far."""
        recipe = self.run.recipe
        note = {"step": state.step, "metric": recipe.checkpoint.best, "value": state.best_value} if best else None
        if self.saved_step == state.step and not self.wait():
            if note and self.world.is_main:
                self._note_best(note)
            return
        meta: dict[str, Any] = {
            "step": state.step,
            "tokens": state.tokens,
            "run": recipe.run.name,
            "data": recipe.data.path,
            "data_fingerprint": stream.dataset.fingerprint,
            "strategy": recipe.parallel.strategy,
            "world_size": self.world.world_size,
            "lineage": state.lineage,
            "best": note,
        }
        if (facts := self.run.adapter_facts()) is not None:
            meta[META] = facts.as_meta()
        files = {
            "config.json": config_bytes(self.run.config),
            "state.json": state.as_json(stream.state_dict()),
            "recipe.yaml": dump_yaml(recipe).encode(),
            **self.run.tokenizer.files(),
        }
        rank = self.world.rank
        generators = (
            Share("rng", f"rng.{kind}.{rank}", tuple(tensor.shape), 0, tensor)
            for kind, tensor in random_state(self.world.device).items()
        )
        folder = self.folder.path / "checkpoints" / f"step-{state.step:08d}"
        self._saver.save(folder, chain(engine.shares(), generators), meta, files)
        self.saved_step = state.step

    def save_last(self, engine: Engine, stream: PackedStream, state: TrainState, best: bool = False) -> None:
        """The final save of the run; returns when it is published. Raises ConfigError when it cannot be written."""
        if self.wait():
            self.saved_step = -1  # the newest save failed: try again
        self.save(engine, stream, state, best)
        if problem := self.wait():
            kept = max(map(step_of, list_checkpoints(self.folder.path)), default=0)
            raise ConfigError(
                f"{self.folder.path}: the last checkpoint (step {state.step}) could not be written: {problem}\n"
                f"Free some disk space and run again: it continues after step {kept}."
            )

    def wait(self) -> str:
        """Wait for the newest save; returns "" or why it failed. The same on every rank."""
        return self._saver.wait()

    def _done(self, result: SaveResult) -> None:
        """In rank 0's writer thread."""
        step = int(result.meta["step"])
        if result.problem:
            problem = f"checkpoint of step {step} could not be written: {result.problem}"
            self.folder.event("checkpoint_failed", step=step, reason=problem)
            self.run.display.say(f"{problem}\ntraining goes on; the earlier checkpoints are intact.")
            return
        if result.meta["best"]:
            self._note_best(result.meta["best"])
        self.folder.event("checkpoint", step=step, seconds=round(result.seconds, 3), stall_s=round(result.stall_s, 4))
        protect = set()
        with contextlib.suppress(CheckpointError):
            protect = {best_of(self.folder.path).name}
        keep = self.run.recipe.checkpoint
        prune(self.folder.path, keep.keep, frozenset(protect), keep.keep_every_steps)

    def _note_best(self, note: dict[str, Any]) -> None:
        """Note which checkpoint has the best validation so far."""
        self.folder.write(f"checkpoints/{BEST}", {"checkpoint": f"step-{note['step']:08d}", **note})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._saver.give_up()


def newest_readable(run_dir: Path) -> Checkpoint | None:
    """The run's newest checkpoint that opens, for its shape and tokenizer; None before the first. Its tensors are not checked.

    Raises CheckpointError when there are some and none opens.
    """
    problems = []
    for folder in reversed(list_checkpoints(run_dir)):
        try:
            return open_checkpoint(folder, verify=False)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"{run_dir}: no good checkpoint.\n" + "\n".join(problems))
    return None


def origin(checkpoint: Checkpoint, recipe: Recipe, world: World) -> dict[str, Any]:
    """One line of lineage: which checkpoint was continued or started from, and by which engine."""
    return {
        "checkpoint": str(checkpoint.path),
        "checksum": checkpoint.manifest.get("checksum"),
        "step": checkpoint.meta.get("step"),
        "strategy": recipe.parallel.strategy,
        "world_size": world.world_size,
    }


def _read_state(checkpoint: Checkpoint) -> tuple[TrainState, dict[str, Any]]:
    file = checkpoint.path / "state.json"
    try:
        return TrainState.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not the state of a run ({error!r}); it cannot be continued from here.") from None


def _step_of_best(run_dir: Path) -> int:
    try:
        return step_of(best_of(run_dir))
    except (CheckpointError, ValueError, IndexError):
        return -1


def _random_tensors(checkpoint: Checkpoint, rank: int) -> dict[str, Any]:
    """The generator states of a rank; where more ranks continue than saved, those of rank modulo the old number."""
    names = checkpoint.names("rng")
    if names == ["rng.cpu"]:  # before format 2
        return {"cpu": checkpoint.tensor("rng.cpu")}
    if not names:
        raise CheckpointError(f"{checkpoint.path}: no random generators (rng) in it; it cannot continue a run.")
    writers = 1 + max(int(name.rsplit(".", 1)[1]) for name in names)
    ending = f".{rank % writers}"
    return {name.split(".")[1]: checkpoint.tensor(name) for name in names if name.endswith(ending)}
