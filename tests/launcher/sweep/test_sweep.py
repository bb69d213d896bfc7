"""Sweeps: what a file may say, what is searched, what is written; interrupted workers; a Slurm array."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.launcher.slurm_cluster import SlurmCluster, missing_programs
from tests.launcher.tiny_run import make_data, wait_until, write_recipe

from chatmill.config import ConfigError
from chatmill.launcher.__main__ import main
from chatmill.launcher.jobs.job import JobSpec
from chatmill.launcher.jobs.slurm import render_sweep
from chatmill.launcher.sweep.config import Axis, SweepConfig, load_sweep
from chatmill.launcher.sweep.report import TrialResult, best_recipe, collect, fit_scaling, render, table, write_results
from chatmill.launcher.sweep.study import ask, distribution, load_optuna, open_study, put_back
from chatmill.launcher.sweep.worker import figures
from chatmill.trainer.config import load_recipe

REASON = missing_programs()


def sweep_file(folder: Path, **changes: Any) -> Path:
    """A sweep over learning rate and width of a tiny run."""
    recipe = write_recipe(folder, "base", folder / "data", make_data(folder / "data"), steps=30, every=10)
    fields: dict[str, Any] = {
        "name": "s",
        "dir": str(folder / "sweeps"),
        "recipe": str(recipe),
        "overrides": ["evaluation.at_end=true", "evaluation.every_steps=10", "evaluation.max_dialogues=4"],
        "trials": 4,
        "space": {"optimizer.lr": {"low": 1e-4, "high": 3e-2, "log": True}, "model.hidden_size": {"choices": [8, 32]}},
    }
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump(fields | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {"optimizer.rl": {"choices": [1]}}}, r"optimizer\.rl: unknown key; did you mean 'lr'"),
        ({"space": {"optimizer.lr": {"low": 1, "high": 0.5}}}, "expected low < high"),
        ({"space": {"optimizer.lr": {"low": 0, "high": 1, "log": True}}}, "low must be positive"),
        ({"space": {"optimizer.lr": {"low": 0.1, "choices": [1]}}}, "either choices, or low and high"),
        ({"space": {"optimizer.lr": {"low": -1, "high": 1}}}, "optimizer.lr"),
        ({"space": {}}, "space"),
        ({"overrides": ["evaluation.at_end=false"]}, "evaluation.at_end=true"),
        ({"overrides": ["evaluation.at_end=true"]}, "pruning needs validation in training"),
        ({"scaling": "tokenz"}, "expected parameters, tokens or one of"),
        ({"job": {"nodes": 2}}, "a trial runs on one node"),
        ({"name": "a\nb"}, "name"),
        ({"trails": 3}, "did you mean 'trials'"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_with_the_reason(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_sweep(sweep_file(tmp_path, **changes))


def test_numbers_that_yaml_takes_for_words_are_numbers(tmp_path: Path) -> None:
    path = sweep_file(tmp_path)
    path.write_text(path.read_text().replace("low: 0.0001", "low: 1e-4").replace("- 8\n", "- 8e0\n"))
    sweep = load_sweep(path)
    assert sweep.space["optimizer.lr"].low == pytest.approx(1e-4) and sweep.space["model.hidden_size"].choices == (8.0, 32)


def test_a_grid_has_every_combination_once() -> None:
    assert Axis(low=1, high=5, step=2).grid() == [1, 3, 5] and Axis(low=1, high=3).grid() == [1, 2, 3]
    assert Axis(low=1e-4, high=1e-2, log=True, points=3).grid() == pytest.approx([1e-4, 1e-3, 1e-2])
    assert Axis(low=0.0, high=1.0, step=0.25).grid() == [0.0, 0.25, 0.5, 0.75, 1.0]
    space = {"optimizer.lr": Axis(choices=(1e-3, 1e-2)), "model.layers": Axis(low=1, high=3)}
    points = SweepConfig(name="g", recipe="tiny", space=space).grid()
    assert len(points) == 6 and len({tuple(point.values()) for point in points}) == 6


def test_axes_become_the_distributions_of_their_kind() -> None:
    assert type(distribution(Axis(low=1, high=8))).__name__ == "IntDistribution"
    assert type(distribution(Axis(low=1, high=8.0))).__name__ == "FloatDistribution"
    assert type(distribution(Axis(choices=("a", None, 2)))).__name__ == "CategoricalDistribution"


def test_trials_are_given_out_exactly_as_often_as_asked_and_abandoned_ones_again(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, trials=3))
    study = open_study(sweep)
    trials = [ask(study, sweep) for _ in range(4)]
    assert [trial is None for trial in trials] == [False, False, False, True]
    assert len({trial.params["optimizer.lr"] for trial in trials[:3]}) == 3
    study.tell(trials[0].number, 1.0)
    put_back(study, trials[1].number, sweep)
    again = ask(open_study(sweep), sweep)
    assert again.params == trials[1].params and again.user_attrs["run"] == trials[1].user_attrs["run"] == "trial-0001"
    (sweep.folder / "runs" / "trial-0002" / "heartbeat").write_text("another-host 1\n")
    os.utime(sweep.folder / "runs" / "trial-0002" / "heartbeat", (1.0, 1.0))
    orphan = ask(open_study(sweep), sweep)
    assert orphan.params == trials[2].params and ask(study, sweep) is None
    assert len(collect(study, sweep)) == 3


def test_the_same_seed_asks_for_the_same_values(tmp_path: Path) -> None:
    drawn = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        sweep = load_sweep(sweep_file(tmp_path / name, sampler="random", seed=7))
        study = open_study(sweep)
        drawn.append([ask(study, sweep).params for _ in range(4)])
    assert drawn[0] == drawn[1]


def test_the_scaling_curve_is_found_again_and_only_from_enough_points() -> None:
    points: list[tuple[float | None, float | None]] = [(x, 1.7 + 40.0 * x**-0.31) for x in (1e3, 4e3, 2e4, 1e5, 9e5)]
    fit = fit_scaling([*points, (1e3, 9.0), (None, 1.0), (5.0, math.nan)])
    assert fit is not None and (fit.a, fit.b, fit.c) == pytest.approx((1.7, 40.0, 0.31), rel=0.05) and fit.points == 5
    assert fit.at(1e7) == pytest.approx(1.7 + 40.0 * 1e7**-0.31, rel=0.01)
    assert fit_scaling(points[:3]) is None and fit_scaling(points, maximise=True) is None
    falling = fit_scaling([(x, 5.0 * x**-0.5) for x in (1.0, 10.0, 100.0, 1000.0)])
    assert falling is not None and falling.a >= 0 and falling.c == pytest.approx(0.5, rel=0.02)


def test_the_report_escapes_what_the_file_says_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, scaling="parameters"))
    trials = [
        TrialResult(i, "complete" if i else "pruned", {"optimizer.lr": 10.0**-i, "model.hidden_size": 8}, 3.0 + i, 30, "r", 1.0)
        for i in range(5)
    ]
    trials.append(
        TrialResult(5, "failed", {"optimizer.lr": 1.0, "model.hidden_size": 8}, None, 0, "r", None, error="<script>x")
    )
    page = render(sweep, trials, {"optimizer.lr": 0.9, "model.hidden_size": 0.1}, None)
    assert "<script" not in page and "&lt;script&gt;x" in page and "http" not in page.replace("http-equiv", "")
    assert page.count('<path class="dots') == 5 and page.count(' way"') == 5 and "90.0 %" in page
    assert "trial" in table(sweep, trials) and len(table(sweep, trials).splitlines()) == 7


def test_a_diverged_trial_is_never_the_best(tmp_path: Path) -> None:
    """NaN compares with nothing: in a sorted list it leaves the trials around it in any order."""
    sweep = load_sweep(sweep_file(tmp_path, metric="accuracy", trials=5))
    study = open_study(sweep)
    for value in (0.5, math.nan, 0.9, math.inf, 0.7):
        trial = ask(study, sweep)
        trial.report(value, 10)
        good = math.isfinite(value)
        study.tell(trial.number, value if good else None, state=None if good else load_optuna().trial.TrialState.FAIL)
    trials = write_results(sweep)
    assert [t.value for t in trials if t.state == "complete"] == [0.9, 0.7, 0.5]
    assert [t.value for t in trials if t.state != "complete"] == [None, None]
    assert "NaN" not in (sweep.folder / "trials.json").read_text()
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": 10, "eval": {"loss": 2.0, "accuracy": 0.5}}, {"step": 20, "eval": {"loss": math.nan, "accuracy": 0.9}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (first, accuracy), (second, nothing) = figures(run, "accuracy")
    assert (first, accuracy, second) == (10, 0.5, 20) and math.isnan(nothing)


def test_the_best_recipe_is_a_file_that_loads_with_the_best_values(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path))
    best = TrialResult(3, "complete", {"optimizer.lr": 0.0123, "model.hidden_size": 8}, 1.5, 30, "r", 1.0)
    path = tmp_path / "best.yaml"
    path.write_text(best_recipe(sweep, best))
    recipe = load_recipe(str(path))
    assert (recipe.optimizer.lr, recipe.model.hidden_size, recipe.run.name) == (0.0123, 8, "s-best")


def test_an_array_of_workers_takes_the_sweep_file_and_the_settings_of_the_site() -> None:
    script = render_sweep(JobSpec(name="s", arguments=("/a b/s.yaml",), environment={"A": "$(id)"}, modules=("cuda",)), 8)
    assert "#SBATCH --array=1-8\n" in script and "set -- '/a b/s.yaml'\n" in script and "export A='$(id)'\n" in script


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_no_trial(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, sampler="grid", space={"optimizer.lr": {"choices": [1e-3, 1e-2]}}, pruning={"kind": "none"})
    sweep = load_sweep(path)
    words = [sys.executable, "-m", "chatmill.launcher.sweep.worker", str(path)]
    worker = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    first = sweep.folder / "runs" / "trial-0000"
    wait_until("the first trial", lambda: (first / "events.jsonl").exists())
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert main(["sweep", str(path)]) == 0
    trials = write_results(sweep)
    assert [trial.state for trial in trials] == ["complete", "complete"]
    assert sorted(Path(trial.run).name for trial in trials) == ["trial-0000", "trial-0001"]
    assert sorted(trial.values["optimizer.lr"] for trial in trials) == [1e-3, 1e-2]


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_eight_trials_over_two_fields_run_as_a_slurm_array_with_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # half of the learning rates are hopeless, so the median rule has something to prune once two trials are complete
    space = {"optimizer.lr": {"choices": [3e-2, 1e-2, 1e-7, 1e-8]}, "model.hidden_size": {"choices": [16, 8]}}
    pruning = {"kind": "median", "startup_trials": 2}
    path = sweep_file(tmp_path, trials=8, workers=2, sampler="grid", space=space, pruning=pruning, scaling="parameters")
    sweep = load_sweep(path)
    with SlurmCluster(tmp_path / "cluster", nodes=2) as cluster:
        monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        assert main(["sweep", str(path), "--on", "slurm"]) == 0
        match = re.search(r"job array (\d+)", capsys.readouterr().out)
        assert match
        wait_until(
            "the array", lambda: not cluster.call("squeue", "-h", "-j", match[1], "-t", "pending,running", "-o", "%i"), 300
        )
    assert main(["sweep", str(path), "--report"]) == 0
    said = capsys.readouterr().out
    outputs = "".join(file.read_text() for file in sorted((sweep.folder / "launches" / "001").glob("worker-*.out")))
    states = [trial["state"] for trial in json.loads((sweep.folder / "trials.json").read_text())]
    assert len(states) == 8 and set(states) == {"complete", "pruned"}, outputs
    assert load_recipe(str(sweep.folder / "best.yaml")).optimizer.lr in (3e-2, 1e-2)
    page = (sweep.folder / "report.html").read_text()
    assert page.count('<path class="dots') >= 8 and "Parallel coordinates" in page and str(sweep.folder / "best.yaml") in said
    kept = sorted(folder.parent.name for folder in sweep.folder.glob("runs/*/checkpoints"))
    best = json.loads((sweep.folder / "trials.json").read_text())[0]
    assert kept == [Path(best["run"]).name]
