"""Unstructured-sparse matrix products and sparse generative inference for JAX."""

from jax_flashllm.formats import Bitmap, SparseWeight, TiledCSL, encode, stack
from jax_flashllm.spmm import decode, spmm

__version__ = "0.1.0"
__all__ = ["Bitmap", "SparseWeight", "TiledCSL", "decode", "encode", "spmm", "stack"]
