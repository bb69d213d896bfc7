"""The tutorial on own chats works as it is written, with a small model in place of SmolLM2 and two steps of training.

tests/documentation/first_hour.py (`make first-hour`) types the same commands, and those of the demo, in full.
"""

from __future__ import annotations

import io
import re
import shlex
import zipfile
from pathlib import Path

import pytest

from chatmill.launcher.__main__ import main
from chatmill.launcher.own_chats import new as module

from .documented import ROOT, whole_lines
from .first_hour import CHINESE, save_small_model

SMALLER = {
    "train": "train.steps=2 train.precision=fp32 train.cpu_threads=1 data.sequence_length=128 evaluation.max_new_tokens=4",
    "eval": "--generate 1 --select 1 --max-new-tokens 4",
    "chat": "--max-new-tokens 8",
}
CHATS = {
    "en": ("docs/tutorials/whatsapp.txt", {}),
    "zh": ("docs/zh/chats/whatsapp.txt", CHINESE),
}


@pytest.mark.parametrize("language", list(CHATS))
def test_the_tutorial_goes_from_an_export_to_an_export(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, words = CHATS[language]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "visible_gpus", lambda: None)
    name, archive = words.get("ann", "ann"), Path(words.get("exports/chat.zip", "exports/chat.zip"))
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as made:
        made.write(ROOT / chat, "WhatsApp Chat.txt")
    save_small_model(Path("runs/smollm2"), (ROOT / chat).read_text(encoding="utf-8"))
    said: dict[str, str] = {}
    for line in whole_lines(ROOT / "docs/tutorials/own-chats.md"):
        for old, new in words.items():
            line = re.sub(rf"(?<![a-z]){re.escape(old)}(?![a-z])", new, line)
        text, _, command = line.rpartition(" | ")
        monkeypatch.setattr("sys.stdin", io.StringIO(text.removeprefix("echo ") or "Hi!\n"))
        typed = shlex.split(command)
        if typed[0] == "chatmill" and typed[1] not in ("import", "serve"):
            assert main([*typed[1:], *SMALLER.get(typed[1], "").split()]) == 0, command
            said[typed[1] if typed[1] != "data" else typed[2]] = capsys.readouterr().out
    printed = [row.partition("chatmill ")[2] for row in said["new"].partition("Next:")[2].splitlines() if "chatmill " in row]
    assert printed == [f"data build {name}-data.yaml", f"train {name}-train.yaml", f"chat runs/{name}"]
    assert "whatsapp" in said["new"] and said["chat"].strip()
    assert Path(f"runs/{name}/evaluation.json").is_file()
    report = Path(f"runs/{name}/report.html").read_text(encoding="utf-8")
    if language == "en":  # whose recipe does not say the shape: it was the default's, 135 M
        assert re.search(r"Llama-type model of \d+\Wk parameters, started from runs/smollm2", report)
    assert Path(f"out/{name}/config.json").is_file() and Path(f"out/{name}.gguf").read_bytes()[:4] == b"GGUF"
