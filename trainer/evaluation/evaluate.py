"""Everything that is measured about a checkpoint, with intervals: `chatmill eval`.

    chatmill eval runs/demo --against runs/smollm2                       one process
    torchrun --nproc-per-node 4 -m chatmill.trainer.evaluation.evaluate runs/demo      the same figures, faster

Loss, perplexity, bits per byte and accuracies come from one pass over the dialogues; BLEU and the like from one generated
reply per dialogue; recall from finding the real reply among others. Meaning and formulas: docs/evaluation.md.
Writes `evaluation.json` and, with every dialogue's sums and replies, `evaluation.dialogues.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chatmill.config import ConfigError
from chatmill.files import disk_problem, replace_texts

from ...data.samples.repeats import in_words
from ...data.shards.manifest import read_manifest
from ...data.tokenizer.tokenizer import ChatTokenizer
from ..adapters.merging import open_model
from ..checkpoint.checkpoint import Checkpoint
from ..distributed.world import World, end_world
from ..generation.sampling import Sampling
from ..model.decoder import Decoder
from .bleu_tokenizer import mismatch, tokenizer_for
from .figures import PARTS, compare, summarise
from .held_out import HeldOut, read_held_out
from .measuring import Measurer
from .options import STDOUT, EvaluationOptions, add_arguments, options_from
from .text_scores import Bleu, chrf_signature, distinct

LONGEST = 2048  # tokens of a dialogue that are read unless asked otherwise
FORMAT = 1
DIALOGUES = "dialogues_sha256"  # in evaluation.json: of the file beside it
Say = Callable[[str], None]


@dataclass(slots=True)
class Evaluation:
    """summary: what evaluation.json holds. records: the sums of every dialogue by part. replies: texts by dialogue."""

    summary: dict[str, Any]
    records: dict[str, dict[str, dict[str, float]]]
    replies: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, out: Path) -> None:
        """The summary to `out`, the dialogues beside it."""
        uids = dict.fromkeys(uid for part in PARTS for uid in self.records.get(part, {}))
        lines = []
        for uid in uids:
            row: dict[str, Any] = {"uid": uid} | {p: self.records[p][uid] for p in PARTS if uid in self.records.get(p, {})}
            lines.append(json.dumps(row | ({"reply": self.replies[uid]} if uid in self.replies else {}), ensure_ascii=False))
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            dialogues = "".join(line + "\n" for line in lines)
            summary = self.summary | {DIALOGUES: hashlib.sha256(dialogues.encode()).hexdigest()}
            replace_texts({dialogues_file(out): dialogues, out: json.dumps(summary, indent=1, ensure_ascii=False) + "\n"})
        except OSError as error:
            why = disk_problem(error) or f"{out}: cannot be written ({error})."
            raise ConfigError(f"{why} Or name another file with --out FILE.") from None


def dialogues_file(out: Path) -> Path:
    """evaluation.json -> evaluation.dialogues.jsonl."""
    return out.with_name(out.name.removesuffix(".json") + ".dialogues.jsonl")


def load_evaluation(path: Path) -> Evaluation:
    """Read an evaluation. Raises ConfigError."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        dialogues = dialogues_file(path).read_bytes()
        if summary.pop(DIALOGUES, digest := hashlib.sha256(dialogues).hexdigest()) != digest:
            raise ValueError("the dialogues beside it are of another evaluation")
        rows = [json.loads(line) for line in dialogues.decode("utf-8").splitlines()]
        if summary["format"] != FORMAT:
            raise ValueError(f"format {summary['format']}, this version reads {FORMAT}")
        records = {part: {row["uid"]: row[part] for row in rows if part in row} for part in PARTS}
        replies = {row["uid"]: row["reply"] for row in rows if "reply" in row}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not an evaluation with its dialogues beside it ({error}). Run chatmill eval again."
        ) from None
    return Evaluation(summary, {part: found for part, found in records.items() if found}, replies)


def evaluate_fully(path: str | Path, options: EvaluationOptions, world: World, say: Say = lambda line: None) -> Evaluation:
    """Measure a checkpoint; every rank returns the same evaluation."""
    checkpoint = open_model(path)
    folders = options.data or tuple(filter(None, [checkpoint.meta.get("data")]))
    if not folders:
        raise ConfigError(f"{checkpoint.path} does not say what it was trained on; give --data FOLDER.")
    tokenizer = tokenizer_of(checkpoint, str(folders[0]))
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise ConfigError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} entries, the model {checkpoint.config.vocab_size}.\n"
            "They do not belong together; put the tokenizer files of the training into the checkpoint's folder."
        )
    limit = min(options.sequence_length or LONGEST, checkpoint.config.context)
    dialogues = read_held_out(folders, tokenizer, split=options.split, limit=limit, max_dialogues=options.max_dialogues)
    repeated = {} if options.split == "train" else repeats_of(folders, say)
    checkpoint.check_model()
    model = Decoder(checkpoint.config)
    checkpoint.load_into(model)
    model.to(world.device).eval().requires_grad_(False)
    tokenize = bleu_tokenizer(options.bleu_tokenize, dialogues, say)
    bleu, signatures = metrics_of_sacrebleu(tokenize, say)
    measurer = Measurer(
        model,
        tokenizer,
        dialogues,
        seed=options.seed,
        sampling=Sampling(options.temperature, None, options.top_p, None, options.repetition_penalty),
        max_new_tokens=min(options.max_new_tokens, checkpoint.config.context // 2),
        bleu=bleu,
        progress=lambda what, done, of: say(f"{what} {done}/{of}"),
    )
    on_gpu = world.device.type == "cuda"
    generate = options.generate if options.generate is not None else 256 if on_gpu else 32
    select = options.select if options.select is not None else 256 if on_gpu else 8
    texts: dict[str, dict[str, Any]] = {}
    records: dict[str, dict[str, dict[str, float]]] = {}
    with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
        records["tokens"] = measurer.token_records(world)
        if generate and tokenizer.template_source is not None:
            texts = measurer.reply_records(world, generate)
            records["replies"] = {uid: text.pop("sums") for uid, text in texts.items()}
        if select:
            records["selection"] = {u: r for u, r in measurer.selection_records(world, select).items() if len(r) > 1}
    records = {part: found for part, found in records.items() if found}
    figures = summarise(records, seed=options.seed, resamples=options.resamples, bleu=bleu)
    if texts:
        replies = [text["reply"] for text in texts.values()]
        figures["metrics"] |= {f"distinct_{n}": {"value": distinct(replies, n), "low": None, "high": None} for n in (1, 2)}
    if select and "selection" not in records:
        say("selection left out: too few different replies in these dialogues to choose among\n")
    chosen = asdict(options) | {
        "data": list(map(str, folders)),
        "sequence_length": limit,
        "generate": generate,
        "select": select,
        "bleu_tokenize": tokenize,
    }
    head = {"format": FORMAT, "checkpoint": str(path), "data": ", ".join(map(str, folders)), "split": options.split}
    plain = {name: figures["metrics"][name]["value"] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")}
    cut = {"dialogues_cut": sum(d.cut > 0 for d in dialogues), "tokens_left_out": sum(d.cut for d in dialogues)}
    facts = {"parameters": checkpoint.config.parameter_counts()["total"], "device": world.device.type}
    per_data = {} if len(folders) == 1 else {"per_data": by_folder(dialogues, records["tokens"])}
    summary = head | plain | figures | per_data | cut | facts | repeated | {"signatures": signatures, "settings": chosen}
    return Evaluation(summary, records, texts)


def repeats_of(folders: Sequence[str], say: Say) -> dict[str, Any]:
    """`repeats` by folder, of validation splits that repeat training texts, which is said; {} where none does."""
    found: dict[str, Any] = {}
    for folder in folders:
        counts = read_manifest(Path(folder)).get("repeats")
        if told := in_words(counts):
            say(f"{folder}: the validation split {told}\n")
            found[str(folder)] = counts
    return {"repeats": found} if found else {}


def by_folder(dialogues: Sequence[HeldOut], records: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Loss and accuracy of each data set."""
    sums: dict[str, dict[str, float]] = {}
    for d in {d.uid: d for d in dialogues}.values():
        into = sums.setdefault(d.source, {"nll": 0.0, "tokens": 0.0, "top1": 0.0, "dialogues": 0.0})
        for name in ("nll", "tokens", "top1"):
            into[name] += records[d.uid][name]
        into["dialogues"] += 1
    return {
        folder: {"dialogues": s["dialogues"], "loss": s["nll"] / s["tokens"], "accuracy": s["top1"] / s["tokens"]}
        for folder, s in sums.items()
    }


def tokenizer_of(checkpoint: Checkpoint, folder: str) -> ChatTokenizer:
    """The checkpoint's own tokenizer, or the data's if it has none."""
    return ChatTokenizer.load(checkpoint.path if "tokenizer.json" in checkpoint.files() else Path(folder) / "tokenizer")


def bleu_tokenizer(asked: str, dialogues: Sequence[HeldOut], say: Say) -> str:
    """The tokenizer of BLEU: the one asked for, with a warning where it does not suit the replies, or theirs for `auto`."""
    replies = [d.conversation.turns[turn].content for d in dialogues for turn in d.replies()]
    if asked == "auto":
        return tokenizer_for(replies)
    if warning := mismatch(asked, replies):
        say(f"{warning}\n")
    return asked


def metrics_of_sacrebleu(tokenize: str, say: Say) -> tuple[Bleu | None, dict[str, str]]:
    """BLEU and the signatures; None and a message if sacrebleu is not installed."""
    try:
        bleu = Bleu(tokenize)
        return bleu, {"bleu": bleu.signature(), "chrf": chrf_signature()}
    except ImportError:
        say("BLEU left out: pip install 'chatmill[eval]'\n")
        return None, {}


def compared(first: Evaluation, second: Evaluation, say: Say = lambda line: None) -> dict[str, Any]:
    """`against` of the second's summary: second minus first, paired."""
    settings = second.summary["settings"]
    tokenize, other = settings["bleu_tokenize"], first.summary["settings"]["bleu_tokenize"]
    bleu, _ = metrics_of_sacrebleu(tokenize, lambda line: None) if tokenize == other else (None, {})
    if tokenize != other:
        say(f"BLEU is not compared: its tokenizer was {other} there and is {tokenize} here. Measure both with the same one.\n")
    found = compare(first.records, second.records, seed=settings["seed"], resamples=settings["resamples"], bleu=bleu)
    if not found["dialogues"]:
        raise ConfigError(
            f"{first.summary['checkpoint']} and {second.summary['checkpoint']} were measured on different dialogues:\n"
            "nothing can be compared. Measure both with the same --data and --split."
        )
    return {"checkpoint": first.summary["checkpoint"]} | found


def default_out(path: Path) -> Path:
    """evaluation.json in the run folder or checkpoint; evaluation-step-N.json in the run of a step's checkpoint."""
    if path.resolve().parent.name == "checkpoints":
        return path.resolve().parent.parent / f"evaluation-{path.resolve().name}.json"
    return path / "evaluation.json"


def run_evaluation(
    path: str, against: str | None, out: str | None, options: EvaluationOptions, show: Callable[[dict[str, Any]], None] | None
) -> int:
    """Measure (or read), compare, write and show, or print the JSON where show is None. Returns the exit code."""
    world = join_world()
    try:
        say = teller(world)
        read = Path(path).suffix == ".json"
        target = Path(out) if out else Path(path) if read else default_out(Path(path))
        first: Evaluation | None = None
        if against is not None and Path(against).suffix == ".json":
            first = load_evaluation(Path(against))
        mine = load_evaluation(Path(path)) if read else evaluate_fully(path, options, world, say)
        if against is not None and first is None:
            # on the same dialogues, also where the other checkpoint was trained on something else
            same = EvaluationOptions(**asdict(options) | {"data": tuple(mine.summary["settings"]["data"])})
            first = evaluate_fully(against, same, world, say)
            if world.is_main:
                first.write(target.with_name(target.name.removesuffix(".json") + "-against.json"))
        say("")
        if first is not None:
            mine.summary["against"] = compared(first, mine, say)
        if world.is_main:
            if not read or first is not None:
                mine.write(target)
            if show is None:
                print(json.dumps(mine.summary, indent=1, ensure_ascii=False))
            else:
                show(mine.summary)
                print(f"{target}")
    finally:
        end_world()
    return 0


def teller(world: World) -> Say:
    """Prints progress on rank 0: on one line of a terminal. Notes, which end in a newline, go to any stderr."""

    def say(line: str) -> None:
        if line.endswith("\n") or sys.stderr.isatty():
            print(f"\r{line:<60}" if sys.stderr.isatty() else line, end="", file=sys.stderr, flush=True)

    return say if world.is_main else lambda line: None


def join_world() -> World:
    """This process alone, or one of torchrun's ranks: each holds the whole model and does its share of the work."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("gloo")  # only records travel, from host to host
    return World(rank, size, local, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device, "gloo" if size > 1 else "none")


def main(arguments: list[str] | None = None) -> int:
    """For torchrun: the same options as `chatmill eval`."""
    from .table import show

    parser = argparse.ArgumentParser(description="Measure a checkpoint; see chatmill eval.")
    parser.add_argument("checkpoint")
    add_arguments(parser)
    found = parser.parse_args(arguments)
    try:
        as_json = found.json == STDOUT
        out = found.out or (None if as_json else found.json)
        return run_evaluation(found.checkpoint, found.against, out, options_from(found), None if as_json else show)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
