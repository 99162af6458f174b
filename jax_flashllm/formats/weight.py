"""What every encoded weight has: shape, dtype, sizes, and how it is built and checked.

An encoded W [M, K] is a frozen pytree. It is cut into C column blocks of ceil(K / C) columns, and
each of those into R row blocks of ceil(M / R) rows. Zeros fill the last blocks up. All buffers
start with an axis of S = R C shards, shard c R + r being row block r of column block c; padding
makes them as long as the longest.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, TypeVar

import jax
import jax.core
import jax.export
import ml_dtypes
import numpy as np

W = TypeVar("W", bound="SparseWeight")

HALF_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
VECTOR = 8  # values a unit of `offsets`


def register(cls: type[W]) -> type[W]:
    """Makes a dataclass a pytree, also in what `jax.export` serializes."""
    data = cls._buffers()

    def from_children(aux_data: Any, children: Any) -> Any:
        static = dict(zip(("shape", "grid"), aux_data, strict=True))
        return cls(**static, **dict(zip(data, children, strict=True)))

    jax.tree_util.register_dataclass(cls)
    return jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jax_flashllm.{cls.__name__}",
        serialize_auxdata=lambda aux_data: json.dumps(aux_data).encode(),
        deserialize_auxdata=lambda text: tuple(x and tuple(x) for x in json.loads(text)),
        from_children=from_children,
    )


def words(x: np.ndarray | jax.Array) -> np.ndarray:
    """The bits of a 16-bit float array, as uint16."""
    return np.asarray(x).view(np.uint16)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SparseWeight:
    """An encoded matrix W [M, K] of float16 or bfloat16; see `Bitmap` and `DeltaCSR`."""

    offsets: jax.Array
    values: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})  # no leaf
    # (R, C); None stands for all the shards that there are, in rows.
    grid: tuple[int, int] | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )

    format: ClassVar[Literal["bitmap", "delta_csr"]]
    unit: ClassVar[int] = VECTOR  # values that a shard's room for them is a multiple of

    # Without this NumPy would take `x @ w` apart element by element.
    __array_ufunc__ = None

    @property
    def buffers(self) -> tuple[jax.Array, ...]:
        """Index buffers in the order that the kernels take them, without `values`."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.values.dtype)

    @property
    def ndim(self) -> int:
        return 2

    @property
    def shards(self) -> int:
        """Number of shards S; inside a `shard_map`, of those that this device has."""
        return self.values.shape[-2]

    @property
    def row_shards(self) -> int:
        """Number of row blocks R of the whole weight."""
        return self.shards if self.grid is None else self.grid[0]

    @property
    def column_shards(self) -> int:
        """Number of column blocks C of the whole weight."""
        return 1 if self.grid is None else self.grid[1]

    @property
    def shard_rows(self) -> int:
        """Rows a shard, ceil(M / R)."""
        return -(-self.shape[0] // self.row_shards)

    @property
    def shard_columns(self) -> int:
        """Columns a shard, ceil(K / C)."""
        return -(-self.shape[1] // self.column_shards)

    @property
    def local_grid(self) -> tuple[int, int]:
        """(R, C) of the shards that are here: fewer than the grid's inside a `shard_map`."""
        columns = max(1, self.shards // self.row_shards)
        return self.shards // columns, columns

    @property
    def local_shape(self) -> tuple[int, int]:
        """[M, K] of the shards that are here; `shape` where all are."""
        rows, columns = self.local_grid
        if rows * columns == self.row_shards * self.column_shards:
            return self.shape
        return rows * self.shard_rows, columns * self.shard_columns

    @property
    def padding(self) -> float:
        """Share of `nbytes` that only makes shards equally long, 0 to 1; one shard has none."""
        if self.shards == 1:
            return 0.0
        used = self._used()
        buffers = [(b, n) for b, n in zip((*self.buffers, self.values), used, strict=True) if n]
        spare = sum((b.size - n) * b.dtype.itemsize for b, n in buffers)
        return spare / self.nbytes

    @property
    def nnz(self) -> int:
        """Stored weights: those whose bits are not all zero when encoded (-0.0 counts)."""
        raise NotImplementedError

    @property
    def sparsity(self) -> float:
        """Share of weights not stored, 0 to 1."""
        return 1 - self.nnz / self._size

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.size * b.dtype.itemsize for b in (*self.buffers, self.values))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self._size

    @property
    def _size(self) -> int:
        return math.prod((*self.values.shape[:-2], *self.shape))

    def to_dense(self) -> np.ndarray:
        """W [M, K] in NumPy, bit for bit; [L, M, K] of a stack.

        Raises ValueError, as `validate` does, where the buffers contradict each other.
        """
        if len(self.values.shape) > 2:
            return np.stack([w.to_dense() for w in self._unstacked()])
        try:
            if self.column_shards == 1:
                return self._to_dense()
            parts = [w._to_dense() for w in self._columns()]
            return np.concatenate(parts, axis=1)[:, : self.shape[1]]
        except (IndexError, ValueError):
            self.validate()  # says what is wrong
            raise

    def validate(self) -> None:
        """Checks the contents of the buffers; raises ValueError naming what is wrong.

        The encoders' output always passes. Needed only for buffers built by other means.
        """
        if self.dtype not in HALF_DTYPES:
            raise ValueError(
                f"{type(self).__name__}: values are {self.dtype}, expected float16 or bfloat16"
            )
        if len(self.values.shape) > 2:
            for w in self._unstacked():
                w.validate()
        elif self.column_shards > 1:
            width = self.shard_columns
            for c, w in enumerate(self._columns()):
                w._validate()
                if np.any(words(w._to_dense()[:, max(self.shape[1] - c * width, 0) :])):
                    raise ValueError(
                        f"{type(self).__name__}: column block {c} has a weight outside the matrix "
                        f"{list(self.shape)}"
                    )
        else:
            self._validate()

    def _to_dense(self) -> np.ndarray:
        """Written for reading: the format's specification."""
        raise NotImplementedError

    def _validate(self) -> None:
        raise NotImplementedError

    def _used(self) -> tuple[int, ...]:
        """Elements in use of each index buffer and of values; 0 where shards are of one size."""
        raise NotImplementedError

    def _columns(self):
        """The column blocks, each a weight [M, ceil(K / C)]."""
        rows, shape = self.row_shards, (self.shape[0], self.shard_columns)
        for c in range(self.column_shards):
            buffers: dict[str, Any] = {
                f: np.asarray(getattr(self, f))[c * rows : (c + 1) * rows] for f in self._buffers()
            }
            yield type(self)(shape=shape, grid=(rows, 1), **buffers)

    def block(self, r: int, c: int) -> np.ndarray:
        """Row block r of column block c, dense."""
        s = c * self.row_shards + r
        buffers: dict[str, Any] = {
            f: np.asarray(getattr(self, f)[s : s + 1]) for f in self._buffers()
        }
        shape = self.shard_rows, self.shard_columns
        return type(self)(shape=shape, grid=(1, 1), **buffers)._to_dense()

    @classmethod
    def _buffers(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]

    def _unstacked(self):
        return [
            jax.tree.map(lambda b, i=i: np.asarray(b)[i], self) for i in range(len(self.values))
        ]

    def with_values(self, values: jax.Array):
        """The same nonzero positions with other values, e.g. to differentiate in the values."""
        return dataclasses.replace(self, values=values)

    def __matmul__(self, x):
        raise TypeError("@ is not defined for encoded weights; x @ W.T is jax_flashllm.spmm(w, x)")

    __rmatmul__ = __matmul__

    def __repr__(self) -> str:
        name = type(self).__name__
        try:
            m, k = self.shape
            stacked = f"stack of {self.values.shape[0]}, " if self.values.ndim > 2 else ""
            text = f"{name}({stacked}[{m}, {k}] {self.dtype}"
            if self.column_shards > 1:
                text += f", shards=({self.row_shards}, {self.column_shards})"
            elif self.shards > 1:
                text += f", shards={self.shards}"
            if any(isinstance(b, jax.core.Tracer) for b in jax.tree.leaves(self)):
                return text + ", traced)"
            if self.shards > 1:
                text += f", {self.padding:.1%} padding"
            return (
                f"{text}, sparsity={self.sparsity:.4f}, nnz={self.nnz}, "
                f"{self.bits_per_weight:.2f} bits/weight, {self.nbytes} bytes)"
            )
        except Exception:  # a pytree of placeholders has no shapes; repr must not raise
            return f"{name}({self.shape}, {self.values!r})"

    def _check_sizes(self, **expected: tuple[tuple[int, ...], Any]) -> None:
        """Raises ValueError unless each named buffer has its shape (after batch axes) and dtype.

        Leaves that are no arrays (pytree placeholders, None, ShardingSpecs) pass: JAX
        rebuilds pytrees from such things.
        """
        leaves = [getattr(self, f) for f in (*expected, "values")]
        if not all(hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves):
            return
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"{type(self).__name__}: shape must be [M, K] >= 1, got {self.shape}")
        R, C = self.row_shards, self.column_shards
        if (self.shards % R and (R % self.shards or self.shards == 0)) or self.shards > R * C:
            raise ValueError(
                f"{type(self).__name__}: {self.shards} shards are no part of {R} row and {C} "
                "column blocks; a mesh axis must divide them"
            )
        if (capacity := self.values.shape[-1]) % self.unit or not capacity:
            raise ValueError(
                f"{type(self).__name__} of shape {list(self.shape)}: values has room for {capacity}"
                f" a shard, expected a multiple of {self.unit}; "
                "make weights with jax_flashllm.encode"
            )
        for name, (shape, dtype) in expected.items():
            got = getattr(self, name)
            # Under vmap and scan leaves carry batch axes in front.
            if got.dtype == jax.dtypes.float0:  # the index buffers of a gradient
                continue
            if got.shape[len(got.shape) - len(shape) :] != shape or got.dtype != dtype:
                raise ValueError(
                    f"{type(self).__name__} of shape {list(self.shape)}: {name} is {got.dtype}"
                    f"{list(got.shape)}, expected {np.dtype(dtype)}{list(shape)}; "
                    "make weights with jax_flashllm.encode"
                )


_process: int | None = None  # that has encoded or multiplied


def check_process(op: str) -> None:
    """Raises RuntimeError in a fork of a process that has used JAX here, where JAX would hang.

    Programs compiled before the fork run there, without coming by here.
    """
    global _process
    if _process is None:
        _process = os.getpid()
    elif _process != os.getpid():
        raise RuntimeError(
            f"{op}: this process was forked from one that had used JAX, whose threads are not in "
            "the copy: it would hang. Start processes with multiprocessing's 'spawn' or "
            "'forkserver', or fork before the first weight is encoded"
        )


@contextlib.contextmanager
def room(op: str, what: str, advice: str) -> Iterator[None]:
    """Where the device runs out of memory inside, the error says for what, and what to do.

    What is computed inside must be waited for there: XLA allocates after its calls return.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        device = jax.devices()[0]
        stats = device.memory_stats() or {}
        used = f", where {stats['bytes_in_use'] / 1e6:.1f} MB are in use" if stats else ""
        if "bytes_limit" in stats:
            used += f" of {stats['bytes_limit'] / 1e6:.1f}"
        inner = error.__cause__  # of an `encode` inside, what XLA said
        text = str(inner if isinstance(inner, jax.errors.JaxRuntimeError) else error)
        text = text.splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        raise jax.errors.JaxRuntimeError(
            f"RESOURCE_EXHAUSTED: {op}: no room on {device} for {what}{used} ({text}); {advice}"
        ) from error


def check_free(out: Any, device: Any) -> None:
    """Raises what XLA would, for these arrays or shapes: it tries for ten seconds, and keeps those
    results of a failed call that it had room for."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(out))
    if needed > free:
        raise jax.errors.JaxRuntimeError(
            f"RESOURCE_EXHAUSTED: {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free"
        )


def check_dense(dense, shards: int | tuple[int, int]) -> tuple[int, int]:
    """(R, C) of `shards`. Raises TypeError or ValueError unless `dense` is an encodable [M, K]."""
    shape, dtype = getattr(dense, "shape", None), getattr(dense, "dtype", None)
    if shape is None or dtype is None:
        raise TypeError(f"encode: expected a NumPy or JAX array, got {type(dense).__name__}")
    if isinstance(dense, SparseWeight | jax.ShapeDtypeStruct):
        raise TypeError(
            f"encode: expected an array with values, got {type(dense).__name__}; "
            "w.to_dense() decodes a weight that is encoded"
        )
    if isinstance(dense, jax.core.Tracer):
        raise TypeError(
            "encode: the number of nonzeros decides the size of the result, so it cannot run "
            "under jit, vmap or grad; encode before, and pass the encoded weight in"
        )
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"encode: expected a matrix [M, K] with M, K >= 1, got {list(shape)}")
    if np.dtype(dtype) not in HALF_DTYPES:
        raise TypeError(
            f"encode: weights are float16 or bfloat16, got {dtype}; cast first, "
            "e.g. w.astype(jnp.bfloat16)"
        )
    blocks = shards if isinstance(shards, tuple) else (shards, 1)
    whole = len(blocks) == 2 and all(isinstance(n, int | np.integer) for n in blocks)
    if not whole or not all(1 <= n <= size for n, size in zip(blocks, shape, strict=True)):
        raise ValueError(
            f"encode: shards must be from 1 to M = {shape[0]}, got {shards!r}; or a pair, row "
            f"blocks and column blocks, the latter up to K = {shape[1]}"
        )
    return int(blocks[0]), int(blocks[1])
