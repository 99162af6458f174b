"""SparseDense and sparsify do what nnx.Linear does with the same, pruned weights."""

import functools
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from reference import FORMATS, HALVES, assert_product, sparse_matrix

import jax_flashllm as jf
from jax_flashllm.formats import encode_on_host
from jax_flashllm.nn import SparseDense, SparseIndex, restore, sparsify

pytestmark = pytest.mark.usefixtures("quick_compiles")
BF16 = ml_dtypes.bfloat16


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def graph_mode(request):
    """NNX's graph mode and its tree mode, in which modules are plain pytrees."""
    with nnx.set_graph_mode(request.param):
        yield request.param


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.scale = nnx.Param(jnp.ones(width))
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jax.nn.relu(self.up(x * self.scale[...])))


class Model(nnx.Module):
    def __init__(self, rngs, width=40):
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (50, width)))
        self.blocks = nnx.List([Block(width, rngs) for _ in range(2)])
        self.named = nnx.Dict({"a": nnx.Linear(width, width, rngs=rngs)})
        self.pair = nnx.data((nnx.Linear(width, width, rngs=rngs), None))
        self.head = nnx.Sequential(nnx.Linear(width, 70, rngs=rngs), jax.nn.gelu)

    def __call__(self, ids):
        x = self.embed[...][ids]
        for block in self.blocks:
            x = block(x)
        return self.head(self.pair[0](self.named["a"](x)))


IDS = np.arange(12).reshape(3, 4)


def as_float(x):
    return np.asarray(x).astype(np.float64)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(as_float(a), as_float(b), rtol=tolerance, atol=tolerance)


def linear(dtype=np.float32, in_features=70, out_features=40, **kwargs):
    layer = nnx.Linear(in_features, out_features, param_dtype=dtype, rngs=nnx.Rngs(0), **kwargs)
    if layer.bias is not None:
        layer.bias[...] = jnp.arange(out_features).astype(dtype)
    return layer


def dense_twin(layer: SparseDense) -> nnx.Linear:
    """The nnx.Linear of the same weights, in float32."""
    twin = linear(np.float32, layer.in_features, layer.out_features, use_bias=layer.use_bias)
    twin.kernel[...] = jnp.asarray(layer.weight.to_dense().T.astype(np.float32))
    if layer.bias is not None:
        twin.bias[...] = layer.bias[...].astype(np.float32)
    return twin


# ---- SparseDense ----


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_same_rngs_draw_what_linear_draws(dtype, use_bias):
    kwargs = {"use_bias": use_bias, "param_dtype": dtype, "bias_init": nnx.initializers.normal()}
    ours = SparseDense(70, 40, rngs=nnx.Rngs(3), **kwargs)
    theirs = nnx.Linear(70, 40, rngs=nnx.Rngs(3), **kwargs)
    np.testing.assert_array_equal(ours.weight.to_dense().T, theirs.kernel[...])
    assert (ours.bias is None) == (theirs.bias is None)
    if use_bias:
        np.testing.assert_array_equal(ours.bias[...], theirs.bias[...])
    x = np.random.default_rng(0).standard_normal((2, 3, 70), np.float32)
    close(ours(x), theirs(x))


@pytest.mark.parametrize("sparsity", [0.3, 0.97, 1.0])
def test_initial_sparsity_is_exact_in_every_row(sparsity):
    layer = SparseDense(70, 40, sparsity=sparsity, rngs=nnx.Rngs(0))
    dense = layer.weight.to_dense()
    assert (np.count_nonzero(dense, axis=1) == 70 - round(sparsity * 70)).all()
    full = SparseDense(70, 40, rngs=nnx.Rngs(0)).weight.to_dense().astype(np.float32)
    kept = np.abs(full[dense != 0]).reshape(40, -1)
    gone = np.abs(full[dense == 0]).reshape(40, -1)
    if kept.size and gone.size:
        assert (kept.min(1) >= gone.max(1)).all()


@pytest.mark.parametrize("x_dtype", [np.float32, np.float16, BF16, np.int32])
@pytest.mark.parametrize("w_dtype", HALVES)
@pytest.mark.parametrize("bias_dtype", [np.float32, np.float16, BF16, None])
def test_dtypes_promote_as_in_linear(x_dtype, w_dtype, bias_dtype):
    theirs = linear(w_dtype, use_bias=bias_dtype is not None)
    if bias_dtype is not None:
        theirs.bias = nnx.Param(jnp.ones(40, bias_dtype))
    x = np.ones((2, 70), x_dtype)
    for dtype in [None, jnp.float32, jnp.bfloat16, jnp.float16]:
        theirs.dtype = dtype
        ours = SparseDense.from_dense(theirs)
        y, expected = ours(x), theirs(x)
        assert y.dtype == expected.dtype
        close(y, expected, 3e-2 if y.dtype.itemsize == 2 else 1e-5)


def test_a_float32_layer_computes_in_float32():
    layer = SparseDense.from_dense(linear())
    assert layer.weight.dtype == BF16
    x = np.random.default_rng(0).standard_normal((5, 70), np.float32)
    y = layer(x)
    assert y.dtype == np.float32
    assert_product(y, x, layer.weight.to_dense(), layer.bias[...])


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_activation_is_fused(activation):
    layer = SparseDense.from_dense(linear(), 0.5)
    x = np.random.default_rng(0).standard_normal((5, 70), np.float32)
    y = layer(x, activation=activation)
    assert_product(y, x, layer.weight.to_dense(), layer.bias[...], activation)


@pytest.mark.parametrize("format", FORMATS)
def test_from_encoded(format):
    dense = sparse_matrix((40, 70), np.float16, 0.3)
    w = jf.encode(dense, format, shards=3)
    layer = SparseDense.from_encoded(w, np.ones(40, np.float32))
    x = np.ones((2, 70), np.float32)
    assert_product(layer(x), x, dense, np.ones(40))
    assert type(layer.weight) is type(w)
    assert (layer.in_features, layer.out_features) == (70, 40)
    jax.tree.map(np.testing.assert_array_equal, layer.weight, w)
    plain = SparseDense.from_encoded(w)
    assert plain.bias is None
    assert not plain.use_bias
    bias = nnx.Param(jnp.ones(40))
    assert SparseDense.from_encoded(w, bias).bias is bias
    with pytest.raises(TypeError, match="expected an encoded weight, got ndarray"):
        SparseDense.from_encoded(dense)
    with pytest.raises(ValueError, match=r"bias is \[41\] but W is \[40, 70\]; pass bias \[40\]"):
        SparseDense.from_encoded(w, np.ones(41))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_from_dense_prunes_by_magnitude_or_mask(dtype):
    layer = linear(dtype)
    kernel = as_float(layer.kernel[...])
    pruned = as_float(SparseDense.from_dense(layer, 0.5).weight.to_dense().T)
    assert (np.count_nonzero(pruned, axis=0) == 35).all()
    kept = pruned != 0
    close(pruned[kept], kernel[kept], 2**-8)
    least_kept = np.where(kept, np.abs(kernel), np.inf).min(0)
    assert (np.where(kept, 0, np.abs(kernel)).max(0) <= least_kept).all()
    mask = np.random.default_rng(0).random(kernel.shape) < 0.3
    masked = as_float(SparseDense.from_dense(layer, mask=mask).weight.to_dense().T)
    np.testing.assert_array_equal(masked != 0, mask & (kernel != 0))
    # Pruned already, by a product that leaves -0.0: nothing of that is stored.
    layer.kernel[...] = layer.kernel[...] * mask.astype(dtype)
    again = SparseDense.from_dense(layer)
    assert again.weight.nnz == (mask & (kernel != 0)).sum()
    assert SparseDense.from_dense(layer, 0.1).weight.nnz == again.weight.nnz


def test_from_dense_chooses_the_weights_dtype():
    assert SparseDense.from_dense(linear(np.float16)).weight.dtype == np.float16
    assert SparseDense.from_dense(linear(BF16)).weight.dtype == BF16
    assert SparseDense.from_dense(linear()).weight.dtype == BF16
    sixteen = nnx.Linear(70, 40, dtype=jnp.float16, rngs=nnx.Rngs(0))
    ours = SparseDense.from_dense(sixteen)
    assert ours.weight.dtype == np.float16  # what the layer rounds to at every call anyway
    x = np.ones((1, 70), np.float32)
    close(ours(x), sixteen(x), 2**-9)
    assert SparseDense.from_dense(linear(), param_dtype=np.float16).weight.dtype == np.float16
    with pytest.raises(TypeError, match=r"param_dtype is float32, but .* are float16 or bfloat16"):
        SparseDense.from_dense(linear(), param_dtype=jnp.float32)
    with pytest.raises(TypeError, match="param_dtype is float32"):
        SparseDense(4, 4, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_from_dense_refuses():
    layer = linear()
    with pytest.raises(ValueError, match=r"sparsity must be from 0 to 1, got 1\.5"):
        SparseDense.from_dense(layer, 1.5)
    with pytest.raises(ValueError, match="both sparsity and mask"):
        SparseDense.from_dense(layer, 0.5, mask=np.ones((70, 40), bool))
    with pytest.raises(ValueError, match=r"mask is bool\[40, 70\], expected bool\[70, 40\]"):
        SparseDense.from_dense(layer, mask=np.ones((40, 70), bool))
    with pytest.raises(ValueError, match=r"mask is float64\[70, 40\], expected bool"):
        SparseDense.from_dense(layer, mask=np.ones((70, 40)))
    odd = nnx.Linear(4, 4, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="has a preferred_element_type of its own"):
        SparseDense.from_dense(odd)


def test_wrong_inputs_are_named():
    layer = SparseDense(70, 40, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"x has 71 features but W is \[40, 70\]"):
        layer(np.ones((2, 71), np.float32))


def test_variables_are_what_nnx_filters_expect():
    layer = SparseDense(70, 40, sparsity=0.5, rngs=nnx.Rngs(0))
    params = nnx.state(layer, nnx.Param)
    assert set(params) == {"kernel", "bias"}
    assert set(nnx.state(layer, SparseIndex)) == {"kernel_index", "kernel_offsets"}
    assert all(jnp.issubdtype(p.dtype, jnp.floating) for p in jax.tree.leaves(params))


# ---- sparsify ----


def linears(model):
    return {
        ".".join(map(str, path)): m
        for path, m in nnx.iter_modules(model, graph=True)
        if isinstance(m, nnx.Linear | SparseDense)
    }


def test_sparsify_replaces_every_linear(graph_mode):
    model = Model(nnx.Rngs(0))
    before = model(IDS)
    sparse = sparsify(model, 0.5)
    assert len(linears(model)) == 7
    assert linears(model).keys() == linears(sparse).keys()
    assert all(type(m) is SparseDense for m in linears(sparse).values())
    assert all(type(m) is nnx.Linear for m in linears(model).values())
    for layer in linears(sparse).values():
        assert layer.weight.sparsity == 0.5
    close(model(IDS), before, 0)  # the dense model is as it was
    # Against the dense model with the same weights.
    for name, layer in linears(sparse).items():
        twin = linears(model)[name]
        twin.kernel[...] = jnp.asarray(layer.weight.to_dense().T.astype(np.float32))
    close(sparse(IDS), model(IDS))
    assert sparse.pair[1] is None


def test_sparsify_runs_under_nnx_jit_and_jax_jit(graph_mode):
    sparse = sparsify(Model(nnx.Rngs(0)), 0.5)
    expected = sparse(IDS)
    close(nnx.jit(lambda m, ids: m(ids))(sparse, IDS), expected)
    graph, state = nnx.split(sparse)
    close(jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, IDS), expected)
    graph, params, rest = nnx.split(sparse, nnx.Param, ...)
    assert "kernel_index" in rest["blocks"][0]["up"]
    again = nnx.merge(graph, params, rest)
    close(again(IDS), expected)
    close(nnx.clone(sparse)(IDS), expected)
    copy = pickle.loads(pickle.dumps(nnx.to_pure_dict(state)))
    nnx.replace_by_pure_dict(state, copy)
    close(nnx.merge(*nnx.split(sparse)[:1], state)(IDS), expected)


def test_modules_are_pytrees_to_jax():
    sparse = sparsify(Model(nnx.Rngs(0)), 0.5)
    with nnx.set_graph_mode(False):
        close(jax.jit(lambda m, ids: m(ids))(sparse, IDS), sparse(IDS))


def test_shared_layers_and_shared_kernels_stay_shared():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(8, 8, rngs=rngs)
            self.again = self.a
            self.block = Block(8, rngs)
            self.blocks = nnx.List([self.block, Block(8, rngs)])
            self.tied = nnx.Linear(8, 8, rngs=rngs)
            self.tied.kernel = self.a.kernel

    sparse = sparsify(Shared(nnx.Rngs(0)), 0.5)
    assert sparse.a is sparse.again
    assert sparse.block is sparse.blocks[0]
    assert sparse.block is not sparse.blocks[1]
    assert sparse.tied is not sparse.a
    assert sparse.tied.kernel is sparse.a.kernel
    assert sparse.tied.kernel_index is sparse.a.kernel_index
    assert sparse.tied.bias is not sparse.a.bias
    back = restore(Shared(nnx.Rngs(1)), nnx.state(sparse))
    assert back.tied.kernel is back.a.kernel
    assert back.a is back.again


def test_a_linear_itself_may_be_the_model():
    layer = sparsify(linear(), 0.5)
    assert type(layer) is SparseDense
    plain = sparsify({"a": [linear()], "b": 3}, 0.5)
    assert type(plain["a"][0]) is SparseDense
    assert plain["b"] == 3


def test_filter_by_path_and_by_layer():
    model = Model(nnx.Rngs(0))
    sparse = sparsify(model, 0.5, filter=lambda path, layer: "head" not in path)
    dense = [n for n, m in linears(sparse).items() if type(m) is nnx.Linear]
    assert dense == ["head.layers.0"]
    sparse = sparsify(model, 0.5, filter=lambda path, layer: layer.out_features == 80)
    assert {n for n, m in linears(sparse).items() if type(m) is SparseDense} == {
        "blocks.0.up",
        "blocks.1.up",
    }
    seen = []
    sparsify(model, 0.5, filter=lambda path, layer: bool(seen.append(path)))
    assert ("blocks", 1, "down") in seen
    assert ("pair", 0) in seen

    class Special(nnx.Linear):
        """A layer that does something more than its base class."""

    with pytest.warns(UserWarning, match="nothing became sparse"):
        assert type(sparsify(Special(4, 4, rngs=nnx.Rngs(0)), 0.5)) is Special


@pytest.mark.parametrize("form", ["dotted", "tuples", "state", "pure", "nested"])
def test_masks_in_every_form(form):
    model = Model(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    full = jax.tree.map(lambda p: rng.random(p.shape) < 0.4, nnx.state(model, nnx.Param))
    up = full["blocks"][1]["up"]["kernel"][...]
    masks = {
        "dotted": {"blocks.1.up": up},
        "tuples": {("blocks", 1, "up"): up},
        "nested": {"blocks": {"1": {"up": {"kernel": jnp.asarray(up)}}}},
        "state": full,
        "pure": nnx.to_pure_dict(full),
    }[form]
    sparse = sparsify(model, masks=masks)
    layer = linears(sparse)["blocks.1.up"]
    np.testing.assert_array_equal(layer.weight.to_dense().T != 0, up)
    others = [type(m) for n, m in linears(sparse).items() if n != "blocks.1.up"]
    expected = SparseDense if form in ("state", "pure") else nnx.Linear
    assert set(others) == {expected}


def test_sparsify_refuses():
    model = Model(nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"masks name nothing\.here, but the nnx.Linear layers are "
    ):
        sparsify(model, masks={"nothing.here": np.ones((40, 80), bool)})
    with pytest.raises(ValueError, match="both sparsity and mask"):
        sparsify(model, 0.5, masks={"blocks.0.up": np.ones((40, 80), bool)})
    with pytest.raises(ValueError, match="expected bool") as e:
        sparsify(model, masks={"blocks.0.up": np.ones((3, 80), bool)})
    assert e.value.__notes__ == ["sparsify: at blocks.0.up"]
    with pytest.raises(ValueError, match="from 0 to 1, got 70"):
        sparsify(model, 70)
    with pytest.raises(ValueError, match=r"is sparse already, 50%, .* again to 90%"):
        sparsify(sparsify(model, 0.5), 0.9)
    with pytest.warns(UserWarning, match="LayerNorm has no nnx.Linear layer, so nothing became"):
        sparsify(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), 0.5)


def test_what_is_pruned_already_is_only_encoded():
    model = Model(nnx.Rngs(0))
    once = sparsify(model, 0.7)
    for name, layer in linears(once).items():
        twin = linears(model)[name]
        twin.kernel[...] = jnp.asarray(layer.weight.to_dense().T.astype(np.float32))
    for other in [sparsify(model), sparsify(model, 0.7), sparsify(model, 0.5)]:
        for name, layer in linears(other).items():
            np.testing.assert_array_equal(
                layer.weight.to_dense(), linears(once)[name].weight.to_dense()
            )


# ---- training ----


def train(model, steps=3):
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param)
    labels = np.arange(12).reshape(3, 4) % 7

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(IDS), labels).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]


def test_training_moves_values_and_keeps_zeros():
    sparse = sparsify(Model(nnx.Rngs(0)), 0.7)
    before = {n: m.weight.to_dense() for n, m in linears(sparse).items()}
    losses = train(sparse, 8)
    assert losses[-1] < losses[0]
    for name, layer in linears(sparse).items():
        after = layer.weight.to_dense()
        layer.weight.validate()
        assert not after[before[name] == 0].any()
        assert (after != before[name]).any()


def test_gradients_are_those_of_the_dense_model_at_the_kept_weights(graph_mode):
    layer = SparseDense.from_dense(linear(np.float16), 0.5)
    x = np.random.default_rng(0).standard_normal((5, 70), np.float32)
    loss = lambda m: (jnp.sin(m(x)) ** 2).sum()  # noqa: E731
    twin = dense_twin(layer)
    if graph_mode:
        ours, theirs = nnx.grad(loss)(layer), nnx.grad(loss)(twin)
    else:  # in tree mode one differentiates in split-off state

        def grad(m):
            graph, params, rest = nnx.split(m, nnx.Param, ...)
            return jax.grad(lambda p: loss(nnx.merge(graph, p, rest)))(params)

        ours, theirs = grad(layer), grad(twin)
    dense = layer.weight.with_values(ours["kernel"][...]).to_dense().T
    kept = layer.weight.to_dense().T != 0
    close(dense, as_float(theirs["kernel"][...]) * kept, 3e-3)
    close(ours["bias"][...], theirs["bias"][...], 3e-3)


def test_grad_of_a_model_selects_floats_only():
    sparse = sparsify(Model(nnx.Rngs(0)), 0.7)
    gradients = nnx.grad(lambda m: m(IDS).sum())(sparse)
    leaves = jax.tree.leaves(gradients)
    assert leaves
    assert all(jnp.issubdtype(g.dtype, jnp.floating) for g in leaves)


# ---- layers made in traced functions ----


@pytest.mark.parametrize("format", ["auto", *FORMATS])
def test_layers_can_be_made_under_jit_and_eval_shape(format):
    def make():
        return SparseDense(70, 40, sparsity=0.7, format=format, shards=3, rngs=nnx.Rngs(0))

    eager, jitted, abstract = make(), nnx.jit(make)(), nnx.eval_shape(make)
    jitted.weight.validate()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(eager), nnx.state(jitted))
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), nnx.state(eager))
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), nnx.state(abstract))
    # Sizes follow from the arguments, not from what was drawn.
    other = SparseDense(70, 40, sparsity=0.7, format=format, shards=3, rngs=nnx.Rngs(1))
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), nnx.state(other))


@pytest.mark.parametrize("format", ["bitmap", "delta_csr"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.97, 1.0])
def test_the_sizes_of_drawn_layers_are_hardly_more_than_they_need(sparsity, format):
    # 520: room is rounded up to more than blocks may waste.
    drawn = SparseDense(520, 520, sparsity=sparsity, format=format, rngs=nnx.Rngs(0)).weight
    w = jf.encode(drawn.to_dense(), format)
    # Of Delta-CSR a row may need one group more if its weights lie otherwise, and its fillers.
    more = 0.06 if format == "bitmap" else 8 * 384 / 520
    assert w.bits_per_weight <= drawn.bits_per_weight < w.bits_per_weight * (1 + 1 / 128) + more


@pytest.mark.parametrize("columns", [100, 2000, 12289])
@pytest.mark.parametrize("density", [0.003, 0.05, 0.1, 0.5, 1])
def test_delta_csr_needs_no_more_than_it_may(columns, density):
    kept = max(1, round(density * columns))
    rng = np.random.default_rng(0)
    rows = np.zeros((12, columns), np.float16)
    rows[0, :kept] = 1
    rows[1, -kept:] = 1
    rows[2, [*range(kept - 1), -1]] = 1
    rows[3, np.linspace(0, columns - 1, kept).astype(int)] = 1
    for at in (127, 128, 15, 16):
        last = rows[4 + [127, 128, 15, 16].index(at)]
        last[at - 1 :: at][:kept] = 1
        last[np.flatnonzero(last == 0)[: kept - int(last.sum())]] = 1
    for row in rows[8:]:
        row[rng.permutation(columns)[:kept]] = 1
    assert (rows.sum(1, dtype=int) == kept).all()
    for dense in [np.repeat(row[None], 64, 0) for row in rows] + [np.repeat(rows, 8, 0)]:
        w = encode_on_host(dense, "delta_csr")
        values, index = w.most(kept)
        index_used, _, values_used = w._used()
        assert (index_used <= index) & (values_used <= values)


def test_layers_can_be_made_under_vmap():
    @nnx.vmap
    def make(key):
        return SparseDense(70, 40, sparsity=0.5, rngs=nnx.Rngs(key))

    keys = jax.random.split(jax.random.key(0), 3)
    stacked = make(keys).weight.to_dense()
    for key, dense in zip(keys, stacked, strict=True):
        one = SparseDense(70, 40, sparsity=0.5, rngs=nnx.Rngs(key)).weight.to_dense()
        np.testing.assert_array_equal(dense, one)


def test_partitioned_initialisers_are_accepted():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    layer = SparseDense(70, 40, kernel_init=init, rngs=nnx.Rngs(0))
    plain = SparseDense(70, 40, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.kernel[...], plain.kernel[...])


# ---- stacks ----


def test_layers_stacked_by_vmap_for_scan():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return Block(40, nnx.Rngs(key))

    blocks = make(jax.random.split(jax.random.key(0), 3))
    x = np.random.default_rng(0).standard_normal((5, 40), np.float32)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, block):
        return block(x)

    sparse = sparsify(blocks, 0.5)
    assert sparse.up.weight.values.ndim == 3
    # The kernel is [L, K, M]; put the pruned weights back into the dense blocks.
    for name in ["up", "down"]:
        dense = getattr(sparse, name).weight.to_dense()
        assert np.count_nonzero(dense) == 0.5 * dense.size
        kernel = getattr(blocks, name).kernel
        kernel[...] = jnp.asarray(dense.swapaxes(1, 2).astype(np.float32))
    close(forward(x, sparse), forward(x, blocks), 1e-4)


# ---- Orbax ----

SAVE_AND_LOAD = """
import pathlib, sys
import jax, numpy as np, orbax.checkpoint as ocp
from flax import nnx
sys.path.insert(0, sys.argv[1])
from test_nn import IDS, Model
from jax_flashllm.nn import restore
folder = pathlib.Path(sys.argv[2])
with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(folder / "model")
model = restore(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), state)
np.save(folder / "y.npy", np.asarray(model(IDS)))
"""


@pytest.mark.filterwarnings("ignore")
def test_orbax_round_trip_to_a_fresh_process(tmp_path, fresh_process):
    ocp = pytest.importorskip("orbax.checkpoint")
    sparse = sparsify(Model(nnx.Rngs(0)), 0.7)
    train(sparse, 1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(sparse))
    folder = __file__.rpartition("/")[0]
    fresh_process(SAVE_AND_LOAD, folder, str(tmp_path))
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), sparse(IDS))
    # With a template of the same sparsity, as one restores any NNX model.
    template = sparsify(sparse)
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(template, checkpointer.restore(tmp_path / "model", nnx.state(template)))
    np.testing.assert_array_equal(template(IDS), sparse(IDS))


def test_restore_takes_every_form_of_state():
    sparse = sparsify(Model(nnx.Rngs(0)), 0.7, format="delta_csr", shards=2)
    expected = sparse(IDS)
    state = nnx.state(sparse)
    pure = nnx.to_pure_dict(state)
    for model in [Model(nnx.Rngs(1)), sparsify(Model(nnx.Rngs(1)), 0.1), sparse]:
        for form in [state, pure]:
            back = restore(model, form)
            np.testing.assert_array_equal(back(IDS), expected)
            assert all(type(m.weight) is jf.DeltaCSR for m in linears(back).values())
    partly = sparsify(Model(nnx.Rngs(0)), 0.7, filter=lambda path, _: "head" in path)
    back = restore(Model(nnx.Rngs(1)), nnx.state(partly))
    np.testing.assert_array_equal(back(IDS), partly(IDS))
    assert type(back.named["a"]) is nnx.Linear


def test_restore_refuses():
    sparse = sparsify(Model(nnx.Rngs(0)), 0.7)
    pure = nnx.to_pure_dict(nnx.state(sparse))

    def refused(message, change):
        state = jax.tree.map(lambda a: a, pure)
        change(state)
        with pytest.raises(ValueError, match=message):
            restore(Model(nnx.Rngs(0)), state)

    refused("embed: in the model but not", lambda s: s.pop("embed"))
    refused("more: in the state only", lambda s: s.update(more=np.ones(3)))
    up = ["blocks", 0, "up"]
    at = lambda s: functools.reduce(lambda d, k: d[k], up, s)  # noqa: E731
    refused(
        r"blocks.0.up.bias is \[3\] in the state but \[80\]",
        lambda s: at(s).update(bias=np.ones(3)),
    )
    refused("up.kernel_offsets: not in the state", lambda s: at(s).pop("kernel_offsets"))
    refused(
        "kernel_index is int8, expected", lambda s: at(s).update(kernel_index=np.ones(3, np.int8))
    )
    refused("make weights with", lambda s: at(s).update(kernel_index=np.ones(3, np.uint32)))
