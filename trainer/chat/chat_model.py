"""A checkpoint ready to answer: weights on the best device, and its own tokenizer.

chat = load_chat_model("runs/demo")
print(reply_to(chat.model, chat.tokenizer, [{"role": "user", "content": "Hi!"}]).text)
groups = load_chat_models([("base", "runs/smollm2"), ("a", "runs/lora-a"), ("b", "runs/lora-b")])     # one model in memory
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from chatmill.config import ConfigError

from ...data.tokenizer.generation_settings import end_ids
from ...data.tokenizer.tokenizer import ChatTokenizer
from ..adapters.merging import MergedCheckpoint, facts_of, merged, open_base, with_base
from ..adapters.shared import same_base, shared_model, why_alone
from ..backends.choose import build_model
from ..checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..model.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class ChatModel:
    """name: the checkpoint's or its run's folder name, for people. variant: of the model, where adapters share it.

    call_form: the form of its calls of tools (data/tokenizer/calls/forms.py); None: what its template says.
    """

    model: LanguageModel
    tokenizer: ChatTokenizer
    path: Path
    name: str
    variant: int = 0
    call_form: str | None = None


def load_chat_model(checkpoint: str | Path, device: str | None = None) -> ChatModel:
    """Open a checkpoint or run folder for generation: bf16 on a GPU, fp32 on a CPU.

    Raises ConfigError if it is missing or damaged, has no chat template, or its tokenizer has ids that the model lacks.
    """
    found = with_base(open_checkpoint(checkpoint))
    return _alone(found, _tokenizer_of(found), device)


def load_chat_models(
    checkpoints: Sequence[tuple[str | None, str | Path]],
    device: str | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[list[ChatModel]]:
    """Open several (name or None, checkpoint); adapters on one base share it in memory, with the base if it is among them.

    Returns the chats by model in memory, in the order in which they were given. on_note: told in a sentence what shares a base,
    and which adapter cannot. Raises ConfigError as load_chat_model does.
    """
    opened, bases = [], {}
    for name, checkpoint in checkpoints:
        on_note(f"loading {checkpoint} ...")
        found = open_checkpoint(checkpoint)
        opened.append((name or name_of(found), found))
        if facts_of(found) is None:
            bases[same_base(found)[0]] = found
    members: dict[object, list[tuple[str, Checkpoint]]] = {}
    for name, found in opened:
        if (facts := facts_of(found)) is not None:
            if facts.mark not in bases:
                bases[facts.mark] = open_base(facts, found.path)
            found = merged(found, bases[facts.mark], facts)
        reason = why_alone(found) if isinstance(found, MergedCheckpoint) else ""
        if reason:
            on_note(f"{name} has a model of its own: {reason}")
        members.setdefault(name if reason else same_base(found), []).append((name, found))
    return [_group(group, device, on_note) for group in members.values()]


def _group(members: list[tuple[str, Checkpoint]], device: str | None, on_note: Callable[[str], None]) -> list[ChatModel]:
    """Chats that can share a base: a model of its own for a single one."""
    tokenizers = [_tokenizer_of(found) for _, found in members]
    adapters = [found for _, found in members if isinstance(found, MergedCheckpoint)]
    if not adapters or len(members) == 1:
        pairs = zip(members, tokenizers, strict=True)
        return [replace(_alone(found, tokenizer, device), name=name) for (name, found), tokenizer in pairs]
    model = _placed(shared_model(adapters), device)
    on_note(f"{' and '.join(name for name, _ in members)} share one base in memory: {adapters[0].base.path}")
    variants = {id(found): number for number, found in enumerate(adapters, 1)}
    return [
        ChatModel(model, tokenizer, found.path, name, variants.get(id(found), 0))
        for (name, found), tokenizer in zip(members, tokenizers, strict=True)
    ]


def _tokenizer_of(found: Checkpoint) -> ChatTokenizer:
    """The tokenizer of a checkpoint whose tensors fit its config.json."""
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
    return tokenizer


def _alone(found: Checkpoint, tokenizer: ChatTokenizer, device: str | None) -> ChatModel:
    model = build_model(found.config)
    found.load_into(model)
    return ChatModel(_placed(model, device), tokenizer, found.path, name_of(found))


def _placed(model: LanguageModel, device: str | None) -> LanguageModel:
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device=place, dtype=torch.bfloat16 if place.type == "cuda" else torch.float32)
    model.eval().requires_grad_(False)
    return model


def name_of(found: Checkpoint) -> str:
    """The folder name of a checkpoint's run, else its own."""
    resolved = found.path.resolve()
    return resolved.parent.parent.name if resolved.parent.name == "checkpoints" else resolved.name
