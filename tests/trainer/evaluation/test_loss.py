"""The validation of a training: its standard errors."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from chatmill.trainer.evaluation.loss import pooled, standard_error


def test_the_standard_error_is_the_spread_of_repeated_validations() -> None:
    draw = random.Random(3)

    def validation() -> tuple[list[float], list[int]]:
        counts = [draw.randrange(200, 800) for _ in range(60)]
        return [n * (3.0 + draw.gauss(0, 0.4)) for n in counts], counts

    found = [validation() for _ in range(800)]
    spread = statistics.stdev(sum(sums) / sum(counts) for sums, counts in found)
    errors = [error for sums, counts in found if (error := standard_error(sums, counts)) is not None]
    assert len(errors) == 800 and statistics.mean(errors) == pytest.approx(spread, rel=0.1)
    assert standard_error([3.0, 5.0, 0.0], [4, 3, 0]) == standard_error([3.0, 5.0], [4, 3])
    assert standard_error([3.0], [4]) is None and standard_error([0.0, 0.0], [0, 0]) is None


def test_data_sets_together_have_the_error_of_independent_parts() -> None:
    first = {"loss": 3.0, "accuracy": 0.4, "loss_tokens": 300, "dialogues": 3, "loss_se": 0.3, "accuracy_se": 0.02}
    second = first | {"loss": 2.0, "loss_tokens": 100, "dialogues": 2, "loss_se": 0.4}
    both = pooled([first, second])
    assert both["loss"] == pytest.approx(2.75) and both["dialogues"] == 5
    assert both["loss_se"] == pytest.approx(math.hypot(0.75 * 0.3, 0.25 * 0.4))
    second.pop("loss_se")  # one pack alone
    assert "loss_se" not in pooled([first, second]) and "accuracy_se" in pooled([first, second])
