"""Products on the GPU against float64 references. Run with `pytest -m gpu`."""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
from gpu import LARGE, MARKS, SHAPES, TOKENS, multiply, normals, small_integers
from reference import (
    FLOATS,
    FORMATS,
    HALVES,
    assert_product,
    bits,
    dense_product,
    sparse_matrix,
)

import jax_flashllm
from jax_flashllm import plan

pytestmark = MARKS


# ---- indexing: sums of small integers are exact in fp32, so every bit must match ----


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_integers_are_exact(format, shape, density):
    dense = sparse_matrix(shape, np.float16, density, seed=sum(shape), integers=True)
    w = jax_flashllm.encode(dense, format=format)
    tokens = TOKENS if shape in SHAPES else [1, 8, 33, 130]
    for n, dtype in zip(tokens, itertools.cycle(FLOATS), strict=False):
        x = small_integers((n, shape[1]), dtype)
        ref = dense_product(x, dense)
        y = np.asarray(multiply(w, x))
        np.testing.assert_array_equal(y, ref.astype(np.float32).astype(dtype), err_msg=f"{n=}")


def _ragged_shapes(count):
    """Distinct (M, K, N): what no tile divides mostly, and each side of a multiple of 64."""
    rng = np.random.default_rng(0)

    def side():
        n = int(2 ** rng.uniform(0, 11.3))
        return max(1, round(n, -2) // 64 * 64 + int(rng.integers(-1, 2))) if n > 64 else n

    tokens = [*range(1, 18), 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 200, 255, 256, 257]
    shapes = {}
    while len(shapes) < count:
        shapes[side(), side(), tokens[len(shapes) % len(tokens)]] = None
    return list(shapes)


SPARSITIES = [0, 0.3, 0.5, 0.7, 0.9, 0.99, 1]
RAGGED = _ragged_shapes(560)


@pytest.mark.parametrize("at", range(0, len(RAGGED), 20))
def test_ragged_shapes(at):
    """Exact on integers, in bound on floats: each shape in one format, dtype and sparsity."""
    for i, (m, k, n) in enumerate(RAGGED[at : at + 20], start=at):
        format, weight, token = FORMATS[i % 2], HALVES[i // 2 % 2], FLOATS[i // 3 % 3]
        density, info = 1 - SPARSITIES[i % 7], f"{m}x{k}, N={n}, {FORMATS[i % 2]}, case {i}"
        exact, rounded = (sparse_matrix((m, k), weight, density, i, b) for b in (True, False))
        for dense in (exact, rounded):  # whole tiles empty and full
            dense[64:128, 128:256], dense[:64, 256:512] = 0, 1
        x = small_integers((n, k), token, seed=i)
        y = np.asarray(multiply(jax_flashllm.encode(exact, format), x))
        ref = dense_product(x, exact).astype(np.float32).astype(token)
        np.testing.assert_array_equal(y, ref, err_msg=info)
        x = normals((n, k), token, seed=i)
        assert_product(multiply(jax_flashllm.encode(rounded, format), x), x, rounded)


@pytest.mark.parametrize("shape", [(1000, 1100), (5000, 1500)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_every_cut_is_exact(format, shape):
    """What the model, its table or `tune` may choose."""
    dense = sparse_matrix(shape, np.float16, 0.4, integers=True)
    w = jax_flashllm.encode(dense, format)
    cuts = plan.cuts(format, shape[0], 1, shape[1], plan.device())
    for cut, n in itertools.product(cuts, (1, 2, 3, 8, 20, 40)):
        x = small_integers((n, shape[1]), np.float16)
        with plan.forced(cut):
            y = jax.jit(lambda w, x: jax_flashllm.spmm(w, x))(w, x)
        ref = dense_product(x, dense).astype(np.float16)
        np.testing.assert_array_equal(np.asarray(y), ref, err_msg=f"{cut}, {n=}")


@pytest.mark.parametrize("n", [0, 1000, 16384])
@pytest.mark.parametrize("format", FORMATS)
def test_no_tokens_and_many(format, n):
    dense = sparse_matrix((200, 328), np.float16, 0.3, integers=True)
    x = small_integers((n, 328), np.float16)
    y = np.asarray(multiply(jax_flashllm.encode(dense, format), x))
    np.testing.assert_array_equal(y, dense_product(x, dense).astype(np.float16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_many_tokens_are_exact(shape, density, dtype):
    """On Hopper the wide kernel: its groups of tokens, full and not."""
    dense = sparse_matrix(shape, dtype, density, seed=sum(shape), integers=True)
    w = jax_flashllm.encode(dense, format="bitmap")
    x = small_integers((1000, shape[1]), dtype)
    ref = dense_product(x, dense).astype(np.float32).astype(dtype)
    for n in (17, 32, 33, 64, 65, 100, 128, 129, 200, 256, 257, 300, 512, 1000):
        np.testing.assert_array_equal(np.asarray(multiply(w, x[:n])), ref[:n], err_msg=f"{n=}")


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_many_tokens_stay_in_bound(dtype, activation):
    shapes = [(256, 512), (100, 1030), (2048, 4096), (1000, 4096)]
    for (m, k), n in zip(shapes, [64, 129, 300, 20], strict=True):
        dense = sparse_matrix((m, k), dtype, 0.3)
        x, bias = normals((n, k), dtype), normals((m,), dtype, seed=2)
        y = multiply(jax_flashllm.encode(dense, format="bitmap", shards=2), x, bias, activation)
        assert_product(y, x, dense, bias, activation)


def test_inf_and_nan_among_many_tokens():
    dense = sparse_matrix((96, 192), np.float16, 0.3)
    dense[5, 7], dense[40, 100] = np.inf, np.nan
    x = normals((130, 192), np.float16)
    x[1, 3], x[2, 100], x[129, 150] = np.inf, np.nan, -np.inf
    with np.errstate(invalid="ignore"):
        ref = dense_product(x, dense)
    w = jax_flashllm.encode(dense, format="bitmap")
    for n in (17, 64, 128, 130):
        y = np.asarray(multiply(w, x[:n])).astype(np.float64)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(ref[:n]))
        np.testing.assert_array_equal(y[np.isinf(ref[:n])], ref[:n][np.isinf(ref[:n])])


@pytest.mark.parametrize("shards", [2, 3, 7])
@pytest.mark.parametrize("format", FORMATS)
def test_row_blocks(format, shards):
    dense = sparse_matrix((333, 520), np.float16, 0.4, integers=True)
    x = small_integers((9, 520), np.float32)
    y = multiply(jax_flashllm.encode(dense, format=format, shards=shards), x)
    np.testing.assert_array_equal(np.asarray(y), dense_product(x, dense))


# ---- rounding ----


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("token", FLOATS, ids=str)
@pytest.mark.parametrize("weight", HALVES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_rounding_stays_in_bound(format, weight, token, activation):
    for (m, k), n in zip([(256, 512), (100, 1030), (2048, 4096)], [1, 5, 40], strict=True):
        dense = sparse_matrix((m, k), weight, 0.3)
        x, bias = normals((n, k), token), normals((m,), token, seed=2)
        y = multiply(jax_flashllm.encode(dense, format=format), x, bias, activation)
        assert y.dtype == token
        assert_product(y, x, dense, bias, activation)


@pytest.mark.parametrize("exponent", [-100, -30, 30, 90])
@pytest.mark.parametrize("weight", HALVES, ids=str)
def test_float32_tokens_keep_their_range(weight, exponent):
    dense = sparse_matrix((64, 256), weight, 0.3)
    x = normals((3, 256), np.float32) * np.float32(2.0**exponent)
    assert_product(multiply(jax_flashllm.encode(dense, format="bitmap"), x), x, dense)


@pytest.mark.parametrize("token", FLOATS, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("shape", "shards"), [((96, 192), 1), ((44, 12350), 3)])
def test_inf_and_nan_meet_zeros_too(shape, shards, format, token):
    dense = sparse_matrix(shape, np.float16, 0.3)
    dense[5, 7], dense[40, 100] = np.inf, np.nan
    x = normals((6, shape[1]), token)
    x[1, 3], x[2, 100], x[3, -42] = np.inf, np.nan, -np.inf
    with np.errstate(invalid="ignore"):
        ref = dense_product(x, dense)
    w = jax_flashllm.encode(dense, format=format, shards=shards)
    y = np.asarray(multiply(w, x)).astype(np.float64)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(ref))
    np.testing.assert_array_equal(y[np.isinf(ref)], ref[np.isinf(ref)])


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("format", FORMATS)
def test_same_bits_every_time_and_in_every_batch(format, density, invariant, monkeypatch):
    """With few tokens a bitmap that is not sparse is cut another way, unless told not to."""
    monkeypatch.setenv("JAX_FLASHLLM_BATCH_INVARIANT", str(int(invariant)))
    dense = sparse_matrix((1936, 14848), np.float16, density)  # the smallest with two cuts
    w = jax_flashllm.encode(dense, format=format)
    most = 64 if format == "bitmap" else plan.DELTA_DENSE_TOKENS - 1
    x = normals((most, 14848), np.float16)
    run = jax.jit(lambda w, x: jax_flashllm.spmm(w, x))  # a new one: traced in this environment
    first = bits(run(w, x))
    few = bits(run(w, x[:16]))
    for _ in range(100):
        np.testing.assert_array_equal(bits(run(w, x)), first)
        np.testing.assert_array_equal(bits(run(w, x[:16])), few)
    for n in (1, 2, 4, 5, 8, 16, 17, 31, 32, 33, most - 1):
        np.testing.assert_array_equal(bits(run(w, x[:n])), (first if n > 16 else few)[:n])
    same = invariant or density < 0.5 or format != "bitmap"
    assert (few == first[:16]).all() == same


@pytest.mark.parametrize("token", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_same_bits_in_every_batch_of_tokens_in_terms(format, token, monkeypatch):
    """Each is two or three to the kernels, in up to three groups of 64."""
    monkeypatch.setenv("JAX_FLASHLLM_BATCH_INVARIANT", "1")
    w = jax_flashllm.encode(sparse_matrix((1936, 14848), np.float16, 0.5), format=format)
    x = normals((64, 14848), token)
    run = jax.jit(lambda w, x: jax_flashllm.spmm(w, x))
    all_64 = bits(run(w, x))
    np.testing.assert_array_equal(bits(run(w, x)), all_64)
    for n in (1, 3, 8, 16, 21, 22, 32, 33, 48, 63):
        np.testing.assert_array_equal(bits(run(w, x[:n])), all_64[:n], err_msg=f"{n=}")
