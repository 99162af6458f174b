"""Flax NNX layers over encoded weights: `SparseDense`, and `sparsify` for whole models."""

from jax_flashllm.nn.dense import SparseDense, SparseIndex
from jax_flashllm.nn.sparsify import sparsify

__all__ = ["SparseDense", "SparseIndex", "sparsify"]
