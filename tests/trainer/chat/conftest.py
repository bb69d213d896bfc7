"""One tiny model, and one server of it per test file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chatmill.data.tokenizer.tokenizer import train_bpe
from chatmill.trainer.chat.chat_model import ChatModel
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.model.decoder import Decoder

if TYPE_CHECKING:
    from .server import Served


@pytest.fixture(scope="module")
def chat_model() -> ChatModel:
    tokenizer = train_bpe(iter(["hello there, how are you? I am fine."] * 20), 300)
    shape = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "context": 512}
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **shape))
    model.init_weights(3)
    model.eval().requires_grad_(False)
    return ChatModel(model, tokenizer, Path("tiny"), "tiny")


@pytest.fixture(scope="module")
def served(chat_model: ChatModel) -> Iterator[Served]:
    from chatmill.trainer.chat.serve.app import Limits
    from chatmill.trainer.chat.serve.batcher import Batcher

    from .server import Served  # skips where the extra `serve` is missing

    server = Served(Batcher(chat_model, max_active=4, max_waiting=300), limits=Limits(max_body_bytes=20_000))
    yield server
    server.close()
