"""Chat with a checkpoint in the terminal, and one-shot replies.

    chatmill chat runs/demo                                        (Ctrl-C stops a reply, Ctrl-D ends)
    printf 'Hi!\\nHow are you?\\n' | chatmill chat runs/demo         prints the replies only
    chatmill generate runs/demo "What is a tide?"

Files of prompts: chatmill.trainer.chat.file.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape

from chatmill.config import ConfigError
from chatmill.run_files import append_text

from ..generation.grammar import Grammar
from ..generation.prompt import check_text
from ..generation.replies import Reply, reply_to
from .chat_model import ChatModel, load_chat_model
from .settings import Settings, grammar_of
from .tools.tool_use import ToolUse, read_tools

HELP = """\
[bold]/system[/] TEXT       set the system message (without TEXT: show it; /system - removes it)
[bold]/reset[/]             forget the conversation, keep the system message
[bold]/regenerate[/]        answer the last question again
[bold]/params[/] NAME=VALUE temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens, seed,
                   presence_penalty, frequency_penalty, min_tokens
[bold]/save[/] FILE         append the conversation to a JSONL file that `chatmill data` reads
[bold]/quit[/]              leave (Ctrl-D too)
A line that ends in \\ goes on; a line of three double quotes opens and closes a longer text. Ctrl-C stops a reply."""

Answer = Callable[[list[dict[str, Any]], Settings, Callable[[str], None]], Reply]


class Chat:
    """One conversation and its commands; knows nothing of keyboards. `say` gets lines for the user (rich markup)."""

    def __init__(
        self,
        answer: Answer,
        settings: Settings,
        system: str | None,
        say: Callable[[str], None],
        own_system: str | None = None,
        tool_use: ToolUse | None = None,
    ) -> None:
        self.tool_use = tool_use
        self.answer, self.settings, self.say = answer, settings, say
        self.system, self.own_system = system, own_system
        self.turns: list[dict[str, Any]] = []
        self.replies = 0
        self.done = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """System message and turns, as messages of a prompt."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def take(self, text: str, on_text: Callable[[str], None]) -> Reply | None:
        """Run a command, or answer; None if there is no reply. A reply stopped by Ctrl-C stays in the history."""
        check_text(text, "this entry")
        if text.startswith("/"):
            name, _, rest = text.partition(" ")
            if name == "/regenerate":
                return self._again(on_text)
            self._command(name, rest.strip())
            return None
        if self.tool_use is not None and self.tool_use.waiting:
            self.turns.append(self.tool_use.result(text))
            if self.tool_use.waiting:
                self._ask_for_result()
                return None
        else:
            self.turns.append({"role": "user", "content": text})
        return self._reply(on_text)

    def _ask_for_result(self) -> None:
        assert self.tool_use is not None
        self.say(f"[yellow]The next entry is the result of {escape(self.tool_use.waiting[0][1])}.[/]")

    def _again(self, on_text: Callable[[str], None]) -> Reply | None:
        while self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        if self.tool_use is not None:
            self.tool_use.waiting.clear()
        if not self.turns:
            self.say("Nothing to answer yet.")
            return None
        return self._reply(on_text)

    def _reply(self, on_text: Callable[[str], None]) -> Reply | None:
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            if words := piece if use is None else use.push(piece):
                on_text(words)

        use = self.tool_use
        if use is not None:
            use.begin()
        seed = self.settings.seed
        settings = self.settings if seed is None else replace(self.settings, seed=seed + self.replies)
        self.replies += 1
        try:
            reply = self.answer(self.messages, settings, take)
        except KeyboardInterrupt:
            self.turns.append({"role": "assistant", "content": "".join(pieces)})
            return None
        except (ConfigError, FloatingPointError):
            turn = self.turns.pop()
            if use is not None and turn["role"] == "tool":
                use.waiting.insert(0, (turn["tool_call_id"], turn["name"]))
            raise
        if use is None:
            self.turns.append({"role": "assistant", "content": reply.text})
            return reply
        if rest := use.rest():
            on_text(rest)
        self.turns.append(use.finish())
        for call in use.shown:
            self.say(f"[yellow]calls {escape(call)}[/]")
        if use.waiting:
            self._ask_for_result()
        return reply

    def _command(self, name: str, rest: str) -> None:
        match name:
            case "/quit" | "/exit":
                self.done = True
            case "/help":
                self.say(HELP)
            case "/reset":
                self.turns.clear()
                if self.tool_use is not None:
                    self.tool_use.waiting.clear()
                self.say("The conversation starts over.")
            case "/system":
                if rest:
                    self.system = None if rest == "-" else rest
                own = f"the chat template's own: {escape(self.own_system)}" if self.own_system else "none"
                self.say(f"System message: {escape(self.system) if self.system else own}")
            case "/params":
                self.settings = self.settings.changed(rest.split())
                self.say("  ".join(f"{f.name}={getattr(self.settings, f.name)}" for f in fields(self.settings)))
            case "/save":
                if not rest:
                    raise ConfigError("/save needs a file name, for example /save chat.jsonl")
                append_text(Path(rest).expanduser(), json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
                self.say(f"Saved {len(self.turns)} turns to {escape(rest)}.")
            case _:
                raise ConfigError(f"{name}: no such command. /help lists them.")


def run_chat(checkpoint: str | Path, *, system: str | None = None, tools: str | None = None, **settings: Any) -> int:
    """The chat loop on this process' terminal, or over a pipe. Settings as in `Settings`. Returns the exit code.

    tools: a file with declarations of tools; calls are shown, and their results asked for.
    """
    declared = None if tools is None else read_tools(tools)
    Settings(**settings)  # refuses before anything loads
    check_text(system or "", "--system")
    survive_bad_text()
    chat_model = load_chat_model(checkpoint)
    start = Settings.of(chat_model, settings)
    use = None if declared is None else ToolUse.of(chat_model, declared)
    answer = answer_with(chat_model, use)
    if sys.stdin.isatty() and sys.stdout.isatty():
        own = chat_model.tokenizer.template.own_system_message()
        return _terminal(answer, start, system, chat_model.name, own, use)
    return pipe(answer, start, system, sys.stdin, sys.stdout, use)


def survive_bad_text() -> None:
    """Let bytes that are not UTF-8 arrive, to be refused line by line, and let no character end the output."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def answer_with(chat_model: ChatModel, tool_use: ToolUse | None = None) -> Answer:
    """The answers of a model, for `Chat`."""

    made: dict[str | None, Grammar | None] = {}

    def answer(messages: list[dict[str, Any]], settings: Settings, on_text: Callable[[str], None]) -> Reply:
        if settings.json_schema not in made:
            made[settings.json_schema] = grammar_of(chat_model, settings)
        return reply_to(
            chat_model.model,
            chat_model.tokenizer,
            messages,
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.sampling,
            stop_strings=settings.stop,
            seed=settings.seed,
            grammar=made[settings.json_schema],
            on_text=on_text,
            variables=None if tool_use is None else {"tools": tool_use.tools},
            keep_special=tool_use is not None,
        )

    return answer


def pipe(
    answer: Answer, settings: Settings, system: str | None, source: TextIO, sink: TextIO, tool_use: ToolUse | None = None
) -> int:
    """Reply to every line of source on sink; commands work and print to stderr. Exit code 2 if any line failed."""
    chat = Chat(answer, settings, system, lambda text: print(_plain(text), file=sys.stderr), tool_use=tool_use)
    code = 0
    for line in source:
        if not line.strip():
            continue
        try:
            reply = chat.take(line.rstrip("\n"), lambda piece: print(piece, end="", file=sink, flush=True))
        except (ConfigError, OSError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
            continue
        if reply is not None:
            print(file=sink, flush=True)
        if chat.done:
            break
    return code


def _plain(markup: str) -> str:
    from rich.text import Text

    return Text.from_markup(markup).plain


def printable(text: str) -> str:
    """Without control characters, with which a model could control the terminal."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def _terminal(
    answer: Answer, settings: Settings, system: str | None, name: str, own_system: str | None, tool_use: ToolUse | None
) -> int:
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() line editing and history
    console = Console(highlight=False)
    chat = Chat(answer, settings, system, lambda text: console.print(text), own_system, tool_use)
    console.print(f"[bold]{escape(name)}[/]  [dim]/help for commands, Ctrl-C stops a reply, Ctrl-D ends[/]\n")
    interrupts = 0
    while not chat.done:
        try:
            text = _read(console)
            interrupts = 0
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts > 1:
                break
            console.print("\n[dim]Ctrl-C again, Ctrl-D or /quit leaves.[/]")
            continue
        except EOFError:
            console.print()
            break
        if not text.strip():
            continue
        began, shown = time.monotonic(), False

        def show(piece: str) -> None:
            nonlocal shown
            if not shown:
                console.print(f"[bold cyan]{escape(name)}[/] ", end="")
                shown = True
            sys.stdout.write(printable(piece))
            sys.stdout.flush()

        before = chat.replies
        try:
            reply = chat.take(text, show)
        except (ConfigError, OSError, FloatingPointError) as error:
            console.print(f"[red]{escape(str(error))}[/]")
            continue
        if reply is not None:
            rate = reply.tokens / max(time.monotonic() - began, 1e-9)
            full = ", cut at max_new_tokens or the context" if reply.finish_reason == "length" else ""
            console.print(f"\n[dim]{reply.tokens} tokens, {rate:.1f} per second{full}[/]\n")
        elif chat.replies > before:
            console.print("\n[dim]stopped[/]\n")
    return 0


def _read(console: Console) -> str:
    """One entry: a line, lines joined by a trailing backslash, or a block between lines of three double quotes."""
    line = console.input("[bold green]you[/] ")
    if line.strip() == '"""':
        lines: list[str] = []
        while (more := console.input("[dim]...[/] ")).strip() != '"""':
            lines.append(more)
        return "\n".join(lines)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + console.input("[dim]...[/] ")
    return line


def generate_one(checkpoint: str | Path, prompt: str, *, system: str | None = None, **settings: Any) -> int:
    """Print the reply to one prompt while it is generated."""
    Settings(**settings)  # refuses before anything loads
    check_text(prompt, "the prompt")
    check_text(system or "", "--system")
    survive_bad_text()
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    clean = printable if sys.stdout.isatty() else str
    chat_model = load_chat_model(checkpoint)
    start = Settings.of(chat_model, settings)
    answer_with(chat_model)(messages, start, lambda piece: print(clean(piece), end="", flush=True))
    print()
    return 0
