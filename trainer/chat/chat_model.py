"""A checkpoint ready to answer: weights on the best device, and its own tokenizer.

chat = load_chat_model("runs/demo")
print(reply_to(chat.model, chat.tokenizer, [{"role": "user", "content": "Hi!"}]).text)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from chatmill.config import ConfigError

from ...data.tokenizer.generation_settings import end_ids
from ...data.tokenizer.tokenizer import ChatTokenizer
from ..adapters.merging import open_model
from ..model.decoder import Decoder


@dataclass(frozen=True, slots=True)
class ChatModel:
    """name: the checkpoint's or its run's folder name, for people."""

    model: Decoder
    tokenizer: ChatTokenizer
    path: Path
    name: str


def load_chat_model(checkpoint: str | Path, device: str | None = None) -> ChatModel:
    """Open a checkpoint or run folder for generation: bf16 on a GPU, fp32 on a CPU.

    Raises ConfigError if it is missing or damaged, has no chat template, or its tokenizer has ids that the model lacks.
    """
    found = open_model(checkpoint)
    found.check_model()
    tokenizer = ChatTokenizer.load(found.path)
    if tokenizer.vocab_size > found.config.vocab_size:
        raise ConfigError(
            f"{found.path}: its tokenizer has {tokenizer.vocab_size} entries, its model {found.config.vocab_size}.\n"
            "They do not belong together; put the tokenizer files of the training into the folder."
        )
    if tokenizer.template_source is None:
        raise ConfigError(
            f"{found.path}: no chat template (chat_template.jinja), so it is unknown how to put a question to it."
        )
    if ends := set(end_ids({"eos_token_id": found.config.eos_token_id})) - tokenizer.stop_ids:  # of an import by 0.1
        tokenizer = tokenizer.with_settings({**tokenizer.generation, "eos_token_id": [*tokenizer.stops, *sorted(ends)]})
    tokenizer.use_todays_date()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = Decoder(found.config)
    found.load_into(model)
    model.to(device=place, dtype=torch.bfloat16 if place.type == "cuda" else torch.float32)
    model.eval().requires_grad_(False)
    resolved = found.path.resolve()
    name = resolved.parent.parent.name if resolved.parent.name == "checkpoints" else resolved.name
    return ChatModel(model, tokenizer, found.path, name)
