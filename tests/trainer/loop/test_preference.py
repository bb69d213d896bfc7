"""DPO on the ordinary trainer is DPO: against plain PyTorch on the same pairs, over whole runs, and refused where it is not."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from chatmill.config import ConfigError
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe
from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.stream import PackedBatch, PackedStream
from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.run_files import list_checkpoints, read_jsonl
from chatmill.trainer.checkpoint.checkpoint import open_checkpoint
from chatmill.trainer.config import KernelSection, ModelConfig, PreferenceSection, load_recipe
from chatmill.trainer.distributed.world import World
from chatmill.trainer.evaluation.held_out import read_held_out
from chatmill.trainer.loop.dpo import REFERENCE, PairObjective, ScoreObjective, reference_pass, take_reference
from chatmill.trainer.loop.loop import train
from chatmill.trainer.model.decoder import Decoder, LossOutput

from ..conftest import ADJECTIVES, NOUNS, cut_back
from ..ranks import train_in_ranks

ALONE = World(0, 1, 0, 1, torch.device("cpu"), "none")


def pairs(count: int) -> list[dict[str, str]]:
    """The better reply names the thing asked for, the worse one is rude and of another length."""
    rng = random.Random(0)
    out = []
    for n in range(count):
        adjective, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
        rude = " ".join(["Find", "it", "yourself"] * rng.randint(1, 3))
        question = f"Where is the {adjective} {noun} number {n}?"
        out.append({"prompt": question, "chosen": f"The {adjective} {noun} number {n} is here.", "rejected": rude})
    return out


@pytest.fixture(scope="session")
def pair_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs(160)), encoding="utf-8")
    recipe = {
        "name": "pairs",
        "sources": [{"path": str(folder / "pairs.jsonl")}],
        "pair": {"mode": "preference"},
        "split": {"validation": 0.2},
        "tokenizer": {"path": str(tiny_data / "tokenizer")},
        "shards": {"block_dialogues": 16},
        "workers": 1,
    }
    build_dataset(DataRecipe.model_validate(recipe), folder / "data")
    return folder / "data"


@pytest.fixture
def write_dpo(write_recipe, pair_data: Path, tmp_path: Path):
    """A supervised run first, then write(name, **sections) -> recipe that goes on from it with DPO."""
    train(load_recipe(str(write_recipe("base", train={"steps": 4}, checkpoint={"every_steps": 4}))))

    def write(name: str, **sections: Any) -> Path:
        defaults: dict[str, Any] = {
            "objective": "dpo",
            "data": {"path": str(pair_data), "sequence_length": 256, "overlong": "drop"},
            "model": {"checkpoint": str(tmp_path / "runs" / "base")},
            "optimizer": {"lr": 2e-3},
            "train": {"steps": 8, "accumulation": 2},
            "evaluation": {"at_start": True},
        }
        text = Path(write_recipe(name, **{**defaults, **sections})).read_text()
        path = tmp_path / f"{name}.yaml"
        shape = ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "context")
        path.write_text("\n".join(line for line in text.splitlines() if line.split(":")[0].strip() not in shape) + "\n")
        return path

    return write


def lines(run: Path, key: str) -> list[Any]:
    return [line[key] for line in read_jsonl(run / "metrics.jsonl") if key in line]


def small_model(seed: int) -> Decoder:
    shape = ModelConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2, context=256, norm_eps=1e-6
    )
    model = Decoder(shape, KernelSection(attention="torch", cross_entropy="torch", elementwise="reference"))
    model.init_weights(seed)
    return model.double()


def plain_log_probability(model: Decoder, tokenizer: ChatTokenizer, question: str, reply: str) -> torch.Tensor:
    """Of the reply and its end-of-turn token, one sequence by itself, from all logits."""
    prompt = tokenizer.prompt_ids([{"role": "user", "content": question}])
    ids = [*prompt, *tokenizer.encode(reply)]
    ids += [next(i for i in tokenizer.stop_ids if tokenizer.decode([i]) == "<|im_end|>")]
    tokens = torch.tensor(ids)
    logits = model(tokens, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32))
    log_p = torch.log_softmax(logits.double(), -1)[:-1].gather(1, tokens[1:, None]).squeeze(1)
    return log_p[len(prompt) - 1 :]


def forward(model: Decoder, objective: Any, batch: PackedBatch) -> LossOutput:
    out: LossOutput = model(
        batch.tokens,
        batch.positions,
        batch.cu_seqlens,
        targets=batch.targets,
        rows=batch.rows,
        max_seqlen=batch.max_seqlen,
        objective=objective(batch),
    )
    return out


@pytest.mark.parametrize("options", [{}, {"length_normalised": True, "beta": 2.0}, {"label_smoothing": 0.1}])
def test_loss_and_gradients_are_those_of_dpo_in_plain_pytorch(pair_data: Path, options: dict[str, Any]) -> None:
    section = PreferenceSection(**options)
    policy, reference = small_model(1), small_model(2)
    tokenizer = ChatTokenizer.load(pair_data / "tokenizer")
    dataset = TokenDataset.open(pair_data, "train")

    def stream() -> PackedStream:
        return PackedStream(dataset, sequence_length=256, micro_batch=2, overlong="drop", epochs=1, max_dialogues=12)

    scores: list[torch.Tensor] = []
    taken = take_reference(lambda b: forward(reference, ScoreObjective(scores), b), scores, [stream()], ALONE)
    objective = PairObjective(taken, section)
    texts = {item["prompt"]: item for item in pairs(160)}
    expected, seen, hits = torch.zeros((), dtype=torch.float64), 0, 0
    loss = torch.zeros((), dtype=torch.float64)
    correct = 0
    for batch in stream():
        out = forward(policy, objective, batch)
        loss = loss + out.loss_sum
        correct += int(out.correct)
        starts = batch.cu_seqlens.tolist()
        assert batch.pairs is not None and len(batch.pairs) == len(batch.uids) == int(out.count)
        for chosen, _ in batch.pairs.tolist():
            said = tokenizer.decode(batch.tokens[starts[chosen] : starts[chosen + 1]].tolist())
            item = next(item for prompt, item in texts.items() if prompt in said)
            rewards = []
            for reply in (item["chosen"], item["rejected"]):
                ours = plain_log_probability(policy, tokenizer, item["prompt"], reply)
                with torch.no_grad():
                    theirs = plain_log_probability(reference, tokenizer, item["prompt"], reply)
                ratio = ours.sum() - theirs.sum()
                rewards.append(section.beta * (ratio / len(ours) if section.length_normalised else ratio))
            margin, s = rewards[0] - rewards[1], section.label_smoothing
            expected = expected - (1 - s) * torch.sigmoid(margin).log() - s * torch.sigmoid(-margin).log()
            hits += int(margin > 0)
            seen += 1
    assert seen == 12 and correct == hits
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the reference is kept in fp32 on the device
    ours, theirs = (torch.autograd.grad(value, list(policy.parameters())) for value in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)  # plain logits are rounded to fp32


def test_a_run_learns_to_prefer_and_starts_at_log_two(write_dpo, tmp_path: Path) -> None:
    assert train(load_recipe(str(write_dpo("dpo")))) == 8
    evaluations = lines(tmp_path / "runs" / "dpo", "eval")
    assert evaluations[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy still is the reference
    assert "perplexity" not in evaluations[0] and evaluations[0]["pairs"] > 10
    assert evaluations[-1]["loss"] < 0.5 and evaluations[-1]["accuracy"] > 0.9
    assert lines(tmp_path / "runs" / "dpo", "accuracy")[-1] > 0.9


def test_a_resumed_run_keeps_its_reference_and_its_numbers(write_dpo, tmp_path: Path) -> None:
    path = str(write_dpo("whole"))
    train(load_recipe(path))
    run = tmp_path / "runs" / "whole"
    before, taken = lines(run, "loss"), (run / REFERENCE).read_bytes()
    weights = dict(open_checkpoint(run).tensors())
    cut_back(run, 4)
    (run / REFERENCE).unlink()  # even then: the reference comes from the starting checkpoint, not from the one of step 4
    train(load_recipe(path))
    assert (run / REFERENCE).read_bytes() == taken
    assert lines(run, "loss") == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in open_checkpoint(run).tensors())
    assert list_checkpoints(run)


def test_a_resumed_run_needs_its_base_only_where_its_reference_is_lost(write_dpo, tmp_path: Path) -> None:
    path = str(write_dpo("whole", train={"steps": 4, "accumulation": 2}, checkpoint={"every_steps": 2}))
    train(load_recipe(path))
    base, run = tmp_path / "runs" / "base", tmp_path / "runs" / "whole"
    before = lines(run, "loss")
    base.rename(tmp_path / "away")
    cut_back(run, 2)
    train(load_recipe(path))
    assert lines(run, "loss") == before
    cut_back(run, 2)
    (run / REFERENCE).unlink()
    with pytest.raises(ConfigError, match=r"reference.npz is missing(.|\n)*base is not a checkpoint: no such folder"):
        train(load_recipe(path))
    (run / "checkpoints" / "step-00000002").rename(tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", base)  # another checkpoint where the base was: its log-probabilities would be wrong
    (tmp_path / "kept").rename(run / "checkpoints" / "step-00000002")
    with pytest.raises(ConfigError, match="base is not the checkpoint that the run started from"):
        train(load_recipe(path))


def test_an_adapter_is_compared_with_its_base_and_not_with_itself(write_dpo, tmp_path: Path, monkeypatch: Any) -> None:
    """The reference is the adapter switched off: as good as a pass over all pairs before the first step, which it replaces."""
    sections: dict[str, Any] = {"adapter": {"rank": 4, "init": "pissa"}, "train": {"steps": 6, "accumulation": 2}}
    train(load_recipe(str(write_dpo("off", **sections))))
    run = tmp_path / "runs" / "off"
    assert not (run / REFERENCE).exists()
    assert lines(run, "eval")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    real = PairObjective

    def stored(engine: Any, options: PreferenceSection) -> PairObjective:
        scores: list[torch.Tensor] = []
        engine.objective = ScoreObjective(scores)
        engine.model.eval()
        recipe = engine.recipe
        passes = [
            reference_pass(recipe, TokenDataset.open(recipe.data.path, split), ALONE) for split in ("train", "validation")
        ]
        return real(take_reference(engine.forward, scores, passes, ALONE), options)

    monkeypatch.setattr("chatmill.trainer.loop.dpo.AdapterObjective", stored)
    train(load_recipe(str(write_dpo("stored", **sections))))
    assert lines(run, "loss") == pytest.approx(lines(tmp_path / "runs" / "stored", "loss"), rel=2e-5)
    assert lines(run, "loss")[-1] < 0.6


@pytest.mark.slow
def test_sharded_ranks_follow_one_process(write_dpo, tmp_path: Path) -> None:
    train(load_recipe(str(write_dpo("alone", train={"steps": 3, "accumulation": 2}))))
    train_in_ranks(write_dpo("two", train={"steps": 3, "accumulation": 1}, parallel={"strategy": "fsdp2"}), 2)
    alone, two = (lines(tmp_path / "runs" / name, "loss") for name in ("alone", "two"))
    assert len(two) == 3
    assert two == pytest.approx(alone, rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategies", [("ddp", "fsdp2"), pytest.param(("zero2", "zero3"), marks=pytest.mark.exhaustive)])
def test_two_processes_with_an_adapter_follow_one(strategies: tuple[str, ...], write_dpo, tmp_path: Path) -> None:
    """Loss and final adapter; the reference is the adapter switched off, in the wrapped model."""
    sections: dict[str, Any] = {"adapter": {"rank": 4, "method": "dora", "dropout": 0.0}, "evaluation": {"at_end": False}}
    train(load_recipe(str(write_dpo("alone", train={"steps": 3, "accumulation": 2}, **sections))))
    wanted, weights = lines(tmp_path / "runs" / "alone", "loss"), dict(open_checkpoint(tmp_path / "runs" / "alone").tensors())
    path = write_dpo("several", train={"steps": 3, "accumulation": 1}, **sections)
    for strategy in strategies:
        if strategy.startswith("zero"):
            pytest.importorskip("deepspeed")
        train_in_ranks(path, 2, f"parallel.strategy={strategy}", f"run.name={strategy}")
        run = tmp_path / "runs" / strategy
        assert lines(run, "loss") == pytest.approx(wanted, rel=2e-5), strategy
        found = dict(open_checkpoint(run).tensors())
        assert found.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-4, msg=f"{strategy} {name}")


def test_an_evaluation_reads_the_chosen_replies_of_a_set_of_pairs(pair_data: Path) -> None:
    tokenizer = ChatTokenizer.load(pair_data / "tokenizer")
    found = read_held_out([pair_data], tokenizer, split="train", limit=500)
    raw = {record["prompt"]: record for record in pairs(160)}
    for dialogue in found:
        prompt, chosen = (turn.content for turn in dialogue.conversation.turns[-2:])
        assert chosen == raw[prompt]["chosen"] and dialogue.text_bytes == len(chosen)
        assert tokenizer.decode(dialogue.reply_ids(dialogue.replies()[-1]), skip_special=True).strip() == chosen
        assert raw[prompt]["rejected"] not in tokenizer.decode(dialogue.ids)
    assert len(found) > 10


def test_pairs_are_refused_for_likelihood_and_dialogues_for_dpo(
    write_dpo, write_recipe, pair_data, tiny_data, tmp_path
) -> None:
    with pytest.raises(ConfigError, match="would train on the rejected replies"):
        train(load_recipe(str(write_recipe("wrong", data={"path": str(pair_data), "overlong": "drop"}))))
    with pytest.raises(ConfigError, match="holds ordinary dialogues"):
        train(load_recipe(str(write_dpo("other", data={"path": str(tiny_data), "sequence_length": 128, "overlong": "drop"}))))
    with pytest.raises(ConfigError, match=r"set model\.checkpoint"):
        load_recipe(str(write_recipe("none", objective="dpo", data={"overlong": "drop"})))
    with pytest.raises(ConfigError, match=r"data\.overlong=drop"):
        load_recipe(str(write_dpo("cut", data={"path": str(pair_data), "overlong": "truncate"})))
