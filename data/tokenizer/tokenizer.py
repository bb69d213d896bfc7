"""Tokenizer plus chat template: text to ids, dialogues to ids and a loss mask, prompts as `chat` sends them.

    tokenizer = ChatTokenizer.load("runs/smollm2")
    dialogue = tokenizer.encode_dialogue(conversation)     # ids, loss_mask

Contract: for every supervised assistant turn i, `prompt_ids(messages[:i])` is how the ids of the whole dialogue begin; the
mask is True from there up to and including the reply's own end-of-turn token, and False elsewhere. Replies are found in
data/tokenizer/replies.py; `prove_mask` checks the mask in another way (data/tokenizer/proof.py). The text is cut at the start
of each reply and the pieces are encoded separately, because inference sends the prompt without the reply: in one piece, a reply
that begins with a space would share a token with the prompt. With tokenizers that put a space before every text (SentencePiece
style) this is impossible; there the whole text is encoded and offsets give the boundaries.
Special tokens typed by people are broken up (`escape_special`), in training and in prompts alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from chatmill.config import ConfigError

from ..conversation import Conversation, TokenizedDialogue
from ..preference import REJECTED, with_rejected, without_rejected
from .budget import TemplateRefusedError
from .calls.abilities import Abilities
from .calls.messages import has_structure, is_plain, prompt_parts
from .calls.saying import thought_end
from .decoding import Decoding, token_content
from .folder import config_in, template_in, tokenizer_folder
from .generation_settings import GENERATION, end_ids, read_settings, to_bytes, with_ids
from .guard import Guard, template_tokens
from .pieces import Job, Pieces, T, encoding_of, run_together
from .proof import Tools, find_fault
from .replies import OneSamplePerReplyError, Replies, ReplyFinder
from .template import TEMPLATES, ChatTemplate, Message, each_string

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
        self.vocab_size = 1 + max(self.ids(), default=-1)  # ids may have gaps
        added = self._tokenizer.get_added_tokens_decoder()
        self.added = {token.content: i for i, token in added.items() if token.content.strip()}
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.bos_id, self.eos_id = self.named_id("bos_token"), self.named_id("eos_token")
        pad = self.named_id("pad_token")
        self.pad_id: int = next((i for i in (pad, self.eos_id) if i is not None), 0)
        self.template_source = template
        self._template: ChatTemplate | None = None
        ends: list[int] = []
        if template is not None:
            names = ("bos_token", "eos_token", "pad_token", "unk_token")
            self._template = ChatTemplate(template, {name: token_content(self.config.get(name)) for name in names})
            self.replies = ReplyFinder(self._template, self.special, self.added)
            numbers = {token.content: i for i, token in added.items()}
            ends += [numbers[token] for token in self.replies.turn_ends]
        ends += [] if self.eos_id is None else [self.eos_id]
        self.turn_ends = frozenset(ends)
        self.stops = tuple(dict.fromkeys((*ends, *end_ids(self.generation))))  # what closes a turn comes first
        self.stop_ids = frozenset(self.stops)
        known = {*self.special.values(), *self.turn_ends, *(i for i in (self.bos_id, self.eos_id) if i is not None)}
        self._guard = Guard(self._tokenizer, known | template_tokens(self._template, known, added), added)
        self.decoding = Decoding(self._tokenizer, self.config)
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
        path = tokenizer_folder(Path(folder))
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"tokenizer {path}: no tokenizer.json there. Expected a tokenizer folder, a checkpoint, a run or a data set."
            )
        try:
            if template is None and use_template:
                template = template_in(path)
            config = config_in(path)
            return cls(file.read_text(encoding="utf-8"), template, config, read_settings(path))
        except ConfigError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
            raise ConfigError(f"tokenizer {path}: cannot be read ({error})") from error

    @property
    def source(self) -> str:
        """tokenizer.json."""
        return self._json

    def ids(self) -> set[int]:
        """The ids of all tokens; a vocabulary may have gaps."""
        return set(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def with_settings(self, generation: Mapping[str, Any]) -> ChatTokenizer:
        """This tokenizer and template with the generation settings of a model."""
        return ChatTokenizer(self._json, self.template_source, self.config, generation)

    def with_template(self, template: str) -> ChatTokenizer:
        """This tokenizer with another chat template."""
        return ChatTokenizer(self._json, template, self.config, self.generation)

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
        ids: list[int] = encoding_of(self._tokenizer, text).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids, as transformers decodes them."""
        return self.decoding.text(ids, skip_special)

    def token(self, i: int) -> str:
        """The vocabulary entry of one id."""
        return str(self._tokenizer.id_to_token(int(i)))

    def escape_special(self, text: str) -> str:
        """Insert a space after the first character of special-token strings, so that nobody can type an end of turn."""
        return self._guard.escape(text)

    # -- dialogues

    @property
    def template(self) -> ChatTemplate:
        """The chat template; ConfigError if the folder has none."""
        if self._template is None:
            raise ConfigError("tokenizer: it has no chat template. Set `template:` in the data recipe (for example chatml).")
        return self._template

    def use_todays_date(self) -> None:
        """From now on templates that ask for the date get today's in prompts. Without it they get a fixed day, as in data."""
        self.template.clock = datetime.now

    @property
    def abilities(self) -> Abilities:
        """What the chat template prints beside words."""
        _ = self.template
        return self.replies.abilities

    def prompt_ids(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> list[int]:
        """Ids to send for the next assistant turn, generation prompt included. variables: more of them for the template."""
        clean, more = self._clean(messages), each_string(variables or {}, self.escape_special)
        self.template.take_time()
        text = self.template.render(clean, add_generation_prompt=True, more=more)
        return self._run(self._encode_pieces(text, self.replies.cuts(text, clean, more))).ids()

    def prompt_parts(self, conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(messages, variables) of a conversation for prompt_ids."""
        return prompt_parts(conversation, self.abilities if has_structure(conversation) else Abilities())

    def encode_dialogue(self, conversation: Conversation) -> TokenizedDialogue:
        """Ids and loss mask of a dialogue (in a document every token except the first has loss).

        Raises TemplateRefusedError if the template cannot render it, ConfigError if no token would carry loss.
        """
        return self._run(self._encoding(conversation))

    def encode_dialogues(self, conversations: Iterable[Conversation]) -> list[TokenizedDialogue | ConfigError]:
        """encode_dialogue of each, or the error that it raises; all in one batch."""
        return run_together(self._tokenizer, [self._encoding(conversation) for conversation in conversations])

    def _run(self, job: Job[T]) -> T:
        (found,) = run_together(self._tokenizer, [job])
        if isinstance(found, ConfigError):
            raise found
        return found

    def _encoding(self, conversation: Conversation) -> Job[TokenizedDialogue]:
        if conversation.is_document:
            return (yield from self._encode_document(conversation))
        if REJECTED in conversation.meta:  # a preference pair: both dialogues, one after the other
            better = yield from self._encoding(without_rejected(conversation))
            halves = better, (yield from self._encoding(with_rejected(conversation)))
            return TokenizedDialogue(
                conversation.uid, np.concatenate([h.ids for h in halves]), np.concatenate([h.loss_mask for h in halves])
            )
        return (yield from self._encode(conversation))[0]

    def _encode(self, conversation: Conversation) -> Job[tuple[TokenizedDialogue, Pieces, Replies, dict[int, tuple[int, int]]]]:
        """Dialogue, the pieces it was encoded in, its replies, and the tokens [start, end) of each supervised one."""
        supervised = supervised_turns(conversation)
        if not supervised:
            raise ConfigError(f"dialogue {conversation.uid}: the loss mask is all 0")
        messages, more = self._messages(conversation)
        found = self.replies.find(messages, supervised, more)
        pieces = yield from self._encode_pieces(found.text, found.cuts)
        ids = np.array(pieces.ids(), dtype=np.uint32)
        mask, spans = np.zeros(len(ids), dtype=bool), dict[int, tuple[int, int]]()
        for i, (start, end, stop) in found.spans.items():
            first, last = pieces.token_at(start), pieces.token_at(end)
            if first is None or last is None or int(ids[last]) != self._tokenizer.token_to_id(found.text[end:stop]):
                raise TemplateRefusedError(
                    f"chat template: a reply ends with {found.text[end:stop]!r}, which the tokenizer does not make one token"
                )
            if not conversation.turns[i].thought_loss:
                words = pieces.token_at(start + thought_end(found.text[start:end], messages[i].get("reasoning_content")))
                first = first if words is None else words
            mask[first : last + 1] = True
            spans[i] = (first, last + 1)
        if mask.all():
            raise ConfigError(f"dialogue {conversation.uid}: the loss mask is all 1")
        return TokenizedDialogue(conversation.uid, ids, mask), pieces, found, spans

    def one_piece(self, conversation: Conversation) -> bool:
        """Can the supervised replies be learned in one piece, or does the template ask for one sample per reply?

        Raises TemplateRefusedError if it can render neither.
        """
        supervised = supervised_turns(conversation)
        if conversation.is_document or REJECTED in conversation.meta or not supervised:
            return True
        if supervised == [len(conversation.turns) - 1]:
            return True
        try:
            messages, more = self._messages(conversation)
            self.replies.find(messages, supervised, more)
        except OneSamplePerReplyError:
            return False
        return True

    def unsaid_thoughts(self, conversation: Conversation) -> int:
        """Number of learned replies whose thought the template does not print."""
        messages, more = self._messages(conversation)
        found = self.replies.find(messages, supervised_turns(conversation), more)
        said = [(found.text[a:b], messages[i].get("reasoning_content")) for i, (a, b, _) in found.spans.items()]
        return sum(bool(thought) and not thought_end(text, thought) for text, thought in said)

    def encode_turns(self, conversation: Conversation) -> tuple[TokenizedDialogue, NDArray[np.int32]]:
        """The dialogue and, Int32["L"], the turn that each token belongs to; -1: the template's own tokens.

        A turn has the tokens of its content and the end-of-turn token after it; a supervised reply has all tokens that carry
        its loss.
        """
        if conversation.is_document:
            dialogue = self._run(self._encode_document(conversation))
            turns = np.zeros(len(dialogue.ids), dtype=np.int32)
            turns[0] = -1
            return dialogue, turns
        dialogue, pieces, found, supervised = self._run(self._encode(conversation))
        turns = np.full(len(dialogue.ids), -1, dtype=np.int32)
        text, spans = self.template.content_spans(*self._messages(conversation))
        same = next((k for k, (a, b) in enumerate(zip(text, found.text, strict=False)) if a != b), len(text))
        lefts, rights = pieces.offsets()
        stops = np.flatnonzero(np.isin(dialogue.ids, list(self.turn_ends)))
        for i, (start, end) in enumerate(spans):
            if end > same:
                break
            turns[(lefts < end) & (rights > start)] = i
            following = spans[i + 1][0] if i + 1 < len(spans) else len(text) + 1
            turns[stops[(lefts[stops] >= end) & (lefts[stops] < following)][:1]] = i
        for i, (first, stop) in supervised.items():
            turns[first:stop] = i
        return dialogue, turns

    def prove_mask(self, conversation: Conversation) -> str | None:
        """None, or how encode_dialogue differs from its contract (data/tokenizer/proof.py)."""
        if REJECTED in conversation.meta:
            return self.prove_mask(without_rejected(conversation)) or self.prove_mask(with_rejected(conversation))
        got = self.encode_dialogue(conversation)
        if conversation.is_document:
            right = not got.loss_mask[0] and bool(got.loss_mask[1:].all())
            return None if right else "a document must carry loss on every token but the first"
        messages, more = self._messages(conversation)

        def prompt_ids(before: Sequence[Message]) -> list[int]:  # without the cached skeletons
            text = self.template.render(before, add_generation_prompt=True, more=more)
            return self._run(self._encode_pieces(text, self.replies.cuts_by_definition(text, before, more))).ids()

        render = partial(self.template.render, more=more)
        tools = Tools(render, self.encode, self.decode, prompt_ids, self.added)
        quiet = [i for i, turn in enumerate(conversation.turns) if not turn.thought_loss]
        return find_fault(got, messages, supervised_turns(conversation), tools, quiet)

    def _messages(self, conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(messages, variables), escaped."""
        messages, more = self.prompt_parts(conversation)
        return self._clean(messages), each_string(more, self.escape_special) if more else {}

    def _clean(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [
            {"role": m["role"], "content": self.escape_special(m["content"])}
            if is_plain(m)
            else {key: value if key == "role" else each_string(value, self.escape_special) for key, value in m.items()}
            for m in messages
        ]

    def _encode_pieces(self, text: str, cuts: Sequence[int]) -> Job[Pieces]:
        if not self._can_cut:
            (whole,) = yield [text]
            found = [whole.char_to_token(cut) for cut in cuts]
            spans = [whole.token_to_chars(first) for first in found if first is not None]
            if [span[0] for span in spans if span is not None] == list(cuts):
                return Pieces([0], [whole])
        edges = [0, *cuts, len(text)]
        parts = [text[edges[k] : edges[k + 1]] for k in range(len(edges) - 1)]
        return Pieces(edges[:-1], (yield parts))

    def _encode_document(self, conversation: Conversation) -> Job[TokenizedDialogue]:
        edge = self.special.get("<|endoftext|>", self.eos_id if self.eos_id is not None else self.pad_id)
        start = (
            self.bos_id
            if self.bos_id is not None and self.bos_id not in self.turn_ends and "<|endoftext|>" not in self.special
            else edge
        )
        (body,) = yield [self.escape_special("".join(turn.content for turn in conversation.turns))]
        ids = np.array([start, *body.ids, edge], dtype=np.uint32)
        mask = np.ones(len(ids), dtype=bool)
        mask[0] = False
        return TokenizedDialogue(conversation.uid, ids, mask)

    def named_id(self, key: str) -> int | None:
        """The token that tokenizer_config.json names, for example as `pad_token`; None where it names none."""
        content = token_content(self.config.get(key))
        found = None if content is None else self._tokenizer.token_to_id(content)
        return None if found is None else int(found)


def supervised_turns(conversation: Conversation) -> list[int]:
    """Indices of the assistant's turns that may carry loss."""
    return [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant" and turn.loss]


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
