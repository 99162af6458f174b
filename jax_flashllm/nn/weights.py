"""Between Flax's dense kernels [K, M] and encoded weights [M, K]."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jax_flashllm.formats import (
    Bitmap,
    DeltaCSR,
    Format,
    Shards,
    SparseWeight,
    encode,
    encode_on_host,
    pad,
    smaller_format,
    stack,
)
from jax_flashllm.formats.delta_csr import BASE_WORDS
from jax_flashllm.formats.on_gpu import allocated
from jax_flashllm.formats.weight import HALF_DTYPES, VECTOR, check_dense

Mask = np.ndarray | jax.Array


def encode_kernel(
    kernel: jax.Array | np.ndarray,
    sparsity: float | None = None,
    mask: Mask | None = None,
    dtype: Any = None,
    format: Format = "auto",
    shards: Shards = 1,
) -> SparseWeight:
    """Prunes, casts and encodes a kernel [K, M], or a stack of them [L, K, M].

    sparsity: zeroes the round(sparsity * K) smallest weights of every output, by magnitude in
    the kernel's own dtype.   mask: bool of the kernel's shape, False becomes zero.
    dtype: to cast to after pruning; float16 or bfloat16.
    Zeros of either sign are not stored: a mask multiplied in leaves -0.0 behind.
    Raises ValueError for a sparsity outside 0..1, both or misshapen masks, other ranks.
    """
    if sparsity is not None and mask is not None:
        raise ValueError("SparseDense: got both sparsity and mask; pass one of them")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"SparseDense: sparsity must be from 0 to 1, got {sparsity}")
    if kernel.ndim not in (2, 3):
        raise ValueError(f"SparseDense: kernel is {list(kernel.shape)}, expected [K, M]")
    if mask is not None and (mask.shape != kernel.shape or mask.dtype != bool):
        raise ValueError(
            f"SparseDense: mask is {mask.dtype}{list(mask.shape)}, expected "
            f"bool{list(kernel.shape)}, the kernel's shape"
        )
    if isinstance(kernel, jax.core.Tracer):
        encode(kernel.T)  # raises, and says why
    w = np.asarray(kernel).swapaxes(-1, -2)  # [..., M, K]
    if mask is not None:
        w = np.where(np.asarray(mask).swapaxes(-1, -2), w, w.dtype.type(0))
    if sparsity is not None:
        w = _keep_largest(w, sparsity)
    w = w.astype(dtype or w.dtype)
    w = np.where(w == 0, w.dtype.type(0), w)
    if w.ndim == 2:
        return encode(w, format, shards)
    if format == "auto":  # a stack has one format: the one that suits the whole
        _, blocks = check_dense(w[0], shards)
        format = smaller_format(np.count_nonzero(w) / w.size, -(-w.shape[-1] // blocks))
    return stack([encode(layer, format, shards) for layer in w])


def initial_weight(
    kernel: jax.Array | np.ndarray, sparsity: float, dtype: Any, format: Format, shards: Shards
) -> SparseWeight:
    """Prunes, casts and encodes a freshly drawn kernel [K, M], under jit and vmap too.

    The buffers' sizes follow from the arguments alone, for any kernel: layers can be made in a
    traced function, and two layers of equal arguments have equal shapes.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"SparseDense: sparsity must be from 0 to 1, got {sparsity}")
    K, M = kernel.shape
    kept = K - round(sparsity * K)
    zeros = np.zeros((M, K), dtype)
    if format == "auto":
        _, blocks = check_dense(zeros, shards)
        format = smaller_format(kept / K, -(-K // blocks))
    # An encoded zero matrix has the right sizes but for the values and Delta-CSR's index.
    empty = encode_on_host(zeros, format, shards)
    if isinstance(empty, DeltaCSR):
        values, index = empty.most(kept)
    else:  # each of its blocks may end in a part of a vector
        vectors = -(-empty.shard_rows * kept // VECTOR) + empty.offsets.shape[1] - 1
        values, index = vectors * VECTOR, 0
    room = allocated(values, empty.unit), allocated(index, BASE_WORDS)
    empty = pad(empty, *room)

    def on_host(kernel):
        w = _keep_largest(np.asarray(kernel).T, sparsity).astype(dtype)
        w = np.where(w == 0, w.dtype.type(0), w)
        return pad(encode_on_host(w, format, shards), *room)

    if not isinstance(kernel, jax.core.Tracer):
        return jax.device_put(on_host(kernel))
    shapes = jax.tree.map(lambda b: jax.ShapeDtypeStruct(b.shape, b.dtype), empty)
    return jax.pure_callback(on_host, shapes, kernel, vmap_method="sequential")


def _keep_largest(w: np.ndarray, sparsity: float) -> np.ndarray:
    """w [..., K] with round(sparsity * K) of each row zero; of equals the first go."""
    drop = round(sparsity * w.shape[-1])
    if drop == 0:
        return w
    # Without their sign, the bits of floats are ordered as |w| is, in every dtype.
    bits = np.ascontiguousarray(w).view(f"u{w.dtype.itemsize}")
    keys = bits & (np.iinfo(bits.dtype).max >> 1)
    threshold = np.partition(keys, drop - 1, axis=-1)[..., drop - 1 : drop]
    gone, ties = keys < threshold, keys == threshold
    spare = drop - gone.sum(-1, keepdims=True)
    gone |= ties & (np.cumsum(ties, axis=-1, dtype=np.int32) <= spare)
    return np.where(gone, w.dtype.type(0), w)


def check_param_dtype(dtype: Any, where: str) -> None:
    if np.dtype(dtype) not in HALF_DTYPES:
        raise TypeError(
            f"{where}: param_dtype is {np.dtype(dtype)}, but encoded weights are float16 or "
            "bfloat16; pass one of those (dtype=jnp.float32 still computes in float32)"
        )


def block_axes(names: Any) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[str, ...]]:
    """Mesh axes that annotate a kernel [..., K, M], for what it is encoded to.

    Returns the entries for the buffers' leading axes and shards, and the axes over M and over K.
    """
    names = (*names, *(None,) * (2 - len(names)))
    lead, kernel = names[:-2], names[-2:]
    columns, rows = (() if n is None else n if isinstance(n, tuple) else (n,) for n in kernel)
    over = (*columns, *rows)
    return (*lead, over[0] if len(over) == 1 else over or None), rows, columns


def grid_for(
    shards: Shards | None, rows: tuple[str, ...], columns: tuple[str, ...], sizes: Mapping[str, int]
) -> tuple[int, int]:
    """(R, C): `shards`, or one block a device of a mesh of these sizes.

    Raises ValueError where the mesh does not divide `shards`.
    """
    parts = tuple(math.prod(sizes.get(a, 1) for a in axes) for axes in (rows, columns))
    if shards is None:
        return parts[0], parts[1]
    R, C = shards if isinstance(shards, tuple) else (shards, 1)
    if R % parts[0] or C % parts[1]:
        raise ValueError(
            f"SparseDense: shards={shards!r}, {R} row and {C} column blocks, over mesh axes "
            f"{[*rows]} of {parts[0]} and {[*columns]} of {parts[1]} devices; pass shards={parts} "
            "or leave it out"
        )
    return R, C


def rebuild(
    values: Any,
    index: Any,
    offsets: Any,
    shape: tuple[int, int],
    grid: tuple[int, int] | None = None,
) -> SparseWeight:
    """The encoded weight of three buffers; the index's axes tell the format.

    grid: (R, C) blocks; None stands for as many rows as there are shards.
    """
    if np.dtype(index.dtype) != np.uint32:
        raise ValueError(
            f"SparseDense: kernel_index is {index.dtype}, expected uint32 (the masks of a Bitmap, "
            "or the index of a DeltaCSR)"
        )
    cls = DeltaCSR if index.ndim == values.ndim else Bitmap
    return cls(offsets, values, shape, index, grid=grid or (values.shape[-2], 1))


def promoted(x: Any, values: Any, bias: Any, dtype: Any):
    """x and bias in the dtype that Flax computes in: `dtype`, or what all three promote to."""
    x = jnp.asarray(x)
    if dtype is None:
        dtype = jnp.result_type(x, values.dtype, *([] if bias is None else [bias]))
    return x.astype(dtype), None if bias is None else bias.astype(dtype)
