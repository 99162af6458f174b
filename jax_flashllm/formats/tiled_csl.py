"""Tiled-CSL: each nonzero beside its position in a tile (the idea of Flash-LLM, VLDB 2024).

W [M, K] is cut into shards of rows, bands of 128 rows and tiles of 128 x 64.

positions  uint16 [S, capacity]
             15       14 13   12              6 5               0
           | padding |  0   |       row        | col ^ 8 (row % 8) |
values     half   [S, capacity]             parallel to positions
offsets    uint32 [S, bands * tiles + 1]    where each tile starts, in vectors of 8

Inside a tile the nonzeros go round the 32 shared-memory banks of the tile that a GPU expands
them into. Padding fills a tile's last vector with +0 at a position that is zero in W.
32 d bits a weight at density d: smaller than a bitmap below d = 1/16.
"""

import dataclasses

import jax
import numpy as np

from jax_flashllm.formats.weight import VECTOR, SparseWeight, register, words

TILE_ROWS = 128
TILE_COLS = 64
PADDING = 0x8000


def _grid(rows: int, cols: int) -> tuple[int, int]:
    """Bands, and tiles a band, of a shard [rows, cols]."""
    return -(-rows // TILE_ROWS), -(-cols // TILE_COLS)


@register
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class TiledCSL(SparseWeight):
    """An encoded weight W [M, K]: nonzero values and their 16-bit positions, tile by tile.

    Make it with `jax_flashllm.encode`; multiply with `jax_flashllm.spmm`. Buffers as in this
    module's header, `values` in float16 or bfloat16, differentiable.
    """

    positions: jax.Array

    format = "tiled_csl"

    def __post_init__(self):
        if hasattr(self.values, "shape") and len(self.values.shape) >= 2:
            bands, tiles = _grid(self.shard_rows, self.shape[1])
            self._check_sizes(
                positions=(tuple(self.values.shape[-2:]), np.uint16),
                offsets=((self.shards, bands * tiles + 1), np.uint32),
            )

    @property
    def buffers(self):
        return self.positions, self.offsets

    @property
    def nnz(self) -> int:
        return int((np.asarray(self.positions) < PADDING).sum())

    def _to_dense(self) -> np.ndarray:
        (m, k), rows = self.shape, self.shard_rows
        bands, tiles = _grid(rows, k)
        dense = np.zeros((self.shards, bands * TILE_ROWS, tiles * TILE_COLS), np.uint16)
        for s in range(self.shards):
            position, offset = np.asarray(self.positions[s]), np.asarray(self.offsets[s])
            value, stored = words(self.values[s]), position < PADDING
            tile = np.repeat(np.arange(bands * tiles), np.diff(offset.astype(np.int64)) * VECTOR)
            used = np.flatnonzero(stored[: tile.size])
            row, col = position[used] >> 6, position[used] & 63
            col = col ^ (row % 8) * 8
            band, tile = np.divmod(tile[used], tiles)
            dense[s, band * TILE_ROWS + row, tile * TILE_COLS + col] = value[used]
        dense = dense[:, :rows, :k].reshape(-1, k)[:m]
        return np.ascontiguousarray(dense).view(self.dtype)

    def _validate(self) -> None:
        offsets = np.asarray(self.offsets).astype(np.int64)
        end = offsets[:, -1].max() * VECTOR
        if (np.diff(offsets, axis=1) < 0).any() or end > self.values.shape[1]:
            raise ValueError(
                f"TiledCSL: offsets must not fall and must end within the {self.values.shape[1]} "
                f"values a shard; the last is {end}"
            )
        bad = np.asarray(self.positions) & 0x6000
        if bad.any():
            s, i = np.argwhere(bad)[0]
            raise ValueError(
                f"TiledCSL: position {i} of shard {s} is {int(self.positions[s, i])}, outside a "
                f"{TILE_ROWS} x {TILE_COLS} tile"
            )
        for s in range(self.shards):
            self._validate_shard(s, offsets[s])

    def _validate_shard(self, s: int, offsets: np.ndarray) -> None:
        (m, k), rows = self.shape, self.shard_rows
        _, tiles = _grid(rows, k)
        position, value = np.asarray(self.positions[s]), words(self.values[s])
        tile = np.repeat(np.arange(offsets.size - 1), np.diff(offsets) * VECTOR)
        begin, end = offsets[0] * VECTOR, offsets[-1] * VECTOR
        outside = np.concatenate([position[:begin], position[end:]])
        position, value = position[begin:end], value[begin:end]
        stored, row = position < PADDING, position >> 6 & 127
        col = (position & 63) ^ (row % 8 * 8)
        row, col = tile // tiles * TILE_ROWS + row, tile % tiles * TILE_COLS + col
        where = (row >= min(rows, m - s * rows)) | (col >= k)
        if (where & stored).any() or (outside < PADDING).any():
            raise ValueError(f"TiledCSL: shard {s} has a weight outside the matrix [{m}, {k}]")
        place = row * tiles * TILE_COLS + col
        unique, count = np.unique(place[stored], return_counts=True)
        if (count > 1).any():
            r, c = divmod(int(unique[count > 1][0]), tiles * TILE_COLS)
            raise ValueError(f"TiledCSL: shard {s} stores row {r}, column {c} twice")
        if value[~stored].any() or np.isin(place[~stored], unique).any():
            raise ValueError(f"TiledCSL: shard {s} has padding that is no +0 beside the weights")
