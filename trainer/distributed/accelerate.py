"""What `accelerate launch` was told, compared with the recipe: a disagreement is an error, never a silent choice.

accelerate passes its flags and its config file to the workers in environment variables. Most of them have a value even if
nobody set them: such a default is compared only if the flag or the file names it, or if it is not accelerate's own default.
Only the recipe says how a run trains; accelerate starts the processes. Source: accelerate.utils.launch of accelerate 1.15.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from chatmill.config import ConfigError

from ..config import Recipe
from ..parallel_config import grid_of

SHARDED = {"ACCELERATE_USE_FSDP": ("FSDP", ("fsdp2",)), "ACCELERATE_USE_DEEPSPEED": ("DEEPSPEED", ("zero1", "zero2", "zero3"))}
UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "a DeepSpeed config file (the recipe's fields make DeepSpeed's configuration)",
}


class Setting(NamedTuple):
    """One of accelerate's settings: its flag and config-file key `name`, in the variable prefix + NAME.

    default: what accelerate passes by default (None: nothing). wanted: the value that the recipe asks for, by `field`.
    """

    prefix: str
    name: str
    default: str | None
    wanted: object
    field: str


def settings_of(recipe: Recipe, plugin: str = "") -> list[Setting]:
    """The settings that accelerate always hands over, or those of a plugin: FSDP or DEEPSPEED."""
    train, parallel, clip = recipe.train, recipe.parallel, recipe.optimizer.clip_norm
    offload = f"parallel.offload={parallel.offload}"
    if plugin == "FSDP":
        reshard, recompute = parallel.reshard_after_forward, train.activation_checkpointing
        recomputed = f"train.activation_checkpointing={recompute}"
        return [
            Setting("", "fsdp_version", None, 2, f"parallel.strategy={parallel.strategy}"),
            Setting("", "fsdp_reshard_after_forward", "true", bool(reshard), f"parallel.reshard_after_forward={reshard}"),
            Setting("", "fsdp_offload_params", "false", parallel.offload == "cpu", offload),
            Setting("", "fsdp_activation_checkpointing", "false", bool(recompute), recomputed),
        ]
    if plugin == "DEEPSPEED":
        prefix, weights = "ACCELERATE_DEEPSPEED_", parallel.offload if parallel.strategy == "zero3" else "none"
        return [
            Setting(prefix, "zero_stage", None, parallel.strategy[-1], f"parallel.strategy={parallel.strategy}"),
            Setting(prefix, "offload_optimizer_device", None, parallel.offload, offload),
            Setting(prefix, "offload_param_device", None, weights, offload),
            Setting("ACCELERATE_", "gradient_clipping", None, clip, f"optimizer.clip_norm={clip}"),
        ]
    precision, backend = "bf16" if train.precision == "bf16" else "no", train.compile_backend if train.compile else "no"
    compiled = f"train.compile={train.compile} train.compile_backend={train.compile_backend}"
    accumulation = f"train.accumulation={train.accumulation}"
    return [
        Setting("ACCELERATE_", "mixed_precision", "no", precision, f"train.precision={train.precision}"),
        Setting("ACCELERATE_", "gradient_accumulation_steps", None, train.accumulation, accumulation),
        Setting("ACCELERATE_", "dynamo_backend", "no", backend, compiled),
    ]


def check_accelerate(recipe: Recipe, environment: Mapping[str, str], given: frozenset[str] = frozenset()) -> None:
    """Refuse accelerate settings that differ from the recipe. Raises ConfigError naming every difference.

    given: settings that the command line or the config file names (see given_settings).
    """
    for variable, what in UNSUPPORTED.items():
        if environment.get(variable, "false").lower() not in ("", "false", "none"):
            raise ConfigError(
                f"accelerate was told to use {what}, which this trainer does not support: remove it from accelerate's config."
            )
    settings = settings_of(recipe)
    if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        check_grid(recipe, environment)
    for variable, (plugin, strategies) in SHARDED.items():
        if environment.get(variable, "false").lower() != "true":
            continue
        if recipe.parallel.strategy not in strategies:
            raise ConfigError(
                f"accelerate was told to use {plugin}, the recipe says parallel.strategy={recipe.parallel.strategy}.\n"
                f"Set parallel.strategy to {' or '.join(strategies)}, or remove it from accelerate's config."
            )
        settings += settings_of(recipe, plugin)
    wrong = []
    for prefix, name, default, wanted, field in settings:
        told = environment.get(prefix + name.upper())
        if told is None or (told.lower() == default and name not in given):
            continue
        if not _equal(told.lower(), str(wanted).lower()):
            wrong.append(f"  accelerate: {name}={told.lower()}; recipe: {field}")
    if wrong:
        raise ConfigError("accelerate and the recipe disagree; make them agree:\n" + "\n".join(wrong))


def check_grid(recipe: Recipe, environment: Mapping[str, str]) -> None:
    """Refuse a parallelism config of accelerate that lays the processes out in another grid. Raises ConfigError.

    cp_size (a ring) and sp_size (exchanged heads) are both parallel.context here, whichever way the recipe takes.
    """
    grid = grid_of(recipe.parallel, int(environment.get("WORLD_SIZE", "1")))
    names = ("dp_replicate_size", "dp_shard_size", "cp_size", "sp_size", "tp_size")
    told = {name: int(environment.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")) for name in names}
    context = told["cp_size"] * told["sp_size"]
    if recipe.parallel.strategy in ("ddp", "fsdp2"):
        asked = (grid.replicas, grid.shards, grid.context, 1)
        if (told["dp_replicate_size"], told["dp_shard_size"], context, told["tp_size"]) == asked:
            return
    words = " ".join(f"{name}={value}" for name, value in told.items())
    here = f"replicas={grid.replicas} shards={grid.shards} context={grid.context}"
    raise ConfigError(
        f"accelerate's parallelism config and the recipe disagree: {words};\n"
        f"recipe: parallel.strategy={recipe.parallel.strategy}, {here} (no tensor parallelism). Make them agree, or remove "
        "the parallelism config: the recipe alone is enough."
    )


def option_of(command: Sequence[str], name: str) -> str | None:
    """The value of `--some_name VALUE` or `--some-name=VALUE` in a command; None where it is not there."""
    flags = (f"--{name}", f"--{name.replace('_', '-')}")
    for word, after in zip(command, [*command[1:], None], strict=False):
        flag, equals, value = word.partition("=")
        if flag in flags and (equals or after is not None):
            return value if equals else after
    return None


def given_settings(command: Sequence[str], default: Path) -> frozenset[str]:
    """Names of the settings that an `accelerate launch` command line and its config file give.

    default: the config file that it reads unasked.
    """
    if not any("accelerate" in word for word in command[:4]):
        return frozenset()
    names = {word.split("=", 1)[0].removeprefix("--").replace("-", "_") for word in command if word.startswith("--")}
    file = read_config(command, default)
    names |= set(file)
    for section in ("fsdp_config", "deepspeed_config", "dynamo_config"):
        names |= set(file.get(section) or {})
    return frozenset(str(name) for name in names)


def read_config(command: Sequence[str], default: Path) -> dict[str, Any]:
    """The config file that an `accelerate launch` command reads; empty where there is none that can be read."""
    try:
        file = yaml.safe_load(Path(option_of(command, "config_file") or default).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return file if isinstance(file, dict) else {}


def _equal(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b
