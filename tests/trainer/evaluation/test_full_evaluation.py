"""`chatmill eval` against transformers, against the light evaluation, and against itself in other circumstances."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.launcher.__main__ import main as chatmill
from chatmill.trainer.checkpoint.checkpoint import CheckpointWriter, open_checkpoint
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.convert.hf import export_hf
from chatmill.trainer.distributed.world import World
from chatmill.trainer.evaluation import evaluate as full_evaluation
from chatmill.trainer.evaluation.budget import EVERYTHING, Share, cpu_share
from chatmill.trainer.evaluation.evaluate import evaluate_fully, load_evaluation
from chatmill.trainer.evaluation.held_out import HeldOut, choose_turn, held_out, read_held_out, samples_of
from chatmill.trainer.evaluation.measuring import Measurer, draw_candidates, key_of, reply_pool, selection_record
from chatmill.trainer.evaluation.options import EvaluationOptions
from chatmill.trainer.evaluation.text_scores import Bleu
from chatmill.trainer.generation.candidates import grouped, score_candidates
from chatmill.trainer.generation.replies import reply_to
from chatmill.trainer.generation.sampling import Sampling
from chatmill.trainer.model.decoder import Decoder

ALONE = World(0, 1, 0, 1, torch.device("cpu"), "none")
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "context": 256}


def make_checkpoint(folder: Path, data: Path, seed: int, spread: float = 0.2) -> Path:
    tokenizer = ChatTokenizer.load(data / "tokenizer")
    config = ModelConfig(vocab_size=tokenizer.vocab_size, initializer_range=spread, **SHAPE)
    model = Decoder(config)
    model.init_weights(seed)
    with CheckpointWriter(folder, config, {"data": str(data)}) as writer:
        for name, tensor in model.named_parameters():
            writer.add(name, tensor.detach())
        for name, content in tokenizer.files().items():
            writer.add_file(name, content)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("eval") / "model", tiny_data, 1)


@pytest.fixture(scope="module")
def measurer(checkpoint: Path, tiny_data: Path) -> Measurer:
    found = open_checkpoint(checkpoint)
    model = Decoder(found.config)
    found.load_into(model)
    tokenizer = ChatTokenizer.load(checkpoint)
    return Measurer(model.eval(), tokenizer, read_held_out([tiny_data], tokenizer, limit=256), max_new_tokens=24, bleu=Bleu())


def test_perplexity_and_accuracy_are_those_of_transformers(measurer: Measurer, checkpoint: Path, tmp_path: Path) -> None:
    export_hf(open_checkpoint(checkpoint), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    records = measurer.token_records(ALONE)
    nll = top1 = top5 = count = 0.0
    for dialogue in measurer.dialogues:
        labels = torch.tensor(np.where(dialogue.loss_mask, dialogue.ids, -100))[None]
        with torch.no_grad():
            out = theirs(torch.tensor(dialogue.ids)[None], labels=labels)
        tokens = int(dialogue.loss_mask.sum())
        assert records[dialogue.uid]["nll"] == pytest.approx(float(out.loss) * tokens, rel=1e-4)
        best = out.logits[0, :-1].topk(5).indices
        hits = (best == torch.tensor(dialogue.ids)[1:, None])[torch.tensor(dialogue.loss_mask)[1:]]
        nll, count = nll + float(out.loss) * tokens, count + tokens
        top1, top5 = top1 + float(hits[:, 0].sum()), top5 + float(hits.sum())
    figures = evaluate_fully(checkpoint, EvaluationOptions(generate=0, select=0), ALONE).summary
    assert figures["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert figures["accuracy"] == pytest.approx(top1 / count, abs=1e-9)
    assert figures["metrics"]["top5_accuracy"]["value"] == pytest.approx(top5 / count, abs=1e-9)
    size = sum(len(t.content.encode()) for d in measurer.dialogues for t in d.conversation.turns if t.role == "assistant")
    assert figures["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-4)
    assert figures["loss"] == pytest.approx(nll / count, rel=1e-4) and figures["loss_tokens"] == count


def test_roles_and_places_share_the_tokens_out(measurer: Measurer) -> None:
    for dialogue in measurer.dialogues[:8]:
        record = measurer.token_records(replace_world(0, 1))[dialogue.uid]
        parts = [record[name] for name in record if name.startswith("reply ") and name.endswith(" tokens")]
        assert sum(parts) == record["tokens"] == record["assistant tokens"]
        assert len(parts) == min(5, sum(t.role == "assistant" for t in dialogue.conversation.turns))
        # the user's words and the end of each of the user's turns
        spoken = [t.content for t in dialogue.conversation.turns if t.role == "user"]
        assert record["user tokens"] == sum(len(measurer.tokenizer.encode(text)) + 1 for text in spoken)


def replace_world(rank: int, size: int) -> World:
    return replace(ALONE, rank=rank, world_size=size)


def test_three_ranks_find_to_the_bit_what_one_finds(measurer: Measurer, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Callable[[World], dict[str, Any]]] = [
        measurer.token_records,
        lambda world: measurer.reply_records(world, 40),
        lambda world: measurer.selection_records(world, 7),
    ]
    monkeypatch.setattr("chatmill.trainer.evaluation.measuring.GROUP", 8)
    monkeypatch.setattr("chatmill.trainer.evaluation.measuring.PACK_TOKENS", 256)
    for measure in parts:
        alone = measure(ALONE)
        shares: list[Any] = []
        monkeypatch.setattr("torch.distributed.all_gather_object", lambda out, mine, shares=shares: shares.append(mine))

        def join(out: list[Any], mine: Any, shares: list[Any] = shares) -> None:
            out[:] = [mine, *shares]

        for rank in (1, 2):  # the others' shares first, as gathering would bring them; these two miss each other's
            with pytest.raises(AttributeError):
                measure(replace_world(rank, 3))
        monkeypatch.setattr("torch.distributed.all_gather_object", join)
        joint = measure(replace_world(0, 3))
        assert len(shares) == 2 and all(shares)
        assert list(joint.items()) == list(alone.items())


def test_replies_made_in_groups_are_those_of_the_chat(measurer: Measurer) -> None:
    found = measurer.reply_records(ALONE, 20)
    assert len(found) == 20
    for dialogue in measurer.dialogues:
        if dialogue.uid not in found:
            continue
        choice = choose_turn([dialogue], 0)
        assert choice is not None
        turn = choice[1]
        assert turn == found[dialogue.uid]["turn"] is not None
        assert dialogue.conversation.turns[turn].role == "assistant"
        reply = reply_to(
            measurer.model, measurer.tokenizer, dialogue.prompt_parts(measurer.tokenizer, turn)[0], max_new_tokens=24
        )
        assert found[dialogue.uid]["reply"] == reply.text.strip()
        assert found[dialogue.uid]["sums"]["stopped"] == (reply.finish_reason == "stop")
        assert found[dialogue.uid]["reference"] == dialogue.conversation.turns[turn].content
    warm = replace(measurer, sampling=Sampling(1.0), seed=3)
    assert warm.reply_records(ALONE, 20) == warm.reply_records(ALONE, 20) != replace(warm, seed=4).reply_records(ALONE, 20)


@pytest.mark.parametrize(
    "extra", [{}, {"sliding_window": 6, "qk_norm": True}, {"logit_softcap": 7.0, "attention_softcap": 9.0}]
)
def test_candidates_score_as_if_each_were_read_alone(extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    known = {k: v for k, v in extra.items() if k in ModelConfig.model_fields}
    model = Decoder(ModelConfig(vocab_size=97, initializer_range=0.4, **SHAPE, **known))
    model.init_weights(5)
    prompt = [(5 * i + 3) % 97 for i in range(11)]
    candidates = [[(7 * i + k) % 97 for i in range(size)] for k, size in enumerate((4, 1, 13, 9, 2, 40))]
    monkeypatch.setattr("chatmill.trainer.generation.candidates.PASS_TOKENS", 16)
    for candidate, (chance, tokens) in zip(candidates, score_candidates(model, prompt, candidates), strict=True):
        ids = torch.tensor(prompt + candidate)
        with torch.no_grad():
            logits = model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32))
        truth = logits.log_softmax(-1)[torch.arange(len(prompt) - 1, len(ids) - 1), torch.tensor(candidate)].sum()
        assert chance == pytest.approx(float(truth), abs=1e-3)
        assert tokens == len(candidate)


def test_candidates_are_other_dialogues_replies_drawn_with_the_seed(measurer: Measurer) -> None:
    pool = reply_pool(measurer.dialogues)
    own = measurer.dialogues[0]
    real = key_of(own.conversation.turns[1].content)
    few, many = (draw_candidates(pool, own.uid, real, count, 7) for count in (9, 30))
    assert many[:9] == few
    assert many != draw_candidates(pool, own.uid, real, 30, 8)
    texts = [key_of(measurer.tokenizer.decode(ids, skip_special=True)) for ids in many]
    assert len(set(texts)) == 30
    mine = {key_of(t.content) for t in own.conversation.turns if t.role == "assistant"}
    theirs = {key for uid, key, _ in pool if uid != own.uid}
    assert real not in texts and not (mine - theirs) & set(texts)


def test_a_rank_counts_those_that_are_at_least_as_likely() -> None:
    found = selection_record([(-4.0, 2), (-1.0, 1), (-9.0, 3), *[(-30.0, 2)] * 7])
    assert found["recall_1_of_10_mean"] == 0  # -2 per token, as the tie counts against it: -1 and -2 and -3
    assert found["recall_5_of_10_mean"] == 1
    assert found["mean_reciprocal_rank_of_10_sum"] == 1 / 2
    assert not any("100" in name for name in found)
    full = selection_record([(-1.0, 2), *[(-30.0, 2)] * 98, (-0.5, 2)])
    assert (full["recall_1_of_10_mean"], full["recall_1_of_100_mean"], full["recall_5_of_100_mean"]) == (1, 0, 1)


def test_packs_keep_the_order_and_lose_nothing() -> None:
    assert grouped([3, 4, 9, 1, 1, 1], 8) == [[0, 1], [2], [3, 4, 5]]


def test_of_a_dialogue_that_is_too_long_only_what_is_read_counts(measurer: Measurer) -> None:
    turns = (Turn("user", "Hi"), Turn("assistant", "first"), Turn("user", "And?"), Turn("assistant", "é" * 40))
    whole = held_out(Conversation("u", turns, "s", "o"), measurer.tokenizer, 10_000)
    assert (whole.cut, whole.text_bytes, whole.replies()) == (0, 5 + 80, [1, 3])
    cut = held_out(Conversation("u", turns, "s", "o"), measurer.tokenizer, len(whole.ids) - 30)
    assert (cut.cut, cut.replies()) == (30, [1])
    kept = measurer.tokenizer.decode(cut.ids[cut.loss_mask & (cut.turns == 3)])
    assert cut.text_bytes == 5 + len(kept.encode())


def test_a_dialogue_cut_into_samples_counts_once(measurer: Measurer) -> None:
    """A thinking template is measured reply by reply: each reply once, each question once, one of them answered."""
    turns = (Turn("user", "Hi"), Turn("assistant", "<think>a</think>one"), Turn("user", "And?"), Turn("assistant", "two"))
    thinks = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    plain, conversation = measurer.tokenizer, Conversation("u", turns, "s", "o")
    cutting = ChatTokenizer(plain.files()["tokenizer.json"].decode(), thinks, plain.config)
    samples = samples_of(conversation, cutting, 10_000)
    assert [d.uid for d in samples] == ["u", "u"] and [d.replies() for d in samples] == [[1], [3]]
    record = replace(measurer, tokenizer=cutting, dialogues=samples).token_records(ALONE)["u"]
    whole = replace(measurer, dialogues=samples_of(conversation, plain, 10_000)).token_records(ALONE)["u"]
    assert [record[name] for name in ("tokens", "user tokens", "bytes")] == [
        whole[n] for n in ("tokens", "user tokens", "bytes")
    ]
    mine, theirs = choose_turn(samples, 0), choose_turn(samples_of(conversation, plain, 10_000), 0)
    assert mine is not None and theirs is not None and mine[1] == theirs[1]


def test_the_command_measures_compares_and_feeds_the_report(
    checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_checkpoint(tmp_path / "other", tiny_data, 2, spread=0.02)
    run = tmp_path / "run"
    mine = make_checkpoint(run / "checkpoints" / "step-00000003", tiny_data, 1, spread=0.2)
    words = ["--generate", "4", "--select", "2", "--max-new-tokens", "8", "--resamples", "100"]
    assert chatmill(["eval", str(mine), "--against", str(other), *words]) == 0
    out = capsys.readouterr().out
    assert "bleu: nrefs:1" in out and "recall@1 of 10" in out and "p < 0.05" in out
    written = run / "evaluation-step-00000003.json"
    summary = json.loads(written.read_text())
    assert (
        summary["against"]["metrics"]["loss"]["better"] == "worse"
    )  # random weights as wide as these are worse than flat ones
    assert summary["against"]["metrics"]["loss"]["p"] < 0.05
    assert summary["metrics"]["loss"]["low"] < summary["loss"] < summary["metrics"]["loss"]["high"]
    assert set(summary["per_role"]) == {"assistant", "user"}
    assert summary["dialogues"]["replies"] == 4
    again = load_evaluation(written)
    assert again.records["tokens"] and len(again.replies) == 4
    # the two files compare without any model, and the same way
    files = [str(written), "--against", str(run / "evaluation-step-00000003-against.json"), "--out", str(tmp_path / "c.json")]
    assert chatmill(["eval", *files]) == 0
    assert json.loads((tmp_path / "c.json").read_text())["against"]["metrics"] == summary["against"]["metrics"]
    assert chatmill(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "recall@1 of 10" in page and "95 %" in page and "against " + str(other) in page
    assert chatmill(["report", str(run), str(run), "--out", str(tmp_path / "two.html")]) == 0
    assert "Full evaluations side by side" in (tmp_path / "two.html").read_text()


def test_a_cpu_measures_what_it_can_in_two_minutes_and_says_so(
    checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = read_held_out([tiny_data], ChatTokenizer.load(checkpoint), limit=256)
    assert len({d.uid for d in everything}) > 8
    monkeypatch.setattr(full_evaluation, "cpu_share", lambda parameters, longest: Share(1, 4, 4, 10))
    words = ["--max-new-tokens", "4", "--resamples", "100", "--quiet"]
    out = tmp_path / "e.json"
    assert chatmill(["eval", str(checkpoint), *words, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    summary = json.loads(out.read_text())
    held = len({d.uid for d in everything})
    assert summary["reduced"] == {"dialogues": {"measured": 8, "of": held}, "replies": 4, "choices": 4, "candidates": 10}
    assert f"a random 8 of {held} dialogues, 4 generated replies, 4 choices among 10" in shown.out and "--all" in shown.out
    assert "recall@1 of 100" not in shown.out and shown.err == ""
    first = load_evaluation(out).records["tokens"].keys()
    assert set(first) != {d.uid for d in everything[:8]}  # a sample, not what happens to come first
    # another model, whose share would be another one, is measured on the same dialogues
    monkeypatch.setattr(full_evaluation, "cpu_share", lambda parameters, longest: EVERYTHING)
    other = make_checkpoint(tmp_path / "other", tiny_data, 2)
    assert chatmill(["eval", str(out), "--against", str(other), *words]) == 0
    against = load_evaluation(tmp_path / "e-against.json")
    assert against.records["tokens"].keys() == first and len(against.replies) == 4
    whole = EvaluationOptions(everything=True, generate=0, select=0, resamples=100)
    found = evaluate_fully(checkpoint, whole, ALONE).summary
    assert found["dialogues"]["tokens"] == held and "reduced" not in found


def test_the_share_of_a_cpu_follows_from_the_size_of_the_model() -> None:
    tiny, demo, large = (cpu_share(parameters) for parameters in (1_300_000, 134_515_008, 8_030_000_000))
    assert tiny.tokens is not None and tiny.tokens > 500_000 and (tiny.replies, tiny.choices, tiny.candidates) == (32, 8, 100)
    assert demo.tokens == 7434 and (demo.replies, demo.choices, demo.candidates) == (9, 8, 10)
    assert large.tokens == 124 and (large.replies, large.choices, large.candidates) == (4, 4, 10)


def test_bf16_measures_nearly_the_same(checkpoint: Path) -> None:
    options = EvaluationOptions(max_dialogues=12, generate=3, select=2, max_new_tokens=6, resamples=100)
    exact = evaluate_fully(checkpoint, options, ALONE)
    rounded = evaluate_fully(checkpoint, replace(options, precision="bf16"), ALONE)
    assert exact.summary["loss"] != rounded.summary["loss"] == pytest.approx(exact.summary["loss"], rel=0.02)
    assert set(exact.summary["metrics"]) == set(rounded.summary["metrics"])


def test_a_foreign_tokenizer_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=100, **SHAPE)
    model = Decoder(config)
    model.init_weights(0)
    with CheckpointWriter(tmp_path / "bare", config, {"data": str(tiny_data)}) as writer:  # the tokenizer is then the data's
        for name, tensor in model.named_parameters():
            writer.add(name, tensor.detach())
    with pytest.raises(ConfigError, match="do not belong together"):
        evaluate_fully(tmp_path / "bare", EvaluationOptions(), ALONE)


def test_a_file_that_is_no_evaluation_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ConfigError, match="not an evaluation"):
        load_evaluation(tmp_path / "evaluation.json")
    with pytest.raises(ConfigError, match="--select -1"):
        EvaluationOptions(select=-1)


def test_the_first_turn_is_never_the_one_to_answer(measurer: Measurer) -> None:
    turns = (Turn("assistant", "Welcome"), Turn("user", "Hi"), Turn("assistant", "Hello"))
    for uid in map(str, range(20)):
        choice = choose_turn([held_out(Conversation(uid, turns, "s", "o"), measurer.tokenizer, 500)], 0)
        assert choice is not None and choice[1] == 2
    alone: HeldOut = held_out(Conversation("u", turns[:1], "s", "o"), measurer.tokenizer, 500)
    assert choose_turn([alone], 0) is None
