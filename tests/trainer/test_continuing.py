"""What a user does to a run between two attempts: Ctrl-C, moved data, another recipe."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from chatmill.config import ConfigError
from chatmill.trainer.config import Recipe, load_recipe
from chatmill.trainer.run_folder import RunFolder
from chatmill.trainer.train import _save_on_interrupt


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
            assert heard == [signal.SIGTERM] and "once more ends at once" in capsys.readouterr().err
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def recipe(data: Path, *more: str) -> Recipe:
    """`tiny` on this data set."""
    return load_recipe("tiny", [f"data.path={data}", *more])


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
    (run.path / "checkpoints/step-00000001").mkdir()
    run.check_same(recipe(new))
    with pytest.raises(ConfigError, match=r"train.steps: 300 -> 400\nContinue it as it was: chatmill train .*run/config.yaml"):
        run.check_same(recipe(new, "train.steps=400"))
