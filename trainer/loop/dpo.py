"""Direct preference optimisation (DPO) on pairs of replies, with the ordinary model, kernels and stream.

    r(y) = beta * (log p(y | x) - log p_reference(y | x))          length_normalised: both divided by the tokens of y
    loss = -(1 - s) * log sigmoid(r(chosen) - r(rejected)) - s * log sigmoid(r(rejected) - r(chosen))    s label_smoothing
    averaged over all pairs of a step, of all ranks.   accuracy: share of pairs with r(chosen) > r(rejected)

Shapes: T tokens, S segments, P pairs of a batch. The log-probabilities are sums over each segment of the fused linear
cross-entropy's token losses, so no logits exist here either. The reference is the checkpoint that training starts from: its
log-probabilities are computed once, before the first step, and kept in the run folder: with every engine no second model stays
in memory, and a resumed run has the same ones. A run that trains an adapter takes its base, with the adapter off, instead.
Source: Rafailov et al. 2023 (arXiv:2305.18290); length normalisation: Meng et al. 2024 (arXiv:2405.14734), but relative to the
reference; label smoothing: Mitchell 2023, "A note on DPO with noisy preferences".
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from chatmill.config import ConfigError
from chatmill.files import write_durably

from ...data.packing.mixture import Mixture
from ...data.shards.dataset import TokenDataset
from ...data.stream import PackedBatch, PackedStream
from ..adapters.layers import adapters_off
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.manifest import CheckpointError
from ..checkpoint.vocabulary import with_new_rows
from ..config import PreferenceSection, Recipe
from ..distributed.world import World
from ..engine.engine import Engine, Objective, run_model
from ..model.decoder import LossOutput
from ..parallel.context import ContextGroup
from ..run.state import TrainState
from .context import RunContext

REFERENCE = "reference.npz"


def log_probabilities(token_losses: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> Tensor:
    """log p of the supervised tokens of both halves, Float["P 2"]; token_losses Float["T"] are 0 where there is no target."""
    offsets = cu_seqlens.to(torch.int64)
    # a segmented sum in a fixed order: no atomics, so runs repeat
    sums = torch.segment_reduce(token_losses, "sum", offsets=offsets)
    return -sums[pairs]


def preference_loss(policy: Tensor, reference: Tensor, lengths: Tensor, options: PreferenceSection) -> LossOutput:
    """policy, reference: log-probabilities Float["P 2"] of chosen and rejected; lengths Int["P 2"]: their supervised tokens."""
    rewards = policy - reference.to(policy.dtype)
    if options.length_normalised:
        rewards = rewards / lengths.to(policy.dtype)
    margin = options.beta * (rewards[:, 0] - rewards[:, 1])
    smoothing = options.label_smoothing
    losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    return LossOutput(losses.sum(), (margin.detach() > 0).sum(), torch.tensor(len(margin), device=margin.device))


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of every pair under the starting checkpoint: uid -> row of values Float64["N 2"]."""

    rows: Mapping[str, int]
    values: NDArray[np.float64]

    def of(self, uids: Iterable[str]) -> Tensor:
        """Float64["P 2"] on the CPU. Raises ConfigError for a pair that the reference pass did not see."""
        try:
            chosen = [self.rows[uid] for uid in uids]
        except KeyError as error:
            raise ConfigError(
                f"preference: no reference log-probability of pair {error.args[0]}: the data set is not the one the run began "
                f"with.\nUse another run.name, or remove {REFERENCE} from the run folder to compute them again."
            ) from None
        return torch.from_numpy(self.values[chosen]).reshape(-1, 2)


@dataclass(frozen=True)
class PairObjective:
    """Makes the objective of a batch (already on its device) from the reference. ranks: those that divide it, or None."""

    reference: Reference
    options: PreferenceSection
    ranks: ContextGroup | None = None

    def __call__(self, batch: PackedBatch) -> Objective:
        reference = self.reference.of(batch.uids).to(batch.tokens.device, torch.float32)
        return objective_of(batch, reference, self.options, self.ranks)


@dataclass(frozen=True)
class ScoreObjective:
    """Collects the log-probabilities in `scores`, Float["P 2"] per batch, instead of computing a loss."""

    scores: list[Tensor]
    ranks: ContextGroup | None = None

    def __call__(self, batch: PackedBatch) -> Objective:
        def objective(token_losses: Tensor) -> LossOutput:
            self.scores.append(pair_scores(token_losses.detach(), batch, self.ranks))
            nothing = token_losses.new_zeros(())
            return LossOutput(nothing, nothing.long(), nothing.long())

        return objective


@dataclass(frozen=True)
class AdapterObjective:
    """PairObjective of a run that trains an adapter: the reference is the same model with the adapter off.

    Each batch runs once more without gradients, so there is neither a pass before the first step nor a second model.
    """

    engine: Engine
    options: PreferenceSection

    def __call__(self, batch: PackedBatch) -> Objective:
        scores: list[Tensor] = []
        ranks = self.engine.decoder.context
        with torch.no_grad(), adapters_off(self.engine.decoder):
            run_model(self.engine, batch, ScoreObjective(scores, ranks))
        return objective_of(batch, scores[0], self.options, ranks)


def objective_of(batch: PackedBatch, reference: Tensor, options: PreferenceSection, ranks: ContextGroup | None) -> Objective:
    """The preference loss of a batch on its device. Where several ranks divide it, each holds a part of every reply: they add
    up the log-probabilities, and the first of them alone counts the loss, so that the sum over all ranks is right."""
    lengths = pair_lengths(batch, ranks)

    def objective(token_losses: Tensor) -> LossOutput:
        output = preference_loss(pair_scores(token_losses, batch, ranks), reference, lengths, options)
        return output if ranks is None or ranks.rank == 0 else LossOutput(*(0 * value for value in output))

    return objective


def pair_scores(token_losses: Tensor, batch: PackedBatch, ranks: ContextGroup | None) -> Tensor:
    """log_probabilities of a batch's pairs, over all ranks that divide it."""
    found = log_probabilities(token_losses, batch.cu_seqlens, checked_pairs(batch))
    return found if ranks is None else ranks.sum(found)


def checked_pairs(batch: PackedBatch) -> Tensor:
    """batch.pairs, which every batch of a preference data set has."""
    assert batch.pairs is not None  # check_objective
    return batch.pairs


def pair_lengths(batch: PackedBatch, ranks: ContextGroup | None = None) -> Tensor:
    """Supervised tokens of both halves, Int64["P 2"], on the batch's device."""
    return -pair_scores((batch.targets >= 0).to(torch.float32), batch, ranks).long()


def check_objective(recipe: Recipe, stream: PackedStream) -> None:
    """Refuse ordinary dialogues for dpo, and pairs for sft, which would train on the rejected replies. Raises ConfigError."""
    if stream.preference and recipe.objective != "dpo":
        raise ConfigError(
            f"{recipe.data.path} holds preference pairs: "
            f"objective={recipe.objective} would train on the rejected replies too.\n"
            "Set objective=dpo, or build the data set with pair.mode=dialogues, which keeps the chosen ones."
        )
    if recipe.objective == "dpo" and not stream.preference:
        raise ConfigError(
            f"objective=dpo needs preference pairs, {recipe.data.path} holds ordinary dialogues.\n"
            "Build it with pair.mode=preference, or set objective=sft."
        )


def reference_pass(recipe: Recipe, source: Mixture | TokenDataset, world: World) -> PackedStream:
    """This rank's share of a data set's pairs, each pair once."""
    return PackedStream(
        source,
        sequence_length=recipe.data.sequence_length,
        micro_batch=recipe.train.micro_batch,
        **world.place(),
        overlong="drop",
        shuffle=False,
        epochs=1,
    )


def pair_objective(
    run: RunContext, engine: Engine, state: TrainState, resume: Checkpoint | None
) -> PairObjective | AdapterObjective:
    """The objective of a run. With an adapter, the reference is the model without it.

    Otherwise it is read from the run folder, or computed from the starting checkpoint and stored: a run that continues without
    it needs the checkpoint that it started from. Raises ConfigError.
    """
    recipe, world, path = run.recipe, run.world, run.folder.path / REFERENCE
    if recipe.adapter is not None:
        return AdapterObjective(engine, recipe.preference)
    if world.any(world.is_main and path.is_file()):
        return PairObjective(load_reference(path), recipe.preference, engine.decoder.context)
    base = run.starting_checkpoint() if resume is None else same_start(run, state)
    assert base is not None  # the recipe was checked
    run.display.say("computing the log-probabilities of all pairs under the starting checkpoint, once")
    sources: list[Mixture | TokenDataset] = [run.mixture, *run.splits.values()]
    scores: list[Tensor] = []
    with run.watchdog.paused():
        if resume is not None:
            assert base is not None  # the recipe was checked
            engine.load_model(with_new_rows(base, run.config, run.tokenizer))
        engine.objective = ScoreObjective(scores, engine.decoder.context)
        engine.model.eval()
        passes = (reference_pass(recipe, source, world) for source in sources)
        reference = take_reference(engine.forward, scores, passes, world)
        if resume is not None:
            engine.load_model(resume)
            if engine.average is not None:
                engine.load_average(resume)  # load_model has reset it
        if world.is_main:
            save_reference(reference, path)
    return PairObjective(reference, recipe.preference, engine.decoder.context)


def same_start(run: RunContext, state: TrainState) -> Checkpoint:
    """The checkpoint that a continued run started from, opened. Raises ConfigError where it is gone or has changed."""
    missing = f"{run.folder.path / REFERENCE} is missing: the log-probabilities of the pairs under the starting checkpoint."
    try:
        base = run.starting_checkpoint()
    except CheckpointError as error:
        raise ConfigError(f"{missing}\nThey cannot be computed again: {error}") from None
    assert base is not None  # the recipe was checked
    began = state.lineage[0] if state.lineage else {}
    if began.get("checksum") not in (None, base.manifest.get("checksum")):
        raise ConfigError(
            f"{missing}\nThey cannot be computed again: {base.path} is not the checkpoint that the run started from "
            f"({began['checkpoint']}, step {began['step']}).\nPut the file back, or begin another run: run.name=NEW."
        )
    return base


@torch.no_grad()
def take_reference(
    forward: Callable[[PackedBatch], LossOutput], scores: list[Tensor], streams: Iterable[Iterable[PackedBatch]], world: World
) -> Reference:
    """Run the starting model once over all pairs; each rank computes its share and gets all of them.

    forward: through the wrapped model with ScoreObjective(scores). streams: of training and validation data, one pass each.
    """
    uids: list[str] = []
    for stream in streams:
        for batch in stream:
            forward(batch)
            uids += batch.uids
    if world.context_rank:  # the ranks of a context have computed the same
        uids.clear()
        scores.clear()
    values = torch.cat([score.double().cpu() for score in scores]).numpy() if scores else np.zeros((0, 2))
    scores.clear()
    parts = world.gather((uids, values))
    names = [uid for part in parts for uid in part[0]]
    return Reference({uid: row for row, uid in enumerate(names)}, np.concatenate([part[1] for part in parts]))


def save_reference(reference: Reference, path: Path) -> None:
    """Write whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, uids=np.array(list(reference.rows)), values=reference.values)
    write_durably(path, buffer.getvalue())


def load_reference(path: Path) -> Reference:
    """Inverse of save_reference."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            uids, values = arrays["uids"].tolist(), arrays["values"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{path}: damaged ({error}).\nRemove it: the next start computes the log-probabilities again."
        ) from error
    return Reference({uid: row for row, uid in enumerate(uids)}, values)
