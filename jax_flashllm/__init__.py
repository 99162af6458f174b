"""Unstructured-sparse matrix products and sparse generative inference for JAX."""

try:
    from jax_flashllm import _flashllm  # noqa: F401
except ImportError as e:
    raise ImportError(
        f"jax_flashllm: the compiled module is missing or does not load ({e}). If Python runs in "
        "the source folder it finds the sources first: run elsewhere, or install with "
        "`pip install -e .`"
    ) from e

from jax_flashllm.formats import Bitmap, DeltaCSR, SparseWeight, encode, stack
from jax_flashllm.formats.layout import shard
from jax_flashllm.spmm import decode, spmm
from jax_flashllm.tuning import tune

__version__ = "0.1.0"
__all__ = [
    "Bitmap",
    "DeltaCSR",
    "SparseWeight",
    "decode",
    "encode",
    "shard",
    "spmm",
    "stack",
    "tune",
]
