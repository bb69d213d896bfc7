"""Several adapters on one base in memory: each answers in a mixed batch as a server does that has it alone."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from chatmill.config import validate
from chatmill.trainer.adapter_config import AdapterSection, Precision
from chatmill.trainer.adapters.merging import META, MergedCheckpoint, facts_for, open_model
from chatmill.trainer.adapters.prepare import adapt, kept_parameters
from chatmill.trainer.adapters.shared import same_base, shared_model, why_alone
from chatmill.trainer.adapters.sources import AdaptedSource, NewAdapter
from chatmill.trainer.chat.chat_model import load_chat_models
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, CheckpointError, CheckpointWriter, open_checkpoint
from chatmill.trainer.generation import batched
from chatmill.trainer.model.decoder import Decoder
from chatmill.trainer.model.variants import using, using_rows

from .conftest import SHAPE, write_base

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 6, "targets": ["q", "mlp.*"]},
    "dora with biases": {"rank": 5, "alpha": 8, "method": "dora", "train": ["*.bias"]},
    "rslora on tables": {"rank": 2, "rslora": True, "targets": ["v", "o", "embed", "head"], "train": ["*.k.bias"]},
    "pissa": {"rank": 4, "alpha": 8, "init": "pissa", "targets": ["down"]},
}


@pytest.fixture(scope="module")
def biased(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A base with biases on q, k and v, whose replies vary."""
    config = SHAPE.model_copy(update={"qkv_bias": True, "initializer_range": 0.12})
    return open_checkpoint(write_base(tmp_path_factory.mktemp("biased") / "base", tiny_data, config=config))


def write_adapter(out: Path, base: Checkpoint, settings: dict[str, Any], precision: Precision = "fp32") -> Path:
    """An adapter checkpoint as a run writes it, with values as if it had been trained."""
    section = validate(AdapterSection, settings, "test")
    model = Decoder(base.config)
    adapt(model, section, precision)
    source = AdaptedSource(base, NewAdapter(base, model, section, 0), section.scale)
    facts = facts_for(base, base.path, section, precision)
    with CheckpointWriter(out, base.config, {META: facts.as_meta()}) as writer:
        for name, parameter in kept_parameters(model):
            value = source.tensor(name).float()
            if parameter.requires_grad:
                value = value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
            writer.add(name, value)
        for name, path in base.files().items():
            if name != "config.json":
                writer.add_file(name, path.read_bytes())
    return out


def opened(path: Path) -> MergedCheckpoint:
    found = open_model(path)
    assert isinstance(found, MergedCheckpoint)
    return found


def logits_of(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Of each token alone: documents of one token."""
    ends = torch.arange(len(tokens) + 1, dtype=torch.int32)
    with torch.no_grad():
        return model.classify(model.hidden_states(tokens, torch.zeros_like(tokens), ends))


def whole_model(checkpoint: Checkpoint) -> Decoder:
    model = Decoder(checkpoint.config)
    checkpoint.load_into(model)
    return model


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_each_row_has_the_logits_of_its_own_adapter(precision: Precision, biased: Checkpoint, tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if precision == "fp32" or kind != "pissa"]
    adapters = [opened(write_adapter(tmp_path / kind, biased, KINDS[kind], precision)) for kind in kinds]
    model = shared_model(adapters)
    alone = [None, *map(whole_model, adapters)]
    if precision == "fp32":
        alone[0] = whole_model(biased)
    numbers = [number for number in (*range(len(alone)), *reversed(range(len(alone)))) if alone[number] is not None]
    tokens = torch.arange(3, 3 + len(numbers))
    wanted = torch.stack([logits_of(alone[k], tokens[i : i + 1])[0] for i, k in enumerate(numbers)])  # type: ignore[arg-type]
    with using_rows(numbers, tokens.device):
        mixed = logits_of(model, tokens)
    limit = 1e-5 * float(wanted.abs().max())
    assert float((mixed - wanted).abs().max()) <= limit
    for k, one in enumerate(alone):
        if one is not None:
            with using(k):
                same = logits_of(model, tokens)
            assert float((same - logits_of(one, tokens)).abs().max()) <= limit
    apart = (wanted[: len(adapters), None] - wanted[None, : len(adapters)]).abs().amax(-1) + 1e3 * torch.eye(len(adapters))
    assert float(apart.min()) > 0.1, "the adapters differ"


def test_what_cannot_share_a_base_has_a_model_of_its_own(biased: Checkpoint, tmp_path: Path) -> None:
    made = {
        "plain": ({"rank": 2}, "fp32"),
        "norms": ({"rank": 2, "train": ["*norm.weight"]}, "fp32"),
        "rounded": ({"rank": 2}, "bf16"),
        "own": ({"rank": 2, "init": "pissa"}, "int8"),
        "other": ({"rank": 2, "method": "dora"}, "fp32"),
    }
    paths = {
        name: write_adapter(tmp_path / name, biased, settings, precision)  # type: ignore[arg-type]
        for name, (settings, precision) in made.items()
    }
    notes: list[str] = []
    groups = load_chat_models([("a", paths.pop("plain")), ("base", biased.path), *paths.items()], on_note=notes.append)
    assert [[(chat.name, chat.variant) for chat in group] for group in groups] == [
        [("a", 1), ("base", 0), ("other", 2)],
        [("norms", 0)],
        [("rounded", 0)],
        [("own", 0)],
    ]
    told = "\n".join(notes)
    assert "a and base and other share one base in memory" in told
    assert "norms has a model of its own: adapter.train changes whole parameters" in told
    assert "own has a model of its own: adapter.init=pissa with model.base_precision=int8" in told


def test_a_base_in_bf16_is_the_same_for_adapters_in_fp32_and_bf16(biased: Checkpoint, tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "half", biased.config) as writer:
        for name, tensor in biased.tensors():
            writer.add(name, tensor.bfloat16())
    half = open_checkpoint(tmp_path / "half")
    pair = [opened(write_adapter(tmp_path / kind, half, {"rank": 2}, kind)) for kind in ("fp32", "bf16")]  # type: ignore[arg-type]
    assert len({same_base(found) for found in (*pair, half)}) == 1
    assert not why_alone(opened(write_adapter(tmp_path / "pissa", half, {"rank": 2, "init": "pissa"}, "bf16")))


def test_an_adapter_with_nan_is_refused_before_it_reaches_the_rows_of_others(biased: Checkpoint, tmp_path: Path) -> None:
    good = opened(write_adapter(tmp_path / "good", biased, {"rank": 2}))
    with CheckpointWriter(tmp_path / "bad", biased.config, good.meta) as writer:
        for name, tensor in good.adapter.tensors():
            writer.add(name, tensor * float("nan") if name.endswith("q.lora_b") else tensor)
    with pytest.raises(CheckpointError, match=r"bad: layers\.\d\.attention\.q\.lora_b holds NaN"):
        shared_model([good, opened(tmp_path / "bad")])


def test_forty_requests_over_a_base_and_two_adapters_are_answered_as_by_three_servers(
    biased: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ..chat.server import Batcher, Served  # skips where the extra `serve` is missing

    named = [("base", biased.path)]
    named += [(kind.split()[0], write_adapter(tmp_path / kind, biased, KINDS[kind])) for kind in ("lora", "dora with biases")]
    (group,) = load_chat_models(named)
    assert len({id(chat.model) for chat in group}) == 1
    mixed: list[set[int]] = []
    monkeypatch.setattr(batched, "using_rows", lambda rows, device: (mixed.append(set(rows)), using_rows(rows, device))[1])
    asked = [
        {
            "model": named[k % 3][0],
            "messages": [{"role": "user", "content": f"{'Where is the red cat? ' * 4}{'And the dog? ' * (k // 3 % 4)}"}],
            "max_tokens": 6 + k % 7,
            "logprobs": True,
            "top_logprobs": 2,
        }
        for k in range(40)
    ]

    def answers(served: Served, requests: Sequence[dict[str, Any]], at_once: int) -> list[Any]:
        with ThreadPoolExecutor(at_once) as pool:
            found = list(pool.map(lambda request: served.chat(**request), requests))
        assert all(status == 200 for status, _ in found), found
        return [answer["choices"][0] | {"model": answer["model"]} for _, answer in found]

    together = Served(Batcher(*group, max_active=6))
    try:
        assert [entry["id"] for entry in together.send("GET", "/v1/models")[1]["data"]] == [name for name, _ in named]
        got = answers(together, asked, 8)
        told = together.send("GET", "/metrics")[1]
        counts = together.batcher.counts_of
    finally:
        together.close()
    assert any(len(rows) == 3 for rows in mixed), "batches with replies of all three"
    assert [counts[name].finished for name, _ in named] == [14, 13, 13]
    assert all(found.reused_tokens > 0 for found in counts.values()), "each has prefixes of its own"
    assert 'chatmill_finished_total{model="dora"} 13\n' in told and 'chatmill_active{model="lora"} 0\n' in told
    for name, path in named:
        (chats,) = load_chat_models([(name, path)])
        alone = Served(Batcher(*chats))
        try:
            own = [request for request in asked if request["model"] == name]
            wanted = answers(alone, own, 1)
        finally:
            alone.close()
        for mine, theirs in zip([answer for answer in got if answer["model"] == name], wanted, strict=True):
            assert mine["message"] == theirs["message"] and mine["finish_reason"] == theirs["finish_reason"]
            pairs = zip(mine["logprobs"]["content"], theirs["logprobs"]["content"], strict=True)
            apart = [abs(a["logprob"] - b["logprob"]) if a["token"] == b["token"] else 1.0 for a, b in pairs]
            assert max(apart) <= 1e-5, apart
    texts = {name: [a["message"]["content"] for a in got if a["model"] == name] for name, _ in named}
    assert len({tuple(found[:13]) for found in texts.values()}) == 3
