"""Whole runs: the same numbers however they are split, stopped and continued."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.stream import PackedStream
from chatmill.run_files import list_checkpoints, read_jsonl
from chatmill.trainer.checkpoint.checkpoint import open_checkpoint
from chatmill.trainer.config import load_recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.evaluation.evaluate import evaluate_fully
from chatmill.trainer.evaluation.options import EvaluationOptions
from chatmill.trainer.loop.loop import train
from chatmill.trainer.train import main

from ..conftest import start


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


def last_eval(run: Path) -> dict[str, Any]:
    return [line["eval"] for line in read_jsonl(run / "metrics.jsonl") if "eval" in line][-1]


def parameters(run: Path) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(run).tensors())


def test_a_run_learns_and_leaves_a_whole_folder(write_recipe, tmp_path: Path) -> None:
    recipe = write_recipe("learn", train={"steps": 60, "accumulation": 8}, evaluation={"at_start": True, "prompts": ["Where?"]})
    assert main([str(recipe)]) == 0
    run = tmp_path / "runs" / "learn"
    names = {p.name for p in run.iterdir()}
    assert {
        "config.yaml",
        "command",
        "environment.json",
        "metrics.jsonl",
        "events.jsonl",
        "checkpoints",
        "samples.jsonl",
    } <= names
    evaluations = [line["eval"] for line in read_jsonl(run / "metrics.jsonl") if "eval" in line]
    assert evaluations[-1]["perplexity"] < evaluations[0]["perplexity"] / 10
    assert evaluations[-1]["accuracy"] > 0.5
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 1
    assert environment["strategy"] == "single"
    line = next(read_jsonl(run / "metrics.jsonl"))
    assert {"step", "eval"} <= set(line)
    step = next(x for x in read_jsonl(run / "metrics.jsonl") if "loss" in x)
    assert {"step", "loss", "lr", "grad_norm", "tokens", "loss_tokens", "tokens_per_s"} <= set(step)
    assert step["padding_share"] == pytest.approx(1 - step["tokens"] / (8 * 128))
    assert step["loss_share"] == step["loss_tokens"] / step["tokens"]


def test_training_goes_below_the_unigram_entropy(write_recipe, tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe("unigram", train={"steps": 60, "accumulation": 8})
    train(load_recipe(str(recipe)))
    counts: dict[int, int] = {}
    dataset = TokenDataset.open(tiny_data, "validation")
    for b in range(dataset.n_blocks):
        block = dataset.read_block(b)
        for token in block.ids[block.loss_mask]:
            counts[int(token)] = counts.get(int(token), 0) + 1
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert last_eval(tmp_path / "runs" / "unigram")["loss"] < 0.7 * entropy


def test_the_split_of_a_step_into_micro_batches_does_not_change_the_run(write_recipe, tmp_path: Path) -> None:
    for name, micro, accumulation in (("a", 1, 4), ("b", 4, 1), ("c", 2, 2)):
        train(load_recipe(str(write_recipe(name, train={"micro_batch": micro, "accumulation": accumulation}))))
    first = losses(tmp_path / "runs" / "a")
    assert len(first) == 8
    for name in ("b", "c"):
        assert losses(tmp_path / "runs" / name) == pytest.approx(first, rel=2e-5)


def test_the_first_loss_is_plain_pytorchs_on_the_same_dialogues(write_recipe, tiny_data: Path, tmp_path: Path) -> None:
    """Independent of our packing and loss: each dialogue alone, torch's own cross-entropy on full logits."""
    from chatmill.trainer.model.decoder import Decoder

    recipe = load_recipe(str(write_recipe("truth", train={"steps": 1})))
    train(recipe)
    model = Decoder(recipe.model.shape())
    model.init_weights(recipe.train.seed)
    stream = PackedStream(TokenDataset.open(tiny_data, "train"), sequence_length=128, micro_batch=4, seed=0, prefetch=0)
    batch = next(iter(stream))
    wanted = set(batch.uids)
    dataset = TokenDataset.open(tiny_data, "train")
    total, count, found = 0.0, 0, 0
    for b in range(dataset.n_blocks):
        block = dataset.read_block(b)
        for i, uid in enumerate(block.uids):
            if uid not in wanted:
                continue
            found += 1
            at = slice(int(block.offsets[i]), int(block.offsets[i + 1]))
            ids, mask = torch.from_numpy(block.ids[at].astype("int64")), torch.from_numpy(block.loss_mask[at].copy())
            length = len(ids)
            assert length <= 128
            ends = torch.tensor([0, length], dtype=torch.int32)
            with torch.no_grad():
                logits = model(ids, torch.arange(length), ends)
            picked = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[mask[1:]]
            total += float(picked.double().sum())
            count += int(mask[1:].sum())
    assert found == len(wanted)
    assert count == batch.step_loss_tokens
    assert losses(tmp_path / "runs" / "truth")[0] == pytest.approx(total / count, rel=1e-5)


def test_a_stopped_run_continues_with_the_same_numbers(write_recipe, tmp_path: Path) -> None:
    whole = write_recipe("whole")
    train(load_recipe(str(whole)))
    parts = write_recipe("parts")
    process = start(parts, 1, launcher="python")
    run = tmp_path / "runs" / "parts"
    deadline = time.monotonic() + 300
    while len(losses(run) if run.exists() else []) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    stopped = len(losses(run))
    if stopped < 8:
        assert (run / "PREEMPTED").is_file()
        assert "same command continues" in out
    train(load_recipe(str(parts)))
    assert not (run / "PREEMPTED").exists()
    assert losses(run) == losses(tmp_path / "runs" / "whole")
    for name, tensor in parameters(tmp_path / "runs" / "whole").items():
        assert torch.equal(tensor, parameters(run)[name]), name


def test_a_killed_run_falls_back_to_its_last_checkpoint_and_repeats_exactly(write_recipe, tmp_path: Path) -> None:
    train(load_recipe(str(write_recipe("whole"))))
    recipe = write_recipe("killed", train={"steps": 8})
    process = start(recipe, 1, launcher="python")
    run = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 300
    while not list_checkpoints(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    train(load_recipe(str(recipe)))
    assert losses(run) == losses(tmp_path / "runs" / "whole")


def test_a_finished_run_is_left_alone(write_recipe, tmp_path: Path, capsys) -> None:
    recipe = write_recipe("once")
    assert main([str(recipe)]) == 0
    before = (tmp_path / "runs" / "once" / "metrics.jsonl").read_bytes()
    assert main([str(recipe)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert (tmp_path / "runs" / "once" / "metrics.jsonl").read_bytes() == before


def test_another_recipe_in_the_same_folder_is_refused_by_field(write_recipe, capsys) -> None:
    recipe = write_recipe("same")
    assert main([str(recipe)]) == 0
    assert main([str(recipe), "optimizer.lr=0.1"]) == 2
    assert "optimizer.lr: 0.005 -> 0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=nowhere"], "nowhere"),
        (["model.vocab_size=100"], "model.vocab_size is 100"),
        (["optimizer.lrr=1"], "did you mean 'lr'"),
        (["optimizer.learning_rate=1"], "did you mean 'lr'"),
        (["train.learning_rate=1"], "did you mean 'optimizer.lr'"),
        (["train.gradient_accumulation_steps=2"], "did you mean 'accumulation'"),
        (["train.steps=none"], "train.steps"),
        (["model.checkpoint=missing"], "missing is not a checkpoint"),
        (["data.sequence_length=512"], "exceeds model.context"),
        (["steps"], "expected section.field=value"),
        (["parallel.strategy=ddp"], "started alone"),
    ],
)
def test_unusable_input_exits_2_with_a_reason_and_writes_nothing(
    write_recipe, tmp_path: Path, overrides: list[str], message: str, capsys
) -> None:
    assert main([str(write_recipe("bad")), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_fine_tuning_starts_from_the_checkpoints_weights(write_recipe, tmp_path: Path) -> None:
    train(load_recipe(str(write_recipe("base"))))
    recipe = write_recipe("tuned", model={"checkpoint": str(tmp_path / "runs" / "base")}, evaluation={"at_start": True})
    train(load_recipe(str(recipe)))
    first = next(line["eval"] for line in read_jsonl(tmp_path / "runs" / "tuned" / "metrics.jsonl") if "eval" in line)
    assert first == pytest.approx(last_eval(tmp_path / "runs" / "base"))


def test_eval_of_a_checkpoint_repeats_the_figures_of_the_run(write_recipe, tmp_path: Path) -> None:
    train(load_recipe(str(write_recipe("base"))))
    expected = last_eval(tmp_path / "runs" / "base")
    for length in (128, 256):
        options = EvaluationOptions(sequence_length=length, generate=0, select=0)
        alone = World(0, 1, 0, 1, torch.device("cpu"), "none")
        found = evaluate_fully(tmp_path / "runs" / "base", options, alone).summary
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["loss_tokens"] == expected["loss_tokens"]


def test_a_full_disk_stops_no_training_and_leaves_the_old_checkpoint_whole(write_recipe, tmp_path: Path) -> None:
    """The limit on file sizes stands for the disk: weights fit, the optimizer's moments of the second checkpoint do not."""
    recipe = write_recipe("full", checkpoint={"every_steps": 2}, train={"steps": 6})
    run = tmp_path / "runs" / "full"
    train(load_recipe(str(recipe), ["train.steps=2"]))
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); "
        "from chatmill.trainer.train import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(recipe), "run.name=limited"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    limited = tmp_path / "runs" / "limited"
    assert done.returncode == 2
    assert "could not be written" in done.stderr
    assert len(losses(limited)) == 6, "training went on to its end"
    assert [e["event"] for e in read_jsonl(limited / "events.jsonl")].count("checkpoint_failed") >= 3
    assert list_checkpoints(limited) == []
    assert not list((limited / "checkpoints").iterdir()), "nothing half-written is left"
    assert open_checkpoint(run).meta["step"] == 2


def test_a_signal_during_validation_is_heard_there(write_recipe, tmp_path: Path) -> None:
    recipe = write_recipe("early", evaluation={"at_start": True})
    overrides = ["evaluation.micro_batch=1", "data.sequence_length=128"]
    process = start(recipe, 1, *overrides, launcher="python")
    run = tmp_path / "runs" / "early"
    deadline = time.monotonic() + 300
    while not (run / "events.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "the same command continues" in out
    train(load_recipe(str(recipe), overrides))
    assert len(losses(run)) == 8
    assert "eval" in list(read_jsonl(run / "metrics.jsonl"))[-1]


def test_a_run_killed_in_its_last_validation_still_gives_it(write_recipe, tmp_path: Path) -> None:
    recipe = write_recipe("late", checkpoint={"every_steps": 8})
    train(load_recipe(str(recipe)))
    run = tmp_path / "runs" / "late"
    expected = last_eval(run)
    for name, word in (("metrics.jsonl", '"eval"'), ("events.jsonl", '"finished"')):
        lines = [line for line in (run / name).read_text().splitlines() if word not in line]
        (run / name).write_text("".join(line + "\n" for line in lines))
    train(load_recipe(str(recipe)))
    assert last_eval(run) == pytest.approx(expected)
