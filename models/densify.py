"""The same model with its sparse layers dense again: to compare speed with, and results."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jax_flashllm.models.opt import OPT
from jax_flashllm.nn import SparseDense


def densify(model: OPT, param_dtype: Any = None) -> OPT:
    """A copy of `model` with nnx.Linear in place of every SparseDense, with the same weights.

    param_dtype: of the dense kernels; None keeps the 16 bits that the sparse ones have.
    Arrays other than those kernels are shared with `model`.
    """
    copy = nnx.merge(*nnx.split(model))
    for owner, name, layer in list(_sparse_layers(copy)):
        setattr(owner, name, _linear(layer, param_dtype))
    return copy


def sparse_share(model: OPT) -> float | None:
    """The share of zeros in the sparse layers together; None where there are none."""
    weights = [layer.weight for _, _, layer in _sparse_layers(model)]
    if not weights:
        return None
    return 1 - sum(w.nnz for w in weights) / sum(math.prod(w.shape) for w in weights)


def _sparse_layers(model: OPT) -> Iterator[tuple[nnx.Module, str, SparseDense]]:
    for _, owner in nnx.iter_modules(model):
        for name, value in vars(owner).items():
            if isinstance(value, SparseDense):
                yield owner, name, value


class _NothingDrawn:
    def params(self) -> None:
        return None


def _linear(layer: SparseDense, param_dtype: Any) -> nnx.Linear:
    dtype = layer.weight.dtype if param_dtype is None else jnp.dtype(param_dtype)
    kernel = jnp.asarray(layer.weight.to_dense().astype(dtype).T)
    bias = None if layer.bias is None else layer.bias[...]
    return nnx.Linear(
        layer.in_features,
        layer.out_features,
        use_bias=bias is not None,
        dtype=layer.dtype,
        param_dtype=dtype,
        kernel_init=lambda *_: kernel,
        bias_init=lambda *_: bias,
        rngs=_NothingDrawn(),  # type: ignore[arg-type]
    )
