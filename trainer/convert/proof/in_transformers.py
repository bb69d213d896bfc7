"""The side of a Hugging Face folder or a PEFT folder in a proof: transformers, in fp32 on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatmill.config import ConfigError

from ...checkpoint.checkpoint import Checkpoint
from ..tokenizer_class import AS_IT_IS
from .cases import Answer, Case


def ask(
    folder: Path, base: Checkpoint | None, as_it_is: bool, texts: Sequence[str], cases: Sequence[Case], tokens: int
) -> tuple[list[list[int]], list[Answer]]:
    """(ids of each text, answer to each case, with the logits of the whole vocabulary).

    base: what a PEFT folder's adapter changes; then `folder` is loaded on it with peft. as_it_is: read tokenizer.json with the
    class that changes nothing, as `chatmill export` recommends where AutoTokenizer would. Raises ConfigError.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError("proving a Hugging Face folder needs transformers: pip install transformers") from None
    with tempfile.TemporaryDirectory(prefix="chatmill-proof-") as scratch:
        try:
            model = _model(transformers, folder, base, Path(scratch))
            loader = getattr(transformers, AS_IT_IS if as_it_is or base is not None else "AutoTokenizer")
            tokenizer = loader.from_pretrained(folder if base is None else Path(scratch) / "base")
        except ConfigError:
            raise
        except Exception as error:  # transformers and peft raise whatever comes up
            raise ConfigError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], [
            _answer(model, tokenizer, case, tokens) for case in cases
        ]


def _model(transformers: Any, folder: Path, base: Checkpoint | None, scratch: Path) -> Any:
    load = transformers.AutoModelForCausalLM.from_pretrained
    if base is None:
        return load(folder, dtype=torch.float32).eval()
    try:
        import peft
    except ImportError:
        raise ConfigError("proving a PEFT folder needs peft: pip install peft") from None
    from ..hf import export_hf

    export_hf(base, scratch / "base", dtype="fp32")
    return peft.PeftModel.from_pretrained(load(scratch / "base", dtype=torch.float32), folder).eval()


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, case: Case, tokens: int) -> Answer:
    text: str | None = None
    ids = case.ids
    if case.messages is None:
        ids = tokenizer(case.text, add_special_tokens=False)["input_ids"]
    elif tokenizer.chat_template is not None:
        asked = list(case.messages)
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    rows = case.logits.shape[0]
    whole = torch.tensor([(case.ids + case.reply)[: len(case.ids) + rows - 1]])
    logits: Tensor = model(whole).logits[0, len(case.ids) - 1 :].float()
    most = min(tokens, len(case.reply) + case.ended)
    prompt = torch.tensor([case.ids])
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, **plain)[0].tolist()[
        len(case.ids) :
    ]
    return Answer(list(ids), text, _before_end(made, model.generation_config.eos_token_id), logits)


def _before_end(reply: list[int], ends: Any) -> list[int]:
    last = {ends} if isinstance(ends, int) else set(ends or ())
    return next((reply[:at] for at, token in enumerate(reply) if token in last), reply)
