"""What a run works with: complete before the model is built, and never changed. Loop, validations and checkpoints share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...data.packing.mixture import Mixture
from ...data.shards.dataset import TokenDataset
from ...data.tokenizer.tokenizer import ChatTokenizer
from ..adapters.merging import AdapterFacts, facts_for
from ..checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..config import Recipe
from ..distributed.world import World
from ..model_config import ModelConfig
from ..run.folder import RunFolder
from ..run.progress import StepDisplay
from ..run.stopping import StopSignal
from ..run.watchdog import Watchdog


@dataclass(frozen=True)
class RunContext:
    """recipe: with its budgets counted in steps. base: the checkpoint that training starts from, where it is open already.

    splits: the validation split of each data set. exclude: dialogues left out, by the step from which on, when the run starts.
    """

    recipe: Recipe
    config: ModelConfig
    base: Checkpoint | None
    tokenizer: ChatTokenizer
    mixture: Mixture
    splits: Mapping[str, TokenDataset]
    exclude: Mapping[int, frozenset[str]]
    world: World
    folder: RunFolder
    display: StepDisplay
    watchdog: Watchdog
    stop: StopSignal

    def starting_checkpoint(self) -> Checkpoint | None:
        """The opened model.checkpoint, or None where the recipe names none. A run that continues never needs it.

        Raises CheckpointError.
        """
        path = self.recipe.model.checkpoint
        return self.base or (open_checkpoint(path) if path else None)

    def adapter_facts(self) -> AdapterFacts | None:
        """What checkpoints record of the recipe's adapter and its base (opened already), or None without one."""
        recipe = self.recipe
        if recipe.adapter is None:
            return None
        assert self.base is not None and recipe.model.checkpoint is not None
        return facts_for(self.base, recipe.model.checkpoint, recipe.adapter, recipe.model.base_precision)
