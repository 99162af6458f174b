"""Bitmap: one bit a weight and the nonzeros, in the order tensor cores take them.

W [M, K] is cut into shards of rows, bands of 16 rows, blocks of 16 x 256 and tiles of
16 x 64 (csrc/bitmap.h has the picture). Word `lane` = 4 g + t of a tile holds 32 bits:

    byte i          31..24    23..16    15..8     7..0
                    step 3    step 2    step 1    step 0
    bit of a byte   7 6 5 4                3 2 1 0
                    row g + 8              row g,  columns 16 t + 4 i + 0..3

masks    uint32 [S, bands, tiles, 32]
offsets  uint32 [S, bands * blocks + 1]   where each block's values start, in vectors of 8
values   half   [S, capacity]             by block, tile, step, lane, bit

16 d + 1 bits a weight at density d, and about 0.02 for offsets and alignment.
"""

import dataclasses

import jax
import numpy as np

from jax_flashllm.formats.weight import VECTOR, SparseWeight, register, words

BAND_ROWS = 16
TILE_COLS = 64
BLOCK_TILES = 4


def grid_of(rows: int, cols: int) -> tuple[int, int, int]:
    """Bands, tiles a band, blocks a band of a shard [rows, cols]."""
    return -(-rows // BAND_ROWS), -(-cols // TILE_COLS), -(-cols // (TILE_COLS * BLOCK_TILES))


def _unfold(tiles: np.ndarray) -> np.ndarray:
    """[S, bands, tiles, step, lane, bit] to the matrices that they stand for, [S, rows, cols]."""
    s, bands, n = tiles.shape[:3]
    # lane (g, t), bit (half, j) -> row (half, g), column (t, step, j)
    dense = tiles.reshape(s, bands, n, 4, 8, 4, 2, 4).transpose(0, 1, 6, 4, 2, 5, 3, 7)
    return dense.reshape(s, bands * BAND_ROWS, n * TILE_COLS)


@register
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Bitmap(SparseWeight):
    """An encoded weight W [M, K]: one mask bit a weight and the nonzero values.

    Make it with `jax_flashllm.encode`; multiply with `jax_flashllm.spmm`. Buffers as in this
    module's header, `values` in float16 or bfloat16, differentiable.
    """

    masks: jax.Array

    format = "bitmap"

    def __post_init__(self):
        if hasattr(self.values, "shape") and len(self.values.shape) >= 2:
            bands, tiles, blocks = grid_of(self.shard_rows, self.shard_columns)
            self._check_sizes(
                masks=((self.shards, bands, tiles, 32), np.uint32),
                offsets=((self.shards, bands * blocks + 1), np.uint32),
            )

    @property
    def buffers(self):
        return self.masks, self.offsets

    @property
    def nnz(self) -> int:
        return int(np.bitwise_count(np.asarray(self.masks)).sum(dtype=np.int64))

    def _used(self) -> tuple[int, ...]:
        return 0, 0, int(np.asarray(self.offsets)[..., -1].sum(dtype=np.int64)) * VECTOR

    def _bits(self) -> np.ndarray:
        """The masks' bits in the order of the values: bool [S, bands, tiles, step, lane, bit]."""
        masks = np.asarray(self.masks)
        # In memory a lane's steps lie together: [S, bands, tiles, lane, step, bit].
        bits = masks[..., None] >> np.arange(32, dtype=np.uint32) & 1
        return bits.astype(bool).reshape(*masks.shape, 4, 8).swapaxes(3, 4)

    def _to_dense(self) -> np.ndarray:
        (m, k), rows = self.shape, self.shard_rows
        bands, _, blocks = grid_of(rows, k)
        bits = self._bits()
        dense = np.zeros(bits.shape, np.uint16)
        values, offsets = words(self.values), np.asarray(self.offsets).astype(np.int64)
        for s in range(self.shards):
            for band in range(bands):
                for block in range(blocks):
                    part = np.s_[s, band, block * BLOCK_TILES : (block + 1) * BLOCK_TILES]
                    start = offsets[s, band * blocks + block] * VECTOR
                    dense[part][bits[part]] = values[s, start : start + bits[part].sum()]
        dense = _unfold(dense)[:, :rows, :k].reshape(-1, k)[:m]
        return np.ascontiguousarray(dense).view(self.dtype)

    def _validate(self) -> None:
        bands, tiles, blocks = grid_of(self.shard_rows, self.shape[1])
        counts = np.bitwise_count(np.asarray(self.masks)).sum(-1, dtype=np.int64)
        counts = np.pad(counts, ((0, 0), (0, 0), (0, blocks * BLOCK_TILES - tiles)))
        counts = counts.reshape(self.shards, bands * blocks, BLOCK_TILES).sum(-1)
        offsets = np.asarray(self.offsets).astype(np.int64)
        room = np.diff(offsets, axis=1) * VECTOR
        bad = np.argwhere((room < counts) | (offsets[:, 1:] * VECTOR > self.values.shape[1]))
        if bad.size:
            s, b = bad[0]
            raise ValueError(
                f"Bitmap: shard {s}, block {b} has {counts[s, b]} mask bits, but offsets give it "
                f"values {offsets[s, b] * VECTOR} to {offsets[s, b + 1] * VECTOR} of "
                f"{self.values.shape[1]}"
            )
        (m, k), rows = self.shape, self.shard_rows
        stored = _unfold(self._bits())
        padding = [
            stored[:, rows:],
            stored[:, :, k:],
            stored[:, :rows].reshape(-1, stored.shape[2])[m:],
        ]
        if any(part.any() for part in padding):
            raise ValueError(f"Bitmap: a mask bit lies outside the matrix [{m}, {k}]")
