"""Muon where ZeRO holds the weights: each process has a few runs of elements of each matrix, in one flat fp32 partition.

    flat partition of rank r   [ ... | elements a..b of matrix i | elements of matrix i + 1 | ... | padding ]

ZeRO-1 and 2 lay the matrices of a group end to end and cut the whole into equal partitions, so that a matrix is on one rank or
on several consecutive ones; ZeRO-3 cuts every matrix into equal parts. Momentum is computed in place. For Newton-Schulz a
matrix travels whole to one owner and back (two all-to-alls per world-size matrices of one shape), and the owners take turns:
the update is that of one process, no work is done twice, and no rank ever holds more than one whole matrix. Embeddings, head,
norms and biases are in separate groups, hence in separate flat partitions, which AdamW updates.

DeepSpeed's own Muon (runtime/zero/muon of 0.19.8) is not used: it runs before the gradients are clipped, and the norm that
clips is then that of its update (stage3.py, _apply_muon_to_accumulated_grads), unlike in the other engine.
The tests compare this with the Muon of one process (tests/trainer/engine/test_engines.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .muon import Muon, by_owner, newton_schulz


@dataclass(frozen=True)
class SlicedMatrix:
    """Where the elements of a matrix are. offset: of this rank's run in its flat partition; lengths: elements per rank."""

    shape: tuple[int, int]
    offset: int
    lengths: tuple[int, ...]


def slices_of(shape: tuple[int, int], offset: int, runs: Sequence[tuple[int, int]]) -> SlicedMatrix:
    """Check every rank's run (first element, number of elements; 0, 0: none): together they are the matrix, in order.

    Raises RuntimeError otherwise: DeepSpeed has cut it in a way that the exchange does not support.
    """
    held = [(start, start + length) for start, length in runs if length]
    whole = held and held[0][0] == 0 and held[-1][1] == math.prod(shape) and all(a[1] == b[0] for a, b in pairwise(held))
    if not whole:
        raise RuntimeError(f"ZeRO holds a {shape} matrix in the pieces {held}, which are not the matrix in the order of ranks")
    return SlicedMatrix(shape, offset, tuple(length for _, length in runs))


class ZeroMuon(Muon):
    """Muon on flat partitions; DeepSpeed calls `step` for one group at a time (ZeRO-1, 2, 3) or for all (its bf16 ZeRO-1)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._matrices: Mapping[int, Sequence[SlicedMatrix]] = {}
        self._device = torch.device("cpu")

    def place(self, matrices: Mapping[int, Sequence[SlicedMatrix]], device: torch.device) -> None:
        """Set which matrices each flat partition (by its `id`) holds, in the same order on all ranks; `device` computes NS."""
        self._matrices, self._device = matrices, device

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of the groups that `param_groups` holds now, all of whose partitions have gradients; collective."""
        assert closure is None
        for group in self.param_groups:
            if group["muon"]:
                for flat in group["params"]:
                    self._step_flat(flat, group)
        others = [group for group in self.param_groups if not group["muon"]]
        if others and self.adamw is not None:
            self.adamw.param_groups = others
            self.adamw.step()

    def _step_flat(self, flat: Tensor, group: Mapping[str, Any]) -> None:
        (update,) = self._momentum([flat])
        alike: dict[tuple[int, int], list[SlicedMatrix]] = {}
        for matrix in self._matrices[id(flat)]:
            alike.setdefault(matrix.shape, []).append(matrix)
        for (rows, columns), matrices in alike.items():
            world = len(matrices[0].lengths)
            rank = dist.get_rank() if world > 1 else 0
            for at in range(0, len(matrices), world):
                chosen = matrices[at : at + world]
                runs = [slice(m.offset, m.offset + m.lengths[rank]) for m in chosen]
                for run, piece in zip(runs, self._orthogonal_runs([update[run] for run in runs], chosen), strict=True):
                    self._apply(flat[run], piece, rows, columns, group)

    def _orthogonal_runs(self, pieces: Sequence[Tensor], matrices: Sequence[SlicedMatrix]) -> list[Tensor]:
        """This rank's runs of NS of at most world-size matrices of one shape."""
        shape, iterations = matrices[0].shape, self.section.iterations
        moved = [piece.to(self._device, self.dtype) for piece in pieces]
        if len(matrices[0].lengths) == 1:
            return [newton_schulz(moved[0].view(1, *shape), iterations).flatten()]
        return by_owner(moved, [matrix.lengths for matrix in matrices], shape, iterations)
