"""What one rendering of a chat template may cost: steps, characters, sizes of values, processor time.

    budget = Budget();  budget.spend();  budget.weigh(value);  budget.write(80)      # TemplateRefusedError when used up

Steps are counted, so the same template fails at the same place on every machine. The clock counts the thread's
processor time, which does not depend on the load of the machine; it is checked every thousand steps. data/tokenizer/sandbox.py
says what costs how much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from jinja2.utils import Namespace

from chatmill.config import ConfigError

MAX_SOURCE_CHARS = 1_000_000
MAX_STEPS = 2_000_000
MAX_OUTPUT_CHARS = 16_000_000  # inner output, of macros and set blocks, counts too
MAX_VALUE_CHARS = 4_000_000  # one string that a template makes
MAX_NODES = 500_000  # values in one nested list
MAX_ARGUMENT = 100_000  # widths, counts and other numbers given to filters and methods
MAX_SECONDS = 20.0  # of the thread's processor time


class TemplateRefusedError(ConfigError):
    """A template that does not compile, raises, or exceeds its limits."""


class Budget:
    """What is left to one rendering."""

    __slots__ = ("chars", "clock", "deadline", "next_look", "steps")

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.steps, self.chars, self.clock = MAX_STEPS, MAX_OUTPUT_CHARS, clock
        self.deadline, self.next_look = clock() + MAX_SECONDS, MAX_STEPS - 1000

    def spend(self, steps: int = 1) -> None:
        """Take steps and check the clock now and then."""
        self.steps -= steps
        if self.steps < self.next_look:
            self.next_look = self.steps - 1000
            if self.steps < 0:
                raise TemplateRefusedError(f"chat template: more than {MAX_STEPS:,} steps (loop rounds, calls, operations)")
            if self.clock() > self.deadline:
                raise TemplateRefusedError(f"chat template: more than {MAX_SECONDS:g} s of processor time")

    def write(self, chars: int) -> None:
        """Take output."""
        self.chars -= chars
        if self.chars < 0:
            raise TemplateRefusedError(f"chat template: more than {MAX_OUTPUT_CHARS:,} characters of output")
        self.spend(1 + (chars >> 8))

    def weigh(self, value: Any) -> None:
        """Take steps for working on a value once."""
        if isinstance(value, str):
            self.spend(1 + (len(value) >> 8))
        elif isinstance(value, (int, float)) or value is None:
            if isinstance(value, int) and value.bit_length() > 4096:
                raise TemplateRefusedError("chat template: a number of more than 4,096 bits")
            self.spend()
        else:
            self.spend(1 + (self.deep(value) >> 1))

    def deep(self, value: Any) -> int:
        """Values and characters in a nest of lists and dicts, counted as often as they would be written."""
        count, stack = 0, [value]
        while stack:
            item = stack.pop()
            count += 1
            if isinstance(item, str):
                count += len(item) >> 5
            elif isinstance(item, dict):
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                stack.extend(item)
            elif isinstance(item, Namespace):
                raise TemplateRefusedError("chat template: a namespace can be neither written nor put into a list")
            if count + len(stack) > MAX_NODES:
                raise TemplateRefusedError(f"chat template: more than {MAX_NODES:,} values in one list")
        return count

    def __str__(self) -> str:  # printed in loops by the compiled template: the cheapest call there is
        self.spend()
        return ""

    def __bool__(self) -> bool:  # asked in loop conditions
        self.spend()
        return True
