"""Every family of models that the decoder computes, against transformers: tiny random models, one line each in FAMILIES.

A new family needs its file in trainer/convert/families and its line here.
"""

from __future__ import annotations

import copy
import functools
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from chatmill.config import ConfigError
from chatmill.trainer.convert.family import families, family_of
from chatmill.trainer.convert.hf import export_hf, import_hf, is_foreign
from chatmill.trainer.convert.hf_config import read_hf_config
from chatmill.trainer.convert.hf_weights import check_names
from chatmill.trainer.convert.names import hf_tensors, parameter_shapes
from chatmill.trainer.model.decoder import Decoder, KVCache
from chatmill.trainer.model_config import ModelConfig

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
PER_KIND = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
SCALES = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 0.6}
# the parts of their names in transformers that come before Config and ForCausalLM, and what differs from TINY
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "Llama", {}),
    "mistral": ("Mistral", "Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", "Qwen2", {"use_sliding_window": True, "sliding_window": 7, "layer_types": MIXED}),
    "qwen3": ("Qwen3", "Qwen3", {"head_dim": 32, "use_sliding_window": True, "sliding_window": 7, "layer_types": MIXED}),
    "phi3": ("Phi3", "Phi3", {"sliding_window": 7}),
    "seed_oss": ("SeedOss", "SeedOss", {"head_dim": 32, "attention_out_bias": True}),
    "gemma2": ("Gemma2", "Gemma2", {"head_dim": 32, "sliding_window": 7, "query_pre_attn_scalar": 24}),
    "gemma3_text": (
        "Gemma3Text",
        "Gemma3",
        {"head_dim": 32, "sliding_window": 7, "query_pre_attn_scalar": 24, "layer_types": MIXED},
    ),
    "smollm3": ("SmolLM3", "SmolLM3", {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 7}),
    "olmo2": ("Olmo2", "Olmo2", {}),
    "olmo3": ("Olmo3", "Olmo3", {"sliding_window": 7, "layer_types": MIXED, "rope_parameters": PER_KIND}),
    "exaone4": ("Exaone4", "Exaone4", {"sliding_window": 7, "layer_types": MIXED}),
    "ernie4_5": ("Ernie4_5", "Ernie4_5", {"head_dim": 32}),
    "glm4": ("Glm4", "Glm4", {"head_dim": 32}),
    "granite": ("Granite", "Granite", SCALES),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        "GraniteMoeHybrid",
        {
            **SCALES,
            "num_local_experts": 0,
            "shared_intermediate_size": 80,
            "position_embedding_type": "rope",
            "layer_types": ["full_attention"] * 2,
            "mamba_n_heads": 4,
        },
    ),
}
each_family = pytest.mark.parametrize("name", FAMILIES)
LENGTHS = (17, 9, 23)


def fill(model: Any) -> Any:
    """Random values that depend on the parameter's name and shape alone; norms and biases vary, too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator)
            plain = parameter.ndim == 1 and "Gemma" not in type(model).__name__ and name.endswith("norm.weight")
            parameter.copy_(values * (0.3 if parameter.ndim == 1 else 0.15) + plain)
    return model.eval()


def reference(name: str, **changes: Any) -> Any:
    config, model, extra = FAMILIES[name]
    made = getattr(transformers, f"{config}Config")(**copy.deepcopy({**TINY, **extra, **changes}))
    return fill(getattr(transformers, f"{model}ForCausalLM")(made))


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (length,), generator=generator) for length in LENGTHS]


def their_logits(model: Any, tokens: Tensor) -> Tensor:
    out: Tensor = model(tokens[None]).logits[0]
    return out


def pack(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    ends = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).to(torch.int32)
    return torch.cat(parts), torch.cat([torch.arange(len(part)) for part in parts]), ends


@functools.cache
def imported(folder: Path, name: str) -> tuple[Any, Any]:
    """transformers' model, and the checkpoint that an import makes of its folder."""
    model = reference(name)
    model.save_pretrained(folder / name)
    return model, import_hf(folder / name, folder / f"{name}-ours")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def opened(checkpoint: Any) -> Decoder:
    model = Decoder(checkpoint.config)
    checkpoint.load_into(model)
    return model


def test_every_family_has_its_line_here() -> None:
    assert families().keys() == FAMILIES.keys()


@each_family
def test_logits_are_those_of_transformers_packed_and_cached(folder: Path, name: str) -> None:
    theirs, checkpoint = imported(folder, name)
    model, parts = opened(checkpoint), documents()
    with torch.no_grad():
        expected = [their_logits(theirs, part) for part in parts]
        assert float(torch.cat(expected).std()) > 0.3  # a flat answer would prove nothing
        torch.testing.assert_close(model(*pack(parts)), torch.cat(expected), rtol=0, atol=1e-4)
        cache = KVCache(checkpoint.config, 32, torch.float32, "cpu")
        steps = [model.cached_logits(parts[2][:9], cache, all_positions=True)]
        steps += [model.cached_logits(parts[2][i : i + 1], cache, all_positions=True) for i in range(9, 23)]
        torch.testing.assert_close(torch.cat(steps), expected[2], rtol=0, atol=1e-4)


@each_family
def test_three_steps_have_the_loss_and_the_gradients_of_transformers(folder: Path, name: str) -> None:
    _, checkpoint = imported(folder, name)
    theirs, model, parts = reference(name), opened(checkpoint).train(), documents()
    targets = [torch.cat((part[1:], torch.tensor([-100]))) for part in parts]
    for part in targets:
        part[:4] = -100  # a prompt
    model.set_recompute("full")
    tensors = hf_tensors(checkpoint.config)
    for _ in range(3):
        expected = sum(
            F.cross_entropy(their_logits(theirs, p), t, reduction="sum") for p, t in zip(parts, targets, strict=True)
        )
        loss = model(*pack(parts), targets=torch.cat(targets)).loss_sum
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
        theirs.zero_grad()
        model.zero_grad()
        expected.backward()
        loss.backward()
        ours = dict(model.named_parameters())
        for their_name, names in tensors.items():
            wanted = theirs.get_parameter(their_name).grad
            got = torch.cat([ours[n].grad for n in names])  # type: ignore[misc]  # every one has a gradient
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-3, msg=lambda text, n=their_name: f"{n}: {text}")
        with torch.no_grad():
            for parameter in (*theirs.parameters(), *model.parameters()):
                parameter -= 1e-3 * parameter.grad


@each_family
def test_transformers_loads_the_export_and_answers_alike(folder: Path, name: str) -> None:
    theirs, checkpoint = imported(folder, name)
    export_hf(checkpoint, folder / f"{name}-back")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder / f"{name}-back", output_loading_info=True)
    assert type(loaded) is type(theirs)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(their_logits(loaded.eval(), documents()[2]), their_logits(theirs, documents()[2]))
    assert import_hf(folder / f"{name}-back", folder / f"{name}-again").config == checkpoint.config


@each_family
def test_the_count_of_parameters_is_right(folder: Path, name: str) -> None:
    config = imported(folder, name)[1].config
    assert config.parameter_counts()["total"] == sum(shape.numel() for shape in parameter_shapes(config).values())


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
# older keys, and those that a family's class does not declare although transformers reads them
EXTRA: dict[str, list[Any]] = {
    "rope_theta": [77.0],
    "rope_local_base_freq": [77.0],
    "rope_scaling": [{"rope_type": "linear", "factor": 2.0}],
    "partial_rotary_factor": [0.5],
    "sliding_window_pattern": [2],
    "head_dim": [24],
    "original_max_position_embeddings": [16],
}


def other_values(value: Any) -> list[Any]:
    """Values of the same type that differ, and some of types that a field without a value may have."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value or 1]
    if isinstance(value, float):
        return [0.75 * value or 0.1]
    if isinstance(value, str):
        return ["gelu_pytorch_tanh", "silu"]
    if isinstance(value, list):
        return [value[::-1], value[:1] * len(value), value[-1:] * len(value)]
    if isinstance(value, dict):
        inner = [{**value, key: other} for key, held in value.items() for other in other_values(held)]
        return [*inner, {**value, **LINEAR}]
    return [True, 3] if value is None else []


def their_answer(name: str, raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor], Tensor] | None:
    """The config.json that transformers makes of these settings, the weights and the logits; None where it refuses them."""
    config, model, _ = FAMILIES[name]
    try:
        made = getattr(transformers, f"{config}Config")(**copy.deepcopy(raw))
        theirs = fill(getattr(transformers, f"{model}ForCausalLM")(made))
        with torch.no_grad():
            return made.to_dict(), theirs.state_dict(), their_logits(theirs, documents()[2])
    except Exception:  # whatever validates or computes
        return None


def our_answer(name: str, raw: dict[str, Any], weights: dict[str, Tensor]) -> Tensor | None:
    """Logits of an import of these settings and weights; None where it refuses them."""
    try:
        config = read_hf_config(raw | {"model_type": name, "architectures": [family_of(name).architecture]}, "config.json")
        tensors = hf_tensors(config)
        check_names(tensors, weights, config, Path())
        shapes = parameter_shapes(config)
        held = {}
        for theirs, ours in tensors.items():
            sizes = [shapes[n][0] for n in ours]
            if sum(sizes) != len(weights[theirs]):
                raise ConfigError(theirs)
            held |= dict(zip(ours, weights[theirs].split(sizes), strict=True))
        model = Decoder(config)
        model.load_state_dict(held)
        with torch.no_grad():
            out: Tensor = model(*pack(documents()[2:]))
        return out
    except ConfigError:
        return None


@each_family
@pytest.mark.filterwarnings("ignore")
def test_no_field_that_changes_the_numbers_is_ignored(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every field of config.json is changed: either the logits follow transformers, or the import refuses."""
    caplog.set_level("ERROR")
    plain = {**TINY, **FAMILIES[name][2]}
    base = their_answer(name, plain)
    assert base is not None
    common = transformers.PreTrainedConfig().to_dict().keys() - {"tie_word_embeddings"}  # says nothing about the numbers
    fields = {key: other_values(value) for key, value in base[0].items() if key not in common}
    ignored, followed, refused = [], set(), set()
    for key, values in [*fields.items(), *EXTRA.items()]:
        for value in values:
            answer = their_answer(name, {**plain, key: value})
            if answer is None:
                continue
            written, weights, expected = answer
            # what the user has on disk: the spelling that transformers 5 saves, and older keys as they are
            for raw in (written, {**plain, key: value}) if key in EXTRA else (written,):
                got = our_answer(name, raw, weights)
                if got is None:
                    refused.add(key)
                elif got.shape != expected.shape or float((got - expected).abs().max()) > 1e-4:
                    ignored.append(f"{key}={value!r}")
                elif expected.shape != base[2].shape or float((expected - base[2]).abs().max()) > 1e-4:
                    followed.add(key)
    assert not ignored
    assert len(followed) >= 6, (followed, refused)


LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2.5, 4.0, 4.5], "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]}


def test_phi_4_mini_has_its_angles_up_to_the_original_context(folder: Path) -> None:
    """Three quarters of the channels turn, by longrope; beyond the original context the angles would depend on the length."""
    theirs = reference("phi3", rope_scaling=LONG, partial_rotary_factor=0.75, original_max_position_embeddings=24)
    theirs.save_pretrained(folder / "phi4")
    checkpoint = import_hf(folder / "phi4", folder / "phi4-ours")
    assert (checkpoint.config.context, checkpoint.config.rotary_dim) == (24, 12)
    export_hf(checkpoint, folder / "phi4-back")
    back = transformers.AutoModelForCausalLM.from_pretrained(folder / "phi4-back").eval()
    longer = torch.arange(40) % 61
    with torch.no_grad():
        expected = [their_logits(theirs, part) for part in documents()]
        torch.testing.assert_close(opened(checkpoint)(*pack(documents())), torch.cat(expected), rtol=0, atol=1e-4)
        assert torch.equal(their_logits(back, longer), their_logits(theirs, longer))  # the long factors are kept
    with pytest.raises(ValueError, match=r"context=64 exceeds rope_scaling\.original_context=24"):
        ModelConfig(**checkpoint.config.model_dump() | {"context": 64})


def test_granite_4_with_mamba_layers_is_left_to_transformers() -> None:
    raw = {"model_type": "granitemoehybrid", "num_local_experts": 0, "layer_types": ["attention", "mamba"]}
    assert is_foreign(raw)
    assert not is_foreign(raw | {"layer_types": ["attention", "attention"]})
    assert is_foreign(raw | {"layer_types": ["attention", "attention"], "num_local_experts": 4})


def test_a_family_that_is_not_known_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown family; choose one of .*gemma2"):
        ModelConfig(family="gpt2")
