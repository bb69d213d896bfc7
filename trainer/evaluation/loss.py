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
from ...data.tokenizer.tokenizer import ChatTokenizer
from ..checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..config import Recipe
from ..distributed.world import World
from ..model.attention_plans import plan_maker
from ..model.decoder import Decoder, LossOutput


def validation_batches(
    dataset: TokenDataset,
    *,
    sequence_length: int,
    micro_batch: int,
    world: World,
    max_dialogues: int | None = None,
    annotate: Annotate | None = None,
) -> PackedStream:
    """All validation dialogues (the first max_dialogues of them) once, in a fixed order. annotate: makes batch.plan."""
    return PackedStream(
        dataset,
        sequence_length=sequence_length,
        micro_batch=micro_batch,
        rank=world.rank,
        world_size=world.world_size,
        shuffle=False,
        epochs=1,
        overlong="drop" if getattr(dataset, "preference", False) else "truncate",
        max_dialogues=max_dialogues,
        annotate=annotate,
        pin=world.device.type == "cuda",
    )


def validation_sets(recipe: Recipe) -> dict[str, TokenDataset]:
    """The validation splits that evaluation.data names, by name: those of all training data sets where it names none."""
    known = recipe.data.paths
    chosen = {name: known.get(name, name) for name in recipe.evaluation.data} or known
    allowed = recipe.data.damaged_blocks
    return {name: TokenDataset.open(path, "validation", damaged_blocks=allowed) for name, path in chosen.items()}


def pooled(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Figures over the tokens of several data sets together, from the figures of each."""
    if len(results) == 1:
        return dict(results[0])
    unit = "pairs" if "pairs" in results[0] else "loss_tokens"
    count = sum(result[unit] for result in results)
    loss, accuracy = (sum(result[name] * result[unit] for result in results) / count for name in ("loss", "accuracy"))
    return _figures(loss, accuracy, int(count), unit)


def _figures(loss: float, accuracy: float, count: int, unit: str) -> dict[str, float]:
    perplexity = {} if unit == "pairs" else {"perplexity": math.exp(loss) if loss < 700 else math.inf}
    return {"loss": loss, **perplexity, "accuracy": accuracy, unit: count}


def in_words(figures: Mapping[str, float]) -> str:
    """Figures of evaluate() as one line for people."""
    text = f"loss {figures['loss']:.4f}  "
    if "perplexity" in figures:
        text += f"perplexity {figures['perplexity']:.2f}  "
    count, unit = (figures["pairs"], "pairs") if "pairs" in figures else (figures["loss_tokens"], "tokens")
    return f"{text}accuracy {100 * figures['accuracy']:.2f} %  ({int(count):,} {unit})"


@torch.no_grad()
def evaluate(
    forward: Callable[[PackedBatch], LossOutput],
    batches: Iterable[PackedBatch],
    world: World,
    stopped: Callable[[], bool] = lambda: False,
    preference: bool = False,
) -> dict[str, float] | None:
    """Loss (nats), perplexity, accuracy and the number of supervised tokens, over all ranks.

    preference: forward's loss is one of preference pairs; then no perplexity, and the number of pairs.
    stopped: asked before each batch; where any rank says yes, every rank breaks off and gets None.
    """
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    count = 0
    for batch in batches:
        if world.any(stopped()):
            return None
        output = forward(batch)
        losses.append(output.loss_sum.double())
        correct.append(output.correct)
        count += len(batch.uids) if preference else batch.loss_tokens
    # Sums that are rounded once, whatever their order: the same figure, bit for bit, for any number of ranks.
    mine = (torch.stack(losses).tolist(), int(torch.stack(correct).sum()), count) if losses else ([], 0, 0)
    parts = world.gather(mine)
    totals = (math.fsum(x for part in parts for x in part[0]), sum(part[1] for part in parts), sum(part[2] for part in parts))
    if totals[2] == 0:
        raise ConfigError("the validation split holds no supervised token; nothing can be measured")
    unit = "pairs" if preference else "loss_tokens"
    return _figures(totals[0] / totals[2], totals[1] / totals[2], int(totals[2]), unit)


def evaluate_checkpoint(
    path: str,
    *,
    data: str | None = None,
    split: str = "validation",
    max_dialogues: int | None = None,
    sequence_length: int = 1024,
    micro_batch: int = 1,
    precision: str = "fp32",
) -> dict[str, float | str]:
    """The figures of a checkpoint on a data-set folder (by default the one it was trained on), in this process."""
    checkpoint = open_checkpoint(path)
    folder = data or checkpoint.meta.get("data")
    if folder is None:
        raise ConfigError(f"{checkpoint.path} does not say what it was trained on; give --data FOLDER.")
    dataset = TokenDataset.open(folder, split)
    check_tokenizer(checkpoint, dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(0, 1, 0, 1, device, "none")
    model = Decoder(checkpoint.config)
    checkpoint.load_into(model)
    model.to(device).eval()
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    def forward(batch: PackedBatch) -> LossOutput:
        on = batch.to(device, non_blocking=True)
        with autocast:
            output: LossOutput = model(
                on.tokens,
                on.positions,
                on.cu_seqlens,
                targets=on.targets,
                rows=on.rows,
                plan=on.plan,
                max_seqlen=on.max_seqlen,
            )
        return output

    length = min(sequence_length, checkpoint.config.context)
    batches = validation_batches(
        dataset,
        sequence_length=length,
        micro_batch=micro_batch,
        world=world,
        max_dialogues=max_dialogues,
        annotate=plan_maker(checkpoint.config, "auto", precision, device),
    )
    figures = evaluate(forward, batches, world)
    assert figures is not None
    return {"checkpoint": str(checkpoint.path), "data": str(folder), "split": split, **figures}


def check_tokenizer(checkpoint: Checkpoint, dataset: TokenDataset) -> None:
    """Refuse data made with another tokenizer or chat template than the checkpoint brings. Raises ConfigError."""
    if "tokenizer.json" not in checkpoint.files():
        return
    theirs = ChatTokenizer.load(checkpoint.path).fingerprint
    if ChatTokenizer.load(dataset.path / "tokenizer").fingerprint != theirs:
        raise ConfigError(
            f"{dataset.path} was tokenised with another tokenizer or chat template than {checkpoint.path} brings.\n"
            "Build the data set with that checkpoint's tokenizer: data recipe field tokenizer.path."
        )
