"""Runs of models of transformers: imported, trained, continued, measured, asked and exported by the same commands as ours."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.trainer.backends import foreign_worker
from tests.trainer.backends.architectures import make_folder
from tests.trainer.backends.test_architectures import our_loss
from tests.trainer.ranks import run_in_ranks

from chatmill.config import ConfigError
from chatmill.run_files import read_jsonl
from chatmill.trainer.backends.choose import build_model
from chatmill.trainer.chat.chat_model import load_chat_model
from chatmill.trainer.checkpoint.checkpoint import open_checkpoint
from chatmill.trainer.config import load_recipe
from chatmill.trainer.convert.hf import export_hf, import_hf
from chatmill.trainer.convert.names import hf_tensors
from chatmill.trainer.generation.replies import reply_to
from chatmill.trainer.generation.sampling import Sampling
from chatmill.trainer.loop.loop import train
from chatmill.trainer.plan.hardware import find_gpu
from chatmill.trainer.plan.plan import make_plan, show


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="session")
def folders(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders of tiny models with the data set's tokenizer, by architecture."""
    root = tmp_path_factory.mktemp("foreign")
    made = {}
    for name in ("qwen3", "qwen3_moe", "deepseek_v3"):
        made[name] = root / name
        make_folder(name, made[name], vocab_size=384, max_position_embeddings=256)
        for file in (tiny_data / "tokenizer").iterdir():
            if file.is_file() and file.name != "config.json":
                shutil.copy(file, made[name] / file.name)
    return made


@pytest.fixture
def foreign_recipe(write_recipe):
    """foreign_recipe(name, checkpoint, **sections): a recipe that starts from a checkpoint."""

    def write(name: str, checkpoint: Path, **sections: dict) -> Path:
        path = write_recipe(name, model={"checkpoint": str(checkpoint)}, **sections)
        text = "".join(
            line + "\n"
            for line in path.read_text().splitlines()
            if not line.strip().startswith(
                ("vocab_size:", "hidden_size:", "intermediate_size:", "layers:", "heads:", "kv_heads:", "context:")
            )
        )
        path.write_text(text)
        return path

    return write


def test_our_decoder_and_transformers_train_qwen3_alike(folders, foreign_recipe, tmp_path: Path) -> None:
    found, gradients = {}, {}
    for impl in ("own", "transformers"):
        checkpoint = import_hf(folders["qwen3"], tmp_path / impl, impl=impl)  # type: ignore[arg-type]
        model = build_model(checkpoint.config)
        checkpoint.load_into(model)
        our_loss(model).backward()
        wanted = {ours[0]: theirs for theirs, ours in hf_tensors(checkpoint.config).items()} if impl == "own" else {}
        gradients[impl] = {wanted.get(name, name): parameter.grad for name, parameter in model.named_parameters()}
        recipe = load_recipe(str(foreign_recipe(f"run-{impl}", checkpoint.path)), [f"model.impl={impl}"])
        assert train(recipe) == 8
        found[impl] = losses(recipe.run_dir)
    for name, gradient in gradients["own"].items():  # of sums over 31 tokens
        torch.testing.assert_close(gradients["transformers"][name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.norm()))
    assert found["transformers"][0] == pytest.approx(found["own"][0], rel=1e-6)
    assert found["transformers"] == pytest.approx(found["own"], rel=1e-4)  # AdamW divides gradients near 0 by their size
    assert found["own"][-1] < 0.9 * found["own"][0]


def test_a_mixture_of_experts_trains_continues_answers_and_goes_back(folders, foreign_recipe, tmp_path: Path) -> None:
    checkpoint = import_hf(folders["qwen3_moe"], tmp_path / "moe")  # auto: no family of our decoder
    sections = {"evaluation": {"at_start": True, "prompts": ["Where?"], "max_new_tokens": 4}}
    whole, halved = (load_recipe(str(foreign_recipe(name, checkpoint.path, **sections))) for name in ("whole", "halved"))
    train(whole)
    shutil.copytree(whole.run_dir, halved.run_dir)
    shutil.rmtree(halved.run_dir / "checkpoints/step-00000008")
    for file in ("config.yaml", "metrics.jsonl"):
        text = (halved.run_dir / file).read_text()
        (halved.run_dir / file).write_text(text.replace("name: whole", "name: halved"))
    train(halved)
    assert losses(halved.run_dir) == losses(whole.run_dir)
    evaluations = [line["eval"]["loss"] for line in read_jsonl(whole.run_dir / "metrics.jsonl") if "eval" in line]
    assert evaluations[-1] < evaluations[0]

    lines = [line for line in read_jsonl(whole.run_dir / "metrics.jsonl") if "loss" in line]
    assert all(0 <= line["expert_load_min"] <= 1 <= line["expert_load_max"] <= 2 for line in lines)  # 2 of 4 experts per token
    assert all(1.9 < line["balance_loss"] < 4 for line in lines)

    # greedy text through the cache is transformers' own on the export
    chat = load_chat_model(whole.run_dir, "cpu")
    asked = [{"role": "user", "content": "Where is the red boat?"}]
    reply = reply_to(chat.model, chat.tokenizer, asked, max_new_tokens=12, sampling=Sampling(0.0))
    export_hf(open_checkpoint(whole.run_dir), tmp_path / "back")
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        told = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(told, skip_special_tokens=True) == reply.text


def test_a_checkpoint_of_one_implementation_is_refused_by_the_other(folders, foreign_recipe, tmp_path: Path) -> None:
    for impl, other in (("own", "transformers"), ("transformers", "own")):
        checkpoint = import_hf(folders["qwen3"], tmp_path / impl, impl=impl)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"(?s)model.impl={other}: .* is kept for .*again with --impl {other}"):
            train(load_recipe(str(foreign_recipe("refused", checkpoint.path)), [f"model.impl={other}"]))
    with pytest.raises(ConfigError, match=r"model\.impl=transformers trains a model that was imported"):
        load_recipe("tiny", ["model.impl=transformers"])


def test_what_is_no_text_model_of_transformers_is_refused(folders, tmp_path: Path) -> None:
    def refused(words: str, **changes: object) -> None:
        folder = tmp_path / "changed"
        shutil.copytree(folders["qwen3_moe"], folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=words):
            import_hf(folder, tmp_path / "out")
        shutil.rmtree(folder)
        assert not (tmp_path / "out").exists()

    refused("model_type 'strange' is no causal language model of transformers", model_type="strange")
    refused("brings code of its own", model_type="strange", auto_map={"AutoModelForCausalLM": "code.Model"})
    refused("a model for more than text", vision_config={})
    refused("the weights are quantised", quantization_config={"quant_method": "fp8"})
    refused("architectures is .*; expected Qwen3MoeForCausalLM", architectures=["Qwen3MoeForTokenClassification"])
    refused("missing tensors: model.layers.2", num_hidden_layers=3)
    refused("unexpected tensors: model.layers.1", num_hidden_layers=1)


def test_the_load_of_experts_is_what_transformers_routers_say(folders, tmp_path: Path) -> None:
    """Of a pack with padding, which is counted nowhere."""
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    checkpoint = import_hf(folders["qwen3_moe"], tmp_path / "moe")
    model = build_model(checkpoint.config).train()
    checkpoint.load_into(model)
    tokens = torch.cat((torch.arange(5, 45), torch.zeros(24, dtype=torch.long)))
    positions, edges = torch.cat([torch.arange(n) for n in (30, 10, 24)]), torch.tensor((0, 30, 40, 64), dtype=torch.int32)
    model.set_recompute("full")  # the second pass counts nothing
    model(tokens, positions, edges, targets=tokens.roll(-1), max_seqlen=30).loss_sum.backward()
    found = model.interval_figures(lambda values: values)
    assert model.interval_figures(lambda values: values) == {}

    theirs = AutoModelForCausalLM.from_pretrained(folders["qwen3_moe"])
    with torch.no_grad():
        parts = [theirs(input_ids=tokens[None, a:b], output_router_logits=True) for a, b in ((0, 30), (30, 40))]
    logits = tuple(torch.cat(layer) for layer in zip(*(part.router_logits for part in parts), strict=True))
    assert found["balance_loss"] == pytest.approx(float(load_balancing_loss_func(logits, 4, 2)), rel=1e-5)
    counts = torch.stack([torch.bincount(layer.topk(2).indices.flatten(), minlength=4) for layer in logits]).double()
    assert found["expert_load_max"] == pytest.approx(float(counts.max()) / 20)
    assert found["expert_load_min"] == pytest.approx(float(counts.min()) / 20)
    assert found["experts_idle"] == float((counts == 0).sum())


def test_a_plan_counts_the_experts_that_a_token_takes(folders, foreign_recipe, tmp_path: Path) -> None:
    checkpoint = import_hf(folders["qwen3_moe"], tmp_path / "moe")
    config, counts = checkpoint.config, checkpoint.config.parameter_counts()
    assert counts["experts"] == 2 * 4 * 3 * 16 * 32  # layers, experts, matrices
    assert config.active_parameters() == counts["total"] - counts["experts"] // 2
    per_token = counts["attention"] + counts["mlp"] + counts["experts"] // 2 + counts["head"]
    assert config.flops_per_token(10) == 6 * per_token + 6 * 2 * 4 * 8 * 10
    recipe = load_recipe(str(foreign_recipe("plan", checkpoint.path)))
    plan = make_plan(recipe, config, find_gpu("h100"), 1, engines=["single"])
    assert plan.work.flops_per_token == config.flops_per_token(128)
    assert f"{config.active_parameters():,} active" in show(plan)
    assert all(fit.memory.activations > 0 for fit in plan.fits)


@pytest.mark.slow
def test_engines_of_two_processes_equal_one(folders, tiny_data: Path, tmp_path: Path) -> None:
    """A dense model, and experts whose router has a bias that is not trained (deepseek_v3)."""
    checkpoints = []
    for name in ("qwen3", "deepseek_v3"):
        import_hf(folders[name], tmp_path / name, impl="transformers")
        checkpoints.append(str(tmp_path / name))
    engines: list[tuple[str, dict]] = [("ddp", {}), ("fsdp2", {"activation_checkpointing": "full"})]
    if importlib.util.find_spec("deepspeed") is not None:
        engines += [("zero3", {"activation_checkpointing": "selective"})]
    text = run_in_ranks(foreign_worker.run, 2, (str(tiny_data), tuple(checkpoints), tuple(engines)), tmp_path)
    assert text.count("passed") == 2 * len(engines) * len(checkpoints), text
