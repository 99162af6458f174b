"""The CUDA side as far as a machine without a GPU can check it."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference import assert_product, sparse_matrix

import jax_flashllm
from jax_flashllm import _flashllm, attention, kernel, plan
from jax_flashllm.formats import delta_csr, encode_on_host, on_gpu
from jax_flashllm.spmm import decode

needs_cuda_build = pytest.mark.skipif(
    not hasattr(_flashllm, "cuda_targets"), reason="built without CUDA"
)
DENSE_TOKENS = {"bitmap": plan.DENSE_TOKENS, "delta_csr": plan.DELTA_DENSE_TOKENS}
H100 = plan.Device(cores=132, warps=16, wgmma=True)
A100 = plan.Device(cores=108, warps=12, shared=163 << 10)
L40S = plan.Device(cores=142, warps=6, shared=99 << 10)


def _lowered(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@needs_cuda_build
@pytest.mark.parametrize("format", ["bitmap", "delta_csr"])
def test_lowering_holds_target_and_plan(format):
    w = jax_flashllm.encode(np.eye(100, 130, dtype=np.float16), format=format)
    x = jnp.ones((3, 130), jnp.float16)
    text = _lowered(lambda w, x: jax_flashllm.spmm(w, x, activation="gelu"), w, x)
    assert f"@flashllm_spmm_{format}_v1" in text
    for attribute in ("activation = 2", "m = 100", "k = 130", "ctas", "warps", "group", "chunk"):
        assert attribute in text
    assert "wide = 0" in text
    assert f"@flashllm_decode_{format}_v1" in _lowered(decode, w)


@needs_cuda_build
@pytest.mark.parametrize("format", ["bitmap", "delta_csr"])
def test_many_tokens_meet_a_decoded_weight(format, monkeypatch):
    monkeypatch.setattr(plan, "device", lambda: A100)
    w = jax_flashllm.encode(np.eye(100, 130, dtype=np.float16), format=format)
    many = DENSE_TOKENS[format]
    for n, dtype, decoded in [
        (many - 1, jnp.float16, False),
        (many, jnp.float16, True),
        (many, jnp.bfloat16, False),  # in terms
        (many, jnp.float32, False),
    ]:
        text = _lowered(jax_flashllm.spmm, w, jnp.ones((n, 130), dtype))
        assert (f"@flashllm_spmm_{format}_v1" in text) == (not decoded)
        assert (f"@flashllm_decode_{format}_v1" in text and "dot_general" in text) == decoded


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("format", ["bitmap", "delta_csr"])
def test_a_decoded_weight_multiplies_alike(format, shards, with_bias, activation, monkeypatch):
    """What a GPU runs for many tokens, run on a CPU, which has decode by the same name."""
    monkeypatch.setattr(plan, "device", lambda: A100)
    dense = sparse_matrix((100, 130), np.float16, 0.3)
    w = jax_flashllm.encode(dense, format, shards)
    many, rows = -(-DENSE_TOKENS[format] // 2), 3 * 34 if shards == 3 else 100
    x = np.random.default_rng(1).standard_normal((2, many, 130)).astype(np.float16)
    bias = np.linspace(-2, 2, 100, dtype=np.float16) if with_bias else None
    padded = np.zeros(0) if bias is None else np.pad(bias, (0, rows - 100))

    @jax.jit
    def product(w, x, bias):
        args = dict(format=format, shape=w.shape, activation=activation)
        return kernel._spmm_cuda(*w.buffers, w.values, x, bias, **args)

    y = np.asarray(product(w, x, padded.astype(np.float16)))
    assert y.shape == (2, many, rows)
    assert y.dtype == np.float16
    assert_product(y[..., :100].reshape(-1, 100), x.reshape(-1, 130), dense, bias, activation)


@needs_cuda_build
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((16,), ["wide = 0", "group = 16"]),
        ((17,), ["wide = 1", "group = 32"]),
        ((32,), ["wide = 1", "group = 32"]),
        ((33,), ["wide = 1", "group = 64"]),
        ((64,), ["wide = 1", "group = 64"]),
        ((65,), ["wide = 1", "group = 128"]),
        ((2, 40), ["wide = 1", "group = 128"]),
        ((128,), ["wide = 1", "group = 128"]),
        ((129,), ["wide = 1", "group = 256"]),
        ((1024,), ["wide = 1", "group = 256"]),
        ((1025,), ["flashllm_decode_bitmap_v1", "dot_general"]),
    ],
    ids=str,
)
def test_the_number_of_tokens_decides_on_the_kernel(tokens, expected, monkeypatch):
    monkeypatch.setattr(plan, "device", lambda: H100)
    w = jax_flashllm.encode(np.eye(100, 130, dtype=np.float16), format="bitmap")
    text = _lowered(jax_flashllm.spmm, w, jnp.ones((*tokens, 130), jnp.float16))
    for part in expected:
        assert part in text
    assert ("flashllm_spmm_bitmap_v1" in text) == ("wide" in expected[0])


@needs_cuda_build
def test_only_a_bitmap_times_tokens_of_its_own_type_is_wide():
    dense = np.eye(100, 130, dtype=np.float16)
    x = jnp.ones((80, 130), jnp.float16)
    w = jax_flashllm.encode(dense, format="delta_csr")
    assert "wide = 0" in _lowered(jax_flashllm.spmm, w, x[:40])
    w = jax_flashllm.encode(dense, format="bitmap")
    assert "wide = 0" in _lowered(jax_flashllm.spmm, w, x.astype(jnp.float32))


@needs_cuda_build
def test_gradient_lowers():
    w = jax_flashllm.encode(np.eye(64, 64, dtype=np.float16), format="bitmap")

    def loss(values, x):
        return jax_flashllm.spmm(w.with_values(values), x).sum()

    text = _lowered(jax.grad(loss, argnums=(0, 1)), w.values, jnp.ones((2, 64), jnp.float16))
    assert "@flashllm_sample_bitmap_v1" in text


@needs_cuda_build
@pytest.mark.parametrize("format", ["bitmap", "delta_csr"])
@pytest.mark.parametrize("shards", [1, 3, (2, 3)])
def test_encoding_lowers_to_results_as_the_host_makes(format, shards):
    dense = np.eye(100, 331, dtype=ml_dtypes.bfloat16)
    w = encode_on_host(dense, format, shards)
    same = {"format": format, "grid": w.grid}
    sizes = {"capacity": w.values.shape[1], "index_capacity": w.buffers[0].shape[-1]}
    known, new = ([w.masks, w.offsets], []) if format == "bitmap" else ([w.offsets], [w.index])
    count = on_gpu.count.trace(dense, step=3, **same)
    fill = on_gpu.fill.trace(known, dense, **same, **sizes)
    R, C = w.grid
    for step, traced, results in [("count", count, known), ("fill", fill, [*new, w.values])]:
        out = jax.tree.leaves(traced.out_info)[: len(results)]
        assert [(o.shape, o.dtype) for o in out] == [(r.shape, r.dtype) for r in results]
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert f"@flashllm_{step}_{format}_v1" in text
        assert f"column_blocks = {C} : i64, row_blocks = {R} : i64" in text


def test_what_lies_on_no_gpu_is_encoded_on_the_host():
    assert not on_gpu.lies_on_gpu(np.eye(4, dtype=np.float16))
    cpu = jax.device_put(np.eye(4, dtype=np.float16), jax.devices("cpu")[0])
    assert not on_gpu.lies_on_gpu(cpu)


@needs_cuda_build
@pytest.mark.filterwarnings("ignore:.*-0.0")
@pytest.mark.parametrize("format", ["auto", "bitmap", "delta_csr"])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.07, 0.5])
def test_sizes_follow_from_the_offsets_ends(monkeypatch, format, density):
    """What the host reads in between, with the host's encoder in place of the kernels."""
    rng = np.random.default_rng(0)
    keep = rng.random((150, 300)) < density
    dense = np.where(keep, rng.choice([-0.0, 1], (150, 300)), 0).astype(np.float16)
    w = encode_on_host(dense, format, (3, 2))

    def call(target, out, *operands, grid):
        assert grid == (3, 2)
        step, made = target.split("_", 1)
        by_host = encode_on_host(dense, made, grid)
        known = [*by_host.buffers] if made == "bitmap" else [by_host.offsets]
        new = [by_host.values] if made == "bitmap" else [by_host.index, by_host.values]
        results = known if step == "count" else new
        assert [(o.shape, o.dtype) for o in out] == [(r.shape, r.dtype) for r in results]
        return [jnp.asarray(r) for r in results]

    monkeypatch.setattr(on_gpu, "_call", call)
    with jax.disable_jit():
        got, negative = on_gpu.encode(jnp.asarray(dense), format, (3, 2), 7)
    assert negative == np.count_nonzero(dense[::7].view(np.uint16) == 0x8000)
    assert type(got) is type(w)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(w), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint16), b.view(np.uint16))
    got.validate()


@needs_cuda_build
def test_the_fat_binary_fits_into_a_wheel():
    assert Path(_flashllm.__file__).stat().st_size <= 30_000_000


@needs_cuda_build
def test_every_target_has_both_stages():
    targets = _flashllm.cuda_targets()
    assert len(targets) == 12
    assert all(set(stages) == {"initialize", "execute"} for stages in targets.values())


@needs_cuda_build
def test_decode_attention_is_one_call_where_heads_are_whole_pieces():
    def text(d, cache):
        held = jnp.zeros((6, 40, d), cache)
        mask, length = jnp.ones((2, 40), bool), jnp.int32(3)
        qkv = jnp.ones((2, 3, 3, d), jnp.float16)
        return _lowered(attention.decode, qkv, held, held, mask, length)

    assert "@flashllm_decode_attention_v1" in text(128, jnp.float16)
    assert "@flashllm_decode_attention_v1" in text(80, jnp.float8_e4m3fn)
    assert "@flashllm_decode_attention_v1" not in text(12, jnp.float16)


# ---- plans ----

SHAPES = [(1, 1), (64, 64), (768, 768), (4096, 4096), (28672, 7168), (9216, 36864)]


@pytest.mark.parametrize("device", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plans_are_sound(shape, device):
    m, k = shape
    for tokens in (1, 8, 9, 17, 64, 65, 5000):
        for terms in (1, 2, 3):
            p = plan.choose("bitmap", m, 1, k, tokens, terms, device)
            units = -(-m // (16 * p.warps)) * -(-k // 256)
            if p.wide:
                assert (device, terms) == (H100, 1)
                assert p.group in (32, 64, 128, 256)
                units *= -(-p.chunk // p.group)
            else:
                assert p.group in (8, 16, 32, 64)
                assert p.group >= min(64, p.chunk * terms)
            assert 1 <= p.ctas <= units
            assert 1 <= p.chunk <= tokens
            assert p.workspace < 1 << 30


@pytest.mark.parametrize("device", [H100, A100, L40S], ids=["H100", "A100", "L40S"])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 12288), (5, 12289), (70, 3 << 20)], ids=str)
def test_delta_csr_plans_are_sound(shape, device):
    m, k = shape
    blocks, block_cols = delta_csr.grid_of(k)
    for tokens in (1, 2, 3, 8, 9, 40):
        for terms in (1, 2, 3):
            p = plan.choose("delta_csr", m, 2, k, tokens, terms, device)
            assert p.group in (1, 2, 4, 8)
            each = p.ctas // blocks
            assert p.warps == 20 if p.group == 8 else 24 <= p.warps <= 32
            if p.group < 8:  # no warp has more rows than of 32
                assert -(-2 * m // (each * p.warps)) == -(-2 * m // (each * 32))
            x = (block_cols + 2 * 512) * max(4, 2 * p.group)
            assert x < device.shared
            if p.group < min(8, tokens * terms):
                assert 2 * x > device.shared
            assert p.ctas % blocks == 0
            assert blocks <= p.ctas <= max(blocks, min(device.cores, 2 * m * blocks))
            assert p.chunk == tokens
            if terms == blocks == 1 and k % 64 == 0:
                assert p.workspace == 0
            elif terms > 1 or blocks > 1:
                assert p.workspace >= blocks * tokens * terms * 2 * m * 4


def test_delta_csr_takes_as_many_tokens_as_shared_memory_holds():
    def groups(device, k):
        plans = [plan.choose("delta_csr", 64, 1, k, n, 1, device) for n in (1, 2, 3, 5, 9)]
        return [p.group for p in plans]

    assert groups(H100, 12288) == groups(A100, 7168) == [1, 2, 4, 8, 8]
    assert groups(A100, 12288) == [1, 2, 4, 4, 4]
    assert groups(L40S, 12288) == [1, 2, 2, 2, 2]


def _cuts(format, shape, fill, tokens):
    """What is lowered for each number of tokens."""
    m, k = shape
    return {plan.cut_for(format, m, 1, k, H100, plan.by_memory(format, n, fill)) for n in tokens}


@pytest.mark.parametrize(("fill", "few"), [(0.1, 0), (0.3, 0), (0.4, 8), (0.5, 16), (1.0, 16)])
@pytest.mark.parametrize("format", ["bitmap", "delta_csr"])
def test_the_cut_depends_on_the_batch_once_or_never(format, fill, few, monkeypatch):
    monkeypatch.delenv("JAX_FLASHLLM_BATCH_INVARIANT", raising=False)
    for shape in SHAPES:
        for tokens in (range(1, few + 1), range(few + 1, 65)):
            assert len(_cuts(format, shape, fill, tokens)) == min(len(tokens), 1)
    differs = any(len(_cuts(format, shape, fill, range(1, 65))) == 2 for shape in SHAPES)
    assert differs == (format == "bitmap" and few > 0)
    monkeypatch.setenv("JAX_FLASHLLM_BATCH_INVARIANT", "")  # is as good as unset
    assert differs == any(len(_cuts(format, shape, fill, range(1, 65))) == 2 for shape in SHAPES)
    monkeypatch.setenv("JAX_FLASHLLM_BATCH_INVARIANT", "1")
    for shape in SHAPES:
        (cut,) = _cuts(format, shape, fill, range(1, 65))
        assert cut == plan.model(format, shape[0], 1, shape[1], H100)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_up_to_64_tokens_in_terms_are_cut_alike(shape):
    m, k = shape
    plans = [plan.choose("bitmap", m, 1, k, n, t, H100) for t in (1, 2, 3) for n in (1, 22, 33, 64)]
    assert len({(p.ctas, p.warps) for p in plans}) == 1
    assert all(p.chunk >= n for p, n in zip(plans, 3 * [1, 22, 33, 64], strict=True))


def test_many_tokens_need_no_workspace_without_wgmma():
    p = plan.choose("bitmap", 28672, 1, 7168, 16384, 1, A100)
    assert p.workspace == 0
    assert p.ctas == math.ceil(28672 / (16 * p.warps))
