"""References for the core's tests: NumPy in float64, sharing no code with the kernels."""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
FLOATS = [np.dtype(np.float32), *HALVES]
FORMATS = ["bitmap", "delta_csr"]

# Unit roundoff of the output and half its smallest subnormal. XLA flushes no fp16 to zero.
ROUNDOFF = {"float32": (2.0**-23, 0.0), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 0.0)}


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def sparse_matrix(shape, dtype, density, seed=0, integers=False) -> np.ndarray:
    """Random [M, K] with about `density` nonzeros, +0 elsewhere."""
    rng = np.random.default_rng(seed)
    keep = rng.random(shape) < density  # first: with and without `integers` the places agree
    w = rng.choice([-4, -3, -2, -1, 1, 2, 3, 4], shape) if integers else rng.standard_normal(shape)
    return np.where(keep, w, 0).astype(np.float32).astype(dtype)


def dense_product(x, w, bias=None) -> np.ndarray:
    """x [..., K] W^T + bias in float64."""
    y = np.asarray(x).astype(np.float64) @ np.asarray(w).astype(np.float64).T
    return y if bias is None else y + np.asarray(bias).astype(np.float64)


def gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2)))


ACTIVATIONS = {None: lambda z: z, "relu": lambda z: np.maximum(z, 0), "gelu": gelu}


def assert_product(y, x, w, bias=None, activation=None):
    """|y - ref| <= u_out |ref| + nnz_row 2^-23 (|x| @ |W|.T), for finite x and w.

    With a bias one more term is summed, and |gelu'| <= 1.13 widens the second part.
    """
    y, w = np.asarray(y), np.asarray(w)
    ref = ACTIVATIONS[activation](dense_product(x, w, bias))
    scale = dense_product(np.abs(x), np.abs(w), None if bias is None else np.abs(bias))
    terms = np.count_nonzero(w.astype(np.float64), axis=1) + (bias is not None)
    if activation == "gelu":
        terms = 1.13 * terms + 4  # and erf's own rounding
    u, tiny = ROUNDOFF[y.dtype.name]
    bound = u * np.abs(ref) + terms * 2.0**-23 * scale + tiny
    _assert_near(y, ref, bound)


class DenseStage(NamedTuple):
    """A stage of `jax_flashllm.chain` with its matrix [M, K] as it is."""

    w: np.ndarray
    bias: np.ndarray | None = None
    activation: str | None = None
    add: bool = False
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None


def assert_chain(results, x, h, stages, epsilon=1e-5, excess=False):
    """Each stage from the results of the one before: errors do not add up.

    results: (h, x) after the first stage, after the first two, and so on.
    excess: the norms may have seen h before it was rounded, as XLA likes to do.
    """
    for (new_h, new_x), s in zip(results, stages, strict=True):
        new_h, new_x = np.asarray(new_h), np.asarray(new_x)
        if not s.add:
            np.testing.assert_array_equal(bits(new_h), bits(h))
            assert_product(new_x, x, s.w, s.bias, s.activation)
            x = new_x
            continue
        y = ACTIVATIONS[s.activation](dense_product(x, s.w, s.bias))
        scale = dense_product(np.abs(x), np.abs(s.w), None if s.bias is None else np.abs(s.bias))
        terms = np.count_nonzero(s.w.astype(np.float64), axis=1) + (s.bias is not None)
        terms = 1.13 * terms + 4 if s.activation == "gelu" else terms
        u, tiny = ROUNDOFF[new_h.dtype.name]
        ref = np.asarray(h).astype(np.float64) + y
        # y may be rounded before it is added.
        _assert_near(new_h, ref, u * (np.abs(ref) + np.abs(y)) + terms * 2.0**-23 * scale + tiny)
        h, z = new_h, new_h.astype(np.float64)
        factor = 1 / np.sqrt(z.var(-1, keepdims=True) + epsilon)
        if s.scale is not None:
            factor = factor * s.scale.astype(np.float64)
        ref = (z - z.mean(-1, keepdims=True)) * factor
        sums = np.abs(z).max(-1, keepdims=True) * np.abs(factor) + np.abs(ref)
        if s.shift is not None:
            ref, sums = ref + s.shift.astype(np.float64), sums + np.abs(s.shift.astype(np.float64))
        more = 2 * u * sums if excess else 0
        _assert_near(new_x, ref, u * np.abs(ref) + 16 * 2.0**-23 * sums + tiny + more)
        x = new_x


def _assert_near(y, ref, bound):
    assert y.shape == ref.shape
    error = np.abs(y.astype(np.float64) - ref)
    worst = np.unravel_index(np.argmax(error - bound), error.shape) if error.size else ()
    assert (error <= bound).all(), (
        f"at {worst}: {y[worst]} for {ref[worst]}, error {error[worst]:.3g} > {bound[worst]:.3g}"
    )


def damage(rng: np.random.Generator, words: np.ndarray) -> None:
    """Changes one, some or all of the words in place."""
    flat = words.reshape(-1)
    at, count = rng.integers(flat.size), int(rng.choice([1, 3, flat.size]))
    part = flat[at : at + count]
    kind = rng.integers(6)
    if kind == 0:
        part[:] = rng.integers(0, 2**32, part.size, dtype=np.uint32)
    elif kind == 1:
        part[:] = rng.choice(np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32))
    elif kind == 2:
        part ^= np.uint32(1) << rng.integers(0, 32, part.size, dtype=np.uint32)
    elif kind == 3:
        part += np.uint32(rng.integers(3000))
    elif kind == 4:
        part -= np.uint32(rng.integers(3000))
    else:
        rng.shuffle(part)
