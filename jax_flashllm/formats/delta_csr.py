"""Delta-CSR: rows of nonzeros with short steps between their columns, dealt out to 32 lanes.

W [M, K] is cut into shards of rows and blocks of up to 12288 columns. Of a row in a block, an
item, the nonzeros are entries by rising column. Lane l of 32 takes the entries l T / 32 up to
(l + 1) T / 32 of T, in groups of four: values, and as codes the steps from one column to the next,
4 unsigned or 8 signed bits (csrc/delta_csr.h). They count from the lane's base - 1 on:

    code 127, 15 (of 4 bits)   filler: so many columns further, no weight
    code 0                     behind a filler: a weight right there; else none
    any other                  a weight, so many columns further

    item     | bases of the lanes | codes of group 0 | .. of group 1 | ...

values   half    [S, capacity]         a group: [32 lanes, 4 entries]; item after item
index    uint32  [S, index_capacity]   an item: 16 bits [32 lanes], codes [groups, 32 lanes, 4]
offsets  uint32  [S, items + 2]        groups before each item, and in all; then 4 or 8, the bits
                                       of a code; item = block * rows + row

24 or 20 bits a weight, and 64 bytes of bases an item. Entries that hold no weight (fillers, and
code 0 that no filler precedes) are dead: value +0, gradient 0. The codes say in which order a
lane's weights come; `encode` writes them by rising column.
"""

import dataclasses
import math
from typing import Literal

import jax
import numpy as np

from jax_flashllm.formats.weight import SparseWeight, register, words

MAX_BLOCK_COLS = 12288
LANES = 32
STEPS = 4  # entries of a lane in a group
GROUP = LANES * STEPS
BASE_WORDS = LANES // 2
FILLER = {4: 15, 8: 127}


def grid_of(cols: int) -> tuple[int, int]:
    """Blocks of a shard with so many columns, and the columns of a block."""
    cols = max(cols, 1)  # no columns are refused later
    block_cols = -(-cols // -(-cols // MAX_BLOCK_COLS))
    block_cols = -(-block_cols // 64) * 64
    return -(-cols // block_cols), block_cols


def smaller_format(density: float, columns: int) -> Literal["bitmap", "delta_csr"]:
    """The format that takes fewer bytes for a shard with so many columns, nonzeros spread evenly.

    A bitmap's row takes 2 bytes a nonzero, 1/8 a column, and alignment.
    """
    bitmap = 2 * density * columns + columns * 1.02 / 8
    return "delta_csr" if row_bytes(density, columns) < bitmap else "bitmap"


def row_bytes(density: float, columns: int) -> float:
    """What a row of a shard takes in the mean, nonzeros spread evenly.

    In each of its blocks bases and an offset, and groups of entries: nonzeros, whose number varies
    from row to row, and fillers, one for each whole 15 or 127 columns of a gap.
    """
    blocks, _ = grid_of(columns)
    n, zero = density * columns / blocks, 1 - density
    spread = math.sqrt(2 * n * zero) + 1e-9

    def bytes_with(bits: int) -> float:
        filler = FILLER[bits]
        gaps = n + math.expm1(-n)
        entries = n + (gaps * zero ** (filler - 1) / (1 - zero**filler) if n else 0)
        most = int((entries + 6 * spread) / GROUP) + 1
        # A group is there where the entries are more than all before it hold, the first where
        # there are any.
        more = (math.erfc((GROUP * g + 0.5 - entries) / spread) / 2 for g in range(1, most))
        groups = sum(more) - math.expm1(-n)
        return blocks * (4 * (BASE_WORDS + 1) + GROUP * (2 + bits / 8) * groups)

    return min(map(bytes_with, FILLER))


@register
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class DeltaCSR(SparseWeight):
    """An encoded weight W [M, K]: rows of nonzero values and steps of 4 or 8 bits between them.

    Make it with `jax_flashllm.encode`; multiply with `jax_flashllm.spmm`. Buffers as in this
    module's header, `values` in float16 or bfloat16, differentiable.
    """

    index: jax.Array

    format = "delta_csr"
    unit = GROUP

    def __post_init__(self):
        if hasattr(self.values, "shape") and len(self.values.shape) >= 2:
            items = self.shard_rows * grid_of(self.shard_columns)[0]
            capacity = getattr(self.index, "shape", (0,))[-1]
            capacity = max(items, capacity // BASE_WORDS) * BASE_WORDS
            self._check_sizes(
                index=((self.shards, capacity), np.uint32),
                offsets=((self.shards, items + 2), np.uint32),
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
        return sum(int(self._columns_of(s)[1].sum()) for s in range(self.shards))

    def most(self, nonzeros: int) -> tuple[int, int]:
        """The values and words of index that a shard can need, of a weight of this shape with so
        many nonzeros a row, wherever they are."""
        rows, cols = self.shard_rows, self.shard_columns
        blocks, _ = grid_of(cols)
        n = min(nonzeros, cols)
        # A filler passes zeros only, one less than its columns; groups are rounded up a block.
        groups = {
            bits: rows * ((n + (cols - n) // (filler - 1) + blocks * (GROUP - 1)) // GROUP)
            for bits, filler in FILLER.items()
        }
        # 4 bits are taken where 5 groups of them are less than 6 of 8 bits.
        groups[4] = min(groups[4], 6 * groups[8] // 5)
        index = max(4 * bits * n for bits, n in groups.items())
        return GROUP * max(groups.values()), BASE_WORDS * blocks * rows + index

    def _used(self) -> tuple[int, ...]:
        offsets = np.asarray(self.offsets).astype(np.int64)
        groups, bits = offsets[..., -2], offsets[..., -1]
        items = self.offsets.shape[-1] - 2
        index = BASE_WORDS * items + 4 * bits * groups
        return int(index.sum()), 0, GROUP * int(groups.sum())

    def _groups(self, s: int) -> tuple[np.ndarray, int]:
        """Groups of each item of shard s, and the bits of a code."""
        offsets = np.asarray(self.offsets[s]).astype(np.int64)
        groups, total, bits = np.diff(offsets[:-1]), int(offsets[-2]), int(offsets[-1])
        if bits not in FILLER:
            raise ValueError(f"DeltaCSR: shard {s} has codes of {bits} bits, expected 4 or 8")
        if offsets[0] or (groups < 0).any():
            raise ValueError(f"DeltaCSR: the offsets of shard {s} must start at 0 and not fall")
        # Before memory is asked for by what they say.
        needed = GROUP * total, BASE_WORDS * groups.size + 4 * bits * total
        room = self.values.shape[-1], self.index.shape[-1]
        if needed[0] > room[0] or needed[1] > room[1]:
            raise ValueError(
                f"DeltaCSR: the {total} groups of shard {s} need {needed[0]} values and "
                f"{needed[1]} words of index, but there are {room[0]} and {room[1]}"
            )
        most = -(-grid_of(self.shard_columns)[1] // GROUP)
        if groups.max(initial=0) > most:
            raise ValueError(
                f"DeltaCSR: shard {s} has an item of {groups.max()} groups, but the columns of a "
                f"block fill {most}"
            )
        return groups, bits

    def _codes(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        """Of shard s: bases [items, 32 lanes], and codes [groups, 32 lanes, 4]."""
        groups, bits = self._groups(s)
        counts = np.stack([np.full_like(groups, BASE_WORDS), 4 * bits * groups], -1)  # words
        is_base = np.repeat(np.tile([True, False], groups.size), counts.ravel())
        index = np.asarray(self.index[s])[: is_base.size]
        bases = index[is_base].view(np.uint16).reshape(-1, LANES)
        codes = index[~is_base].view(np.int8 if bits == 8 else np.uint8)
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], -1)
        return bases, codes.reshape(-1, LANES, STEPS)

    def _columns_of(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each entry of shard s, [groups, 32 lanes, 4]: its column in its block, and whether it
        holds a weight."""
        groups, bits = self._groups(s)
        bases, codes = self._codes(s)
        filler = FILLER[bits]
        first = (np.cumsum(groups) - groups)[groups > 0]  # of the items that have any
        steps = codes.transpose(0, 2, 1).reshape(-1, LANES)  # the lists one below the other
        before = np.roll(steps, 1, 0)
        before[STEPS * first] = 0
        live = np.where(steps == 0, before == filler, steps != filler)
        column = np.cumsum(steps, 0, dtype=np.int32)  # may wrap, which a difference survives
        start = bases[groups > 0].astype(np.int32) - 1 - (column - steps)[STEPS * first]
        column += np.repeat(start, STEPS * groups[groups > 0], axis=0)
        shape = -1, STEPS, LANES
        return column.reshape(shape).swapaxes(1, 2), live.reshape(shape).swapaxes(1, 2)

    def _positions(self, s: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the weights of shard s: row, column, and where the value is."""
        (m, k), rows = self.shape, self.shard_rows
        _, block_cols = grid_of(k)
        groups, _ = self._groups(s)
        column, live = self._columns_of(s)
        of_group = np.repeat(np.arange(groups.size), groups)
        columns = np.minimum(block_cols, k - of_group // rows * block_cols)  # the last block's
        if (column < -1).any() or (column >= columns[:, None, None]).any():
            raise ValueError(
                f"DeltaCSR: shard {s} has a list that leaves its block of {block_cols} columns, "
                "or W"
            )
        item = of_group[np.nonzero(live)[0]]
        block, row = np.divmod(item, rows)
        column = column[live]
        outside = (column < 0) | (column + block * block_cols >= k) | (row + s * rows >= m)
        if outside.any():
            raise ValueError(f"DeltaCSR: shard {s} has a weight outside the matrix [{m}, {k}]")
        return row, column + block * block_cols, np.flatnonzero(live)

    def _to_dense(self) -> np.ndarray:
        (m, k), rows = self.shape, self.shard_rows
        dense = np.zeros((self.shards, rows, k), np.uint16)
        for s in range(self.shards):
            row, column, at = self._positions(s)
            dense[s, row, column] = words(self.values[s])[at]
        return dense.reshape(-1, k)[:m].view(self.dtype)

    def _validate(self) -> None:
        for s in range(self.shards):
            groups, bits = self._groups(s)
            _, codes = self._codes(s)
            if (codes[np.cumsum(groups)[groups > 0] - 1, :, -1] == FILLER[bits]).any():
                raise ValueError(f"DeltaCSR: shard {s} has a list that ends with a filler")
            row, column, at = self._positions(s)
            dead = words(self.values[s])[: codes.size].copy()
            dead[at] = 0
            if dead.any():
                raise ValueError(f"DeltaCSR: shard {s} has a dead entry that is not +0")
            place = np.sort(row * np.int64(self.shape[1]) + column)
            twice = place[1:][place[1:] == place[:-1]]
            if twice.size:
                row, column = divmod(int(twice[0]), self.shape[1])
                raise ValueError(f"DeltaCSR: shard {s} stores row {row}, column {column} twice")
