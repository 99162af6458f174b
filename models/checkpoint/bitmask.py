"""sparse-bitmask: the interchange layout for unstructured sparsity (compressed-tensors).

A weight W [rows, cols] called `layer.weight` is stored as

    layer.shape        int64 [2]                     rows, cols
    layer.compressed   W's dtype [nnz]               the nonzeros, row by row
    layer.bitmask      uint8 [rows, ceil(cols / 8)]  bit j of a row, lowest bit first: W[i, j] kept
    layer.row_offsets  int64 [rows]                  where each row begins in `compressed`

"Nonzero" is a matter of bits here: -0.0 is kept, as compressed-tensors reads any bitmask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .base import CheckpointError, Dense, Tensor, check_shape, quote

if TYPE_CHECKING:
    from .base import File

PARTS = ("shape", "compressed", "bitmask", "row_offsets")


def pack(w: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the four parts of w [rows, cols], any dtype of 1, 2, 4 or 8 bytes."""
    w = np.ascontiguousarray(w)
    kept = w.view(f"u{w.dtype.itemsize}") != 0
    counts = np.count_nonzero(kept, axis=1)
    return {
        "shape": np.array(w.shape, np.int64),
        "compressed": w[kept],
        "bitmask": np.packbits(kept, axis=1, bitorder="little"),
        "row_offsets": (np.cumsum(counts) - counts).astype(np.int64),
    }


def packed_bytes(shape: tuple[int, int], nnz: int, itemsize: int) -> int:
    rows, cols = shape
    return 16 + nnz * itemsize + rows * (-(-cols // 8)) + 8 * rows


@dataclass(frozen=True, slots=True)
class Bitmask:
    """One weight in its four parts; contents are checked when it is read."""

    shape: tuple[int, int]
    compressed: Dense
    bitmask: Dense
    row_offsets: Dense

    @property
    def dtype(self) -> np.dtype:
        return self.compressed.dtype

    @property
    def nnz(self) -> int:
        return self.compressed.shape[0]

    @property
    def stored_bytes(self) -> int:
        return packed_bytes(self.shape, self.nnz, self.dtype.itemsize)

    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bits [rows, ceil(cols / 8)], row offsets and values, checked against each other."""
        file, field = self.bitmask.file, self.bitmask.field
        rows, cols = self.shape
        mask, offsets = self.bitmask.read(), self.row_offsets.read()
        if cols % 8 and np.any(mask[:, -1] >> (cols % 8)):
            file.fail(field, f"has bits set past column {cols}; fetch the file again")
        # Eight bytes at a time where rows are made of eights.
        words = mask.view(np.uint64) if mask.shape[1] % 8 == 0 else mask
        counts = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
        ends = np.cumsum(counts)
        total = int(ends[-1]) if rows else 0
        if total != self.nnz:
            file.fail(
                field,
                f"has {total} bits set for {self.nnz} values in `compressed`; fetch the file again",
            )
        if not np.array_equal(offsets, ends - counts):
            file.fail(
                self.row_offsets.field,
                "differ from the bit counts of `bitmask`; fetch the file again",
            )
        return mask, ends - counts, self.compressed.read()

    def read(self) -> np.ndarray:
        """Returns dense [rows, cols]."""
        mask, starts, values = self.parts()
        file, field = self.bitmask.file, self.bitmask.field
        rows, cols = self.shape
        # Copy values as integers (NaN payloads stay), some rows at a time (the unpacked bits
        # take a byte each).
        word = np.dtype(f"u{self.dtype.itemsize}")
        values, bounds = values.view(word), [*starts, len(values)]
        try:
            out = np.zeros(self.shape, word)
        except MemoryError as e:
            file.fail(field, f"no memory for {rows} x {cols} weights ({e})")
        step = max(1, (1 << 20) // max(cols, 1))
        for a in range(0, rows, step):
            b = min(a + step, rows)
            kept = np.unpackbits(mask[a:b], axis=1, count=cols, bitorder="little").view(np.bool_)
            out[a:b][kept] = values[bounds[a] : bounds[b]]
        return out.view(self.dtype)


def group(tensors: dict[str, Dense]) -> dict[str, Tensor]:
    """Replaces the parts of each packed weight by one `Bitmask` under the weight's own name.

    The parts are found by `X.compressed`; they make `X.weight` (or X, when X ends in .weight).
    """
    out: dict[str, Tensor] = {}
    heads = {n.removesuffix(".compressed") for n in tensors if n.endswith(".compressed")}
    for stored, tensor in tensors.items():
        head, _, part = stored.rpartition(".")
        if head not in heads or part not in PARTS:
            name, value = stored, tensor
        elif part != "compressed":
            continue
        else:
            name = head if head.endswith(".weight") else f"{head}.weight"
            value = _join(tensor.file, head, tensors)
        if name in out:
            tensor.file.fail(f"tensor {quote(name)}", "is stored twice, dense and packed; keep one")
        out[name] = value
    return out


def _join(file: File, head: str, tensors: dict[str, Dense]) -> Bitmask:
    parts = []
    for part in PARTS:
        tensor = tensors.get(f"{head}.{part}")
        if tensor is None:
            file.fail(
                f"tensor {quote(f'{head}.{part}')}",
                "is missing from a packed weight; only "
                "the sparse-bitmask layout is read, convert the checkpoint to it",
            )
        parts.append(tensor)
    shape, compressed, bitmask, offsets = parts
    if shape.shape != (2,) or shape.dtype != np.int64:
        raise CheckpointError(shape.file.path, shape.field, "is not int64 [2]; fetch it again")
    # check_shape refuses the negative sizes that int64 can hold.
    (rows, cols), _ = check_shape(shape.file, shape.field, shape.read().tolist(), 1)
    wanted = [
        (compressed, None, (math.prod(compressed.shape),)),
        (bitmask, np.dtype(np.uint8), (rows, -(-cols // 8))),
        (offsets, np.dtype(np.int64), (rows,)),
    ]
    for tensor, dtype, expected in wanted:
        if tensor.shape != expected or (dtype is not None and tensor.dtype != dtype):
            tensor.file.fail(
                tensor.field,
                f"is {tensor.dtype} {list(tensor.shape)}, which does "
                f"not fit a weight of shape [{rows}, {cols}]; fetch the file again",
            )
    return Bitmask((rows, cols), compressed, bitmask, offsets)
