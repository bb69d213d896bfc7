"""Where a reply ends, and how it is sampled, on the whole way: source, checkpoint, training, export, import.

Truth: transformers' own `generate` on the exported folder, and the source's own files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from chatmill.config import ConfigError
from chatmill.data.tokenizer.generation_settings import end_ids, read_settings
from chatmill.data.tokenizer.template import TEMPLATES
from chatmill.data.tokenizer.tokenizer import ChatTokenizer, train_bpe
from chatmill.launcher.__main__ import main as chatmill
from chatmill.trainer.chat.chat_model import ChatModel, load_chat_model
from chatmill.trainer.chat.serve.protocol import ChatRequest
from chatmill.trainer.chat.terminal import Settings
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from chatmill.trainer.config import ModelConfig, load_recipe
from chatmill.trainer.convert.gguf.exporting import export_gguf
from chatmill.trainer.convert.gguf.importing import import_gguf
from chatmill.trainer.convert.hf import export_hf, import_hf
from chatmill.trainer.generation.defaults import sampling_of
from chatmill.trainer.generation.sampling import Sampling
from chatmill.trainer.loop.loop import train
from chatmill.trainer.model.decoder import Decoder

from ..tokenizer_kinds import KINDS, PROMPTS, save_model

SOURCE = {"temperature": 0.6, "top_k": 20, "do_sample": True, "repetition_penalty": 1.05, "max_new_tokens": 2048, "ours": "x"}


def json_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def save_checkpoint(folder: Path, tokenizer: ChatTokenizer, leave_out: str = "", **shape: Any) -> Checkpoint:
    """A random one-layer model with this tokenizer, as a run writes it."""
    size = {"hidden_size": 32, "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 2, "context": 64}
    config = ModelConfig(**{"vocab_size": tokenizer.vocab_size, **size, **shape})
    model = Decoder(config)
    model.init_weights(1)
    with CheckpointWriter(folder, config) as writer:
        for name, tensor in model.named_parameters():
            writer.add(name, tensor.detach())
        for name, data in tokenizer.files().items():
            if name != leave_out:
                writer.add_file(name, data)
    return open_checkpoint(folder)


def small_tokenizer(**options: Any) -> ChatTokenizer:
    """Byte-level; <|im_end|> (2) closes a turn, <|endoftext|> (0) a text."""
    tokenizer = train_bpe(iter(["hello there, how are you?"] * 9), 280)
    config = tokenizer.config | {"eos_token": "<|endoftext|>"}
    files = tokenizer.files()
    return ChatTokenizer(files["tokenizer.json"].decode(), TEMPLATES["chatml"], config, **options)


def ends_of(folder: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ends that config.json and generation_config.json of an export name."""
    return end_ids(json_of(folder / "config.json")), end_ids(json_of(folder / "generation_config.json"))


# ---------------------------------------------------------------- the acceptance test: 50 prompts, four kinds


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_generates_from_an_export_what_chatmill_generates(kind: str, tmp_path: Path) -> None:
    save_model(kind, tmp_path / "source", end_scale=2.2)
    (tmp_path / "source" / "generation_config.json").unlink()  # only the template knows where a turn ends
    import_hf(tmp_path / "source", tmp_path / "ours")
    assert chatmill(["export", str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    asked, answered = tmp_path / "prompts.jsonl", tmp_path / "replies.jsonl"
    asked.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    options = ["--temperature", "0", "--max-new-tokens", "32"]
    assert chatmill(["generate", str(tmp_path / "ours"), "--file", str(asked), "--out", str(answered), *options]) == 0
    ours = [json.loads(line) for line in answered.read_text(encoding="utf-8").splitlines()]

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ends = set(end_ids({"eos_token_id": model.generation_config.eos_token_id}))
    assert tokenizer.convert_tokens_to_ids(KINDS[kind].end) in ends
    clean = ChatTokenizer.load(tmp_path / "ours").escape_special
    for prompt, found in zip(PROMPTS, ours, strict=True):
        message = [{"role": "user", "content": clean(prompt)}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        whole = model.generate(**ids, max_new_tokens=32, do_sample=False, pad_token_id=0)[0].tolist()
        reply = whole[ids["input_ids"].shape[1] :]
        stopped = reply[-1] in ends
        assert (found["finish_reason"] == "stop", found["tokens"]) == (stopped, len(reply) - stopped), prompt
        assert found["reply"] == tokenizer.decode(reply, skip_special_tokens=True), prompt
    assert {"stop", "length"} >= {found["finish_reason"] for found in ours} >= {"stop"}


# ---------------------------------------------------------------- the tokens that end a reply


def test_every_end_token_of_a_source_survives_the_way_in_and_out(tmp_path: Path) -> None:
    save_model("unigram", tmp_path / "source")
    raw = json_of(tmp_path / "source" / "config.json")
    for name, ends in (("config.json", [2, 7, 5]), ("generation_config.json", [9, 7])):
        path = tmp_path / "source" / name
        path.write_text(json.dumps(json_of(path) | {"eos_token_id": ends}))
    checkpoint = import_hf(tmp_path / "source", tmp_path / "ours")
    assert checkpoint.config.eos_token_id == (2, 7, 5) and raw["vocab_size"] > 9
    assert load_chat_model(checkpoint.path).tokenizer.stop_ids == {5, 2, 9, 7}
    export_hf(checkpoint, tmp_path / "out")
    assert ends_of(tmp_path / "out") == ((5, 2, 9, 7), (5, 2, 9, 7))  # <|eot_id|>, </s>, then what the source names
    loaded = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert loaded.eos_token_id == [5, 2, 9, 7]
    again = import_hf(tmp_path / "out", tmp_path / "again")
    assert again.config.eos_token_id == (5, 2, 9, 7) and ChatTokenizer.load(again.path).stops == (5, 2, 9, 7)


def test_a_model_from_scratch_is_exported_with_its_ends(write_recipe, tiny_data: Path, tmp_path: Path) -> None:
    train(load_recipe(str(write_recipe("new", train={"steps": 1}))))
    tokenizer = ChatTokenizer.load(tiny_data / "tokenizer")
    (end,) = tokenizer.stop_ids
    checkpoint = open_checkpoint(tmp_path / "runs" / "new")
    assert end_ids(read_settings(checkpoint.path)) == (end,)
    export_hf(checkpoint, tmp_path / "out")
    assert ends_of(tmp_path / "out") == ((end,), (end,))
    assert json_of(tmp_path / "out" / "config.json")["pad_token_id"] == tokenizer.pad_id
    export_gguf(checkpoint, tmp_path / "m.gguf")
    assert ChatTokenizer.load(import_gguf(tmp_path / "m.gguf", tmp_path / "back").path).stop_ids == {end}


def test_a_fine_tune_keeps_the_ends_and_the_sampling_of_its_source(write_recipe, tiny_data: Path, tmp_path: Path) -> None:
    """Import, training, checkpoint, export and import again; the data set was built without knowing of the settings."""
    given = ChatTokenizer.load(tiny_data / "tokenizer")
    source = export_hf(save_checkpoint(tmp_path / "made", given, vocab_size=384, context=256), tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps(SOURCE | {"eos_token_id": [40, 2]}))
    import_hf(source, tmp_path / "base")
    recipe = write_recipe("tuned", train={"steps": 1})
    fields = yaml.safe_load(recipe.read_text()) | {"model": {"checkpoint": str(tmp_path / "base")}}
    recipe.write_text(yaml.safe_dump(fields))
    train(load_recipe(str(recipe)))
    tuned = open_checkpoint(tmp_path / "runs" / "tuned")
    export_hf(tuned, tmp_path / "out")
    back = import_hf(tmp_path / "out", tmp_path / "back")
    for folder in (tuned.path, tmp_path / "out", back.path):
        found = read_settings(folder)
        assert SOURCE.items() <= found.items(), folder
        assert set(end_ids(found)) == {40, 2}, folder
    assert load_chat_model(tuned.path).tokenizer.stop_ids == {40, 2}


def test_averaged_weights_end_where_the_others_do(tmp_path: Path) -> None:
    run = save_checkpoint(tmp_path / "run", small_tokenizer(generation=SOURCE | {"eos_token_id": [9]}))
    with CheckpointWriter(tmp_path / "averaged", run.config) as writer:
        for name, tensor in run.tensors():
            writer.add(name, tensor)
            writer.add(f"ema.{name}", tensor, "ema")
        for name, path in run.files().items():
            if name != "config.json":
                writer.add_file(name, path.read_bytes())
    assert chatmill(["export", str(tmp_path / "averaged"), str(tmp_path / "out"), "--ema"]) == 0
    assert ends_of(tmp_path / "out") == ((2, 0, 9), (2, 0, 9))
    assert SOURCE.items() <= json_of(tmp_path / "out" / "generation_config.json").items()


def test_a_checkpoint_of_0_1_is_exported_with_its_ends(tmp_path: Path) -> None:
    """It has no generation settings, and its config names no end or the first one only."""
    old = save_checkpoint(tmp_path / "old", small_tokenizer(), leave_out="generation_config.json", eos_token_id=0)
    assert "generation_config.json" not in old.files()
    export_hf(old, tmp_path / "out")
    assert ends_of(tmp_path / "out") == ((2, 0), (2, 0))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [2, 0] and model.config.eos_token_id == [2, 0]


def test_gguf_names_every_end_where_llama_cpp_and_ollama_look(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tokenizer = small_tokenizer(generation=SOURCE | {"eos_token_id": [2, 0, 1, 9]})
    checkpoint = save_checkpoint(tmp_path / "c", tokenizer)
    export_gguf(checkpoint, tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    ends = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")}
    assert ends == {"eos": 0, "eot": 2, "eom": 1}  # eos is what templates print
    assert fields["tokenizer.ggml.eos_token_ids"] == [2, 0, 1, 9]
    assert fields["general.sampling.temp"] == pytest.approx(0.6) and fields["general.sampling.top_k"] == 20
    assert fields["general.sampling.penalty_repeat"] == pytest.approx(1.05) and "general.sampling.min_p" not in fields
    back = ChatTokenizer.load(import_gguf(tmp_path / "m.gguf", tmp_path / "back").path)
    assert back.stop_ids == tokenizer.stop_ids == {0, 1, 2, 9}
    assert sampling_of(back.generation) == sampling_of(SOURCE)


def test_the_settings_end_replies_but_do_not_change_what_is_trained(tmp_path: Path) -> None:
    """A mask that followed the settings would differ between a data set and its model."""
    plain, more = small_tokenizer(), small_tokenizer(generation={"eos_token_id": [9]})
    assert more.turn_ends == plain.turn_ends == {0, 2} and more.stop_ids == {0, 2, 9}
    assert more.fingerprint == plain.fingerprint
    more.save(tmp_path)
    assert ChatTokenizer.load(tmp_path).stops == (2, 0, 9)


@pytest.mark.parametrize("text", ["[1]", "{", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}'])
def test_settings_that_cannot_be_right_are_refused_by_name(text: str, tmp_path: Path) -> None:
    small_tokenizer().save(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        ChatTokenizer.load(tmp_path)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "max_new_tokens": 9}, {}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            {"temperature": 0.6, "top_p": 0.9, "top_k": None, "min_p": None},
        ),
        ({"top_k": 20}, {"temperature": 1.0, "top_p": None, "top_k": 20, "min_p": None}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0, "top_p": None, "top_k": None, "min_p": None}),
        ({"do_sample": True, "top_k": 0}, {"temperature": 1.0, "top_p": None, "top_k": None, "min_p": None}),
    ],
)
def test_sampling_is_read_as_transformers_means_it(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sampling_of(settings) == expected


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"top_k": 1.5}, {"top_p": "0.9"}, {"min_p": float("nan")}])
def test_sampling_that_is_none_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: .*" + next(iter(settings))):
        sampling_of(settings)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    """A model whose makers sample it at temperature 0.6 from 20 tokens."""
    folder = tmp_path_factory.mktemp("sampled") / "c"
    return load_chat_model(save_checkpoint(folder, small_tokenizer(generation=SOURCE)).path)


def test_the_command_line_comes_before_the_model_and_the_model_before_our_defaults(sampled: ChatModel) -> None:
    assert Settings.of(sampled, {}).sampling == Sampling(0.6, 20, None, None, 1.05)
    assert Settings.of(sampled, {"temperature": 0.0, "top_k": 0}).sampling == Sampling(0.0, 0, None, None, 1.05)
    assert Settings().sampling == Sampling(0.7, None, 0.95, None, 1.0)


def test_the_server_takes_the_settings_of_the_model_where_a_request_has_none(sampled: ChatModel) -> None:
    def ask(**fields: Any) -> ChatRequest:
        return ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}], **fields})

    assert ask().sampling(sampling_of(sampled.tokenizer.generation)) == Sampling(0.6, 20, None, None, 1.05)
    assert ask(top_p=0.5, temperature=0).sampling(sampling_of(SOURCE)) == Sampling(0.0, 20, 0.5, None, 1.05)
    assert ask().sampling({}) == Sampling(1.0)


def test_generate_passes_on_only_what_was_given(sampled: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatmill.trainer.chat import terminal

    seen: list[Sampling] = []

    def reply(*arguments: Any, sampling: Sampling, **options: Any) -> None:
        seen.append(sampling)

    monkeypatch.setattr(terminal, "reply_to", reply)
    assert chatmill(["generate", str(sampled.path), "hi"]) == 0
    assert chatmill(["generate", str(sampled.path), "hi", "--top-p", "0.4", "--repetition-penalty", "1"]) == 0
    assert seen == [Sampling(0.6, 20, None, None, 1.05), Sampling(0.6, 20, 0.4, None, 1.0)]
