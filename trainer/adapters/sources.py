"""Where the weights of an adapted model come from: the base's checkpoint, and a new adapter or the one of a checkpoint.

    source = AdaptedSource(base, NewAdapter(base, model, settings, seed))     # the first step
    source = AdaptedSource(base, checkpoint)                                  # a run that continues
    load_frozen(model, source)                                                # frozen weights, quantised row by row

All values of a new adapter are a function of the seed, the parameter's name and the base: no engine and no world size changes
them. A, as in PEFT: uniform in +-1/sqrt(in); B is 0 (of an embedding, where A is the table: A is 0 and B is normal).
DoRA's magnitudes are the norms of the base's rows. PiSSA takes the largest singular directions U S V of W, A = sqrt(S) V,
B = U sqrt(S), both over sqrt(scale), and W loses scale B A.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from math import prod

import torch
from torch import Tensor, nn

from ..adapter_config import QUANTISED, AdapterSection
from ..checkpoint.sharding import TensorSource, copy_from, local_of, local_range
from ..model.language_model import LanguageModel
from .layers import AdaptedLinear, AdaptedTable, FrozenLinear
from .prepare import frozen_parameters
from .quantised import quantise, rounded


class AdaptedSource:
    """A TensorSource for an adapted model: the adapter's tensors where it has them, else the base's.

    scale: of the adapter. Where it holds `initial_a` and `initial_b`, the base's weight is W - scale B A of those.
    """

    def __init__(self, base: TensorSource, adapter: TensorSource, scale: float) -> None:
        self._base, self._adapter, self._scale = base, adapter, scale
        self._names, self._base_names = set(adapter.names()), dict.fromkeys(base.names())

    def names(self, group: str = "model") -> list[str]:
        """Of both for the model; other groups are the adapter's."""
        if group != "model":
            return self._adapter.names(group)
        return [*self._base_names, *sorted(self._names - self._base_names.keys())]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return (self._adapter if self._is_adapters(name) else self._base).shape(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor by name."""
        shape = self.shape(name)
        return self.read(name, 0, prod(shape)).reshape(shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        if self._is_adapters(name):
            return self._adapter.read(name, start, stop)
        values = self._base.read(name, start, stop)
        module = name.removesuffix(".weight")
        if name == module or f"{module}.initial_a" not in self._names:
            return values
        a, b = (self._adapter.tensor(f"{module}.initial_{which}").float() for which in "ab")
        return (values.double() - self._scale * product_part(b, a, start, stop)).float()

    def _is_adapters(self, name: str) -> bool:
        return name in self._names or name not in self._base_names


class NewAdapter:
    """A TensorSource with the values that a new adapter of `model` starts from."""

    def __init__(self, base: TensorSource, model: nn.Module, settings: AdapterSection, seed: int) -> None:
        self._base, self._settings, self._seed = base, settings, seed
        self._makers: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
        for name, module in model.named_modules():
            if isinstance(module, AdaptedLinear | AdaptedTable):
                self._add(name, module)
        self._pissa = cache(self._directions)

    def _add(self, module: str, layer: AdaptedLinear | AdaptedTable) -> None:
        inside, outside, rank = layer.in_features, layer.out_features, self._settings.rank  # ZeRO-3 has taken the weights
        a, b = (rank, inside), (outside, rank)
        made: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
        name_a, name_b = f"{module}.lora_a", f"{module}.lora_b"
        if isinstance(layer, AdaptedTable) and not layer.is_head:
            made = {name_a: (a, lambda: torch.zeros(a))}
            made[name_b] = (b, lambda: torch.empty(b).normal_(generator=self._generator(name_b)))
        elif self._settings.init == "pissa":
            for kind in ("lora", "initial"):
                made[f"{module}.{kind}_a"] = (a, lambda: self._pissa(module)[0])
                made[f"{module}.{kind}_b"] = (b, lambda: self._pissa(module)[1])
        else:
            made = {name_a: (a, lambda: self._drawn(name_a, a)), name_b: (b, lambda: torch.zeros(b))}
        if isinstance(layer, AdaptedLinear) and layer.magnitude is not None:
            weight = f"{module}.weight"
            made[f"{module}.magnitude"] = ((outside,), lambda: rounded(self._base.tensor(weight), layer.precision).norm(dim=1))
        self._makers |= made

    def names(self, group: str = "model") -> list[str]:
        """Names of the adapter's parameters."""
        return list(self._makers) if group == "model" else []

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._makers[name][0]

    def tensor(self, name: str) -> Tensor:
        """One tensor, made anew."""
        return self._makers[name][1]()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        return self.tensor(name).flatten()[start:stop]

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        bound = shape[1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=self._generator(name))

    def _directions(self, module: str) -> tuple[Tensor, Tensor]:
        """(A, B) of PiSSA."""
        weight = self._base.tensor(f"{module}.weight").float()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        root = (s[: self._settings.rank] / self._settings.scale).sqrt()
        return (root[:, None] * v[: self._settings.rank]).contiguous(), (u[:, : self._settings.rank] * root).contiguous()


def product_part(b: Tensor, a: Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened B A in fp64, where a row's values do not depend on which rows are asked for."""
    columns = a.shape[1]
    top, bottom = start // columns, -(-stop // columns)
    return (b[top:bottom].double() @ a.double()).flatten()[start - top * columns : stop - top * columns]


def load_frozen(model: LanguageModel, source: TensorSource) -> None:
    """Fill the frozen parameters (whole or sharded by rows) and the constants; a rank reads and quantises its own rows only."""
    quantised: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) and module.precision in QUANTISED:
            _load_quantised(source, name, module)
            quantised |= {f"{name}.weight", f"{name}.scales"}
    for name, parameter in frozen_parameters(model):
        if name not in quantised:
            copy_from(source, name, parameter)
    for name, tensor in model.constants():
        copy_from(source, name, tensor)


@torch.no_grad()
def _load_quantised(source: TensorSource, name: str, module: FrozenLinear) -> None:
    codes, scales, columns = module.weight, module.scales, module.in_features
    assert scales is not None
    width = codes.shape[1]
    start, stop = (at // width * columns for at in local_range(codes))
    values = source.read(f"{name}.weight", start, stop).reshape(-1, columns)
    made = quantise(values.to(torch.float32), module.precision)
    local_of(codes).copy_(made[0])
    local_of(scales).copy_(made[1])
