"""Which fields of a request are honoured, harmless or refused. docs/serving.md holds the same table (a test compares them).

    refuse_fields(raw, known)         RequestError 400 for the first field that would change the answer and is not honoured

Honoured are the fields of the request classes (protocol.py). Harmless ones cannot change the answer of this server, whatever
their value. Every other field is refused by name, because an answer that ignores it looks right and is not; a value that asks
for what happens anyway (NEUTRAL) passes, and so does null.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from .errors import RequestError

HARMLESS = {
    "user": "names who asks",
    "safety_identifier": "names who asks",
    "metadata": "is stored, and nothing is stored here",
    "store": "nothing is stored here",
    "service_tier": "there is one",
    "prompt_cache_key": "the cache finds equal beginnings by itself",
    "prompt_cache_retention": "the cache finds equal beginnings by itself",
    "prompt_cache_options": "the cache finds equal beginnings by itself",
    "cache_prompt": "llama.cpp; the cache finds equal beginnings by itself",
    "cache_salt": "vLLM; the cache finds equal beginnings by itself",
    "prediction": "a guess that may save time",
    "priority": "vLLM; requests are served in order of arrival",
    "request_id": "vLLM; names the request",
}
REFUSED = {
    "functions": "give tools",
    "function_call": "give tool_choice",
    "audio": "only text comes out",
    "modalities": "only text comes out",
    "moderation": "nothing is moderated here",
    "reasoning_effort": "a template may offer it: see chat_template_kwargs",
    "verbosity": "the model has no such setting; ask for it in a message",
    "web_search_options": "nothing is searched",
    "best_of": "ask for n replies with logprobs and choose",
    "suffix": "the model only continues texts",
    "skip_special_tokens": "special tokens are never part of a reply",
    "add_generation_prompt": "the template always opens the reply",
    "continue_final_message": "the template always opens the reply; /v1/completions continues a text",
    "include_stop_str_in_output": "a stop string is never part of a reply",
    "use_beam_search": "replies are sampled",
    "length_penalty": "it belongs to beam search",
}
NEUTRAL: Mapping[str, Collection[Any]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "best_of": (1,),
    "suffix": ("",),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_stop_str_in_output": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
}
# What other servers call the fields, where the spelling does not lead there.
OTHER_NAMES = {
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "min_new_tokens": "min_tokens",
    "repeat_penalty": "repetition_penalty",
    "typical_p": "min_p",
    "eos_token_id": "stop_token_ids",
    "random_seed": "seed",
    "best_of": "n",
    "grammar": "response_format",
    "guided_json": "response_format",
    "json_schema": "response_format",
    "format": "response_format",
    "structured_outputs": "response_format",
    "enable_thinking": "chat_template_kwargs",
    "n_probs": "logprobs",
    "system": "messages",
    "input": "messages",
}
SHOWN = 100  # characters of a name that a client made up


def refuse_fields(raw: Mapping[str, Any], known: Collection[str], elsewhere: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a request that are honoured and given. known: those of this endpoint; elsewhere: of the other one.

    Raises RequestError for the first one that would change the answer and is not honoured.
    """
    given: dict[str, Any] = {}
    for name, value in raw.items():
        if value is None or name in HARMLESS:
            continue
        if name in known:
            given[name] = value
        elif not _is_neutral(name, value):
            raise _refusal(name, known, elsewhere)
    return given


def _is_neutral(name: str, value: Any) -> bool:
    # type by type: in Python, True equals 1
    return any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL.get(name, ()))


def _refusal(name: str, known: Collection[str], elsewhere: Collection[str]) -> RequestError:
    shown = name if len(name) <= SHOWN else name[:SHOWN] + "..."
    if name in REFUSED:
        text = f"Unsupported parameter: {shown!r} ({REFUSED[name]})."
        return RequestError(400, text, param=shown, code="unsupported_parameter")
    if name in elsewhere:
        text = f"Unknown parameter: {shown!r} is a field of the other kind of completion."
        return RequestError(400, text, param=shown, code="unknown_parameter")
    nearest = OTHER_NAMES.get(name)
    if nearest not in known:
        near = difflib.get_close_matches(name[:SHOWN].lower(), sorted({*known, *HARMLESS}), 1, 0.6)
        nearest = near[0] if near else None
    hint = f" Did you mean {nearest!r}?" if nearest else " docs/serving.md lists the fields of this server."
    return RequestError(400, f"Unknown parameter: {shown!r}.{hint}", param=shown, code="unknown_parameter")
