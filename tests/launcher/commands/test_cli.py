"""The `chatmill` command: quick help, and clear errors with exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatmill.launcher.__main__ import main

ROOT = Path(__file__).resolve().parents[3]


def test_help_loads_nothing_heavy() -> None:
    program = "import sys; from chatmill.launcher.__main__ import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    heavy = {"torch", "numpy", "yaml", "pydantic", "rich", "transformers", "accelerate", "deepspeed", "webdataset", "asyncio"}
    assert "argparse" in loaded
    assert not loaded & heavy


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "no-such-recipe"], "neither a file nor a shipped recipe"),
        (["train", "tiny", "optimizer.lrr=1"], "did you mean 'lr'"),
        (["data", "build", "no-such-recipe"], "neither a file nor a shipped recipe"),
        (["data", "inspect", "nowhere"], "does not exist"),
        (["eval", "nowhere"], "nowhere is not a checkpoint"),
        (["chat", "nowhere"], "nowhere is not a checkpoint"),
        (["export", "nowhere", "out"], "nowhere is not a checkpoint"),
        (["report", "nowhere"], "nowhere"),
        (["import", "no_such_module_at_all", "out"], "no_such_module_at_all"),
        (["generate", "nowhere"], "give either a prompt or --file"),
    ],
)
def test_unusable_input_exits_2_and_leaves_nothing(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_source_is_named_and_nothing_is_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    recipe = {"name": "e", "out": "data", "sources": [{"path": "empty.jsonl"}], "tokenizer": {"train": {"vocab_size": 300}}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    assert main(["data", "build", "r.yaml"]) == 2
    assert "empty.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_build_train_eval_report_export_import_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} and one?"},
                {"role": "assistant", "content": f"It is {i + 1}."},
            ]
        }
        for i in range(200)
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    Path("d.yaml").write_text(
        json.dumps(
            {"name": "d", "out": "data", "sources": [{"path": "chats.jsonl"}], "tokenizer": {"train": {"vocab_size": 320}}}
        )
    )
    shape = ["vocab_size=320", "hidden_size=32", "intermediate_size=64", "layers=2", "heads=2", "kv_heads=1", "context=128"]
    small = ["data.path=data", "data.sequence_length=64", "train.steps=3", "train.cpu_threads=1", "run.name=r"]
    assert main(["data", "build", "d.yaml"]) == 0
    assert main(["data", "build", "d.yaml"]) == 0
    assert "already built" in capsys.readouterr().out
    assert main(["data", "inspect", "data"]) == 0
    capsys.readouterr()
    assert main(["data", "inspect", "data", "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)["splits"]
    assert sum(split["dialogues"] for split in inspected.values()) == 200
    assert main(["data", "inspect", "chats.jsonl", "--json", "--samples", "1"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert raw["dialogues"] == 200 and raw["files"][0]["format"] == "openai" and len(raw["samples"]) == 1
    assert main(["data", "verify", "data"]) == 0
    assert main(["train", "tiny", *small, *(f"model.{word}" for word in shape)]) == 0
    assert main(["data", "at", "runs/r", "1"]) == 0
    assert "chats.jsonl" in capsys.readouterr().out
    assert main(["eval", "runs/r", "--json", "figures.json"]) == 0
    figures = json.loads(Path("figures.json").read_text())
    capsys.readouterr()
    assert main(["eval", "figures.json", "--json"]) == 0  # reads it: nothing is measured again
    assert json.loads(capsys.readouterr().out)["loss"] == figures["loss"]
    logged = [json.loads(line) for line in Path("runs/r/metrics.jsonl").read_text().splitlines()]
    assert figures["loss"] == pytest.approx([line["eval"]["loss"] for line in logged if "eval" in line][-1], rel=1e-5)
    assert main(["report", "runs/r"]) == 0
    assert "<html" in Path("runs/r/report.html").read_text()
    assert main(["export", "runs/r", "hf"]) == 0
    assert main(["import", "hf", "again"]) == 0
    assert main(["generate", "again", "What is 3 and one?", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    before = Path("again/manifest.json").stat().st_mtime_ns
    assert main(["import", "hf", "again"]) == 0 and "nothing to do" in capsys.readouterr().out
    assert Path("again/manifest.json").stat().st_mtime_ns == before
    os.utime("hf/config.json", (before / 1e9 + 60,) * 2)
    assert main(["import", "hf", "again"]) == 2  # the source is newer
    assert "exists already" in capsys.readouterr().err
