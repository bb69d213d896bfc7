"""What an export says about generation: the tokens that end a reply, and the sampling settings of the source.

    found = endings(checkpoint)
    found.stops, found.settings()          # for config.json and generation_config.json

A reply ends where `chatmill generate` ends it: at the template's end of turn, the tokenizer's eos_token, and every token that
the source's generation_config.json or config.json names. The end of turn comes first, for programs that read one token only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...data.tokenizer.budget import TemplateRefusedError
from ...data.tokenizer.generation_settings import end_ids, read_settings, with_ids
from ...data.tokenizer.tokenizer import ChatTokenizer
from ..checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Endings:
    """stops: the tokens that end a reply. eos: the tokenizer's eos_token, which templates print; else the first of stops.

    source: the settings of the checkpoint's generation_config.json.
    """

    stops: tuple[int, ...]
    bos: int | None
    eos: int | None
    pad: int | None
    source: Mapping[str, Any]

    def settings(self) -> dict[str, Any]:
        """generation_config.json of an export."""
        return with_ids(self.source, self.stops, self.bos, self.pad)


def endings(checkpoint: Checkpoint) -> Endings:
    """What the checkpoint's tokenizer, template, generation settings and config say together. Raises ConfigError."""
    config, source, tokenizer = checkpoint.config, read_settings(checkpoint.path), None
    if "tokenizer.json" in checkpoint.files():
        try:
            tokenizer = ChatTokenizer.load(checkpoint.path)
        except TemplateRefusedError:  # nothing here can use the template, so it ends no reply either
            tokenizer = ChatTokenizer.load(checkpoint.path, use_template=False)
    named = end_ids({"eos_token_id": config.eos_token_id})
    ends = (*(tokenizer.stops if tokenizer is not None else end_ids(source)), *named)
    stops = tuple(dict.fromkeys(ends))
    first = stops[0] if stops else None
    if tokenizer is None:
        return Endings(stops, config.bos_token_id, named[0] if named else first, config.pad_token_id, source)
    return Endings(
        stops,
        config.bos_token_id if tokenizer.bos_id is None else tokenizer.bos_id,
        first if tokenizer.eos_id is None else tokenizer.eos_id,
        config.pad_token_id if (pad := tokenizer.named_id("pad_token")) is None else pad,
        source,
    )
