"""Look at raw chats before any build: what each file is read as, how many dialogues, who speaks, and a random sample.

    inspect_raw([SourceSection(path="exports/")], samples=3, seed=0)
    survey([SourceSection(path="exports/")])          # the same, as a record

The files are read as a build would read them, with the same importers and roles; nothing is cleaned, and nothing is written.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from chatmill.config import ConfigError, parse_overrides, validate
from chatmill.formatting import counted
from chatmill.run_files import list_checkpoints

from ..conversation import Conversation, to_record
from ..importers.registry import is_recognised, read_file, recognise, source_files
from ..importers.speakers import FORUMS, WHOEVER_ANSWERS, assistants, in_words
from ..ledger import Ledger, ranked, shorten
from ..raw.files import RawFile
from ..raw.finding import distinct, uploads
from ..recipe import RECIPES, SourceSection, load_data_recipe
from ..remote.files import is_url
from ..shards.manifest import MANIFEST

SPEAKERS_SHOWN, TURNS_SHOWN, REASONS_SHOWN, LONGEST_SAID = 8, 8, 6, 400
_RAW_SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt", ".csv", ".tsv", ".zip", ".gz", ".zst", ".bz2", ".xz", ".tar", ".parquet")


@dataclass
class FileFacts:
    """What one raw file holds. source: number of its source; path: the file itself, or the archive that holds it."""

    source: int
    path: str
    label: str
    format: str
    dialogues: int = 0
    turns: Counter[tuple[str, str]] = field(default_factory=Counter)  # (name or "", role) -> turns
    characters: Counter[str] = field(default_factory=Counter)  # role -> characters
    wide: int = 0  # characters of Chinese, Japanese and Korean
    first: float | None = None
    last: float | None = None
    ledger: Ledger = field(default_factory=lambda: Ledger("conversations"))

    def add(self, conversation: Conversation) -> None:
        """Count one dialogue."""
        self.dialogues += 1
        for turn in conversation.turns:
            self.characters[turn.role] += len(turn.content)
            self.wide += sum(char >= "\u2e80" for char in turn.content)
            self.turns[turn.name or "", turn.role] += 1
            if turn.time is not None:
                self.first = turn.time if self.first is None else min(self.first, turn.time)
                self.last = turn.time if self.last is None else max(self.last, turn.time)


@dataclass
class Survey:
    """What raw chats hold: facts by file, labels of files that nothing reads, all dialogues' number, and some at random."""

    files: list[FileFacts]
    left_out: list[str]
    dialogues: int
    chosen: list[Conversation]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Files, speakers and the chosen dialogues as JSON values."""
        files = [
            {"file": f.label, "format": f.format, "dialogues": f.dialogues, "first": f.first, "last": f.last}
            | {"turns": [{"name": name or None, "role": role, "turns": n} for (name, role), n in f.turns.most_common()]}
            | {"dropped": ranked(f.ledger.dropped), "changed": ranked(f.ledger.changed)}
            | {"assistant_open": len(assistants(f.ledger.speakers)) > 1}
            for f in self.files
        ]
        chosen = [to_record(conversation) for conversation in self.chosen]
        return {"files": files, "left_out": self.left_out, "dialogues": self.dialogues, "seed": self.seed, "samples": chosen}

    def show_files(self, console: Console) -> None:
        """Print what each file is read as, and who speaks."""
        _print_files(self.files, self.left_out, console)

    def show_dialogues(self, console: Console, most: int | None = None) -> None:
        """Print the dialogues that were chosen, or the first `most` of them."""
        shown = self.chosen[:most]
        line = f"\n{counted(self.dialogues, 'dialogue')}; {len(shown):,} of them at random (--seed {self.seed})"
        console.print(line, highlight=False)
        for conversation in shown:
            _print_dialogue(conversation, console)


def raw_sources(path: str, overrides: Sequence[str] = ()) -> list[SourceSection] | None:
    """The sources that `path` names: a data recipe's, or raw chats with `overrides` such as assistant=Ann. None: a data set."""
    place = Path(path)
    if place.suffix in (".yaml", ".yml") or (not place.exists() and (RECIPES / f"{path}.yaml").is_file()):
        return load_data_recipe(path, overrides).sources
    is_data_set = (place / MANIFEST).exists() or (is_url(path) and not path.lower().endswith(_RAW_SUFFIXES) and "*" not in path)
    if is_data_set or (place.is_dir() and (place / "dialogues").is_dir() and (place / "tokenizer").is_dir()):
        return None
    if list_checkpoints(place):
        raise ConfigError(
            f"{path} is a run: expected a data-set folder or raw chats. `chatmill status` and `report` show runs."
        )
    if not place.exists() and not is_url(path) and not any(sign in path for sign in "*?["):
        raise ConfigError(
            f"{path} does not exist: expected a data-set folder, raw chats (file, folder or glob) or a data recipe."
        )
    return [validate(SourceSection, {"path": path, **parse_overrides(overrides)}, path)]


def inspect_raw(
    sources: Sequence[SourceSection], samples: int = 2, seed: int | None = None, console: Console | None = None
) -> list[Conversation]:
    """Print files, formats, speakers, counts and `samples` random dialogues, which are returned. seed None: random."""
    console = console or Console()
    found = survey(sources, samples, seed)
    found.show_files(console)
    found.show_dialogues(console)
    return found.chosen


def survey(sources: Sequence[SourceSection], samples: int = 2, seed: int | None = None) -> Survey:
    """Read all files once. Raises ConfigError where none of them has a known format."""
    seed = random.randrange(10_000) if seed is None else seed
    rng, chosen, total = random.Random(seed), list[Conversation](), 0
    files, left_out = list[FileFacts](), list[str]()
    for number, options in enumerate(sources):
        found = distinct(source_files(options))
        aside = uploads(found) if options.format in ("auto", "chatgpt") else set()
        for file in found:
            if file in aside or (options.format == "auto" and len(found) > 1 and not is_recognised(file, options.columns)):
                left_out.append(file.label)
                continue
            facts = FileFacts(number, str(file.path), file.label, _format(file, options))
            files.append(facts)
            for conversation in read_file(file, options, facts.ledger):
                facts.add(conversation)
                total += 1
                if len(chosen) < samples:
                    chosen.append(conversation)
                elif (place := rng.randrange(total)) < samples:  # every dialogue is as likely to stay (Vitter's R)
                    chosen[place] = conversation
    if not files:
        recognise(source_files(sources[0])[0], sources[0].columns)  # says what is wrong with the first
    return Survey(files, left_out, total, chosen, seed)


def _format(file: RawFile, options: SourceSection) -> str:
    return options.format if options.format != "auto" else recognise(file, options.columns)


def _print_files(files: list[FileFacts], left_out: list[str], console: Console) -> None:
    for facts in files:
        span = " – ".join(dict.fromkeys(_day(time) for time in (facts.first, facts.last) if time is not None))
        counts = f"{facts.format}, {counted(facts.dialogues, 'dialogue')}, {counted(facts.turns.total(), 'turn')}"
        line = f"[bold]{escape(facts.label)}[/bold]: {counts}{', ' * bool(span)}{span}"
        console.print(line, highlight=False, soft_wrap=True)
        speakers = list(ranked({f"{n} ({role})" if n else role: turns for (n, role), turns in facts.turns.items()}).items())
        shown = [f"{name} {n:,}" for name, n in speakers[:SPEAKERS_SHOWN]]
        shown += [f"{len(speakers) - SPEAKERS_SHOWN:,} more"] if len(speakers) > SPEAKERS_SHOWN else []
        if len(assistants(facts.ledger.speakers)) > 1:
            shown = [f"{in_words(facts.ledger.speakers)}; nothing says who of them is the assistant (assistant=NAME)"]
        if shown:
            console.print(f"  turns: {escape(', '.join(shown))}", highlight=False, soft_wrap=True)
        if facts.format in FORUMS:
            console.print(f"  the assistant is {WHOEVER_ANSWERS}; assistant=NAME takes one of them", highlight=False)
        reasons = [f"-{n:,} {reason}" for reason, n in ranked(facts.ledger.dropped).items()]
        reasons += [f"~{n:,} {reason}" for reason, n in ranked(facts.ledger.changed).items()]
        for reason in reasons[:REASONS_SHOWN]:
            console.print(f"  {escape(reason)}", highlight=False, soft_wrap=True)
    if left_out:
        line = f"left out, empty or of no known format: {', '.join(left_out)}"
        console.print(escape(line), style="yellow", highlight=False, soft_wrap=True)


def _print_dialogue(conversation: Conversation, console: Console) -> None:
    console.print(f"\n[bold]{escape(conversation.origin)}[/bold] {counted(len(conversation.turns), 'turn')}", highlight=False)
    for turn in conversation.turns[:TURNS_SHOWN]:
        style = "green" if turn.role == "assistant" and turn.loss else "default"
        name = f"{turn.role} {turn.name}" if turn.name else turn.role
        console.print(
            f"  {escape(name)}: {escape(shorten(turn.content, LONGEST_SAID))}", style=style, highlight=False, soft_wrap=True
        )
    if len(conversation.turns) > TURNS_SHOWN:
        console.print(f"  … {counted(len(conversation.turns) - TURNS_SHOWN, 'more turn')}")


def _day(time: float) -> str:
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        return "?"
