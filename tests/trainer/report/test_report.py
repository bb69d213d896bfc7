"""The run report: self-contained, safe, and unimpressed by whatever a run left behind."""

from __future__ import annotations

import html
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from chatmill.trainer.report.curves import running_median, smooth
from chatmill.trainer.report.page import build_report
from chatmill.trainer.report.reading import read_run

CONFIG = """
run: {name: demo, dir: runs}
data: {path: corpora/chitchat, sequence_length: 1024, overlong: truncate, max_dialogues: null}
model: {checkpoint: models/smollm2, family: llama, vocab_size: 49152, hidden_size: 576, layers: 30, heads: 9, kv_heads: 3}
optimizer: {name: adamw, lr: 0.0003, betas: [0.9, 0.95], weight_decay: 0.1, clip_norm: 1.0}
schedule: {name: cosine, warmup_steps: 20, min_ratio: 0.1}
train: {steps: 300, micro_batch: 1, accumulation: 4, precision: bf16, seed: 0}
parallel: {strategy: ddp}
"""


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(home: Path, name: str = "demo", steps: int = 300, seed: int = 0, floor: float = 3.1) -> Path:
    """A run folder with everything in it, and its data set, below home."""
    draw_from = random.Random(seed)
    run = home / "runs" / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG.replace("name: demo", f"name: {name}").replace("steps: 300", f"steps: {steps}"))
    (run / "command").write_text("accelerate launch trainer/train.py demo train.steps=300\n")
    environment = {
        "world_size": 2,
        "backend": "gloo",
        "strategy": "ddp",
        "device": "cpu",
        "versions": {"torch": "2.13.0", "numpy": "2.4"},
    }
    (run / "environment.json").write_text(json.dumps(environment))
    rows: list[dict[str, Any]] = []
    tokens = 0  # of the whole run; a line's own `tokens` are those since the line before
    for step in range(steps + 1):
        if step % 50 == 0 or step == steps:
            loss = floor + 0.12 + 0.65 * math.exp(-step / 60)
            rows.append(
                {
                    "step": step,
                    "eval": {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.62 - 0.08 * loss, "loss_tokens": 51234},
                }
            )
        if step == 0:
            continue
        tokens += 8000 + draw_from.randrange(190)
        loss = floor + 0.7 * math.exp(-step / 55) + draw_from.gauss(0, 0.11)
        lr = 3e-4 * min(1, step / 20) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        norm = abs(draw_from.gauss(1.1, 0.3)) + (40 if step == 120 else 0)
        line = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": 8100,
            "loss_tokens": 4000,
            "total_tokens": tokens,
        }
        speed = {"tokens_per_s": draw_from.gauss(4200, 160), "mfu": draw_from.gauss(0.42, 0.01)}
        rows.append(line | speed | {"time": 1.79e9 + step * 1.93})
    write_lines(run / "metrics.jsonl", rows)
    write_lines(run / "events.jsonl", [
        {"time": 1.79e9, "event": "started", "world_size": 2, "backend": "gloo"},
        {"time": 1.79e9 + 231, "event": "spike", "step": 120, "grad_norm": 41.2, "action": "step skipped"},
        {"time": 1.79e9 + 400, "event": "checkpoint", "step": 200, "path": "checkpoints/step-00000200"},
        {"time": 1.79e9 + 580, "event": "finished", "step": 300},
    ])  # fmt: skip
    prompts = ("What is the capital of France?", "I had a long day. Cheer me up a little?", "Got any plans for the weekend?")
    replies = (
        ("The capital of France is Paris.", "Paris! Have you been there?", "It's Paris :) I went once, loved it. You?"),
        (
            "I'm sorry to hear that. As an AI language model, I can offer some tips:\n1. Rest\n2. Drink water",
            "Oh no, what happened?",
            "aww sorry to hear that! what happened? my dog always cheers me up haha",
        ),
        ("I don't have plans since I'm a program.", "Not yet! you?", "maybe a hike if the weather is nice. how about you?"),
    )
    write_lines(
        run / "samples.jsonl",
        [
            {"step": s, "prompt": p, "reply": r[i]}
            for i, s in enumerate((0, 150, 300))
            for p, r in zip(prompts, replies, strict=True)
        ],
    )
    data = home / "corpora" / "chitchat"
    data.mkdir(parents=True, exist_ok=True)
    (data / "manifest.json").write_text(
        json.dumps({"vocab_size": 49152, "dialogues": {"train": 5905, "validation": 318}, "tokenizer_sha256": "a3f1" * 16})
    )
    clean = {"empty": 212, "one_sided": 85}
    stages = [
        {"name": "import", "kept": 7168, "dropped": {}, "seconds": 2.1, "unit": "chats"},
        {"name": "clean", "kept": 6871, "dropped": clean, "unit": "chats", "examples": {"empty": ["hi", "hello?"]}},
        {"name": "pair", "kept": 6402, "dropped": {"too_short": 301, "no_answer": 168}, "seconds": 1.2, "unit": "chats"},
        {"name": "tokenise", "kept": 2911034, "dropped": {"overlong": 10233}, "seconds": 8.0, "unit": "tokens"},
    ]
    splits = {"train": {"dialogues": 5905, "tokens": 2800000, "loss_tokens": 1400000}}
    (data / "report.json").write_text(json.dumps({"stages": stages, "splits": splits, "certificate": {"valid": True}}))
    return run


def text_of(page: str) -> str:
    """The words of a page, without scripts, styles and tags."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_report_tells_figures_replies_funnel_config_and_events(home: Path) -> None:
    out = build_report(make_run(home))
    assert out == home / "runs/demo/report.html"
    text = text_of(out.read_text(encoding="utf-8"))
    for said in (
        "47.94 → 25.14 48% lower",
        "31.0% → 36.2% +5.2 points",
        "2.43 M",
        "Peak 41.3 at step 120 is beyond the scale.",
        "Before, step 0 The capital of France is Paris.",
        "After, step 300 It's Paris :)",
        "6,871 chats kept, 297 dropped (95.9% kept) empty 212 one sided 85",
        "5,905 dialogues, 2,800,000 tokens, 1,400,000 of them with loss",
        "betas 0.9, 0.95",
        "world_size 2",
        "spike",
        "accelerate launch trainer/train.py",
    ):
        assert said in text, said


def test_the_report_loads_nothing_from_elsewhere(home: Path) -> None:
    page = build_report(make_run(home)).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", page)
    assert not re.search(r"@import|url\(|https?://|//cdn", page)
    assert [p.name for p in (home / "runs/demo").glob("*.html*")] == ["report.html"]


def test_model_text_cannot_become_markup_or_script(home: Path) -> None:
    run = make_run(home, "<b>run")
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    write_lines(run / "samples.jsonl", [{"step": 0, "prompt": evil, "reply": evil}])
    write_lines(run / "events.jsonl", [{"event": evil, "message": evil}])
    page = build_report(run).read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<img" not in page and "<b>run" not in page
    assert evil in text_of(page)


def test_runs_are_compared_in_every_chart_and_in_a_table(home: Path) -> None:
    out = build_report(make_run(home), home / "out/cmp.html", [make_run(home, "other", 200, 3, 3.3)])
    text = text_of(out.read_text(encoding="utf-8"))
    assert "demo: training" in text and "other: training" in text
    assert "run steps tokens time tokens/s training loss perplexity accuracy demo 300" in text and "other 200" in text


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "config.yaml", "environment.json", "events.jsonl", "samples.jsonl", "command", "data", "all"]
)
def test_a_report_is_made_whatever_is_missing(home: Path, missing: str) -> None:
    run = make_run(home)
    for file in [f for f in run.iterdir() if missing in (f.name, "all")]:
        file.unlink()
    if missing in ("data", "all"):
        for file in (home / "corpora/chitchat").iterdir():
            file.unlink()
    text = text_of(build_report(run).read_text(encoding="utf-8"))
    if missing not in ("data", "command", "events.jsonl", "samples.jsonl"):
        assert f"{'metrics.jsonl' if missing == 'all' else missing} is missing." in text


def test_damaged_files_are_named_and_the_rest_is_shown(home: Path) -> None:
    run = make_run(home)
    with (run / "metrics.jsonl").open("ab") as handle:
        handle.write(b'{"step": 301, "lo')
    (run / "config.yaml").write_text("a: [b")
    (run / "environment.json").write_text("[1, 2]")
    (run / "samples.jsonl").write_bytes(b"\xff\xfe\n[]\n")
    text = text_of(build_report(run).read_text(encoding="utf-8"))
    assert "metrics.jsonl: 1 damaged line left out." in text
    assert "config.yaml is damaged." in text and "environment.json is damaged." in text
    assert "samples.jsonl: 2 damaged lines left out." in text
    assert "25.14" in text


def test_values_that_are_not_numbers_leave_gaps_not_errors(home: Path) -> None:
    run = make_run(home)
    lines = [{"step": k, "loss": [math.nan, None, "x", math.inf, 2.5][k % 5], "lr": 10**400, "time": "?"} for k in range(40)]
    lines += [{"step": 40, "eval": {"perplexity": math.nan, "accuracy": None}}, {"step": None}, {"no": "step"}]
    write_lines(run / "metrics.jsonl", lines)
    page = build_report(run).read_text(encoding="utf-8")
    assert "nan" not in re.findall(r'd="([^"]*)"', page).__str__()
    assert "logged a loss that is not finite" in text_of(page)


def test_an_empty_run_says_so(home: Path) -> None:
    (home / "runs/empty").mkdir(parents=True)
    text = text_of(build_report(home / "runs/empty").read_text(encoding="utf-8"))
    assert "No step logged" in text and "left no configuration and no metrics" in text
    with pytest.raises(FileNotFoundError, match="no run folder"):
        build_report(home / "runs/nowhere")


def test_steps_redone_after_a_resume_count_once(home: Path) -> None:
    run = make_run(home)
    lines = [{"step": k, "loss": 5.0} for k in range(1, 9)] + [{"step": 8, "eval": {"perplexity": 99.0}}]
    lines += [{"step": k, "loss": 4.0} for k in range(5, 7)] + [{"step": 6, "eval": {"perplexity": 50.0}}]
    write_lines(run / "metrics.jsonl", lines)
    read = read_run(run)
    assert [row["loss"] for row in read.train.values()] == [5.0] * 4 + [4.0] * 2
    assert list(read.evals) == [6]


def test_pauses_between_attempts_are_no_time_of_the_run(home: Path) -> None:
    run = make_run(home, steps=10)
    write_lines(run / "events.jsonl", [
        {"time": 1.79e9, "event": "start"},
        {"time": 1.79e9 + 7200, "event": "resume", "step": 5},
        {"time": 1.79e9 + 7230, "event": "finished", "step": 10},
    ])  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "time" in row:
            row["time"] = 1.79e9 + (10 * row["step"] if row["step"] <= 5 else 7200 + 5 * (row["step"] - 5))
    write_lines(run / "metrics.jsonl", rows)
    found = read_run(run)
    assert found.attempts() == [(1.79e9, 1.79e9 + 50), (1.79e9 + 7200, 1.79e9 + 7230)]
    page = text_of(build_report(run).read_text())
    assert "1 min 20 s 2 attempts, 1 h 59 min between them left out" in page and "10 steps in 1 min 20 s" in page


def test_a_headline_has_its_interval_and_n_and_replies_come_before_the_plots(home: Path) -> None:
    run = make_run(home, steps=10)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval" in row][-1]["eval"]
    last |= {"loss": 3.0, "perplexity": math.exp(3.0), "accuracy": 0.4, "dialogues": 16, "loss_se": 0.05, "accuracy_se": 0.01}
    write_lines(run / "metrics.jsonl", rows)
    page = build_report(run).read_text()
    low, high = math.exp(3.0 - 1.96 * 0.05), math.exp(3.0 + 1.96 * 0.05)
    assert f"95 % interval {low:.4g} to {high:.4g} · 16 dialogues, 51,234 supervised tokens" in text_of(page)
    assert "95 % interval 38.0% to 42.0%" in text_of(page)
    assert page.index('id="samples"') < page.index('id="curves"')
    assert "fetch(" not in page  # only `chatmill watch` makes a page that asks for news


def test_figures_of_averaged_weights_are_a_curve_not_a_step_that_was_redone(home: Path) -> None:
    run = make_run(home, steps=10)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [*rows, {"step": 10, "eval_ema": {"loss": 2.5, "perplexity": 12.0, "accuracy": 0.5}}])
    found = read_run(run)
    assert found.averages[10]["loss"] == 2.5 and "loss" in found.train[10] and not found.notes
    assert "averaged weights" in build_report(run).read_text()


def test_smoothing_has_no_start_bias_and_passes_over_gaps() -> None:
    assert smooth([3.0] * 5, 4) == pytest.approx([3.0] * 5)
    values = smooth([1.0, math.nan, 2.0], 1)
    assert values[0] == 1.0 and math.isnan(values[1]) and values[2] == pytest.approx(5 / 3)
    assert running_median([1.0, 1.0, 50.0, 1.0, 1.0], 3) == (1.0,) * 5
