"""Chains of products and decode attention on the GPU, against float64 and against XLA."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gpu import MARKS, multiply, normals, small_integers
from reference import (
    HALVES,
    DenseStage,
    assert_chain,
    bits,
    dense_product,
    sparse_matrix,
)

import jax_flashllm
from jax_flashllm import attention
from jax_flashllm.chain import Attend, Stage, chain
from jax_flashllm.models import opt, synthetic
from jax_flashllm.models.cache import KVCache
from jax_flashllm.models.config import OPTConfig

pytestmark = MARKS


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
        draw, add = small_integers if integers else normals, i in (0, 2)
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


MIXED = [["bitmap"], ["delta_csr"], ["bitmap", "delta_csr"], ["delta_csr", "bitmap", "bitmap"]]


@pytest.mark.parametrize("n", [1, 3, 8, 17, 31, 32])
@pytest.mark.parametrize(("H", "F"), [(64, 64), (192, 1024), (2048, 8192)])
def test_chains_of_integers_are_exact(H, F, n):
    stages = _row(H, F, np.float16, integers=True, ragged=n % 8)
    x, h = small_integers((n, H), np.float16), small_integers((n, H), np.float16, seed=2)
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
        x, h = normals((n, H), dtype), normals((n, H), dtype, seed=2) * dtype.type(3)
        coded = _encoded(stages, MIXED[(i + n) % 4])
        assert_chain([_chain(x, h, coded[: j + 1]) for j in range(4)], x, h, stages)


@pytest.mark.parametrize(("H", "F"), [(200, 320), (8, 64), (1000, 1024), (16384, 128)])
def test_chains_of_ragged_rows(H, F):
    """fc1 and fc2 alone, H no multiple of what a tile has; and its largest."""
    K = 128
    for i, dtype in enumerate(HALVES):
        first = DenseStage(sparse_matrix((F, K), dtype, 0.4), normals((F,), np.float32), "gelu")
        last = DenseStage(
            sparse_matrix((H, F), dtype, 0.4, seed=1), normals((H,), np.float32, seed=3), None,
            True, normals((H,), np.float32, seed=4), None,
        )  # fmt: skip
        x, h = normals((5, K), dtype), normals((5, H), dtype, seed=2)
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
    x = normals((3, 64), np.float16) * np.float16(2**-6)
    h = (2000 + small_integers((3, H), np.float32)).astype(np.float16)
    h[1] = 2000  # and hardly a variance
    assert_chain([_chain(x, h, _encoded([stage], ["bitmap"]))], x, h, [stage])


def test_inf_and_nan_stay_in_their_token():
    stages = _row(128, 256, np.float16)
    coded = _encoded(stages, ["bitmap", "delta_csr"])
    x, h = normals((4, 128), np.float16), normals((4, 128), np.float16, seed=2)
    clean = _chain(x, h, coded)
    x[1, 3], h[2, 5] = np.nan, np.inf
    for a, b in zip(_chain(x, h, coded), clean, strict=True):
        np.testing.assert_array_equal(bits(a)[[0, 3]], bits(b)[[0, 3]])
        assert np.isnan(np.asarray(a)[1]).all()
    assert np.isnan(np.asarray(_chain(x, h, coded)[1])[2]).all()


@pytest.mark.parametrize("formats", MIXED[:3], ids=str)
def test_a_chain_gives_the_same_bits_every_time_and_in_every_batch(formats):
    stages = _encoded(_row(1024, 4096, np.float16), formats)
    x, h = normals((32, 1024), np.float16), normals((32, 1024), np.float16, seed=2)
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
    bias = jnp.asarray(normals(shape[:1], dtype, seed=2))
    x, h = normals((32, shape[1]), dtype), normals((32, 64), dtype, seed=3)
    for n in (1, 16, 17, 24, 32):
        _, y = _chain(x[:n], h[:n], [Stage(w, bias, "relu")])
        alone = multiply(w, x[:n], bias, "relu")
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

    x, h = (jnp.asarray(normals((4, 256), np.float16, seed=s)) for s in (1, 2))
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
    x, h = (jnp.asarray(normals((8, 2048), np.float16, seed=s)) for s in (1, 2))

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
    x, h = normals((3, 5, 128), np.float16), normals((3, 5, 128), np.float16, seed=2)
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
    stages = _encoded([qkv, *rest], ["bitmap", "delta_csr"])
    held = normals((2 * layers, B * h, S, d), np.float32)
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

    x, residual = (jnp.asarray(normals((B, H), dtype, seed=s)) for s in (1, 2))
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
