"""What every encoded weight has: shape, dtype, sizes, and how it is built and checked.

An encoded W [M, K] is a frozen pytree. Its buffers all start with a shard axis S: shard s
holds rows s * R .. (s + 1) * R of W, R = ceil(M / S), padded with zero rows at the end.
"""

import dataclasses
import json
import math
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
    data = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]

    def from_children(aux_data: Any, children: Any) -> Any:
        return cls(shape=aux_data[0], **dict(zip(data, children, strict=True)))

    jax.tree_util.register_dataclass(cls)
    return jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jax_flashllm.{cls.__name__}",
        serialize_auxdata=lambda aux_data: json.dumps(aux_data).encode(),
        deserialize_auxdata=lambda text: tuple(tuple(shape) for shape in json.loads(text)),
        from_children=from_children,
    )


def words(x: np.ndarray | jax.Array) -> np.ndarray:
    """The bits of a 16-bit float array, as uint16."""
    return np.asarray(x).view(np.uint16)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SparseWeight:
    """An encoded matrix W [M, K] of float16 or bfloat16; see `Bitmap` and `TiledCSL`."""

    offsets: jax.Array
    values: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})  # no leaf

    format: ClassVar[Literal["bitmap", "tiled_csl"]]

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
        """Number of row blocks S."""
        return self.values.shape[-2]

    @property
    def shard_rows(self) -> int:
        """Rows a shard, R = ceil(M / S)."""
        return -(-self.shape[0] // self.shards)

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
            return self._to_dense()
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
        else:
            self._validate()

    def _to_dense(self) -> np.ndarray:
        """Written for reading: the format's specification."""
        raise NotImplementedError

    def _validate(self) -> None:
        raise NotImplementedError

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
            if self.shards > 1:
                text += f", shards={self.shards}"
            if any(isinstance(b, jax.core.Tracer) for b in jax.tree.leaves(self)):
                return text + ", traced)"
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


def check_dense(dense, shards: int) -> None:
    """Raises TypeError or ValueError unless `dense` is an encodable [M, K]."""
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
    if not isinstance(shards, int | np.integer) or not 1 <= shards <= shape[0]:
        raise ValueError(f"encode: shards must be from 1 to M = {shape[0]}, got {shards!r}")
