"""Optimizers, parameter groups and weight-decay rules.

    AdamW: m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  w -= lr (m^ / (sqrt(v^) + eps) + decay w)

Weight decay applies to matrices only: norms, biases and embeddings (whose rows occur at very different rates) have none unless
the recipe says so. `optimizer.groups` multiplies learning rate and decay by parameter-name pattern. Muon is in muon.py, AdamW
with 8-bit moments in adamw_8bit.py.
Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chatmill.config import ConfigError

from ..checkpoint.sharding import TensorSource, read_like
from ..config import GroupRule, OptimizerSection
from ..model.language_model import LanguageModel
from ..model_config import ModelConfig

TABLES = ("embed.", "head.")  # how the names of our decoder's tables begin


def tables_of(config: ModelConfig) -> tuple[str, ...]:
    """How the names of a model's embedding and head begin."""
    return tuple(name.removesuffix("weight") for name in config.tables)


def has_decay(name: str, parameter: Tensor, config: OptimizerSection, tables: Sequence[str] = TABLES) -> bool:
    """Whether a parameter is decayed: matrices of the layers, an untied head, and what the recipe adds."""
    if parameter.ndim < 2:
        return config.decay_norms
    return config.decay_embeddings or not name.startswith(tables[0])


def is_hidden_matrix(name: str, parameter: Tensor, tables: Sequence[str] = TABLES) -> bool:
    """Whether Muon takes it: the matrices between embedding and head."""
    return parameter.ndim == 2 and not name.startswith(tuple(tables))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerSection, tables: Sequence[str] = TABLES
) -> list[dict[str, Any]]:
    """Parameters that share method, rate and decay: dicts with params, names, muon, lr_ratio and weight_decay.

    tables: how the names of embedding and head begin, the embedding first.
    Raises ConfigError for a pattern of optimizer.groups that matches no parameter.
    """
    groups: dict[tuple[bool, float, float], dict[str, Any]] = {}
    used: set[str] = set()
    for name, parameter in named:
        pattern = next((p for p in config.groups if fnmatchcase(name, p)), None)
        used |= {pattern} if pattern is not None else set()
        rule = config.groups[pattern] if pattern is not None else GroupRule()
        decay = config.weight_decay * rule.weight_decay if has_decay(name, parameter, config, tables) else 0.0
        muon = config.name == "muon" and is_hidden_matrix(name, parameter, tables)
        empty = {"params": [], "names": [], "muon": muon, "lr_ratio": rule.lr, "weight_decay": decay}
        group = groups.setdefault((muon, rule.lr, decay), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    if unused := [pattern for pattern in config.groups if pattern not in used]:
        raise ConfigError(
            f"optimizer.groups: no parameter name matches {', '.join(map(repr, unused))} (or an earlier one does).\n"
            "Names look like embed.weight, layers.0.attention.q.weight, layers.0.mlp.up.weight, norm.weight, head.weight."
        )
    return list(groups.values())


def build_optimizer(
    model: nn.Module,
    config: OptimizerSection,
    precision: str = "fp32",
    copies: dist.ProcessGroup | None = None,
    *,
    flat: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of a recipe over model's (possibly sharded) parameters.

    precision: of Muon's Newton-Schulz iterations, fp32 or bf16; every other state and update is fp32.
    copies: the processes that hold equal copies of the weights (DDP), among which Muon divides its work.
    flat: ZeRO will replace the parameters by flat partitions; Muon must then be told what they hold (zero_muon.py).
    """
    tables = tables_of(model.config) if isinstance(model, LanguageModel) else TABLES
    groups = parameter_groups([(n, p) for n, p in model.named_parameters() if p.requires_grad], config, tables)
    for group in groups:
        del group["names"]  # torch accepts names in its own form only
        group["lr"] = config.lr * group["lr_ratio"]
    if config.name == "adamw8bit":
        try:
            from .adamw_8bit import AdamW8bit
        except ImportError as error:
            raise ConfigError(
                f"optimizer.name=adamw8bit needs torchao, which cannot be imported ({error}).\n"
                "Install it with: pip install 'chatmill[optim8bit]', or use optimizer.name=adamw."
            ) from error
        eight: torch.optim.Optimizer = AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        return eight
    matrices = [group for group in groups if group["muon"]]
    others = [group for group in groups if not group["muon"]]
    adamw = torch.optim.AdamW(others, lr=config.lr, betas=config.betas, eps=config.eps, fused=True) if others else None
    if not matrices:
        assert adamw is not None
        return adamw
    from .muon import Muon
    from .zero_muon import ZeroMuon

    return (ZeroMuon if flat else Muon)(
        matrices,
        adamw,
        config.muon,
        lr=config.lr,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        copies=copies,
    )


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times its own factor."""
    for group in optimizer.param_groups:
        value = lr * group["lr_ratio"]
        if isinstance(group["lr"], Tensor):  # torchao compiles the step once for all rates
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def saved_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What a checkpoint keeps of one parameter: plain tensors or DTensors sharded as the parameter is, and its step count."""
    split = getattr(optimizer, "split_state", None)
    state: Mapping[str, Tensor] = optimizer.state.get(parameter, {})
    return dict(state) if split is None else split(parameter, state)


def restore_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, name: str, entries: Sequence[str], source: TensorSource
) -> None:
    """Set the state of one parameter from a checkpoint. entries: keys that the checkpoint holds."""
    wanted = expected_keys(is_stepped_by_muon(optimizer, parameter))
    joined: dict[str, Tensor]
    if (join := getattr(optimizer, "join_state", None)) is not None and entries:
        joined = join(parameter, {key: source.tensor(f"{name}.{key}") for key in entries})
    elif set(entries) == set(wanted):
        joined = {key: _placed(source, f"{name}.{key}", parameter) for key in entries}
    else:
        raise wrong_state(optimizer, name, entries, wanted)
    optimizer.state[parameter] = joined


def wrong_state(optimizer: torch.optim.Optimizer, name: str, entries: Sequence[str], wanted: Sequence[str]) -> ConfigError:
    """The error for a checkpoint that another optimizer wrote."""
    return ConfigError(
        f"the checkpoint's optimizer state of {name} is {sorted(entries) or 'missing'}, {type(optimizer).__name__} needs "
        f"{sorted(wanted)}.\nContinue with the optimizer that wrote it."
    )


def is_stepped_by_muon(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether a parameter (or ZeRO's flat partition of several) is in one of Muon's groups."""
    return any(group["muon"] and any(p is parameter for p in group["params"]) for group in optimizer.param_groups)


def expected_keys(muon: bool) -> tuple[str, ...]:
    """Names of the state tensors of one parameter."""
    return ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq", "step")


def _placed(source: TensorSource, name: str, parameter: Tensor) -> Tensor:
    if source.shape(name) == tuple(parameter.shape):
        return read_like(source, name, parameter)
    return source.tensor(name).to(parameter.device, copy=True)  # a step count: not sharded, where the optimizer keeps it
