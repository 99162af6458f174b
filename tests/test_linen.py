"""linen.SparseDense does what linen.Dense does with the same, pruned weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from reference import FORMATS, HALVES, assert_product, sparse_matrix

import jax_flashllm as jf
from jax_flashllm.linen import SparseDense, variables_from_dense, variables_from_encoded

pytestmark = pytest.mark.usefixtures("quick_compiles")
X = np.random.default_rng(0).standard_normal((3, 40), np.float32)


def close(a, b, tolerance=1e-5):
    a, b = (np.asarray(v).astype(np.float64) for v in (a, b))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


class DenseMLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(40)(linen.relu(linen.Dense(30, name="up")(x)))


class SparseMLP(linen.Module):
    sparsity: float = 0.0

    @linen.compact
    def __call__(self, x):
        y = SparseDense(30, name="up", sparsity=self.sparsity)(x, activation="relu")
        return SparseDense(40, name="Dense_0", sparsity=self.sparsity)(y)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_same_key_draws_what_dense_draws(dtype, use_bias):
    kwargs = {"use_bias": use_bias, "param_dtype": dtype}
    ours, theirs = SparseDense(24, **kwargs), linen.Dense(24, **kwargs)
    key = jax.random.key(1)
    variables, expected = ours.init(key, X), theirs.init(key, X)
    close(ours.apply(variables, X), theirs.apply(expected, X))
    close(jax.jit(ours.apply)(variables, X), theirs.apply(expected, X))
    assert set(variables) == {"params", "sparse"}
    assert variables["params"].keys() == expected["params"].keys()
    for x_dtype in [np.float32, np.float16, jnp.bfloat16]:
        for compute in [None, jnp.float32, jnp.float16]:
            a = SparseDense(24, dtype=compute, **kwargs).apply(variables, X.astype(x_dtype))
            b = linen.Dense(24, dtype=compute, **kwargs).apply(expected, X.astype(x_dtype))
            assert a.dtype == b.dtype


def test_init_under_jit_and_eval_shape():
    model = SparseMLP(sparsity=0.7)
    eager = model.init(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, eager, jax.jit(model.init)(jax.random.key(0), X))
    abstract = jax.eval_shape(model.init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, eager) == jax.tree.map(lambda a: a.shape, abstract)


@pytest.mark.parametrize("format", FORMATS)
def test_a_given_weight(format):
    dense = sparse_matrix((24, 40), np.float16, 0.3)
    w, bias = jf.encode(dense, format, shards=2), np.ones(24, np.float32)
    variables = variables_from_encoded(w, bias)
    y = SparseDense(24).apply(variables, X, activation="gelu")
    assert_product(y, X, dense, bias, "gelu")
    y = SparseDense(24, use_bias=False).apply(variables_from_encoded(w), X)
    assert_product(y, X, dense)


def test_a_whole_model_from_dense_params():
    params = DenseMLP().init(jax.random.key(0), X)["params"]
    same = variables_from_dense(params)
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    close(SparseMLP().apply(same, X), DenseMLP().apply({"params": rounded}, X))
    half = variables_from_dense(params, 0.5, param_dtype=np.float16)
    assert half["params"]["up"]["kernel"].dtype == np.float16
    assert half["params"]["up"]["kernel"].size < 0.55 * params["up"]["kernel"].size
    some = variables_from_dense(params, 0.5, filter=lambda path: path != ("up",))
    np.testing.assert_array_equal(some["params"]["up"]["kernel"], params["up"]["kernel"])
    assert set(some["sparse"]) == {"Dense_0"}


def test_a_layer_from_dense_params():
    params = {"kernel": np.asarray(sparse_matrix((40, 24), np.float16, 0.3)), "bias": np.ones(24)}
    layer, variables = SparseDense.from_dense(params, format="delta_csr", dtype=jnp.float32)
    assert_product(layer.apply(variables, X), X, params["kernel"].T, params["bias"])
    layer, variables = SparseDense.from_dense({"kernel": params["kernel"]}, 0.9)
    assert variables["params"].keys() == {"kernel"}
    assert np.count_nonzero(layer.apply(variables, np.eye(40, dtype=np.float32))) == 4 * 24


def test_orbax_round_trip(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    model = SparseMLP(sparsity=0.5)
    variables = model.init(jax.random.key(0), X)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "mlp", variables)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "mlp", variables)
    np.testing.assert_array_equal(model.apply(back, X), model.apply(variables, X))


def test_training_with_optax():
    model = SparseMLP(sparsity=0.5)
    variables = model.init(jax.random.key(0), X)
    params, sparse = variables["params"], variables["sparse"]
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        loss = lambda p: ((model.apply({"params": p, "sparse": sparse}, X) - 1) ** 2).mean()  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(10):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 2


def test_scan_over_layers():
    class Stack(linen.Module):
        @linen.compact
        def __call__(self, x):
            layer = linen.scan(
                lambda m, x, _: (m(x, activation="relu"), None),
                variable_axes={"params": 0, "sparse": 0},
                split_rngs={"params": True},
                length=2,
            )
            return layer(SparseDense(40), x, None)[0]

    layers = [
        variables_from_encoded(
            jf.encode(sparse_matrix((40, 40), np.float16, 0.5, i), "bitmap"), np.ones(40)
        )
        for i in range(2)
    ]
    stacked = jf.stack(
        [jf.encode(sparse_matrix((40, 40), np.float16, 0.5, i), "bitmap") for i in range(2)]
    )
    variables = variables_from_encoded(stacked, np.ones((2, 40), np.float32))
    variables = {kind: {"SparseDense_0": v} for kind, v in variables.items()}
    y = X
    for v in layers:
        y = SparseDense(40).apply(v, y, activation="relu")
    close(Stack().apply(variables, X), y)


def test_errors():
    variables = SparseDense(24).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="no 'sparse' collection"):
        SparseDense(24).apply({"params": variables["params"]}, X)
    with pytest.raises(ValueError, match=r"make weights with"):
        SparseDense(24).apply(variables, np.ones((3, 400), np.float32))
    with pytest.raises(TypeError, match="param_dtype is float32"):
        SparseDense(24, param_dtype=jnp.float32).init(jax.random.key(0), X)
