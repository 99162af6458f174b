"""Encoding where the dense matrix lies: two programs, since its nonzeros decide the result's size.

    count   dense                  -> a bitmap's masks and offsets, or Delta-CSR's offsets
            the host reads the last offsets, and what else is counted, as one array that the
            program itself puts into pinned host memory: to copy it later takes 0.3 ms, longer
            than all else for small matrices
    fill    dense, offsets, masks  -> values, and Delta-CSR's index

Neither needs memory besides its results. csrc/cuda/encode.cu has the kernels; their targets are
registered by kernel.py, with all others.
"""

from functools import lru_cache, partial
from typing import Any, Literal, TypeGuard

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_flashllm import _flashllm
from jax_flashllm.formats import bitmap, delta_csr
from jax_flashllm.formats.bitmap import Bitmap
from jax_flashllm.formats.delta_csr import BASE_WORDS, GROUP, DeltaCSR, smaller_format
from jax_flashllm.formats.weight import VECTOR, check_free

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


def encode(
    dense: jax.Array,
    format: Literal["auto", "bitmap", "delta_csr"],
    grid: tuple[int, int],
    step: int,
) -> tuple[Bitmap | DeltaCSR, int]:
    """The buffers that the host's encoders make, on the device of `dense`.

    And how many -0.0 every `step`th row has in all.
    """
    (M, K), (S, rows, cols) = dense.shape, _shard(dense.shape, grid)
    if rows * cols > _MOST_NONZEROS:
        raise ValueError(
            f"encode: a shard of [{M}, {K}] in {grid} blocks may hold more than 2^35 nonzeros; "
            "raise `shards`"
        )
    (device,) = dense.devices()
    auto = format == "auto"
    if format == "auto":
        format = "bitmap"

    def counted(**how):
        check_free(_known(dense.shape, format, grid), device)
        return count(dense, format=format, grid=grid, step=step, **how)

    known, told = counted(nonzeros=auto)
    read = np.asarray(told)
    if auto and smaller_format(read[S:-1].sum(dtype=np.int64) / dense.size, cols) == "delta_csr":
        format = "delta_csr"
        known, told = counted()
        read = np.asarray(told)
    if format == "bitmap":
        sizes = {
            "capacity": allocated(VECTOR * max(read[:S].tolist()), VECTOR),
            "index_capacity": 0,
        }
    else:
        ends = read[: 2 * S].reshape(S, 2).tolist()
        values = GROUP * max(groups for groups, _ in ends)
        bases = BASE_WORDS * delta_csr.grid_of(cols)[0] * rows
        index = bases + GROUP // 32 * max(groups * bits for groups, bits in ends)
        sizes = {
            "capacity": allocated(values, GROUP),
            "index_capacity": allocated(index, BASE_WORDS),
        }
    check_free(_new(dense.shape, dense.dtype, format, grid, **sizes), device)
    *index_of, stored = fill(known, dense, format=format, grid=grid, **sizes)
    *masks, offsets = known
    cls = Bitmap if format == "bitmap" else DeltaCSR
    return cls(offsets, stored, (M, K), *masks, *index_of, grid=grid), int(read[-1])


def allocated(needed: int, unit: int) -> int:
    """Elements to allocate, as csrc/cpu/encode.cc has it: a program for each size is compiled."""
    step = unit
    while needed >= 512 * step:
        step *= 2
    return max(unit, -(-needed // step) * step)


@partial(jax.jit, static_argnames=("format", "grid", "step", "nonzeros"))
def count(dense, *, format, grid, step, nonzeros=False):
    """What is known before the values are, (masks, offsets) or (offsets,); and what the host reads:
    the last of each shard's offsets, of Delta-CSR two; with `nonzeros` those of each band of a
    bitmap; and how many -0.0 every `step`th row has in all."""
    known = _call(f"count_{format}", _known(dense.shape, format, grid), dense, grid=grid)
    told = [known[-1][:, -1 if format == "bitmap" else -2 :].reshape(-1)]
    if nonzeros:
        told.append(lax.population_count(known[0]).sum((2, 3), dtype=jnp.uint32).reshape(-1))
    some = lax.bitcast_convert_type(dense[::step], jnp.uint16)
    told.append((some == 0x8000).sum(dtype=jnp.uint32)[None])
    return known, jax.device_put(jnp.concatenate(told), jax.memory.Space.Host)


@partial(jax.jit, static_argnames=("format", "grid", "capacity", "index_capacity"))
def fill(known, dense, *, format, grid, capacity, index_capacity):
    """(values,), or (index, values) of Delta-CSR."""
    new = _new(dense.shape, dense.dtype, format, grid, capacity, index_capacity)
    return _call(f"fill_{format}", new, *known, dense, grid=grid)


@lru_cache  # a small matrix takes no longer than such work of the host
def _known(shape, format, grid) -> tuple[jax.ShapeDtypeStruct, ...]:
    S, rows, cols = _shard(shape, grid)
    if format == "bitmap":
        bands, tiles, blocks = bitmap.grid_of(rows, cols)
        return _words(S, bands, tiles, 32), _words(S, bands * blocks + 1)
    blocks, _ = delta_csr.grid_of(cols)
    return (_words(S, blocks * rows + 2),)


@lru_cache
def _new(shape, dtype, format, grid, capacity, index_capacity) -> tuple[jax.ShapeDtypeStruct, ...]:
    S, *_ = _shard(shape, grid)
    values = jax.ShapeDtypeStruct((S, capacity), dtype)
    return (values,) if format == "bitmap" else (_words(S, index_capacity), values)


def _call(target: str, out: Any, *operands: jax.Array, grid: tuple[int, int]) -> Any:
    attributes = {"row_blocks": np.int64(grid[0]), "column_blocks": np.int64(grid[1])}
    return jax.ffi.ffi_call(f"flashllm_{target}_v1", out)(*operands, **attributes)


def _words(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.uint32)


def _shard(shape: tuple[int, ...], grid: tuple[int, int]) -> tuple[int, int, int]:
    """Shards, and their rows and columns."""
    (M, K), (R, C) = shape, grid
    return R * C, -(-M // R), -(-K // C)
