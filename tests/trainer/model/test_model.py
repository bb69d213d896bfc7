"""The decoder on packed dialogues: isolation, loss sums, decoding with a cache, recomputation.

Truth: the same model on each dialogue alone, plain torch cross entropy, and the full forward pass.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from chatmill.trainer.model.decoder import Decoder, KVCache, LossOutput
from chatmill.trainer.model_config import ModelConfig, RopeScaling

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "context": 128,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama": ModelConfig(**SHAPE),
    "untied with biases": ModelConfig(**SHAPE, tied_embeddings=False, qkv_bias=True, output_bias=True),
    "qwen3": ModelConfig(**SHAPE, family="qwen3", head_dim=16, qk_norm=True),
    "sliding window on two layers": ModelConfig(**SHAPE, family="qwen2", sliding_window=5, sliding_layers=(0, 2)),
    "soft caps": ModelConfig(**SHAPE, attention_softcap=2.0, logit_softcap=3.0, sliding_window=7),
    "yarn": ModelConfig(**SHAPE, rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_context=32)),
}
LENGTHS = (7, 1, 19, 12)

each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make(config: ModelConfig, seed: int = 0) -> Decoder:
    model = Decoder(config)
    model.init_weights(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms of 1 and biases of 0 would hide a swapped name
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    return model


def dialogues(lengths: tuple[int, ...] = LENGTHS, vocab: int = 97) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab, (n,), generator=generator, dtype=torch.int32) for n in lengths]


def pack(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, positions, cu_seqlens of dialogues laid end to end."""
    lengths = torch.tensor([0, *(len(p) for p in parts)])
    positions = torch.cat([torch.arange(len(p), dtype=torch.int32) for p in parts])
    return torch.cat(parts), positions, lengths.cumsum(0).to(torch.int32)


def shifted(part: Tensor, masked: int) -> Tensor:
    """Targets of one dialogue: the next token; none for the first `masked` and for the last position."""
    targets = torch.cat([part[1:].long(), torch.tensor([-100])])
    targets[:masked] = -100
    return targets


def alone(model: Decoder, part: Tensor) -> Tensor:
    logits = model(*pack([part]))
    assert isinstance(logits, Tensor)
    return logits


def gradients(model: Decoder) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@each_config
def test_packed_logits_equal_those_of_each_dialogue_alone(config: ModelConfig) -> None:
    model, parts = make(config), dialogues()
    packed = model(*pack(parts))
    for got, part in zip(packed.split(LENGTHS), parts, strict=True):
        torch.testing.assert_close(got, alone(model, part), atol=1e-5, rtol=1e-5)


@each_config
def test_packed_loss_and_gradients_equal_plain_cross_entropy_on_each_dialogue(config: ModelConfig) -> None:
    model, parts = make(config), dialogues()
    targets = torch.cat([shifted(part, 2) for part in parts])
    out = model(*pack(parts), targets=targets)
    assert isinstance(out, LossOutput)
    out.loss_sum.backward()
    packed = gradients(model)

    total, correct = torch.zeros(()), 0
    for part in parts:
        logits, wanted = alone(model, part), shifted(part, 2)
        total = total + F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
        correct += int((logits.argmax(-1) == wanted).sum())
    total.backward()
    apart = gradients(model)

    torch.testing.assert_close(out.loss_sum.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert int(out.count) == int((targets != -100).sum())
    assert int(out.correct) == correct
    assert packed.keys() == apart.keys() == dict(model.named_parameters()).keys()
    for name in packed:
        torch.testing.assert_close(packed[name], apart[name], atol=2e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_rows_select_the_same_loss_as_the_whole_pack() -> None:
    model, parts = make(CONFIGS["llama"]), dialogues()
    targets = torch.cat([shifted(part, 3) for part in parts])
    rows = torch.full((128,), -1, dtype=torch.int32)
    wanted = (targets != -100).nonzero().flatten()
    rows[: len(wanted)] = wanted.int()
    whole, chosen = model(*pack(parts), targets=targets), model(*pack(parts), targets=targets, rows=rows)
    torch.testing.assert_close(chosen.loss_sum, whole.loss_sum)
    assert (int(chosen.count), int(chosen.correct)) == (int(whole.count), int(whole.correct))


def test_a_pack_without_targets_costs_nothing_and_gives_zero_gradients() -> None:
    model, parts = make(CONFIGS["llama"]), dialogues()
    out = model(*pack(parts), targets=torch.full((sum(LENGTHS),), -100))
    out.loss_sum.backward()
    assert float(out.loss_sum.detach()) == 0.0
    assert int(out.count) == 0
    assert all(bool((g == 0).all()) for g in gradients(model).values())


def test_a_window_hides_what_lies_outside_it() -> None:
    config = ModelConfig(**{**SHAPE, "layers": 1}, sliding_window=4)
    model = make(config)
    (part,) = dialogues((12,))
    changed = part.clone()
    changed[0] = (int(part[0]) + 1) % 97
    differs = (alone(model, part) - alone(model, changed)).abs().amax(-1) > 1e-6
    assert differs.tolist() == [True] * 4 + [False] * 8


@each_config
@pytest.mark.parametrize("chunks", [(1,) * 19, (19,), (6, 1, 1, 11), (10, 9)], ids=str)
def test_decoding_with_a_cache_equals_the_full_forward(config: ModelConfig, chunks: tuple[int, ...]) -> None:
    model = make(config).requires_grad_(False)
    part = dialogues()[2]
    cache = KVCache(config, capacity=19, dtype=torch.float32, device="cpu")
    got = torch.cat([model.cached_logits(chunk, cache, all_positions=True) for chunk in part.split(chunks)])
    assert cache.length == 19
    torch.testing.assert_close(got, alone(model, part), atol=1e-5, rtol=1e-5)


def test_a_truncated_cache_continues_as_if_the_rest_had_never_been_read() -> None:
    model, part = make(CONFIGS["qwen3"]).requires_grad_(False), dialogues()[2]
    cache = KVCache(model.config, capacity=32, dtype=torch.float32, device="cpu")
    model.cached_logits(torch.cat([part[:9], part[:5]]), cache)
    cache.truncate(9)
    torch.testing.assert_close(model.cached_logits(part[9:], cache), alone(model, part)[-1], atol=1e-5, rtol=1e-5)


def test_a_full_cache_refuses_more_tokens_and_stays_as_it_was() -> None:
    model, part = make(CONFIGS["llama"]), dialogues()[2]
    cache = KVCache(model.config, capacity=10, dtype=torch.float32, device="cpu")
    model.cached_logits(part[:8], cache)
    with pytest.raises(ValueError, match=r"8 \+ 3 tokens exceed the capacity of 10"):
        model.cached_logits(part[8:11], cache)
    assert cache.length == 8


@each_config
def test_activation_checkpointing_gives_identical_gradients(config: ModelConfig) -> None:
    model, parts = make(config), dialogues()
    targets = torch.cat([shifted(part, 0) for part in parts])
    results = []
    for recompute, layers in ((False, None), (True, None), ("selective", None), ("full", 1)):
        model.set_recompute(recompute, layers)
        model(*pack(parts), targets=targets).loss_sum.backward()
        results.append(gradients(model))
    for result in results[1:]:
        assert results[0].keys() == result.keys()
        assert all(torch.equal(results[0][name], result[name]) for name in results[0])


@pytest.mark.parametrize("recompute", [False, "full", "selective"])
def test_selective_checkpointing_runs_the_attention_once_and_the_rest_twice(recompute: bool | str) -> None:
    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: Counter[str] = Counter()

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.names[op.name().split("::")[1]] += 1
            return op(*args, **(kwargs or {}))

    model, parts = make(CONFIGS["llama"]), dialogues()
    model.set_recompute(recompute)
    targets = torch.cat([shifted(part, 0) for part in parts])
    with Count() as count:
        model(*pack(parts), targets=targets).loss_sum.backward()
    layers = len(model.layers)
    assert count.names["attention_forward"] == (2 if recompute == "full" else 1) * layers
    assert count.names["attention_backward"] == layers
    assert count.names["silu"] == (2 if recompute else 1) * layers  # SwiGLU's own backward has a sigmoid in its place


@each_config
def test_parameter_counts_of_the_config_are_those_of_the_model(config: ModelConfig) -> None:
    assert sum(p.numel() for p in Decoder(config).parameters()) == config.parameter_counts()["total"]


def test_initial_weights_depend_on_the_seed_alone() -> None:
    config = CONFIGS["untied with biases"]
    first, again, other = Decoder(config), Decoder(config), Decoder(config)
    first.init_weights(5)
    again.to(torch.float64).init_weights(5)
    other.init_weights(6)
    a, b, c = dict(first.named_parameters()), dict(again.named_parameters()), dict(other.named_parameters())
    assert all(torch.equal(a[name], b[name].float()) for name in a)
    matrices = [name for name in a if a[name].ndim == 2]
    assert not any(torch.equal(a[name], c[name]) for name in matrices)
    assert not torch.equal(a["layers.0.attention.q.weight"], a["layers.1.attention.q.weight"])
    assert float(a["embed.weight"].detach().std()) == pytest.approx(0.2, rel=0.1)
    assert float(a["layers.1.mlp.down.weight"].detach().std()) == pytest.approx(0.2 / 6**0.5, rel=0.1)


def test_autocast_computes_in_bf16_and_leaves_the_parameters_alone() -> None:
    model, parts = make(CONFIGS["llama"]), dialogues()
    targets = torch.cat([shifted(part, 0) for part in parts])
    exact = model(*pack(parts), targets=targets).loss_sum.detach()
    seen: list[torch.dtype] = []
    model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*pack(parts), targets=targets)
    out.loss_sum.backward()
    assert seen == [torch.bfloat16]
    assert out.loss_sum.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert float(out.loss_sum.detach()) == pytest.approx(float(exact), rel=0.02)


def test_a_model_converted_to_bf16_keeps_its_rotary_angles() -> None:
    config = ModelConfig(**{**SHAPE, "layers": 1, "context": 4096})
    model = make(config)
    part = torch.full((1,), 5, dtype=torch.int32)
    wide = Decoder(config)
    wide.load_state_dict(model.state_dict())
    wide.to(torch.bfloat16)
    angles = []
    for m in (model, wide):
        layout = m._layout(torch.tensor([4001]), torch.tensor([0, 1]), 1, None)
        angles.append(torch.atan2(layout.turn[1], layout.turn[0]))
    assert torch.equal(angles[0], angles[1])
    assert wide(part, torch.tensor([4001]), torch.tensor([0, 1], dtype=torch.int32)).dtype == torch.float32


def test_a_model_built_without_memory_can_be_filled_later() -> None:
    config, parts = CONFIGS["yarn"], dialogues()
    model = make(config)
    with torch.device("meta"):
        empty = Decoder(config)
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(*pack(parts)), model(*pack(parts)))


@pytest.mark.slow
def test_a_block_compiles_as_one_graph_and_gives_the_same_gradients() -> None:
    model, parts = make(CONFIGS["sliding window on two layers"]), dialogues()
    targets = torch.cat([shifted(part, 0) for part in parts])
    model(*pack(parts), targets=targets).loss_sum.backward()
    eager = gradients(model)
    model.layers[2].compile(fullgraph=True, backend="aot_eager")
    model(*pack(parts), targets=targets).loss_sum.backward()
    compiled = gradients(model)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], atol=2e-4, rtol=1e-4)
