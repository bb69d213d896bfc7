"""`chatmill data`: build, inspect, verify and trace data sets, and add later exports to them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from chatmill.formatting import counted
from chatmill.progress import LongWork

from .arguments import RUN_HELP, add_command, add_group, add_quiet, add_recipe, add_run

WRITTEN = ("import", "clean", "pair")  # stages that --out FILE.jsonl writes
STAGES = ("import", "clean", "pair", "dedup", "split", "tokenize", "shard")


def add_commands(commands: Any) -> None:
    """Add `data` and its subcommands."""
    data = add_group(commands, "data", "build, inspect, verify and trace data sets", "Data sets.")
    build = add_command(data, "build", _build, "import, clean, pair, dedup, split, tokenise and shard", "data")
    parts = [add_command(data, stage, _build, f"as build, but only as far as the stage `{stage}`", "data") for stage in STAGES]
    for stage, command in (("shard", build), *zip(STAGES, parts, strict=True)):
        command.set_defaults(until=stage)
        add_recipe(command, "split.validation=0.1", part="data")
        written = "; FILE.jsonl: write what the stage made, to look at, edit and read again" if stage in WRITTEN else ""
        command.add_argument("--out", help=f"data-set folder (default: the recipe's){written}")
        add_quiet(command)
    summary = "add what is new in a recipe's sources to its data set: what is there stays as it is"
    command = add_command(data, "collect", _collect, summary, "data")
    add_recipe(command, "sources.0.path=exports/", part="data")
    command.add_argument("--out", help="data-set folder (default: the recipe's)")
    add_quiet(command)
    summary = "a data set: counts, loss share, coloured masks; raw chats before a build: formats, speakers, a random sample"
    command = add_command(data, "inspect", _inspect, summary, "data")
    command.add_argument("path", metavar="PATH", help="a data-set folder; or raw chats: file, folder, glob or a data recipe")
    words = "of raw chats: fields of the source such as format=whatsapp, assistant=Ann, limit=1000"
    command.add_argument("overrides", nargs="*", metavar="field=value", help=words)
    command.add_argument("--samples", type=int, default=2, metavar="N", help="dialogues to show (default 2)")
    command.add_argument("--seed", type=int, help="of the random sample of raw chats (default: another one each time)")
    command.add_argument("--json", action="store_true", help="the figures as JSON, and nothing else")
    command.add_argument("--html", metavar="FILE", help="of a data set: also write the page with coloured tokens")
    summary = "recompute hashes, masks and the split certificate; exit 1 if anything is wrong"
    command = add_command(data, "verify", _verify, summary, "data")
    command.add_argument("path", metavar="DIR")
    command.add_argument("--repair", action="store_true", help="first rebuild damaged token shards from the dialogue shards")
    quarantine = "list damaged blocks in DIR/quarantine.json, at most this share of a split; training can then leave them out"
    command.add_argument("--quarantine", type=float, metavar="SHARE", help=quarantine)
    add_quiet(command)
    command = add_command(data, "at", _at, "which dialogues a run used in a step, with raw file and line", "data")
    add_run(command, RUN_HELP)
    command.add_argument("step", metavar="STEP", type=int, help="a step of metrics.jsonl, counted from 1")
    command = add_command(data, "where", _where, "in which steps a run used a dialogue", "data")
    add_run(command, RUN_HELP)
    command.add_argument("uid", metavar="UID", help="as `data at` and `data inspect` print it")


def _build(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ...data.pipeline.pipeline import build_dataset, phases
    from ...data.recipe import load_data_recipe
    from ...data.report.funnel import print_funnel

    recipe = load_data_recipe(options.recipe, options.overrides)
    is_file = str(options.out or "").endswith(".jsonl")
    out, dialogues = (None, options.out) if is_file else (options.out, None)
    with LongWork(phases(recipe, options.until), options.quiet) as show:
        report = build_dataset(recipe, out, show, options.until, dialogues)
    print_funnel(report, Console())
    if dialogues is not None:
        print(f"{dialogues}: {counted(report['dialogues'], 'dialogue')} as OpenAI messages; it can be a source of a recipe")
    if options.until == "shard":
        print(report["out"] if report["built"] else f"{report['out']}: already built from the same inputs and recipe")
    return 0


def _collect(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ...data.pipeline.collect import collect, phases_of
    from ...data.recipe import load_data_recipe
    from ...data.report.funnel import print_collected, print_funnel

    recipe = load_data_recipe(options.recipe, options.overrides)
    console = Console()
    with LongWork(phases_of(recipe, options.out), options.quiet) as show:
        report = collect(recipe, options.out, show)
    print_funnel(report, console)
    print_collected(report, console)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from chatmill.config import ConfigError

    from ...data.check.raw_sample import inspect_raw, raw_sources, survey

    sources = raw_sources(options.path, options.overrides)
    if sources is not None:
        if options.html:
            raise ConfigError(
                f"{options.path} holds raw chats: --html needs a data set. Build one first (chatmill data build)."
            )
        if options.json:
            print(json.dumps(survey(sources, options.samples, options.seed).to_dict(), indent=1, ensure_ascii=False))
        else:
            inspect_raw(sources, options.samples, options.seed)
        return 0
    if options.overrides:
        raise ConfigError(f"{options.path} is a data set: {options.overrides[0]!r} is for raw chats.")
    from ...data.check.inspection import inspect_dataset

    if options.json:
        from rich.console import Console

        facts = inspect_dataset(options.path, 0, Console(quiet=True), options.html)
        print(json.dumps({"path": options.path, "splits": facts}, indent=1))
    else:
        inspect_dataset(options.path, options.samples, html=options.html)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ...data.check.repair import repair_dataset
    from ...data.check.verify import PHASES, listed_quarantine, quarantine_dataset, verify_dataset

    with LongWork(PHASES, options.quiet) as show:
        for line in repair_dataset(options.path, show) if options.repair else []:
            print(line)
        if options.quarantine is not None:
            quarantine_dataset(options.path, options.quarantine)
        problems = verify_dataset(options.path, progress=show)
    for line in (*listed_quarantine(options.path), *problems):
        print(line)
    print(f"{options.path}: {counted(len(problems), 'problem') if problems else 'files whole, masks and split proven'}")
    return 1 if problems else 0


def _at(options: argparse.Namespace) -> int:
    from pathlib import Path

    from ...data.packing.usage import at, reached_step, table

    print(table(at(options.run_dir, options.step)))
    if options.step > (reached := reached_step(Path(options.run_dir))):
        print(f"metrics.jsonl ends at step {reached}: what step {options.step} was to use, whether or not it ended")
    return 0


def _where(options: argparse.Namespace) -> int:
    from ...data.packing.usage import table, where

    print(table(where(options.run_dir, options.uid)))
    return 0
