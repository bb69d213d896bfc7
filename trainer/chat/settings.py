"""How replies in the terminal and from files are made: sampling, stops, and the JSON schema that they fit.

settings = Settings.of(chat_model, {"temperature": 0.0, "json_schema": "object"})
grammar = grammar_of(chat_model, settings)          # of one reply; copied for each
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError

from ..generation.defaults import sampling_of
from ..generation.grammar import ANY_OBJECT, Grammar, Grammars
from ..generation.prompt import check_text
from ..generation.sampling import Sampling, check_seed
from .chat_model import ChatModel


@dataclass(frozen=True, slots=True)
class Settings:
    """What /params changes, and the strings that end a reply. seed None: every reply differs; top_k 0 is off, as None is.

    `of` knows the settings that come with a model; those here stand where it has none.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float | None = 0.95
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    json_schema: str | None = None  # what the user typed: a schema, a file, or `object`

    def __post_init__(self) -> None:
        _ = self.schema
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: expected at least 1.")
        if self.min_tokens > self.max_new_tokens:
            raise ConfigError(f"min_tokens={self.min_tokens}: more than max_new_tokens={self.max_new_tokens}.")
        for text in self.stop:
            check_text(text, "--stop")
        try:
            check_seed(self.seed)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        _ = self.sampling

    @classmethod
    def of(cls, chat: ChatModel, given: Mapping[str, Any]) -> Settings:
        """The given settings, else the checkpoint's (generation_config.json), else the defaults. Raises ConfigError."""
        return cls(**{**sampling_of(chat.tokenizer.generation), **given})

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema that replies must fit. Raises ConfigError."""
        return None if self.json_schema is None else read_schema(self.json_schema)

    def check_for(self, chat: ChatModel) -> None:
        """Raise ConfigError for ids that the model does not have, and for what contradicts a schema."""
        try:
            self.sampling.check_against(chat.model.config.vocab_size, with_grammar=self.json_schema is not None)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def sampling(self) -> Sampling:
        """The sampling knobs alone."""
        try:
            return Sampling(**{f.name: getattr(self, f.name) for f in fields(Sampling)})
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def changed(self, words: list[str]) -> Settings:
        """With NAME=VALUE words applied; VALUE none switches a knob off."""
        values: dict[str, Any] = {}
        kinds = {f.name: str(f.type) for f in fields(self) if str(f.type).startswith(("int", "float"))}
        for word in words:
            name, sign, text = word.partition("=")
            if name not in kinds or not sign:
                raise ConfigError(f"{word!r}: expected NAME=VALUE with NAME one of {', '.join(kinds)}.")
            try:
                if text.lower() in ("none", "off") and "None" in kinds[name]:
                    values[name] = None
                else:
                    values[name] = int(text) if kinds[name].startswith("int") else float(text)
            except ValueError:
                raise ConfigError(f"{word!r}: {text!r} is not a number.") from None
        return replace(self, **values)


def read_schema(given: str) -> dict[str, Any]:
    """A JSON schema: as text, in a file, or `object` for any object. Raises ConfigError."""
    if given == "object":
        return dict(ANY_OBJECT)
    text, where = given, "--json-schema"
    if not given.lstrip().startswith("{"):
        where = f"--json-schema {given}"
        try:
            text = Path(given).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: expected a schema, a file with one, or `object` ({error}).") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error}).") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected a JSON object such as {{'type': 'object'}}, found {type(found).__name__}.")
    return found


def grammar_of(chat_model: ChatModel, settings: Settings) -> Grammar | None:
    """What replies must follow; None where anything goes. Raises ConfigError for a schema that cannot be enforced."""
    settings.check_for(chat_model)
    if (schema := settings.schema) is None:
        return None
    return Grammars(chat_model.tokenizer, chat_model.model.config.vocab_size).json(schema)
