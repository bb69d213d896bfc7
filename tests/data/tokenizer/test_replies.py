"""Each reply has its own end, and a template that hides part of a reply is found out: by the masks, and by their proof."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from chatmill.data.conversation import Conversation, TokenizedDialogue, Turn
from chatmill.data.ledger import Ledger
from chatmill.data.samples.per_reply import in_pieces, per_reply
from chatmill.data.tokenizer.budget import TemplateRefusedError
from chatmill.data.tokenizer.replies import OneSamplePerReplyError, Replies, ReplyFinder
from chatmill.data.tokenizer.template import TEMPLATES, Message
from chatmill.data.tokenizer.tokenizer import ChatTokenizer, train_bpe

TOKENS = ("<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|user|>", "<|assistant|>", "<|eos|>", "<think>", "</think>")

# The last reply ends otherwise than earlier ones, as gpt-oss' does.
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
# Earlier replies have no end at all: the first token behind them opens the next turn.
END_AT_THE_END = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ '<|eos|>' if loop.last and m.role == 'assistant' else '' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Thoughts of earlier replies are dropped, and a last reply without one gets an empty one, as in Qwen3.
DROPS_THOUGHTS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}{% if '</think>' in m.content %}"
    "{{ '<think>\n' + m.content.split('</think>')[0].split('<think>')[-1].strip() + '\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Every thought is dropped from the dialogue, and the prompt opens one, as DeepSeek R1's distilled models do.
OPENS_THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}"
    "{{ '<|eos|>' if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '<think>\n' }}{% endif %}"
)
TEMPLATE_OF = {"harmony": HARMONY, "eos": END_AT_THE_END, "drops": DROPS_THOUGHTS, "opens": OPENS_THOUGHTS}
PLAIN = ("q1", "a1", "q2", "a2")
THOUGHTS = ("q1", "<think>\nt1\n</think>\n\na1", "q2", "<think>\nt2\n</think>\n\na2")


def tokenizer_with(template: str) -> ChatTokenizer:
    bare = train_bpe(iter(["hello world"] * 3), 256 + len(TOKENS), TOKENS)
    raw = json.loads(bare.files()["tokenizer.json"])
    for token in raw["added_tokens"]:
        token["special"] = "think" not in token["content"]  # as in Qwen3 and DeepSeek: a reply may say it
    return ChatTokenizer(json.dumps(raw), template, {"eos_token": "<|eos|>"})


def talk(*contents: str) -> Conversation:
    return Conversation("u", tuple(Turn("assistant" if i % 2 else "user", c) for i, c in enumerate(contents)), "s", "o")


def learned(tokenizer: ChatTokenizer, conversation: Conversation) -> list[str]:
    """What carries loss in each sample of a conversation, masks proven."""
    found = []
    for sample in in_pieces(conversation, tokenizer):
        dialogue = tokenizer.encode_dialogue(sample)
        assert tokenizer.prove_mask(sample) is None
        found.append(tokenizer.decode(dialogue.ids[dialogue.loss_mask].tolist()))
    return found


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        ("harmony", PLAIN, ["a1<|end|>a2<|return|>"]),
        ("eos", PLAIN, ["a1<|eos|>", "a2<|eos|>"]),
        ("drops", PLAIN, ["<think>\n\n</think>\n\na1<|end|>", "<think>\n\n</think>\n\na2<|end|>"]),
        ("drops", THOUGHTS, [f"{THOUGHTS[1]}<|end|>", f"{THOUGHTS[3]}<|end|>"]),
        ("opens", PLAIN, ["\n</think>\n\na1<|eos|>", "\n</think>\n\na2<|eos|>"]),
        ("opens", THOUGHTS, ["t1\n</think>\n\na1<|eos|>", "t2\n</think>\n\na2<|eos|>"]),
    ],
)
def test_every_reply_is_learned_whole_up_to_its_own_end(name: str, contents: Sequence[str], expected: list[str]) -> None:
    assert learned(tokenizer_with(TEMPLATE_OF[name]), talk(*contents)) == expected


@pytest.mark.parametrize("name", sorted(TEMPLATE_OF))
@pytest.mark.parametrize("contents", [PLAIN, THOUGHTS], ids=["plain", "thoughts"])
def test_what_comes_before_a_reply_is_the_prompt_of_transformers_byte_for_byte(name: str, contents: Sequence[str]) -> None:
    tokenizer = tokenizer_with(TEMPLATE_OF[name])
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<|eos|>", chat_template=tokenizer.template_source
    )
    for sample in in_pieces(talk(*contents), tokenizer):
        dialogue = tokenizer.encode_dialogue(sample)
        edges = np.flatnonzero(np.diff(dialogue.loss_mask.astype(int)) == 1) + 1
        supervised = [i for i, turn in enumerate(sample.turns) if turn.role == "assistant" and turn.loss]
        for i, edge in zip(supervised, edges.tolist(), strict=True):
            messages = [{"role": turn.role, "content": turn.content} for turn in sample.turns[:i]]
            prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert tokenizer.decode(dialogue.ids[:edge].tolist()) == prompt
            assert tokenizer.prompt_ids(messages) == dialogue.ids[:edge].tolist()


def test_chat_stops_where_earlier_and_last_replies_end() -> None:
    tokenizer = tokenizer_with(HARMONY)
    assert {tokenizer.token(i) for i in tokenizer.stop_ids} == {"<|end|>", "<|return|>", "<|eos|>"}


LOSSES = {
    "cut short": HARMONY.replace("m.content", "(m.content[:3] if m.role == 'assistant' else m.content)"),
    "without its end": OPENS_THOUGHTS.replace("[-1]", "[-1][:2]"),
    "said twice": HARMONY.replace("{{ m.content }}", "{{ m.content + m.content }}"),
    "left out": HARMONY.replace("m.content", "(m.content if m.role == 'user' else 'ok')"),
    "first line alone": HARMONY.replace("m.content", "m.content.split('\n')[0]"),
    "no thought": HARMONY.replace("assistant<|message|>", "assistant<|message|><think>\n\n</think>\n\n")
    .replace(
        "<|message|>{{ m.content", "<|message|>{{ ('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content"
    )
    .replace("+ m.content", "+ m.content.split('</think>')[-1].strip()"),
}


@pytest.mark.parametrize("how", LOSSES)
def test_a_template_that_loses_text_of_a_reply_is_refused(how: str) -> None:
    with pytest.raises(TemplateRefusedError, match="text of a reply"):
        tokenizer_with(LOSSES[how]).encode_dialogue(talk("q", "<think>long</think>\nanswer"))


def test_a_reply_without_an_end_is_refused_not_ended_by_the_next_turn() -> None:
    tokenizer = tokenizer_with(END_AT_THE_END.replace("<|eos|>", ""))
    with pytest.raises(TemplateRefusedError, match="no end-of-turn token"):
        tokenizer.encode_dialogue(talk(*PLAIN))
    with pytest.raises(OneSamplePerReplyError):
        tokenizer_with(END_AT_THE_END).encode_dialogue(talk(*PLAIN))


@pytest.mark.parametrize("name", [*TEMPLATE_OF, *TEMPLATES])
def test_the_cached_way_and_the_definition_agree(name: str) -> None:
    tokenizer = tokenizer_with(
        TEMPLATE_OF.get(name) or TEMPLATES[name].replace("<|im_end|>", "<|end|>").replace("<|eot_id|>", "<|end|>")
    )
    for sample in in_pieces(talk("q", "a\n", "x", " b", "", "c"), tokenizer):
        messages, wanted = tokenizer._messages(sample)[0], [len(sample.turns) - 1]
        finder = tokenizer.replies
        assert finder.find(messages, wanted) == finder.find_by_definition(messages, wanted)


def one_token_more(self: ReplyFinder, messages: Sequence[Message], supervised: Collection[int], more: object = None) -> Replies:
    found = RIGHT(self, messages, supervised)
    text, spans = found.text, dict(found.spans)
    start, _, _ = spans[1]
    stop = text.rindex("<|end|>")
    return replace(found, spans=spans | {1: (start, stop, stop + len("<|end|>"))})


RIGHT = ReplyFinder.find


def test_the_proof_finds_what_the_masks_get_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shares no code with the search for replies: a fault there does not hide itself."""
    tokenizer, conversation = tokenizer_with(HARMONY), talk(*PLAIN)
    monkeypatch.setattr(ReplyFinder, "find", one_token_more)  # loss up to the end of the user's next turn
    assert "not its content and one end-of-turn token" in str(tokenizer.prove_mask(conversation))
    monkeypatch.undo()
    right = tokenizer.encode_dialogue(conversation)
    for wrong in (np.flatnonzero(right.loss_mask)[-1], np.flatnonzero(right.loss_mask)[0]):
        mask = right.loss_mask.copy()
        mask[wrong] = False
        broken = TokenizedDialogue("u", right.ids, mask)
        monkeypatch.setattr(ChatTokenizer, "encode_dialogue", lambda self, c, broken=broken: broken)
        assert tokenizer.prove_mask(conversation) is not None
    mask = right.loss_mask.copy()
    mask[1] = True
    broken = TokenizedDialogue("u", right.ids, mask)
    monkeypatch.setattr(ChatTokenizer, "encode_dialogue", lambda self, c: broken)
    assert "outside the supervised replies" in str(tokenizer.prove_mask(conversation))


def test_samples_per_reply_are_counted_and_stay_one_conversation() -> None:
    tokenizer, ledger = tokenizer_with(DROPS_THOUGHTS), Ledger("samples")
    ledger.keep()
    found = list(per_reply(talk(*THOUGHTS), tokenizer, ledger))
    assert [len(c.turns) for c in found] == [2, 4] and len({c.uid for c in found}) == 2
    assert {c.meta["thread"] for c in found} == {"u"} and ledger.kept == 2
    assert ledger.changed["cut into one sample per reply, as the chat template asks"] == 1
    assert [[t.loss for t in c.turns if t.role == "assistant"] for c in found] == [[True], [False, True]]
