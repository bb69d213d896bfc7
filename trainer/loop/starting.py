"""Before the first step: check that everything fits together, and report what is really running."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from chatmill.config import ConfigError

from ...data.check.verify import quarantine_lines
from ...data.packing.mixture import Mixture
from ...data.packing.order import DialogueSource
from ...data.shards.dataset import TokenDataset
from ...data.tokenizer.folder import template_in
from ...data.tokenizer.generation_settings import read_settings
from ...data.tokenizer.new_tokens import tokens_beyond
from ...data.tokenizer.tokenizer import ChatTokenizer
from ..adapters.merging import check_base, facts_of
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.rows import new_tokens
from ..checkpoint.vocabulary import rows_for
from ..config import Recipe
from ..distributed.world import World
from ..foreign_config import ForeignConfig
from ..model_config import ModelConfig
from ..run.folder import RunFolder, describe_environment
from ..run.state import TrainState
from .context import RunContext


def choose_shape(recipe: Recipe, base: Checkpoint | None, dataset: TokenDataset) -> ModelConfig:
    """The model's shape, checked against the recipe, the data and the tokenizer. Raises ConfigError.

    The tokenizer must be that of the checkpoint; new special tokens may give it more rows. The template is the data set's.
    """
    config = recipe.model.shape()
    if base is not None:
        check_impl(recipe, base)
        written = {name: getattr(config, name) for name in recipe.model.model_fields_set if name in ModelConfig.model_fields}
        wrong = [
            f"model.{k}={v!r} (checkpoint: {getattr(base.config, k)!r})"
            for k, v in written.items()
            if getattr(base.config, k) != v
        ]
        if wrong:
            raise ConfigError(f"{base.path} has another shape than the recipe: {', '.join(wrong)}.\nLeave those fields out.")
        tokenizer = ChatTokenizer.load(dataset.path / "tokenizer")
        config = base.config.model_copy(update={"vocab_size": rows_for(base, tokenizer, str(dataset.path))})
    if dataset.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{dataset.path} holds token ids up to {dataset.vocab_size - 1}, model.vocab_size is {config.vocab_size}.\n"
            f"Set model.vocab_size to at least {dataset.vocab_size}."
        )
    if recipe.data.sequence_length > config.context:
        raise ConfigError(
            f"data.sequence_length={recipe.data.sequence_length} exceeds the model's context of {config.context}."
        )
    return config


def check_impl(recipe: Recipe, base: Checkpoint) -> None:
    """Refuse a checkpoint that was imported for another implementation than the recipe needs. Raises ConfigError."""
    impl, found = recipe.model.impl, "transformers" if isinstance(base.config, ForeignConfig) else "own"
    if found == "transformers" and recipe.parallel.context > 1:
        raise ConfigError(
            f"parallel.context={recipe.parallel.context}: {base.path} is a model of transformers, and only our own decoder can "
            "divide a batch among processes.\nUse parallel.context=1."
        )
    if impl not in ("auto", found):
        why = {
            "own": f"{base.path} is kept for transformers ({base.config.name}), and our decoder has other weight names",
            "transformers": f"{base.path} is kept for our own decoder, and transformers has other weight names",
        }[impl]
        raise ConfigError(
            f"model.impl={impl}: {why}.\nImport the model again with --impl {impl} (`own` takes known families only), "
            "or set model.impl=auto."
        )


def check_adapter(
    recipe: Recipe, base: Checkpoint, begun: Checkpoint | None, config: ModelConfig, tokenizer: ChatTokenizer
) -> None:
    """Refuse what an adapter run cannot do: a base that is an adapter itself, another base than before, new tokens.

    begun: the run's newest checkpoint. Raises ConfigError.
    """
    if facts_of(base) is not None:
        raise ConfigError(
            f"model.checkpoint={recipe.model.checkpoint} is an adapter, not a whole model.\n"
            f"Merge it first: chatmill merge {recipe.model.checkpoint} MERGED, then model.checkpoint=MERGED."
        )
    if recipe.adapter is None:
        return
    new = new_tokens(base.path, tokenizer, recipe.data.path)
    if new or config.vocab_size != base.config.vocab_size:
        raise ConfigError(
            f"{recipe.data.path} has special tokens that {base.path} lacks: {', '.join(new) or 'more rows'}.\n"
            "An adapter cannot train rows for them: build the data without tokenizer.add_special_tokens, or train all weights."
        )
    facts = None if begun is None else facts_of(begun)
    if begun is not None and facts is not None:
        check_base(base, facts, begun.path)


def check_validation(splits: Mapping[str, TokenDataset], dataset: TokenDataset) -> None:
    """Refuse validation sets that were tokenised otherwise than the training data. Raises ConfigError."""
    for name, split in splits.items():
        for field in ("tokenizer_sha256", "template_sha256"):
            if split.manifest[field] != dataset.manifest[field]:
                raise ConfigError(
                    f"evaluation.data: {name!r} and {dataset.path} have different {field}: they were not tokenised alike.\n"
                    f"Build {split.path} again with tokenizer.path={dataset.path / 'tokenizer'}."
                )


def run_tokenizer(dataset: TokenDataset, start: Checkpoint | None) -> ChatTokenizer:
    """The tokenizer and template of the data set, with the generation settings of the checkpoint that training starts from."""
    tokenizer = ChatTokenizer.load(dataset.path / "tokenizer")
    settings = {} if start is None else read_settings(start.path)
    return tokenizer.with_settings(settings) if settings else tokenizer


def check_weights(start: Checkpoint, world: World) -> None:
    """Refuse weights of another shape than config.json's, or with NaN in them, before memory is taken. Raises ConfigError.

    The ranks share the reading and come to the same verdict.
    """
    start.check_model()
    found = [problem for part in world.gather(start.check_values((world.rank, world.world_size))) for problem in part]
    if found:
        raise ConfigError(
            "\n".join(found[:5]) + f"\n{len(found)} tensor(s): such weights cannot be trained. Use another checkpoint."
        )


def check_same_data(mixture: Mixture, world: World) -> None:
    """Refuse to train where a machine has another copy of a data set, or another quarantine. Raises ConfigError."""
    mark = float(int(mixture.identity[:10], 16))  # 40 bits: sums of it are exact in float64
    if world.sum([mark])[0] != mark * world.world_size:
        raise ConfigError(
            f"the ranks read different data or quarantines ({', '.join(mixture.sources)}; here: {mixture.identity[:10]}).\n"
            "Give every machine the same copy."
        )


def claim(folder: RunFolder, world: World) -> None:
    """Make this training the only one that writes into the folder. Raises ConfigError where another one does."""
    if world.any(world.is_main and not folder.claim()):
        raise ConfigError(
            f"{folder.path}: another training is running in it; two would mix their checkpoints.\n"
            f"Wait for it, stop it with `chatmill cancel {folder.path}`, or begin another run: run.name=NEW."
        )


def announce(run: RunContext, state: TrainState, proof: dict[str, Any], resume: Checkpoint | None) -> None:
    """Write down and print what is really running. proof: Engine.describe; resume: the checkpoint that is continued."""
    recipe, config, folder, say = run.recipe, run.config, run.folder, run.display.say
    counts = config.parameter_counts()
    if run.world.is_main:
        marks = {
            "train": {name: source.fingerprint for name, source in run.mixture.sources.items()},
            "validation": {name: data.fingerprint for name, data in run.splits.items()},
        }
        folder.create(recipe, proof | {"parameters": counts, "data": marks, **describe_environment()})
        folder.forget_after(state.step)
        number = os.environ.get("CHATMILL_ATTEMPT", "")  # none: started by hand
        attempt = int(number) if number.isdigit() else None
        folder.event("resume" if resume else "start", step=state.step, attempt=attempt, **proof)
        for name, data in [*run.mixture.sources.items(), *run.splits.items()]:
            for held in quarantine_lines({f"{name}/{data.split}": data.held} if isinstance(data, TokenDataset) else {}):
                folder.event("quarantine", step=state.step, block=held)
                say(held)
        for name, data in run.mixture.sources.items():
            if line := _grown(name, data):
                folder.event("data_grown", step=state.step, data=name, reason=line)
                say(line)
    say(
        f"{counts['total']:,} parameters  {config.layers} layers x {config.hidden_size}  "
        f"vocabulary {config.vocab_size:,}  pack {recipe.data.sequence_length} tokens"
    )
    say(
        f"world size {proof['world_size']}  backend {proof['backend']}  device {proof['device']}  threads {proof['threads']}  "
        f"strategy {proof['strategy']} ({proof['engine']}, sharded {proof['sharded_parameters']})"
    )
    say(
        f"parameters {proof['parameter_dtype']}  compute {proof['compute_dtype']}  gradients {proof['gradient_dtype']}  "
        f"reduce {proof['reduce_dtype']}  loss {proof['loss_dtype']}  optimizer {proof['optimizer']}"
    )
    extras = [f"{name} {proof[name]}" for name in ("offload", "activation_checkpointing", "compile", "ema")]
    say(f"sharding {proof['sharding']}  " + "  ".join(extras))
    if "frozen" in proof:
        for kind in ("trained", "frozen"):
            say(f"{kind} {parts_in_words(proof[kind])}" + (f", base {proof['base_precision']}" if kind == "frozen" else ""))
    if run.base is not None and resume is None:
        for line in changes(run.base, run):
            say(line)
    if resume is not None:
        say(f"continuing {folder.path} from step {state.step} ({resume.path.name})")


def parts_in_words(part: Mapping[str, Any]) -> str:
    """`30 tensors: 122,880 float32 (0.5 MB), ...` of what is trained or frozen; codes of a quantised base count as bytes."""
    kinds = ", ".join(
        f"{counts['elements']:,} {'bytes of codes and scales' if dtype == 'uint8' else dtype} ({counts['bytes'] / 1e6:,.1f} MB)"
        for dtype, counts in part["by_dtype"].items()
    )
    return f"{part['tensors']} tensors: {kinds}"


def _grown(name: str, data: DialogueSource) -> str:
    """What to say of a data set that has grown since the run began; "" where it has not."""
    if not isinstance(data, TokenDataset) or (now := data.grown_to) is None:
        return ""
    return (
        f"data {name}: {data.path} has grown since this run began, to {now:,} training dialogues. This run goes on with the "
        f"{len(data):,} that it began with; a new run learns from all of them (model.checkpoint=RUN starts it from this one)."
    )


def changes(base: Checkpoint, run: RunContext) -> Iterator[str]:
    """What the run has otherwise than the checkpoint that it starts from: the template, and new tokens."""
    if "tokenizer.json" not in base.files():
        return
    theirs = ChatTokenizer.load(base.path, use_template=False)
    if new := tokens_beyond(theirs, run.tokenizer):
        names = ", ".join(f"{token} ({i})" for token, i in new.items())
        rows = f"{base.config.vocab_size:,} -> {run.config.vocab_size:,} rows"
        yield f"new special tokens: {names}; {rows}, new ones begin as the mean of the others"
    if (template := template_in(base.path)) != run.tokenizer.template_source:
        has = "none" if template is None else "another"
        yield f"the chat template is that of {run.recipe.data.path}; {base.path} has {has}"
