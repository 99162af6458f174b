"""Magnitude pruning: the weights nearest to zero go.

    keep W_ij  iff  |W_ij| > t                      (Han et al., NeurIPS 2015, section 3)

with t the k-th smallest magnitude of a comparison group, k = round(sparsity * group size). A
group is one output row, or the whole matrix, or several matrices (`global_threshold`). Wanda
(Sun et al., ICLR 2024, section 3) found that groups of rows do better in language models.

Magnitudes are compared as integers: the bits of a float without its sign are ordered as |w| is,
for every float type, subnormals included. Of equal magnitudes the first in row order go first,
so that exactly k weights go, and the same ones everywhere.

https://arxiv.org/abs/1506.02626   https://arxiv.org/abs/2306.11695
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array = np.ndarray | jax.Array
Group = Literal["row", "global"]

# The bits of infinity, by the bytes of a float type; anything above is NaN.
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}


def magnitude(w: Array, sparsity: float, group: Group = "row") -> Array:
    """Returns w [M, K] with round(sparsity * size) weights of every group set to zero.

    w: float16, bfloat16 or float32, NumPy or JAX (also under jit, sparsity being static).
    group: "row" compares within each row of K, "global" within the whole matrix.
    Raises ValueError for NaN (not under jit), other dtypes, other shapes, a sparsity outside 0..1.
    """
    return _apply(w, magnitude_mask(w, sparsity, group))


def magnitude_mask(w: Array, sparsity: float, group: Group = "row") -> Array:
    """Returns bool [M, K], True where `magnitude` keeps the weight."""
    _check_sparsity(sparsity)
    if w.ndim != 2:
        raise ValueError(f"magnitude: w has shape {w.shape}; pass a matrix [M, K].")
    if group not in ("row", "global"):
        raise ValueError(f"magnitude: group is {group!r}; pass 'row' or 'global'.")
    keys = _keys(w)
    grouped = keys if group == "row" else keys.reshape(1, -1)
    return _keep(grouped, round(sparsity * grouped.shape[1])).reshape(w.shape)


def n_m(w: Array, n: int, m: int) -> Array:
    """Returns w [M, K] with the n largest of every m consecutive weights of a row kept.

    2:4 is the pattern of NVIDIA's sparse tensor cores. Raises ValueError when m does not divide K.
    """
    if not 0 <= n <= m or m < 1 or w.ndim != 2 or w.shape[1] % m:
        raise ValueError(f"n_m: {n}:{m} does not fit w {w.shape}; m must divide K and hold n.")
    return _apply(w, _keep(_keys(w).reshape(-1, m), m - n).reshape(w.shape))


@dataclass(frozen=True)
class Threshold:
    """One threshold for several matrices.

    value: magnitudes below it go, those above it stay.
    ties: for each matrix, how many of the magnitudes equal to `value` go (the first ones).
    """

    value: float
    ties: tuple[int, ...]

    def mask(self, w: np.ndarray, i: int) -> np.ndarray:
        """Returns bool, True where matrix i keeps the weight. w: matrix i as it was counted."""
        keys = _wide_keys(w).reshape(-1)
        t = np.float32(self.value).view(np.uint32)
        keep = keys > t
        keep[np.flatnonzero(keys == t)[self.ties[i] :]] = True
        return keep.reshape(w.shape)

    def prune(self, w: np.ndarray, i: int) -> np.ndarray:
        """Returns matrix i with its weights under the threshold set to zero."""
        return _apply(w, self.mask(w, i))


def global_threshold(
    ws: Sequence[Array] | Callable[[], Iterable[Array]], sparsity: float
) -> Threshold:
    """Returns the threshold that zeroes round(sparsity * total size) weights of all matrices.

    ws: the matrices, float16, bfloat16 or float32, or a function that yields them anew. They are
    passed over twice, one at a time: first to find the upper 16 bits of the threshold, then, among
    the few weights that share those, the lower ones. Works on the host.
    Raises ValueError as `magnitude` does.
    """
    _check_sparsity(sparsity)

    def each() -> Iterable[np.ndarray]:
        return (_wide_keys(np.asarray(w)).reshape(-1) for w in (ws() if callable(ws) else ws))

    upper = np.zeros(1 << 16, np.int64)
    for keys in each():
        upper += np.bincount(keys >> 15, minlength=1 << 16)
    drop = round(sparsity * int(upper.sum()))
    ends = np.cumsum(upper)
    bucket = int(np.searchsorted(ends, max(drop, 1)))
    drop -= int(ends[bucket] - upper[bucket])  # to go within the bucket

    lower = np.zeros(1 << 15, np.int64)
    counted = []  # per matrix: the lower bits that occur in the bucket, and how often
    for keys in each():
        low, count = np.unique(keys[keys >> 15 == bucket] & 0x7FFF, return_counts=True)
        lower[low] += count
        counted.append((low, count))
    ends = np.cumsum(lower)
    t = int(np.searchsorted(ends, max(drop, 1)))
    left = drop - int(ends[t] - lower[t])
    ties = []
    for low, count in counted:
        here = min(left, int(count[low == t].sum()))
        ties.append(here)
        left -= here
    return Threshold(float(np.uint32(bucket << 15 | t).view(np.float32)), tuple(ties))


def _check_sparsity(sparsity: float) -> None:
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"magnitude: sparsity is {sparsity}; pass a fraction from 0 to 1.")


def _keys(w: Array) -> Any:
    """Unsigned integers that are ordered as |w| is: the bits without the sign."""
    name = str(w.dtype)
    if name not in _INFINITY:
        raise ValueError(f"magnitude: w is {name}; cast it to float16, bfloat16 or float32.")
    word = np.dtype(np.uint32 if name == "float32" else np.uint16)
    if isinstance(w, np.ndarray):
        bits = np.ascontiguousarray(w).view(word)
    else:
        bits = jax.lax.bitcast_convert_type(w, word)
    keys = bits & word.type(np.iinfo(word).max >> 1)
    if not isinstance(keys, Tracer) and keys.size and keys.max() > _INFINITY[name]:
        at = np.unravel_index(int(keys.argmax()), w.shape)
        raise ValueError(f"magnitude: w{[int(i) for i in at]} is NaN; repair the checkpoint first.")
    return keys


def _wide_keys(w: np.ndarray) -> np.ndarray:
    """Keys of float32, whatever the dtype, so that matrices of several dtypes compare."""
    keys = _keys(w)
    if keys.dtype == np.uint32:
        return keys
    # A table is twice as fast as NumPy's conversion of 16-bit floats.
    return (
        np.arange(1 << 15, dtype=np.uint16).view(w.dtype).astype(np.float32).view(np.uint32)[keys]
    )


def _keep(keys: Array, drop: int) -> Array:
    """True for all but the `drop` smallest of each row, the first of equal ones going first."""
    rows, n = keys.shape
    xp = np if isinstance(keys, np.ndarray) else jnp
    if drop == 0 or keys.size == 0:
        return xp.ones(keys.shape, bool)
    if xp is jnp:
        t = jnp.sort(keys, axis=1)[:, drop - 1 : drop]
        tied = keys == t
        spare = drop - jnp.sum(keys < t, axis=1, keepdims=True)
        return (keys > t) | (tied & (jnp.cumsum(tied, axis=1) > spare))
    t = np.partition(keys, drop - 1, axis=1)[:, drop - 1 : drop]
    keep = keys > t
    # Ties are few: rank them within their rows, and keep those beyond the row's share.
    row, column = np.nonzero(keys == t)
    count = np.bincount(row, minlength=rows)
    rank = np.arange(row.size) - (np.cumsum(count) - count)[row]
    # n - kept - ties are smaller than t, the remainder of `drop` comes from the ties.
    spare = drop - (n - np.count_nonzero(keep, axis=1) - count)
    stays = rank >= spare[row]
    keep[row[stays], column[stays]] = True
    return keep


def _apply(w: Array, keep: Array) -> Any:
    xp = np if isinstance(w, np.ndarray) else jnp
    return xp.where(keep, w, xp.zeros((), w.dtype))
