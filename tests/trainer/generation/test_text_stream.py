"""Streamed text is the text of the whole reply as transformers decodes it, for every kind of tokenizer and at every cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from chatmill.data.report.pieces import token_pieces
from chatmill.data.tokenizer.tokenizer import ChatTokenizer, train_bpe
from chatmill.trainer.chat.serve.protocol import chat_logprobs
from chatmill.trainer.generation.generation import TokenStep
from chatmill.trainer.generation.text_stream import TextStream

from ..tokenizer_kinds import KINDS, save_tokenizer

SPACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
BYTES, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def _sequence(*decoders: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "decoders": list(decoders)}


def _strip(start: int) -> dict[str, Any]:
    return {"type": "Strip", "content": " ", "start": start, "stop": 0}


# Decoders found in tokenizer.json files, and some that nobody publishes, each on the byte-fallback vocabulary.
DECODERS = {
    "Gemma's, without a blank in front": _sequence(SPACE, BYTES, FUSE),
    "two blanks less in front": _sequence(SPACE, BYTES, FUSE, _strip(2)),
    "bytes, then blanks": _sequence(BYTES, METASPACE),
    "blanks in front of nothing": {**METASPACE, "prepend_scheme": "never"},
    "ends of words": {"type": "BPEDecoder", "suffix": "▁"},
    "no decoder": None,
    "patterns across tokens": _sequence(SPACE, FUSE, {"type": "Replace", "pattern": {"String": "a t"}, "content": "-"}),
    "repeats are one": {"type": "CTC", "pad_token": "a", "word_delimiter_token": "▁", "cleanup": True},
}
STREAMS_NOTHING = ("ends of words", "patterns across tokens", "repeats are one")


class Pair:
    """One tokenizer here and in transformers. pool: ids that meet the edges of decoding."""

    def __init__(self, folder: Path) -> None:
        self.theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        self.ours = ChatTokenizer.load(folder)
        texts = ("Hello there . the boat 's red , isn 't it ? ' ' you n't !", "  a  天气很好。你 🐈é👍", "\n\n x", "▁ \ufffd")
        ids = [i for text in texts for i in self.ours.encode(text)]
        edges = [0xF0, 0x9F, 0x98, 0x80, 0xE4, 0xBD, 0xA0, 0xFF, 0x41, 0x20, 0x0A]
        names = [f"<0x{byte:02X}>" for byte in edges] + ["▁", "Ġ", "ð", "Ł", "ĺ", "Ģ", "å", "½", "ł", "##n", "a", "t"]
        named = [self.theirs.convert_tokens_to_ids(name) for name in names]
        special = [*self.ours.special.values(), len(self.theirs) + 5]  # the last: a row of the model that is no token
        self.pool = list(dict.fromkeys([*ids, *(i for i in named if i is not None), *special]))

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.theirs.decode(list(ids), skip_special_tokens=True)
        return text


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    for kind in KINDS:
        save_tokenizer(kind, folder / kind)
        found[kind] = Pair(folder / kind)
    for name, decoder in DECODERS.items():
        save_tokenizer("byte-fallback", folder / name)
        file = folder / name / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder": decoder}))
        found[name] = Pair(folder / name)
    return found


def shortest_with_a_stop(pair: Pair, ids: Sequence[int], stops: Sequence[str], min_tokens: int) -> tuple[str, int]:
    """(text, ids used): the definition, one decoding per id."""
    first = pair.decode(ids[:min_tokens])
    for count in range(min_tokens + 1, len(ids) + 1):
        text = pair.decode(ids[:count]) if count == len(ids) else pair.decode(ids[:count]).rstrip("\ufffd")
        early = next(n for n in range(len(first), -1, -1) if text.startswith(first[:n]))
        if found := [at for stop in stops for at in range(len(text)) if text.startswith(stop, at) and at + len(stop) > early]:
            return text[: min(found)], count
    return pair.decode(ids), len(ids)


@pytest.mark.parametrize("kind", [*KINDS, *DECODERS])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_text_at_every_cut_is_what_transformers_decodes(kind: str, data: st.DataObject, pairs: dict[str, Pair]) -> None:
    pair = pairs[kind]
    ids = data.draw(st.lists(st.sampled_from(pair.pool), max_size=90))
    stream, shown, shows = TextStream(pair.ours), "", []
    for i in ids:
        shown += stream.push(i)
        shows.append(shown)
    whole = pair.decode(ids)
    assert shown + stream.finish() == stream.text == whole == pair.ours.decode(ids, skip_special=True)
    assert pair.ours.decode(ids) == pair.theirs.decode(ids)
    for count, text in enumerate(shows, 1):
        assert whole.startswith(text) and pair.decode(ids[:count]).startswith(text)


@pytest.mark.parametrize("kind", [*KINDS, *DECODERS])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_reply_ends_with_the_first_id_that_completes_a_stop_string(
    kind: str, data: st.DataObject, pairs: dict[str, Pair]
) -> None:
    pair = pairs[kind]
    ids = data.draw(st.lists(st.sampled_from(pair.pool), min_size=1, max_size=40))
    whole = pair.decode(ids)
    inside = [whole[at : at + size] for at in range(len(whole)) for size in (1, 2, 3) if "\ufffd" not in whole[at : at + size]]
    stops = data.draw(st.lists(st.sampled_from([*inside, "😀", "n't", " '", "the"]), min_size=1, max_size=2))
    min_tokens = data.draw(st.sampled_from([0, 0, 1, 3, 12, 50]))
    stream, shown, used = TextStream(pair.ours, stops, min_tokens=min_tokens), "", 0
    for i in ids:
        shown += stream.push(i)
        used += 1
        if stream.stopped:
            break
    shown += stream.finish()
    assert (shown, used) == shortest_with_a_stop(pair, ids, stops, min_tokens)
    assert shown == stream.text


@pytest.mark.parametrize("kind", [*KINDS, *DECODERS])
def test_text_is_shown_while_it_grows(kind: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[kind]
    stream, shown, words = TextStream(pair.ours), "", "the red boat is there " * 20
    for count, i in enumerate(ids := pair.ours.encode(words), 1):
        shown += stream.push(i)
        late = len(pair.decode(ids[:count])) - len(shown)
        assert late <= 3 or kind in STREAMS_NOTHING
    assert shown + stream.finish() == pair.decode(ids)


def test_a_run_of_byte_tokens_waits_for_its_end(pairs: dict[str, Pair]) -> None:
    pair = pairs["byte-fallback"]
    ids = [pair.theirs.convert_tokens_to_ids(t) for t in ("<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁the", "▁a", "o", "k")]
    stream = TextStream(pair.ours)
    assert [stream.push(i) for i in ids] == ["", "", "", "", "😀 the", " a", "o", "k"] and stream.finish() == ""
    assert TextStream(pair.ours, ["😀"]).push(ids[0]) == ""
    stream = TextStream(pair.ours)  # an invalid byte: one U+FFFD for each byte of the run
    broken = [*ids[:4], pair.theirs.convert_tokens_to_ids("<0xFF>"), ids[4]]
    assert "".join(stream.push(i) for i in broken) == pair.decode(broken) == "\ufffd" * 5 + " the"


def test_a_special_token_may_be_a_stop_string_though_it_is_not_shown(pairs: dict[str, Pair]) -> None:
    pair = pairs["byte-level"]
    ids = [*pair.ours.encode("Hello"), pair.ours.special["<|im_start|>"], *pair.ours.encode("user")]
    free, stopped = TextStream(pair.ours), TextStream(pair.ours, ["<|im_start|>"])
    assert "".join(free.push(i) for i in ids) == "Hellouser"
    assert "".join(stopped.push(i) for i in ids) == "Hello" == stopped.text and stopped.stopped
    shown = TextStream(pair.ours, skip_special=False)
    assert "".join(shown.push(i) for i in ids) == "Hello<|im_start|>user"


@pytest.mark.parametrize("kind", [*KINDS, *DECODERS])
def test_a_continued_text_keeps_the_blank_between_the_two(kind: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[kind]
    bos = pair.ours.special.get("<s>")
    ids = [*([] if bos is None else [bos]), *pair.ours.encode("the red boat 天气 is on the river" + " é👍" * ("byte" in kind))]
    cuts = [cut for cut in range(len(ids)) if "\ufffd" not in pair.decode(ids[:cut])]
    assert len(cuts) > 8
    for cut in cuts:
        if not pair.decode(ids).startswith(begun := pair.decode(ids[:cut])):
            assert kind in STREAMS_NOTHING  # where what follows changes the prompt
            continue
        for long in ([], ids[:10] * 30):  # of a long prompt, the end is enough
            if long and kind in STREAMS_NOTHING:
                continue
            stream = TextStream(pair.ours, before=[*long, *ids[:cut]])
            more = "".join(stream.push(i) for i in ids[cut:]) + stream.finish()
            whole = pair.decode([*long, *ids])
            assert pair.decode([*long, *ids[:cut]]) + more == whole and (long or begun + more == whole)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_a_prompt_that_ends_inside_a_character_is_completed(kind: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[kind]
    ids = pair.ours.encode("a👍 b")
    cut = next(i for i in range(len(ids)) if pair.decode(ids[:i]).endswith("\ufffd"))
    stream = TextStream(pair.ours, before=ids[:cut])
    assert "".join(stream.push(i) for i in ids[cut:]) + stream.finish() == "👍 b"


def test_a_stop_string_counts_where_it_ends_behind_min_tokens(pairs: dict[str, Pair]) -> None:
    """The case of vLLM's tests/detokenizer/test_min_tokens.py; and a stop string that begins before and ends behind."""
    vocabulary, said = _bytes_tokenizer(), " is Lee, and I'm a student"
    for count, stop, truth in ((0, "e", " is L"), (7, "e", " is Lee, and I'm a stud"), (6, "e", " is Le"), (6, "Lee", " is ")):
        stream = TextStream(vocabulary, [stop], min_tokens=count)
        assert "".join(stream.push(i) for i in vocabulary.encode(said)) + stream.finish() == truth == stream.text
        assert stream.stopped


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_make_the_text(kind: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[kind]
    for text in ("the boat is red", "天气很好 a 🐈 é", "x + 1"):
        ids = pair.ours.encode(text)
        spoken = b"".join(map(pair.ours.decoding.token_bytes, ids)).decode()
        assert spoken.removeprefix(" ") == pair.ours.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_reports_and_logprobs_show_every_token_with_its_blank_and_whole_characters(kind: str, pairs: dict[str, Pair]) -> None:
    pair, text = pairs[kind], "the boat is red 天气很好" + ("👍 é" if kind.startswith("byte") else "")
    ids = pair.ours.encode(text)
    pieces = list(token_pieces(pair.ours, ids, [False] * len(ids)))
    assert "".join(piece.text for piece in pieces).removeprefix(" ") == pair.decode(ids)
    assert len(pieces) > 6 and not any("\ufffd" in piece.text for piece in pieces)
    told = chat_logprobs(pair.ours, [TokenStep(i, 0.0) for i in ids])["content"]
    assert bytes(byte for entry in told for byte in entry["bytes"]).decode().removeprefix(" ") == pair.decode(ids)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=120))
@settings(max_examples=60, deadline=None)
def test_streamed_pieces_join_to_the_decoded_text_without_broken_characters(text: str) -> None:
    vocabulary = _bytes_tokenizer()
    ids = vocabulary.encode(text)
    stream = TextStream(vocabulary)
    pieces = [stream.push(i) for i in ids]
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)
    assert "".join(pieces) + stream.finish() == vocabulary.decode(ids) == stream.text == text


def test_broken_bytes_stream_like_they_decode() -> None:
    vocabulary = _bytes_tokenizer()
    good = vocabulary.encode("é👍" * 20)
    ids = [i for at, i in enumerate(good) if at % 5]  # every fifth byte is missing
    stream = TextStream(vocabulary)
    assert "".join(stream.push(i) for i in ids) + stream.finish() == vocabulary.decode(ids)


@pytest.mark.parametrize("stops", [("END",), ("ND", "END"), ("👍x",), ("abab",)])
def test_no_part_of_a_stop_string_is_ever_shown(stops: tuple[str, ...]) -> None:
    vocabulary = _bytes_tokenizer()
    for text in ("hi EN E ENDED", "aba abab", "ok👍👍x no", "E", "EN", "ababa"):
        stream = TextStream(vocabulary, stops)
        shown = "".join(stream.push(i) for i in vocabulary.encode(text))
        shown += stream.finish()
        found = [text.find(s) for s in stops if s in text]
        assert shown == stream.text == (text[: min(found)] if found else text)
        assert stream.stopped == bool(found)


_BYTES: list[ChatTokenizer] = []


def _bytes_tokenizer() -> ChatTokenizer:
    """Every byte its own token: the hardest case for streaming."""
    if not _BYTES:
        _BYTES.append(train_bpe(iter([]), 259))
    return _BYTES[0]
