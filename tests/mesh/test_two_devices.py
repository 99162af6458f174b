"""What two devices are enough for, on the default ones: CPU devices here, two GPUs with

JAX_DEFAULT_MATMUL_PRECISION=highest XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    pytest tests/mesh/test_two_devices.py tests/mesh/test_distributed.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_opt
from collectives import collectives
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flashllm as jf
from jax_flashllm.models import opt
from jax_flashllm.models.cache import KVCache
from jax_flashllm.models.commands.common import DEMO
from jax_flashllm.models.generate import generate
from jax_flashllm.nn import SparseDense, restore, sparsify

M, K, T = 256, 512, 8
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
both = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
formats = pytest.mark.parametrize("format", ["bitmap", "delta_csr"])


def integers(shape, seed, density=1.0):
    """Small ones, so that sums are exact in any order."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.integers(-2, 3, shape), 0).astype(np.float16)


W, X = integers((M, K), 0, 0.3), integers((T, K), 1)
Y = X.astype(np.float32) @ W.T.astype(np.float32)


def mesh_of(kind=AUTO, shape=(2,), names=("a",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=jax.devices()[:2])


def put(mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def run(f, *args, y, moves):
    compiled = jax.jit(f).lower(*args).compile()
    result = compiled(*args)
    np.testing.assert_array_equal(np.asarray(result, np.float32), y)
    assert collectives(compiled) == moves
    return result


# rows and columns of W, x's spec, collectives of a result in 16 bits
CASES = {
    "rows": ("a", None, P(), []),
    "columns": (None, "a", P(None, "a"), [("all-reduce", 2 * Y.size)]),
    "tokens": (None, None, P("a"), []),
}


@both
@formats
@pytest.mark.parametrize("case", CASES)
def test_products(kind, format, case):
    rows, columns, spec, moves = CASES[case]
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W, format), mesh, rows, columns)
    y = run(jf.spmm, w, put(mesh, X, *spec), y=Y, moves=moves)
    assert len(y.sharding.device_set) == 2


@both
def test_reduce_scatter_where_the_output_asks_for_it(kind):
    mesh = mesh_of(kind)
    w, x = jf.shard(jf.encode(W), mesh, columns="a"), put(mesh, X, None, "a")

    def f(w, x):
        if kind == EXPLICIT:
            return jf.spmm(w, x, out_sharding=P(None, "a"))
        return jax.lax.with_sharding_constraint(jf.spmm(w, x), NamedSharding(mesh, P(None, "a")))

    run(f, w, x, y=Y, moves=[("reduce-scatter", Y.size)])


@both
@pytest.mark.parametrize("columns", [None, "a"])
def test_inside_a_shard_map(kind, columns):
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W), mesh, None if columns else "a", columns)
    f = jax.shard_map(
        lambda w, x: jax.lax.psum(jf.spmm(w, x), "a") if columns else jf.spmm(w, x),
        mesh=mesh, in_specs=(P("a"), P(None, columns)), out_specs=P() if columns else P(None, "a"),
    )  # fmt: skip
    moves = [("all-reduce", 2 * Y.size)] if columns else []
    run(f, w, put(mesh, X, None, columns), y=Y, moves=moves)


@both
def test_vmap_over_a_sharded_stack(kind):
    mesh = mesh_of(kind)
    stack = put(mesh, jf.stack([jf.encode(W), jf.encode(2 * W)]), "a")
    run(jax.vmap(jf.spmm, (0, None)), stack, put(mesh, X), y=np.stack([Y, 2 * Y]), moves=[])


@both
@pytest.mark.parametrize("case", CASES)
def test_gradients(kind, case):
    rows, columns, spec, _ = CASES[case]
    mesh = mesh_of(kind)

    def f(w, x):
        def loss(values, x):
            y = jf.spmm(w.with_values(values), x).astype(jnp.float32)
            return (y * y).sum() / 1024

        return jax.grad(loss, (0, 1))(w.values, x)

    w = jf.shard(jf.encode(W), mesh, rows, columns)
    alone = jf.encode(W, shards=(w.row_shards, w.column_shards))
    args = w, put(mesh, X, *spec)
    compiled = jax.jit(f).lower(*args).compile()
    for a, b in zip(compiled(*args), jax.jit(f)(alone, X), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=4e-3, atol=1e-2
        )
    assert {move for move, _ in collectives(compiled)} <= {"all-reduce"}


@formats
def test_from_one_to_two_shards_and_back(format):
    mesh = mesh_of()
    w = jf.shard(jf.encode(W, format), mesh, columns="a")
    assert {s.data.shape[0] for s in w.values.addressable_shards} == {1}
    w = jf.shard(w, mesh, rows="a")
    np.testing.assert_array_equal(w.to_dense(), W)
    w = jf.shard(w, jax.make_mesh((1,), ("a",), devices=jax.devices()[1:2]), columns="a")
    np.testing.assert_array_equal(w.to_dense(), W)
    assert w.values.devices() == {jax.devices()[1]}


class MLP(nnx.Module):
    """Rows of the first over "tp", columns of the second."""

    def __init__(self, rngs):
        def split(*names):
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)

        self.up = nnx.Linear(K, M, kernel_init=split(None, "tp"), rngs=rngs)
        self.down = nnx.Linear(M, K, kernel_init=split("tp", None), rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


def test_layers_are_saved_on_one_mesh_and_restored_on_another(tmp_path):
    import orbax.checkpoint as ocp

    with jax.set_mesh(mesh_of(AUTO, (2, 1), ("tp", "dp"))):
        model = sparsify(MLP(nnx.Rngs(0)), 0.5)
        graph, state = nnx.split(model)
        x = np.random.default_rng(0).standard_normal((T, K)).astype(np.float32)
        compiled = jax.jit(lambda s, x: nnx.merge(graph, s)(x)).lower(state, x).compile()
        assert collectives(compiled) == [("all-reduce", 4 * T * K)]
        y = compiled(state, x)
    assert isinstance(model.up, SparseDense)
    w1, w2 = (layer.weight.to_dense().astype(np.float32).T for layer in (model.up, model.down))
    np.testing.assert_allclose(y, np.maximum(x @ w1, 0) @ w2, rtol=1e-3, atol=1e-3)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(model))
    with (
        jax.set_mesh(mesh_of(AUTO, (1, 2), ("tp", "dp"))),
        ocp.StandardCheckpointer() as checkpointer,
    ):
        saved = checkpointer.restore(tmp_path / "model")
        new = restore(nnx.eval_shape(lambda: MLP(nnx.Rngs(1))), saved)
        again = nnx.jit(lambda m, x: m(x))(new, x)
    np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    config = tiny_opt.config("plain", vocab_size=64)
    return tiny_opt.save(
        tmp_path_factory.mktemp("opt"), config, tiny_opt.weights(config, np.float16, 0.7)
    )


@pytest.mark.parametrize("axis", ["tp", "dp"])
def test_tokens_of_the_demo_are_those_of_one_device(axis):
    prompts = np.random.default_rng(0).integers(3, 4096, (2, 9))
    mesh = mesh_of(names=(axis,))
    alone = generate(opt.load(DEMO, np.float32), prompts, 24, eos_token_id=())
    got = generate(opt.load(DEMO, np.float32, mesh=mesh), prompts, 24, eos_token_id=())
    np.testing.assert_array_equal(got, alone)


def test_two_all_reduces_a_block_and_no_more(tiny):
    model = opt.load(tiny, np.float32, mesh=mesh_of(names=("tp",)))
    config, layout = model.config, model.layout
    cache = layout.placed(jax.eval_shape(lambda: KVCache.create(config, 1, 64, np.float32)))
    graph, state = nnx.split(model)
    step = jax.jit(lambda s, ids, cache: nnx.merge(graph, s)(ids, None, cache, last_only=True))
    found = collectives(step.lower(state, jnp.zeros((1, 1), jnp.int32), cache).compile())
    reduced = [("all-reduce", 4 * config.hidden_size)] * (2 * config.num_hidden_layers + 1)
    # On GPUs a gather's operand stands beside its result.
    gathered = 4 * config.vocab_size
    assert found[1:] == reduced
    assert found[0] in [("all-gather", gathered), ("all-gather", gathered * 3 // 2)]
