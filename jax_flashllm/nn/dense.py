"""SparseDense: nnx.Linear with an encoded weight.

    y = activation(x W^T + bias)     x [..., K]   W [M, K] encoded   bias [M]   y [..., M]

The weight is three Variables, so that NNX's filters and optimizers see only what is trained:

    kernel          nnx.Param    half   [S, capacity]   the stored values
    kernel_index    SparseIndex  uint   Bitmap.masks or DeltaCSR.index
    kernel_offsets  SparseIndex  uint32
    kernel_grid     SparseIndex  uint32 [2]        row and column blocks, where columns are cut
"""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from jax.core import Tracer

from jax_flashllm.formats import Format, Shards, SparseWeight
from jax_flashllm.formats.layout import shard
from jax_flashllm.formats.weight import HALF_DTYPES
from jax_flashllm.nn.weights import (
    Mask,
    block_axes,
    check_param_dtype,
    encode_kernel,
    grid_for,
    initial_weight,
    promoted,
    rebuild,
)
from jax_flashllm.spmm import spmm


class SparseIndex(nnx.Variable):
    """Where an encoded weight's values lie: integers, saved with the model, never trained."""


class SparseDense(nnx.Module):
    """A linear layer whose weight is stored without its zeros.

    Takes nnx.Linear's arguments and gives its results; the same rngs draw the same weights.

    in_features, out_features: K and M.
    sparsity: 0 to 1; the smallest round(sparsity * K) initial weights of each output are dropped.
    dtype: computes in this dtype; None promotes x, weight and bias as nnx.Linear does, so that
        float32 x stays float32 with a 16-bit weight. Sums are in float32 whatever it is, and
        the weight is never rounded to it.
    param_dtype: float16 or bfloat16, of the weight and of the initial bias.
    format: "auto", "bitmap" or "delta_csr", as in `jax_flashllm.encode`.
    shards: row blocks of the weight, or (row blocks, column blocks); by default one a device of
        the mesh axes in its annotation.
    kernel_metadata, bias_metadata: as nnx.Linear's. Sharding annotations, here or in
        `kernel_init`, name mesh axes of a kernel [K, M], as nnx.Linear's do: (None, "tp") splits
        rows of W over "tp", ("tp", None) its columns. On the Variables they become the
        annotation of the shards.
    Left out of nnx.Linear's arguments: `precision`, `dot_general`, `promote_dtype` and
        `preferred_element_type`, since the kernel's product has no other forms.

    Attributes: `kernel` (the stored values), `kernel_index` and `kernel_offsets` as in this
    module's header, `bias` (nnx.Param [M] or None), `weight` (all of it, encoded).
    Training updates the values; which weights are zero stays. In Flax's tree mode
    split the model first and differentiate in the Params, or pass `allow_int=True`: the index is
    integers, which JAX does not differentiate in.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.bfloat16,
        kernel_init: nnx.Initializer = default_kernel_init,
        bias_init: nnx.Initializer = default_bias_init,
        sparsity: float = 0.0,
        format: Format = "auto",
        shards: Shards | None = None,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs,
    ):
        check_param_dtype(param_dtype, "SparseDense")
        w = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        metadata = dict(kernel_metadata)
        if isinstance(w, nnx.VariableMetadata):  # of nnx.with_partitioning
            metadata = {**w.metadata, **metadata}
            w = w.raw_value
        lead, rows, columns = block_axes(_mesh_axes(metadata))
        mesh = metadata.get("mesh") or jax.sharding.get_abstract_mesh()
        if not isinstance(w, SparseWeight):  # `from_encoded` brings one
            grid = grid_for(shards, rows, columns, mesh.shape)
            w = initial_weight(w, sparsity, param_dtype, format, grid)
        if rows or columns:
            metadata["out_sharding"] = lead
            if mesh.empty:
                metadata["eager_sharding"] = False  # the annotation waits for a mesh
            elif not isinstance(w.values, Tracer | jax.ShapeDtypeStruct):
                w = shard(w, metadata.get("mesh") or jax.sharding.get_mesh(), rows, columns)
        index, offsets = w.buffers
        self.kernel = nnx.Param(w.values, **metadata)
        self.kernel_index = SparseIndex(index, **metadata)
        self.kernel_offsets = SparseIndex(offsets, **metadata)
        self.grid = w.row_shards, w.column_shards
        self.axes = rows, columns  # the mesh axes over each, which the annotation has as one
        self.kernel_grid: nnx.Variable | None = nnx.data(None)
        if w.column_shards > 1:
            self.kernel_grid = SparseIndex(np.array(self.grid, np.uint32))
        self.bias: nnx.Variable | None = nnx.data(None)
        if use_bias:
            bias = bias_init(rngs.params(), (out_features,), param_dtype)
            self.bias = nnx.Param(bias, **bias_metadata)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype

    @classmethod
    def from_encoded(
        cls,
        w: SparseWeight,
        bias: jax.Array | nnx.Variable | None = None,
        dtype: Any = None,
        *,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """A layer of an encoded weight [M, K].

        bias: [M] in any float dtype, or a Variable, which the layer then shares.
        kernel_metadata: as in `SparseDense`. A weight is laid out over the axes that an annotation
            names; one that lies on a mesh already, from `jax_flashllm.shard`, brings its own.
        Raises TypeError when w is not encoded, ValueError when M differs.
        """
        if not isinstance(w, SparseWeight):
            raise TypeError(
                f"SparseDense.from_encoded: expected an encoded weight, got {type(w).__name__}; "
                "make one with jax_flashllm.encode"
            )
        m, k = w.shape
        if bias is not None and bias.shape[-1:] != (m,):
            raise ValueError(
                f"SparseDense.from_encoded: bias is {list(bias.shape)} but W is [{m}, {k}]; pass "
                f"bias [{m}]"
            )
        layer = cls(
            k,
            m,
            use_bias=False,
            dtype=dtype,
            param_dtype=w.dtype,
            kernel_init=lambda *_: w,
            kernel_metadata=kernel_metadata or annotation_of_placed(w),
            rngs=cast(Any, _NothingDrawn()),
        )
        if bias is not None:
            layer.use_bias = True
            layer.bias = bias if isinstance(bias, nnx.Variable) else nnx.Param(jnp.asarray(bias))
        return layer

    @classmethod
    def from_dense(
        cls,
        linear: nnx.Linear,
        sparsity: float | None = None,
        *,
        mask: Mask | None = None,
        format: Format = "auto",
        shards: Shards | None = None,
        dtype: Any = None,
        param_dtype: Any = None,
    ) -> Self:
        """A layer of an nnx.Linear's weight; the bias Variable is shared with it.

        sparsity: 0 to 1, drops the smallest round(sparsity * K) weights of each output.
        mask: bool [K, M], the shape of `linear.kernel`; False drops. With neither, the zeros
            that are there are dropped.
        dtype: computation dtype, by default `linear.dtype`.
        param_dtype: float16 or bfloat16, for the weight. By default the kernel's own; of a
            float32 kernel `linear.dtype` if that is 16-bit (nnx.Linear rounds to it at every
            call, so nothing is lost), else bfloat16, into which every float32 fits without
            overflow. Pass float16 for 8 times less rounding of weights below 65504.

        A sharding annotation of the kernel stays, see `SparseDense`.
        A kernel [L, K, M], as nnx.vmap makes for nnx.scan, becomes a stacked weight.
        Raises ValueError for what a sparse layer cannot do: a dot_general, promote_dtype or
        preferred_element_type of the layer's own, bad masks and sparsities.
        """
        check_plain(linear)
        kernel = linear.kernel[...]
        dtype = linear.dtype if dtype is None else dtype
        if param_dtype is None:
            halves = (
                d for d in (kernel.dtype, dtype) if d is not None and np.dtype(d) in HALF_DTYPES
            )
            param_dtype = next(halves, jnp.bfloat16)
        check_param_dtype(param_dtype, "SparseDense.from_dense")
        metadata = annotation_of(linear)
        _, rows, columns = block_axes(_mesh_axes(dict(metadata)))
        mesh = metadata.get("mesh") or jax.sharding.get_abstract_mesh()
        grid = grid_for(shards, rows, columns, mesh.shape)
        w = encode_kernel(kernel, sparsity, mask, param_dtype, format, grid)
        return cls.from_encoded(w, linear.bias, dtype, kernel_metadata=metadata)

    def share(self, other: "SparseDense") -> Self:
        """Takes the other layer's weight for its own: the same Variables. Returns itself."""
        self.kernel, self.kernel_index = other.kernel, other.kernel_index
        self.kernel_offsets = other.kernel_offsets
        self.kernel_grid, self.grid, self.axes = other.kernel_grid, other.grid, other.axes
        return self

    @property
    def weight(self) -> SparseWeight:
        """W [M, K] encoded, from the current Variables."""
        buffers = self.kernel[...], self.kernel_index[...], self.kernel_offsets[...]
        return rebuild(*buffers, (self.out_features, self.in_features), self.grid)

    def __call__(self, inputs: jax.Array, *, activation: str | None = None) -> jax.Array:
        """activation(inputs W^T + bias), bias and activation in the kernel's epilogue.

        inputs: [..., K].   activation: None, "relu" or "gelu" (exact).   Returns [..., M] in
        `dtype`, or in what inputs, weight and bias promote to. Errors as `jax_flashllm.spmm`.
        """
        bias = None if self.bias is None else self.bias[...]
        x, bias = promoted(inputs, self.kernel[...], bias, self.dtype)
        return spmm(self.weight, x, bias, activation)


def annotation_of(layer: nnx.Linear | SparseDense) -> dict[str, Any]:
    """The metadata that says where a layer's kernel [K, M] lies."""
    names = ("out_sharding", "mesh", "sharding_rules")
    metadata = layer.kernel.get_metadata()
    found = {name: metadata[name] for name in names if metadata.get(name) is not None}
    if isinstance(layer, SparseDense) and "out_sharding" in found:
        rows, columns = layer.axes
        found["out_sharding"] = (*found["out_sharding"][:-1], columns or None, rows or None)
    return found


def _mesh_axes(metadata: dict[str, Any]) -> tuple[Any, ...]:
    """Takes a kernel's annotation out of its metadata; by mesh axes, if it had logical names."""
    names = metadata.pop("out_sharding", None) or ()
    rules = metadata.pop("sharding_rules", ())
    found = nnx.get_partition_spec(
        nnx.Param(jnp.zeros(()), out_sharding=names, sharding_rules=rules, eager_sharding=False)
    )
    return tuple(found.get_value())


def annotation_of_placed(w: SparseWeight) -> dict[str, Any]:
    """Metadata that says where a weight from `jax_flashllm.shard` lies."""
    sharding = getattr(w.values, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return {}
    spec = (*sharding.spec, *(None,) * (w.values.ndim - len(sharding.spec)))
    *spec, within = spec  # a type on an Explicit mesh has an entry for each dimension
    if within is not None or spec[-1] is None:
        return {}
    axes = spec[-1] if isinstance(spec[-1], tuple) else (spec[-1],)
    columns, n = [], 1
    while n < w.column_shards and len(columns) < len(axes):
        n *= sharding.mesh.shape[axes[len(columns)]]
        columns.append(axes[len(columns)])
    names = (*spec[:-1], tuple(columns) or None, axes[len(columns) :] or None)
    return {"out_sharding": names, "mesh": sharding.mesh}


class _NothingDrawn:
    """In the place of rngs where the weights are given."""

    def params(self):
        return None


def check_plain(linear: nnx.Linear) -> None:
    """Raises ValueError for an nnx.Linear whose product is not the ordinary one."""
    defaults = inspect.signature(nnx.Linear.__init__).parameters
    for name in ("dot_general", "promote_dtype", "preferred_element_type"):
        if getattr(linear, name, None) is not defaults[name].default:
            raise ValueError(
                f"SparseDense: nnx.Linear({linear.in_features}, {linear.out_features}) has a "
                f"{name} of its own, which a sparse layer would ignore; leave it dense (with "
                "sparsify, by `filter`)"
            )
