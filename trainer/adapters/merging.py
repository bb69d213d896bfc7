"""A checkpoint of an adapter, opened with its base: the weights of both together, one tensor at a time.

    checkpoint = open_model("runs/demo-lora")          # also any other checkpoint, unchanged
    checkpoint.load_into(model)

    W' = W + scale B A                                  lora; A of an embedding is the table: W + scale (B A)^T
    W' = m / ||W + scale B A|| (W + scale B A)          dora

W is the base as the run had it: in bf16, or quantised and dequantised. The sum is made in fp32 and rounded by nobody.
An adapter checkpoint names its base by path and by the hash of its weights (meta["adapter"]); another base is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from chatmill.config import ConfigError, validate

from ...data.tokenizer.folder import FILES
from ..adapter_config import AdapterSection, Precision
from ..checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from ..checkpoint.files import not_finite
from ..checkpoint.manifest import CheckpointError
from .quantised import rounded
from .sources import AdaptedSource

META = "adapter"


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter checkpoint records. base: path in the recipe; place: where that was; mark: the hash of its weights."""

    settings: AdapterSection
    precision: Precision
    base: str
    place: str
    mark: str

    def as_meta(self) -> dict[str, Any]:
        """JSON values for the manifest."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "base_precision": self.precision,
            "base": {"checkpoint": self.base, "place": self.place, "weights": self.mark},
        }


def facts_for(base: Checkpoint, given: str | Path, settings: AdapterSection, precision: Precision) -> AdapterFacts:
    """The record of an adapter on this base. given: its path as the user writes it, a checkpoint or a run."""
    return AdapterFacts(settings, precision, str(given), str(base.path.resolve()), weights_mark(base))


def facts_of(checkpoint: Checkpoint) -> AdapterFacts | None:
    """The record in an adapter checkpoint, or None for one that holds a whole model. Raises CheckpointError."""
    found = checkpoint.meta.get(META)
    if found is None:
        return None
    try:
        base = found["base"]
        settings = validate(AdapterSection, found["settings"], f"{checkpoint.path}: meta.adapter")
        facts = AdapterFacts(settings, found["base_precision"], *(base[key] for key in ("checkpoint", "place", "weights")))
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{checkpoint.path}: its record of the adapter cannot be read ({error!r})") from None
    texts = (facts.base, facts.place, facts.mark)
    if facts.precision not in ("fp32", "bf16", "nf4", "int8") or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{checkpoint.path}: its record of the adapter makes no sense: {found!r:.200}")
    return facts


def weights_mark(checkpoint: Checkpoint) -> str:
    """A hash of a checkpoint's weights and shape: of the hashes of its files, so nothing is read."""
    files = {file for name in checkpoint.names() for file, _, _ in checkpoint.index[name].pieces}
    held = sorted(str(checkpoint.manifest["files"][file]["xxh3"]) for file in files)
    return xxhash.xxh3_128_hexdigest(json.dumps([held, checkpoint.config.model_dump(mode="json")]).encode())


def check_base(base: Checkpoint, facts: AdapterFacts, adapter: Path) -> None:
    """Refuse a base with other weights than those that the adapter was trained on. Raises CheckpointError."""
    if weights_mark(base) != facts.mark:
        raise CheckpointError(
            f"{base.path} is not the base of the adapter {adapter}: its weights differ from those of {facts.base}, on which it "
            f"was trained.\nPut the right base back at {facts.place}: an adapter means nothing on another one."
        )


def open_base(facts: AdapterFacts, adapter: Path, verify: bool = True) -> Checkpoint:
    """The base of an adapter: at the place of the training, or at the path as the recipe had it. Raises CheckpointError."""
    problems = []
    for place in dict.fromkeys((facts.place, facts.base)):
        try:
            base = open_checkpoint(place, verify=verify)
            check_base(base, facts, adapter)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return base
    raise CheckpointError(
        f"{adapter} is an adapter, and its base cannot be opened.\n" + "\n".join(problems) + "\n"
        f"Put the base back at {facts.place}, or use a merged model (chatmill merge)."
    )


def open_model(path: str | Path, verify: bool = True) -> Checkpoint:
    """open_checkpoint, and for an adapter its base as well: a Checkpoint with the merged weights. Raises CheckpointError."""
    return with_base(open_checkpoint(path, verify=verify), verify)


def with_base(found: Checkpoint, verify: bool = True, *, as_stored: bool = False) -> Checkpoint:
    """An opened checkpoint; that of an adapter with its base merged into it. Raises CheckpointError.

    as_stored: in the dtypes of the base's checkpoint, rounded once, for files; otherwise in fp32.
    """
    facts = facts_of(found)
    if facts is None or isinstance(found, MergedCheckpoint):
        return found
    return merged(found, open_base(facts, found.path, verify), facts, as_stored)


def write_merged(adapter: Checkpoint, out: str | Path) -> Path:
    """Write the checkpoint of an adapter and its base together, in the base's dtypes. Raises CheckpointError."""
    source = with_base(adapter, as_stored=True)
    if not isinstance(source, MergedCheckpoint):
        raise CheckpointError(f"{adapter.path} holds a whole model already: there is nothing to merge.")
    meta = {key: value for key, value in adapter.meta.items() if key != META}
    base = {"base": str(source.base.path), "adapter": str(adapter.path)}
    with CheckpointWriter(out, source.config, {**meta, "merged": base}) as writer:
        for name, tensor in source.tensors():
            if problem := not_finite(tensor):
                raise CheckpointError(f"{adapter.path}: {name}, merged, {problem}. Such a model answers nothing.")
            writer.add(name, tensor)
        files = source.files()
        for name in (name for name in FILES if name in files):
            writer.add_file(name, files[name].read_bytes())
    return Path(out)


def merged(adapter: Checkpoint, base: Checkpoint, facts: AdapterFacts, as_stored: bool = False) -> MergedCheckpoint:
    """The two together. Raises CheckpointError where the adapter's tensors do not fit the base."""
    modules = {name.removesuffix(".lora_a") for name in adapter.names() if name.endswith(".lora_a")}
    whole = {name for name in adapter.names() if name in base.index}
    expected = whole | {f"{module}.lora_{which}" for module in modules for which in "ab"}
    if facts.settings.method == "dora":
        expected |= {f"{module}.magnitude" for module in modules}
    if facts.settings.init == "pissa":
        expected |= {f"{module}.initial_{which}" for module in modules for which in "ab"}
    held = set(adapter.names())
    if held != expected or not all(f"{module}.weight" in base.index for module in modules):
        wrong = sorted(held ^ expected) or sorted(module for module in modules if f"{module}.weight" not in base.index)
        raise CheckpointError(f"{adapter.path}: its tensors are not those of an adapter on {base.path}: {wrong[0]}")
    index = base.index if as_stored else {name: replace(entry, dtype="float32") for name, entry in base.index.items()}
    index = {name: index[name] for name in base.names()}
    return MergedCheckpoint(
        adapter.path,
        base.config,
        adapter.meta,
        adapter.manifest,
        index,
        {},
        {},
        adapter,
        base,
        facts,
        frozenset(modules),
        as_stored,
    )


def precision_of(name: str, given: Precision) -> Precision:
    """The precision that training gives a frozen matrix: tables have no 4 or 8 bits."""
    return "bf16" if given in ("nf4", "int8") and not name.startswith("layers.") else given


def frozen_tensor(base: Checkpoint, name: str, given: Precision) -> Tensor:
    """A tensor of the base in fp32, as a run with this `model.base_precision` has it."""
    values = base.tensor(name).float()
    return rounded(values, precision_of(name, given)) if values.ndim == 2 else values


@dataclass(frozen=True)
class MergedCheckpoint(Checkpoint):
    """Weights of base and adapter together; files, meta and path are the adapter's. Only `model` tensors can be read."""

    adapter: Checkpoint = field(default=None)  # type: ignore[assignment]
    base: Checkpoint = field(default=None)  # type: ignore[assignment]
    facts: AdapterFacts = field(default=None)  # type: ignore[assignment]
    modules: frozenset[str] = frozenset()
    as_stored: bool = False

    def tensor(self, name: str) -> Tensor:
        """One tensor by name."""
        self._entry(name)
        module = name.rpartition(".")[0]
        if module in self.modules and name.endswith(".weight"):
            values = self._merged(module)
        elif name in self.adapter.index:
            values = self.adapter.tensor(name).float()
        else:
            values = frozen_tensor(self.base, name, self.facts.precision)
        return values.to(self.base.tensor(name).dtype) if self.as_stored else values

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        return self.tensor(name).flatten()[start:stop]

    def tensors(self, group: str = "model") -> Iterator[tuple[str, Tensor]]:
        """All (name, tensor) pairs."""
        for name in self.names(group):
            yield name, self.tensor(name)

    def close(self) -> None:
        """Release the memory-mapped files of both."""
        self.adapter.close()
        self.base.close()

    @torch.no_grad()
    def _merged(self, module: str) -> Tensor:
        name, scale = f"{module}.weight", self.facts.settings.scale
        source = AdaptedSource(self.base, self.adapter, scale)
        weight = rounded(source.tensor(name), precision_of(name, self.facts.precision))
        a, b = (self.adapter.tensor(f"{module}.lora_{which}").float() for which in "ab")
        update = scale * (b @ a)
        weight = weight + (update.T if module == "embed" else update)
        if self.facts.settings.method == "dora":
            weight = weight * (self.adapter.tensor(f"{module}.magnitude").float() / weight.norm(dim=1))[:, None]
        return weight
