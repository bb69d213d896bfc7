"""Training, export and import of adapters equal PEFT on transformers with plain PyTorch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from chatmill.config import ConfigError
from chatmill.data.stream import PackedBatch
from chatmill.trainer.adapters.layers import adapters_off
from chatmill.trainer.adapters.merging import META, facts_for, open_model, write_merged
from chatmill.trainer.adapters.prepare import trained_parameters
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from chatmill.trainer.checkpoint.files import save_tensors
from chatmill.trainer.config import Recipe
from chatmill.trainer.convert.hf import export_hf
from chatmill.trainer.convert.importing import import_any
from chatmill.trainer.convert.peft_folder import CONFIG, WEIGHTS, export_peft
from chatmill.trainer.convert.proof.prove import prove
from chatmill.trainer.engine.engine import Engine
from chatmill.trainer.model.decoder import Decoder

from ..engine.engine_worker import steps_of
from .conftest import engine_on

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8},
    "dora": {"rank": 4, "alpha": 8, "method": "dora"},
    "rslora": {"rank": 4, "alpha": 8, "rslora": True, "targets": ["q", "v_proj", "embed", "head"], "train": ["*norm.weight"]},
    "pissa": {"rank": 4, "alpha": 8, "init": "pissa"},
}


@pytest.fixture(scope="module")
def hf_base(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(base, tmp_path_factory.mktemp("hf") / "base")


def save(engine: Engine, base: Checkpoint, recipe: Recipe, out: Path) -> Checkpoint:
    """The adapter of an engine as a checkpoint, as a run writes it."""
    assert recipe.adapter is not None
    facts = facts_for(base, base.path, recipe.adapter, recipe.model.base_precision)
    with CheckpointWriter(out, base.config, {META: facts.as_meta()}) as writer:
        for share in engine.shares():
            if share.group == "model":
                writer.add(share.name, share.tensor.reshape(share.shape))
        writer.add_file("tokenizer.json", base.files()["tokenizer.json"].read_bytes())
    return open_checkpoint(out)


def padded(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets Int["S L"] of the dialogues of a pack; causal attention does not see what is right of a token."""
    ends = batch.cu_seqlens.tolist()
    spans = [(a, b) for a, b in itertools.pairwise(ends) if b > a]
    tokens = torch.nn.utils.rnn.pad_sequence([batch.tokens[a:b].long() for a, b in spans], batch_first=True)
    targets = torch.nn.utils.rnn.pad_sequence([batch.targets[a:b] for a, b in spans], batch_first=True, padding_value=-100)
    return tokens, targets


def theirs_loss(model: Any, batch: PackedBatch) -> torch.Tensor:
    tokens, targets = padded(batch)
    return F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_twenty_steps_equal_peft_with_plain_pytorch(
    kind: str, base: Checkpoint, hf_base: Path, recipe_on: Callable[..., Recipe], tmp_path: Path
) -> None:
    # eps above the rounding of a gradient: without it AdamW makes whole steps of the rounding of gradients near 0
    recipe = recipe_on(adapter=KINDS[kind], optimizer={"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.0})
    engine = engine_on(base, recipe)
    start = export_peft(save(engine, base, recipe, tmp_path / "start"), tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(hf_base), start, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    for micro in steps_of(recipe, engine.world, 20):
        loss = float(engine.forward_backward(micro[:1]).loss_sum) / micro[0].step_loss_tokens
        engine.step(1e-2)
        total = theirs_loss(model, micro[0]) / micro[0].step_loss_tokens
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss - total.item()) <= 1e-5 * max(1.0, loss)
    model.save_pretrained(tmp_path / "theirs")
    ours = export_peft(save(engine, base, recipe, tmp_path / "end"), tmp_path / "ours")
    from safetensors.torch import load_file

    a, b = load_file(ours / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert a.keys() == b.keys()
    apart = {name: float((a[name] - b[name]).abs().max()) for name in a}
    assert max(apart.values()) <= 1e-5, apart


def theirs_logits(hf_base: Path, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(hf_base), folder).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(tokens[None]).logits[0]
    return logits


def ours_logits(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        ends = torch.tensor([0, len(tokens)], dtype=torch.int32)
        logits = model(tokens, torch.arange(len(tokens)), ends)
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_exported_adapter_and_a_merged_one_have_the_logits_of_the_trained(
    kind: str, base: Checkpoint, hf_base: Path, recipe_on: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_on(adapter=KINDS[kind])
    engine = engine_on(base, recipe)
    with torch.no_grad():  # as if it had been trained
        for name, parameter in trained_parameters(engine.decoder):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    tokens = torch.arange(3, 83)
    trained = ours_logits(engine.decoder.eval(), tokens)
    saved = save(engine, base, recipe, tmp_path / "adapter")
    merged = Decoder(base.config)
    open_checkpoint(write_merged(saved, tmp_path / "merged")).load_into(merged)
    assert float((ours_logits(merged, tokens) - trained).abs().max()) <= 1e-5 * float(trained.abs().max())
    with adapters_off(engine.decoder):
        assert float((ours_logits(engine.decoder, tokens) - trained).abs().max()) > 1e-2  # the adapter matters
    theirs = theirs_logits(hf_base, export_peft(saved, tmp_path / "peft"), tokens)
    assert float((theirs - trained).abs().max()) <= 1e-5 * float(trained.abs().max())
    if kind == next(iter(KINDS)):
        proof = prove(saved, tmp_path / "peft", questions=("What is this?",), tokens=4)
        assert proof.holds and (proof.program, proof.equal_replies) == ("peft", 1), proof.lines()


def test_a_folder_of_peft_goes_in_and_out_bit_for_bit(base: Checkpoint, hf_base: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_base)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_dora=True,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["model.norm"],
        lora_dropout=0.1,
    )
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.rand_like(parameter))
    theirs.save_pretrained(tmp_path / "in")
    import_any(str(tmp_path / "in"), tmp_path / "adapter", base=str(base.path))
    out = export_peft(tmp_path / "adapter", tmp_path / "out")
    for name in (CONFIG, WEIGHTS):
        assert (out / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    tokens = torch.arange(3, 83)
    merged = Decoder(base.config)
    open_model(tmp_path / "adapter").load_into(merged)
    with torch.no_grad():
        expected = theirs.eval()(tokens[None]).logits[0]
    assert float((ours_logits(merged, tokens) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "changed the base"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_what_a_plain_adapter_cannot_hold_is_refused(
    change: dict[str, Any], message: str, base: Checkpoint, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "target_modules": ["q_proj"]}
    (source / CONFIG).write_text(json.dumps(values | change))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_tensors({key.format("A"): torch.zeros(2, 64), key.format("B"): torch.zeros(64, 2)}, source / WEIGHTS)
    with pytest.raises(ConfigError, match=message):
        import_any(str(source), tmp_path / "out", base=str(base.path))
    assert not (tmp_path / "out").exists()
