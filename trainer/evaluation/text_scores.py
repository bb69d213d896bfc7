"""How close a generated reply is to the reference, as counts that can be summed over any set of dialogues.

    words            casefolded runs of letters and digits; each Chinese, Japanese or Korean character is a word
    token P, R, F1   overlap of the two bags of words; precision over the reply, recall over the reference
    ROUGE-L          F1 of the longest common subsequence of words:  P = LCS / |reply|, R = LCS / |reference|
    exact match      the words are the same
    BLEU             sacrebleu's n-gram matches (1..4), corpus level: 100 BP (prod p_n)^(1/4), exponential smoothing
    chrF             character n-grams (1..6), without blanks, beta = 2, corpus level

P, R, F1, ROUGE-L and exact match are means over replies; BLEU and chrF are computed from summed counts, as sacrebleu does
(`tests/trainer/evaluation/test_text_scores.py` compares them with its own scores).
Sources: Papineni et al. 2002; Post 2018, arXiv:1804.08771; Popović 2015 (W15-3049); Lin 2004 (W04-1013).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from chatmill.config import ConfigError

CHRF_ORDER = 6
BLEU_ORDER = 4
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text.casefold())


def reply_scores(reply: str, reference: str) -> dict[str, float]:
    """Sums for one reply: word overlap, ROUGE-L, exact match, chrF counts."""
    mine, theirs = words(reply), words(reference)
    shared = sum((Counter(mine) & Counter(theirs)).values())
    common = LCSseq.similarity(mine, theirs)

    def ratio(hits: int, of: int) -> float:
        return hits / of if of else float(len(mine) == len(theirs))  # two empty texts agree

    def f1(hits: int) -> float:
        return 2 * hits / (len(mine) + len(theirs)) if mine or theirs else 1.0

    out = {
        "replies": 1.0,
        "token_precision": ratio(shared, len(mine)),
        "token_recall": ratio(shared, len(theirs)),
        "token_f1": f1(shared),
        "rouge_l": f1(common),
        "exact_match": float(mine == theirs),
        "words": float(len(mine)),
        "reference_words": float(len(theirs)),
    }
    return out | chrf_counts(reply, reference)


def chrf_counts(reply: str, reference: str) -> dict[str, float]:
    """Character n-gram counts by order: of the reply, of the reference, in both."""
    mine, theirs = "".join(reply.split()), "".join(reference.split())
    out: dict[str, float] = {}
    for n in range(1, CHRF_ORDER + 1):
        a = Counter(mine[i : i + n] for i in range(len(mine) - n + 1))
        b = Counter(theirs[i : i + n] for i in range(len(theirs) - n + 1))
        # as in sacrebleu: if the reference is too short for an order, the reply's n-grams of that order do not count
        out |= {f"chrf_reply_{n}": float(a.total() if b else 0), f"chrf_reference_{n}": float(b.total())}
        out[f"chrf_match_{n}"] = float((a & b).total())
    return out


def chrf(sums: Mapping[str, NDArray[np.float64]], beta: float = 2.0) -> NDArray[np.float64]:
    """chrF in percent from summed counts, each of any one shape."""
    precision = recall = orders = np.zeros_like(sums["chrf_match_1"])
    for n in range(1, CHRF_ORDER + 1):
        a, b, hits = sums[f"chrf_reply_{n}"], sums[f"chrf_reference_{n}"], sums[f"chrf_match_{n}"]
        counted = (a > 0) & (b > 0)
        precision = precision + np.where(counted, hits / np.maximum(a, 1), 0.0)
        recall = recall + np.where(counted, hits / np.maximum(b, 1), 0.0)
        orders = orders + counted
    precision, recall = precision / np.maximum(orders, 1), recall / np.maximum(orders, 1)
    below = beta**2 * precision + recall
    return np.where(below > 0, 100 * (1 + beta**2) * precision * recall / np.where(below > 0, below, 1.0), 0.0)


class Bleu:
    """sacrebleu's BLEU as sums: the counts of one reply, the score of summed counts.

    Raises ImportError without sacrebleu, ConfigError for a tokenizer that it does not have or whose package is missing.
    """

    def __init__(self, tokenize: str = "13a") -> None:
        from sacrebleu.metrics.bleu import BLEU

        known = sorted(set(BLEU.TOKENIZERS) - {"none"})
        if tokenize not in known:
            raise ConfigError(f"--bleu-tokenize {tokenize}: unknown. Expected auto or one of {', '.join(known)}.")
        try:
            self._sentence = BLEU(tokenize=tokenize, effective_order=True)
            self._corpus = BLEU(tokenize=tokenize)
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"--bleu-tokenize {tokenize}: {' '.join(str(error).split())[:300]}") from error

    def counts(self, reply: str, reference: str) -> dict[str, float]:
        """n-gram matches and totals by order, lengths in sacrebleu's tokens."""
        found = self._sentence.sentence_score(reply, [reference])
        out = {f"bleu_match_{n}": float(found.counts[n - 1]) for n in range(1, BLEU_ORDER + 1)}
        out |= {f"bleu_total_{n}": float(found.totals[n - 1]) for n in range(1, BLEU_ORDER + 1)}
        return out | {"bleu_reply": float(found.sys_len), "bleu_reference": float(found.ref_len)}

    def score(self, sums: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Corpus BLEU in percent for every entry of the summed counts."""
        shape = sums["bleu_reply"].shape
        columns = {name: np.ravel(sums[name]) for name in sums if name.startswith("bleu_")}
        orders = range(1, BLEU_ORDER + 1)
        scores = [
            self._corpus.compute_bleu(
                correct=[int(columns[f"bleu_match_{n}"][i]) for n in orders],
                total=[int(columns[f"bleu_total_{n}"][i]) for n in orders],
                sys_len=int(columns["bleu_reply"][i]),
                ref_len=int(columns["bleu_reference"][i]),
                smooth_method="exp",
            ).score
            for i in range(columns["bleu_reply"].size)
        ]
        return np.array(scores, dtype=np.float64).reshape(shape)

    def signature(self) -> str:
        """What others need to reproduce the figure."""
        self._corpus.corpus_score(["a"], [["a"]])  # sets the number of references
        return str(self._corpus.get_signature())


def chrf_signature() -> str:
    """sacrebleu's name for the chrF above. Raises ImportError without sacrebleu."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature())


def distinct(replies: Sequence[str], n: int) -> float:
    """Different n-grams of words over all replies, divided by all of them (Li et al., arXiv:1510.03055)."""
    grams: Counter[tuple[Any, ...]] = Counter()
    for reply in replies:
        found = words(reply)
        grams.update(tuple(found[i : i + n]) for i in range(len(found) - n + 1))
    return len(grams) / grams.total() if grams else 0.0
