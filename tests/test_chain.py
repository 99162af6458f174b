"""Chains: what they compute, where they are one call, and OPT's decode step made of them."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_opt
from flax import nnx
from reference import FLOATS, FORMATS, HALVES, DenseStage, assert_chain, bits, sparse_matrix

import jax_flashllm
from jax_flashllm import attention, plan
from jax_flashllm import chain as chains
from jax_flashllm.chain import Attend, Stage, chain
from jax_flashllm.models import opt
from jax_flashllm.models.cache import KVCache

H100 = plan.Device(cores=132, warps=16)


def vector(n, dtype, seed):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32).astype(dtype)


def row(H, F, dtype=np.float16, bias=True, affine=True, activation="relu"):
    """out_proj, fc1, fc2 and qkv_proj of a layer, as NumPy has them."""
    shapes = [(H, H), (F, H), (H, F), (3 * H, H)]
    return [
        DenseStage(
            sparse_matrix((m, k), dtype, 0.3, seed=i),
            vector(m, dtype, 10 + i) if bias else None,
            activation if i == 1 else None,
            add := i in (0, 2),
            vector(H, dtype, 20 + i) if affine and add else None,
            vector(H, dtype, 30 + i) if affine and add else None,
        )
        for i, (m, k) in enumerate(shapes)
    ]


def encoded(stages, formats=("bitmap",)):
    return [
        Stage(jax_flashllm.encode(s.w, formats[i % len(formats)]), *s[1:])
        for i, s in enumerate(stages)
    ]


def tokens(lead, H, dtype=np.float16):
    return vector((*lead, H), dtype, 1), vector((*lead, H), dtype, 2)


run = jax.jit(chain, static_argnames="epsilon")


@jax.jit
def one_by_one(x, h, stages):
    """The same, written with the product and Flax's LayerNorm."""
    for s in stages:
        x = jax_flashllm.spmm(s.weight, x, s.bias, s.activation)
        if s.add:
            h = h + x
            norm = nnx.LayerNorm(
                h.shape[-1], epsilon=1e-5, dtype=h.dtype, use_fast_variance=False,
                use_scale=s.scale is not None, use_bias=s.shift is not None,
                scale_init=lambda *_, s=s: s.scale, bias_init=lambda *_, s=s: s.shift,
                rngs=nnx.Rngs(0),
            )  # fmt: skip
            x = norm(h)
    return h, x


# ---- what it computes ----


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_chain_is_products_and_norms_to_the_bit(dtype, bare):
    weight = np.dtype(np.float16) if dtype == np.float32 else dtype
    stages = row(64, 192, weight, bias=not bare, affine=not bare, activation="gelu")
    stages = encoded(stages, FORMATS)
    for lead, n in [((3,), 1), ((2, 1), 4)]:
        x, h = tokens(lead, 64, dtype)
        got, expected = run(x, h, stages[:n]), one_by_one(x, h, stages[:n])
        for a, b in zip(got, expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, dtype)
            np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_chain_stays_in_bound(dtype):
    stages = row(64, 192, dtype, activation="gelu")
    x, h = tokens((5,), 64, dtype)
    results = [run(x, h, encoded(stages, FORMATS)[: n + 1]) for n in range(4)]
    assert_chain(results, x, h, stages, excess=True)


def test_the_bound_sees_what_is_wrong():
    stages = row(64, 192)
    x, h = tokens((5,), 64)
    results = [tuple(map(np.asarray, run(x, h, encoded(stages)[: n + 1]))) for n in range(4)]
    for stage in range(4):
        for of_h in (True, False):
            wrong = [[np.array(a) for a in r] for r in results]
            a = wrong[stage][0 if of_h else 1]
            a[3, 40] += np.float16(0.01) * np.abs(a[3]).max()
            with pytest.raises(AssertionError):
                assert_chain(wrong, x, h, stages, excess=True)
    with pytest.raises(AssertionError):
        assert_chain(results, x, h, stages, epsilon=0.3, excess=True)


def test_epsilon_counts():
    stages = encoded(row(64, 64)[:1])
    x, h = (a * np.float16(2**-8) for a in tokens((2,), 64))
    results = [np.asarray(run(x, h, stages, epsilon=e)[1]) for e in (1e-5, 1.0)]
    assert np.abs(results[0] - results[1]).max() > 0.1


# ---- attention ----


def attending(B, h, d, S=12, length=7, dtype=np.float16, cache=None):
    """A stage with a cache of random numbers, pads in its first row."""
    keys, values = (
        jnp.asarray(vector((B * h, S, d), dtype, 50 + i)).astype(cache or dtype) for i in range(2)
    )
    mask = np.broadcast_to(np.arange(S) <= length, (B, S)).copy()
    mask[0, :2] = False
    return Attend(keys, values, jnp.asarray(mask), jnp.int32(length))


def layer(H, F, dtype=np.float16):
    """The stages of a layer from q, k and v on, without attention."""
    out, fc1, fc2, qkv = encoded(row(H, F, dtype))
    return [qkv, out, fc1, fc2]


@pytest.mark.parametrize("cache", [None, jnp.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_attention_is_a_stage(dtype, cache):
    H, h = 64, 4
    products = layer(H, 128, dtype)
    x, residual = tokens((3, 1), H, dtype)
    a, b = (attending(3, h, H // h, length=n, dtype=dtype, cache=cache) for n in (7, 0))
    got = run(x, residual, [products[0], a, *products[1:], products[0], b, *products[1:2]])

    @jax.jit
    def expected(x, residual):
        kv = []
        for s, rest in ((a, products[1:]), (b, products[1:2])):
            _, qkv = chain(x, residual, products[:1])
            y, *held = attention.decode(
                qkv.reshape(3, 3, h, H // h), s.keys, s.values, s.mask, s.length
            )
            residual, x = chain(y.reshape(3, 1, H), residual, rest)
            kv += held
        return residual, x, *kv

    want = expected(x, residual)
    assert len(got) == len(want) == 6
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(bits(one), bits(other))
    assert not np.array_equal(bits(got[2]), bits(a.keys))  # the new token's
    np.testing.assert_array_equal(bits(got[4])[:, 1:], bits(b.keys)[:, 1:])


def test_attention_under_vmap_and_derivatives():
    H, h = 32, 2
    qkv, out, *_ = layer(H, 64)
    stages = [qkv, attending(3, h, H // h, dtype=np.float32), out]
    x, residual = (a.astype(np.float32) for a in tokens((2, 3), H))

    def through(x, keys):
        return chain(x, residual[0], [qkv, dataclasses.replace(stages[1], keys=keys), out])

    keys = jnp.stack([stages[1].keys, stages[1].keys + 1])
    both = jax.jit(jax.vmap(through))(x, keys)
    for i in range(2):
        for a, b in zip(both, jax.jit(through)(x[i], keys[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)
    shared = jax.jit(jax.vmap(through, in_axes=(0, None)))(x, keys[0])
    np.testing.assert_allclose(shared[0], both[0].at[1].set(through(x[1], keys[0])[0]), rtol=1e-5,
                               atol=1e-5)  # fmt: skip
    dx, dkeys = jax.grad(lambda *a: jnp.sum(jnp.sin(through(*a)[1])), argnums=(0, 1))(x[0], keys[0])
    _, forward = jax.jvp(lambda x: jnp.sum(jnp.sin(through(x, keys[0])[1])), (x[0],), (x[1],))
    np.testing.assert_allclose(forward, jnp.vdot(dx, x[1]), rtol=1e-4)
    assert np.abs(dkeys[:, 2:7]).max() > 1e-3
    assert not dkeys[:, 7:].any()  # the new slot was overwritten, later ones are closed


def test_errors_of_attention():
    qkv, out, *_ = layer(64, 128)
    x, h = tokens((3,), 64)
    good = attending(3, 4, 16)

    def fails(match, x=x, h=h, **changes):
        with pytest.raises(ValueError, match=match):
            chain(x, h, [qkv, dataclasses.replace(good, **changes), out])

    fails(r"stage 1: keys are float16\[12, 12, 16\] and values float16\[12, 11, 16\]",
          values=good.values[:, 1:])  # fmt: skip
    fails(r"stage 1: keys are float16.* and values float32", values=good.values.astype(np.float32))
    fails(r"mask is bool\[2, 12\].*pass bool\[3, 12\], for 3 tokens", mask=good.mask[:2])
    fails(r"mask is int32\[3, 12\]", mask=good.mask.astype(np.int32))
    fails(r"length int32\[1\]; .* and int32\[\]", length=good.length[None])
    fails(r"length uint8\[\]", length=jnp.uint8(7))  # the kernel's is int32
    fails("keys and values are int8", keys=good.keys.astype(np.int8),
          values=good.values.astype(np.int8))  # fmt: skip
    fails(r"x is \[3, 192\] and keys are \[12, 0, 16\]; .* a slot", keys=good.keys[:, :0],
          values=good.values[:, :0])  # fmt: skip
    fails(r"x is \[0, 192\] and keys", x[:0], h[:0])
    fails(r"x is \[3, 192\] but keys are \[9, 12, 16\].* 432 / 3", keys=good.keys[:9],
          values=good.values[:9])  # fmt: skip
    fails(r"x is \[3, 192\] but keys are \[11, 12, 16\]", keys=good.keys[:11],
          values=good.values[:11])  # fmt: skip
    with pytest.raises(TypeError, match="stage 1: length must be an array, got int"):
        chain(x, h, [qkv, dataclasses.replace(good, length=7)])
    with pytest.raises(TypeError, match="stage 0: x is int32; cast"):
        chain(np.ones((3, 192), np.int32), np.ones((3, 64), np.int32), [good])
    with pytest.raises(TypeError, match="stage 1 must be a Stage or an Attend, got tuple"):
        chain(x, h, [qkv, (good.keys, good.values)])


# ---- JAX ----


def test_vmap():
    stages = encoded(row(64, 128))
    x, h = tokens((3, 2), 64)
    expected = run(x, h, stages)
    for f in (
        jax.vmap(lambda x, h: chain(x, h, stages)),
        jax.vmap(jax.vmap(lambda x, h: chain(x, h, stages))),
    ):
        assert str(jax.make_jaxpr(f)(x, h)).count("flashllm_chain") == 1
        for a, b in zip(jax.jit(f)(x, h), expected, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))
    mapped = jax.vmap(lambda x, h: chain(x, h, stages), in_axes=(1, None), out_axes=1)
    expected = [run(x[:, i], h[:, 0], stages) for i in range(2)]
    for a, *b in zip(jax.jit(mapped)(x, h[:, 0]), *expected, strict=True):
        np.testing.assert_array_equal(bits(a), bits(np.stack(b, 1)))


def test_vmap_over_stages():
    layers = [
        encoded([s._replace(w=np.roll(s.w, i, 0)) for s in row(64, 128)[:2]]) for i in range(2)
    ]
    x, h = tokens((3,), 64)
    w = [jax_flashllm.stack([stages[i].weight for stages in layers]) for i in range(2)]
    layers = [[dataclasses.replace(s, weight=0) for s in stages] for stages in layers]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    stacked = [dataclasses.replace(s, weight=w[i]) for i, s in enumerate(stacked)]
    layers = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(2)]
    both = jax.jit(jax.vmap(chain, in_axes=(None, None, 0)))(x, h, stacked)
    for i, stages in enumerate(layers):
        for a, b in zip(both, run(x, h, stages), strict=True):
            np.testing.assert_array_equal(bits(a[i]), bits(b))
    biases = jnp.stack([layers[0][0].bias, layers[1][0].bias + 1])

    def with_bias(bias):
        return chain(x, h, [Stage(layers[0][0].weight, bias, add=True)])

    for a, *b in zip(jax.jit(jax.vmap(with_bias))(biases), *map(with_bias, biases), strict=True):
        np.testing.assert_array_equal(a, np.stack(b))


def test_derivatives_are_those_of_the_composition():
    stages = encoded(row(64, 128, activation="gelu"))
    x, h = (a.astype(np.float32) for a in tokens((2,), 64))

    def loss(f, x, h, values, bias, scale):
        head = Stage(stages[0].weight.with_values(values), bias, None, True, scale)
        h, y = f(x, h, [head, *stages[1:]])
        return jnp.sum(jnp.sin(h)) + jnp.sum(jnp.sin(y))

    args = x, h, stages[0].weight.values, stages[0].bias, stages[0].scale
    grad = [
        jax.jit(jax.grad(lambda *a, f=f: loss(f, *a), argnums=range(5)))(*args)
        for f in (chain, one_by_one)
    ]
    for a, b in zip(*grad, strict=True):
        assert np.abs(np.asarray(b, np.float32)).max() > 0.1
        np.testing.assert_array_equal(a, b)
    dx = jnp.ones_like(x)
    forward = [
        jax.jvp(lambda x, f=f: loss(f, x, *args[1:]), (x,), (dx,)) for f in (chain, one_by_one)
    ]
    np.testing.assert_allclose(*forward, rtol=1e-5)
    each = jax.vmap(jax.grad(lambda x, h: loss(chain, x, h, *args[2:])))(x, h)
    np.testing.assert_allclose(each, grad[0][0], rtol=2e-4, atol=2e-4)


def test_it_runs_without_jit_and_with_no_tokens():
    stages = encoded(row(64, 128))
    x, h = tokens((3,), 64)
    for a, b in zip(chain(x, h, stages), run(x, h, stages), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    for a, m in zip(chain(x[:0], h[:0], stages), (64, 192), strict=True):
        assert a.shape == (0, m)


def test_errors_name_stage_and_numbers():
    stages = row(64, 128)
    x, h = tokens((3,), 64)

    def fails(kind, match, x=x, h=h, **changes):
        changed = [s._replace(**changes) if i == 2 else s for i, s in enumerate(stages)]
        with pytest.raises(kind, match=match):
            chain(x, h, encoded(changed))

    fails(ValueError, r"stage 0: x has 63 features but W is \[64, 64\]", x=x[:, 1:])
    fails(ValueError, r"stage 2: x has 128 features but W is \[64, 64\]", w=stages[0].w)
    fails(ValueError, r"stage 2: its 65 results .* h, which has 64", w=np.ones((65, 128), "f2"),
          bias=None)  # fmt: skip
    fails(ValueError, r"stage 2: bias is \[3\] but W is \[64, 128\]", bias=np.ones(3, "f2"))
    fails(ValueError, r"stage 2: scale is float16\[3\]; pass \[64\]", scale=np.ones(3, "f2"))
    fails(ValueError, r"stage 2: shift is int64\[64\]", shift=np.ones(64, int))
    fails(ValueError, r"stage 2: it has a scale but no LayerNorm; pass add=True", add=False)
    fails(ValueError, r"stage 2: activation must be .*'tanh'", activation="tanh")
    fails(ValueError, r"x is float16\[3, 64\] and h float16\[2, 64\]", h=h[:2])
    fails(ValueError, r"x is float16.* and h float32", h=h.astype(np.float32))
    fails(TypeError, "h must be an array, got int", h=3)
    with pytest.raises(ValueError, match="no stages"):
        chain(x, h, [])
    with pytest.raises(TypeError, match=r"stage 0: w must be an encoded weight, got ndarray"):
        chain(x, h, [Stage(stages[0].w)])


# ---- where it is one call ----


@pytest.fixture
def cuda(monkeypatch):
    """As if built with CUDA: chains lower to the call, and raise where they would not be one."""
    monkeypatch.setattr(chains, "_flashllm", types.SimpleNamespace(cuda_targets=dict))

    def composed(*args, **params):
        raise NotImplementedError("one by one")

    monkeypatch.setattr(chains, "_composed", composed)


def lowered(x, h, stages, **options):
    def f(x, h, stages):  # a new one: what was traced before is not looked up
        return chain(x, h, stages, **options)

    return jax.jit(f).trace(x, h, stages).lower(lowering_platforms=("cuda",)).as_text()


def test_lowering_holds_target_and_attributes(cuda):
    x, h = tokens((3, 2), 64)
    stages = encoded(row(64, 192, activation="gelu", affine=False), FORMATS)
    stages[1] = Stage(stages[1].weight, None, "gelu")
    (call,) = [line for line in lowered(x, h, stages, epsilon=0.5).splitlines() if "@flash" in line]
    assert "@flashllm_chain_v1" in call
    weights = [(s.weight.format, s.weight.shape, s.weight.values.size) for s in stages]
    assert [format for format, *_ in weights] == FORMATS * 2
    plans, workspace = plan.chain(weights, 6, 192, plan.device())
    for name, values in {
        "m": [64, 192, 64, 192],
        "k": [64, 64, 192, 64],
        "format": [0, 1, 0, 1],
        "activation": [0, 2, 0, 0],
        "add": [1, 0, 1, 0],
        "ctas": [p.ctas for p in plans],
        "warps": [p.warps for p in plans],
    }.items():
        assert f"{name} = dense<{[*values]}> : tensor<4xi64>" in call, name
    assert "epsilon = 5.000000e-01 : f32" in call
    assert "group = dense<8> : tensor<4xi64>" in call  # all
    operands, results = call.rsplit(" : (", 1)[1].split(") -> ")
    operands = operands.split(", ")
    assert len(operands) == 2 + 4 * 6
    assert operands[:2] == ["tensor<6x64xf16>"] * 2
    absent, bias = "tensor<1x1xf32>", "tensor<64xf16>"
    assert operands[5:8] == [bias, absent, absent]
    assert operands[11:14] == [absent] * 3
    assert results == f"(tensor<6x64xf16>, tensor<6x192xf16>, tensor<{workspace}xui8>)"


@pytest.mark.parametrize("n", [1, 8, 9, 32])
def test_up_to_32_tokens_are_one_call(cuda, n):
    stages = encoded(row(64, 64))
    assert "@flashllm_chain_v1" in lowered(*tokens((n,), 64), stages)
    vmapped = jax.jit(jax.vmap(lambda x, h: chain(x, h, stages))).trace(*tokens((n, 1), 64))
    assert "@flashllm_chain_v1" in vmapped.lower(lowering_platforms=("cuda",)).as_text()


def test_what_is_not_one_call(cuda):
    def split(x, h, stages, **changes):
        stages = [*stages]
        stages[0] = Stage(**{f: getattr(stages[0], f) for f in ("bias", "add")} | changes)
        with pytest.raises(NotImplementedError, match="one by one"):
            lowered(x, h, stages)

    stages, w = encoded(row(64, 64)), row(64, 64)[0].w
    same = {"weight": stages[0].weight}
    x, h = tokens((2,), 64)
    assert "@flashllm_chain_v1" in lowered(x, h, stages)
    split(*tokens((33,), 64), stages, **same)
    split(*tokens((0,), 64), stages, **same)
    split(x.astype(np.float32), h.astype(np.float32), stages, **same)
    split(x, h, stages, weight=jax_flashllm.encode(w.astype(jnp.bfloat16)))
    split(x, h, stages, weight=jax_flashllm.encode(w, shards=2))
    split(x[:, :40], h, stages, weight=jax_flashllm.encode(w[:, :40].copy()))
    split(x, h, stages, activation="relu", **same)
    for H in (62, 16392):
        last = encoded([DenseStage(np.zeros((H, 64), np.float16), add=True)])
        split(x, np.zeros((2, H), np.float16), last, weight=last[0].weight)
        assert "@flashllm_chain_v1" in lowered(x, x, [Stage(last[0].weight)])
    with pytest.raises(NotImplementedError, match="one by one"):
        jax.jit(jax.grad(lambda x: chain(x, h, stages)[1].sum()))(x)


@pytest.mark.parametrize("n", [1, 9, 32])
def test_plans_are_sound(n):
    H, F = 7168, 28672
    weights = [
        ("bitmap", (H, H), H * H // 2),
        ("delta_csr", (F, H), F * H // 2),
        ("bitmap", (H, F), H * F // 5),
        ("delta_csr", (3 * H, H), 3 * H * H),
    ]
    plans, workspace = plan.chain(weights, n, F, H100)
    own = []
    for (format, (m, k), _), p in zip(weights, plans, strict=True):
        by_memory = int(n <= 16 and p is plans[0])
        cut = plan.model(format, m, 1, k, H100, by_memory)
        assert p == plan.choose(format, m, 1, k, n, 1, H100, cut)
        groups = {1: 8, 9: 16, 32: 32} if format == "bitmap" else {1: 1, 9: 8, 32: 8}
        assert p.group == groups[n]
        own.append(-(-p.workspace // 256) * 256)
    assert workspace == 2 * -(-n * F * 2 // 256) * 256 + max(own)


# ---- OPT ----


def steps(model, dtype, count=3):
    """Logits and caches of `count` tokens, one at a time, after 9 slots of anything."""
    ids, mask = tiny_opt.prompts()
    cache = KVCache.create(model.config, 3, 9 + count, dtype)
    held = [vector(k.shape, dtype, i) for i, k in enumerate((*cache.keys, *cache.values))]
    n = len(cache.keys)
    valid = np.pad(mask == 1, ((0, 0), (0, count)))
    cache = KVCache((*held[:n],), (*held[n:],), valid, np.int32(9))
    step = jax.jit(lambda *args: model(*args))
    seen = []
    for i in range(count):
        y, cache = step(ids[:, i : i + 1], None, cache)
        seen += [y, *cache.keys, *cache.values]
    return seen


def chains_in(model):
    cache = KVCache.create(model.config, 3, 12, model.dtype)
    jaxpr = jax.make_jaxpr(lambda *args: model(*args))(np.ones((3, 1), np.int32), None, cache)
    return str(jaxpr).count("= flashllm_chain")


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("plain", jnp.float32), ("plain", jnp.float16), ("gelu", jnp.bfloat16),
     ("bare", jnp.float16), ("no_final_norm", jnp.float16), ("projections", jnp.bfloat16),
     ("post_norm", jnp.float16)],
)  # fmt: skip
def test_a_decode_step_is_the_same_with_and_without(tmp_path, monkeypatch, variant, dtype):
    config = tiny_opt.config(variant)
    weights = tiny_opt.weights(config, np.float16, 0.7)
    model = opt.load(tiny_opt.save(tmp_path, config, weights), dtype=dtype)
    with_chains = steps(model, dtype)
    assert chains_in(model) == int(config.get("do_layer_norm_before", True))
    monkeypatch.setattr(opt.OPT, "_has_rows", False)
    assert chains_in(model) == 0
    for a, b in zip(with_chains, steps(model, dtype), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def test_rows_with_a_dense_layer_are_no_chains(tmp_path, monkeypatch):
    config = tiny_opt.config("plain", num_hidden_layers=3)
    weights = tiny_opt.weights(config, np.float16, 0.7)
    weights["model.decoder.layers.1.fc1.weight"][:] = 0.1
    model = opt.load(tiny_opt.save(tmp_path, config, weights), dtype=jnp.float16)
    assert chains_in(model) == 2
    seen = steps(model, jnp.float16)
    monkeypatch.setattr(opt.OPT, "_has_rows", False)
    for a, b in zip(seen, steps(model, jnp.float16), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def test_layers_that_compute_in_other_dtypes_are_in_no_chain(tmp_path):
    config = tiny_opt.config("plain")
    weights = tiny_opt.weights(config, np.float16, 0.7)
    model = opt.load(tiny_opt.save(tmp_path, config, weights), dtype=jnp.float16)
    model.layers[0].fc2.dtype = None
    assert chains_in(model) == 2
    model.layers[1].final_layer_norm.dtype = jnp.float32  # behind out_proj; fc1 takes float32
    assert chains_in(model) == 3


def test_heads_of_no_whole_pieces_attend_between_chains(tmp_path):
    config = tiny_opt.config("plain", num_hidden_layers=2)
    weights = tiny_opt.weights(config, np.float16, 0.7)
    model = opt.load(tiny_opt.save(tmp_path, config, weights), dtype=jnp.float16)
    assert chains_in(model) == 1
    d = model.config.head_dim
    model.config = dataclasses.replace(model.config, num_attention_heads=config["hidden_size"] // 4)
    for layer in model.layers:
        layer.self_attn.num_heads = model.config.num_attention_heads
    assert d % 8 == 0
    assert model.config.head_dim == 4
    assert chains_in(model) == 3


def test_a_decode_step_on_a_gpu_is_one_call(cuda, monkeypatch, tmp_path):
    config = tiny_opt.config("plain", hidden_size=64, word_embed_proj_dim=64, ffn_dim=128)
    weights = tiny_opt.weights(config, np.float16, 0.7)
    model = opt.load(tiny_opt.save(tmp_path, config, weights), dtype=jnp.float16)
    cache = KVCache.create(model.config, 2, 12, jnp.float16)
    step = jax.jit(lambda *args: model(*args), donate_argnums=2)
    traced = step.trace(np.ones((2, 1), np.int32), None, cache)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if "@flashllm_" in line]
    assert "@flashllm_chain_v1" in call
    layer = "192, 64, 64, 128, 64"
    assert f"m = dense<[{layer}, {layer}]>" in call
    assert "format = dense<[0, 2, 0, 0, 0, 0, 2, 0, 0, 0]>" in call
    # Keys and values of both layers are updated in place.
    assert re.findall(r"output_tuple_indices = \[(\d+)\], operand_index = (\d+)", call) == [
        ("3", "8"), ("4", "9"), ("5", "36"), ("6", "37")
    ]  # fmt: skip
