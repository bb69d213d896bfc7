"""The options of `chatmill eval`, without torch: the command line needs them before anything heavy is imported.

options = EvaluationOptions(generate=64, select=16)
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """data: folders; none: the one the checkpoint was trained on. generate, select: number of dialogues for the slow parts.

    candidates: replies of a choice. None there, and for max_dialogues: 256, 256, 100 and all on a GPU; on a CPU what two cores
    do in about two minutes (budget.py), unless `everything` asks for as much as on a GPU. sequence_length: longest part of a
    dialogue that is read, in tokens; None: the context, at most 2048. resamples: of the bootstrap. bleu_tokenize: one of
    sacrebleu's, or auto, by the script of the replies (bleu_tokenizer.py).
    """

    data: tuple[str, ...] = ()
    split: Literal["validation", "train"] = "validation"
    max_dialogues: int | None = None
    sequence_length: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    generate: int | None = None
    select: int | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    resamples: int = 1000
    bleu_tokenize: str = "auto"
    everything: bool = False
    candidates: int | None = None

    def __post_init__(self) -> None:
        from chatmill.config import ConfigError  # not at the top: it imports pydantic, which --help does not need

        least = {"max_dialogues": 1, "sequence_length": 2, "generate": 0, "select": 0, "max_new_tokens": 1, "resamples": 100}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least {low}.")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: expected 0 or more.")


STDOUT = "-"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `chatmill eval`, the checkpoint left to the caller."""
    add = command.add_argument
    add("--against", metavar="CHECKPOINT", help="a second checkpoint (or its evaluation.json): paired differences to it")
    add("--data", nargs="+", default=[], metavar="DIR", help="data-set folders (default: the one it was trained on)")
    add("--split", default="validation", choices=("validation", "train"))
    add("--max-dialogues", type=int, metavar="N", help="measure only the first N dialogues of each data set")
    everything = "measure on a CPU what a GPU measures: all dialogues, 256 replies, 256 choices (default: two minutes of it)"
    add("--all", dest="everything", action="store_true", help=everything)
    add(
        "--sequence-length",
        type=int,
        help="longest part of a dialogue that is read, in tokens (default: the context, at most 2048)",
    )
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add(
        "--generate",
        type=int,
        metavar="N",
        help="dialogues to generate a reply for (default 256 on a GPU, at most 32 on a CPU; 0: none)",
    )
    add(
        "--select",
        type=int,
        metavar="N",
        help="dialogues to find the real reply for (default 256 on a GPU, at most 8 on a CPU; 0: none)",
    )
    among = "replies to find the real one among (default 100; 10 on a CPU where 100 take too long)"
    add("--candidates", type=int, choices=(10, 100), help=among)
    add("--max-new-tokens", type=int, default=128, help="longest generated reply, in tokens (default 128)")
    add("--temperature", type=float, default=0.0, help="temperature of generated replies (default 0: greedy)")
    add("--top-p", type=float)
    add("--repetition-penalty", type=float, default=1.0)
    add("--seed", type=int, default=0, help="seed of turns, candidates, sampling and intervals (default 0)")
    add("--resamples", type=int, default=1000, help="number of resamples of the bootstrap (default 1000)")
    add(
        "--bleu-tokenize",
        default="auto",
        help="sacrebleu's tokenizer: 13a, intl, zh, ja-mecab, ko-mecab, char ... (default auto: by the script of the replies)",
    )
    add("--out", metavar="FILE", help="JSON to write (default: evaluation.json beside the checkpoint)")
    as_json = "print the JSON instead of the table; with FILE: the same as --out"
    add("--json", nargs="?", const=STDOUT, metavar="FILE", help=as_json)


def options_from(found: argparse.Namespace) -> EvaluationOptions:
    """The dataclass of parsed arguments."""
    values: dict[str, Any] = {field.name: getattr(found, field.name) for field in fields(EvaluationOptions)}
    return EvaluationOptions(**values | {"data": tuple(values["data"])})
