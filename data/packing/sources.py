"""The data sets of a training run: opened from the recipe's fields, with what was excluded since.

    mixture = open_mixture(recipe.data)                     # data.path or data.mix, with data.curriculum
    exclude = exclusions(recipe.data, "runs/NAME")          # data.exclude, and what was recorded for the run
    record_exclusion("runs/NAME", step=400, uids=uids, reason="loss spike at 437")

An exclusion recorded in the run folder (excluded.jsonl) holds for every later attempt and for `chatmill data at` and `where`,
as if it stood in the recipe. It must begin at the step of the checkpoint that is continued, or later: the past cannot change.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from chatmill.config import ConfigError
from chatmill.files import write_durably

from ..shards.dataset import TokenDataset
from .config import SourcesSection
from .mixture import Mixture

RECORD = "excluded.jsonl"


def open_mixture(
    config: SourcesSection,
    split: str = "train",
    damaged_blocks: float | None = None,
    begun: Mapping[str, str] | None = None,
) -> Mixture:
    """The training data sets with their weights. Raises ConfigError where they do not belong together.

    damaged_blocks: instead of the recipe's share, for those who only look. begun: fingerprints, by name, that the run began
    with (begun_with): of a data set that has grown since (`chatmill data collect`), what it held then is opened.
    """
    allowed = config.damaged_blocks if damaged_blocks is None else damaged_blocks
    marks = begun or {}
    # By name: the order in which a recipe lists them must not decide which pack comes first.
    datasets = {
        name: TokenDataset.open(path, split, damaged_blocks=allowed, fingerprint=marks.get(name))
        for name, path in sorted(config.paths.items())
    }
    first_name, first = next(iter(datasets.items()))
    for name, dataset in datasets.items():
        for field in ("tokenizer_sha256", "template_sha256"):
            if dataset.manifest[field] != first.manifest[field]:
                raise ConfigError(
                    f"data.mix: {name!r} and {first_name!r} have different {field}: they were not tokenised alike.\n"
                    f"Build {dataset.path} again with tokenizer.path={first.path / 'tokenizer'}."
                )
    return Mixture(datasets, config.weights)


def begun_with(run: str | Path, split: str = "train") -> dict[str, str]:
    """{data set: fingerprint of its split} that a run began with: in environment.json; of an older run, in a checkpoint.

    Empty where the run has not begun. A run goes on with what it began with, though its data sets grow.
    """
    file = Path(run) / "environment.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("data", {}).get(split, {})
    except (OSError, ValueError, AttributeError):
        found = {}
    if found or split != "train":
        return {str(name): str(mark) for name, mark in found.items()}
    for state in sorted(Path(run).glob("checkpoints/*/state.json"), reverse=True):
        try:
            sources = json.loads(state.read_text(encoding="utf-8"))["stream"]["sources"]
            return {str(name): str(source["fingerprint"]) for name, source in sources.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}


def exclusions(config: SourcesSection, run: str | Path | None = None) -> dict[int, frozenset[str]]:
    """{steps done before: ids of dialogues}, of the recipe and of the run's record."""
    out: dict[int, frozenset[str]] = {}
    for item in config.exclude:
        uids = frozenset(item.uids) | (_uids_in(Path(item.file)) if item.file is not None else frozenset())
        out[item.step] = out.get(item.step, frozenset()) | uids
    for step, uids in recorded_exclusions(run) if run is not None else ():
        out[step] = out.get(step, frozenset()) | uids
    return out


def record_exclusion(run: str | Path, step: int, uids: Collection[str], reason: str = "") -> None:
    """Leave dialogues out of a run once `step` steps are done, in every attempt from now on."""
    file = Path(run) / RECORD
    before = file.read_bytes() if file.is_file() else b""
    line = json.dumps({"step": int(step), "uids": sorted(set(uids)), "reason": reason}) + "\n"
    write_durably(file, before + line.encode())  # whole or not at all: a torn line would leave the run's order unknown


def recorded_exclusions(run: str | Path) -> list[tuple[int, frozenset[str]]]:
    """(steps done before, ids) of every line of the run's record. Raises ConfigError where a line is damaged."""
    file = Path(run) / RECORD
    if not file.is_file():
        return []
    out = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
            out.append((int(entry["step"]), frozenset(map(str, entry["uids"]))))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{file}:{number}: not an exclusion ({error}). Expected one JSON object per line: step, uids.\n"
                "Correct or remove the line: without it the run's order cannot be known."
            ) from None
    return out


def _uids_in(file: Path) -> frozenset[str]:
    if not file.is_file():
        raise ConfigError(f"data.exclude: {file} does not exist. Expected a text file with one dialogue id per line.")
    return frozenset(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
