"""Tokenizer plus chat template: text to ids, dialogues to ids and a loss mask, prompts as `chat` sends them.

    tokenizer = ChatTokenizer.load("runs/smollm2")
    dialogue = tokenizer.encode_dialogue(conversation)     # ids, loss_mask

Contract: for every assistant turn i, `prompt_ids(messages[:i])` is a prefix of the ids of the whole dialogue; the mask is True
from there up to and including the end-of-turn token of the turn, and False elsewhere. `prove_mask` checks it by prefix
rendering. The text is cut at the start of each reply and the pieces are encoded separately, because inference sends the prompt
without the reply: in one piece, a reply that begins with a space would share a token with the prompt. With tokenizers that put
a space before every text (SentencePiece style) this is impossible; there the whole text is encoded and offsets give the
boundaries. Special tokens typed by people are broken up (`escape_special`), in training and in prompts alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from chatmill.config import ConfigError

from ..conversation import Conversation, TokenizedDialogue
from ..preference import REJECTED, with_rejected, without_rejected
from .budget import TemplateRefusedError
from .generation_settings import GENERATION, end_ids, read_settings, to_bytes, with_ids
from .template import TEMPLATES, ChatTemplate, Message

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class ChatTokenizer:
    """A Hugging Face `tokenizers` tokenizer with a chat template. Build one with load() or train_bpe().

    generation: the model's generation_config.json. turn_ends: the tokens that close a reply in the training data.
    stop_ids: those that end a reply when one is generated: turn_ends, and what the generation settings name.
    """

    def __init__(
        self,
        tokenizer_json: str,
        template: str | None,
        config: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        self._json, self.config, self.generation = tokenizer_json, dict(config or {}), dict(generation or {})
        # Without its post-processor the offsets are exact; byte-level post-processors trim spaces off them.
        self._tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer_json) | {"post_processor": None}))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.bos_id, self.eos_id = self.named_id("bos_token"), self.named_id("eos_token")
        pad = self.named_id("pad_token")
        self.pad_id: int = next((i for i in (pad, self.eos_id) if i is not None), 0)
        self.template_source = template
        self._template: ChatTemplate | None = None
        ends: list[int] = []
        if template is not None:
            names = ("bos_token", "eos_token", "pad_token", "unk_token")
            self._template = ChatTemplate(template, {name: _content(self.config.get(name)) for name in names})
            ends += self._end_of_turn(added)
        ends += [] if self.eos_id is None else [self.eos_id]
        self.turn_ends = frozenset(ends)
        self.stops = tuple(dict.fromkeys((*ends, *end_ids(self.generation))))  # what closes a turn comes first
        self.stop_ids = frozenset(self.stops)
        self._guard(added)
        # Does a piece encoded alone decode to itself? Not if the tokenizer prepends a space to every text.
        self._can_cut = self.decode(self.encode("a:\n") + self.encode("Hello")) == "a:\nHello"
        self.tokenizer_sha256 = hashlib.sha256(json.dumps(json.loads(tokenizer_json), sort_keys=True).encode()).hexdigest()
        self.template_sha256 = hashlib.sha256((template or "").encode()).hexdigest()
        self.fingerprint = hashlib.sha256(f"{self.tokenizer_sha256}{self.template_sha256}".encode()).hexdigest()

    # -- folders

    @classmethod
    def load(cls, folder: str | Path, template: str | None = None, use_template: bool = True) -> ChatTokenizer:
        """Read tokenizer.json and what lies beside it: tokenizer_config.json, chat_template.jinja, generation_config.json.

        template: use this source instead. use_template=False: leave it out.
        """
        path = Path(folder)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"tokenizer {path}: no tokenizer.json there. Expected a tokenizer folder or a Chatmill checkpoint."
            )
        try:
            config_file, jinja = path / "tokenizer_config.json", path / "chat_template.jinja"
            config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
            if template is None and use_template:
                template = jinja.read_text(encoding="utf-8") if jinja.is_file() else _config_template(config)
            return cls(file.read_text(encoding="utf-8"), template, config, read_settings(path))
        except ConfigError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
            raise ConfigError(f"tokenizer {path}: cannot be read ({error})") from error

    def with_settings(self, generation: Mapping[str, Any]) -> ChatTokenizer:
        """This tokenizer and template with the generation settings of a model."""
        return ChatTokenizer(self._json, self.template_source, self.config, generation)

    def save(self, folder: str | Path) -> None:
        """Write the files that load() and transformers read."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            (path / name).write_bytes(data)

    def files(self) -> dict[str, bytes]:
        """Name and content of each file of the folder."""
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        files = {"tokenizer.json": self._json, "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
        if self.template_source is not None:
            files["chat_template.jinja"] = self.template_source
        found = {name: text.encode("utf-8") for name, text in files.items()}
        if self.stops or self.generation:
            found[GENERATION] = to_bytes(with_ids(self.generation, self.stops, self.bos_id, self.named_id("pad_token")))
        return found

    # -- text

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no token is added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)
        return text

    def token(self, i: int) -> str:
        """The vocabulary entry of one id."""
        return str(self._tokenizer.id_to_token(int(i)))

    def escape_special(self, text: str) -> str:
        """Insert a space after the first character of special-token strings, so that nobody can type an end of turn."""
        if "\ue000" in text or "\ue001" in text:  # the template's own markers
            text = text.replace("\ue000", "\ufffd").replace("\ue001", "\ufffd")
        text = self._guarded_pattern.sub(lambda match: match[0][0] + " " + match[0][1:], text)
        return self._break_up(text) if self._matches_after_normalizing else text

    def _break_up(self, text: str) -> str:
        """The same for strings that become a guarded token only when the tokenizer normalises them (`<|IM_END|>`)."""
        for attempt in range(len(text) + 2):
            piece = self._tokenizer.encode(text, add_special_tokens=False)
            found = [span for i, span in zip(piece.ids, piece.offsets, strict=True) if i in self._guarded_ids]
            if not found:
                break
            for start, end in reversed(found):
                # A normaliser may drop the space again, and one character may stand for the whole token.
                keep = text[start] + " " if attempt == 0 and end - start > 1 else "\ufffd"
                text = text[:start] + keep + text[start + 1 :]
        return text

    def _guard(self, added: Mapping[int, AddedToken]) -> None:
        """Strings that users cannot type: special tokens, and those of the template that the tokenizer does not call special.

        Of the template: what stands around a user's turn, and what opens and closes a reply. Others stay typable: `<think>`
        is an added token, too, and part of many replies.
        """
        guarded = set(self.special.values()) | self.turn_ends | {i for i in (self.bos_id, self.eos_id) if i is not None}
        plain = {t.content: i for i, t in added.items() if i not in guarded and t.content.strip()}
        if self._template is not None and plain:
            user = [{"role": "user", "content": "\ue0000\ue001"}]
            with contextlib.suppress(TemplateRefusedError):  # it needs other messages; the error comes where it is used
                before, after = self._template.render(user), self._template.render(user, add_generation_prompt=True)
                opening = after[len(before) :] if after.startswith(before) else ""
                first = _any_of(t.content for t in added.values() if t.content.strip()).search(opening)
                found = [*_any_of(plain).finditer(before), *([first] if first else [])]
                guarded |= {plain[match[0]] for match in found if match[0] in plain}
        tokens = [added[i] for i in guarded if i in added]
        self._guarded_ids = frozenset(i for i in guarded if i in added)
        self._guarded_pattern = _any_of(token.content for token in tokens)
        self._matches_after_normalizing = self._tokenizer.normalizer is not None and any(t.normalized for t in tokens)

    # -- dialogues

    @property
    def template(self) -> ChatTemplate:
        """The chat template; ConfigError if the folder has none."""
        if self._template is None:
            raise ConfigError("tokenizer: it has no chat template. Set `template:` in the data recipe (for example chatml).")
        return self._template

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids to send for the next assistant turn, generation prompt included."""
        clean = self._clean(messages)
        text = self.template.render(clean, add_generation_prompt=True)
        _, starts = self.template.reply_starts(clean)
        return self._encode_cut(text, [start for start in starts if start < len(text)])[0]

    def encode_dialogue(self, conversation: Conversation) -> TokenizedDialogue:
        """Ids and loss mask of a dialogue (in a document every token except the first has loss).

        Raises TemplateRefusedError if the template cannot render it, ConfigError if no token would carry loss.
        """
        if conversation.is_document:
            return self._encode_document(conversation)
        if REJECTED in conversation.meta:  # a preference pair: both dialogues, one after the other
            halves = [self.encode_dialogue(half) for half in (without_rejected(conversation), with_rejected(conversation))]
            return TokenizedDialogue(
                conversation.uid, np.concatenate([h.ids for h in halves]), np.concatenate([h.loss_mask for h in halves])
            )
        messages = self._clean([{"role": turn.role, "content": turn.content} for turn in conversation.turns])
        text, starts = self.template.reply_starts(messages)
        return self._supervise(conversation, *self._encode_cut(text, starts))

    def encode_turns(self, conversation: Conversation) -> tuple[TokenizedDialogue, NDArray[np.int32]]:
        """The dialogue and, Int32["L"], the turn that each token belongs to; -1: the template's own tokens.

        A turn has the tokens of its content and the end-of-turn token after it; a supervised reply has all tokens that carry
        its loss.
        """
        dialogue = self.encode_dialogue(conversation)
        turns = np.full(len(dialogue.ids), -1, dtype=np.int32)
        if conversation.is_document:
            turns[1:] = 0
            return dialogue, turns
        messages = self._clean([{"role": turn.role, "content": turn.content} for turn in conversation.turns])
        text, spans = self.template.content_spans(messages)
        pieces, _ = self._encodings(text, self.template.reply_starts(messages)[1])
        lefts, rights = np.array([(at + a, at + b) for at, piece in pieces for a, b in piece.offsets], dtype=np.int64).T
        stops = np.flatnonzero(np.isin(dialogue.ids, list(self.turn_ends)))
        for i, (start, end) in enumerate(spans):
            turns[(lefts < end) & (rights > start)] = i
            following = spans[i + 1][0] if i + 1 < len(spans) else len(text) + 1
            turns[stops[(lefts[stops] >= end) & (lefts[stops] < following)][:1]] = i
        for at in np.flatnonzero(dialogue.loss_mask & (turns < 0))[::-1]:  # for example a space between header and content
            turns[at] = turns[at + 1] if at + 1 < len(turns) and turns[at + 1] >= 0 else turns[at - 1]
        return dialogue, turns

    def prove_mask(self, conversation: Conversation) -> str | None:
        """None, or how encode_dialogue differs from its contract, recomputed turn by turn from prompt_ids."""
        if REJECTED in conversation.meta:
            return self.prove_mask(without_rejected(conversation)) or self.prove_mask(with_rejected(conversation))
        got = self.encode_dialogue(conversation)
        ids = got.ids.tolist()
        expected = np.zeros(len(ids), dtype=bool)
        if conversation.is_document:
            expected[1:] = True
        messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
        for i, turn in enumerate(conversation.turns):
            if turn.role != "assistant" or conversation.is_document:
                continue
            prompt = self._encode_by_prefix(messages, i)
            if ids[: len(prompt)] != prompt:
                return f"turn {i}: the prompt sent for it is not how the dialogue's tokens begin"
            end = next((k for k in range(len(prompt), len(ids)) if ids[k] in self.turn_ends), None)
            if end is None:
                return f"turn {i}: no end-of-turn token follows"
            if turn.loss:
                expected[len(prompt) : end + 1] = True
        wrong = np.flatnonzero(expected != got.loss_mask)
        return f"{len(wrong)} mask entries differ from prefix rendering, the first at token {wrong[0]}" if len(wrong) else None

    def _encode_by_prefix(self, messages: Sequence[Message], i: int) -> list[int]:
        """prompt_ids(messages[:i]) without the cached skeletons."""
        clean = self._clean(messages[:i])
        _, starts = self.template.reply_starts_by_prefix(clean)
        return self._encode_cut(self.template.render(clean, add_generation_prompt=True), starts)[0]

    def _clean(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        return [{"role": m["role"], "content": self.escape_special(m["content"])} for m in messages]

    def _encode_cut(self, text: str, starts: Sequence[int]) -> tuple[list[int], list[int]]:
        """(ids, index of the first token of each reply)."""
        pieces, firsts = self._encodings(text, starts)
        return [i for _, piece in pieces for i in piece.ids], firsts

    def _encodings(self, text: str, starts: Sequence[int]) -> tuple[list[tuple[int, Encoding]], list[int]]:
        """([(its first character, encoding of a piece)], index of the first token of each reply)."""
        if not self._can_cut:
            whole = self._tokenizer.encode(text, add_special_tokens=False)
            found = [whole.char_to_token(start) for start in starts]
            spans = [whole.token_to_chars(first) for first in found if first is not None]
            if [span[0] for span in spans if span is not None] == list(starts):
                return [(0, whole)], [first for first in found if first is not None]
        pieces: list[tuple[int, Encoding]] = []
        firsts: list[int] = []
        count = 0
        cuts = [0, *starts, len(text)]
        for k in range(len(cuts) - 1):
            piece = self._tokenizer.encode(text[cuts[k] : cuts[k + 1]], add_special_tokens=False)
            pieces.append((cuts[k], piece))
            count += len(piece.ids)
            firsts.append(count)
        return pieces, firsts[: len(starts)]

    def _supervise(self, conversation: Conversation, ids: list[int], firsts: list[int]) -> TokenizedDialogue:
        array = np.array(ids, dtype=np.uint32)
        mask = np.zeros(len(ids), dtype=bool)
        stops = np.flatnonzero(np.isin(array, list(self.turn_ends)))
        replies = [turn for turn in conversation.turns if turn.role == "assistant"]
        for first, turn in zip(firsts, replies, strict=True):
            at = int(np.searchsorted(stops, first))
            if at == len(stops):
                raise TemplateRefusedError(
                    "chat template: no end-of-turn token after a reply; it must end with a special token"
                )
            if turn.loss:
                mask[first : int(stops[at]) + 1] = True
        if not mask.any() or mask.all():
            raise ConfigError(f"dialogue {conversation.uid}: the loss mask is all {int(mask.all())}")
        return TokenizedDialogue(conversation.uid, array, mask)

    def _encode_document(self, conversation: Conversation) -> TokenizedDialogue:
        edge = self.special.get("<|endoftext|>", self.eos_id if self.eos_id is not None else self.pad_id)
        start = (
            self.bos_id
            if self.bos_id is not None and self.bos_id not in self.turn_ends and "<|endoftext|>" not in self.special
            else edge
        )
        body = self.encode(self.escape_special("".join(turn.content for turn in conversation.turns)))
        ids = np.array([start, *body, edge], dtype=np.uint32)
        mask = np.ones(len(ids), dtype=bool)
        mask[0] = False
        return TokenizedDialogue(conversation.uid, ids, mask)

    def _end_of_turn(self, added: Mapping[int, AddedToken]) -> list[int]:
        """The token that closes an assistant turn, found by rendering one: the first special one, else the first added one."""
        text = self.template.render(
            [{"role": "user", "content": "\ue0000\ue001"}, {"role": "assistant", "content": "\ue0001\ue001"}]
        )
        end = text.find("\ue0001\ue001") + 3
        for tokens in (self.special, {token.content: i for i, token in added.items() if token.content.strip()}):
            if match := _any_of(tokens).search(text, end):
                return [tokens[match[0]]]
        return []

    def named_id(self, key: str) -> int | None:
        """The token that tokenizer_config.json names, for example as `pad_token`; None where it names none."""
        content = _content(self.config.get(key))
        found = None if content is None else self._tokenizer.token_to_id(content)
        return None if found is None else int(found)


def train_bpe(
    texts: Iterator[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS, template: str = TEMPLATES["chatml"]
) -> ChatTokenizer:
    """A byte-level BPE tokenizer of at most vocab_size tokens (256 bytes and the special ones included), ChatML by default."""
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ConfigError(f"tokenizer.train.vocab_size={vocab_size}: a byte-level vocabulary needs {smallest} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return ChatTokenizer(
        tokenizer.to_str(), template, {k: v for k, v in config.items() if k[-5:] != "token" or v in special_tokens}
    )


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings, the longest first; nothing if there are none."""
    return re.compile("|".join(re.escape(t) for t in sorted(strings, key=lambda t: (-len(t), t))) or r"(?!)")


def _content(value: Any) -> str | None:
    """Token text of a tokenizer_config entry, which is a string or {"content": …}."""
    return value.get("content") if isinstance(value, dict) else value


def _config_template(config: Mapping[str, Any]) -> str | None:
    found = config.get("chat_template")
    if isinstance(found, list):  # several named templates
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found
