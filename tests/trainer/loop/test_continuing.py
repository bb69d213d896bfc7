"""What a user does to a run between two attempts: Ctrl-C, moved data, another recipe."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from chatmill.config import ConfigError
from chatmill.launcher.jobs.resolve import model_shape, resolve
from chatmill.run_files import MANIFEST, PREEMPTED, read_jsonl
from chatmill.trainer.checkpoint.checkpoint import CheckpointWriter, open_checkpoint
from chatmill.trainer.config import Recipe, load_recipe
from chatmill.trainer.loop.loop import train
from chatmill.trainer.model.decoder import Decoder
from chatmill.trainer.run.folder import RunFolder
from chatmill.trainer.train import _save_on_interrupt, main

from ..conftest import cut_back
from ..ranks import train_in_ranks


def test_the_first_interrupt_is_a_request_to_save_and_the_second_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[int] = []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with _save_on_interrupt(), pytest.raises(KeyboardInterrupt):  # nothing runs yet that could be saved
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        with _save_on_interrupt():
            signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
            signal.raise_signal(signal.SIGINT)
            os.getpid()  # the second signal is handled before this returns
            assert heard == [signal.SIGTERM] and "press again to stop at once" in capsys.readouterr().err
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


@pytest.mark.parametrize(
    ("finished", "supervised", "code"),
    [(False, False, 130), (True, False, 0), (False, True, 0)],
    ids=["alone", "done", "supervised"],
)
def test_ctrl_c_ends_with_a_code_that_stops_what_follows(
    finished: bool, supervised: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(recipe: Recipe) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.raise_signal(signal.SIGINT)
        if not finished:
            recipe.run_dir.mkdir(parents=True)
            (recipe.run_dir / PREEMPTED).write_text("SIGTERM at step 3")

    monkeypatch.setattr("chatmill.trainer.train.train", interrupted)
    monkeypatch.delenv("RANK", raising=False)
    if supervised:
        monkeypatch.setenv("CHATMILL_LOGS", str(tmp_path))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert main(["tiny", f"run.dir={tmp_path}"]) == code
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def recipe(data: Path, *more: str) -> Recipe:
    """`tiny` on this data set."""
    return load_recipe("tiny", [f"data.path={data}", *more])


def checkpoint(run: RunFolder, step: int) -> None:
    """A checkpoint in name only."""
    folder = run.path / f"checkpoints/step-{step:08d}"
    folder.mkdir()
    (folder / MANIFEST).touch()


def test_a_moved_data_set_is_no_other_recipe_while_a_checkpoint_can_tell(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    run = RunFolder(tmp_path / "run")
    run.create(recipe(old), {})
    run.check_same(recipe(old))
    with pytest.raises(ConfigError, match=r"data\.path"):
        run.check_same(recipe(new))  # the old one is still there: this is another one
    old.rmdir()
    with pytest.raises(ConfigError, match=r"data\.path"):
        run.check_same(recipe(new))  # no checkpoint that knows the data
    checkpoint(run, 100)
    run.check_same(recipe(new))
    with pytest.raises(ConfigError, match=r"train.seed: \d+ -> 9\nContinue it as it was: chatmill train .*run/config.yaml"):
        run.check_same(recipe(new, "train.seed=9"))


@pytest.mark.parametrize(
    ("schedule", "steps", "allowed"),
    [
        (["schedule.name=constant"], 900, True),
        (["schedule.name=inverse_sqrt", "schedule.warmup_steps=10"], 900, True),
        (["schedule.name=wsd", "schedule.decay_fraction=0.5"], 900, True),  # step 100 of 300 is in its stable part
        (["schedule.name=wsd", "schedule.decay_fraction=0.9"], 900, False),
        (["schedule.name=cosine"], 900, False),
        (["schedule.name=constant"], 90, False),  # more is done already
        (["schedule.unit=tokens", "schedule.warmup_steps=0", "schedule.total_tokens=100000"], 900, True),
    ],
)
def test_steps_may_change_where_those_done_keep_their_learning_rates(
    tmp_path: Path, schedule: list[str], steps: int, allowed: bool
) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(recipe(tmp_path, *schedule), {})
    checkpoint(run, 100)
    longer = recipe(tmp_path, *schedule, f"train.steps={steps}")
    if allowed:
        run.check_same(longer)
    else:
        with pytest.raises(ConfigError, match=f"train.steps: 300 -> {steps}"):
            run.check_same(longer)


HOLDER = """
import sys, time
from pathlib import Path
from chatmill.trainer.model.decoder import Decoder
from chatmill.trainer.run.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
assert folder.claim()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_training_in_one_folder_is_refused_until_the_first_is_gone(
    write_recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatmill.trainer.run.folder.CLAIM_WAIT_S", 0.0)
    file = write_recipe("twice")
    folder = load_recipe(str(file)).run_dir
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    saving = folder / "checkpoints" / ".step-00000002.writing-shared"  # by the first one, just now
    saving.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, env=environment) as first:
        try:
            assert first.stdout and first.stdout.readline() == b"held\n"
            assert main([str(file)]) == 2
            assert f"{folder}: another training is running in it" in capsys.readouterr().err
            assert saving.is_dir() and not (folder / "config.yaml").exists()
        finally:
            first.kill()
    assert main([str(file)]) == 0
    assert not saving.exists() and (folder / "config.yaml").is_file()


SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "context")


def from_base(write_recipe, name: str, base: Path, **sections: Any) -> Path:
    """A recipe that starts from a checkpoint, with no shape of its own."""
    path = Path(write_recipe(name, **sections))
    fields = yaml.safe_load(path.read_text())
    fields["model"] = {"checkpoint": str(base)}
    path.write_text(yaml.safe_dump(fields))
    return path


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("gone", ["deleted", "moved", "shortened"])
def test_a_run_continues_without_the_checkpoint_that_it_started_from(write_recipe, tmp_path: Path, gone: str) -> None:
    """Its own checkpoint has the weights, the shape and the tokenizer; the base may be gone by the time a job is requeued."""
    train(load_recipe(str(write_recipe("base", train={"steps": 2}))))
    base, run = tmp_path / "runs" / "base", tmp_path / "runs" / "tuned"
    recipe = str(from_base(write_recipe, "tuned", base, train={"steps": 4}, checkpoint={"every_steps": 2}))
    train(load_recipe(recipe))
    whole, weights = losses(run), dict(open_checkpoint(run).tensors())
    cut_back(run, 2)
    words = []
    if gone == "deleted":
        shutil.rmtree(base)
    elif gone == "moved":
        base.rename(tmp_path / "elsewhere")
        words = [f"model.checkpoint={tmp_path / 'elsewhere'}"]
    else:
        next(base.glob("checkpoints/*/model-*.safetensors")).write_bytes(b"")
    prepared = resolve(recipe, words, 1).recipe
    assert model_shape(prepared) == open_checkpoint(run).config  # `chatmill launch` and `plan` know it too
    assert train(load_recipe(recipe, words)) == 4
    assert losses(run) == whole and [m["step"] for m in open_checkpoint(run).meta["lineage"]] == [2, 2]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in open_checkpoint(run).tensors())


def test_another_base_is_another_recipe_even_when_the_first_is_gone(write_recipe, tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("other", 1)):
        train(load_recipe(str(write_recipe(name, train={"steps": 1, "seed": seed}))))
    base = tmp_path / "runs" / "base"
    recipe = str(from_base(write_recipe, "tuned", base, train={"steps": 2}, checkpoint={"every_steps": 1}))
    train(load_recipe(recipe))
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match=r"model\.checkpoint: .*base' -> .*other'"):
        train(load_recipe(recipe, [f"model.checkpoint={tmp_path / 'runs' / 'other'}"]))
    shutil.rmtree(tmp_path / "runs" / "tuned" / "checkpoints")
    with pytest.raises(ConfigError, match="base is not a checkpoint: no such folder"):
        train(load_recipe(recipe))  # nothing to continue from: here it is needed


def test_a_base_with_not_a_number_in_it_is_named_before_the_first_step(write_recipe, tmp_path: Path) -> None:
    shape = load_recipe(str(write_recipe("shape"))).model.shape()
    model = Decoder(shape)
    model.init_weights(0)
    with CheckpointWriter(tmp_path / "bad", shape) as writer:
        for name, tensor in model.named_parameters():
            writer.add(name, tensor.detach().masked_fill(tensor.detach() > 0.05, math.nan) if "1.mlp.up" in name else tensor)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up\.weight holds NaN or infinite values"):
        train(load_recipe(str(from_base(write_recipe, "tuned", tmp_path / "bad"))))
    assert not (tmp_path / "runs" / "tuned" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_engines_continue_without_its_base(write_recipe, tmp_path: Path, strategy: str) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    train(load_recipe(str(write_recipe("base", train={"steps": 1}))))
    base, run = tmp_path / "runs" / "base", tmp_path / "runs" / "tuned"
    more: dict[str, Any] = {"train": {"steps": 3, "accumulation": 2}, "checkpoint": {"every_steps": 1, "keep": 3}}
    recipe = from_base(write_recipe, "tuned", base, parallel={"strategy": strategy}, **more)
    train_in_ranks(recipe, 2)
    whole = losses(run)
    cut_back(run, 2)
    shutil.rmtree(base)
    train_in_ranks(recipe, 2)
    assert losses(run) == whole
