"""What `chatmill eval` measures on a CPU unless it is told otherwise: as much as two cores do in about two minutes.

    share = cpu_share(134_515_008)      # tokens to read, replies to generate, choices to make and among how many

All that a GPU measures would take a CPU hours for a model of some hundred million parameters. The share follows from the number
of parameters alone, never from the speed of the machine: the same command gives the same figures everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from .figures import CANDIDATES

FLOPS = 50e9  # fp32 products of these shapes on two cores: 48 to 71 GFLOP/s (docs/log.md)
SECONDS = {"tokens": 40.0, "replies": 25.0, "selection": 25.0}  # the rest of two minutes: reading and loading
PROMPT, CANDIDATE = 256, 24  # usual tokens
ONE_BY_ONE = 2  # what a token costs that is generated in a small batch, in tokens that are read


@dataclass(frozen=True, slots=True)
class Share:
    """tokens: of the dialogues that are read. replies, choices: dialogues; a choice is among `candidates` replies."""

    tokens: int | None
    replies: int
    choices: int
    candidates: int = CANDIDATES[-1]


EVERYTHING = Share(None, 256, 256)


def cpu_share(parameters: int, max_new_tokens: int = 128) -> Share:
    """For a model of so many parameters. 4 to 32 replies and 4 to 8 choices; among 10 where among 100 costs too much."""

    def affordable(part: str, each: int) -> int:
        return int(SECONDS[part] * FLOPS / (2 * parameters * each))

    choices = {count: affordable("selection", PROMPT + count * CANDIDATE) for count in CANDIDATES}
    among = CANDIDATES[-1] if choices[CANDIDATES[-1]] >= 8 else CANDIDATES[0]
    replies = affordable("replies", PROMPT + ONE_BY_ONE * max_new_tokens)
    return Share(affordable("tokens", 1), min(32, max(4, replies)), min(8, max(4, choices[among])), among)
