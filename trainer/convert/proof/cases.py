"""What a proof asks, and what the checkpoint answers: prompts, our greedy replies, and the logits behind each token of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chatmill.config import ConfigError

from ....data.tokenizer.tokenizer import ChatTokenizer
from ...backends.choose import build_model
from ...checkpoint.checkpoint import Checkpoint
from ...model.language_model import LanguageModel

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "你好！你叫什么名字？",
    "请用一句话解释为什么天空是蓝色的。",
    "def f(x):\n    return  x**2  # 12345\n\nWhat does this do?",
    "It's 3:45 pm, isn't it? I'LL wait… 😀👩‍👩‍👧 — naïve café",
)
# Where tokenizers differ: blanks, digits, contractions, scripts, marks, symbols, letters of several code points.
TEXTS = (
    *QUESTIONS,
    "Hello world",
    " leading",
    "trailing ",
    "  two  blanks   three",
    "tab\tand\nnew\n\nlines\r\n\r\nend\n ",
    "\n\n\n   x",
    "1234567890 3.14159 1,000,000 2026-11-30 0x1F 007",
    "٣٤٥ 一二三 ①②③ ½ ²",
    "it's it'S IT'S we'll WE'LL I'm you'Re 's",
    "O'Neil d'accord",
    "中文和English混排，带标点。“引号”《书名》！",
    "繁體中文測試：臺灣、香港",
    "日本語のテキスト、カタカナ。",
    "한국어 문장입니다.",
    "Привет, мир! Ёлка",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Tiếng Việt có dấu",
    "😀",
    "👍🏽👨‍👩‍👧‍👦🇨🇳",
    "a😀b 🎉🎉",
    "∑∫√≤≥±×÷",
    "€100 £5 ¥300 #hash @user $x_1 %d",
    "…—–‘’“”„«»",
    "for (int i=0; i<10; ++i) { a[i] += b->c; } // ok",
    "<html><body class='x'>&amp;</body></html>",
    '{"key": [1, 2, {"a": null}]}',
    "https://example.org/a?b=c&d=e#f",
    "C:\\Users\\name\\*.txt",
    "SELECT * FROM t WHERE a != 'b';",
    "fooBarBaz HTTPServer iPhone15Pro",
    "e\u0301 a\u030a n\u0303",
    "\u00a0nbsp\u3000wide\u200bzero",
    "ａｂｃ１２３！",
    "ﬁ ﬂ ǅ ß ẞ İ ı",
    "𝒜𝓑 𝟙𝟚 𠀀𪚥",
    "........ ------ ======== !!!??",
)


@dataclass(frozen=True)
class Case:
    """One prompt and our greedy reply.

    text: the prompt as it is sent. ids: of the prompt. messages: what the template made it of; None without a template.
    reply: our tokens, at most as many as were asked for. ended: a token that ends replies came after them.
    ends: tokens that end a reply.
    logits: Float32["n V"], those behind each token of the reply, and behind the end where there is one.
    """

    text: str
    ids: list[int]
    messages: tuple[dict[str, str], ...] | None
    reply: list[int]
    ended: bool
    ends: frozenset[int]
    logits: Tensor


@dataclass(frozen=True)
class Answer:
    """The same of the artefact. logits: Float32["n K"] for the same reply, of the tokens that were asked for."""

    ids: list[int]
    text: str | None
    reply: list[int]
    logits: Tensor


def load_tokenizer(checkpoint: Checkpoint) -> ChatTokenizer:
    """The checkpoint's tokenizer. Raises ConfigError where it has none."""
    if "tokenizer.json" not in checkpoint.files():
        raise ConfigError(f"{checkpoint.path} has no tokenizer.json: without one there is nothing to ask the exported model.")
    return ChatTokenizer.load(checkpoint.path)


@torch.no_grad()
def make_cases(checkpoint: Checkpoint, tokenizer: ChatTokenizer, questions: Sequence[str], tokens: int) -> list[Case]:
    """Our side, in fp32 on this machine's CPU: the numbers that an export has to reproduce."""
    model = build_model(checkpoint.config)
    checkpoint.load_into(model)
    model.float().eval()
    found, ends = [], frozenset(tokenizer.stop_ids)
    for question in questions:
        messages = ({"role": "user", "content": question},)
        if tokenizer.template_source is None:
            text, ids, asked = question, tokenizer.encode(question), None
        else:
            tokenizer.use_todays_date()
            ids, asked = tokenizer.prompt_ids(messages), messages
            text = tokenizer.template.render(messages, add_generation_prompt=True)
        reply, rows, ended = _greedy(model, ids, min(tokens, checkpoint.config.context - len(ids)), ends)
        if rows:
            found.append(Case(text, ids, asked, reply, ended, ends, torch.stack(rows)))
    if not found:
        raise ConfigError(f"{checkpoint.path}: its context of {checkpoint.config.context} tokens holds none of the prompts.")
    return found


def _greedy(model: LanguageModel, ids: list[int], tokens: int, ends: frozenset[int]) -> tuple[list[int], list[Tensor], bool]:
    reply: list[int] = []
    rows: list[Tensor] = []
    cache = model.new_cache(len(ids) + max(tokens, 0), torch.float32, "cpu")
    pending = ids
    for _ in range(tokens):
        rows.append(model.cached_logits(torch.tensor(pending), cache).clone())
        token = int(rows[-1].argmax())
        if token in ends:
            return reply, rows, True
        reply.append(token)
        pending = [token]
    return reply, rows, False
