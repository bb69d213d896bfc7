"""A whole decoder through all kernels, on packed real chats with their own loss masks, against the naive path.

Naive: all logits of all tokens, F.cross_entropy, autograd through plain torch operations.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chatmill.data.importers.datasets.chitchat import installed_file, read
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import SourceSection
from chatmill.data.tokenizer.tokenizer import train_bpe
from chatmill.trainer.config import KernelSection, ModelConfig
from chatmill.trainer.model.decoder import Decoder, LossOutput

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = KernelSection(attention="reference", cross_entropy="reference", elementwise="reference")
ALL_TRITON = KernelSection(attention="triton", cross_entropy="triton", elementwise="triton")
SHAPES: dict[str, dict[str, Any]] = {
    "tied, like SmolLM2": {},
    "QK-norm, untied, soft-caps, window": {
        "family": "qwen3", "qk_norm": True, "tied_embeddings": False, "logit_softcap": 9.0, "attention_softcap": 5.0,
        "sliding_window": 33,
    },
}  # fmt: skip
V, T = 400, 96


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    """Packs of T tokens of real chats: one chat after another, the last one cut; only the assistant's words carry loss."""
    options = SourceSection(format="chitchat", limit=40)
    chats = []
    for chat in read(installed_file(), options, "chitchat", Ledger()):
        chats.append(chat)
        if len(chats) == 40:
            break
    tokenizer = train_bpe((turn.content for chat in chats for turn in chat.turns), V)
    packs: list[dict[str, Tensor]] = []
    tokens, positions, targets, bounds = [], [], [], [0]
    for chat in chats:
        dialogue = tokenizer.encode_dialogue(chat)
        ids = torch.from_numpy(dialogue.ids.astype("int64"))[:64]
        wanted = torch.from_numpy(dialogue.loss_mask)[:64]
        following = torch.cat((torch.where(wanted[1:], ids[1:], -100), torch.tensor([-100])))
        room = T - bounds[-1]
        tokens.append(ids[:room])
        positions.append(torch.arange(len(ids))[:room])
        targets.append(following[:room])
        bounds.append(min(T, bounds[-1] + len(ids)))
        if bounds[-1] == T:
            target = torch.cat(targets)
            valid = torch.nonzero(target != -100).flatten()
            rows = torch.full((T,), -1, dtype=torch.int32)
            rows[: len(valid)] = valid.int()
            made = {
                "tokens": torch.cat(tokens), "positions": torch.cat(positions), "targets": target, "rows": rows,
                "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
            }  # fmt: skip
            packs.append({name: value.to(DEVICE) for name, value in made.items()})
            tokens, positions, targets, bounds = [], [], [], [0]
    shares = [(pack["targets"] != -100).float().mean().item() for pack in packs]
    assert len(packs) >= 4 and 0.15 < sum(shares) / len(shares) < 0.85, "real chats: part of the tokens carries loss"
    return packs


def model(shape: dict[str, Any], kernels: KernelSection, dtype: torch.dtype) -> Decoder:
    config = ModelConfig(
        **{"vocab_size": V, "hidden_size": 48, "intermediate_size": 80, "layers": 2, "heads": 3, "kv_heads": 1, "head_dim": 16}
        | {"context": T, "initializer_range": 0.15}
        | shape
    )
    decoder = Decoder(config, kernels)
    decoder.init_weights(0)
    return decoder.to(DEVICE, dtype)


def loss_of(decoder: Decoder, batch: dict[str, Tensor]) -> Tensor:
    """Sum of the losses by the decoder's own fused path."""
    out = decoder(**batch)
    assert isinstance(out, LossOutput)
    return out.loss_sum


def naive_loss(decoder: Decoder, batch: dict[str, Tensor]) -> Tensor:
    """Sum of the losses from the hidden states by all logits in their dtype and F.cross_entropy."""
    table = decoder.embed if decoder.head is None else decoder.head
    seen: list[Tensor] = []
    hook = table.register_forward_pre_hook(
        lambda _, args, kwargs: None if kwargs.get("embed") else seen.append(args[0]), with_kwargs=True
    )
    decoder(batch["tokens"], batch["positions"], batch["cu_seqlens"])
    hook.remove()
    (hidden,) = seen
    logits = hidden @ table.weight.T
    logits = logits if logits.dtype is torch.float64 else logits.float()
    if table.softcap:
        logits = table.softcap * torch.tanh(logits / table.softcap)
    return F.cross_entropy(logits, batch["targets"], reduction="sum")


def gradients(decoder: Decoder, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*decoder.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients_of_the_whole_model_equal_the_naive_paths_in_float64(
    shape: str, impl: Any, batches: list[dict[str, Tensor]]
) -> None:
    elementwise = "triton" if impl == "triton" else "auto"
    fused = KernelSection(attention="reference", cross_entropy=impl, elementwise=elementwise)  # attention sums in fp32
    mine, theirs = (model(SHAPES[shape], kernels, torch.float64) for kernels in (fused, REFERENCE))
    loss, expected = loss_of(mine, batches[0]), naive_loss(theirs, batches[0])
    assert abs(loss.item() / expected.item() - 1) < 1e-6  # the decoder hands its sum out in fp32
    exact = gradients(theirs, expected)
    for name, gradient in gradients(mine, loss).items():
        assert (gradient - exact[name]).norm() / exact[name].norm() < 1e-9, name


@pytest.mark.parametrize("form", ["train", "loss only", "preference"])
def test_rows_without_loss_are_neither_normed_nor_projected(form: str, batches: list[dict[str, Tensor]]) -> None:
    decoder, batch = model(SHAPES["tied, like SmolLM2"], KernelSection(), torch.float64), batches[0]
    with_loss = int((batch["targets"] != -100).sum())
    rows = batch["rows"][:with_loss]
    seen: list[int] = []
    decoder.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    expected = naive_loss(decoder, batch)
    assert seen == [T] and with_loss < T
    handed: list[Tensor] = []

    def objective(losses: Tensor) -> LossOutput:
        handed.append(losses)
        return LossOutput(losses.sum(), losses.new_zeros(()), losses.new_zeros(()))

    with torch.set_grad_enabled(form != "loss only"):
        options = {"objective": objective} if form == "preference" else {}
        out = decoder(**{**batch, "rows": rows}, **options)
    assert seen == [T, with_loss]
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-6, atol=0)
    if form == "preference":
        assert handed[0].shape == (T,) and not handed[0][batch["targets"] == -100].any()
    if form != "loss only":
        (gradient,) = torch.autograd.grad(out.loss_sum, decoder.norm.weight)
        (exact,) = torch.autograd.grad(expected, decoder.norm.weight)
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-12)


def test_names_of_parameters_are_those_of_the_modules_that_own_them() -> None:
    """Checkpoints and exports know parameters by name; engines gather them around their module's forward."""
    decoder = model(SHAPES["QK-norm, untied, soft-caps, window"], KernelSection(), torch.float32)
    names = {name for name, _ in decoder.named_parameters() if "norm" in name}
    layer = {
        f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("attention_norm", "mlp_norm", "attention.q_norm", "attention.k_norm")
    }
    assert names == layer | {"norm.weight"}


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_gradients_err_at_most_twice_as_much_as_pytorchs(shape: str, batches: list[dict[str, Tensor]]) -> None:
    source = model(SHAPES[shape], REFERENCE, torch.float32).to(torch.bfloat16).state_dict()
    found = {}
    for name, kernels, dtype in (
        ("ours", ALL_TRITON, torch.bfloat16), ("theirs", REFERENCE, torch.bfloat16), ("exact", REFERENCE, torch.float64),
    ):  # fmt: skip
        decoder = model(SHAPES[shape], kernels, dtype)
        decoder.load_state_dict(source)
        loss = loss_of(decoder, batches[0]) if name == "ours" else naive_loss(decoder, batches[0])
        found[name] = torch.cat([g.double().flatten() for g in gradients(decoder, loss).values()])
    ours, theirs = ((found[name] - found["exact"]).norm() for name in ("ours", "theirs"))
    assert theirs > 0 and ours <= 2 * theirs, f"ours {ours:.3e}, PyTorch's {theirs:.3e}"


@pytest.mark.slow
def test_eight_steps_with_all_kernels_follow_the_reference_curve(batches: list[dict[str, Tensor]]) -> None:
    curves = []
    for kernels in (ALL_TRITON, REFERENCE):
        decoder = model({"layers": 1, "heads": 2}, kernels, torch.float32)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
        curve = []
        for step in range(8):
            batch = batches[step % 4]
            loss = loss_of(decoder, batch) / (batch["targets"] != -100).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    triton, reference = curves
    assert reference[-4:].mean() < 0.8 * reference[:4].mean(), "the run learns"
    torch.testing.assert_close(triton, reference, rtol=2e-5, atol=0)  # AdamW divides by the gradient's size: rounding grows
