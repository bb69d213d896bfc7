"""The loops of a binary that multiply matrices, found in its disassembly.

    for loop in matrix_loops(nvdisasm_text):     # lines of one innermost loop
        spills = sum("LDL" in line or "STL" in line for line in loop)

Where the assembler puts the jump back, and whether it has a condition, differs between its versions. So loops are those of the
flow graph: a jump back belongs to one if its target dominates it. Source: Aho, Sethi, Ullman, Compilers, section 10.4.
"""

from __future__ import annotations

import functools
import itertools
import re

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[\dT]+\s+)?([A-Z][A-Z0-9_.a-z]*)(.*)")
# on Ampere, Ada and desktop Blackwell (HMMA), Hopper, Blackwell of data centres
MATRIX_PRODUCT = re.compile(r"\b(?:HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA)\b")
ENDS_BLOCK = ("BRA", "BRX", "JMP", "EXIT", "RET", "KILL")


def matrix_loops(sass: str) -> list[list[str]]:
    """Lines of every innermost loop that holds matrix products, in the binary's order.

    Blocks that only wait for a barrier once more, which lie behind the code and jump back into it, are left out.
    """
    lines = sass.splitlines()
    blocks, follows = _flow(lines)
    text = ["\n".join(lines[start:end]) for start, end in blocks]
    before: list[set[int]] = [set() for _ in blocks]
    for block, following in enumerate(follows):
        for target in following:
            before[target].add(block)
    above = _dominators(follows, before)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(follows):
        for head in following:
            if above[block] >> head & 1:
                body, todo = bodies.setdefault(head, {head}), [block]
                while todo:
                    if (member := todo.pop()) not in body:
                        body.add(member)
                        todo += before[member]
    found = [body for body in bodies.values() if any(MATRIX_PRODUCT.search(text[block]) for block in body)]
    inner = [body for body in found if not any(other < body for other in found)]
    waiting = {i for i, part in enumerate(text) if i in follows[i] and "SYNCS.PHASECHK" in part}
    waiting |= {i for i in range(len(blocks)) if before[i] and before[i] <= waiting and _mnemonics(text[i]) == ["BRA"]}
    return [[line for block in sorted(body - waiting) for line in text[block].splitlines()] for body in inner]


def _mnemonics(text: str) -> list[str]:
    """Mnemonics, without their suffixes, of a block."""
    return [m[1].split(".")[0] for line in text.splitlines() if (m := INSTRUCTION.search(line)) and m[1] != "NOP"]


def _flow(lines: list[str]) -> tuple[list[tuple[int, int]], list[set[int]]]:
    """Basic blocks (first line, end) and, for each, those that may follow it."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    ends = {i + 1 for i, line in enumerate(lines) if (m := INSTRUCTION.search(line)) and m[1].split(".")[0] in ENDS_BLOCK}
    starts = sorted({0, *labels.values(), *(i for i in ends if i < len(lines))})
    blocks = list(itertools.pairwise([*starts, len(lines)]))
    at = {start: number for number, (start, _) in enumerate(blocks)}
    follows: list[set[int]] = []
    for number, (start, end) in enumerate(blocks):
        last = next((line for line in reversed(lines[start:end]) if INSTRUCTION.search(line)), "")
        kind = m[1].split(".")[0] if (m := INSTRUCTION.search(last)) else ""
        target = re.search(r"`\((\.L_x_\d+)\)", last) if kind == "BRA" else None
        following = {at[labels[target[1]]]} if target and target[1] in labels else set()
        # a predicate, or a condition of a uniform branch, may let it pass
        if (kind not in ENDS_BLOCK or re.search(r"@!?U?P\d", last) or "BRA.DIV" in last) and number + 1 < len(blocks):
            following.add(number + 1)
        follows.append(following)
    return blocks, follows


def _dominators(follows: list[set[int]], before: list[set[int]]) -> list[int]:
    """For each block the set, as bits, of those passed on every way to it, itself included. What no jump reaches is a start."""
    starts, reached = [], set[int]()
    for block in range(len(follows)):
        if block not in reached:
            starts.append(block)
            todo = [block]
            while todo:
                if (member := todo.pop()) not in reached:
                    reached.add(member)
                    todo += follows[member]
    above = [(1 << len(follows)) - 1] * len(follows)
    for block in starts:
        above[block] = 1 << block
    changed = True
    while changed:
        changed = False
        for block in set(range(len(follows))) - set(starts):
            shared = functools.reduce(lambda a, b: a & b, (above[other] for other in before[block]))
            if (new := shared | 1 << block) != above[block]:
                above[block], changed = new, True
    return above
