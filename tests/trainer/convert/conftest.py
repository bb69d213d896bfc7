"""A tiny random model, and where npm's node-llama-cpp lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.trainer.checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.convert.proof.llama_cpp import PACKAGE, VARIABLE
from chatmill.trainer.model.decoder import Decoder

MODULES = Path(__file__).parents[3] / ".npm-parsers" / "node_modules"


@pytest.fixture
def llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real llama.cpp; skips where it is not."""
    if shutil.which("node") is None or not (MODULES / PACKAGE).is_dir():
        pytest.skip(f"npm's {PACKAGE} is not here; tests/data/importers/install_npm_parsers.sh fetches it")
    monkeypatch.setenv(VARIABLE, str(MODULES))


@pytest.fixture(scope="session")
def tiny(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Two layers of random weights large enough that a wrong mapping changes the replies."""
    tokenizer = ChatTokenizer.load(tiny_data / "tokenizer")
    config = ModelConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, layers=2, heads=4, kv_heads=2, context=256,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    model = Decoder(config)
    model.init_weights(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
            else:
                parameter.mul_(8)
    folder = tmp_path_factory.mktemp("tiny") / "c"
    with CheckpointWriter(folder, config, {"run": "small"}) as writer:
        for name, parameter in model.named_parameters():
            writer.add(name, parameter.detach())
        for name, data in tokenizer.files().items():
            writer.add_file(name, data)
    return open_checkpoint(folder)
