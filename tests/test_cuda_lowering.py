"""The CUDA side as far as a machine without a GPU can check it."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_flashllm
from jax_flashllm import _flashllm, plan
from jax_flashllm.formats import encode_on_host, on_gpu
from jax_flashllm.spmm import decode

needs_cuda_build = pytest.mark.skipif(
    not hasattr(_flashllm, "cuda_targets"), reason="built without CUDA"
)
H100 = plan.Device(cores=132, warps=16)


def _lowered(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@needs_cuda_build
@pytest.mark.parametrize("format", ["bitmap", "tiled_csl"])
def test_lowering_holds_target_and_plan(format):
    w = jax_flashllm.encode(np.eye(100, 130, dtype=np.float16), format=format)
    x = jnp.ones((3, 130), jnp.float16)
    text = _lowered(lambda w, x: jax_flashllm.spmm(w, x, activation="gelu"), w, x)
    assert f"@flashllm_spmm_{format}_v1" in text
    for attribute in ("activation = 2", "m = 100", "k = 130", "ctas", "warps", "group", "chunk"):
        assert attribute in text
    assert f"@flashllm_decode_{format}_v1" in _lowered(decode, w)


@needs_cuda_build
def test_gradient_lowers():
    w = jax_flashllm.encode(np.eye(64, 64, dtype=np.float16), format="bitmap")

    def loss(values, x):
        return jax_flashllm.spmm(w.with_values(values), x).sum()

    text = _lowered(jax.grad(loss, argnums=(0, 1)), w.values, jnp.ones((2, 64), jnp.float16))
    assert "@flashllm_sample_bitmap_v1" in text


@needs_cuda_build
@pytest.mark.parametrize("format", ["bitmap", "tiled_csl"])
@pytest.mark.parametrize("shards", [1, 3, (2, 3)])
def test_encoding_lowers_to_results_as_the_host_makes(format, shards):
    dense = np.eye(100, 331, dtype=ml_dtypes.bfloat16)
    w = encode_on_host(dense, format, shards)
    sizes = {"grid": w.grid, "capacity": w.values.shape[1]}
    if format == "bitmap":
        programs = [
            (on_gpu.count_bitmap, (dense,), {"grid": w.grid}, (w.masks, w.offsets)),
            (on_gpu.fill_bitmap, (w.masks, w.offsets, dense), sizes, (w.values,)),
        ]
    else:
        sizes["index_capacity"] = w.index.shape[1]
        programs = [
            (on_gpu.count_tiled_csl, (dense,), {"grid": w.grid}, (w.offsets,)),
            (on_gpu.fill_tiled_csl, (w.offsets, dense), sizes, (w.index, w.values)),
        ]
    for (program, operands, static, results), step in zip(programs, ["count", "fill"], strict=True):
        traced = program.trace(*operands, **static)
        out = jax.tree.leaves(traced.out_info)
        assert [(o.shape, o.dtype) for o in out] == [(r.shape, r.dtype) for r in results]
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert f"@flashllm_{step}_{format}_v1" in text
        R, C = w.grid
        assert f"column_blocks = {C} : i64, row_blocks = {R} : i64" in text


def test_what_lies_on_no_gpu_is_encoded_on_the_host():
    assert not on_gpu.lies_on_gpu(np.eye(4, dtype=np.float16))
    cpu = jax.device_put(np.eye(4, dtype=np.float16), jax.devices("cpu")[0])
    assert not on_gpu.lies_on_gpu(cpu)


@pytest.mark.parametrize("shape", [(1, 1), (100, 70), (5, 4096)], ids=str)
def test_zeros_are_counted_by_row(shape):
    rng = np.random.default_rng(0)
    dense = rng.choice(np.array([0, -0.0, 1, np.nan], np.float16), shape)
    nonzeros, negative = on_gpu.count_zeros(jnp.asarray(dense), 3)
    bits = dense.view(np.uint16)
    np.testing.assert_array_equal(nonzeros, np.count_nonzero(bits, axis=1))
    assert int(negative) == np.count_nonzero(bits[::3] == 0x8000)


@needs_cuda_build
def test_the_fat_binary_fits_into_a_wheel():
    assert Path(_flashllm.__file__).stat().st_size <= 30_000_000


@needs_cuda_build
def test_every_target_has_both_stages():
    targets = _flashllm.cuda_targets()
    assert len(targets) == 10
    assert all(set(stages) == {"initialize", "execute"} for stages in targets.values())


# ---- plans ----

SHAPES = [(1, 1), (64, 64), (768, 768), (4096, 4096), (28672, 7168), (9216, 36864)]


@pytest.mark.parametrize("format", ["bitmap", "tiled_csl"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plans_are_sound(shape, format):
    m, k = shape
    for tokens in (1, 8, 9, 64, 65, 5000):
        for terms in (1, 2, 3):
            p = plan.choose(format, m, 1, k, tokens, terms, H100)
            bands = -(-m // (16 if format == "bitmap" else 64))
            units = -(-bands // p.warps) * -(-k // (256 if format == "bitmap" else 128))
            assert 1 <= p.ctas <= units
            assert p.group in (8, 16, 32, 64)
            assert 1 <= p.chunk <= tokens
            assert p.group >= min(64, p.chunk * terms)
            assert p.workspace < 1 << 30


@pytest.mark.parametrize("format", ["bitmap", "tiled_csl"])
def test_the_cut_does_not_depend_on_the_batch(format):
    for m, k in SHAPES:
        cuts = {
            (p.ctas, p.warps)
            for p in (plan.choose(format, m, 1, k, n, 1, H100) for n in range(1, 65))
        }
        assert len(cuts) == 1


def test_many_tokens_need_no_workspace():
    p = plan.choose("bitmap", 28672, 1, 7168, 16384, 1, H100)
    assert p.workspace == 0
    assert p.ctas == math.ceil(28672 / 256)
