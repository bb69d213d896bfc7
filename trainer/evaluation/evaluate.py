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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chatmill.config import ConfigError
from chatmill.files import disk_problem, replace_texts
from chatmill.progress import LongWork, Report, silent

from ...data.samples.repeats import in_words
from ...data.shards.manifest import read_manifest
from ...data.tokenizer.tokenizer import ChatTokenizer
from ..adapters.merging import open_model
from ..backends.choose import build_model
from ..checkpoint.checkpoint import Checkpoint
from ..distributed.world import World, end_world
from ..generation.sampling import Sampling
from .bleu_tokenizer import mismatch, tokenizer_for
from .budget import EVERYTHING, Share, cpu_share
from .figures import CANDIDATES, PARTS, compare, summarise
from .held_out import HeldOut, count_held_out, read_held_out
from .measuring import Measurer
from .options import STDOUT, EvaluationOptions, add_arguments, options_from
from .text_scores import Bleu, chrf_signature, distinct

LONGEST = 2048  # tokens of a dialogue that are read unless asked otherwise
FORMAT = 1
DIALOGUES = "dialogues_sha256"  # in evaluation.json: of the file beside it
Say = Callable[[str], None]
PHASES = ("load", "tokens", "replies", "selection", "intervals")  # what evaluate_fully reports


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


def evaluate_fully(
    path: str | Path,
    options: EvaluationOptions,
    world: World,
    say: Say = lambda line: None,
    progress: Report = silent,
    only: Collection[str] | None = None,
) -> Evaluation:
    """Measure a checkpoint; every rank returns the same evaluation. only: the uids of another one's dialogues."""
    progress(PHASES[0], 0, 1)
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
    checkpoint.check_model()
    parameters, on_gpu = checkpoint.config.parameter_counts()["total"], world.device.type == "cuda"
    max_new_tokens = min(options.max_new_tokens, checkpoint.config.context // 2)
    share = EVERYTHING if on_gpu or options.everything else cpu_share(parameters, max_new_tokens)
    sampled = options.max_dialogues is None and only is None
    dialogues = read_held_out(
        folders, tokenizer, split=options.split, limit=limit, max_dialogues=options.max_dialogues, only=only,
        max_tokens=share.tokens if sampled else None, seed=options.seed,
    )  # fmt: skip
    repeated = {} if options.split == "train" else repeats_of(folders, say)
    model = build_model(checkpoint.config)
    checkpoint.load_into(model)
    model.to(world.device).eval().requires_grad_(False)
    generate = share.replies if options.generate is None else options.generate
    select = share.choices if options.select is None else options.select
    candidates = options.candidates or (share.candidates if options.select is None else CANDIDATES[-1])
    progress(PHASES[0], 1, 1)
    tokenize = bleu_tokenizer(options.bleu_tokenize, dialogues, say)
    bleu, signatures = metrics_of_sacrebleu(tokenize, say)
    measurer = Measurer(
        model,
        tokenizer,
        dialogues,
        seed=options.seed,
        sampling=Sampling(options.temperature, None, options.top_p, None, options.repetition_penalty),
        max_new_tokens=max_new_tokens,
        bleu=bleu,
        candidates=candidates,
        progress=progress,
    )
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
    progress(PHASES[-1], 0, 1)
    figures = summarise(records, seed=options.seed, resamples=options.resamples, bleu=bleu)
    progress(PHASES[-1], 1, 1)
    if texts:
        replies = [text["reply"] for text in texts.values()]
        figures["metrics"] |= {f"distinct_{n}": {"value": distinct(replies, n), "low": None, "high": None} for n in (1, 2)}
    if select and "selection" not in records:
        say("selection left out: too few different replies in these dialogues to choose among")
    chosen = asdict(options) | {
        "data": list(map(str, folders)),
        "sequence_length": limit,
        "generate": generate,
        "select": select,
        "candidates": candidates,
        "bleu_tokenize": tokenize,
    }
    head = {"format": FORMAT, "checkpoint": str(path), "data": ", ".join(map(str, folders)), "split": options.split}
    plain = {name: figures["metrics"][name]["value"] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")}
    cut = {"dialogues_cut": sum(d.cut > 0 for d in dialogues), "tokens_left_out": sum(d.cut for d in dialogues)}
    facts: dict[str, Any] = {"parameters": parameters, "device": world.device.type}
    if reduced := _reduced(options, share, dialogues, count_held_out(folders, options.split) if sampled else 0):
        facts["reduced"] = reduced
    per_data = {} if len(folders) == 1 else {"per_data": by_folder(dialogues, records["tokens"])}
    summary = head | plain | figures | per_data | cut | facts | repeated | {"signatures": signatures, "settings": chosen}
    return Evaluation(summary, records, texts)


def repeats_of(folders: Sequence[str], say: Say) -> dict[str, Any]:
    """`repeats` by folder, of validation splits that repeat training texts, which is said; {} where none does."""
    found: dict[str, Any] = {}
    for folder in folders:
        counts = read_manifest(Path(folder)).get("repeats")
        if told := in_words(counts):
            say(f"{folder}: the validation split {told}")
            found[str(folder)] = counts
    return {"repeats": found} if found else {}


def _reduced(options: EvaluationOptions, share: Share, dialogues: Sequence[HeldOut], held: int) -> dict[str, Any]:
    """What is measured less of than on a GPU because nothing else was asked for. held: dialogues there are to sample from."""
    out: dict[str, Any] = {}
    if share is not EVERYTHING:
        if (count := len({d.uid for d in dialogues})) < held:
            out["dialogues"] = {"measured": count, "of": held}
        if options.generate is None and held > share.replies:
            out["replies"] = share.replies
        if options.select is None and (held > share.choices or share.candidates < CANDIDATES[-1]):
            out |= {"choices": share.choices, "candidates": share.candidates}
    return out


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
        say(warning)
    return asked


def metrics_of_sacrebleu(tokenize: str, say: Say) -> tuple[Bleu | None, dict[str, str]]:
    """BLEU and the signatures; None and a message if sacrebleu is not installed."""
    try:
        bleu = Bleu(tokenize)
        return bleu, {"bleu": bleu.signature(), "chrf": chrf_signature()}
    except ImportError:
        say("BLEU left out: pip install 'chatmill[eval]'")
        return None, {}


def compared(first: Evaluation, second: Evaluation, say: Say = lambda line: None) -> dict[str, Any]:
    """`against` of the second's summary: second minus first, paired."""
    settings = second.summary["settings"]
    tokenize, other = settings["bleu_tokenize"], first.summary["settings"]["bleu_tokenize"]
    bleu, _ = metrics_of_sacrebleu(tokenize, lambda line: None) if tokenize == other else (None, {})
    if tokenize != other:
        say(f"BLEU is not compared: its tokenizer was {other} there and is {tokenize} here. Measure both with the same one.")
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
    path: str,
    against: str | None,
    out: str | None,
    options: EvaluationOptions,
    show: Callable[[dict[str, Any]], None] | None,
    quiet: bool = False,
) -> int:
    """Measure (or read), compare, write and show, or print the JSON where show is None. Returns the exit code."""
    read, read_other = Path(path).suffix == ".json", Path(against or "").suffix == ".json"
    target = Path(out) if out else Path(path) if read else default_out(Path(path))
    runs = [*([] if read else [path]), *([] if against is None or read_other else [against])]
    asked = [name for name in PHASES if {"replies": options.generate, "selection": options.select}.get(name) != 0]
    names = {of: {name: name if len(runs) == 1 else f"{name} of {of}" for name in asked} for of in runs}
    world = join_world()
    try:
        with LongWork([name for of in runs for name in names[of].values()], quiet or not world.is_main) as work:
            say = work.say if world.is_main else lambda line: None

            def measure(of: str, how: EvaluationOptions, only: Collection[str] | None = None) -> Evaluation:
                return evaluate_fully(of, how, world, say, lambda phase, done, n: work(names[of][phase], done, n), only)

            first = load_evaluation(Path(against)) if against is not None and read_other else None
            mine = load_evaluation(Path(path)) if read else measure(path, options)
            if against is not None and first is None:
                first = measure(against, _like(mine, options), mine.records["tokens"].keys())
                if world.is_main:
                    first.write(target.with_name(target.name.removesuffix(".json") + "-against.json"))
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


def _like(mine: Evaluation, options: EvaluationOptions) -> EvaluationOptions:
    """The options by which another checkpoint is measured as this one was, also where it was trained on something else."""
    known = mine.summary["settings"]
    filled = {name: known.get(name) for name in ("generate", "select", "candidates") if getattr(options, name) is None}
    return replace(options, data=tuple(known["data"]), **filled)


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
    parser.add_argument("-q", "--quiet", action="store_true", help="do not show how far the work is (on stderr)")
    found = parser.parse_args(arguments)
    try:
        as_json = found.json == STDOUT
        out = found.out or (None if as_json else found.json)
        return run_evaluation(found.checkpoint, found.against, out, options_from(found), None if as_json else show, found.quiet)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
