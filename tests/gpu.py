"""What the GPU tests share: tests/test_gpu*.py, run with `pytest -m gpu`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashllm
from jax_flashllm import _flashllm


def cuda_devices():
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda_devices(), reason="no CUDA device"),
    pytest.mark.skipif(not hasattr(_flashllm, "cuda_targets"), reason="built without CUDA"),
]

SHAPES = [(1, 1), (16, 64), (17, 65), (128, 256), (130, 257), (64, 1000), (300, 768), (1, 4096)]
LARGE = [(2048, 2048), (1111, 4104), (5000, 640), (72, 16384), (31, 25000)]
TOKENS = [1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 33, 64, 65, 200]


def small_integers(shape, dtype, seed=1):
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32).astype(dtype)


def normals(shape, dtype, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype)


def multiply(w, x, bias=None, activation=None):
    return jax.jit(jax_flashllm.spmm, static_argnames="activation")(
        w, jnp.asarray(x), None if bias is None else jnp.asarray(bias), activation=activation
    )
