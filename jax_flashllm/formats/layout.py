"""Laying encoded weights out over the devices of a mesh."""

import functools
import itertools
import math

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashllm.formats import encode_on_host, join, stack
from jax_flashllm.formats.weight import SparseWeight

Axes = str | tuple[str, ...] | None


def shard(w: SparseWeight, mesh: Mesh, rows: Axes = None, columns: Axes = None) -> SparseWeight:
    """Places W's row blocks over mesh axes `rows` and its column blocks over `columns`.

    With `rows` the result of `spmm` is split over its features, without a collective; with
    `columns` x is split over its features, and the products are summed. Axes named in neither
    hold copies. Each device gets its own blocks; a weight encoded with another number of shards
    is laid out again on the host, one block at a time. `w.padding` says what share of the bytes
    the longest block costs the others.

    rows, columns: a mesh axis, several, or None.
    Raises ValueError for axes that are not there or not free, for sizes that do not divide [M, K],
    and where blocks would have to come from another process.
    """
    if not isinstance(w, SparseWeight):
        raise TypeError(
            f"shard: w must be an encoded weight, got {type(w).__name__}; make one with "
            "jax_flashllm.encode"
        )
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"shard: mesh must be a jax.sharding.Mesh of devices, got {type(mesh).__name__}; make "
            "one with jax.make_mesh"
        )
    axes = _names(mesh, rows), _names(mesh, columns)
    if shared := set(axes[0]) & set(axes[1]):
        raise ValueError(f"shard: mesh axis {min(shared)!r} splits rows and columns; name it once")
    R, C = (math.prod(mesh.shape[a] for a in names) for names in axes)
    grid = R, C
    for name, size, parts, names in zip("MK", w.shape, grid, axes, strict=True):
        if size % parts:
            raise ValueError(
                f"shard: W is {list(w.shape)} and mesh axes {list(names)} cut {name} = {size} into "
                f"{parts}, which does not divide it; use {math.gcd(size, parts)} devices there, or "
                f"pad W to {name} = {-(-size // parts) * parts}"
            )
    same_columns = w.column_shards == C or (R == 1 and w.column_shards % C == 0)
    if w.row_shards % R or not same_columns:
        w = relayout(w, grid)
    lead = (None,) * (w.values.ndim - 2)
    return place(w, NamedSharding(mesh, P(*lead, (*axes[1], *axes[0]) or None)))


def place(w: SparseWeight, sharding: NamedSharding) -> SparseWeight:
    """Buffers on their devices; of NumPy ones each process copies its own part only."""

    def put(b):
        if isinstance(b, np.ndarray):
            # Copied, since a CPU device may keep a view, and with it all of b.
            return jax.make_array_from_callback(b.shape, sharding, lambda at: b[at].copy())
        return jax.device_put(b, sharding)

    return jax.tree.map(put, w)


def relayout(w: SparseWeight, grid: tuple[int, int]) -> SparseWeight:
    """The same weight as (R, C) other blocks, in NumPy; one block at a time is dense."""
    if any(isinstance(b, Tracer) for b in jax.tree.leaves(w)):
        raise ValueError(
            f"shard: {w.row_shards} x {w.column_shards} blocks (rows x columns) cannot be laid out "
            f"again as {grid[0]} x {grid[1]} under jit; call shard before it, or encode with "
            f"shards={grid}"
        )
    if not all(b.is_fully_addressable for b in jax.tree.leaves(w) if isinstance(b, jax.Array)):
        raise ValueError(
            f"shard: {w!r} lies on other processes' devices too, and cannot be laid out again as "
            f"{grid} blocks; encode or load it with as many"
        )
    if w.values.ndim > 2:
        return stack([relayout(each, grid) for each in w._unstacked()])
    w = jax.tree.map(np.asarray, w)
    M, K = w.shape
    rows, columns = (-(-size // parts) for size, parts in zip(w.shape, grid, strict=True))
    block = functools.lru_cache(maxsize=1)(w.block)
    new = []
    for c, r in itertools.product(range(grid[1]), range(grid[0])):
        dense = np.zeros((rows, columns), w.dtype)
        inside = dense[: max(M - r * rows, 0), : max(K - c * columns, 0)]
        for top, here in _overlaps(r * rows, inside.shape[0], w.shard_rows):
            for left, there in _overlaps(c * columns, inside.shape[1], w.shard_columns):
                part = block(top.start // w.shard_rows, left.start // w.shard_columns)
                inside[here, there] = part[
                    top.start % w.shard_rows :, left.start % w.shard_columns :
                ][: top.stop - top.start, : left.stop - left.start]
        new.append(encode_on_host(dense, w.format))
    return join(new, w.shape, grid)


def _overlaps(start: int, size: int, step: int):
    """What of start .. start + size lies in each block of `step`: where, and where from start."""
    at = start
    while at < start + size:
        end = min((at // step + 1) * step, start + size)
        yield slice(at, end), slice(at - start, end - start)
        at = end


def _names(mesh: Mesh, axes: Axes) -> tuple[str, ...]:
    names = () if axes is None else tuple(axes) if isinstance(axes, tuple | list | P) else (axes,)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"shard: {list(names)} names mesh axis {name!r} twice; name it once")
        if name not in mesh.axis_names:
            raise ValueError(
                f"shard: mesh axis {name!r} does not exist; the mesh has {list(mesh.axis_names)}"
            )
    return names
