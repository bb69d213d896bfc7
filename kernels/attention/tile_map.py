"""The tile map of packed attention: which key tiles each query tile visits, worked out on the CPU from cu_seqlens.

    tile_map = make_tile_map(cu_seqlens, T, head_dim=64, device=torch.device("cuda"))   # in the collator, on the CPU
    tile_map = tile_map.to("cuda", non_blocking=True)                                   # one copy
    attention(q, k, v, cu_seqlens=cu_seqlens, tile_map=tile_map)                        # waits for nothing

It holds three lists of tiles, one per kernel:

    list_tiles(cu_seqlens, 128, 64)                 # query tiles of 128 rows, key steps of 64: forward and dq
    list_tiles(cu_seqlens, 128, 64, side="key")     # key tiles of 128 rows, query steps of 64: dk and dv

Documents lie in order, so what a tile of queries may see is one interval of keys (and the reverse). A tile is a run of at most
`block` rows. It starts where its document does or a whole number of blocks later, and takes in further documents only while
they fit completely. Steps are counted from the interval's own start, aligned with the document and not with the memory: a long
document is masked on its diagonal only. One tile is one row of COLUMNS int32:

    start, end    rows of the tile
    low, high     interval of the other side
    lead          steps from `low` that need the element mask
    full          steps after those in which every pair is seen: no mask
    tail          steps after those that need the mask again
    steps         lead + full + tail

Empty steps are never visited. Tiles come longest first, so that the last wave of a GPU is short. Tiles without rows fill the
list to a multiple of PAD, so that few list lengths occur. Rows of no document get tiles of no steps: their outputs become zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..dispatch import capability
from .tiles import HOPPER_FORWARD, SHORT, KernelConfig, TileConfig, kernel_config

COLUMNS = 8
START, END, LOW, HIGH, LEAD, FULL, TAIL, STEPS = range(COLUMNS)
PAD = 16
# a query tile takes in further documents only while its first rows look back at most this many steps: every step of a tile that
# holds several documents needs the mask
SHARED_HISTORY_STEPS = 4

Side = Literal["query", "key"]


def visible_intervals(
    cu_seqlens: NDArray[np.integer], T: int, window: int | None = None, *, causal: bool = True
) -> NDArray[np.int32]:
    """Int32 (4, T): first key and end of the keys that each query sees, first query and end of those that see each key.

    Rows of no document get the empty interval [0, 0).
    """
    bounds = np.asarray(cu_seqlens, dtype=np.int64)
    lengths, rows = np.diff(bounds), np.arange(int(bounds[0]), int(bounds[-1]))
    first, end = np.repeat(bounds[:-1], lengths), np.repeat(bounds[1:], lengths)
    reach = window or T + 1
    out = np.zeros((4, T), dtype=np.int32)
    inside = out[:, rows[0] : rows[-1] + 1] if rows.size else out[:, :0]
    inside[0] = np.maximum(first, rows - reach + 1)
    inside[1] = rows + 1 if causal else np.minimum(end, rows + reach)
    inside[2] = rows if causal else np.maximum(first, rows - reach + 1)
    inside[3] = np.minimum(end, rows + reach)
    return out


def check_cu_seqlens(cu_seqlens: NDArray[np.integer], T: int) -> None:
    """Raise ValueError unless boundaries start at 0, never fall and end within T."""
    bounds = np.asarray(cu_seqlens)
    if bounds.ndim != 1 or bounds.size < 2 or bounds[0] != 0 or (np.diff(bounds) < 0).any() or bounds[-1] > T:
        raise ValueError(f"attention: cu_seqlens must rise from 0 to at most T={T}; got {bounds[:8].tolist()} .. {bounds[-1]}.")


def _spans(cu_seqlens: NDArray[np.integer], T: int, block: int, history: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, first document's start, last document's end) of every tile, in row order; document -1 for rows of none."""
    ends = [int(x) for x in cu_seqlens[1:]]
    begin, i = 0, 0
    while i < len(ends):
        stop = ends[i]
        at = begin
        while stop - at >= block:
            yield at, at + block, begin, stop
            at += block
        first, end = begin, stop
        i += 1
        if at == stop:
            begin = stop
            continue
        if at - first <= history:  # room left: whole documents that follow
            while i < len(ends) and ends[i] - at <= block:
                end = ends[i]
                i += 1
        yield at, end, first, end
        begin = end
    for at in range(begin, T, block):
        yield at, min(T, at + block), -1, -1


def list_tiles(
    cu_seqlens: NDArray[np.integer],
    block: int,
    step: int,
    window: int | None = None,
    *,
    causal: bool = True,
    side: Side = "query",
    T: int | None = None,
) -> NDArray[np.int32]:
    """Int32 (tiles, COLUMNS), see the header.

    cu_seqlens (S+1,): document boundaries, 0 first. block: rows of a tile. step: rows of the other side per step.
    window: tokens seen by a query, itself included. T: rows in all, where the documents end before them.
    """
    T = int(cu_seqlens[-1]) if T is None else T
    check_cu_seqlens(cu_seqlens, T)
    # keys look ahead: of a causal key tile only the part within its own document counts, and that ends inside the tile
    history = T if side == "key" and causal else SHARED_HISTORY_STEPS * step
    spans = np.array(list(_spans(np.asarray(cu_seqlens), T, block, history)), dtype=np.int64).reshape(-1, 4)
    s, e, a, b = spans.T
    inside = a >= 0
    reach = window or T + block
    if side == "query":
        low = np.maximum(a, s - reach + 1)
        high = e if causal else np.minimum(b, e - 1 + reach)
    else:
        low = s if causal else np.maximum(a, s - reach + 1)
        high = np.minimum(b, e - 1 + reach)
    low, high = np.where(inside, low, s), np.where(inside, high, s)
    steps = -(-(high - low) // step)
    # full steps of a tile that holds one document. Everything is seen where the first row sees the step's last one and the last
    # row the step's first one; rows of the other side from `high` on are left out of a key tile by their log-sum-exp.
    if side == "query":
        lead = -(-np.maximum(0, e - reach - low) // step)
        until = (s + 1 - low) // step if causal else np.minimum(high - low, s + reach - low) // step
    else:
        lead = -(-np.maximum(0, (e - 1 if causal else e - reach) - low) // step)
        until = np.where(high - low <= s + reach - low - step + 1, steps, np.maximum(0, s + reach - low) // step)
    single = inside & _is_single(cu_seqlens, s, e)
    lead = np.where(single, np.minimum(lead, steps), 0)
    full = np.where(single, np.maximum(0, np.minimum(until, steps) - lead), 0)
    tiles = np.stack([s, e, low, high, lead, full, steps - lead - full, steps], 1)
    tiles = tiles[np.argsort(-steps, kind="stable")]
    padding = np.zeros((-len(tiles) % PAD, COLUMNS), dtype=np.int64)
    return np.concatenate([tiles, padding]).astype(np.int32)


def _is_single(cu_seqlens: NDArray[np.integer], s: NDArray[np.int64], e: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether rows s..e-1 lie in one document."""
    ends = np.asarray(cu_seqlens)[1:]
    return np.searchsorted(ends, s, side="right") == np.searchsorted(ends, e - 1, side="right")


@dataclass(frozen=True)
class TileMap:
    """Tile lists of one batch as a single int32 tensor, so that one copy moves them.

    data: the three tile lists (forward, dkdv, dq; COLUMNS numbers a tile), then visible_intervals (4 x T).
    header: tiles of the three lists, T, causal, window, the tile sizes of the three kernels: 18 numbers.
    """

    data: Tensor
    header: tuple[int, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TileMap:
        return TileMap(self.data.to(device, non_blocking=non_blocking), self.header)

    def pin_memory(self) -> TileMap:
        return TileMap(self.data.pin_memory(), self.header)

    @property
    def tokens(self) -> int:
        """Rows of the batch, T."""
        return self.header[3]

    @property
    def causal(self) -> bool:
        return bool(self.header[4])

    @property
    def window(self) -> int:
        """Tokens seen by a query; 0: all."""
        return self.header[5]

    @property
    def config(self) -> KernelConfig:
        numbers = self.header[6:18]
        return KernelConfig(*(TileConfig(*numbers[i : i + 4]) for i in (0, 4, 8)))

    def _list(self, i: int) -> Tensor:
        first = sum(self.header[:i])
        return self.data[first * COLUMNS : (first + self.header[i]) * COLUMNS].view(-1, COLUMNS)

    @property
    def forward(self) -> Tensor:
        return self._list(0)

    @property
    def dkdv(self) -> Tensor:
        return self._list(1)

    @property
    def dq(self) -> Tensor:
        return self._list(2)

    @property
    def bounds(self) -> Tensor:
        return self.data[sum(self.header[:3]) * COLUMNS :]


def make_tile_map(
    cu_seqlens: NDArray[np.integer] | Sequence[int],
    T: int,
    *,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    causal: bool = True,
    device: torch.device | None = None,
    config: KernelConfig | None = None,
    impl: str = "auto",
) -> TileMap:
    """Tile map of one batch, on the CPU.

    head_dim: the larger of the key and value channels. device: where the kernels will run (its generation sets the tile sizes).
    config: tile sizes to use in place of the table's. impl="hopper": for that tier.
    """
    bounds: NDArray[np.int64] = np.asarray(cu_seqlens, dtype=np.int64)
    if config is None:
        documents = int(np.count_nonzero(np.diff(bounds)))
        short = int(bounds[-1]) < SHORT * documents
        arch = 0 if device is None else capability(device)
        config = kernel_config(arch, dtype.itemsize, head_dim, short)
        if impl == "hopper":
            config = config._replace(forward=HOPPER_FORWARD.get(head_dim, config.forward))
    lists = [
        list_tiles(bounds, config.forward.block_m, config.forward.block_n, window, causal=causal, T=T),
        list_tiles(bounds, config.dkdv.block_n, config.dkdv.block_m, window, causal=causal, side="key", T=T),
        list_tiles(bounds, config.dq.block_m, config.dq.block_n, window, causal=causal, T=T),
    ]
    data = np.concatenate([x.ravel() for x in (*lists, visible_intervals(bounds, T, window, causal=causal))])
    header = (*(len(x) for x in lists), T, int(causal), window or 0, *config.forward, *config.dkdv, *config.dq)
    return TileMap(torch.from_numpy(data), header)
