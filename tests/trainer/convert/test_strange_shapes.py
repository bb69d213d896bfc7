"""Files of models in strange shape: every one is refused in words that name the file and what is wrong, and nothing is left.

None of them takes the memory that it asks for: sizes are compared with the headers first.
"""

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.trainer.tokenizer_kinds import save_model

from chatmill.config import ConfigError
from chatmill.launcher.__main__ import main
from chatmill.trainer.checkpoint.checkpoint import CheckpointError, CheckpointWriter, open_checkpoint
from chatmill.trainer.checkpoint.files import file_facts
from chatmill.trainer.checkpoint.manifest import write_manifest
from chatmill.trainer.convert.gguf.importing import import_gguf
from chatmill.trainer.convert.hf import export_hf, import_hf
from chatmill.trainer.convert.hf_config import read_hf_config
from chatmill.trainer.convert.importing import import_any
from chatmill.trainer.model.decoder import Decoder
from chatmill.trainer.model_config import ModelConfig

Change = Callable[[Path], Any]
SHAPE = ModelConfig(
    vocab_size=12, hidden_size=16, intermediate_size=24, layers=2, heads=4, kv_heads=2, context=64, tied_embeddings=False
)
WEIGHTS = "model.safetensors"
BAD_UTF8 = b'{"model_type": "\xff\xfe"}'
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in both forms: `ours` and `hf`."""
    folder = tmp_path_factory.mktemp("whole")
    model = Decoder(SHAPE)
    model.init_weights(0)
    with CheckpointWriter(folder / "ours", SHAPE) as writer:
        for name, tensor in model.named_parameters():
            writer.add(name, tensor)
    export_hf(folder / "ours", folder / "hf")
    return folder


def write(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(raw))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> Change:
    def change(folder: Path) -> None:
        held = load_file(folder / file)
        edit(held)
        save_file(held, folder / file, metadata={"format": "pt"})

    return change


def header(old: bytes, new: bytes) -> Change:
    def change(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        assert old in data and len(old) == len(new)
        (folder / WEIGHTS).write_bytes(data.replace(old, new))

    return change


def cut(name: str, bytes_kept: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:bytes_kept])


def index(content: Any) -> Change:
    return lambda folder: (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))


def spoil(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(held: dict[str, torch.Tensor]) -> None:
        held[name].view(-1)[5] = value

    return edit


GATE = "model.layers.1.mlp.gate_proj.weight"
HF: dict[str, tuple[Change, str]] = {
    "config half": (write("config.json", b"{"), r"config\.json: cannot be read as JSON"),
    "config empty": (write("config.json", b""), r"config\.json: cannot be read as JSON"),
    "config not UTF-8": (write("config.json", BAD_UTF8), r"config\.json: cannot be read as JSON"),
    "config too deep": (write("config.json", DEEP), r"config\.json: cannot be read as JSON"),
    "config a list": (write("config.json", b"[1]"), r"config\.json: expected a JSON object, got list"),
    "config missing": (remove("config.json"), r"config\.json: missing"),
    "model type a list": (config(model_type=["llama"]), r"model_type \['llama'\] is not supported"),
    "architectures a number": (config(architectures=5), "architecture 5 is not supported"),
    "context of 10^15": (config(max_position_embeddings=10**15), "context: Input should be less than or equal to 16777216"),
    "context a text": (config(max_position_embeddings="64"), "max_position_embeddings is '64'; expected a number"),
    "norm_eps infinite": (config(rms_norm_eps=math.inf), "norm_eps: .*finite"),
    "norm_eps NaN": (config(rms_norm_eps=math.nan), "norm_eps: .*finite"),
    "norm_eps a list": (config(rms_norm_eps=[1]), "norm_eps: .*number"),
    "theta infinite": (config(rope_theta=math.inf, rope_parameters=None), "rope_theta is inf; expected a number"),
    "a billion layers": (config(num_hidden_layers=10**9), "layers: Input should be less than or equal to 1024"),
    "layers a text": (config(num_hidden_layers="2"), "num_hidden_layers is '2'; expected a number"),
    "layers true": (config(num_hidden_layers=True), "num_hidden_layers is True; expected a number"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads is 0; expected a whole number above 0"),
    "fewer heads than none": (config(num_attention_heads=-4), "num_attention_heads is -4; expected a whole number"),
    "half a head": (config(num_attention_heads=2.5), r"num_attention_heads is 2\.5; expected a whole number"),
    "a huge width": (config(hidden_size=2**40), "hidden_size: Input should be less than or equal to"),
    "a huge width that is allowed": (config(hidden_size=2**19), r"has shape .*, config\.json implies .*524288"),
    "a huge vocabulary": (config(vocab_size=10**12), "vocab_size: Input should be less than or equal to"),
    "an odd head": (config(head_dim=7), "head_dim=7 is odd"),
    "tied in words": (config(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; expected true or false"),
    "biases in words": (config(attention_bias="no"), "attention_bias is 'no'; expected true or false"),
    "scaling a list": (config(rope_scaling=[2.0]), "rope"),
    "scaling by NaN": (config(rope_scaling={"type": "linear", "factor": math.nan}), "rope_scaling: factor is nan"),
    "scaling by a text": (config(rope_scaling={"type": "linear", "factor": "2"}), "rope_scaling: factor is '2'"),
    "scaling of a strange kind": (config(rope_scaling={"type": ["linear"], "factor": 2.0}), "rope_type .* is not supported"),
    "llama3 without its bands": (
        config(rope_scaling={"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}),
        "high_freq_factor is missing",
    ),
    "llama3 with one band": (
        config(rope_scaling={"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
        "low_freq_factor=4.0 must be below",
    ),
    "weights empty": (write(WEIGHTS, b""), "not a readable safetensors file"),
    "weights with a huge header": (write(WEIGHTS, b"\xff" * 64), "not a readable safetensors file"),
    "weights cut": (cut(WEIGHTS, 3000), "not a readable safetensors file"),
    "weights a folder": (lambda f: (remove(WEIGHTS)(f), (f / WEIGHTS).mkdir()), "model"),
    "weights missing": (remove(WEIGHTS), r"no \.safetensors file found"),
    "half-precision header": (header(b'"dtype":"F32"', b'"dtype":"F16"'), "not a readable safetensors file"),
    "integer header": (header(b'"dtype":"F32"', b'"dtype":"I32"'), "is I32; expected bf16, fp16 or fp32"),
    "an extra tensor": (tensors(lambda t: t.update(more=torch.ones(2))), r"1 tensor\(s\) that .* does not have: more"),
    "a missing tensor": (tensors(lambda t: t.pop(GATE)), rf"1 tensor\(s\) missing: {GATE}"),
    "a transposed tensor": (
        tensors(lambda t: t.update({GATE: t[GATE].T.contiguous()})),
        rf"{GATE} has shape \(16, 24\), config\.json implies \(24, 16\)",
    ),
    "a scalar": (tensors(lambda t: t.update({GATE: torch.tensor(1.0)})), rf"{GATE} has shape \(\)"),
    "NaN": (tensors(spoil(GATE, math.nan)), rf"{GATE} holds NaN or infinite values \(1 of 384\)"),
    "infinity": (tensors(spoil("model.norm.weight", -math.inf)), r"model\.norm\.weight holds NaN or infinite values"),
    "index half": (write(f"{WEIGHTS}.index.json", b"{"), r"index\.json: cannot be read as JSON"),
    "index a list": (index({"weight_map": [1]}), "it has no weight_map"),
    "index pointing outside": (index({"weight_map": {"a": "../../secret"}}), "is not the name of a file in this folder"),
    "index with numbers": (index({"weight_map": {"a": 7}}), "7 is not the name of a file"),
    "index naming another tensor": (index({"weight_map": {"ghost": WEIGHTS}}), "ghost is not in it"),
    "generation settings half": (write("generation_config.json", b"{"), r"generation_config\.json"),
    "generation settings not UTF-8": (write("generation_config.json", BAD_UTF8), r"generation_config\.json"),
    "generation settings a list": (write("generation_config.json", b"[]"), r"generation_config\.json"),
    "an adapter": (write("adapter_config.json", b"{}"), "an adapter .*Merge it"),
    "tokenizer not UTF-8": (write("tokenizer.json", BAD_UTF8), r"tokenizer\.json: not a readable tokenizer"),
}


@pytest.mark.parametrize(("change", "words"), HF.values(), ids=HF.keys())
def test_a_strange_hugging_face_folder_is_refused_by_name(whole: Path, tmp_path: Path, change: Change, words: str) -> None:
    shutil.copytree(whole / "hf", tmp_path / "hf")
    change(tmp_path / "hf")
    tracemalloc.start()
    with pytest.raises(ConfigError, match=words):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def signed(change: Change, edit: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> Change:
    """The change, and a manifest that fits the changed files; edit: what else is done to the manifest."""

    def changed(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(folder)
        for path in folder.iterdir():
            if path.name in manifest["files"]:
                manifest["files"][path.name] = file_facts(path)
        manifest["files"] = {name: facts for name, facts in manifest["files"].items() if (folder / name).exists()}
        edit(manifest)
        write_manifest(folder, manifest.pop("meta", {}), {k: v for k, v in manifest.items() if k not in ("checksum", "format")})

    return changed


def nothing(folder: Path) -> None:
    pass


OURS_FILE = "model-00001.safetensors"


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    return tensors(edit, OURS_FILE)


def entry(name: str, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["tensors"].setdefault(name, {}).update(changes)


NORM = "norm.weight"
OURS: dict[str, tuple[Change, str]] = {
    "config half": (signed(write("config.json", b"{")), r"config\.json: cannot be read as JSON"),
    "config not UTF-8": (signed(write("config.json", BAD_UTF8)), r"config\.json: cannot be read as JSON"),
    "config a list": (signed(write("config.json", b"[]")), r"config\.json: expected a JSON object"),
    "config missing": (signed(remove("config.json")), r"config\.json: missing"),
    "context of 10^15": (signed(config(context=10**15)), r"config\.json: .*\n.*context: .*16777216"),
    "norm_eps infinite": (signed(config(norm_eps=math.inf)), r"config\.json: .*\n.*norm_eps: .*finite"),
    "another key": (signed(config(widht=3)), "widht: unknown key"),
    "key heads that do not divide": (signed(config(kv_heads=3)), "heads=4 is not a multiple of kv_heads=3"),
    "a million layers": (signed(config(layers=10**6)), "layers: Input should be less than or equal to 1024"),
    "more layers than tensors": (signed(config(layers=1000)), r"config\.json says 1000 layers, its tensors 2"),
    "a huge width that is allowed": (signed(config(hidden_size=2**19)), r"has shape .*config\.json implies .*524288"),
    "a huge vocabulary that is allowed": (signed(config(vocab_size=2**23)), r"embed\.weight has shape \(12, 16\)"),
    "tied, with a head": (signed(config(tied_embeddings=True)), r"not in the model: head\.weight"),
    "an extra tensor in the file": (
        signed(weights(lambda t: t.update(more=torch.ones(2)))),
        "tensor more is not in the manifest",
    ),
    "an extra tensor in both": (
        signed(
            weights(lambda t: t.update(more=torch.ones(2))),
            entry("more", group="model", dtype="float32", shape=[2], pieces=[[OURS_FILE, 0, 2]]),
        ),
        "not in the model: more",
    ),
    "a missing tensor": (signed(weights(lambda t: t.pop(NORM))), f"tensor {NORM} is missing"),
    "a missing tensor in both": (
        signed(weights(lambda t: t.pop(NORM)), lambda m: m["tensors"].pop(NORM)),
        f"missing: {NORM}",
    ),
    "half-precision weights": (
        signed(weights(lambda t: t.update({NORM: t[NORM].half()}))),
        f"tensor {NORM} has 16 elements of float16, the manifest says 16 of float32",
    ),
    "integer weights": (
        signed(weights(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), entry(NORM, dtype="int8")),
        f"{NORM} is int8; expected float32, bfloat16, float16",
    ),
    "fewer elements": (signed(weights(lambda t: t.update({NORM: t[NORM][:5].clone()}))), f"{NORM} has 5 elements"),
    "NaN": (signed(weights(spoil("layers.1.mlp.up.weight", math.nan))), r"layers\.1\.mlp\.up\.weight holds NaN .*1 of 384"),
    "infinity": (signed(weights(spoil(NORM, math.inf))), f"{NORM} holds NaN or infinite values"),
    "weights cut": (signed(cut(OURS_FILE, 2000)), rf"{OURS_FILE} has 2000 bytes, its tensors need"),
    "weights empty": (signed(write(OURS_FILE, b"")), rf"{OURS_FILE} has 0 bytes, its tensors need"),
    "manifest half": (write("manifest.json", b'{"format": 2'), r"manifest\.json: cannot be read"),
    "manifest not UTF-8": (write("manifest.json", b"\xff"), r"manifest\.json: cannot be read"),
    "manifest too deep": (write("manifest.json", DEEP), r"manifest\.json: cannot be read"),
    "manifest a list": (write("manifest.json", b"[]"), "checkpoint format None"),
    "manifest of the future": (write("manifest.json", b'{"format": 99}'), "checkpoint format 99"),
    "manifest of version 1 without files": (write("manifest.json", b'{"format": 1}'), "files or tensors is missing"),
    "manifest changed": (write("manifest.json", b'{"checksum": "0", "format": 2}'), "hash mismatch"),
    "manifest without tensors": (signed(nothing, lambda m: m.pop("tensors")), "files or tensors is missing"),
    "a gap between pieces": (signed(nothing, entry(NORM, pieces=[[OURS_FILE, 4, 16]])), f"tensor {NORM}: .* leave a gap"),
    "a shape below zero": (signed(nothing, entry(NORM, shape=[-16])), f"tensor {NORM}: its group, dtype, shape"),
    "a shape in words": (signed(nothing, entry(NORM, shape="16")), f"tensor {NORM}: its group, dtype, shape"),
    "a piece in no file": (signed(nothing, entry(NORM, pieces=[["ghost", 0, 16]])), "'ghost', which is not among the files"),
    "a file outside": (
        signed(nothing, lambda m: m["files"].update({"../secret": {"bytes": 1, "xxh3": ""}})),
        "'../secret' is not the name of a file",
    ),
    "a file without a size": (signed(nothing, lambda m: m["files"].update(more=None)), "more has no size and hash"),
}


@pytest.mark.parametrize(("change", "words"), OURS.values(), ids=OURS.keys())
def test_a_strange_checkpoint_is_refused_by_name(whole: Path, tmp_path: Path, change: Change, words: str) -> None:
    shutil.copytree(whole / "ours", tmp_path / "ours")
    change(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint = open_checkpoint(tmp_path / "ours")
        checkpoint.check_model()  # before the model takes memory
        checkpoint.load_into(Decoder(checkpoint.config))
    assert str(tmp_path) in str(caught.value)


def test_nothing_is_exported_with_not_a_number_in_it(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "ours", tmp_path / "ours")
    signed(weights(spoil("layers.1.mlp.up.weight", math.nan)))(tmp_path / "ours")
    assert open_checkpoint(tmp_path / "ours").check_values() == [
        f"{tmp_path}/ours: layers.1.mlp.up.weight holds NaN or infinite values (1 of 384)"
    ]
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up\.weight holds NaN"):
        export_hf(tmp_path / "ours", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


KEYS: dict[str, Any] = {
    "llama.context_length": 64,
    "llama.embedding_length": 16,
    "llama.block_count": 2,
    "llama.feed_forward_length": 24,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 4,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [chr(97 + i) for i in range(12)],
    "tokenizer.ggml.token_type": [1] * 12,
    "tokenizer.ggml.merges": [],
    "tokenizer.ggml.eos_token_id": 2,
}
ADD = {int: "add_uint64", float: "add_float32", str: "add_string", list: "add_array", bool: "add_bool"}


def gguf_file(path: Path, whole: Path, keys: dict[str, Any], spoiled: dict[str, Any]) -> None:
    """The small model with other keys (None: left out) and tensors."""
    from chatmill.trainer.convert.names import gguf_name

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (KEYS | keys).items():
        if value is not None and value != []:
            getattr(writer, ADD[type(value)])(key, value)
    held = {gguf_name(name): tensor.numpy() for name, tensor in open_checkpoint(whole / "ours").tensors()}
    for name, array in (held | spoiled).items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FFN = "blk.1.ffn_gate.weight"
GGUF: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "context of 10^15": ({"llama.context_length": 10**15}, {}, "context: Input should be less than or equal to 16777216"),
    "context in words": ({"llama.context_length": "64"}, {}, r"llama\.context_length is '64'; expected a whole number"),
    "no width": ({"llama.embedding_length": None}, {}, r"llama\.embedding_length is missing"),
    "heads per layer": ({"llama.attention.head_count": [4, 4]}, {}, r"head_count is .*; expected a whole number"),
    "no heads": ({"llama.attention.head_count": 0}, {}, "heads: Input should be greater than 0"),
    "a billion layers": ({"llama.block_count": 10**9}, {}, "layers: Input should be less than or equal to 1024"),
    "more layers than tensors": ({"llama.block_count": 3}, {}, r"9 tensor\(s\) missing"),
    "norm_eps infinite": ({"llama.attention.layer_norm_rms_epsilon": math.inf}, {}, "norm_eps: .*finite"),
    "theta NaN": ({"llama.rope.freq_base": math.nan}, {}, "rope_theta: .*"),
    "a wide feed-forward": ({"llama.feed_forward_length": 2**20}, {}, r"ffn_.* has shape .*its metadata implies"),
    "another tokenizer": ({"tokenizer.ggml.model": "bert"}, {}, "tokenizer 'bert'"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, {}, "0 tokens|12 token types"),
    "tokens in words": ({"tokenizer.ggml.tokens": "abc"}, {}, r"tokens is 'abc'; expected a list"),
    "fewer types than tokens": ({"tokenizer.ggml.token_type": [1, 1]}, {}, "12 tokens, but 2 token types"),
    "an end beyond the tokens": ({"tokenizer.ggml.eos_token_id": 99}, {}, "eos_token_id is 99, but there are 12 tokens"),
    "NaN": ({}, {FFN: np.full((24, 16), np.nan, dtype=np.float32)}, rf"{FFN} holds NaN or infinite values \(384 of 384\)"),
    "an extra tensor": ({}, {"more": np.ones(4, dtype=np.float32)}, "tensors that this decoder would ignore: more"),
    "a missing tensor": ({}, {FFN: None}, rf"1 tensor\(s\) missing: {FFN}"),
    "a transposed tensor": ({}, {FFN: np.ones((16, 24), dtype=np.float32)}, rf"{FFN} has shape \(16, 24\)"),
    "integers": ({}, {FFN: np.ones((24, 16), dtype=np.int32)}, rf"{FFN}"),
}


@pytest.mark.parametrize(("keys", "spoiled", "words"), GGUF.values(), ids=GGUF.keys())
def test_a_strange_gguf_file_is_refused_by_name(
    whole: Path, tmp_path: Path, keys: dict[str, Any], spoiled: dict[str, Any], words: str
) -> None:
    gguf_file(tmp_path / "m.gguf", whole, keys, spoiled)
    with pytest.raises(ConfigError, match=words):
        import_gguf(tmp_path / "m.gguf", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_no_damage_to_the_head_of_a_gguf_file_ends_in_a_traceback(whole: Path, tmp_path: Path) -> None:
    gguf_file(tmp_path / "m.gguf", whole, {}, {})
    import_gguf(tmp_path / "m.gguf", tmp_path / "ours")
    data = (tmp_path / "m.gguf").read_bytes()
    random = np.random.default_rng(0)
    broken = [data[:n] for n in (0, 3, 4, 23, 24, 100, 900, len(data) // 2, len(data) - 1)]
    broken += [data[:8] + b"\xff" * 8 + data[16:], data[:16] + b"\xff" * 8 + data[24:]]
    for at in random.integers(0, 1600, 40):
        broken.append(data[:at] + bytes(random.integers(0, 256, 4, dtype=np.uint8)) + data[at + 4 :])
    refused = 0
    for bad in broken:
        (tmp_path / "m.gguf").write_bytes(bad)
        try:
            import_gguf(tmp_path / "m.gguf", tmp_path / "ours")
        except ConfigError:
            refused += 1
    assert refused >= 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "ours"]


def test_what_chatmill_wrote_is_not_imported_and_a_data_set_is_no_checkpoint(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.json").write_text('{"format": 1, "name": "a", "splits": {}, "files": {}}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="is a data set, not a checkpoint"):
        open_checkpoint(data)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for folder in (data, tmp_path / "run"):
        with pytest.raises(ConfigError, match="was written by Chatmill"):
            import_any(str(folder), tmp_path / "out")


def test_a_config_without_a_model_type_says_so() -> None:
    with pytest.raises(ConfigError, match="it names no model_type"):
        read_hf_config({}, "config.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: None, None),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json. Import it again with that file"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template, so it is a base model"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% for m in %}"), "cannot chat as it is"),
    ],
)
def test_an_import_says_what_keeps_it_from_chatting(tmp_path: Path, change: Any, words: str | None, capsys: Any) -> None:
    save_model("byte-level", tmp_path / "hf")
    change(tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert (words in said and "note: " in said) if words else "note: " not in said


def test_an_import_follows_no_link_out_of_its_folder_but_those_of_the_hubs_cache(whole: Path, tmp_path: Path) -> None:
    hub = tmp_path / "models--a--b"
    snapshot, blobs = hub / "snapshots" / "0123", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((whole / "hf").iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    assert import_hf(snapshot, tmp_path / "imported").config.layers > 0
    secret = tmp_path / "secret.json"
    shutil.copy((snapshot / "config.json").resolve(), secret)
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "model.safetensors"):
        shutil.copytree(snapshot, tmp_path / name, symlinks=False)
        (tmp_path / name / name).unlink(missing_ok=True)
        (tmp_path / name / name).symlink_to(secret)
        with pytest.raises(ConfigError, match=f"{name}: a link out of the folder, to .*secret.json"):
            import_hf(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
