"""A base model becomes a chat model: the data recipe chooses the template and adds its tokens; run and exports follow."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from chatmill.config import ConfigError
from chatmill.data.pipeline.inputs import template_tokenizer
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe
from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.tokenizer.template import TEMPLATES
from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.launcher.__main__ import main as chatmill
from chatmill.launcher.jobs.resolve import model_shape
from chatmill.run_files import list_checkpoints, read_jsonl
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from chatmill.trainer.config import Recipe, load_recipe
from chatmill.trainer.convert.gguf.exporting import export_gguf
from chatmill.trainer.convert.gguf.importing import import_gguf
from chatmill.trainer.convert.hf import export_hf, import_hf
from chatmill.trainer.loop.dpo import REFERENCE, load_reference
from chatmill.trainer.loop.loop import train
from chatmill.trainer.loop.starting import choose_shape

from ..checkpoint.test_vocabulary import base_model
from ..conftest import make_chats

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "context": 256}
CHATML = {"template": "chatml", "add_special_tokens": ["<|im_start|>", "<|im_end|>"]}


def build(folder: Path, tokenizer: dict[str, Any], **sections: Any) -> Path:
    """A data set of 40 chats, or of what the sections name."""
    folder.mkdir(parents=True)
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in make_chats(40)), encoding="utf-8")
    recipe = {
        "name": "tiny",
        "out": str(folder / "data"),
        "sources": [{"format": "openai", "path": str(folder / "chats.jsonl")}],
        "split": {"validation": 0.2},
        "workers": 1,
        "tokenizer": tokenizer,
    }
    build_dataset(DataRecipe.model_validate(recipe | sections))
    return folder / "data"


@pytest.fixture
def recipe_for(write_recipe) -> Callable[..., Recipe]:
    """A short training from a checkpoint; the shape is the checkpoint's."""

    def make(name: str, base: Path, data: Path, more: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        train = {"steps": 2, "accumulation": 1, "ema": 0.9}
        path = write_recipe(name, data={"path": str(data)} | (more or {}), train=train, **sections)
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": {"checkpoint": str(base)}}))
        return load_recipe(str(path))

    return make


@pytest.mark.parametrize(
    ("tied", "rows", "grown"), [(True, 300, 304), (False, 384, 384)], ids=["tied, grown", "untied, padded"]
)
def test_a_base_model_learns_a_template_with_new_tokens(
    tied: bool, rows: int, grown: int, recipe_for: Callable[..., Recipe], tmp_path: Path
) -> None:
    base = base_model(tmp_path / "base", rows, tied_embeddings=tied, **SHAPE)
    assert ChatTokenizer.load(base.path).template_source is None
    data = build(tmp_path / "chats", {"path": str(base.path), **CHATML})
    recipe = recipe_for("chat", base.path, data, checkpoint={"every_steps": 1, "keep": 9})
    train(recipe)
    tuned = open_checkpoint(tmp_path / "runs" / "chat")
    assert tuned.config.vocab_size == grown
    assert tuned.shape("embed.weight") == tuned.shape("embed.weight.exp_avg") == tuned.shape("ema.embed.weight") == (grown, 32)
    tokenizer = ChatTokenizer.load(tuned.path)
    assert tokenizer.template_source == TEMPLATES["chatml"] and tokenizer.stops == (301, 0)
    before, after = base.tensor("embed.weight"), tuned.tensor("embed.weight")
    mean = before[:300].mean(0)
    assert 0 < float((after[301] - mean).abs().max()) < 0.1  # two steps away from where it began
    assert float((after[:300] - before[:300]).abs().max()) < 0.1

    first = tmp_path / "runs" / "chat" / "checkpoints" / "step-00000001"
    wanted = {name: tuned.tensor(name).clone() for name in tuned.names()}
    for folder in list_checkpoints(tmp_path / "runs" / "chat"):
        if folder != first:
            shutil.rmtree(folder)
    shutil.move(base.path, tmp_path / "elsewhere")  # a run that continues has all that it needs
    train(recipe)
    again = open_checkpoint(tmp_path / "runs" / "chat")
    assert again.meta["step"] == 2 and all(torch.equal(again.tensor(name), tensor) for name, tensor in wanted.items())

    export_hf(again, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Where is the red cat number 7?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer.prompt_ids(messages)
    assert model.get_input_embeddings().weight.shape[0] == grown and model.generation_config.eos_token_id == [301, 0]
    back = import_hf(tmp_path / "out", tmp_path / "back")
    assert torch.equal(back.tensor("embed.weight"), again.tensor("embed.weight"))
    export_gguf(again, tmp_path / "m.gguf", dtype="fp32")
    gguf = import_gguf(tmp_path / "m.gguf", tmp_path / "from-gguf")
    assert torch.equal(gguf.tensor("embed.weight"), again.tensor("embed.weight"))
    assert ChatTokenizer.load(gguf.path).prompt_ids(messages) == ids and ChatTokenizer.load(gguf.path).stop_ids == {0, 301}


@pytest.mark.parametrize(("rows", "grown"), [(300, 304), (384, 384)], ids=["grown", "padded"])
def test_plan_and_launch_count_the_rows_of_new_tokens(
    rows: int, grown: int, recipe_for: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_model(tmp_path / "base", rows, tied_embeddings=False, **SHAPE)
    data = build(tmp_path / "chats", {"path": str(base.path), **CHATML})
    recipe = recipe_for("chat", base.path, data)
    trained = choose_shape(recipe, base, TokenDataset.open(data, "train"))
    assert trained.vocab_size == grown and model_shape(recipe) == trained
    capsys.readouterr()
    file = str(tmp_path / "chat.yaml")
    total = trained.parameter_counts()["total"]
    assert chatmill(["plan", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == total
    assert chatmill(["launch", file, "--dry-run"]) == 0
    assert capsys.readouterr().out.count(f"parameters  {total:,}") == 2  # of the launch and of its plan
    other = build(tmp_path / "others", {"train": {"vocab_size": 300}})
    assert chatmill(["plan", file, f"data.path={other}"]) == 2
    assert chatmill(["launch", file, "--dry-run", f"data.path={other}"]) == 2
    assert capsys.readouterr().err.count(f"{other} was tokenised with another tokenizer") == 2


def test_a_chat_model_takes_the_template_of_the_data(
    recipe_for: Callable[..., Recipe], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the template differs: nothing grows, and the run's checkpoints hold the data's."""
    base = base_model(tmp_path / "base", 300, **SHAPE)
    with_template = tmp_path / "instructed"
    copy(base, with_template, {"chat_template.jinja": b"{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"})
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATES["zephyr"].replace("eos_token", "'<|endoftext|>'"))
    data = build(tmp_path / "chats", {"path": str(with_template), "template": str(template)})
    train(recipe_for("chat", with_template, data))
    tuned = open_checkpoint(tmp_path / "runs" / "chat")
    assert ChatTokenizer.load(tuned.path).template_source == template.read_text()
    assert tuned.config.vocab_size == 300
    assert f"the chat template is that of {data}; {with_template} has another" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="tokenised with another tokenizer than that of"):
        train(recipe_for("other", with_template, tiny_data))
    with pytest.raises(ConfigError, match=r"evaluation\.data: .* different tokenizer_sha256"):
        train(recipe_for("third", with_template, data, evaluation={"data": [str(tiny_data)]}))


def copy(source: Checkpoint, folder: Path, files: dict[str, bytes]) -> None:
    """The checkpoint with other small files."""
    with CheckpointWriter(folder, source.config) as writer:
        for name, tensor in source.tensors():
            writer.add(name, tensor)
        for name, path in source.files().items():
            if name not in ("config.json", "manifest.json"):
                writer.add_file(name, path.read_bytes())
        for name, data in files.items():
            writer.add_file(name, data)


def test_preference_training_compares_with_the_same_new_rows(recipe_for: Callable[..., Recipe], tmp_path: Path) -> None:
    """The loss of the first step is log 2 only where policy and reference have the same weights."""
    base = base_model(tmp_path / "base", 300, **SHAPE)
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Is {i} even?", "chosen": f"{i} is even.", "rejected": f"I do not know {i}."} for i in range(0, 60, 2)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sections = {"sources": [{"format": "auto", "path": str(pairs)}], "pair": {"mode": "preference"}}
    data = build(tmp_path / "chats", {"path": str(base.path), **CHATML}, **sections)
    wide = {"sequence_length": 256, "overlong": "drop"}
    recipe = recipe_for("dpo", base.path, data, wide, objective="dpo", checkpoint={"every_steps": 1})
    train(recipe)
    run = tmp_path / "runs" / "dpo"
    losses = [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[1] != losses[0]
    reference, weights = load_reference(run / REFERENCE), open_checkpoint(run).tensor("embed.weight").clone()
    (run / REFERENCE).unlink()
    shutil.rmtree(list_checkpoints(run)[-1])
    train(recipe)  # goes on from step 1, and takes the reference from the base model again
    assert (load_reference(run / REFERENCE).values == reference.values).all()
    assert torch.equal(open_checkpoint(run).tensor("embed.weight"), weights)


def test_a_tokenizer_that_the_build_trains_gets_the_tokens_of_its_template() -> None:
    tokens = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    section = {"train": {"vocab_size": 300}, "template": "llama3", "add_special_tokens": tokens}
    recipe = DataRecipe.model_validate({"name": "x", "sources": [{"format": "openai", "path": "x"}], "tokenizer": section})
    tokenizer = template_tokenizer(recipe, None)
    assert tokenizer.token(tokenizer.stops[0]) == "<|eot_id|>" and set(tokens) <= set(tokenizer.special)
