"""Import from and export to Hugging Face folders.

Truth: transformers' own models and tokenizers, on tiny random weights of every family and rotary scaling.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from chatmill.config import ConfigError
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from chatmill.trainer.convert.hf import export_hf, import_hf
from chatmill.trainer.convert.hf_config import read_hf_config, write_hf_config
from chatmill.trainer.convert.names import parameter_shapes
from chatmill.trainer.model.decoder import Decoder
from chatmill.trainer.model_config import ModelConfig, RopeScaling

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LAYERS = ["full_attention", "sliding_attention", "full_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2, no grouping, untied": ("Llama", {"num_key_value_heads": 4}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear scaling": ("Llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "llama, yarn with mscale": ("Llama", {"rope_parameters": MSCALE}),
    "llama, biases": ("Llama", {"attention_bias": True}),
    "llama, wide heads": ("Llama", {"head_dim": 16}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}),
    "mistral with a window": ("Mistral", {"sliding_window": 5}),
    "mistral without": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows above": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, tied, layer types": (
        "Qwen3",
        {"head_dim": 16, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 6, "layer_types": LAYERS},
    ),
    "llama, yarn with its first context beside it": (
        "Llama",
        {"rope_parameters": {k: v for k, v in YARN.items() if k[:4] != "orig"}, "original_max_position_embeddings": 16},
    ),
    "llama, yarn with two first contexts": ("Llama", {"rope_parameters": YARN, "original_max_position_embeddings": 32}),
    "llama 3.1 with two first contexts": ("Llama", {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32}),
    "phi3": ("Phi3", {"rms_norm_eps": 1e-5}),
    "phi3 with a window, no grouping": ("Phi3", {"sliding_window": 5, "num_key_value_heads": 4}),
    "phi3, tied": ("Phi3", {"tie_word_embeddings": True}),
    "seed_oss": ("SeedOss", {"head_dim": 16}),
    "seed_oss, bias on the output": ("SeedOss", {"head_dim": 8, "attention_out_bias": True}),
    "seed_oss without biases": ("SeedOss", {"head_dim": 16, "attention_bias": False, "rope_parameters": YARN}),
    "qwen3, biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
}
each_case = pytest.mark.parametrize(("family", "extra"), CASES.values(), ids=CASES.keys())


def reference_model(family: str, extra: dict[str, Any]) -> Any:
    """A transformers model in which every parameter, norms and biases too, is random."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **extra})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save_reference(folder: Path, family: str, extra: dict[str, Any], **options: Any) -> Any:
    model = reference_model(family, extra)
    model.save_pretrained(folder, **options)
    return model


def reference_logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens.long()[None]).logits[0]
    return out


def our_logits(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    model = Decoder(checkpoint.config)
    checkpoint.load_into(model)
    with torch.no_grad():
        out: Tensor = model(tokens, torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32))
    return out


def prompt(vocab: int = 61, length: int = 48) -> Tensor:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@each_case
def test_imported_logits_equal_those_of_transformers(tmp_path: Path, family: str, extra: dict[str, Any]) -> None:
    model = save_reference(tmp_path / "hf", family, extra)
    expected = reference_logits(model, prompt())
    assert float(expected.std()) > 0.3  # a flat answer would prove nothing
    got = our_logits(import_hf(tmp_path / "hf", tmp_path / "ours"), prompt())
    assert float((got - expected).abs().max()) <= 1e-4


@each_case
def test_transformers_loads_the_export_and_answers_alike(tmp_path: Path, family: str, extra: dict[str, Any]) -> None:
    original = save_reference(tmp_path / "hf", family, extra)
    export_hf(import_hf(tmp_path / "hf", tmp_path / "ours"), tmp_path / "back")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(loaded) is type(original)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(reference_logits(loaded.eval(), prompt()), reference_logits(original, prompt()))


@each_case
def test_export_then_import_is_bit_identical(tmp_path: Path, family: str, extra: dict[str, Any]) -> None:
    save_reference(tmp_path / "hf", family, extra)
    first = import_hf(tmp_path / "hf", tmp_path / "first")
    export_hf(first, tmp_path / "back", shard_bytes=9_000)
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    second = import_hf(tmp_path / "back", tmp_path / "second", shard_bytes=5_000)
    assert tensors_of(tmp_path / "hf").keys() == tensors_of(tmp_path / "back").keys()  # their own form, fused where it was
    assert second.config == first.config
    assert sorted(second.names()) == sorted(first.names())
    for name in first.names():
        assert first.tensor(name).dtype == second.tensor(name).dtype
        assert torch.equal(first.tensor(name), second.tensor(name)), name


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LINEAR], ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_both_spellings_of_rotary_scaling_are_read_alike(tmp_path: Path, family: str, rope: dict[str, Any]) -> None:
    save_reference(tmp_path / "hf", family, {"rope_parameters": rope})
    new = import_hf(tmp_path / "hf", tmp_path / "new")
    old = {key: value for key, value in rope.items() if key != "rope_theta"}
    rewrite(tmp_path / "hf", rope_parameters=None, rope_theta=rope["rope_theta"], rope_scaling=old)
    assert import_hf(tmp_path / "hf", tmp_path / "old").config == new.config
    old["type"] = old.pop("rope_type")  # before transformers 4.43
    rewrite(tmp_path / "hf", rope_scaling=old)
    assert import_hf(tmp_path / "hf", tmp_path / "older").config == new.config


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_transformers_reads_either_spelling_of_the_export(tmp_path: Path, spelling: str) -> None:
    """Each major version sees its own spelling; neither may contradict the other."""
    original = save_reference(tmp_path / "hf", "Llama", {"rope_parameters": LLAMA3})
    export_hf(import_hf(tmp_path / "hf", tmp_path / "ours"), tmp_path / "back")
    dropped = {"rope_parameters": ["rope_scaling", "rope_theta"], "rope_scaling": ["rope_parameters"]}[spelling]
    rewrite(tmp_path / "back", **dict.fromkeys(dropped))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(reference_logits(loaded.eval(), prompt()), reference_logits(original, prompt()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_their_bits_through_sharded_files(tmp_path: Path, dtype: torch.dtype) -> None:
    model = reference_model("Qwen3", {"head_dim": 16}).to(dtype)
    model.save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    checkpoint = import_hf(tmp_path / "hf", tmp_path / "ours")
    export_hf(checkpoint, tmp_path / "back")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == dtype for name in before)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").dtype == dtype


def test_an_export_can_change_the_dtype(tmp_path: Path) -> None:
    save_reference(tmp_path / "hf", "Llama", {})
    export_hf(import_hf(tmp_path / "hf", tmp_path / "ours"), tmp_path / "back", dtype="bf16")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)


def small_tokenizer(folder: Path, vocab: int = 61) -> Tokenizer:
    words = [chr(0x61 + i % 26) * (1 + i // 26) for i in range(vocab - 1)]
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{w: i + 1 for i, w in enumerate(words)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_tokenizer_and_template_travel_with_the_weights(tmp_path: Path) -> None:
    save_reference(tmp_path / "hf", "Llama", {})
    tokenizer = small_tokenizer(tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    export_hf(import_hf(tmp_path / "hf", tmp_path / "ours"), tmp_path / "back")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert loaded("a bb zz ccc")["input_ids"] == tokenizer.encode("a bb zz ccc").ids
    assert loaded.apply_chat_template([{"role": "user", "content": "a bb"}], tokenize=False) == "a bb"


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"model_type": "made_up"}, "model_type 'made_up' is no causal language model of transformers"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "feed-forward biases": ({"mlp_bias": True}, "mlp_bias"),
    "quantised weights": ({"quantization_config": {"bits": 4}}, "quantised"),
    "a scaling that depends on the length": (
        {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "su", "short_factor": [1.0]}},
        "long_factor is None; longrope needs a list of numbers",
    ),
    "partial rotation": ({"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
    "a scaling without its factor": ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
    "unknown scaling": ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
    "another size": ({"intermediate_size": 44}, r"shape \(32, 40\), config.json implies \(32, 44\)"),
    "a larger vocabulary": ({"vocab_size": 64}, r"shape \(61, 32\), config.json implies \(64, 32\)"),
    "too many layers": ({"num_hidden_layers": 4}, r"9 tensor\(s\) missing: model.layers.3"),
    "too few layers": ({"num_hidden_layers": 2}, r"9 tensor\(s\) that this architecture does not have"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
    "no shape": ({"hidden_size": None}, "'hidden_size' is missing"),
    "tied in the config, untied in the weights": ({"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_an_import_that_cannot_be_exact_says_why_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_reference(tmp_path / "hf", "Llama", {})
    rewrite(tmp_path / "hf", **changes)
    with pytest.raises(ConfigError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def remove_head(folder: Path) -> None:
    drop(folder, "lm_head.weight")


def truncate_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop(folder: Path, *names: str) -> None:
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name not in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def use_integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.to(torch.int8) for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGED = {
    "no head": (remove_head, "lm_head.weight(.|\\n)*tie_word_embeddings=true"),
    "one tensor of a fused pair": (
        lambda folder: drop(folder, "model.layers.1.mlp.gate_proj.weight"),
        "1 tensor.* missing: .*gate",
    ),
    "half a file": (truncate_weights, "not a readable safetensors file"),
    "pickles only": (pickle_weights, "pytorch_model.bin: pickled weights"),
    "integers": (use_integers, "expected bf16, fp16 or fp32"),
    "a foreign tokenizer": (lambda folder: small_tokenizer(folder, 80), "largest token id is 79, but the model has 61 rows"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: missing"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: cannot be read"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_folders_are_refused_in_words_and_leave_nothing(tmp_path: Path, damage: Any, message: str) -> None:
    save_reference(tmp_path / "hf", "Llama", {})
    damage(tmp_path / "hf")
    with pytest.raises(ConfigError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("tied", [True, False])
def test_shards_without_an_index_are_found_and_say_whether_the_embeddings_are_tied(tmp_path: Path, tied: bool) -> None:
    model = save_reference(tmp_path / "hf", "Llama", {"tie_word_embeddings": tied}, max_shard_size="8KB")
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    rewrite(tmp_path / "hf", tie_word_embeddings=None)
    checkpoint = import_hf(tmp_path / "hf", tmp_path / "ours")
    assert checkpoint.config.tied_embeddings is tied
    assert float((our_logits(checkpoint, prompt()) - reference_logits(model, prompt())).abs().max()) <= 1e-4
    victim = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    data = victim.read_bytes()
    victim.unlink()
    with pytest.raises(ConfigError, match=f"weight files are missing: {victim.name}"):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    victim.write_bytes(data)
    (tmp_path / "hf" / "old-copy.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=f"is in {victim.name} and in old-copy"):
        import_hf(tmp_path / "hf", tmp_path / "ours")


def test_where_both_spellings_of_the_rotary_settings_differ_the_choice_is_that_of_transformers(tmp_path: Path) -> None:
    save_reference(tmp_path / "hf", "Llama", {"rope_parameters": LLAMA3})
    rewrite(tmp_path / "hf", rope_scaling={"type": "linear", "factor": 3.0}, rope_theta=777.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    got = our_logits(import_hf(tmp_path / "hf", tmp_path / "ours"), prompt())
    assert float((got - reference_logits(model, prompt())).abs().max()) <= 1e-4


def test_a_fused_model_exports_only_as_what_it_can_be(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "family": "phi3"}
    write_hf_config(ModelConfig(**shape), "float32")
    scaled = ModelConfig(**shape, rope_scaling=RopeScaling(kind="yarn", factor=2.0, original_context=64))
    with pytest.raises(ConfigError, match="short_factor is None"):
        write_hf_config(scaled, "float32")
    with pytest.raises(ConfigError, match="cannot say qkv_bias=True"):
        write_hf_config(ModelConfig(**shape, qkv_bias=True), "float32")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_reference(tmp_path / "hf", "Llama", {}, max_shard_size="8KB")
    victim = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ConfigError, match=victim.name):
        import_hf(tmp_path / "hf", tmp_path / "ours")


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    save_reference(tmp_path / "hf", "Llama", {})
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="will not be replaced"):
        import_hf(tmp_path / "hf", tmp_path / "precious")
    checkpoint = import_hf(tmp_path / "hf", tmp_path / "ours")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="exists already"):
            export_hf(checkpoint, tmp_path / "precious", overwrite=overwrite)
    assert (tmp_path / "precious" / "letter.txt").read_text() == "dear"


def test_an_earlier_export_is_replaced_only_on_demand(tmp_path: Path) -> None:
    save_reference(tmp_path / "hf", "Llama", {})
    checkpoint = import_hf(tmp_path / "hf", tmp_path / "ours")
    export_hf(checkpoint, tmp_path / "back", shard_bytes=9_000)
    with pytest.raises(ConfigError, match="exists already"):
        export_hf(checkpoint, tmp_path / "back")
    export_hf(checkpoint, tmp_path / "back", overwrite=True)
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()
    assert (tmp_path / "back" / "model.safetensors").is_file()


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "soft-cap": ({"logit_softcap": 30.0}, "cannot say logit_softcap=30.0"),
    "window on llama": ({"sliding_window": 8}, "sliding_window=8 (.|\\n)*Another model.family may fit: .*qwen3"),
    "qk-norm on llama": ({"qk_norm": True}, "cannot say qk_norm=True"),
    "lone biases": ({"qkv_bias": True}, "cannot say qkv_bias=True"),
    "qwen2 without biases": ({"family": "qwen2"}, "cannot say qkv_bias=False"),
    "mistral on some layers": (
        {"family": "mistral", "sliding_window": 8, "sliding_layers": (0,)},
        "cannot say sliding_layers=.0,.",
    ),
}


@pytest.mark.parametrize(("fields", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_a_model_without_a_counterpart_is_not_exported(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    config = ModelConfig(vocab_size=61, hidden_size=32, intermediate_size=40, layers=2, heads=4, kv_heads=2, **fields)
    with CheckpointWriter(tmp_path / "ours", config) as writer:
        for name, shape in parameter_shapes(config).items():
            writer.add(name, torch.zeros(shape))
    with pytest.raises(ConfigError, match=message):
        export_hf(tmp_path / "ours", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_configs_survive_the_way_out_and_back() -> None:
    shape: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
    }
    yarn = RopeScaling(kind="yarn", factor=4.0, original_context=2048, beta_fast=16.0, attention_factor=1.1)
    llama3 = RopeScaling(kind="llama3", factor=32.0, original_context=8192, high_freq_factor=3.0)
    for config in (
        ModelConfig(**shape, rope_scaling=llama3, rope_theta=5e5),
        ModelConfig(**shape, head_dim=16, family="qwen3", qk_norm=True, sliding_window=9, sliding_layers=(1, 3)),
        ModelConfig(**shape, family="qwen2", qkv_bias=True, rope_scaling=yarn, tied_embeddings=False),
        ModelConfig(**shape, family="mistral", sliding_window=9, norm_eps=1e-6),
        ModelConfig(**shape, qkv_bias=True, output_bias=True),
    ):
        assert read_hf_config(json.loads(json.dumps(write_hf_config(config, "float32"))), "test") == config


@pytest.mark.slow
def test_memory_of_an_import_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Over 500 MB of weights in six files; anonymous memory may grow by a few output shards only."""
    config = ModelConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=4096,
        layers=20,
        heads=16,
        kv_heads=4,
        context=128,
        tied_embeddings=True,
    )
    with CheckpointWriter(tmp_path / "ours", config, shard_bytes=100 << 20) as writer:
        for name, shape in parameter_shapes(config).items():
            writer.add(name, torch.full(shape, 0.5, dtype=torch.bfloat16))
    export_hf(tmp_path / "ours", tmp_path / "hf", shard_bytes=100 << 20)
    size = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    assert size > 500 << 20
    script = """
import sys, threading, time
from chatmill.trainer.convert.hf import import_hf, export_hf
peak = base = 0
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
base = anonymous()
threading.Thread(target=watch, daemon=True).start()
checkpoint = import_hf(sys.argv[1], sys.argv[2], shard_bytes=50 << 20)
export_hf(checkpoint, sys.argv[3], shard_bytes=50 << 20)
print(peak - base)
"""
    out = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "hf", tmp_path / "again", tmp_path / "out"],
        capture_output=True,
        check=False,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 250 << 20
