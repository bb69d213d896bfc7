"""What a model does on held-out dialogues, as one record of sums per dialogue: tokens, generated replies, selections.

    measurer = Measurer(model, tokenizer, dialogues, seed=0)
    records = measurer.token_records(world)     # {uid: {"nll": ..., "tokens": ..., "top1": ...}}

The data fixes the units of work: packs of PACK_TOKENS for tokens, groups of GROUP replies, one dialogue per selection. Ranks
take units in turn and every record is made inside one unit, so neither the world size nor a batch size can change a record.
Records are added up later, on the host, in the order of the dialogues.
Shapes: T tokens of a pack, n tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from chatmill.progress import Report, silent

from ...data.tokenizer.tokenizer import ChatTokenizer
from ..distributed.world import World
from ..generation.candidates import grouped, score_candidates
from ..generation.prompt import Prompt, fit_messages
from ..generation.replies import Reply, replies_to_many
from ..generation.sampling import Sampling
from ..model.language_model import LanguageModel
from .figures import CANDIDATES, ROLES, TURN_BUCKETS
from .held_out import HeldOut, choose_turn
from .text_scores import Bleu, reply_scores, words

PACK_TOKENS = 2048
GROUP = 16
CHUNK = 256  # tokens whose logits exist at a time
CANDIDATE_TOKENS = 256
GREEDY = Sampling()

Unit = TypeVar("Unit")
Found = TypeVar("Found")
Tick = Callable[[int], None]  # so much of the work is done
Record = dict[str, float]


def turn_bucket(reply: int) -> str:
    """The bucket of the reply-th assistant turn, counted from 1."""
    return TURN_BUCKETS[reply - 1 if reply <= 4 else 4 if reply <= 8 else 5 if reply <= 16 else 6]


@dataclass(frozen=True)
class Measurer:
    """A model, its held-out dialogues, and how replies are made. candidates: replies to choose among, the real one included."""

    model: LanguageModel
    tokenizer: ChatTokenizer
    dialogues: Sequence[HeldOut]
    seed: int = 0
    sampling: Sampling = GREEDY
    max_new_tokens: int = 128
    bleu: Bleu | None = None
    candidates: int = CANDIDATES[-1]
    progress: Report = silent

    def token_records(self, world: World) -> dict[str, Record]:
        """Sums over tokens by uid."""
        packs = grouped([len(d.ids) for d in self.dialogues], PACK_TOKENS)
        found = self._spread(
            world, "tokens", packs, self._measure_pack, [sum(len(self.dialogues[i].ids) for i in pack) for pack in packs]
        )
        out: dict[str, Record] = {}
        for i, dialogue in enumerate(self.dialogues):  # a dialogue's samples add up
            sums = out.setdefault(dialogue.uid, {})
            for name, value in found[str(i)].items():
                sums[name] = sums.get(name, 0.0) + value
        return out

    def reply_records(self, world: World, count: int) -> dict[str, dict[str, Any]]:
        """Texts and sums of one generated reply for each of the first `count` dialogues with a turn to answer."""
        chosen = self._chosen(count)
        units = [chosen[i : i + GROUP] for i in range(0, len(chosen), GROUP)]
        return self._spread(world, "replies", units, self._reply_group, list(map(len, units)))

    def selection_records(self, world: World, count: int) -> dict[str, Record]:
        """Ranks of the real reply among replies of other dialogues, for the first `count` dialogues."""
        pool = reply_pool(self.dialogues)
        units = self._chosen(count)
        return self._spread(world, "selection", units, lambda unit, tick: self._select(unit, pool, tick), [1] * len(units))

    def _spread(
        self, world: World, what: str, units: Sequence[Unit], do: Callable[[Unit, Tick], dict[str, Found]], sizes: Sequence[int]
    ) -> dict[str, Found]:
        """Do this rank's share of the units; every rank gets all records, in the order of the units.

        sizes: what `do` ticks of each unit.
        """
        mine: dict[int, dict[str, Found]] = {}
        done, total = 0, sum(sizes[world.rank :: world.world_size])

        def tick(count: int) -> None:
            nonlocal done
            done += count
            self.progress(what, done, total)

        tick(0)
        for number in range(world.rank, len(units), world.world_size):
            mine[number] = do(units[number], tick)
        merged = {number: found for part in world.gather(mine) for number, found in part.items()}
        return {uid: record for number in sorted(merged) for uid, record in merged[number].items()}

    def _chosen(self, count: int) -> list[tuple[HeldOut, int]]:
        samples: dict[str, list[HeldOut]] = {}
        for d in self.dialogues:
            samples.setdefault(d.uid, []).append(d)
        chosen = (choose_turn(found, self.seed) for found in samples.values())
        return [choice for choice in chosen if choice is not None][:count]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # -- tokens

    @torch.no_grad()
    def _measure_pack(self, pack: Sequence[int], tick: Tick) -> dict[str, Record]:
        held = [self.dialogues[i] for i in pack]
        device = self._device
        tokens = torch.from_numpy(np.concatenate([d.ids for d in held])).to(device)  # (T,)
        positions = torch.cat([torch.arange(len(d.ids)) for d in held]).to(device)
        edges = np.concatenate([[0], np.cumsum([len(d.ids) for d in held])])
        cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
        hidden = self.model.hidden_states(tokens, positions, cu_seqlens)
        nll, rank = np.zeros(len(tokens)), np.zeros(len(tokens), dtype=np.int64)  # of token t, given those before it
        for start in range(0, len(tokens) - 1, CHUNK):
            stop = min(start + CHUNK, len(tokens) - 1)
            logits = self.model.classify(hidden[start:stop])  # (n, V)
            targets = tokens[start + 1 : stop + 1, None]
            picked = logits.gather(1, targets)
            nll[start + 1 : stop + 1] = (logits.logsumexp(-1).double() - picked[:, 0].double()).cpu().numpy()
            # ties go to the lower id, as in argmax
            order = torch.arange(logits.shape[1], device=device)
            ahead = (logits > picked) | ((logits == picked) & (order < targets))
            rank[start + 1 : stop + 1] = ahead.sum(-1).cpu().numpy()
        tick(len(tokens))
        spans = zip(pack, held, edges[:-1], edges[1:], strict=True)
        return {str(i): token_record(d, nll[a:b], rank[a:b]) for i, d, a, b in spans}

    # -- generation

    def _reply_group(self, group: Sequence[tuple[HeldOut, int]], tick: Tick) -> dict[str, dict[str, Any]]:
        prompts = [
            Prompt(self._prompt(d, turn), self.max_new_tokens, self.sampling, zlib.crc32(f"{self.seed} reply {d.uid}".encode()))
            for d, turn in group
        ]
        made: dict[int, Reply] = {}
        for index, reply_made in replies_to_many(self.model, self.tokenizer, prompts, batch=GROUP):
            made[index] = reply_made
            tick(1)
        out: dict[str, dict[str, Any]] = {}
        for i, (d, turn) in enumerate(group):
            reply, reference = made[i].text.strip(), d.conversation.turns[turn].content.strip()
            scores = reply_scores(reply, reference)
            scores |= {"reply_tokens": float(made[i].tokens), "reference_tokens": float(len(d.reply_ids(turn)) - 1)}
            scores["stopped"] = float(made[i].finish_reason == "stop")
            if self.bleu is not None:
                scores |= self.bleu.counts(reply, reference)
            out[d.uid] = {"turn": turn, "reply": reply, "reference": reference, "sums": scores}
        return out

    def _prompt(self, dialogue: HeldOut, turn: int) -> list[int]:
        context = self.model.config.context
        messages, more = dialogue.prompt_parts(self.tokenizer, turn)
        return fit_messages(self.tokenizer, messages, context, self.max_new_tokens, more)[0]

    # -- selection

    def _select(self, unit: tuple[HeldOut, int], pool: Sequence[tuple[str, str, list[int]]], tick: Tick) -> dict[str, Record]:
        dialogue, turn = unit
        context = self.model.config.context
        reserve = min(CANDIDATE_TOKENS, context // 2)
        messages, more = dialogue.prompt_parts(self.tokenizer, turn)
        prompt, _ = fit_messages(self.tokenizer, messages, context, reserve, more)
        room = min(reserve, context - len(prompt))
        real = key_of(dialogue.conversation.turns[turn].content)
        others = draw_candidates(pool, dialogue.uid, real, self.candidates - 1, self.seed)
        found = score_candidates(self.model, prompt, [ids[:room] for ids in (dialogue.reply_ids(turn), *others)])
        tick(1)
        return {dialogue.uid: selection_record(found)}


def token_record(dialogue: HeldOut, nll: NDArray[np.float64], rank: NDArray[np.int64]) -> Record:
    """Sums of one dialogue: supervised tokens, then by role, then by which reply of the dialogue it is."""

    def sums(prefix: str, picked: NDArray[np.bool_]) -> Record:
        return {
            f"{prefix}nll": float(nll[picked].sum()),
            f"{prefix}tokens": float(picked.sum()),
            f"{prefix}top1": float((rank[picked] < 1).sum()),
            f"{prefix}top5": float((rank[picked] < 5).sum()),
        }

    out = sums("", dialogue.loss_mask) | {"bytes": float(dialogue.text_bytes)}
    roles = np.array([t.role for t in dialogue.conversation.turns] + [""])[dialogue.turns]  # -1: the template's own
    later = np.arange(len(dialogue.ids)) > 0  # the first token follows nothing
    later &= dialogue.turns >= dialogue.since  # an earlier sample of the dialogue has counted the others
    for role in ROLES:
        picked = dialogue.loss_mask if role == "assistant" else (roles == role) & later
        if picked.any():
            out |= sums(f"{role} ", picked)
    asked = [i for i, t in enumerate(dialogue.conversation.turns) if t.role == "assistant"]
    for turn in np.unique(dialogue.turns[dialogue.loss_mask]) if not dialogue.conversation.is_document else ():
        bucket = turn_bucket(asked.index(int(turn)) + 1)
        for name, value in sums(f"reply {bucket} ", dialogue.loss_mask & (dialogue.turns == turn)).items():
            out[name] = out.get(name, 0.0) + value
    return out


def key_of(text: str) -> str:
    """Replies with the same words are the same reply."""
    return " ".join(words(text)) or text.strip()


def reply_pool(dialogues: Sequence[HeldOut]) -> list[tuple[str, str, list[int]]]:
    """(dialogue, words, tokens) of every supervised reply."""
    return [(d.uid, key_of(d.conversation.turns[t].content), d.reply_ids(t)) for d in dialogues for t in d.replies()]


def draw_candidates(pool: Sequence[tuple[str, str, list[int]]], uid: str, real: str, count: int, seed: int) -> list[list[int]]:
    """Up to `count` different replies of other dialogues, none like the real one.

    A pure function of its arguments; the first 9 of 99 are those of a choice among 10.
    """

    def candidates() -> Iterator[list[int]]:
        taken = {real}
        generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(uid.encode())]))
        for i in generator.permutation(len(pool)):
            whose, key, ids = pool[i]
            if whose != uid and key not in taken:
                taken.add(key)
                yield ids

    return [ids for _, ids in zip(range(count), candidates(), strict=False)]


def selection_record(found: Sequence[tuple[float, int]]) -> Record:
    """Hits of the first candidate, which is the real one, among the first 10 and among 100.

    A choice without enough candidates is left out. Ordered by mean ln p per token, and again by the sum; the real reply loses
    ties.
    """
    out: Record = {"choices": 1.0}
    for how, scores in (("mean", [p / n for p, n in found]), ("sum", [p for p, _ in found])):
        for size in CANDIDATES:
            among = scores[1:size]
            if len(among) < size - 1:
                continue
            rank = 1 + sum(score >= scores[0] for score in among)
            for k in (1, 5, 10):
                if k < size:
                    out[f"recall_{k}_of_{size}_{how}"] = float(rank <= k)
            out[f"mean_reciprocal_rank_of_{size}_{how}"] = 1 / rank
    return out
