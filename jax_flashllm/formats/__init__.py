"""Encoded weights: `encode` and the two formats it writes."""

import dataclasses
import warnings
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashllm import _flashllm
from jax_flashllm.formats import on_gpu
from jax_flashllm.formats.bitmap import Bitmap
from jax_flashllm.formats.delta_csr import DeltaCSR, smaller_format
from jax_flashllm.formats.weight import (
    SparseWeight,
    check_dense,
    check_process,
    room,
    words,
)

__all__ = ["Bitmap", "DeltaCSR", "SparseWeight", "encode", "stack"]

Format = Literal["auto", "bitmap", "delta_csr"]
FORMATS = get_args(Format)
Shards = int | tuple[int, int]  # row blocks, or (row blocks, column blocks)


def encode(
    dense: np.ndarray | jax.Array,
    format: Format = "auto",
    shards: Shards = 1,
) -> Bitmap | DeltaCSR:
    """Encodes a dense matrix, bit for bit, storing every weight whose bits are not all zero.

    dense: [M, K] = [out_features, in_features], float16 or bfloat16, NumPy or JAX. What lies on
        one CUDA device is encoded there, and the result stays there. All else is encoded on the
        host, and the result lies on JAX's default device. Both make the same bits.
    format: "auto" takes the one that is smaller for this density and K where the nonzeros are
        spread evenly: Delta-CSR for a large K and up to about 1/9 of the weights.
    shards: row blocks, so that the result can lie on as many devices; or a pair (row blocks,
        column blocks). `jax_flashllm.shard` lays out and places in one go.

    -0.0 is stored, as its bits are not all zero. `w * mask` makes many: where more than one weight
    in a hundred is -0.0, a UserWarning says so. `jnp.where(mask, w, 0)` and `w + 0` make none.

    Returns a `Bitmap` or a `DeltaCSR`. Raises TypeError for other dtypes and under tracing,
    ValueError for other ranks, empty matrices, or `shards` out of range, and JAX's own
    JaxRuntimeError, RESOURCE_EXHAUSTED, where the device has no room.
    """
    check_process("encode")
    _check_format(format)
    advice = "drop arrays that nobody needs any more, or encode for several devices with `shard`"
    with room("encode", f"W {getattr(dense, 'shape', '')} encoded", advice):
        if on_gpu.lies_on_gpu(dense):
            grid = check_dense(dense, shards)
            step = _sample_step(dense)
            w, negative_zeros = on_gpu.encode(dense, format, grid, step)
        else:
            # jnp.asarray would compile a program for every new shape; device_put compiles none.
            w = jax.device_put(encode_on_host(dense, format, shards))
            step = _sample_step(dense)
            negative_zeros = np.count_nonzero(words(dense)[::step] == 0x8000)
        jax.block_until_ready(w)
    share = negative_zeros / (-(-dense.shape[0] // step) * dense.shape[1])
    if share > 0.01:
        warnings.warn(
            f"encode: {share:.0%} of the weights are -0.0, which is stored like a "
            "nonzero; if they were pruned by w * mask, prune with jnp.where(mask, w, 0), or "
            "encode w + 0",
            stacklevel=2,
        )
    return w


def _sample_step(dense) -> int:
    """Every how many rows to look for -0.0: four million weights tell as well as all."""
    return max(1, dense.shape[0] * dense.shape[1] >> 22)


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"encode: format must be auto, bitmap or delta_csr, got {format!r}")


def encode_on_host(
    dense: np.ndarray | jax.Array, format: Format = "auto", shards: Shards = 1
) -> Bitmap | DeltaCSR:
    """`encode` to NumPy buffers: calls no JAX, so callbacks may use it."""
    _check_format(format)
    rows, columns = check_dense(dense, shards)
    host = np.ascontiguousarray(dense)
    bits = words(host)
    if format == "auto":
        format = smaller_format(np.count_nonzero(bits) / bits.size, -(-bits.shape[1] // columns))
    encoder, cls = {
        "bitmap": (_flashllm.encode_bitmap, Bitmap),
        "delta_csr": (_flashllm.encode_delta_csr, DeltaCSR),
    }[format]

    def encoded(block, rows):
        index, offsets, values = encoder(block, rows)
        return cls(offsets, values.view(host.dtype), block.shape, index, grid=(rows, 1))

    if columns == 1:
        return encoded(bits, rows)
    m, k = host.shape
    width = -(-k // columns)
    padded = np.pad(bits, ((0, 0), (0, columns * width - k)))
    blocks = [
        encoded(np.ascontiguousarray(padded[:, c * width : (c + 1) * width]), rows)
        for c in range(columns)
    ]
    return join(blocks, (m, k), (rows, columns))


def bitmap_of_packed(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], columns: int
) -> Bitmap:
    """The bitmap of packed matrices one below the other, NumPy buffers; none is ever dense.

    parts: of each matrix its bits, uint8 [M, ceil(K / 8)], lowest first, where each row starts in
    the values, int64 [M], and the values of the set bits, row by row, 16-bit.
    Values of -0.0 are zeros. Raises ValueError where bits, starts and values disagree.
    """
    bits, starts, values = parts[0]
    if len(parts) > 1:
        before = np.cumsum([0, *(len(values) for _, _, values in parts[:-1])])
        bits, values = (np.concatenate([part[i] for part in parts]) for i in (0, 2))
        starts = np.concatenate([part[1] + n for part, n in zip(parts, before, strict=True)])
    masks, offsets, stored = _flashllm.bitmap_of_packed(bits, starts, words(values), columns)
    buffers: dict[str, Any] = {
        "masks": masks, "offsets": offsets, "values": stored.view(values.dtype)
    }  # fmt: skip
    return Bitmap(shape=(len(bits), columns), grid=(1, 1), **buffers)


def join(blocks: list[SparseWeight], shape: tuple[int, int], grid: tuple[int, int]) -> Any:
    """The weight of blocks in the order of their shards, NumPy buffers."""
    values = max(w.values.shape[-1] for w in blocks)
    index = max(w.buffers[0].shape[-1] for w in blocks)
    same = [pad(w, values, index) for w in blocks]
    kind = type(blocks[0])
    buffers: dict[str, Any] = {
        f: np.concatenate([getattr(w, f) for w in same]) for f in kind._buffers()
    }
    return kind(shape=shape, grid=grid, **buffers)


def pad(w: SparseWeight, values: int, index: int) -> SparseWeight:
    """The same NumPy or JAX weight with room for so many values and, in Delta-CSR, index words."""

    def longer(leaf, size):
        xp = np if isinstance(leaf, np.ndarray) else jnp
        return xp.pad(leaf, ((0, 0), (0, size - leaf.shape[-1])))

    if isinstance(w, DeltaCSR):
        w = dataclasses.replace(w, index=longer(w.index, index))
    return dataclasses.replace(w, values=longer(w.values, values))


def stack(weights: list[SparseWeight]) -> SparseWeight:
    """Stacks equal-shaped weights along a new leading axis, for `lax.scan` and `vmap`.

    Capacities differ from weight to weight, so shorter value buffers are padded. Raises
    TypeError for other than encoded weights, ValueError when formats, shapes, dtypes or shards
    differ.
    """
    if not weights:
        raise ValueError("stack: needs at least one weight")
    for w in weights:
        if not isinstance(w, SparseWeight):
            raise TypeError(f"stack: expected weights from encode, got {type(w).__name__}")
    kinds = {(type(w), w.shape, w.dtype, w.row_shards, w.column_shards) for w in weights}
    if len(kinds) > 1:
        raise ValueError(
            f"stack: weights differ in format, shape, dtype or shards: {weights}; encode them "
            "with one explicit format and one number of shards"
        )
    values = max(w.values.shape[-1] for w in weights)
    index = max(w.buffers[0].shape[-1] for w in weights)
    padded = [pad(w, values, index) for w in weights]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)
