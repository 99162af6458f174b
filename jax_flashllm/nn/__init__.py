"""Flax NNX layers over encoded weights: `SparseDense`; `sparsify` and `restore` for models."""

from jax_flashllm.nn.dense import SparseDense, SparseIndex
from jax_flashllm.nn.restore import restore
from jax_flashllm.nn.sparsify import sparsify

__all__ = ["SparseDense", "SparseIndex", "restore", "sparsify"]
