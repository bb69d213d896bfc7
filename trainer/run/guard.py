"""NaN, inf and loss spikes: one decision for all ranks, before the weights change.

    z = (loss - median) / (1.4826 * median of |losses - median|)      over the last `window` good steps

Until guard.min_history steps are there, a loss more than a nat above both its highest value so far and ln V, which guessing
would give, is warned of: a learning rate that is too high from the first step does that.

Median and MAD, not mean and deviation: an outlier must not widen the measure that judges it. The loss is the global one (summed
over ranks), so every rank comes to the same verdict without another message. A step is judged by its loss before the update and
by its gradient norm after it; engines themselves skip an update whose norm is not finite.

`guard.*` of the recipe says what follows: warn, skip the update, roll back to the newest checkpoint and exclude the dialogues
of the batch from there on (RUN/excluded.jsonl; the order of all others stays), or stop. Events carry the dialogues' uids.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from chatmill.config import ConfigError
from chatmill.run_files import read_jsonl

from ...data.packing.sources import RECORD, record_exclusion
from ...data.stream import PackedBatch
from ..config import GuardSection
from ..distributed.world import World
from .folder import RunFolder
from .state import TrainState

Action = Literal["warn", "skip", "rollback", "stop"]
REASON = "guard:"
EARLY_RISE = 1.0  # nats above the highest loss so far


@dataclass(frozen=True)
class BadStep:
    """A step with NaN, inf or a loss spike. value: the loss or gradient norm; z: how far it is from the median."""

    kind: Literal["nan", "spike"]
    action: Action
    value: float
    z: float | None
    why: str


class Guard:
    """Judges each step and records what it did. What it compares with is in TrainState, hence in every checkpoint."""

    def __init__(self, section: GuardSection, folder: RunFolder, world: World, guessing: float | None = None) -> None:
        """guessing: the loss of a model that takes every token to be as likely, where that means something."""
        self.section, self.folder, self.world, self.guessing = section, folder, world, guessing

    def judge_loss(self, loss: float, state: TrainState) -> BadStep | None:
        """Before the update: loss of the step in nats per token, over all ranks."""
        if not math.isfinite(loss):
            return self._nan(loss, "the loss")
        if self.section.on_spike == "off":
            return None
        z = robust_z(loss, state.losses, self.section.min_history)
        if z is None:
            return self._early(loss, state)
        if z <= self.section.spike_z:
            return None
        why = f"the loss of {loss:.4f} is {z:.1f} robust deviations above the last {len(state.losses)} steps"
        return BadStep("spike", self.section.on_spike, loss, z, why)

    def _early(self, loss: float, state: TrainState) -> BadStep | None:
        """Before there is a history: a loss far above all earlier ones and above guessing. It is only warned of."""
        if self.guessing is None or not state.losses or loss <= max(*state.losses, self.guessing) + EARLY_RISE:
            return None
        why = (
            f"the loss of {loss:.4f}, after {state.losses[0]:.4f} at first, is worse than guessing ({self.guessing:.2f}): "
            "the learning rate is too high for the start. Raise schedule.warmup_steps or lower optimizer.lr"
        )
        return BadStep("spike", "warn", loss, None, why)

    def judge_gradient(self, norm: float) -> BadStep | None:
        """After the update, which the engine skips where the norm is not finite."""
        return None if math.isfinite(norm) else self._nan(norm, "the gradient norm")

    def decide(
        self, bad: BadStep | None, loss: float, state: TrainState, micro: Sequence[PackedBatch], say: Callable[[str], None]
    ) -> bool:
        """Record the step that state.step now counts; True where the run is to be rolled back. Every rank must call it.

        Raises ConfigError where the run must stop.
        """
        if bad is None or bad.action == "warn":
            state.skipped_in_row = 0
            state.losses = [*state.losses, loss][-self.section.window :]
            if bad is not None:
                self._event("loss_spike", bad, state, micro)
                say(f"warning: step {state.step}: {bad.why}")
            return False
        state.skipped_in_row += 1
        self._event("skipped_step", bad, state, micro)
        say(f"step {state.step} is skipped: {bad.why}")
        roll_back = bad.action == "rollback"
        if bad.action == "stop":
            self._stop(bad, state, f"guard.on_{bad.kind}=stop")
        if state.skipped_in_row > max(self.section.max_skips, roll_back):
            self._stop(bad, state, f"{self.section.max_skips} updates in a row were skipped before it (guard.max_skips)")
        if roll_back and self.rollbacks() >= self.section.max_rollbacks:
            self._stop(bad, state, f"the run was already rolled back {self.section.max_rollbacks} times (guard.max_rollbacks)")
        return roll_back

    def exclude(self, bad: BadStep, state: TrainState, micro: Sequence[PackedBatch], step: int) -> frozenset[str]:
        """Leave out the dialogues of the batch once `step` steps are done, in this attempt and all later ones."""
        uids = frozenset(self._uids(micro))
        if self.world.is_main:
            record_exclusion(self.folder.path, step, uids, f"{REASON} {bad.kind} at step {state.step}: {bad.why}")
            self.folder.event("rollback", step=state.step, to_step=step, kind=bad.kind, excluded=len(uids))
        self.world.barrier()
        return uids

    def rollbacks(self) -> int:
        """How often the run was rolled back, in this attempt and earlier ones."""
        lines = read_jsonl(self.folder.path / RECORD) if self.world.is_main else ()
        return self.world.gather(sum(str(line.get("reason", "")).startswith(REASON) for line in lines))[0]

    def _event(self, event: str, bad: BadStep, state: TrainState, micro: Sequence[PackedBatch]) -> None:
        uids = self._uids(micro)
        if self.world.is_main:
            z = None if bad.z is None else round(bad.z, 2)
            self.folder.event(event, step=state.step, kind=bad.kind, value=str(bad.value), z=z, uids=uids)

    def _uids(self, micro: Sequence[PackedBatch]) -> list[str]:
        """Dialogues of the whole global batch, over all ranks."""
        return sorted({uid for part in self.world.gather([u for batch in micro for u in batch.uids]) for uid in part})

    def _stop(self, bad: BadStep, state: TrainState, rule: str) -> None:
        if self.world.is_main:
            self.folder.event("stopped", step=state.step, kind=bad.kind, reason=f"{bad.why}; {rule}")
        raise ConfigError(
            f"stopped at step {state.step}: {bad.why}; {rule}.\n"
            "The dialogues of the batch are in events.jsonl (`chatmill data at RUN STEP` shows them); the newest checkpoint\n"
            "is from before this step. Lower optimizer.lr, exclude the dialogues (data.exclude), or change guard.* to go on."
        )

    def _nan(self, value: float, what: str) -> BadStep:
        return BadStep("nan", self.section.on_nan, value, None, f"{what} is {value}")


def robust_z(value: float, history: Sequence[float], least: int) -> float | None:
    """Distance of value above the median in robust deviations; None with fewer than `least` values.

    If more than half of the values are equal, the MAD is 0; then a thousandth of the median replaces it.
    """
    if len(history) < max(2, least):
        return None
    middle = statistics.median(history)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in history)
    return (value - middle) / max(spread, 1e-3 * abs(middle), 1e-12)
