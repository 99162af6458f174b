"""Which scores of a comparison group go: the `drop` smallest, exactly.

    row       every output row [K] loses round(sparsity * K) weights
    uniform   every matrix [M, K] loses round(sparsity * M * K)
    global    several matrices are compared with one another (`global_threshold`)

Scores are compared as integers: the bits of a float without its sign are ordered as |s| is, for
every float type, subnormals included. Of equal scores the first in row order go first, so that
exactly as many go as were asked for, and the same ones everywhere.
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
Group = Literal["row", "uniform"]

# The bits of infinity, by the name of a float type; anything above is NaN.
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}


def keep_largest(scores: Array, sparsity: float, group: Group = "row") -> Array:
    """Returns bool [M, K], False for the round(sparsity * size) smallest |scores| of every group.

    scores: float16, bfloat16 or float32, NumPy or JAX (also under jit, sparsity being static).
    Raises ValueError for NaN (not under jit), other dtypes, other shapes, a sparsity outside 0..1.
    """
    check_sparsity(sparsity)
    if scores.ndim != 2:
        raise ValueError(f"prune: w has shape {scores.shape}; pass a matrix [M, K].")
    check_group(group)
    keys = _keys(scores)
    grouped = keys if group == "row" else keys.reshape(1, -1)
    return _keep(grouped, round(sparsity * grouped.shape[1])).reshape(scores.shape)


def keep_n_of_m(scores: Array, n: int, m: int) -> Array:
    """Returns bool [M, K], True for the n largest |scores| of every m consecutive ones of a row.

    Raises ValueError when m does not divide K, and as `keep_largest` for dtypes and NaN.
    """
    if not 0 <= n <= m or m < 1 or scores.ndim != 2 or scores.shape[1] % m:
        raise ValueError(f"n_m: {n}:{m} does not fit {scores.shape}; m must divide K and hold n.")
    return _keep(_keys(scores).reshape(-1, m), m - n).reshape(scores.shape)


def drop_smallest(scores: jax.Array, drop: Any) -> jax.Array:
    """bool [G, N], True for the `drop` smallest of each row. scores: >= 0; drop may be traced."""
    return ~_keep(_keys(scores), drop)


@dataclass(frozen=True)
class Threshold:
    """One threshold for several matrices.

    value: scores whose magnitude is below it go, those above it stay.
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
        return apply(w, self.mask(w, i))


def global_threshold(
    ws: Sequence[Array] | Callable[[], Iterable[Array]], sparsity: float
) -> Threshold:
    """Returns the threshold that zeroes round(sparsity * total size) weights of all matrices.

    ws: the matrices (or scores of them), float16, bfloat16 or float32, or a function that yields
    them anew. They are passed over twice, one at a time: first to find the upper 16 bits of the
    threshold, then, among the few that share those, the lower ones. Works on the host.
    Raises ValueError as `keep_largest` does.
    """
    check_sparsity(sparsity)

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


def apply(w: Array, keep: Array) -> Any:
    """w with zeros where `keep` is False; w * keep would leave -0.0 and NaN."""
    xp = np if isinstance(w, np.ndarray) else jnp
    return xp.where(keep, w, xp.zeros((), w.dtype))


def check_sparsity(sparsity: float) -> None:
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"prune: sparsity is {sparsity}; pass a fraction from 0 to 1.")


def check_group(group: str) -> None:
    if group not in ("row", "uniform"):
        raise ValueError(
            f"prune: group is {group!r}; pass 'row' or 'uniform' (the whole matrix), or compare "
            "several matrices with global_threshold."
        )


def _keys(w: Array) -> Any:
    """Unsigned integers that are ordered as |w| is: the bits without the sign."""
    name = str(w.dtype)
    if name not in _INFINITY:
        raise ValueError(f"prune: w is {name}; cast it to float16, bfloat16 or float32.")
    word = np.dtype(np.uint32 if name == "float32" else np.uint16)
    if isinstance(w, np.ndarray):
        bits = np.ascontiguousarray(w).view(word)
    else:
        bits = jax.lax.bitcast_convert_type(w, word)
    keys = bits & word.type(np.iinfo(word).max >> 1)
    if not isinstance(keys, Tracer) and keys.size and keys.max() > _INFINITY[name]:
        at = np.unravel_index(int(keys.argmax()), w.shape)
        raise ValueError(f"prune: w{[int(i) for i in at]} is NaN; repair the checkpoint first.")
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


def _keep(keys: Array, drop: Any) -> Any:
    """True for all but the `drop` smallest of each row, the first of equal ones going first."""
    if not isinstance(keys, np.ndarray):
        return _keep_jax(keys, drop)
    rows, n = keys.shape
    if drop == 0 or keys.size == 0:
        return np.ones(keys.shape, bool)
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


@jax.jit
def _keep_jax(keys: jax.Array, drop: Any) -> jax.Array:
    t = _kth_smallest(keys, drop)
    tied = keys == t
    spare = drop - jnp.sum(keys < t, axis=1, keepdims=True)
    return (keys > t) | (tied & (jnp.cumsum(tied, axis=1) > spare))


def _kth_smallest(keys: jax.Array, k: Any) -> jax.Array:
    """The k-th smallest key of each row [G, 1], 0 for k = 0; k may be traced.

    Bisection over the bits: the largest t that fewer than k keys lie below. XLA's sort takes ten
    times as long on a CPU, and would need k to be known when compiling.
    """
    bits = 8 * keys.dtype.itemsize - 1

    def settle(i, t):
        higher = t | (jnp.ones((), keys.dtype) << (bits - 1 - i).astype(keys.dtype))
        below = jnp.sum(keys < higher, axis=1, keepdims=True)
        return jnp.where(below < k, higher, t)

    return jax.lax.fori_loop(0, bits, settle, jnp.zeros((keys.shape[0], 1), keys.dtype))
