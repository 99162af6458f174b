"""Encoding where the dense matrix lies: two programs, since its nonzeros decide the result's size.

    count   dense                  -> a bitmap's masks and offsets, or Tiled-CSL's offsets
            the host reads where the offsets end
    fill    dense, offsets, masks  -> values, and Tiled-CSL's index

Neither needs memory besides its results. csrc/cuda/encode.cu has the kernels; their targets are
registered by kernel.py, with all others.
"""

from functools import partial
from typing import Any, TypeGuard

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_flashllm import _flashllm
from jax_flashllm.formats import bitmap, tiled_csl
from jax_flashllm.formats.bitmap import Bitmap
from jax_flashllm.formats.tiled_csl import TiledCSL
from jax_flashllm.formats.weight import VECTOR

_MOST_NONZEROS = 1 << 35  # of a shard: offsets count vectors in 32 bits


def lies_on_gpu(dense: Any) -> TypeGuard[jax.Array]:
    """Whether `dense` lies on one CUDA device, and this build can encode there.

    Under `jax.set_mesh` jit would want it on all of the mesh.
    """
    return (
        hasattr(_flashllm, "cuda_targets")
        and isinstance(dense, jax.Array)
        and not isinstance(dense, jax.core.Tracer)
        and jax.sharding.get_abstract_mesh().empty
        and len(dense.devices()) == 1
        and next(iter(dense.devices())).platform == "gpu"
    )


@partial(jax.jit, static_argnames="step")
def count_zeros(dense: jax.Array, step: int) -> tuple[jax.Array, jax.Array]:
    """Per row of [M, K] the nonzeros, and how many -0.0 every `step`th row has in all."""
    bits = lax.bitcast_convert_type(dense, jnp.uint16)
    nonzeros = jnp.count_nonzero(bits, axis=1).astype(jnp.uint32)
    return nonzeros, jnp.count_nonzero(bits[::step] == 0x8000)


def encode(dense: jax.Array, format: str, grid: tuple[int, int]) -> Bitmap | TiledCSL:
    """The same buffers as the host's encoders make, on the device of `dense`."""
    M, K = dense.shape
    rows, columns = grid
    if -(-M // rows) * -(-K // columns) > _MOST_NONZEROS:
        raise ValueError(
            f"encode: a shard of [{M}, {K}] in {grid} blocks may hold more than 2^35 nonzeros; "
            "raise `shards`"
        )
    if format == "bitmap":
        masks, offsets = count_bitmap(dense, grid=grid)
        ends = np.asarray(offsets[:, -1]).astype(np.int64)
        capacity = max(VECTOR, VECTOR * int(ends.max()))
        values = fill_bitmap(masks, offsets, dense, grid=grid, capacity=capacity)
        return Bitmap(offsets, values, (M, K), masks, grid=grid)
    offsets = count_tiled_csl(dense, grid=grid)
    ends = np.asarray(offsets[:, -1]).astype(np.int64)
    # Never empty, as on the host.
    capacity = max(VECTOR, int((ends @ [tiled_csl.CHUNK, VECTOR]).max()))
    index_capacity = max(VECTOR // 2, int((ends @ [tiled_csl.CHUNK // 8, VECTOR // 2]).max()))
    index, values = fill_tiled_csl(
        offsets, dense, grid=grid, capacity=capacity, index_capacity=index_capacity
    )
    return TiledCSL(offsets, values, (M, K), index, grid=grid)


def _call(target: str, out: Any, *operands: jax.Array, grid: tuple[int, int]) -> Any:
    attributes = {"row_blocks": np.int64(grid[0]), "column_blocks": np.int64(grid[1])}
    return jax.ffi.ffi_call(f"flashllm_{target}_v1", out)(*operands, **attributes)


def _words(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.uint32)


def _shard(dense: jax.Array, grid: tuple[int, int]) -> tuple[int, int, int]:
    """Shards, and their rows and columns."""
    (M, K), (R, C) = dense.shape, grid
    return R * C, -(-M // R), -(-K // C)


@partial(jax.jit, static_argnames="grid")
def count_bitmap(dense, *, grid):
    S, rows, cols = _shard(dense, grid)
    bands, tiles, blocks = bitmap.grid_of(rows, cols)
    out = _words(S, bands, tiles, 32), _words(S, bands * blocks + 1)
    return _call("count_bitmap", out, dense, grid=grid)


@partial(jax.jit, static_argnames=("grid", "capacity"))
def fill_bitmap(masks, offsets, dense, *, grid, capacity):
    out = jax.ShapeDtypeStruct((_shard(dense, grid)[0], capacity), dense.dtype)
    return _call("fill_bitmap", out, masks, offsets, dense, grid=grid)


@partial(jax.jit, static_argnames="grid")
def count_tiled_csl(dense, *, grid):
    S, rows, cols = _shard(dense, grid)
    bands, blocks = tiled_csl.grid_of(rows, cols)
    return _call("count_tiled_csl", _words(S, bands * blocks + 1, 2), dense, grid=grid)


@partial(jax.jit, static_argnames=("grid", "capacity", "index_capacity"))
def fill_tiled_csl(offsets, dense, *, grid, capacity, index_capacity):
    S, *_ = _shard(dense, grid)
    out = _words(S, index_capacity), jax.ShapeDtypeStruct((S, capacity), dense.dtype)
    return _call("fill_tiled_csl", out, offsets, dense, grid=grid)
