"""Runs that train an adapter: what their checkpoints hold, how they continue, and who reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from chatmill.config import ConfigError
from chatmill.launcher.__main__ import main as chatmill
from chatmill.run_files import list_checkpoints
from chatmill.trainer.chat.chat_model import load_chat_model
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from chatmill.trainer.config import load_recipe
from chatmill.trainer.loop.loop import train

from ..conftest import cut_back
from .conftest import write_base


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found = open_checkpoint(path)
    return {name: found.tensor(name) for name in found.index}


def test_a_run_that_was_cut_continues_bit_for_bit_and_every_command_reads_it(
    write_adapter_recipe: Any, base: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_adapter_recipe("cut", model={"base_precision": "nf4"}, evaluation={"prompts": ["Where is the red cat?"]})
    recipe = load_recipe(str(path))
    train(recipe)
    last = list_checkpoints(recipe.run_dir)[-1]
    whole = tensors(last)
    held = {name for name in whole if open_checkpoint(last).index[name].group == "model"}
    assert held and {name.rpartition(".")[2] for name in held} == {"lora_a", "lora_b", "initial_a", "initial_b"}
    cut_back(recipe.run_dir, 3)
    capsys.readouterr()
    train(recipe)
    said = capsys.readouterr().out
    assert "trained" in said and "frozen" in said and "nf4" in said
    again = tensors(last)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)

    merged = tmp_path / "merged"
    assert chatmill(["merge", str(recipe.run_dir), str(merged)]) == 0
    ours = dict(load_chat_model(recipe.run_dir).model.named_parameters())
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors(merged).items())
    for words in (
        ["checkpoint", "ls", str(recipe.run_dir)],
        ["checkpoint", "verify", str(recipe.run_dir)],
        ["generate", str(recipe.run_dir), "Where is the red cat?", "--max-new-tokens", "4"],
        ["eval", str(recipe.run_dir), "--max-dialogues", "2", "--max-new-tokens", "4"],
        ["report", str(recipe.run_dir)],
    ):
        assert chatmill(words) == 0, words
    capsys.readouterr()
    first = list_checkpoints(recipe.run_dir)[0]
    assert chatmill(["checkpoint", "diff", str(last), str(last)]) == 0
    assert chatmill(["checkpoint", "diff", str(first), str(last), "--limit", "999"]) == 1
    told = capsys.readouterr().out
    assert f"all {len(whole)} tensors are equal bit for bit" in told
    assert "layers.0.attention.q.lora_b " in told and "initial_a" not in told, "where PiSSA began stays"
    assert chatmill(["plan", str(path)]) == 0
    assert "single fits" in capsys.readouterr().out


def test_another_base_is_refused_by_name(write_adapter_recipe: Any, base: Checkpoint, tiny_data: Path, tmp_path: Path) -> None:
    own = write_base(tmp_path / "own", tiny_data)
    path = write_adapter_recipe("moved")
    path.write_text(path.read_text().replace(str(base.path), str(own)))
    recipe = load_recipe(str(path))
    train(recipe)
    shutil.rmtree(own)
    with pytest.raises(CheckpointError, match="its base cannot be opened"):
        load_chat_model(recipe.run_dir)
    write_base(own, tiny_data, seed=1)
    with pytest.raises(CheckpointError, match="is not the base of the adapter"):
        load_chat_model(recipe.run_dir)
    cut_back(recipe.run_dir, 3)
    with pytest.raises(CheckpointError, match="is not the base of the adapter"):
        train(recipe)


def test_a_run_does_not_change_its_adapter_on_the_way(write_adapter_recipe: Any) -> None:
    recipe = load_recipe(str(write_adapter_recipe("same", train={"steps": 1, "accumulation": 1})))
    train(recipe)
    for change, named in (({"rank": 8}, "adapter.rank"), (None, "adapter")):
        update = None if change is None else recipe.adapter.model_copy(update=change)  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match=named):
            train(recipe.model_copy(update={"adapter": update}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.freeze=[embed.weight]"], "adapter freezes"),
        (["model.checkpoint=null"], "needs the model"),
        (["model.base_precision=nf4", "parallel.strategy=zero2"], "DeepSpeed is not supported"),
        (["adapter.method=dora", "adapter.init=pissa"], "belongs to method=lora"),
        (["adapter=null", "model.base_precision=bf16"], "frozen weights"),
        (["adapter=null", "train.freeze=[embed.weight]", "model.base_precision=int8"], "needs an adapter"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(words: list[str], message: str, write_adapter_recipe: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(write_adapter_recipe("odd", adapter={"rank": 4})), words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter.targets=[qq]"], "no module is called 'qq'"),
        (["adapter.train=[x.*]"], "no parameter name matches"),
        (["adapter.targets=[head]", "adapter.train=[head.weight]"], "is in adapter.targets and in adapter.train"),
        (["adapter.targets=[embed]", "adapter.method=dora"], "plain LoRA only"),
        (["adapter=null", "train.freeze=['*']"], "nothing would be trained"),
    ],
)
def test_names_that_cannot_be_adapted_are_refused_before_training(
    words: list[str], message: str, write_adapter_recipe: Any
) -> None:
    recipe = load_recipe(str(write_adapter_recipe("odd", adapter={"rank": 4})), words)
    with pytest.raises(ConfigError, match=message):
        train(recipe)


def test_frozen_weights_stay_and_the_checkpoint_is_whole(write_adapter_recipe: Any, base: Checkpoint) -> None:
    recipe = load_recipe(
        str(write_adapter_recipe("freeze", adapter=None)), ["train.freeze=['embed.weight','layers.0.*']", "train.ema=0.9"]
    )
    train(recipe)
    found = open_checkpoint(recipe.run_dir)
    found.check_model()
    for name in base.names():
        same = torch.equal(found.tensor(name), base.tensor(name))
        assert same == (name == "embed.weight" or name.startswith("layers.0.")), name
    assert json.loads((recipe.run_dir / "environment.json").read_text())["frozen"]["tensors"] == 10
