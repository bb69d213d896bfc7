"""A manifest from elsewhere: refused by name before a file outside is opened or memory is taken for what it says."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chatmill.launcher.__main__ import main as chatmill
from chatmill.trainer.checkpoint.checkpoint import CheckpointError, CheckpointWriter, open_checkpoint
from chatmill.trainer.checkpoint.files import file_facts
from chatmill.trainer.checkpoint.manifest import MANIFEST, manifest_bytes
from chatmill.trainer.config import ModelConfig

CONFIG = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=32, layers=1, heads=2, kv_heads=1)
FILE = "model-00001.safetensors"
Manifest = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with CheckpointWriter(tmp_path / "c", CONFIG, {"step": 1}) as writer:
        writer.add("w", torch.arange(12, dtype=torch.float32).reshape(4, 3))
        writer.add("norm", torch.ones(5))
    return tmp_path / "c"


def change(folder: Path, edit: Callable[[Manifest], Any]) -> None:
    """Edit the manifest and seal it again, as whoever writes a checkpoint can."""
    content = json.loads((folder / MANIFEST).read_text())
    content.pop("checksum")
    edit(content)
    (folder / MANIFEST).write_bytes(manifest_bytes(content))


def rename_file(name: str) -> Callable[[Manifest], None]:
    def edit(m: Manifest) -> None:
        m["files"][name] = m["files"].pop(FILE)
        for entry in m["tensors"].values():
            entry["pieces"][0][0] = name

    return edit


def entry(**fields: Any) -> Callable[[Manifest], None]:
    return lambda m: m["tensors"]["w"].update(fields)


HUGE = 1 << 60
MALFORMED: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "parent": (rename_file("../c/" + FILE), "is not the name of a file in this folder"),
    "dots": (rename_file(".."), "'..' is not the name of a file in this folder"),
    "absolute": (rename_file("/etc/passwd"), "is not the name of a file in this folder"),
    "hidden": (rename_file(".w"), "is not the name of a file in this folder"),
    "itself": (rename_file(MANIFEST), "is not the name of a file in this folder"),
    "unlisted piece": (entry(pieces=[["other.safetensors", 0, 12]]), "'other.safetensors', which is not among the files"),
    "a piece that is no name": (entry(pieces=[[[], 0, 12]]), "tensor w"),
    "pieces twice in a file": (entry(pieces=[[FILE, 0, 6], [FILE, 6, 12]]), "tensor w"),
    "gap": (entry(pieces=[[FILE, 0, 5], [FILE, 6, 12]]), "leave a gap"),
    "negative": (entry(shape=[-4, -3]), "tensor w"),
    "no shape": (entry(shape=None), "tensor w"),
    "true": (entry(shape=[True, 12]), "tensor w"),
    "many dimensions": (entry(shape=[4, 3] + [1] * 40), "tensor w"),
    "dtype": (entry(dtype="complex64"), "tensor w"),
    "huge": (entry(shape=[HUGE, 4], pieces=[[FILE, 0, HUGE * 4]]), f"{FILE} has 196 bytes, its tensors need"),
    "larger than its file": (entry(shape=[1 << 20, 3], pieces=[[FILE, 0, 3 << 20]]), f"{FILE} has 196 bytes, its tensors need"),
    "bytes": (lambda m: m["files"][FILE].update(bytes="224"), f"{FILE} has no size and hash"),
    "no config": (lambda m: m["files"].pop("config.json"), r"config.json: missing from its files"),
    "idle file": (lambda m: m["tensors"].clear(), f"{FILE} holds no tensor"),
    "step": (lambda m: m["meta"].update(step={}), "meta.step is {}"),
    "lists": (lambda m: m.update(files=[]), "meta, files or tensors is missing"),
    "format": (lambda m: m.update(format=True), "checkpoint format True"),
}


@pytest.mark.parametrize(("edit", "words"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_manifest_is_a_named_error(folder: Path, edit: Callable[[Manifest], Any], words: str, capsys) -> None:
    change(folder, edit)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)
    assert (
        chatmill(["checkpoint", "verify", str(folder)]) == 1
        and words.split("'")[0].replace("\\", "") in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (
            {"w": torch.zeros(3, 4), "norm": torch.ones(5)},
            r"w is stored as \[3, 4\], the manifest says rows of \[4, 3\]",
        ),
        ({"w": torch.zeros(4, 3, dtype=torch.int32), "norm": torch.ones(5)}, "tensor w has 12 elements of int32"),
        ({"w": torch.zeros(4, 3), "norm": torch.ones(5), "more": torch.ones(1)}, "tensor more is not in the manifest"),
    ],
    ids=["shape", "dtype", "another tensor"],
)
def test_the_header_of_a_file_must_be_what_the_manifest_says(folder: Path, stored: dict[str, Any], words: str) -> None:
    save_file(stored, folder / FILE)
    change(folder, lambda m: m["files"].update({FILE: file_facts(folder / FILE)}))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder).tensor("w")


def test_a_link_out_of_the_folder_and_a_file_that_nobody_listed_are_named(folder: Path, tmp_path: Path, capsys) -> None:
    shutil.move(folder / FILE, tmp_path / "elsewhere")
    (folder / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{FILE}: a link out of the folder"):
        open_checkpoint(folder)
    shutil.move(tmp_path / "elsewhere", folder / "real.safetensors")
    (folder / FILE).unlink()
    (folder / FILE).symlink_to("real.safetensors")
    assert open_checkpoint(folder).tensor("norm").tolist() == [1.0] * 5
    assert chatmill(["checkpoint", "verify", str(folder)]) == 1
    assert "real.safetensors: not in the manifest" in capsys.readouterr().out


def test_weights_of_a_checkpoint_that_was_replaced_meanwhile_are_never_mixed(folder: Path) -> None:
    opened = open_checkpoint(folder, verify=False)
    old = copy.deepcopy(opened.manifest)
    with CheckpointWriter(folder, CONFIG, {"step": 1}) as writer:  # the same sizes and shapes
        writer.add("w", torch.zeros(4, 3))
        writer.add("norm", torch.zeros(5))
    assert {n: f["bytes"] for n, f in open_checkpoint(folder).manifest["files"].items()} == {
        n: f["bytes"] for n, f in old["files"].items()
    }
    with pytest.raises(CheckpointError, match="was replaced while it was read"):
        opened.tensor("w")
