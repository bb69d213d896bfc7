"""Validation loss, perplexity and token accuracy over a data set's validation split.

    loss = - sum over supervised tokens of ln p(token | its dialogue before it) / their number      (nats per token)
    perplexity = exp(loss);   accuracy = share of supervised tokens that are the model's first choice

Every dialogue is counted once whatever the world size: ranks take packs in turn and the sums are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from chatmill.config import ConfigError

from ...data.packing.options import Annotate
from ...data.shards.dataset import TokenDataset
from ...data.stream import PackedBatch, PackedStream
from ..config import Recipe
from ..distributed.world import World
from ..model.decoder import LossOutput


def validation_batches(
    dataset: TokenDataset,
    *,
    sequence_length: int,
    micro_batch: int,
    world: World,
    max_dialogues: int | None = None,
    annotate: Annotate | None = None,
) -> PackedStream:
    """All validation dialogues (or the first max_dialogues) once, in a fixed order. annotate: fills batch.tile_maps."""
    return PackedStream(
        dataset,
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        **world.place(),
        shuffle=False,
        epochs=1,
        overlong="drop" if getattr(dataset, "preference", False) else "truncate",
        max_dialogues=max_dialogues,
        annotate=annotate,
        pin=world.device.type == "cuda",
    )


def validation_sets(recipe: Recipe, begun: Mapping[str, str] | None = None) -> dict[str, TokenDataset]:
    """The validation splits that evaluation.data names, by name; if it names none, those of all training data sets.

    begun: fingerprints, by name, that the run began with, for data sets that have grown since.
    """
    known = recipe.data.paths
    chosen = {name: known.get(name, name) for name in recipe.evaluation.data} or known
    allowed = recipe.data.damaged_blocks
    return {
        name: TokenDataset.open(path, "validation", damaged_blocks=allowed, fingerprint=(begun or {}).get(name))
        for name, path in chosen.items()
    }


def pooled(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Figures over all tokens of several data sets, from the figures of each."""
    if len(results) == 1:
        return dict(results[0])
    unit = "pairs" if "pairs" in results[0] else "loss_tokens"
    count = sum(result[unit] for result in results)
    loss, accuracy = (sum(result[name] * result[unit] for result in results) / count for name in ("loss", "accuracy"))
    more = {"dialogues": sum(result["dialogues"] for result in results)} if all("dialogues" in r for r in results) else {}
    for name in ("loss_se", "accuracy_se"):  # of independent sets
        if all(name in result for result in results):
            more[name] = math.sqrt(math.fsum((result[name] * result[unit] / count) ** 2 for result in results))
    return _figures(loss, accuracy, int(count), unit) | more


def _figures(loss: float, accuracy: float, count: int, unit: str) -> dict[str, float]:
    perplexity = {} if unit == "pairs" else {"perplexity": math.inf if loss >= 700 else math.exp(loss)}
    return {"loss": loss, **perplexity, "accuracy": accuracy, unit: count}


def standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Of sum(sums) / sum(counts), from the spread of groups that do not depend on each other; None for fewer than two.

    Linearised ratio estimator: se^2 = k / (k - 1) * sum (s_i - r n_i)^2 / (sum n_i)^2, with r the ratio and k groups.
    Cochran, Sampling Techniques, 3rd edition, section 6.4.
    """
    total, k = sum(counts), sum(n > 0 for n in counts)  # a rank without a pack left takes an empty one
    if k < 2 or total == 0:
        return None
    ratio = math.fsum(sums) / total
    squares = math.fsum((s - ratio * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return math.sqrt(k / (k - 1) * squares) / total


def in_words(figures: Mapping[str, float]) -> str:
    """Figures of evaluate() as one line for people."""
    text = f"loss {figures['loss']:.4f}  "
    if "perplexity" in figures:
        text += f"perplexity {figures['perplexity']:.2f}  "
    count, unit = (figures["pairs"], "pairs") if "pairs" in figures else (figures["loss_tokens"], "tokens")
    about = f", {int(figures['dialogues']):,} dialogues" if "dialogues" in figures else ""
    return f"{text}accuracy {100 * figures['accuracy']:.2f} %  ({int(count):,} {unit}{about})"


@torch.no_grad()
def evaluate(
    forward: Callable[[PackedBatch], LossOutput],
    batches: Iterable[PackedBatch],
    world: World,
    stopped: Callable[[], bool] = lambda: False,
    preference: bool = False,
) -> dict[str, float] | None:
    """Loss (nats), perplexity, accuracy and the number of dialogues and of supervised tokens, over all ranks.

    loss_se, accuracy_se: standard errors, from the spread between batches; a dialogue lies in one batch, with others.

    preference: forward returns the loss of preference pairs; the figures then have the number of pairs and no perplexity.
    stopped: asked before each batch; if any rank says yes, every rank stops and gets None.
    """
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    counts: list[int] = []
    dialogues = set[str]()
    for batch in batches:
        if world.any(stopped()):
            return None
        output = forward(batch)
        losses.append(output.loss_sum.double())
        correct.append(output.correct)
        counts.append(batch.loss_tokens if not preference else len(batch.uids) if world.context_rank == 0 else 0)
        dialogues.update(batch.uids)
    # fsum rounds once, whatever the order: the same figure, bit for bit, for any number of ranks
    found = (torch.stack(losses).tolist(), torch.stack(correct).tolist()) if losses else ([], [])
    parts = world.gather((*found, counts, sorted(dialogues)))
    batches_of = [parts[first : first + world.context] for first in range(0, len(parts), world.context)]
    # of whole batches: the ranks of a context have measured one together
    whole = [[list(zip(*(part[k] for part in ranks), strict=True)) for ranks in batches_of] for k in range(3)]
    sums = [math.fsum(x) for group in whole[0] for x in group]
    hits, sizes = ([sum(x) for group in kind for x in group] for kind in whole[1:])
    totals = (math.fsum(sums), sum(hits), sum(sizes))
    if totals[2] == 0:
        raise ConfigError("the validation split holds no supervised token; nothing can be measured")
    unit = "pairs" if preference else "loss_tokens"
    figures = _figures(totals[0] / totals[2], totals[1] / totals[2], int(totals[2]), unit)
    if not preference:
        figures["dialogues"] = len({uid for part in parts for uid in part[3]})
    for name, error in (("loss_se", standard_error(sums, sizes)), ("accuracy_se", standard_error(hits, sizes))):
        if error is not None:
            figures[name] = error
    return figures
