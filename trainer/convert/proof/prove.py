"""Proof of an export: the checkpoint and the artefact answer the same prompts, and every difference is measured.

    found = prove("runs/NAME", "model.gguf")
    print("\n".join(found.lines()))
    found.holds                             # False: `chatmill export --prove` ends with code 1

A Hugging Face folder runs in transformers, a PEFT folder in peft, a GGUF file in llama.cpp. Compared are the ids of texts in
many scripts, the prompts as the artefact's own template renders them, the logits behind each token of our greedy reply, and the
artefact's own greedy reply. Smaller types change the weights, so the tolerance, the largest allowed difference of a logit,
depends on the type. Where a reply differs, our logits of the two tokens say whether a difference of that size explains it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from chatmill.config import ConfigError
from chatmill.progress import Report, silent

from ...adapters.merging import facts_of, open_base, with_base
from ...checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..gguf.splitting import RULES, rule_of
from ..tokenizer_class import is_replaced
from . import in_transformers, llama_cpp
from .cases import QUESTIONS, TEXTS, Answer, Case, load_tokenizer, make_cases

# Largest difference of a logit by the type of the weights. SmolLM2-135M-Instruct showed 5.7e-5 in fp32, 0.25 in bf16 and 1.93
# in q8_0; in fewer bits only a tiny model was tried: 1.88 (q5_0), 2.26 (q4_0), 2.7 (mxfp4).
TOLERANCES = {"fp32": 0.01, "fp16": 0.1, "bf16": 1.0, "q8_0": 4.0, "q5_0": 6.0, "q4_0": 10.0, "mxfp4": 12.0}
TOKENS = 24
PHASES = ("our replies", "its replies")  # what prove reports


@dataclass(frozen=True)
class Proof:
    """What was compared, and each difference. largest: of a logit. mean: of the absolute differences.

    faults: sentences; empty where the artefact does what the checkpoint does, within the tolerance. notes: sentences.
    """

    program: str
    texts: int
    prompts: int
    largest: float
    mean: float
    tolerance: float
    equal_texts: int
    equal_prompts: int
    equal_replies: int
    rendered: int
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.faults

    def lines(self) -> list[str]:
        """For people."""
        template = f"{self.rendered} rendered by the artefact's template" if self.rendered else "no chat template"
        return [
            f"proof in {self.program}: {'holds' if self.holds else 'FAILS'}",
            f"  tokens          {self.equal_texts} of {self.texts} texts equal",
            f"  prompts         {self.equal_prompts} of {self.prompts} equal ({template})",
            f"  logits          largest difference {self.largest:.3g}, mean {self.mean:.2g} (tolerance {self.tolerance:g})",
            f"  greedy replies  {self.equal_replies} of {self.prompts} equal",
            *(f"  fault: {text}" for text in self.faults),
            *(f"  note: {text}" for text in self.notes),
        ]


def prove(
    checkpoint: Checkpoint | str | Path,
    artefact: str | Path,
    *,
    dtype: str = "fp32",
    tolerance: float | None = None,
    questions: Sequence[str] = QUESTIONS,
    texts: Sequence[str] = TEXTS,
    tokens: int = TOKENS,
    progress: Report = silent,
) -> Proof:
    """Compare a checkpoint with what was exported from it: a Hugging Face folder, a PEFT folder or a .gguf file.

    dtype: of the artefact's weights where they were rounded, which sets the tolerance; or give the tolerance itself.
    tokens: of a reply at most. Raises ConfigError where a program that is needed is missing or fails.
    """
    if tolerance is None and dtype not in TOLERANCES:
        raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(TOLERANCES)}.")
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    path, found = Path(artefact), checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    gguf = path.suffix == ".gguf"
    if gguf:
        llama_cpp.find_node_modules()  # before any work
    facts, whole = facts_of(found), with_base(found)
    base = None
    if (path / "adapter_config.json").is_file():
        if facts is None:
            raise ConfigError(f"{path} holds an adapter, {found.path} a whole model: they do not belong together.")
        base = open_base(facts, found.path, True)
    tokenizer = load_tokenizer(whole)
    progress("our replies", 0, 1)
    cases = make_cases(whole, tokenizer, questions, tokens)
    progress("our replies", 1, 1)
    progress("its replies", 0, 1)
    if gguf:
        ids, answers, columns = llama_cpp.ask(path, tokenizer, texts, cases, tokens)
    else:
        ids, answers = in_transformers.ask(path, base, is_replaced(whole), texts, cases, tokens)
        columns = [torch.arange(case.logits.shape[-1]).expand_as(case.logits) for case in cases]
    progress("its replies", 1, 1)
    program = "llama.cpp" if gguf else "transformers" if base is None else "peft"
    faults: list[str] = []
    notes: list[str] = []
    wrong = [(text, a, b) for text, a, b in zip(texts, map(tokenizer.encode, texts), ids, strict=True) if a != b]
    known = _known_difference(tokenizer.source) if gguf else lambda text: None
    for text, a, b in wrong:
        other, why = f"{text!r:.80} has the ids {_around(a, b)} here, {_around(b, a)} there", known(text)
        notes.append(f"{other}: {why}") if why else faults.append(other)
    asked = 0
    for case, answer in zip(cases, answers, strict=True):
        same = answer.ids == case.ids and answer.text in (None, case.text)
        asked += same
        if not same:
            where = "renders another text" if answer.text not in (None, case.text) else "has other ids"
            faults.append(f"the prompt {case.text[-60:]!r} {where} there")
    gaps = [(case.logits.gather(1, at) - answer.logits).abs() for case, answer, at in zip(cases, answers, columns, strict=True)]
    all_gaps = torch.cat([gap.flatten() for gap in gaps])
    largest = float(all_gaps.max()) if not all_gaps.isnan().any() else float("nan")
    if not largest <= limit:
        faults.append(f"a logit differs by {largest:.3g}; at most {limit:g} is allowed")
    equal = 0
    for case, answer in zip(cases, answers, strict=True):
        said = _difference(case, answer)
        equal += said is None
        if said is not None:
            text, gap = said
            (notes if gap <= 2 * limit else faults).append(text)
    return Proof(
        program, len(texts), len(cases), largest, float(all_gaps.mean()), limit, len(texts) - len(wrong), asked, equal,
        sum(answer.text is not None for answer in answers), faults, notes,
    )  # fmt: skip


def _difference(case: Case, answer: Answer) -> tuple[str, float] | None:
    """Where the greedy replies part, in words, and how far our logits of the two tokens are apart; None: equal."""
    if answer.reply == case.reply:
        return None
    at = next((i for i, (a, b) in enumerate(zip(case.reply, answer.reply, strict=False)) if a != b), None)
    if at is None:  # one of the two ended first
        at = min(len(case.reply), len(answer.reply))
    row, theirs = case.logits[at], answer.reply[at : at + 1]
    there = row[theirs] if theirs else row[sorted(case.ends)] if case.ends else row.min()
    gap = float(row.max() - there.max())
    what = f"says token {theirs[0]}" if theirs else "ends"
    ours = case.reply[at] if at < len(case.reply) else "the end"
    return f"the reply to {case.text[-40:]!r} {what} at token {at} instead of {ours} (our logits are {gap:.3g} apart)", gap


def _known_difference(tokenizer_json: str) -> Callable[[str], str | None]:
    """Why llama.cpp gives other ids of a text than the tokenizer, where no GGUF file can change that."""
    name = rule_of(json.loads(tokenizer_json))
    rule = RULES[name] if name is not None else None

    def why(text: str) -> str | None:
        if rule is not None and rule.nearly:
            return f"llama.cpp splits otherwise: {rule.nearly}"
        if rule is not None and rule.nfc and not unicodedata.is_normalized("NFC", text):
            return "llama.cpp does not normalise texts"
        return None

    return why


def _around(ids: Sequence[int], others: Sequence[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
    return f"{list(ids[max(0, at - 1) : at + 4])} at {at}"
