"""An export is proved where it answers as the checkpoint does, and not where a weight or the template is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from chatmill.launcher.__main__ import main
from chatmill.trainer.checkpoint.checkpoint import Checkpoint
from chatmill.trainer.convert.gguf import exporting
from chatmill.trainer.convert.gguf.exporting import export_gguf
from chatmill.trainer.convert.hf import export_hf
from chatmill.trainer.convert.proof import prove as module
from chatmill.trainer.convert.proof.llama_cpp import VARIABLE
from chatmill.trainer.convert.proof.prove import Proof, prove

QUESTIONS = ("What is this?", "你好吗？")


def quick(checkpoint: Checkpoint, artefact: Path, **more: Any) -> Proof:
    return prove(checkpoint, artefact, questions=QUESTIONS, tokens=6, **more)


def test_a_hugging_face_folder_is_proved_and_a_changed_one_is_not(tiny: Checkpoint, tmp_path: Path) -> None:
    folder = export_hf(tiny, tmp_path / "hf")
    proof = quick(tiny, folder)
    assert proof.holds and proof.largest < 1e-4 and proof.program == "transformers"
    assert (proof.equal_texts, proof.equal_prompts, proof.equal_replies, proof.rendered) == (proof.texts, 2, 2, 2)

    (folder / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text() + "\n!")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name].flip(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    faults = "\n".join(quick(tiny, folder).faults)
    assert "renders another text" in faults and "a logit differs by" in faults and "our logits are" in faults


def test_export_prove_ends_with_code_1_where_the_artefact_differs(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "TOLERANCES", {**module.TOLERANCES, "bf16": 1e-9})
    arguments = ["export", str(tiny.path), "--to", "hf", "--prove", "--quiet"]
    assert main([*arguments[:2], str(tmp_path / "a"), *arguments[2:]]) == 0
    assert "proof in transformers: holds" in capsys.readouterr().out
    assert main([*arguments[:2], str(tmp_path / "b"), *arguments[2:], "--dtype", "bf16"]) == 1
    assert "fault: a logit differs by" in capsys.readouterr().out


def test_without_llama_cpp_it_is_said_what_to_install_before_anything_is_written(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert main(["export", str(tiny.path), str(tmp_path / "m.gguf"), "--to", "gguf", "--prove"]) != 0
    assert "npm install node-llama-cpp" in capsys.readouterr().err and not (tmp_path / "m.gguf").exists()


HALF = [pytest.param(dtype, marks=pytest.mark.exhaustive) for dtype in ("fp16", "bf16")]


@pytest.mark.parametrize("dtype", ["fp32", "q8_0", "q5_0", "q4_0", "mxfp4", *HALF])
def test_llama_cpp_answers_as_the_checkpoint(dtype: str, llama_cpp: None, tiny: Checkpoint, tmp_path: Path) -> None:
    tiny.meta["run"] = "my-Phi-3-and-phi3"  # with this name llama.cpp would want tokens of Phi-3
    file = export_gguf(tiny, tmp_path / "m.gguf", dtype=dtype)
    proof = quick(tiny, file, dtype=dtype)
    assert proof.holds, proof.lines()
    assert (proof.equal_texts, proof.equal_prompts, proof.rendered) == (proof.texts, 2, 2)
    if dtype == "fp32":
        assert proof.largest < 1e-3 and proof.equal_replies == 2


def test_llama_cpp_shows_rows_of_q_in_another_order(
    llama_cpp: None, tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "rotary_heads", lambda name, config: 0)
    faults = quick(tiny, export_gguf(tiny, tmp_path / "m.gguf", dtype="fp32")).faults
    assert any("a logit differs by" in fault for fault in faults)
