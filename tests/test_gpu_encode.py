"""Encoding, decoding and gradients on the GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import MARKS, SHAPES, cuda_devices, small_integers
from reference import (
    FORMATS,
    HALVES,
    bits,
    dense_product,
    sparse_matrix,
)

import jax_flashllm
from jax_flashllm.formats import encode_on_host, on_gpu
from jax_flashllm.spmm import decode

pytestmark = MARKS


# ---- encoding where the weights lie ----


def _any_bits(shape, dtype, density, seed=0):
    """Any of the 65536 patterns: NaN payloads, Inf, -0.0, subnormals; zeros in clumps too."""
    rng = np.random.default_rng(seed)
    keep = rng.random(shape) < density
    if seed % 2:
        keep &= (np.arange(shape[0])[:, None] // 17 + np.arange(shape[1]) // 23) % 3 > 0
    keep[3::7] = density > 0  # a full row, and an empty one behind it
    keep[4::7] = False
    return np.where(keep, rng.integers(1, 1 << 16, shape, dtype=np.uint16), 0).view(dtype)


def _assert_same(got, expected):
    assert type(got) is type(expected)
    assert (got.shape, got.grid) == (expected.shape, expected.grid)
    for field in ("offsets", "values", "masks" if got.format == "bitmap" else "index"):
        a, b = getattr(got, field), getattr(expected, field)
        assert a.devices() == {cuda_devices()[0]}, field
        np.testing.assert_array_equal(bits(a), bits(b), err_msg=field)


@pytest.mark.filterwarnings("ignore:.*-0.0")
@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(
    "shape",
    [*SHAPES, (257, 2051), (1030, 1032), (4097, 300), (9, 1), (9, 63), (20, 12289), (9, 25000)],
    ids=str,
)
@pytest.mark.parametrize("format", FORMATS)
def test_encoding_on_the_gpu_makes_the_same_bits(format, shape, density):
    for i, shards in enumerate([1, 3, (2, 3)]):
        R, C = shards if isinstance(shards, tuple) else (shards, 1)
        if shape[0] < R or shape[1] < C:
            continue
        dense = _any_bits(shape, HALVES[i % 2], density, seed=i)
        got = jax_flashllm.encode(jnp.asarray(dense), format, shards)
        _assert_same(got, encode_on_host(dense, format, shards))


@pytest.mark.parametrize(("density", "format"), [(0.02, "delta_csr"), (0.4, "bitmap")])
def test_encoding_on_the_gpu_takes_the_same_format(density, format):
    for shards in (1, (2, 3)):
        dense = sparse_matrix((300, 12289), np.float16, density)
        w = jax_flashllm.encode(jnp.asarray(dense), shards=shards)
        assert w.format == format
        _assert_same(w, jax_flashllm.encode(dense, shards=shards))


def test_encoding_on_the_gpu_warns_of_negative_zeros():
    dense = np.full((64, 64), -0.0, np.float16)
    with pytest.warns(UserWarning, match="100% of the weights are -0.0"):
        w = jax_flashllm.encode(jnp.asarray(dense), "bitmap")
    np.testing.assert_array_equal(bits(w.to_dense()), bits(dense))


def test_encoding_on_the_gpu_refuses_what_the_host_does():
    with pytest.raises(TypeError, match="cast first"):
        jax_flashllm.encode(jnp.ones((4, 4), jnp.float32))
    with pytest.raises(TypeError, match="jit"):
        jax.jit(jax_flashllm.encode)(jnp.ones((4, 4), jnp.float16))


@pytest.mark.parametrize("format", FORMATS)
def test_encoding_needs_no_memory_besides_its_results(format):
    dense = jnp.asarray(sparse_matrix((1024, 2048), np.float16, 0.3))
    w = jax_flashllm.encode(dense, format)
    same = {"format": format, "grid": (1, 1)}
    sizes = {"capacity": w.values.shape[1], "index_capacity": w.buffers[0].shape[-1]}
    known = w.buffers if format == "bitmap" else (w.offsets,)
    count = on_gpu.count.lower(dense, step=8, **same)
    fill = on_gpu.fill.lower(known, dense, **same, **sizes)
    used = [p.compile().memory_analysis() for p in (count, fill)]
    assert sum(m.temp_size_in_bytes for m in used) <= 0.1 * w.nbytes
    assert sum(m.output_size_in_bytes for m in used) <= w.nbytes + 1024  # tables of results


# ---- decode and sample ----


@pytest.mark.filterwarnings("ignore:.*-0.0")
@pytest.mark.parametrize("density", [0.0, 0.005, 0.4, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, (9, 63), (20, 12289), (9, 25000)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_decode_is_bit_exact(format, shape, density):
    for i, shards in enumerate([1, 3, (2, 3)]):
        R, C = shards if isinstance(shards, tuple) else (shards, 1)
        if shape[0] < R or shape[1] < C:
            continue
        dense = _any_bits(shape, HALVES[i % 2], density, seed=i)
        w = jax_flashllm.encode(dense, format, shards)
        np.testing.assert_array_equal(bits(jax.jit(decode)(w)), bits(dense))


@pytest.mark.parametrize("shape", [(17, 65), (300, 768), (20, 12289)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_gradients(format, shape):
    dense = sparse_matrix(shape, np.float16, 0.4, integers=True)
    w = jax_flashllm.encode(dense, format=format, shards=2)
    x = small_integers((5, shape[1]), np.float16)
    g = small_integers((5, shape[0]), np.float16, seed=3)

    def loss(values, x):
        y = jax_flashllm.spmm(w.with_values(values), x)
        return (y.astype(jnp.float32) * g.astype(np.float32)).sum()

    dv, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(w.values, jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(dx), dense_product(g, dense.T))
    expected = dense_product(g.T, x.T) * (dense != 0)
    np.testing.assert_array_equal(w.with_values(dv).to_dense(), expected)
