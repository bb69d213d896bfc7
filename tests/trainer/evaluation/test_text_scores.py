"""Text scores against sacrebleu and brute force; intervals against the textbook."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from chatmill.config import ConfigError
from chatmill.trainer.evaluation.bleu_tokenizer import mismatch, tokenizer_for
from chatmill.trainer.evaluation.confidence import Sums, difference, interval, make_draws
from chatmill.trainer.evaluation.figures import ratio, verdict
from chatmill.trainer.evaluation.text_scores import (
    Bleu,
    chrf,
    chrf_signature,
    distinct,
    reply_scores,
    words,
)

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat,", "is", "here.", "Really?", "naïve", "你好", "x"]


def pairs(count: int, seed: int, longest: int = 14) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(0, longest))) for _ in range(2 * count)]
    return list(zip(texts[:count], texts[count:], strict=True))


@pytest.mark.parametrize(("seed", "longest"), [(1, 14), (2, 3), (3, 40)])
def test_bleu_and_chrf_are_those_of_sacrebleu(seed: int, longest: int) -> None:
    texts = pairs(40, seed, longest)
    bleu = Bleu()
    sums = Sums.of([reply_scores(a, b) | bleu.counts(a, b) for a, b in texts])
    mine, theirs = [a for a, _ in texts], [[b for _, b in texts]]
    assert bleu.score(sums.total())[0] == pytest.approx(BLEU().corpus_score(mine, theirs).score, abs=1e-9)
    assert chrf(sums.total())[0] == pytest.approx(CHRF().corpus_score(mine, theirs).score, abs=1e-9)
    halves = sums.resampled(np.repeat([[1.0, 0.0], [0.0, 1.0]], 20, axis=1))
    for half, picked in ((0, slice(0, 20)), (1, slice(20, 40))):
        assert bleu.score(halves)[half] == pytest.approx(BLEU().corpus_score(mine[picked], [theirs[0][picked]]).score, abs=1e-9)
        assert chrf(halves)[half] == pytest.approx(CHRF().corpus_score(mine[picked], [theirs[0][picked]]).score, abs=1e-9)


CHINESE = [
    ("预报说下午有小雨，记得带伞。", "预报说下午有小雨，出门记得带伞。"),
    ("累了就休息，先睡个好觉。", "累了就休息吧，先睡个好觉。"),
    ("至少五天，大理和丽江各两天。", "至少五天，大理和丽江各住两天。"),
]


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        ([b for _, b in CHINESE], "zh"),
        (["天氣很好，我們去爬山吧", "OK, see you at 9"], "zh"),
        (["今日は傘を持って行ってください。"], "char"),  # ja-mecab where MeCab is installed
        (["오늘은 우산을 가져가세요."], "char"),
        (["วันนี้อย่าลืมร่มนะ"], "char"),
        (["Take an umbrella, it will rain.", "I said 你好 to her yesterday"], "13a"),
        (["Возьми зонт, будет дождь."], "13a"),
        (["", "123 !?"], "13a"),
    ],
)
def test_bleu_cuts_a_text_by_its_script(texts: list[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    assert tokenizer_for(texts) == name
    assert mismatch(name, texts) is None and mismatch("char", texts) is None
    warned = mismatch("13a", texts)
    assert (warned is None) == (name == "13a") and (warned is None or f"--bleu-tokenize {name}" in warned)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module)
    assert tokenizer_for(texts) in (name, "ja-mecab", "ko-mecab")


def test_equal_chinese_replies_score_100_and_close_ones_in_between() -> None:
    bleu = Bleu(tokenizer_for([b for _, b in CHINESE]))
    equal = Sums.of([bleu.counts(b, b) for _, b in CHINESE]).total()
    close = Sums.of([bleu.counts(a, b) for a, b in CHINESE]).total()
    assert bleu.score(equal)[0] == pytest.approx(100.0)
    expected = BLEU(tokenize="zh").corpus_score([a for a, _ in CHINESE], [[b for _, b in CHINESE]]).score
    assert bleu.score(close)[0] == pytest.approx(expected) and 20 < expected < 95
    assert "tok:zh" in bleu.signature()


def test_an_unknown_tokenizer_of_bleu_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"zg: unknown\. Expected auto or one of .*zh"):
        Bleu("zg")


def test_signatures_are_those_that_sacrebleu_prints() -> None:
    for metric, signature in ((BLEU(tokenize="char"), Bleu("char").signature()), (CHRF(), chrf_signature())):
        metric.corpus_score(["x"], [["y"]])
        assert signature == str(metric.get_signature())


def test_rouge_l_counts_the_longest_common_subsequence() -> None:
    def is_subsequence(part: tuple[str, ...], whole: list[str]) -> bool:
        rest = iter(whole)
        return all(word in rest for word in part)

    for a, b in pairs(30, 5, longest=8):
        left, right = words(a), words(b)
        best = max(k for k in range(len(left) + 1) if any(is_subsequence(c, right) for c in itertools.combinations(left, k)))
        assert reply_scores(a, b)["rouge_l"] == (2 * best / (len(left) + len(right)) if left or right else 1.0)


def test_word_overlap_of_a_known_pair() -> None:
    found = reply_scores("The cat sat on the mat.", "the cat is on a mat")
    assert (found["token_precision"], found["token_recall"]) == (4 / 6, 4 / 6)  # the, cat, on, mat
    assert found["token_f1"] == pytest.approx(4 / 6)
    assert found["rouge_l"] == pytest.approx(4 / 6)
    assert found["exact_match"] == 0
    assert reply_scores("  Hello, WORLD", "hello world!")["exact_match"] == 1
    nothing = reply_scores("", "hello")
    assert nothing["token_f1"] == nothing["token_precision"] == nothing["exact_match"] == 0
    assert reply_scores("", "")["exact_match"] == reply_scores("", "")["rouge_l"] == 1


def test_characters_of_languages_without_blanks_are_words() -> None:
    assert words("Naïve 你好abc, it's") == ["naïve", "你", "好", "abc", "it", "s"]


def test_distinct_counts_different_ngrams_over_all_replies() -> None:
    assert distinct(["a b a", "a b"], 1) == 2 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3
    assert distinct(["", "a"], 2) == 0


def test_an_interval_is_that_of_the_normal_distribution() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 1.0, 400)
    sums = Sums.of([{"sum": float(v), "n": 1.0} for v in values])
    found = interval(ratio("sum", "n"), sums, make_draws(400, 4000, 1))
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_pairing_finds_a_difference_that_is_small_beside_the_spread() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(3.0, 1.0, 200)  # how hard the dialogues are, for both models
    first = Sums.of([{"sum": float(v), "n": 1.0} for v in hard])
    second = Sums.of([{"sum": float(v), "n": 1.0} for v in hard - 0.05 + rng.normal(0, 0.1, 200)])
    same = Sums.of([{"sum": float(v), "n": 1.0} for v in hard + rng.normal(0, 0.1, 200)])
    draws = make_draws(200, 1000, 0)
    found = difference(ratio("sum", "n"), first, second, draws)
    assert found.low < found.value < found.high < 0
    assert found.p < 0.01
    assert verdict(found.low, found.high, found.p, "lower") == "better"
    assert verdict(found.low, found.high, found.p, "higher") == "worse"
    none = difference(ratio("sum", "n"), first, first, draws)
    assert (none.value, none.p) == (0.0, 1.0)
    chance = difference(ratio("sum", "n"), first, same, draws)
    assert chance.low < 0 < chance.high
    assert verdict(chance.low, chance.high, chance.p, "lower") == ""


def test_draws_repeat_and_draw_as_many_dialogues_as_there_are() -> None:
    draws = make_draws(50, 200, 3)
    assert (draws == make_draws(50, 200, 3)).all()
    assert (draws.sum(1) == 50).all()
    assert (draws != make_draws(50, 200, 4)).any()
