"""The CUDA kernels against float64 references. Run on a GPU with `pytest -m gpu`."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference import (
    FLOATS,
    FORMATS,
    HALVES,
    DenseStage,
    assert_chain,
    assert_product,
    bits,
    dense_product,
    sparse_matrix,
)

import jax_flashllm
from jax_flashllm import _flashllm, attention, plan
from jax_flashllm.chain import Attend, Stage, chain
from jax_flashllm.formats import encode_on_host, on_gpu
from jax_flashllm.models import opt, synthetic
from jax_flashllm.models.cache import KVCache
from jax_flashllm.models.config import OPTConfig
from jax_flashllm.spmm import decode


def _cuda_devices():
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _cuda_devices(), reason="no CUDA device"),
    pytest.mark.skipif(not hasattr(_flashllm, "cuda_targets"), reason="built without CUDA"),
]

SHAPES = [(1, 1), (16, 64), (17, 65), (128, 256), (130, 257), (64, 1000), (300, 768), (1, 4096)]
LARGE = [(2048, 2048), (1111, 4104), (5000, 640), (72, 16384)]
TOKENS = [1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 200]


def _integers(shape, dtype, seed=1):
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32).astype(dtype)


def _normals(shape, dtype, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype)


def _multiply(w, x, bias=None, activation=None):
    return jax.jit(jax_flashllm.spmm, static_argnames="activation")(
        w, jnp.asarray(x), None if bias is None else jnp.asarray(bias), activation=activation
    )


# ---- indexing: sums of small integers are exact in fp32, so every bit must match ----


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_integers_are_exact(format, shape, density):
    dense = sparse_matrix(shape, np.float16, density, seed=sum(shape), integers=True)
    w = jax_flashllm.encode(dense, format=format)
    tokens = TOKENS if shape in SHAPES else [1, 8, 33, 130]
    for n, dtype in zip(tokens, itertools.cycle(FLOATS), strict=False):
        x = _integers((n, shape[1]), dtype)
        ref = dense_product(x, dense)
        y = np.asarray(_multiply(w, x))
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
        x = _integers((n, k), token, seed=i)
        y = np.asarray(_multiply(jax_flashllm.encode(exact, format), x))
        ref = dense_product(x, exact).astype(np.float32).astype(token)
        np.testing.assert_array_equal(y, ref, err_msg=info)
        x = _normals((n, k), token, seed=i)
        assert_product(_multiply(jax_flashllm.encode(rounded, format), x), x, rounded)


@pytest.mark.parametrize("shape", [(1000, 1100), (5000, 1500)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_every_cut_is_exact(format, shape):
    """What the model, its table or `tune` may choose."""
    dense = sparse_matrix(shape, np.float16, 0.4, integers=True)
    w = jax_flashllm.encode(dense, format)
    cuts = plan.cuts(format, shape[0], 1, shape[1], plan.device())
    for cut, n in itertools.product(cuts, (8, 20, 40)):
        x = _integers((n, shape[1]), np.float16)
        with plan.forced(cut):
            y = jax.jit(lambda w, x: jax_flashllm.spmm(w, x))(w, x)
        ref = dense_product(x, dense).astype(np.float16)
        np.testing.assert_array_equal(np.asarray(y), ref, err_msg=f"{cut}, {n=}")


@pytest.mark.parametrize("n", [0, 1000, 16384])
@pytest.mark.parametrize("format", FORMATS)
def test_no_tokens_and_many(format, n):
    dense = sparse_matrix((200, 328), np.float16, 0.3, integers=True)
    x = _integers((n, 328), np.float16)
    y = np.asarray(_multiply(jax_flashllm.encode(dense, format), x))
    np.testing.assert_array_equal(y, dense_product(x, dense).astype(np.float16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_many_tokens_are_exact(shape, density, dtype):
    """On Hopper the wide kernel: its groups of tokens, full and not."""
    dense = sparse_matrix(shape, dtype, density, seed=sum(shape), integers=True)
    w = jax_flashllm.encode(dense, format="bitmap")
    x = _integers((1000, shape[1]), dtype)
    ref = dense_product(x, dense).astype(np.float32).astype(dtype)
    for n in (17, 32, 33, 64, 65, 100, 128, 129, 200, 256, 257, 300, 512, 1000):
        np.testing.assert_array_equal(np.asarray(_multiply(w, x[:n])), ref[:n], err_msg=f"{n=}")


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_many_tokens_stay_in_bound(dtype, activation):
    shapes = [(256, 512), (100, 1030), (2048, 4096), (1000, 4096)]
    for (m, k), n in zip(shapes, [64, 129, 300, 20], strict=True):
        dense = sparse_matrix((m, k), dtype, 0.3)
        x, bias = _normals((n, k), dtype), _normals((m,), dtype, seed=2)
        y = _multiply(jax_flashllm.encode(dense, format="bitmap", shards=2), x, bias, activation)
        assert_product(y, x, dense, bias, activation)


def test_inf_and_nan_among_many_tokens():
    dense = sparse_matrix((96, 192), np.float16, 0.3)
    dense[5, 7], dense[40, 100] = np.inf, np.nan
    x = _normals((130, 192), np.float16)
    x[1, 3], x[2, 100], x[129, 150] = np.inf, np.nan, -np.inf
    with np.errstate(invalid="ignore"):
        ref = dense_product(x, dense)
    w = jax_flashllm.encode(dense, format="bitmap")
    for n in (17, 64, 128, 130):
        y = np.asarray(_multiply(w, x[:n])).astype(np.float64)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(ref[:n]))
        np.testing.assert_array_equal(y[np.isinf(ref[:n])], ref[:n][np.isinf(ref[:n])])


@pytest.mark.parametrize("shards", [2, 3, 7])
@pytest.mark.parametrize("format", FORMATS)
def test_row_blocks(format, shards):
    dense = sparse_matrix((333, 520), np.float16, 0.4, integers=True)
    x = _integers((9, 520), np.float32)
    y = _multiply(jax_flashllm.encode(dense, format=format, shards=shards), x)
    np.testing.assert_array_equal(np.asarray(y), dense_product(x, dense))


# ---- rounding ----


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("token", FLOATS, ids=str)
@pytest.mark.parametrize("weight", HALVES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_rounding_stays_in_bound(format, weight, token, activation):
    for (m, k), n in zip([(256, 512), (100, 1030), (2048, 4096)], [1, 5, 40], strict=True):
        dense = sparse_matrix((m, k), weight, 0.3)
        x, bias = _normals((n, k), token), _normals((m,), token, seed=2)
        y = _multiply(jax_flashllm.encode(dense, format=format), x, bias, activation)
        assert y.dtype == token
        assert_product(y, x, dense, bias, activation)


@pytest.mark.parametrize("exponent", [-100, -30, 30, 90])
@pytest.mark.parametrize("weight", HALVES, ids=str)
def test_float32_tokens_keep_their_range(weight, exponent):
    dense = sparse_matrix((64, 256), weight, 0.3)
    x = _normals((3, 256), np.float32) * np.float32(2.0**exponent)
    assert_product(_multiply(jax_flashllm.encode(dense, format="bitmap"), x), x, dense)


@pytest.mark.parametrize("token", FLOATS, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_inf_and_nan_meet_zeros_too(format, token):
    dense = sparse_matrix((96, 192), np.float16, 0.3)
    dense[5, 7], dense[40, 100] = np.inf, np.nan
    x = _normals((6, 192), token)
    x[1, 3], x[2, 100], x[3, 150] = np.inf, np.nan, -np.inf
    with np.errstate(invalid="ignore"):
        ref = dense_product(x, dense)
    y = np.asarray(_multiply(jax_flashllm.encode(dense, format=format), x)).astype(np.float64)
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
    x = _normals((64, 14848), np.float16)
    run = jax.jit(lambda w, x: jax_flashllm.spmm(w, x))  # a new one: traced in this environment
    first = bits(run(w, x))
    few = bits(run(w, x[:16]))
    for _ in range(100):
        np.testing.assert_array_equal(bits(run(w, x)), first)
        np.testing.assert_array_equal(bits(run(w, x[:16])), few)
    for n in (1, 5, 8, 16, 17, 31, 32, 33, 48):
        np.testing.assert_array_equal(bits(run(w, x[:n])), (first if n > 16 else few)[:n])
    same = invariant or density < 0.5 or format != "bitmap"
    assert (few == first[:16]).all() == same


@pytest.mark.parametrize("token", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_same_bits_in_every_batch_of_tokens_in_terms(format, token, monkeypatch):
    """Each is two or three to the kernels, in up to three groups of 64."""
    monkeypatch.setenv("JAX_FLASHLLM_BATCH_INVARIANT", "1")
    w = jax_flashllm.encode(sparse_matrix((1936, 14848), np.float16, 0.5), format=format)
    x = _normals((64, 14848), token)
    run = jax.jit(lambda w, x: jax_flashllm.spmm(w, x))
    all_64 = bits(run(w, x))
    np.testing.assert_array_equal(bits(run(w, x)), all_64)
    for n in (1, 3, 8, 16, 21, 22, 32, 33, 48, 63):
        np.testing.assert_array_equal(bits(run(w, x[:n])), all_64[:n], err_msg=f"{n=}")


# ---- encoding where the weights lie ----


def _any_bits(shape, dtype, density, seed=0):
    """Any of the 65536 patterns: NaN payloads, Inf, -0.0, subnormals; zeros in clumps too."""
    rng = np.random.default_rng(seed)
    keep = rng.random(shape) < density
    if seed % 2:
        keep &= (np.arange(shape[0])[:, None] // 17 + np.arange(shape[1]) // 23) % 3 > 0
    return np.where(keep, rng.integers(1, 1 << 16, shape, dtype=np.uint16), 0).view(dtype)


def _assert_same(got, expected):
    assert type(got) is type(expected)
    assert (got.shape, got.grid) == (expected.shape, expected.grid)
    for field in ("offsets", "values", "masks" if got.format == "bitmap" else "index"):
        a, b = getattr(got, field), getattr(expected, field)
        assert a.devices() == {_cuda_devices()[0]}, field
        np.testing.assert_array_equal(bits(a), bits(b), err_msg=field)


@pytest.mark.filterwarnings("ignore:.*-0.0")
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, (257, 2051), (1030, 1032), (4097, 300)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_encoding_on_the_gpu_makes_the_same_bits(format, shape, density):
    for i, shards in enumerate([1, 3, (2, 3)]):
        R, C = shards if isinstance(shards, tuple) else (shards, 1)
        if shape[0] < R or shape[1] < C:
            continue
        dense = _any_bits(shape, HALVES[i % 2], density, seed=i)
        got = jax_flashllm.encode(jnp.asarray(dense), format, shards)
        _assert_same(got, encode_on_host(dense, format, shards))


@pytest.mark.parametrize("density", [0.02, 0.4])
def test_encoding_on_the_gpu_takes_the_same_format(density):
    dense = sparse_matrix((300, 768), np.float16, density)
    _assert_same(jax_flashllm.encode(jnp.asarray(dense)), jax_flashllm.encode(dense))


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


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_decode_is_bit_exact(format, dtype, shape, shards):
    dense = sparse_matrix(shape, dtype, 0.4)
    w = jax_flashllm.encode(dense, format=format, shards=min(shards, shape[0]))
    np.testing.assert_array_equal(bits(jax.jit(decode)(w)), bits(dense))


@pytest.mark.parametrize("shape", [(17, 65), (300, 768)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_gradients(format, shape):
    dense = sparse_matrix(shape, np.float16, 0.4, integers=True)
    w = jax_flashllm.encode(dense, format=format, shards=2)
    x, g = _integers((5, shape[1]), np.float16), _integers((5, shape[0]), np.float16, seed=3)

    def loss(values, x):
        y = jax_flashllm.spmm(w.with_values(values), x)
        return (y.astype(jnp.float32) * g.astype(np.float32)).sum()

    dv, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(w.values, jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(dx), dense_product(g, dense.T))
    expected = dense_product(g.T, x.T) * (dense != 0)
    np.testing.assert_array_equal(w.with_values(dv).to_dense(), expected)


# ---- JAX ----


@pytest.mark.parametrize("format", FORMATS)
def test_vmap_and_leading_axes(format):
    dense = sparse_matrix((100, 128), np.float16, 0.4, integers=True)
    w = jax_flashllm.encode(dense, format=format)
    x = _integers((3, 2, 4, 128), np.float16)
    ref = dense_product(x, dense)
    np.testing.assert_array_equal(np.asarray(_multiply(w, x)), ref)
    mapped = jax.jit(jax.vmap(jax.vmap(functools.partial(jax_flashllm.spmm, w))))
    np.testing.assert_array_equal(np.asarray(mapped(jnp.asarray(x))), ref)


@pytest.mark.parametrize("format", FORMATS)
def test_scan_over_stacked_weights(format):
    from jax_flashllm.formats import stack

    layers = [sparse_matrix((128, 128), np.float16, 0.1, seed=s, integers=True) for s in range(4)]
    stacked = stack([jax_flashllm.encode(d, format=format) for d in layers])
    x = np.sign(_integers((2, 128), np.float32))

    @jax.jit
    def run(ws, x):
        def step(x, w):
            y = jnp.sign(jax_flashllm.spmm(w, x))
            return y, y

        return jax.lax.scan(step, x, ws)

    _, ys = run(stacked, jnp.asarray(x))
    for y, dense in zip(np.asarray(ys), layers, strict=True):
        x = np.sign(dense_product(x, dense))
        np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("format", FORMATS)
def test_runs_inside_a_command_buffer(format):
    """Weights through a chain of products captured as one CUDA graph, replayed with new x."""
    dense = sparse_matrix((256, 256), ml_dtypes.bfloat16, 0.3)
    w = jax_flashllm.encode(dense, format=format)

    def chain(w, x):
        for _ in range(6):
            x = jax_flashllm.spmm(w, x, activation="relu") / 8
        return x

    x0 = jnp.asarray(_normals((4, 256), ml_dtypes.bfloat16))
    options = {"xla_gpu_graph_min_graph_size": 1}
    compiled = jax.jit(chain).lower(w, x0).compile(compiler_options=options)
    eager = chain(w, x0)
    for _ in range(4):
        np.testing.assert_array_equal(bits(compiled(w, x0)), bits(eager))
    x1 = x0 + 1
    np.testing.assert_array_equal(bits(compiled(w, x1)), bits(chain(w, x1)))
    hlo = compiled.as_text()
    assert f"flashllm_spmm_{format}_v1" in hlo


@pytest.mark.parametrize("format", FORMATS)
def test_a_command_buffer_holds_every_product(format, tmp_path, fresh_process):
    """What XLA says it runs: products inside command buffers, and none outside."""
    fresh_process(
        """
import os, sys
os.environ["XLA_FLAGS"] = f"--xla_dump_to={sys.argv[2]} --xla_gpu_graph_min_graph_size=1"
import jax, jax.numpy as jnp, numpy as np, jax_flashllm
w = jax_flashllm.encode(np.eye(256, dtype=np.float16), sys.argv[1])
def chain(w, x):
    for _ in range(6):
        x = jax_flashllm.spmm(w, x, activation="relu") / 8
    return x
jax.jit(chain)(w, jnp.ones((4, 256), jnp.float16)).block_until_ready()
""",
        format,
        str(tmp_path),
    )
    dumps = sorted(tmp_path.glob("*jit_chain*thunk_sequence*"))
    assert dumps, sorted(f.name for f in tmp_path.iterdir())
    text = dumps[-1].read_text()
    assert "kCommandBuffer" in text, text
    outside = [line for line in text.splitlines() if "kCustomCall" in line and line[:1] != " "]
    assert not outside, text


def test_two_devices():
    devices = _cuda_devices()
    if len(devices) < 2:
        pytest.skip("one CUDA device only")
    dense = sparse_matrix((256, 512), np.float16, 0.4, integers=True)
    w = jax_flashllm.encode(dense, format="bitmap")
    x = _integers((4, 512), np.float16)
    for device in devices[:2]:
        y = _multiply(jax.device_put(w, device), jax.device_put(x, device))
        assert y.devices() == {device}
        np.testing.assert_array_equal(np.asarray(y), dense_product(x, dense))


def test_garbage_stays_inside_the_buffers():
    """Offsets, masks, codes and positions that lie give wrong numbers, never a fault."""
    import dataclasses

    dense = sparse_matrix((200, 600), np.float16, 0.5)
    x = jnp.asarray(_normals((4, 600), np.float16))
    rng = np.random.default_rng(0)
    for format in FORMATS:
        w = jax_flashllm.encode(dense, format=format)
        noise = jnp.asarray(rng.integers(0, 2**32, w.offsets.shape, dtype=np.uint32))
        broken = dataclasses.replace(w, offsets=noise)
        if format == "bitmap":
            broken = [dataclasses.replace(broken, masks=jnp.full_like(w.masks, 2**32 - 1))]
        else:
            broken = [broken, dataclasses.replace(w, index=jnp.full_like(w.index, 2**32 - 1))]
        for f, b in itertools.product((lambda w: jax_flashllm.spmm(w, x), decode), broken):
            jax.block_until_ready(jax.jit(f)(b))
        for n in (20, 64, 128, 300):
            many = jnp.ones((n, 600), jnp.float16)
            for b in broken:
                jax.block_until_ready(jax.jit(jax_flashllm.spmm)(b, many))
    ok = jax_flashllm.encode(dense, format="bitmap")
    assert_product(_multiply(ok, x), x, dense)


# ---- decode attention ----


def _attention(qkv, keys, values, mask, length):
    """In float64: the new token's k and v rounded as the cache rounds, and the rest as it is."""
    B, _, h, d = qkv.shape
    qkv = qkv.astype(np.float64)
    keys, values = (a.astype(np.float64).reshape(B, h, -1, d) for a in (keys, values))
    scores = np.einsum("bhd,bhsd->bhs", qkv[:, 0], keys[:, :, : length + 1]) * d**-0.5
    scores = np.where(mask[:, None, : length + 1], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhs,bhsd->bhd", weights, values[:, :, : length + 1]).reshape(B, h * d)


CACHES = ["float16", "bfloat16", "float32", "float8_e4m3fn"]
CACHE_SHAPES = [
    (1, 3, 128, 640, 0), (2, 4, 128, 640, 63), (3, 2, 64, 600, 599), (2, 2, 80, 100, 77),
    (8, 7, 128, 333, 320), (1, 1, 256, 65, 64), (1, 2, 16, 40, 11),
]  # fmt: skip
CASES = [
    (cache_dtype, *shape)
    for cache_dtype, shape in itertools.product(CACHES, CACHE_SHAPES)
    if not (cache_dtype == "float32" and shape[2] > 128)  # XLA's
]


@pytest.mark.parametrize(("cache_dtype", "B", "h", "d", "S", "length"), CASES)
def test_decode_attention_reads_what_is_written_and_no_more(cache_dtype, B, h, d, S, length):
    token = np.dtype(np.float32 if cache_dtype == "float32" else np.float16)
    cache = jnp.dtype(cache_dtype)
    random = np.random.default_rng(length)
    qkv = random.standard_normal((B, 3, h, d)).astype(token)
    # NaN where nothing was written: a kernel that looks there shows it.
    held = np.full((2, B * h, S, d), np.nan, np.float32)
    held[:, :, :length] = random.standard_normal((2, B * h, length, d))
    keys, values = (jnp.asarray(a).astype(cache) for a in held)
    mask = np.arange(S) <= length
    mask = np.broadcast_to(mask, (B, S)).copy()
    mask[0, : length // 3] = False  # pads
    operands = jnp.asarray(qkv), keys, values, jnp.asarray(mask), jnp.int32(length)
    assert attention.supports(operands[1])
    step = jax.jit(attention.decode, donate_argnums=(1, 2))
    assert "flashllm_decode_attention_v1" in step.lower(*operands).as_text()
    y, keys, values = step(*operands)
    expected = held
    for i, new in enumerate((qkv[:, 1], qkv[:, 2])):
        expected[i, :, length] = new.reshape(B * h, d)
        stored = np.asarray((keys, values)[i].astype(jnp.float32))
        rounded = np.asarray(jnp.asarray(expected[i]).astype(cache).astype(jnp.float32))
        np.testing.assert_array_equal(stored, rounded)
        expected[i] = rounded
    exact = _attention(qkv, *expected, mask, length)
    # The output is rounded once; float32 sums of up to S terms before.
    unit = 2.0**-11 if token == np.float16 else 2.0**-20
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2 * unit, atol=5e-6)


def test_a_row_that_sees_nothing_is_finite():
    qkv = jnp.ones((1, 3, 2, 64), jnp.float16)
    held = jnp.zeros((2, 8, 64), jnp.float16)
    y, *_ = jax.jit(attention.decode)(qkv, held, held, jnp.zeros((1, 8), bool), jnp.int32(3))
    assert np.isfinite(np.asarray(y)).all()


# ---- chains ----


def _row(H, F, dtype, bias=True, affine=True, integers=False, ragged=0):
    """out_proj, fc1, fc2 and qkv_proj of a layer, `ragged` rows more in the last."""
    stages = []
    for i, (m, k) in enumerate([(H, H), (F, H), (H, F), (3 * H + ragged, H)]):
        # Of integers few, so that sums stay below 2048, where fp16 holds every one.
        w = sparse_matrix((m, k), dtype, 24 / k if integers else 0.3, seed=i, integers=integers)
        draw, add = _integers if integers else _normals, i in (0, 2)
        scale, shift = (draw((H,), dtype, seed=s + i) if affine and add else None for s in (20, 30))
        if integers and add:
            scale = np.zeros(H, dtype)  # x is the shift then
        b = draw((m,), dtype, seed=10 + i) if bias else None
        stages.append(DenseStage(w, b, "relu" if i == 1 else None, add, scale, shift))
    return stages


def _encoded(stages, formats):
    formats = itertools.cycle(formats)
    return [Stage(jax_flashllm.encode(s.w, next(formats)), *s[1:]) for s in stages]


def _chain(x, h, stages):
    x, h = jnp.asarray(x), jnp.asarray(h)
    assert "flashllm_chain_v1" in jax.jit(chain).lower(x, h, stages).as_text()
    return jax.jit(chain)(x, h, stages)


MIXED = [["bitmap"], ["tiled_csl"], ["bitmap", "tiled_csl"], ["tiled_csl", "bitmap", "bitmap"]]


@pytest.mark.parametrize("n", [1, 3, 8, 17, 31, 32])
@pytest.mark.parametrize(("H", "F"), [(64, 64), (192, 1024), (2048, 8192)])
def test_chains_of_integers_are_exact(H, F, n):
    stages = _row(H, F, np.float16, integers=True, ragged=n % 8)
    x, h = _integers((n, H), np.float16), _integers((n, H), np.float16, seed=2)
    expected_h, expected_x = h.astype(np.float64), x.astype(np.float64)
    for s in stages:
        expected_x = dense_product(expected_x, s.w, s.bias)
        if s.activation:
            expected_x = np.maximum(expected_x, 0)
        if s.add:
            expected_h = expected_h + expected_x
            expected_x = np.broadcast_to(s.shift.astype(np.float64), h.shape)
    assert max(np.abs(expected_h).max(), np.abs(expected_x).max()) < 2048
    for formats in MIXED:
        got_h, got_x = _chain(x, h, _encoded(stages, formats))
        np.testing.assert_array_equal(np.asarray(got_h), expected_h.astype(np.float16))
        np.testing.assert_array_equal(np.asarray(got_x), expected_x.astype(np.float16))


@pytest.mark.parametrize("n", [1, 3, 8, 17, 31, 32])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_chains_stay_in_bound(dtype, n):
    for i, (H, F) in enumerate([(64, 192), (768, 3072), (1024, 4096)]):
        stages = _row(H, F, dtype, bias=i != 0, affine=i != 1, ragged=i)
        stages[1] = stages[1]._replace(activation=(None, "relu", "gelu")[(i + n) % 3])
        x, h = _normals((n, H), dtype), _normals((n, H), dtype, seed=2) * dtype.type(3)
        coded = _encoded(stages, MIXED[(i + n) % 4])
        assert_chain([_chain(x, h, coded[: j + 1]) for j in range(4)], x, h, stages)


@pytest.mark.parametrize(("H", "F"), [(200, 320), (8, 64), (1000, 1024), (16384, 128)])
def test_chains_of_ragged_rows(H, F):
    """fc1 and fc2 alone, H no multiple of what a tile has; and its largest."""
    K = 128
    for i, dtype in enumerate(HALVES):
        first = DenseStage(sparse_matrix((F, K), dtype, 0.4), _normals((F,), np.float32), "gelu")
        last = DenseStage(
            sparse_matrix((H, F), dtype, 0.4, seed=1), _normals((H,), np.float32, seed=3), None,
            True, _normals((H,), np.float32, seed=4), None,
        )  # fmt: skip
        x, h = _normals((5, K), dtype), _normals((5, H), dtype, seed=2)
        stages = [first, last]
        for formats in MIXED:
            coded = _encoded(stages, formats)
            assert_chain([_chain(x, h, coded[: j + 1]) for j in range(2)], x, h, stages)
        alone = DenseStage(sparse_matrix((H, K), dtype, 0.4, seed=i), add=True)
        assert_chain([_chain(x, h, _encoded([alone], MIXED[i]))], x, h, [alone])


def test_norms_of_rows_far_from_zero():
    """E[h^2] - E[h]^2 would be all rounding here."""
    H = 4096
    stage = DenseStage(sparse_matrix((H, 64), np.float16, 0.3), add=True)
    x = _normals((3, 64), np.float16) * np.float16(2**-6)
    h = (2000 + _integers((3, H), np.float32)).astype(np.float16)
    h[1] = 2000  # and hardly a variance
    assert_chain([_chain(x, h, _encoded([stage], ["bitmap"]))], x, h, [stage])


def test_inf_and_nan_stay_in_their_token():
    stages = _row(128, 256, np.float16)
    coded = _encoded(stages, ["bitmap", "tiled_csl"])
    x, h = _normals((4, 128), np.float16), _normals((4, 128), np.float16, seed=2)
    clean = _chain(x, h, coded)
    x[1, 3], h[2, 5] = np.nan, np.inf
    for a, b in zip(_chain(x, h, coded), clean, strict=True):
        np.testing.assert_array_equal(bits(a)[[0, 3]], bits(b)[[0, 3]])
        assert np.isnan(np.asarray(a)[1]).all()
    assert np.isnan(np.asarray(_chain(x, h, coded)[1])[2]).all()


@pytest.mark.parametrize("formats", MIXED[:3], ids=str)
def test_a_chain_gives_the_same_bits_every_time_and_in_every_batch(formats):
    stages = _encoded(_row(1024, 4096, np.float16), formats)
    x, h = _normals((32, 1024), np.float16), _normals((32, 1024), np.float16, seed=2)
    first = [bits(a) for a in _chain(x, h, stages)]
    run = jax.jit(chain)
    for _ in range(100):
        for a, b in zip(run(jnp.asarray(x), jnp.asarray(h), stages), first, strict=True):
            np.testing.assert_array_equal(bits(a), b)
    for n in (1, 3, 8, 9, 16, 17, 31):
        for a, b in zip(_chain(x[:n], h[:n], stages), first, strict=True):
            np.testing.assert_array_equal(bits(a), b[:n], err_msg=f"{n=}")


@pytest.mark.parametrize("shape", [(7168, 2048), (1024, 8192), (520, 192)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_product_gives_the_same_bits_in_a_chain_and_alone(dtype, shape):
    """On Hopper 17 tokens or more are multiplied with wgmma alone, with mma in a chain."""
    w = jax_flashllm.encode(sparse_matrix(shape, dtype, 0.4), "bitmap")
    bias = jnp.asarray(_normals(shape[:1], dtype, seed=2))
    x, h = _normals((32, shape[1]), dtype), _normals((32, 64), dtype, seed=3)
    for n in (1, 16, 17, 24, 32):
        _, y = _chain(x[:n], h[:n], [Stage(w, bias, "relu")])
        alone = _multiply(w, x[:n], bias, "relu")
        np.testing.assert_array_equal(bits(y), bits(alone), err_msg=f"{n=}")


@pytest.mark.parametrize("formats", MIXED[:3], ids=str)
def test_chains_inside_a_command_buffer(formats):
    """Layers of chains, replayed with other operands, with another op of XLA's in between."""
    stages = _encoded(_row(256, 512, np.float16), formats)

    def layers(x, h, stages):
        for _ in range(5):
            h, x = chain(x[:, :256], h, stages)
            x = x / 2
        return h, x

    x, h = (jnp.asarray(_normals((4, 256), np.float16, seed=s)) for s in (1, 2))
    options = {"xla_gpu_graph_min_graph_size": 1}
    compiled = jax.jit(layers).lower(x, h, stages).compile(compiler_options=options)
    off = {"xla_gpu_enable_command_buffer": ""}
    plain = jax.jit(layers).lower(x, h, stages).compile(compiler_options=off)
    for i in range(4):
        for a, b in zip(compiled(x + i, h, stages), plain(x + i, h, stages), strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))


def test_chains_behind_one_another_wait():
    """A chain starts loading before what it reads is there: with many in flight it would show."""
    stages = _encoded(_row(2048, 8192, np.float16), ["bitmap"])
    x, h = (jnp.asarray(_normals((8, 2048), np.float16, seed=s)) for s in (1, 2))

    @jax.jit
    def layers(x, h, stages):
        for _ in range(8):
            h, x = chain(x[:, :2048], h, stages)
        return h, x

    together = layers(x, h, stages)
    one = jax.jit(chain)
    y, g = x, h
    for _ in range(8):
        g, y = jax.block_until_ready(one(y[:, :2048], g, stages))
    for a, b in zip(together, (g, y), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def test_a_batched_chain_is_one_call():
    stages = _encoded(_row(128, 256, np.float16), ["bitmap"])
    x, h = _normals((3, 5, 128), np.float16), _normals((3, 5, 128), np.float16, seed=2)
    mapped = jax.jit(jax.vmap(lambda x, h: chain(x, h, stages)))
    assert mapped.lower(x, h).as_text().count("@flashllm_chain_v1") == 1
    for a, b in zip(mapped(x, h), _chain(x, h, stages), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize(("B", "h", "d"), [(1, 8, 128), (3, 12, 64), (8, 4, 80), (32, 4, 128)])
def test_attention_in_a_chain_is_attention_behind_one(B, h, d, cache_dtype):
    """Steps in a loop on the device, one call each, against calls that wait for one another."""
    H, S, layers, steps = h * d, 90, 3, 40
    dtype = ml_dtypes.bfloat16 if cache_dtype == "bfloat16" else np.float16
    *rest, qkv = _row(H, 2048, dtype)
    qkv = qkv._replace(w=(qkv.w / 16).astype(dtype))  # so that many slots count
    stages = _encoded([qkv, *rest], ["bitmap", "tiled_csl"])
    held = _normals((2 * layers, B * h, S, d), np.float32)
    held = [jnp.asarray(a).astype(cache_dtype) for a in held]
    mask = jnp.arange(S) >= jnp.arange(B)[:, None]  # pads

    def step(length, carry):
        x, _, held = carry
        open = mask & (jnp.arange(S) <= length)
        row = []
        for i in range(layers):
            row += [stages[0], Attend(held[2 * i], held[2 * i + 1], open, length), *stages[1:]]
        h, x, *held = chain(x, residual, row)
        return x, h, held

    @functools.partial(jax.jit, donate_argnums=1)
    def together(x, held):
        return jax.lax.fori_loop(40, 40 + steps, step, (x, residual, held))

    x, residual = (jnp.asarray(_normals((B, H), dtype, seed=s)) for s in (1, 2))
    lowered = together.lower(x, held)
    assert lowered.as_text().count("@flashllm_chain_v1") == 1
    assert "flashllm_decode_attention_v1" not in lowered.as_text()
    compiled = lowered.compile(compiler_options={"xla_gpu_graph_min_graph_size": 1})
    shape = ",".join(map(str, held[0].shape))
    assert not re.findall(rf"\[{shape}\]\S* copy\(", compiled.as_text())
    got = compiled(x, [jnp.copy(a) for a in held])

    one = jax.jit(chain)
    attend = jax.jit(attention.decode, donate_argnums=(1, 2))
    want, g = [jnp.copy(a) for a in held], residual
    for length in range(40, 40 + steps):
        open, g = mask & (jnp.arange(S) <= length), residual
        for i in range(layers):
            _, q = jax.block_until_ready(one(x, g, stages[:1]))
            kv = want[2 * i : 2 * i + 2]
            y, *kv = attend(q.reshape(B, 3, h, d), *kv, open, jnp.int32(length))
            want[2 * i : 2 * i + 2] = jax.block_until_ready(kv)
            g, x = jax.block_until_ready(one(y, g, stages[1:]))
    for a, b in zip(jax.tree.leaves(got), [x, g, *want], strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("B", [1, 8, 20])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_opt_decodes_as_without_chains(dtype, B, monkeypatch):
    config = OPTConfig(
        vocab_size=1000, hidden_size=768, num_hidden_layers=6, num_attention_heads=12,
        ffn_dim=3072, max_position_embeddings=128,
    )  # fmt: skip
    model = synthetic.synthesize(config, 0.6, dtype)
    ids = np.random.default_rng(0).integers(3, 1000, (B, 12)).astype(np.int32)

    def decoded():
        cache = KVCache.create(config, B, 16, dtype)
        _, cache = jax.jit(model)(ids[:, :8], None, cache)
        step = jax.jit(lambda *args: model(*args))
        calls = step.lower(ids[:, :1], None, cache).as_text().count("@flashllm_chain_v1")
        logits = []
        for i in range(8, 12):
            y, cache = step(ids[:, i : i + 1], None, cache)
            logits.append(np.asarray(y))
        return calls, np.concatenate(logits, axis=1)

    calls, with_chains = decoded()
    assert calls == 1
    monkeypatch.setattr(opt.OPT, "_has_rows", False)
    calls, without = decoded()
    assert calls == 0
    error = np.abs(with_chains - without).max()
    assert error <= (0.01 if dtype == np.float16 else 0.08) * np.abs(without).max()
    # A token whose lead is smaller than both errors may be another's.
    best, second = np.sort(without)[..., :-3:-1].transpose(2, 0, 1)
    clear = best - second > 2 * error
    assert clear.mean() > 0.3
    same = with_chains.argmax(-1) == without.argmax(-1)
    assert same[clear].all()
