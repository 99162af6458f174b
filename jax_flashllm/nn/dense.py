"""SparseDense: nnx.Linear with an encoded weight.

    y = activation(x W^T + bias)     x [..., K]   W [M, K] encoded   bias [M]   y [..., M]

The weight is three Variables, so that NNX's filters and optimizers see only what is trained:

    kernel          nnx.Param    half   [S, capacity]   the stored values
    kernel_index    SparseIndex  uint   Bitmap.masks or TiledCSL.index
    kernel_offsets  SparseIndex  uint32
"""

import inspect
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

from jax_flashllm.formats import Format, SparseWeight
from jax_flashllm.formats.weight import HALF_DTYPES
from jax_flashllm.nn.weights import (
    Mask,
    check_param_dtype,
    encode_kernel,
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
    format: "auto", "bitmap" or "tiled_csl", as in `jax_flashllm.encode`.
    shards: row blocks of the weight.
    Left out of nnx.Linear's arguments: `precision`, `dot_general`, `promote_dtype` and
        `preferred_element_type`, since the kernel's product has no other forms, and
        `kernel_metadata` and `bias_metadata`.

    Attributes: `kernel` (the stored values), `kernel_index` and `kernel_offsets` as in this
    module's header, `bias` (nnx.Param [M] or None), `weight` (all of it, encoded).
    Sharding annotations of `kernel_init` name axes of [K, M], which the values do not have: they
    are dropped. Training updates the values; which weights are zero stays. In Flax's tree mode
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
        shards: int = 1,
        rngs: nnx.Rngs,
    ):
        check_param_dtype(param_dtype, "SparseDense")
        w = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        if not isinstance(w, SparseWeight):  # `from_encoded` brings one
            w = getattr(w, "raw_value", w)  # out of nnx.with_partitioning
            w = initial_weight(w, sparsity, param_dtype, format, shards)
        index, offsets = w.buffers
        self.kernel = nnx.Param(w.values)
        self.kernel_index = SparseIndex(index)
        self.kernel_offsets = SparseIndex(offsets)
        self.bias: nnx.Variable | None = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
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
    ) -> Self:
        """A layer of an encoded weight [M, K].

        bias: [M] in any float dtype, or a Variable, which the layer then shares.
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
        shards: int = 1,
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
        w = encode_kernel(kernel, sparsity, mask, param_dtype, format, shards)
        return cls.from_encoded(w, linear.bias, dtype)

    def share(self, other: "SparseDense") -> Self:
        """Takes the other layer's weight for its own: the same Variables. Returns itself."""
        self.kernel, self.kernel_index = other.kernel, other.kernel_index
        self.kernel_offsets = other.kernel_offsets
        return self

    @property
    def weight(self) -> SparseWeight:
        """W [M, K] encoded, from the current Variables."""
        shape = self.out_features, self.in_features
        return rebuild(self.kernel[...], self.kernel_index[...], self.kernel_offsets[...], shape)

    def __call__(self, inputs: jax.Array, *, activation: str | None = None) -> jax.Array:
        """activation(inputs W^T + bias), bias and activation in the kernel's epilogue.

        inputs: [..., K].   activation: None, "relu" or "gelu" (exact).   Returns [..., M] in
        `dtype`, or in what inputs, weight and bias promote to. Errors as `jax_flashllm.spmm`.
        """
        bias = None if self.bias is None else self.bias[...]
        x, bias = promoted(inputs, self.kernel[...], bias, self.dtype)
        return spmm(self.weight, x, bias, activation)


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
