"""Products on the GPU under JAX's transformations, in command buffers, on damaged buffers."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gpu import MARKS, cuda_devices, multiply, normals, small_integers
from reference import (
    FORMATS,
    assert_product,
    bits,
    dense_product,
    sparse_matrix,
)

import jax_flashllm
from jax_flashllm.spmm import decode

pytestmark = MARKS


@pytest.mark.parametrize("format", FORMATS)
def test_vmap_and_leading_axes(format):
    dense = sparse_matrix((100, 128), np.float16, 0.4, integers=True)
    w = jax_flashllm.encode(dense, format=format)
    x = small_integers((3, 2, 4, 128), np.float16)
    ref = dense_product(x, dense)
    np.testing.assert_array_equal(np.asarray(multiply(w, x)), ref)
    mapped = jax.jit(jax.vmap(jax.vmap(functools.partial(jax_flashllm.spmm, w))))
    np.testing.assert_array_equal(np.asarray(mapped(jnp.asarray(x))), ref)


@pytest.mark.parametrize("format", FORMATS)
def test_scan_over_stacked_weights(format):
    from jax_flashllm.formats import stack

    layers = [sparse_matrix((128, 128), np.float16, 0.1, seed=s, integers=True) for s in range(4)]
    stacked = stack([jax_flashllm.encode(d, format=format) for d in layers])
    x = np.sign(small_integers((2, 128), np.float32))

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

    x0 = jnp.asarray(normals((4, 256), ml_dtypes.bfloat16))
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


@pytest.mark.parametrize("format", FORMATS)
def test_two_devices(format):
    devices = cuda_devices()
    if len(devices) < 2:
        pytest.skip("one CUDA device only")
    dense = sparse_matrix((256, 512), np.float16, 0.4, integers=True)
    w = jax_flashllm.encode(dense, format=format)
    x = small_integers((4, 512), np.float16)
    for device in devices[:2]:
        y = multiply(jax.device_put(w, device), jax.device_put(x, device))
        assert y.devices() == {device}
        np.testing.assert_array_equal(np.asarray(y), dense_product(x, dense))


@pytest.mark.parametrize("format", FORMATS)
def test_garbage_stays_inside_the_buffers(format):
    """Offsets, masks, bases and codes that lie give wrong numbers, never a fault."""
    dense = sparse_matrix((60, 15000), np.float16, 0.2)  # two blocks of Delta-CSR
    w = jax_flashllm.encode(dense, format=format)
    rng = np.random.default_rng(0)

    def noise(like):
        return jnp.asarray(rng.integers(0, 2**32, like.shape, dtype=np.uint32))

    offsets = noise(w.offsets)
    if format == "bitmap":
        buffers = [{"offsets": offsets, "masks": jnp.full_like(w.masks, 2**32 - 1)}]
    else:
        ones, codes = jnp.full_like(w.index, 2**32 - 1), noise(w.index)
        width = w.offsets[0, -1]
        other = w.offsets.at[:, -1].set(12 - width), w.offsets.at[:, -1].set(2**32 - 1)
        shift = w.offsets.at[:, :-1].add(5)
        buffers = [{"offsets": o} for o in (offsets, shift, *other)]
        buffers += [{"index": i} for i in (ones, codes)]
        buffers += [{"offsets": o, "index": codes} for o in other]
    broken = [dataclasses.replace(w, **b) for b in buffers]

    def gradient(w, x):
        return jax.grad(lambda v: jax_flashllm.spmm(w.with_values(v), x).sum())(w.values)

    for n in (1, 2, 3, 8, 20, 64, 128, 300):
        x = jnp.asarray(normals((n, 15000), np.float16))
        if n in (2, 20):  # rows are walked another way then
            x = x.at[-1, 7].set(jnp.inf)
        for f, b in itertools.product((jax_flashllm.spmm, gradient), broken):
            jax.block_until_ready(jax.jit(f)(b, x))
    for b in broken:
        jax.block_until_ready(jax.jit(decode)(b))
    x = normals((4, 15000), np.float16)
    assert_product(multiply(w, x), x, dense)
