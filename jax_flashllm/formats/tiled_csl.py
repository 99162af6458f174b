"""Tiled-CSL: nonzeros as short steps down the shared-memory banks that a GPU expands them in.

W [M, K] is cut into shards of rows, bands of 64 rows and blocks of 64 x 128. A dense block is
128 rows of 32 banks of 2 halves, in the order of mma fragments (csrc/tiled_csl.h). Its 64 columns
of halves are lists of nonzeros, 4 C entries each: a value, and as a 4-bit code the rows from the
entry before. What is longer than 4 C entries goes to the block's tail.

    code 1..14   a weight, so many rows down; the first entry counts from row 0, a bin
    code 15      filler: 15 rows down, no weight
    code 0       behind a filler: a weight right there; at a list's start: padding, in the bin

    block    | chunk 0 | ... | chunk C - 1 | tail: vectors of 8 |
    values   half    [2 lists, 32 banks, 4 entries] a chunk, [8] a tail vector
    index    4 bits  [32 banks, 4 entries, 2 lists] a chunk, 16 bits [8] = 64 row + list

values   half   [S, capacity]               block after block
index    uint32 [S, index_capacity]         block after block
offsets  uint32 [S, bands * blocks + 1, 2]  chunks and tail vectors before each block

20 bits an entry: 10.6 bits a weight at 50% sparsity, 4.6 at 80% (docs/formats.md). Entries that
hold no weight (fillers, padding, tail positions below 64) are dead: value +0, gradient 0.
"""

import dataclasses

import jax
import numpy as np

from jax_flashllm.formats.weight import VECTOR, SparseWeight, register, words

BLOCK_ROWS = 64
BLOCK_COLS = 128
LISTS = 64
ROWS = BLOCK_ROWS * BLOCK_COLS // LISTS
CHUNK = 4 * LISTS  # entries of a chunk
MAX_CHUNKS = ROWS // 4
FILLER = 15


def grid_of(rows: int, cols: int) -> tuple[int, int]:
    """Bands, and blocks a band, of a shard [rows, cols]."""
    return -(-rows // BLOCK_ROWS), -(-cols // BLOCK_COLS)


def _unfold(scratch: np.ndarray, blocks: int) -> np.ndarray:
    """Dense blocks [bands * blocks, 8192] in scratch order to [bands * 64, blocks * 128]."""
    # tile (row, col), step, lane (g, t), register (ahalf, upper), half
    parts = scratch.reshape(-1, blocks, 4, 2, 4, 8, 4, 2, 2, 2)
    # row = band, tile row, upper, g; column = block, tile column, t, step, ahalf, half
    return parts.transpose(0, 2, 8, 5, 1, 3, 6, 4, 7, 9).reshape(-1, blocks * BLOCK_COLS)


@register
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class TiledCSL(SparseWeight):
    """An encoded weight W [M, K]: nonzero values and 4-bit steps between them, block by block.

    Make it with `jax_flashllm.encode`; multiply with `jax_flashllm.spmm`. Buffers as in this
    module's header, `values` in float16 or bfloat16, differentiable.
    """

    index: jax.Array

    format = "tiled_csl"

    def __post_init__(self):
        if hasattr(self.values, "shape") and len(self.values.shape) >= 2:
            bands, blocks = grid_of(self.shard_rows, self.shard_columns)
            capacity = getattr(self.index, "shape", (0,))[-1]
            capacity = max(4, capacity // 4 * 4)  # words: vectors of 16 bytes
            self._check_sizes(
                index=((self.shards, capacity), np.uint32),
                offsets=((self.shards, bands * blocks + 1, 2), np.uint32),
            )

    @property
    def buffers(self):
        return self.index, self.offsets

    @property
    def nnz(self) -> int:
        if len(self.values.shape) > 2:
            return sum(w.nnz for w in self._unstacked())
        if self.column_shards > 1:
            return sum(w.nnz for w in self._columns())
        return sum(
            int(live.sum()) + int((tail >= LISTS).sum())
            for _, live, tail in map(self._lists, range(self.shards))
        )

    def _used(self) -> tuple[int, ...]:
        chunks, tails = np.asarray(self.offsets)[..., -1, :].reshape(-1, 2).sum(0, dtype=np.int64)
        return int(32 * chunks + 4 * tails), 0, int(CHUNK * chunks + VECTOR * tails)

    def _counts(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        """Chunks and tail vectors of each block of shard s."""
        offsets = np.asarray(self.offsets[s]).astype(np.int64)
        counts = np.diff(offsets, axis=0)
        # Before memory is asked for by what they say.
        if (counts < 0).any() or 32 * offsets[-1, 0] + 4 * offsets[-1, 1] > self.index.shape[-1]:
            raise ValueError(
                f"TiledCSL: the offsets of shard {s} fall, or end behind the "
                f"{self.index.shape[-1]} words of index"
            )
        return counts[:, 0], counts[:, 1]

    def _lists(self, s: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of shard s: codes and what is live of all lists, [entries, 64], and tails [n, 8]."""
        chunks, tails = self._counts(s)
        is_chunk = _alternate(8 * chunks, tails)  # of each vector of 4 words
        vectors = np.asarray(self.index[s])[: 4 * is_chunk.size].reshape(-1, 4)
        codes = vectors[is_chunk].view(np.uint8).reshape(-1, LISTS // 2, 4)
        codes = np.stack([codes & 15, codes >> 4], -1).swapaxes(1, 2).reshape(-1, LISTS)
        before = np.roll(codes, 1, 0)
        before[4 * (np.cumsum(chunks) - chunks)[chunks > 0]] = 0
        live = np.where(codes == 0, before == FILLER, codes < FILLER)
        return codes, live, vectors[~is_chunk].view(np.uint16)

    def _rows(self, s: int, codes: np.ndarray) -> np.ndarray:
        """The rows that the entries of `_lists` lie in, 0 the bin."""
        chunks, _ = self._counts(s)
        start = np.repeat(4 * (np.cumsum(chunks) - chunks), 4 * chunks)
        rows = np.cumsum(codes, 0, dtype=np.uint16)  # may wrap, which a difference survives
        return rows - (rows - codes)[start]

    def _positions(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each value of shard s: its block, and 64 row + list in it (below 64: dead)."""
        chunks, tails = self._counts(s)
        codes, live, tail = self._lists(s)
        place = np.where(live, self._rows(s, codes) * np.int32(LISTS) + np.arange(LISTS), 0)
        is_chunk = _alternate(32 * chunks, tails)  # of each vector of 8 values
        position = np.empty((is_chunk.size, VECTOR), np.int32)
        place = place.reshape(-1, 4, LISTS // 2, 2).transpose(0, 3, 2, 1)
        position[is_chunk] = place.reshape(-1, VECTOR)
        position[~is_chunk] = tail
        block = np.repeat(np.arange(chunks.size), CHUNK * chunks + VECTOR * tails)
        return block, position.ravel()

    def _to_dense(self) -> np.ndarray:
        (m, k), rows = self.shape, self.shard_rows
        bands, blocks = grid_of(rows, k)
        dense = np.empty((self.shards, bands * BLOCK_ROWS, blocks * BLOCK_COLS), np.uint16)
        for s in range(self.shards):
            block, position = self._positions(s)
            scratch = np.zeros((bands * blocks, (1 + ROWS) * LISTS), np.uint16)
            live = position >= LISTS
            scratch[block[live], position[live]] = words(self.values[s])[: live.size][live]
            dense[s] = _unfold(scratch[:, LISTS:], blocks)
        dense = dense[:, :rows, :k].reshape(-1, k)[:m]
        return np.ascontiguousarray(dense).view(self.dtype)

    def _validate(self) -> None:
        offsets = np.asarray(self.offsets).astype(np.int64)
        steps = np.diff(offsets, axis=1)
        if offsets[:, 0].any() or (steps < 0).any() or (steps[..., 0] > MAX_CHUNKS).any():
            raise ValueError(
                f"TiledCSL: offsets must start at 0, not fall, and give a block {MAX_CHUNKS} "
                "chunks at most"
            )
        chunks, tails = offsets[:, -1, 0].max(), offsets[:, -1, 1].max()
        ends = (offsets[:, -1] @ [CHUNK, VECTOR]).max(), (offsets[:, -1] @ [32, 4]).max()
        room = self.values.shape[1], self.index.shape[1]
        if ends[0] > room[0] or ends[1] > room[1]:
            raise ValueError(
                f"TiledCSL: {chunks} chunks and {tails} vectors a shard need {ends[0]} values and "
                f"{ends[1]} words of index, but there are {room[0]} and {room[1]}"
            )
        for s in range(self.shards):
            self._validate_shard(s)

    def _validate_shard(self, s: int) -> None:
        (m, k), rows = self.shape, self.shard_rows
        _, blocks = grid_of(rows, k)
        codes, live, tail = self._lists(s)
        row = self._rows(s, codes)
        if row.max(initial=0) > ROWS or tail.max(initial=0) >= (1 + ROWS) * LISTS:
            raise ValueError(f"TiledCSL: shard {s} has a list or a tail that leaves its block")
        if (~live & (codes == 0) & (row > 0)).any():
            raise ValueError(f"TiledCSL: shard {s} has padding behind a list's first weight")
        chunks, tails = self._counts(s)
        last = np.zeros((chunks.size, LISTS), np.int32)
        last[chunks > 0] = row[4 * np.cumsum(chunks)[chunks > 0] - 1]
        before = last[np.repeat(np.arange(tails.size), tails)[:, None], tail % LISTS]
        if ((tail >= LISTS) & (tail // LISTS <= before)).any():
            raise ValueError(f"TiledCSL: shard {s} has a tail that overlaps its lists")
        block, position = self._positions(s)
        stored = position >= LISTS
        if words(self.values[s])[: stored.size][~stored].any():
            raise ValueError(f"TiledCSL: shard {s} has a dead entry that is not +0")
        place = block[stored] * (ROWS * LISTS) + position[stored] - LISTS
        count = _unfold(np.bincount(place, minlength=chunks.size * ROWS * LISTS), blocks)
        if count[max(0, min(rows, m - s * rows)) :].any() or count[:, k:].any():
            raise ValueError(f"TiledCSL: shard {s} has a weight outside the matrix [{m}, {k}]")
        if (count > 1).any():
            row, col = np.argwhere(count > 1)[0]
            raise ValueError(f"TiledCSL: shard {s} stores row {row}, column {col} twice")


def _alternate(*counts: np.ndarray) -> np.ndarray:
    """counts[0][b] times True, then counts[1][b] times False, for every block b."""
    return np.repeat(np.tile([True, False], counts[0].size), np.stack(counts, -1).ravel())
