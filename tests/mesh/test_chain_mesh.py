"""Chains on meshes: what their stages give there, one by one."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flashllm as jf
from jax_flashllm import chain as chains
from jax_flashllm.chain import Stage, chain

H = 64


def integers(shape, seed, density=1.0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.integers(-4, 5, shape), 0).astype(np.float16)


W = [integers((H, H), i, 0.4) for i in range(2)]
X, G = integers((8, H), 3), integers((8, H), 4)


def stages(shards=1):
    return [Stage(jf.encode(w, shards=shards), add=i == 0) for i, w in enumerate(W)]


def test_weights_on_an_auto_mesh():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, P("a"))
    sharded = [Stage(jf.shard(s.weight, mesh, rows="b"), add=s.add) for s in stages(2)]
    x, h = jax.device_put((X, G), rows)
    for got in (jax.jit(chain)(x, h, sharded), chain(x, h, sharded)):
        for a, b in zip(got, jax.jit(chain)(X, G, stages()), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_inside_a_shard_map(kind):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
    x, h = jax.device_put((X, G), NamedSharding(mesh, P("a")))
    w = jax.device_put(stages(), NamedSharding(mesh, P()))
    f = jax.shard_map(chain, mesh=mesh, in_specs=(P("a"), P("a"), P()), out_specs=P("a"))
    for a, b in zip(jax.jit(f)(x, h, w), jax.jit(chain)(X, G, stages()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_call_on_one_device_alone(monkeypatch):
    """The mesh may be seen when a program is lowered, and not before."""
    monkeypatch.setattr(chains, "_flashllm", types.SimpleNamespace(cuda_targets=dict))
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, P("a"))

    def calls(f, *args):
        traced = f.trace(*args)
        assert str(traced.jaxpr).count("= flashllm_chain") == 1
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return text.count("@flashllm_chain_v1")

    def beside(other, x, h, stages):
        return other + 1, chain(x, h, stages)

    assert calls(jax.jit(beside), jnp.asarray(X), X, G, stages()) == 1
    assert calls(jax.jit(beside), jax.device_put(X, where), X, G, stages()) == 0
    assert calls(jax.jit(chain, in_shardings=(where, where, None)), X, G, stages()) == 0
