"""SparseDense for Flax Linen: linen.Dense with an encoded weight.

The variables lie in two collections, so that gradients and optimizers see only what is trained:

    params   kernel          half  [S, capacity]  the stored values
             bias                  [M]
    sparse   kernel_index    uint                 Bitmap.masks or DeltaCSR.index
             kernel_offsets  uint32
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.linear import default_kernel_init

from jax_flashllm.formats import Format, Shards, SparseWeight
from jax_flashllm.formats.weight import HALF_DTYPES
from jax_flashllm.nn.weights import (
    block_axes,
    check_param_dtype,
    encode_kernel,
    initial_weight,
    promoted,
    rebuild,
)
from jax_flashllm.spmm import spmm

__all__ = ["SparseDense", "variables_from_dense", "variables_from_encoded"]


class SparseDense(linen.Module):
    """A linear layer whose weight is stored without its zeros; arguments as of linen.Dense.

    sparsity: 0 to 1; the smallest round(sparsity * K) initial weights of each output are dropped.
    dtype: computes in this dtype; None promotes x, weight and bias as linen.Dense does. Sums are
        in float32 whatever it is, and the weight is never rounded to it.
    param_dtype: float16 or bfloat16, of the initial weight and bias.
    format, shards: as in `jax_flashllm.encode`. Names that linen.with_partitioning gives a kernel
        [K, M] become those of the shards; M's axes need as many row blocks, K's column blocks.
    Left out of linen.Dense's arguments: `precision`, `dot_general`, `dot_general_cls` and
        `promote_dtype`, since the kernel's product has no other forms.

    To use weights that exist, skip `init` and pass `variables_from_dense` or
    `variables_from_encoded` to `apply`, with use_bias=False where they have none. The variables
    hold K and M rounded up to the format's tiles (64 columns and 16 rows of a bitmap): inputs or
    features that differ from them by less are not noticed.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.bfloat16
    kernel_init: Callable[..., Any] = default_kernel_init
    bias_init: Callable[..., Any] = linen.initializers.zeros_init()
    sparsity: float = 0.0
    format: Format = "auto"
    shards: Shards = 1

    @classmethod
    def from_dense(
        cls, params: Mapping[str, Any], sparsity: float | None = None, **arguments: Any
    ) -> tuple[Self, dict[str, dict]]:
        """(module, variables) that stand for a linen.Dense with these params.

        params: {"kernel": [K, M], "bias": [M]}; without bias if it has none.
        sparsity: as in `variables_from_dense`.
        arguments: of SparseDense; format, shards and param_dtype also say how to encode.
        """
        names = ("format", "shards", "param_dtype")
        how = {name: arguments[name] for name in names if name in arguments}
        variables = variables_from_dense(params, sparsity, **how)
        features = jnp.shape(params["kernel"])[1]
        return cls(features, use_bias="bias" in params, **arguments), variables

    @linen.compact
    def __call__(self, inputs: jax.Array, *, activation: str | None = None) -> jax.Array:
        """activation(inputs W^T + bias), bias and activation in the kernel's epilogue.

        inputs: [..., K].   activation: None, "relu" or "gelu" (exact).   Returns [..., M].
        """
        shape = self.features, jnp.shape(inputs)[-1]
        if self.has_variable("params", "kernel"):
            # How many values there are is the weight's to say: no shape to compare with.
            values = self.get_variable("params", "kernel")
            values = self.param("kernel", lambda _: values)
            index = linen.unbox(self.get_variable("sparse", "kernel_index"))
            offsets = linen.unbox(self.get_variable("sparse", "kernel_offsets"))
            if index is None or offsets is None:
                raise ValueError(
                    f"{self.name or 'SparseDense'}: the variables have a kernel but no 'sparse' "
                    "collection; pass apply the whole of what init or variables_from_dense gave"
                )
        else:
            values, index, offsets = self._init(shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, bias = promoted(inputs, values, bias, self.dtype)
        grid = self.shards if isinstance(self.shards, tuple) else (self.shards, 1)
        grid = None if grid == (1, 1) else grid  # variables may bring more rows
        return spmm(rebuild(values, index, offsets, shape, grid), x, bias, activation)

    def _init(self, shape: tuple[int, int]):
        check_param_dtype(self.param_dtype, "SparseDense")
        encoded: list[SparseWeight] = []

        def init(key):
            kernel = self.kernel_init(key, shape[::-1], self.param_dtype)
            arguments = self.sparsity, self.param_dtype, self.format, self.shards
            w = initial_weight(linen.unbox(kernel), *arguments)
            encoded.append(jax.tree.map(lambda b: _boxed_as(kernel, b), w))
            return encoded[0].values

        values = self.param("kernel", init)
        index, offsets = encoded[0].buffers
        self.put_variable("sparse", "kernel_index", index)
        self.put_variable("sparse", "kernel_offsets", offsets)
        return values, linen.unbox(index), linen.unbox(offsets)


def _boxed_as(kernel: Any, buffer: Any) -> Any:
    """A weight's buffer in the box of its kernel [K, M], whose names are its shards' then."""
    if not isinstance(kernel, linen.Partitioned):
        return buffer
    names, *_ = block_axes(kernel.names)
    return kernel.replace(value=buffer, names=names)


def variables_from_encoded(w: SparseWeight, bias: jax.Array | None = None) -> dict[str, dict]:
    """{"params": ..., "sparse": ...} of a SparseDense with W [M, K] and bias [M]."""
    index, offsets = w.buffers
    params = {"kernel": w.values}
    if bias is not None:
        params["bias"] = jnp.asarray(bias)
    return {"params": params, "sparse": {"kernel_index": index, "kernel_offsets": offsets}}


def variables_from_dense(
    params: Mapping[str, Any],
    sparsity: float | None = None,
    *,
    filter: Callable[[tuple[str, ...]], bool] | None = None,
    format: Format = "auto",
    shards: Shards = 1,
    param_dtype: Any = None,
) -> dict[str, dict]:
    """Variables for a model of SparseDense layers, from the params of its linen.Dense twin.

    params: of one layer, {"kernel": [K, M], "bias": [M]}, or of a whole model. Every matrix
        called "kernel" is encoded, all else is taken as it is.
    sparsity: 0 to 1, drops the smallest round(sparsity * K) weights of each output; None drops
        the zeros that are there.
    filter: called with a layer's path, e.g. ("decoder", "fc1"); False leaves it dense.
    param_dtype: float16 or bfloat16, for the weights; by default float32 becomes bfloat16.

    Returns {"params": ..., "sparse": ...} for `apply`. Errors as `jax_flashllm.encode`.
    """

    def visit(path, node):
        if not isinstance(node, Mapping):
            return node, {}
        boxed: Any = node.get("kernel")
        kernel = linen.unbox(boxed)
        if getattr(kernel, "ndim", 0) == 2 and (filter is None or filter(path)):
            dtype = param_dtype or (kernel.dtype if kernel.dtype in HALF_DTYPES else jnp.bfloat16)
            check_param_dtype(dtype, "variables_from_dense")
            w = encode_kernel(kernel, sparsity, None, dtype, format, shards)
            made = variables_from_encoded(jax.tree.map(lambda b: _boxed_as(boxed, b), w))
            return {**node, **made["params"]}, made["sparse"]
        pairs = {key: visit((*path, key), child) for key, child in node.items()}
        sparse = {key: s for key, (_, s) in pairs.items() if s}
        return {key: p for key, (p, _) in pairs.items()}, sparse

    new, sparse = visit((), params)
    return {"params": new, "sparse": sparse}
