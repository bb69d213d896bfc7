"""A recipe and its overrides as they will run with a given number of processes.

    python -m chatmill.launcher.jobs.resolve --world-size 4 tiny optimizer.lr=1e-3     # called by slurm/train.sh

Prints the run folder, then one argument per line. A recipe for one process becomes parallel.strategy=ddp if several are
started (with a note on stderr), unless an override asks for `single`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chatmill.config import ConfigError, read_json
from chatmill.run_files import list_checkpoints

from ...trainer.config import ModelConfig, Recipe, load_recipe
from ...trainer.foreign_config import read_config


@dataclass(frozen=True)
class Resolved:
    """The validated recipe, the arguments that produce it, and notes for the user about what was changed."""

    recipe: Recipe
    arguments: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def run_dir(self) -> Path:
        """Absolute folder of the run."""
        return self.recipe.run_dir.absolute()


def resolve(name: str, overrides: Sequence[str], world_size: int) -> Resolved:
    """Validate a recipe for a world of `world_size` processes. Raises ConfigError."""
    for word in (name, *overrides):
        if not word.isprintable():
            raise ConfigError(f"{word!r}: line breaks and control characters are refused in a recipe's name and overrides")
    recipe = load_recipe(name, overrides)
    notes: list[str] = []
    words = list(overrides)
    if world_size > 1 and recipe.parallel.strategy == "single":
        if any(word.startswith("parallel.strategy=") for word in overrides):
            raise ConfigError(
                f"parallel.strategy=single was asked for, but {world_size} processes would start.\n"
                "Use ddp, fsdp2, zero1, zero2 or zero3, or start one process on one node."
            )
        words.append("parallel.strategy=ddp")
        recipe = load_recipe(name, words)
        notes.append(f"the recipe is for one process, but {world_size} are started: parallel.strategy=ddp")
    return Resolved(recipe, (name, *words), tuple(notes))


def model_shape(recipe: Recipe) -> ModelConfig | None:
    """The shape that will train, or None when it is in a checkpoint that cannot be read from here.

    Raises ConfigError for a folder with another config.json that is no checkpoint, and where the data was tokenised
    otherwise than the checkpoint allows.
    """
    if recipe.model.checkpoint is None:
        return recipe.model.shape()
    folder = Path(recipe.model.checkpoint)
    # a run that continues needs its own checkpoints only
    file = ([folder, *list_checkpoints(folder), *list_checkpoints(recipe.run_dir)])[-1] / "config.json"
    if not file.is_file():
        manifest = folder / "manifest.json"
        if manifest.is_file() and "splits" in read_json(manifest):
            raise ConfigError(f"model.checkpoint: {folder} is a data set, not a checkpoint. Give a checkpoint or a run folder.")
        return None
    if not file.with_name("manifest.json").is_file():
        raise ConfigError(
            f"model.checkpoint: {folder} is not a checkpoint: it has a config.json, but no manifest.json.\n"
            "If it is a Hugging Face folder, make a checkpoint of it with `chatmill import`."
        )
    shape = read_config(read_json(file), str(file))
    return shape.model_copy(update={"vocab_size": _rows(file.parent, shape.vocab_size, Path(recipe.data.path))})


def _rows(checkpoint: Path, held: int, data: Path) -> int:
    """Rows of the tables in training: new special tokens in the data set's tokenizer may need more than the checkpoint has."""
    ours, theirs = data / "tokenizer" / "tokenizer.json", checkpoint / "tokenizer.json"
    if not (ours.is_file() and theirs.is_file()) or ours.read_bytes() == theirs.read_bytes():
        return held
    from ...data.tokenizer.tokenizer import ChatTokenizer
    from ...trainer.checkpoint.rows import rows_needed

    return rows_needed(checkpoint, held, ChatTokenizer.load(ours.parent), str(data))


def main(arguments: list[str] | None = None) -> int:
    """Print run folder and arguments; 2 for a recipe that cannot work."""
    parser = argparse.ArgumentParser(prog="python -m chatmill.launcher.jobs.resolve")
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    try:
        found = resolve(options.recipe, options.overrides, options.world_size)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in found.notes:
        print(note, file=sys.stderr)
    print(found.run_dir, *found.arguments, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
