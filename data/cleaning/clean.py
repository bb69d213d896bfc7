"""Cleaning rules. `clean.*` of the recipe turns each on or off; each counts what it does and keeps a few examples.

    cleaner = Cleaner(CleanSection()); conversation = cleaner.apply(conversation, ledger)   # None: dropped

Three kinds, in this order: text rules rewrite a turn's content, turn rules drop single turns, dialogue rules drop whole
dialogues. No rule changes or judges fenced code. Joiners inside emoji and Persian or Indic words (U+200C, U+200D) always
survive.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace

from chatmill.config import ConfigError

from ..conversation import Conversation, Turn
from ..ledger import Ledger
from ..preference import REJECTED, with_rejected
from ..recipe import CleanSection, StopWordSection
from . import phrases_chinese as chinese
from .chinese import chinese_rule
from .fences import has_fence, prose, split_fences
from .html_text import html_to_text, looks_like_html
from .language import CHINESE_SCRIPTS, chosen_languages, detector
from .phrases import BOILERPLATE, BOT, BOT_NAMES, DELETED, PROVIDER_ERROR, PROVIDER_IDENTITY, REFUSAL
from .placeholders import placeholder
from .privacy import Privacy
from .repetition import character_runs, repetition_reason
from .scripts import chinese_script, weight
from .stop_words import known_languages, only_stop_words, stop_words, strip_rule

# In the meta of a conversation: the turns before which others were dropped, by an importer or in cleaning. What stands there
# answers something that is gone, so data/samples/pair.py cuts the dialogue there.
CUTS = "cut_before"

TextRule = Callable[[str], str]
TurnRule = Callable[[Turn], str | None]
DialogueRule = Callable[[Conversation], str | None]

# Control characters except tab and line feed; zero-width space, word joiner, BOM, soft hyphen, direction marks; lone
# surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\u00ad\ud800-\udfff]")
# Chinese text begins right after an address; Chinese characters belong to it only at the start of a part of its path.
_URL_SIGN = "[^\\s<>\"'()\\[\\]\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uff00-\uffef\u2018-\u201d\u2026]"
_URL = re.compile(rf"(?<![A-Za-z0-9])(?:https?://|www\.)(?:{_URL_SIGN}|(?<=[/=#_])[\u4e00-\u9fff]+)*(?<![.,;:!?])", re.I)
_BLANK_LINES = re.compile(r"\n{4,}")


def normalise_newlines_and_controls(text: str) -> str:
    """CRLF and lone CR to LF, Unicode line separators to LF, other control and invisible marks removed."""
    if text.replace("\n", "").isprintable():  # none of what is looked for is
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n")
    return _CONTROL.sub("", text)


def trim_whitespace(text: str) -> str:
    """No spaces at line ends, at most two blank lines in a row."""
    text = "\n".join(map(str.rstrip, text.replace("\u00a0", " ").split("\n")))
    return _BLANK_LINES.sub("\n\n\n", text) if "\n\n\n\n" in text else text


def nfc(text: str) -> str:
    """Unicode canonical composition."""
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


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
        raise ConfigError(
            "clean.mojibake needs the package ftfy (pip install 'chatmill[data]'), or set clean.mojibake=false"
        ) from error
    return lambda text: str(ftfy.fix_encoding(text)) if badness.is_bad(text) else text


def language_rule(languages: list[str], score: float) -> DialogueRule:
    """Drops dialogues whose supervised text is in another language with at least this score. Short texts pass."""
    detect, wanted = detector("clean.languages", "set it to []"), chosen_languages(languages)

    def rule(conversation: Conversation) -> str | None:
        text = " ".join(prose(text) for text in _learned(conversation))
        found = detect(text)
        if found is None or found[0] in wanted or found[1] < score:
            return None
        script = chinese_script(text) if found[0] == "zh" else None
        if found[0] == "zh" and (script in wanted or (script is None and wanted & CHINESE_SCRIPTS)):
            return None
        return f"language {script or found[0]}"

    return rule


def repeated_line_share(text: str) -> float:
    """Share of the non-blank lines that already occurred above; 0 for texts of fewer than 8 lines."""
    if text.count("\n") < 7:
        return 0.0
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return 1 - len(set(lines)) / len(lines) if len(lines) >= 8 else 0.0


def _apply(parts: list[tuple[bool, str]], rule: TextRule) -> list[tuple[bool, str]]:
    """The rule on the prose of a text cut at its fences."""
    if len(parts) == 1 and not parts[0][0]:
        return [(False, rule(parts[0][1]))]
    return [(is_code, part if is_code else _between(part, rule)) for is_code, part in parts]


def _between(part: str, rule: TextRule) -> str:
    """The rule applied next to fences; it keeps at least the line feeds that separate the text from them."""
    core = part.strip("\n")
    if not core:
        return part
    start = part.index(core)
    after = rule(core)
    return part[:start] + after + part[start + len(core) :] if after else "\n"


def _join(parts: list[tuple[bool, str]]) -> str:
    return "".join(part for _, part in parts)


class Cleaner:
    """The rules that a CleanSection switches on."""

    def __init__(self, config: CleanSection) -> None:
        self.text_rules = _text_rules(config)
        self.strip = config.whitespace
        self.stop_words = None if config.stop_words is None else _StopWords(config.stop_words)
        self.privacy = Privacy(config.privacy)
        self.turn_rules: list[TurnRule] = _turn_rules(config)
        self.dialogue_rules: list[DialogueRule] = _dialogue_rules(config)

    def apply(self, conversation: Conversation, ledger: Ledger) -> Conversation | None:
        """The cleaned conversation, or None when a rule dropped it, or one of the two dialogues of a preference pair."""
        if REJECTED not in conversation.meta:
            return self._dialogue(conversation, ledger)
        aside = Ledger("conversations")
        worse = self._dialogue(with_rejected(conversation), aside)
        if worse is None or worse.turns[-1].role != "assistant":
            reason = next(iter(aside.dropped), "turn dropped")
            ledger.drop(f"rejected reply: {reason}", f"{conversation.origin}: {conversation.meta[REJECTED]}")
            return None
        better = self._dialogue(conversation, ledger)
        return better and replace(better, meta={**better.meta, REJECTED: worse.turns[-1].content})

    def _dialogue(self, conversation: Conversation, ledger: Ledger) -> Conversation | None:
        turns, cuts, gap = list[Turn](), list[int](), False
        given = set(conversation.meta.get(CUTS, ()))
        strip, turn_rules = list[tuple[str, TextRule]](), self.turn_rules
        if self.stop_words is not None:
            strip, judges = self.stop_words.rules_for(conversation)
            turn_rules = [*turn_rules, *judges]
        for number, turn in enumerate(conversation.turns):
            gap = gap or number in given
            cleaned = self._thought(self._text(turn, self.text_rules, conversation, ledger), conversation, ledger)
            reason = next((r for r in (rule(cleaned) for rule in turn_rules) if r), None)
            if strip and reason is None:  # after the turn rules, which judge what was said
                cleaned = self._text(cleaned, strip, conversation, ledger)
                reason = next((r for r in (rule(cleaned) for rule in self.turn_rules) if r), None)
            if reason is None:
                cuts += [len(turns)] if gap else []
                turns.append(cleaned)
                gap = False
            else:
                gap = gap or turn.role != "system"
                ledger.change(f"turn: {reason}", f"{conversation.origin}: {cleaned.content or turn.content}")
        turns = self._private(turns, ledger)
        result = replace(conversation, turns=tuple(turns)) if tuple(turns) != conversation.turns else conversation
        if cuts or given:
            result = replace(result, meta={**result.meta, CUTS: cuts})
        for rule in self.dialogue_rules:
            reason = rule(result)
            if reason is not None:
                said = " / ".join(t.content for t in (turns or conversation.turns)[:4])
                ledger.drop(reason, f"{conversation.origin}: {said}")
                return None
        ledger.keep()
        return result

    def _private(self, turns: list[Turn], ledger: Ledger) -> list[Turn]:
        """The turns without private data, in what is said and in the thoughts beside it."""
        thoughts = [Turn("assistant", turn.reasoning) for turn in turns if turn.reasoning is not None]
        found = self.privacy.apply([*turns, *thoughts], lambda kind: ledger.change(f"private: {kind}"))
        rest = iter(found[len(turns) :])
        return [
            turn if turn.reasoning is None else replace(turn, reasoning=next(rest).content)
            for turn in map(_with_whole_calls, found[: len(turns)])
        ]

    def _thought(self, turn: Turn, conversation: Conversation, ledger: Ledger) -> Turn:
        """The turn with its thought cleaned by the rules on texts."""
        if turn.reasoning is None:
            return turn
        cleaned = self._text(Turn("assistant", turn.reasoning), self.text_rules, conversation, ledger).content
        return replace(turn, reasoning=cleaned or None)

    def _text(self, turn: Turn, rules: list[tuple[str, TextRule]], conversation: Conversation, ledger: Ledger) -> Turn:
        text, done = turn.content, 0
        while done < len(rules) and text and not has_fence(text):
            name, rule = rules[done]
            if (after_rule := rule(text)) != text:
                ledger.change(f"text: {name}", f"{conversation.origin}: {text}")
                text = after_rule
            done += 1
        # Code stays code: prose that a rule has changed is split again on its own, so it cannot open a fence around code.
        parts = split_fences(text)
        for name, rule in rules[done:]:
            after = _apply(parts, rule)
            if after != parts:
                ledger.change(f"text: {name}", f"{conversation.origin}: {_join(parts)}")
                parts = [piece for is_code, part in after for piece in ([(True, part)] if is_code else split_fences(part))]
        if self.strip and parts:
            if not parts[0][0]:
                parts[0] = (False, parts[0][1].lstrip())
            if not parts[-1][0]:
                parts[-1] = (False, parts[-1][1].rstrip())
        text = _join(parts)
        return turn if text == turn.content else replace(turn, content=text)


def _with_whole_calls(turn: Turn) -> Turn:
    """The turn; if a rule has broken its calls of tools, they are words like others."""
    try:
        broken = turn.calls > 0 and not all(isinstance(call, dict) for call in turn.tool_calls)
    except ValueError:
        broken = True
    return replace(turn, calls=0) if broken else turn


class _StopWords:
    """Rules whose words depend on the language of the dialogue."""

    def __init__(self, config: StopWordSection) -> None:
        self.config = config
        self.known = known_languages()
        self.given = stop_words(config.languages) if config.languages else None
        self.detect = None if config.languages else detector("clean.stop_words without languages", "name them: [en]")

    def rules_for(self, conversation: Conversation) -> tuple[list[tuple[str, TextRule]], list[TurnRule]]:
        """(text rules that come last, turn rules) for one dialogue; none where its language is unknown or has no list."""
        words = self.given
        if words is None:
            assert self.detect is not None
            found = self.detect(" ".join(prose(turn.content) for turn in conversation.turns))
            words = stop_words([found[0]]) if found and found[0] in self.known else frozenset()
        if not words:
            return [], []
        chosen = words

        def judge(turn: Turn) -> str | None:
            return "nothing but stop words" if turn.role != "system" and only_stop_words(turn.content, chosen) else None

        strip: list[tuple[str, TextRule]] = [("stop words", strip_rule(words))] if self.config.strip else []
        return strip, [judge] if self.config.drop_turns else []


def _text_rules(config: CleanSection) -> list[tuple[str, TextRule]]:
    rules: list[tuple[str, TextRule]] = []
    if config.mojibake:
        rules.append(("mojibake", mojibake_rule()))
    if config.html:
        rules.append(("HTML", lambda text: html_to_text(text) if looks_like_html(text) else text))
    if config.control_characters:
        rules.append(("control characters", normalise_newlines_and_controls))
    if config.nfc:
        rules.append(("not in NFC", nfc))
    if config.boilerplate or config.strip_lines:
        rules.append(
            (
                "boilerplate line",
                strip_lines_rule([*((*BOILERPLATE, *chinese.BOILERPLATE) if config.boilerplate else ()), *config.strip_lines]),
            )
        )
    if config.urls == "replace":
        rules.append(("URL", lambda text: _URL.sub("[URL]", text)))
    if config.chinese is not None:
        rules.append((f"Chinese {config.chinese}", chinese_rule(config.chinese)))
    if config.whitespace:
        rules.append(("whitespace", trim_whitespace))
    return rules


def _turn_rules(config: CleanSection) -> list[TurnRule]:
    rules: list[TurnRule] = []
    low = config.min_turn_chars
    if config.drop_deleted:
        rules.append(lambda turn: "deleted or left out by the exporter" if _is_deleted(turn.content) else None)
        system = chinese.SYSTEM_LINE
        rules.append(lambda turn: "a line of the chat program" if system.fullmatch(chinese.plain(turn.content)) else None)
    if config.drop_bots:
        rules.append(lambda turn: "a bot's message" if _is_bot(turn) else None)
    if config.drop_provider_errors:
        rules.append(lambda turn: "a provider's error message" if _is_provider_error(turn.content) else None)
    if config.drop_empty_turns:
        rules.append(lambda turn: None if turn.content.strip() else "empty")
    if low:
        rules.append(lambda turn: f"shorter than {low} characters" if weight(turn.content) < low else None)
    return rules


def _is_deleted(text: str) -> bool:
    return DELETED.fullmatch(text) is not None or placeholder(text) in ("media", "deleted")


def _is_provider_error(text: str) -> bool:
    return PROVIDER_ERROR.fullmatch(text) is not None or chinese.PROVIDER_ERROR.fullmatch(chinese.plain(text)) is not None


def _is_bot(turn: Turn) -> bool:
    name = (turn.name or "").lower()
    return name in BOT_NAMES or name in chinese.BOT_NAMES or _SAYS_BOT(prose(turn.content))


def _dialogue_rules(config: CleanSection) -> list[DialogueRule]:
    rules: list[DialogueRule] = [lambda c: None if c.turns else "nothing left"]
    low, high, turn_high = config.min_dialogue_chars, config.max_dialogue_chars, config.max_turn_chars

    def by_length(c: Conversation) -> str | None:
        total = sum(len(turn.content) for turn in c.turns)
        if total < low and sum(weight(turn.content) for turn in c.turns) < low:
            return f"shorter than {low} characters"
        if high is not None and total > high:
            return f"longer than {high} characters"
        if turn_high is not None and not c.is_document and any(len(turn.content) > turn_high for turn in c.turns):
            return f"a turn longer than {turn_high} characters"
        return None

    rules.append(by_length)
    # The remaining rules judge what would be learned: the assistant's turns.
    if config.max_repeated_line_share is not None:
        limit = config.max_repeated_line_share
        rules.append(_learned_rule("repeated lines", lambda text: repeated_line_share(text) > limit))
    if config.max_character_run is not None:
        rules.append(_learned_rule("one character over and over", character_runs(config.max_character_run)))
    if config.repetition is not None:
        limits = config.repetition
        rules.append(lambda c: next((r for r in (repetition_reason(prose(t), limits) for t in _learned(c)) if r), None))
    if config.drop_refusals:
        rules.append(_learned_rule("refusal", _says(REFUSAL, chinese.REFUSAL)))
    if config.drop_provider_identity:
        rules.append(_learned_rule("provider identity", _says(PROVIDER_IDENTITY, chinese.PROVIDER_IDENTITY)))
    rules += [_pattern_rule(pattern, _compile("clean.drop_patterns", pattern)) for pattern in config.drop_patterns]
    if config.languages:
        rules.append(language_rule(config.languages, config.language_score))
    return rules


def _learned_rule(name: str, breaks: Callable[[str], bool]) -> DialogueRule:
    return lambda c: name if any(breaks(prose(text)) for text in _learned(c)) else None


def _says(english: re.Pattern[str], in_chinese: re.Pattern[str]) -> Callable[[str], bool]:
    """Does a text say this, in English or, whatever the width and script of its characters, in Chinese?"""

    def said(text: str) -> bool:
        plain = chinese.plain(text)
        return english.search(plain) is not None or (plain.isascii() is False and in_chinese.search(plain) is not None)

    return said


def _compile(field: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{field}: {pattern!r} is not a regular expression ({error})") from error


def _pattern_rule(name: str, pattern: re.Pattern[str]) -> DialogueRule:
    return lambda c: f"pattern {name}" if any(pattern.search(prose(turn.content)) for turn in c.turns) else None


def _learned(conversation: Conversation) -> list[str]:
    return [turn.content for turn in conversation.turns if turn.role == "assistant" and turn.loss]


_SAYS_BOT = _says(BOT, chinese.BOT)
