"""What the figures of an evaluation are called, which way is better, and how they are printed. Needs no torch.

CATALOGUE["loss"].title        "loss (nats per token)"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CANDIDATES = (10, 100)  # replies to choose among
Better = Literal["lower", "higher", ""]


@dataclass(frozen=True, slots=True)
class Named:
    """A figure for people. better: which direction is an improvement. share: printed as a percentage."""

    title: str
    better: Better = "higher"
    share: bool = False


CATALOGUE: dict[str, Named] = {
    "loss": Named("loss (nats per token)", "lower"),
    "perplexity": Named("perplexity", "lower"),
    "bits_per_byte": Named("bits per byte", "lower"),
    "accuracy": Named("token accuracy", share=True),
    "top5_accuracy": Named("token accuracy, top 5", share=True),
    "bleu": Named("BLEU"),
    "chrf": Named("chrF"),
    "rouge_l": Named("ROUGE-L", share=True),
    "token_precision": Named("word precision", share=True),
    "token_recall": Named("word recall", share=True),
    "token_f1": Named("word F1", share=True),
    "exact_match": Named("exact match", share=True),
    "stop_rate": Named("ended by itself", "", share=True),
    "reply_tokens": Named("tokens per reply", ""),
    "reference_tokens": Named("tokens per reference", ""),
    "distinct_1": Named("different words", "", share=True),
    "distinct_2": Named("different pairs of words", "", share=True),
} | {
    f"{kind}_of_{size}_{how}": Named(f"{words} of {size}, {told}", share=kind != "mean_reciprocal_rank")
    for how, told in (("mean", "mean ln p"), ("sum", "sum of ln p"))
    for size in CANDIDATES
    for kind, words in (
        ("recall_1", "recall@1"),
        ("recall_5", "recall@5"),
        ("recall_10", "recall@10"),
        ("mean_reciprocal_rank", "reciprocal rank"),
    )
}
