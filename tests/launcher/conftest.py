"""Prints the table of faults that the Slurm tests measured, after the test run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Recovery:
    """One fault: steps computed twice, and seconds from the fault to the next step."""

    fault: str
    steps_lost: int
    seconds: float


RECOVERIES = pytest.StashKey[list[Recovery]]()


@pytest.fixture(scope="session")
def recoveries(pytestconfig: pytest.Config) -> list[Recovery]:
    """Append to it; what is in it at the end is printed."""
    return pytestconfig.stash.setdefault(RECOVERIES, [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table, where any Slurm test ran."""
    rows = config.stash.get(RECOVERIES, [])
    if rows:
        terminalreporter.section("faults on a real Slurm, 2 nodes x 2 processes")
        terminalreporter.line(f"{'fault':<32}{'steps lost':>12}{'seconds to the next step':>28}")
        for row in rows:
            terminalreporter.line(f"{row.fault:<32}{row.steps_lost:>12}{row.seconds:>28.1f}")
