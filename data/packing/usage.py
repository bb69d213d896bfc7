"""Which dialogues a run learned from, and when: worked out again from the order, nothing has to be logged while training.

    at("runs/NAME", 100)           -> every piece of every dialogue in step 100, with its raw file and line
    where("runs/NAME", uid)        -> every step in which a dialogue was used

Steps count from 1 as in metrics.jsonl. `at` begins at the nearest checkpoint before; `where` plans every step of the run, at
about a microsecond per dialogue. A run folder is read through config.yaml, environment.json and checkpoints/*/state.json; other
loops give their own `Schedule` to `uses_at` and `uses_of`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from chatmill.config import ConfigError
from chatmill.run_files import read_jsonl

from .config import SourcesSection
from .options import StreamOptions
from .order import DialogueSource
from .schedule import Position, Schedule
from .sources import begun_with, exclusions, open_mixture
from .windows import Pack, quarantined


@dataclass(frozen=True, slots=True)
class Use:
    """One piece of a dialogue in a step. pack: its place in the global batch; start: its first token in the dialogue.

    data: name of the data set. source, origin: as the importer wrote them, raw `file:line` or key.
    """

    step: int
    pack: int
    data: str
    uid: str
    source: str
    origin: str
    start: int
    tokens: int
    loss_tokens: int


def at(run: str | Path, step: int) -> list[Use]:
    """What a run used in a step, or was about to use in the one that did not end. Raises ConfigError for one further ahead."""
    folder = Path(run)
    schedule, saved = run_schedule(folder)
    reached = max(reached_step(folder), *(position.step for position in saved), 0)
    most = reached + _steps_per_line(folder)
    if step > most:
        raise ConfigError(
            f"data.usage: step {step}: {run} has reached step {reached}, so nothing was learned there yet.\n"
            f"Ask for a step up to {most}."
        )
    return uses_at(schedule, step, saved)


def where(run: str | Path, uid: str) -> list[Use]:
    """Every use of a dialogue up to the last step that the run has reached."""
    schedule, _ = run_schedule(Path(run))
    return uses_of(schedule, uid, last_step(Path(run)))


def table(uses: Iterable[Use]) -> str:
    """Uses as lines for people: step, pack, uid, raw place, tokens."""
    lines = [f"{'step':>8} {'pack':>5} {'tokens':>7} {'loss':>7}  {'uid':<36} origin"]
    for use in uses:
        piece = f" from token {use.start}" if use.start else ""
        uid = f"{use.data}/{use.uid}" if use.data != "data" else use.uid
        lines.append(f"{use.step:>8} {use.pack:>5} {use.tokens:>7} {use.loss_tokens:>7}  {uid:<36} {use.origin}{piece}")
    return "\n".join(lines)


def uses_at(schedule: Schedule, step: int, saved: Iterable[Position] = ()) -> list[Use]:
    """What a schedule uses in step `step` (from 1), found from the latest of the saved positions before it."""
    if step < 1:
        raise ConfigError(f"data.usage: step {step}: steps count from 1.")
    near = [position for position in saved if position.step < step]
    start = max(near, key=lambda position: position.step, default=schedule.start)
    for planned in schedule.steps(start):
        if planned.step == step - 1:
            return [use for k, pack in enumerate(planned.packs) for use in _uses(schedule, step, k, pack, pack.indices())]
    raise ConfigError(f"data.usage: step {step}: the data ends before it.")


def uses_of(schedule: Schedule, uid: str, until: int) -> list[Use]:
    """Every use of a dialogue in steps 1 .. until of a schedule."""
    found = [(k, index) for k, source in enumerate(schedule.sources) for index in _indices(source, uid)]
    if not found:
        names = ", ".join(schedule.mixture.sources)
        raise ConfigError(
            f"data.usage: no dialogue {uid!r} in the data set ({names}).\n"
            "It may have been dropped while the data set was built: see report.json there."
        )
    uses: list[Use] = []
    steps = schedule.steps()
    for step, planned in zip(range(1, until + 1), steps, strict=False):
        for k, pack in enumerate(planned.packs):
            for source, index in found:
                if pack.source == source:
                    pieces = pack.indices()
                    uses.extend(_uses(schedule, step, k, pack, pieces[pack.window.plan.dialogue[pieces] == index]))
    return uses


def _uses(schedule: Schedule, step: int, place: int, pack: Pack, pieces: NDArray[np.int64]) -> Iterator[Use]:
    plan, source = pack.window.plan, schedule.sources[pack.source]
    name = list(schedule.mixture.sources)[pack.source]
    for i in pieces.tolist():
        block, local = int(plan.block[i]), int(plan.local[i])
        if block in quarantined(source):  # used before it was damaged; its names went with it
            sizes = int(plan.length[i]), int(plan.loss[i])
            yield Use(step, place, name, "?", "", f"block {block}, in the quarantine since", 0, *sizes)
            continue
        data = source.read_block(block)
        kind, origin = getattr(data, "sources", {local: ("", "")})[local]
        start = int(plan.offset[i]) - int(data.offsets[local])
        yield Use(step, place, name, data.uids[local], kind, origin, start, int(plan.length[i]), int(plan.loss[i]))


def _indices(source: DialogueSource, uid: str) -> Iterator[int]:
    held = quarantined(source)
    for block in range(len(source.block_starts) - 1):
        if block in held:
            continue
        names = source.read_block(block).uids
        if uid in names:
            yield from (int(source.block_starts[block]) + k for k, name in enumerate(names) if name == uid)


# ---------------------------------------------------------------- run folders


def run_schedule(run: Path) -> tuple[Schedule, list[Position]]:
    """The schedule of a run's training data and the positions saved in its checkpoints."""
    config: dict[str, Any] = yaml.safe_load(_text(run / "config.yaml"))
    data, train = config["data"], config["train"]
    states = [json.loads(file.read_text())["stream"] for file in sorted(run.glob("checkpoints/*/state.json"))]
    if states:
        packs = int(states[-1]["global_batch"])
    else:
        ranks = int(json.loads(_text(run / "environment.json")).get("world_size", 1))
        context = config.get("parallel", {}).get("context", 1)
        packs = ranks // context * train["micro_batch"] * train["accumulation"]
    sources = SourcesSection.model_validate({name: data[name] for name in SourcesSection.model_fields if name in data})
    options = StreamOptions(
        sequence_length=data["sequence_length"],
        global_batch=packs,
        seed=train["seed"],
        overlong=data.get("overlong", "truncate"),
        overlap=data.get("overlap", 0),
        epochs=train.get("epochs"),
        max_tokens=train.get("tokens"),
        max_dialogues=data.get("max_dialogues"),
        exclude=exclusions(sources, run),
    )
    schedule = Schedule(open_mixture(sources, damaged_blocks=1.0, begun=begun_with(run)), options)
    return schedule, [schedule.position(state) for state in states]


def reached_step(run: Path) -> int:
    """The last step that is known to have ended; 0 before the first."""
    return last_step(run) if (run / "metrics.jsonl").is_file() else 0


def _steps_per_line(run: Path) -> int:
    """Steps between two lines of metrics.jsonl: so many may have ended, or begun, after the last one."""
    config = yaml.safe_load(_text(run / "config.yaml"))
    return max(1, int((config.get("logging") or {}).get("every_steps", 1)))


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ConfigError(f"data.usage: {file} does not exist: has this run begun?")
    return max((line.get("step", 0) for line in read_jsonl(file)), default=0)


def _text(file: Path) -> str:
    if not file.is_file():
        raise ConfigError(f"data.usage: {file} does not exist. Expected a run folder, as in runs/NAME.")
    return file.read_text(encoding="utf-8")
