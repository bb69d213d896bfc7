"""What `accelerate launch` was told, held against the recipe: a disagreement is an error, never a silent choice.

accelerate hands its flags and its config file to the workers in environment variables. Most of them have a value even when
nobody asked: such a default is compared only where the flag or the file names it, or where it is not accelerate's own default.
The recipe stays the one place that says how a run trains; accelerate starts the processes.
Source: accelerate.utils.launch of accelerate 1.15.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from chatmill.config import ConfigError

from ..config import Recipe


@dataclass(frozen=True)
class Setting:
    """One of accelerate's settings and the recipe field that says the same.

    names: flag and config-file key. default: what accelerate hands over unasked (None: nothing).
    """

    variable: str
    names: tuple[str, ...]
    default: str | None
    field: str
    wanted: Callable[[Recipe], str]


def _flag(value: object) -> str:
    return str(bool(value)).lower()


ALWAYS = (
    Setting("ACCELERATE_MIXED_PRECISION", ("mixed_precision",), "no", "train.precision (fp32 is no)", lambda r: _precision(r)),
    Setting(
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        ("gradient_accumulation_steps",),
        None,
        "train.accumulation",
        lambda r: str(r.train.accumulation),
    ),
    Setting(
        "ACCELERATE_DYNAMO_BACKEND",
        ("dynamo_backend",),
        "no",
        "train.compile and train.compile_backend",
        lambda r: r.train.compile_backend if r.train.compile else "no",
    ),
)
FSDP = (
    Setting("FSDP_VERSION", ("fsdp_version",), None, "parallel.strategy (fsdp2 is version)", lambda r: "2"),
    Setting(
        "FSDP_RESHARD_AFTER_FORWARD",
        ("fsdp_reshard_after_forward",),
        "true",
        "parallel.reshard_after_forward",
        lambda r: _flag(r.parallel.reshard_after_forward),
    ),
    Setting(
        "FSDP_OFFLOAD_PARAMS",
        ("fsdp_offload_params",),
        "false",
        "parallel.offload",
        lambda r: _flag(r.parallel.offload == "cpu"),
    ),
    Setting(
        "FSDP_ACTIVATION_CHECKPOINTING",
        ("fsdp_activation_checkpointing",),
        "false",
        "train.activation_checkpointing",
        lambda r: _flag(r.train.activation_checkpointing),
    ),
)
DEEPSPEED = (
    Setting(
        "ACCELERATE_DEEPSPEED_ZERO_STAGE",
        ("zero_stage",),
        None,
        "parallel.strategy",
        lambda r: r.parallel.strategy.removeprefix("zero"),
    ),
    Setting(
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        ("offload_optimizer_device",),
        None,
        "parallel.offload",
        lambda r: r.parallel.offload,
    ),
    Setting(
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
        ("offload_param_device",),
        None,
        "parallel.offload",
        lambda r: r.parallel.offload if r.parallel.strategy == "zero3" else "none",
    ),
    Setting(
        "ACCELERATE_GRADIENT_CLIPPING",
        ("gradient_clipping",),
        None,
        "optimizer.clip_norm",
        lambda r: "none" if r.optimizer.clip_norm is None else str(r.optimizer.clip_norm),
    ),
)
SHARDED = {
    "ACCELERATE_USE_FSDP": ("FSDP", ("fsdp2",), FSDP),
    "ACCELERATE_USE_DEEPSPEED": ("DEEPSPEED", ("zero1", "zero2", "zero3"), DEEPSPEED),
}
UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (for replicas of shards set parallel.replicas)",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "a DeepSpeed config file (the recipe's fields make DeepSpeed's configuration)",
}


def check_accelerate(recipe: Recipe, environment: Mapping[str, str], given: frozenset[str] = frozenset()) -> None:
    """Refuse accelerate settings that say something else than the recipe. Raises ConfigError naming every such pair.

    given: settings that the command line or the config file names (see given_settings).
    """
    for variable, what in UNSUPPORTED.items():
        if environment.get(variable, "false").lower() not in ("", "false", "none"):
            raise ConfigError(
                f"accelerate was told to use {what}, which this trainer does not: drop it from accelerate's config."
            )
    settings = list(ALWAYS)
    for variable, (what, strategies, more) in SHARDED.items():
        if environment.get(variable, "false").lower() != "true":
            continue
        if recipe.parallel.strategy not in strategies:
            raise ConfigError(
                f"accelerate was told to use {what}, the recipe says parallel.strategy={recipe.parallel.strategy}.\n"
                f"Set parallel.strategy to {' or '.join(strategies)}, or drop it from accelerate's config."
            )
        settings += more
    wrong = []
    for setting in settings:
        told = environment.get(setting.variable)
        if told is None or (told.lower() == setting.default and not given & set(setting.names)):
            continue
        wanted = setting.wanted(recipe)
        if not _equal(told.lower(), wanted.lower()):
            wrong.append(f"  {setting.names[0]}: {told.lower()}, the recipe's {setting.field} says {wanted.lower()}")
    if wrong:
        raise ConfigError("accelerate and the recipe disagree; make them agree:\n" + "\n".join(wrong))


def launch_config(command: list[str], default: Path) -> Path:
    """The config file that an `accelerate launch` command reads; default: the one it takes unasked."""
    for i, word in enumerate(command):
        for flag in ("--config_file", "--config-file"):
            if word == flag and i + 1 < len(command):
                return Path(command[i + 1])
            if word.startswith(flag + "="):
                return Path(word.split("=", 1)[1])
    return default


def given_settings(command: list[str], default: Path) -> frozenset[str]:
    """Names of the settings that an `accelerate launch` command line and its config file give."""
    if not any("accelerate" in word for word in command[:4]):
        return frozenset()
    names = {word.split("=", 1)[0].removeprefix("--").replace("-", "_") for word in command if word.startswith("--")}
    try:
        file = yaml.safe_load(launch_config(command, default).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        file = None
    if isinstance(file, dict):
        names |= set(file)
        for section in ("fsdp_config", "deepspeed_config", "dynamo_config"):
            names |= set(file.get(section) or {})
    return frozenset(str(name) for name in names)


def _precision(recipe: Recipe) -> str:
    return "bf16" if recipe.train.precision == "bf16" else "no"


def _equal(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b
