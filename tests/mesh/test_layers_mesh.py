"""SparseDense over meshes: annotated as Flax's layers are, counted, saved and moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flashllm as jf
from jax_flashllm.nn import SparseDense, restore, sparsify

K, M = 32, 64
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
both = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def mesh_of(kind=AUTO, shape=(4, 2)):
    return jax.make_mesh(shape, ("tp", "dp"), axis_types=(kind,) * 2)


def annotated(*names):
    return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)


class MLP(nnx.Module):
    """Rows of the first over "tp", columns of the second."""

    def __init__(self, rngs):
        self.up = nnx.Linear(K, M, kernel_init=annotated(None, "tp"), rngs=rngs)
        self.down = nnx.Linear(M, K, kernel_init=annotated("tp", None), rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


X = np.random.default_rng(0).standard_normal((8, K)).astype(np.float32)


@both
@pytest.mark.parametrize(
    ("names", "spec", "grid"),
    [
        ((None, "tp"), P("tp"), (4, 1)),
        (("tp", None), P("tp"), (1, 4)),
        (("tp", "dp"), P(("tp", "dp")), (2, 4)),
    ],
)
def test_annotations_are_those_of_linear(kind, names, spec, grid):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        layer = SparseDense(K, M, sparsity=0.5, kernel_init=annotated(*names), rngs=nnx.Rngs(0))
    assert layer.grid == grid
    found = nnx.get_partition_spec(nnx.state(layer))
    buffers = ("kernel", "kernel_index", "kernel_offsets")
    assert [found[name].get_value() for name in buffers] == [spec] * 3
    for name in buffers:
        assert getattr(layer, name)[...].sharding.spec[0] == spec[0]
    with jax.set_mesh(mesh):
        linear = nnx.Linear(K, M, param_dtype=jnp.bfloat16, kernel_init=annotated(*names),
                            kernel_metadata={"mesh": mesh}, rngs=nnx.Rngs(0))  # fmt: skip
        same = SparseDense.from_dense(linear, 0.5)
    np.testing.assert_array_equal(same.weight.to_dense(), layer.weight.to_dense())
    assert same.grid == grid


def test_logical_names_follow_the_rules():
    with jax.set_mesh(mesh_of()), nnx.logical_axis_rules([("ffn", "tp"), ("embed", None)]):
        layer = SparseDense(K, M, kernel_init=annotated("embed", "ffn"), rngs=nnx.Rngs(0))
    assert layer.kernel[...].sharding.spec == P("tp")


@pytest.mark.parametrize(
    ("through", "kind"), [("jit", AUTO), ("jit", EXPLICIT), ("shard_map", AUTO)]
)
def test_sparsify_keeps_annotations_and_the_model_moves_what_it_must(through, kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        dense = MLP(nnx.Rngs(0))
        model = sparsify(dense, 0.5)
    assert model.up.grid == (4, 1)
    assert model.down.grid == (1, 4)
    x = jax.device_put(X, NamedSharding(mesh, P("dp")))
    w1, w2 = (layer.weight.to_dense().astype(np.float32).T for layer in (model.up, model.down))
    y = np.maximum(X @ w1, 0) @ w2
    if through == "jit":
        graph, state = nnx.split(model)
        compiled = jax.jit(lambda s, x: nnx.merge(graph, s)(x)).lower(state, x).compile()
        result = compiled(state, x)
        assert collectives(compiled) == [("all-reduce", 4 * K * 4)]
        np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), y, rtol=1e-4, atol=1e-4)
    else:

        def local(model, x):
            h = jax.nn.relu(model.up(x))
            return jax.lax.psum(model.down(h), "tp")

        model.up.bias = model.down.bias = None
        specs = nnx.StateSharding(nnx.get_partition_spec(nnx.state(model)))
        f = nnx.shard_map(local, mesh=mesh, in_specs=(specs, P("dp")), out_specs=P("dp"))
        result = f(model, x)
    np.testing.assert_allclose(result, y, rtol=1e-4, atol=1e-4)


def test_a_placed_weight_brings_its_annotation():
    mesh = mesh_of()
    dense = np.ones((M, K), np.float16)
    layer = SparseDense.from_encoded(jf.shard(jf.encode(dense), mesh, "dp", "tp"))
    assert nnx.get_partition_spec(nnx.state(layer))["kernel"].get_value() == P(("tp", "dp"))
    np.testing.assert_array_equal(layer(np.ones((1, K), np.float16)), np.full((1, M), K))


@both
def test_a_jit_leaves_a_placed_weight_its_annotation(kind):
    w = jf.shard(jf.encode(np.ones((M, K), np.float16)), mesh_of(kind), "dp", "tp")
    w = jax.jit(lambda w: w)(w)  # an Explicit mesh's types have an entry for each dimension
    found = nnx.get_partition_spec(nnx.state(SparseDense.from_encoded(w)))
    assert [v.get_value() for v in jax.tree.leaves(found, is_leaf=lambda x: hasattr(x, "get_value"))
            if v.get_value()] == [P(("tp", "dp"))] * 3  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 4), (8, 1)])
def test_orbax_saves_on_one_mesh_and_restores_on_another(tmp_path, shape):
    import orbax.checkpoint as ocp

    with jax.set_mesh(mesh_of()):
        model = sparsify(MLP(nnx.Rngs(0)), 0.5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(model))
    with jax.set_mesh(mesh_of(shape=shape)), ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(tmp_path / "model")
        new = restore(nnx.eval_shape(lambda: MLP(nnx.Rngs(1))), saved)
        result = nnx.jit(lambda m, x: m(x))(new, X)
    # Four blocks lie on two devices as they are; eight devices need eight.
    assert new.up.grid == (max(4, shape[0]), 1)
    assert new.down.grid == (1, max(4, shape[0]))
    assert new.down.kernel[...].sharding.spec == P("tp")
    for a, b in [(new.up, model.up), (new.down, model.down)]:
        np.testing.assert_array_equal(a.weight.to_dense(), b.weight.to_dense())
    np.testing.assert_allclose(result, nnx.jit(lambda m, x: m(x))(model, X), rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("abstract", [False, True])
def test_a_sparse_model_takes_what_another_mesh_saved(kind, size, abstract):
    with jax.set_mesh(mesh_of(kind)):
        model = sparsify(MLP(nnx.Rngs(0)), 0.5)
        saved = jax.jit(lambda s: s)(nnx.state(model))
    if abstract:  # or as nested dicts, which is what Orbax gives
        saved = nnx.to_pure_dict(saved)

    def other():
        new = MLP(nnx.Rngs(1))
        if abstract:  # made in a traced function, as nnx.eval_shape does
            new.up = SparseDense(K, M, kernel_init=annotated(None, "tp"), rngs=nnx.Rngs(1))
            new.down = SparseDense(M, K, kernel_init=annotated("tp", None), rngs=nnx.Rngs(1))
        return new

    mesh = mesh_of(kind, (size, 8 // size))
    with jax.set_mesh(mesh):
        new = restore(nnx.eval_shape(other) if abstract else sparsify(other(), 0.5), saved)
        specs = nnx.get_partition_spec(nnx.state(new))
        for a, b in [("up", model.up), ("down", model.down)]:
            layer, blocks = getattr(new, a), max(4, size)
            assert layer.grid == ((blocks, 1) if a == "up" else (1, blocks))
            assert specs[a]["kernel"].get_value() == P("tp")
            for v in (layer.kernel, layer.kernel_index, layer.kernel_offsets):
                assert v[...].sharding.mesh == mesh
                assert {s.data.shape[0] for s in v[...].addressable_shards} == {blocks // size}
                assert v.get_metadata().get("mesh") in (None, mesh)
            np.testing.assert_array_equal(layer.weight.to_dense(), b.weight.to_dense())
        again = restore(new, nnx.state(new))  # a tp of 1 cuts rows or columns still
        assert (again.up.grid, again.down.grid) == (new.up.grid, new.down.grid)


def test_a_placed_weight_moves_to_the_mesh_that_is_set():
    """Without an annotation in the model the saved arrays' own names count."""
    with jax.set_mesh(mesh_of()):
        w = jf.shard(jf.encode(np.ones((M, K), np.float16)), mesh_of(), "tp")
        state = nnx.state(SparseDense.from_encoded(w))
    mesh = mesh_of(shape=(8, 1))
    with jax.set_mesh(mesh):
        linear = nnx.Linear(K, M, use_bias=False, rngs=nnx.Rngs(0))
        new = restore(linear, state)
        assert new.kernel[...].sharding == NamedSharding(mesh, P("tp"))
        assert new.grid == (8, 1)


def test_a_sparse_layer_whose_annotation_names_no_axis():
    mesh = mesh_of()
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, None), mesh=mesh)
    with jax.set_mesh(mesh):
        layer = SparseDense(K, M, kernel_init=init, rngs=nnx.Rngs(0))
        new = restore(layer, nnx.state(layer))
    np.testing.assert_array_equal(new.weight.to_dense(), layer.weight.to_dense())


def test_shards_that_the_mesh_does_not_divide():
    with (
        jax.set_mesh(mesh_of()),
        pytest.raises(ValueError, match=r"shards=3.* pass shards=\(4, 1\)"),
    ):
        SparseDense(K, M, shards=3, kernel_init=annotated(None, "tp"), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("names", "spec", "grid"), [((None, "tp"), P("tp"), (4, 1)), (("tp", None), P("tp"), (1, 4))]
)
def test_linen(names, spec, grid):
    from jax_flashllm.linen import SparseDense

    mesh = mesh_of()
    init = linen.with_partitioning(linen.initializers.lecun_normal(), names, mesh)
    layer = SparseDense(M, kernel_init=init, sparsity=0.5, shards=grid)
    variables = layer.init(jax.random.key(0), X)
    found = linen.get_partition_spec(variables)
    assert found["params"]["kernel"] == spec
    assert found["sparse"] == {"kernel_index": spec, "kernel_offsets": spec}
    plain = linen.unbox(variables)
    placed = jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), plain, linen.unbox(found)
    )
    compiled = jax.jit(layer.apply).lower(placed, X).compile()
    result = compiled(placed, X)
    twin = SparseDense(M, kernel_init=linen.initializers.lecun_normal(), sparsity=0.5)
    expected = twin.init_with_output(jax.random.key(0), X)[0]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
    moves = [] if grid == (4, 1) else [("all-reduce", 8 * M * 4)]
    assert collectives(compiled) == moves
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, X), expected, rtol=1e-4, atol=1e-5)
