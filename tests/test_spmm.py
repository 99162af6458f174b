"""spmm against dense products in float64, on every instruction set, and under JAX's transforms."""

import dataclasses
import itertools
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference import (
    ACTIVATIONS,
    FLOATS,
    FORMATS,
    HALVES,
    assert_product,
    bits,
    dense_product,
    sparse_matrix,
)

import jax_flashllm as jf
from jax_flashllm import _flashllm

SHAPES = [(1, 1), (16, 64), (17, 65), (130, 300), (40, 700)]
TOKENS = [1, 8, 17, 40]  # 40 is more than one group of a CPU kernel

# (shape, format, weight dtype, density, shards): every pair of neighbours at least once.
CASES = [
    (*case, density, shards if case[0][0] > 3 else 1)
    for case, density, shards in zip(
        itertools.product(SHAPES, FORMATS, HALVES),
        itertools.cycle([0.3, 1.0, 0.05, 0.5, 0.0, 0.1, 0.8]),
        itertools.cycle([1, 3, 1]),
        strict=False,
    )
]


def some(m=40, k=70, format="bitmap", dtype=np.float16, density=0.4, shards=1, seed=0):
    dense = sparse_matrix((m, k), dtype, density, seed)
    return jf.encode(dense, format, shards), dense


def tokens(*shape, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


# One program for all cases: what is slow here is to compile.
@jax.jit
def every_product(weights, xs):
    return [[jf.spmm(w, x) for x in xs[str(w.shape[1])]] for w in weights]


def all_cases(integers):
    dense = [
        sparse_matrix(shape, dtype, density, i, integers)
        for i, (shape, _, dtype, density, _) in enumerate(CASES)
    ]
    weights = [jf.encode(d, case[1], case[4]) for d, case in zip(dense, CASES, strict=True)]
    rng = np.random.default_rng(7)
    draw = (lambda s: rng.integers(-4, 5, s)) if integers else rng.standard_normal
    xs = {
        str(k): [draw((n, k)).astype(np.float32).astype(d) for n in TOKENS for d in FLOATS]
        for _, k in SHAPES
    }
    return dense, weights, xs


def test_small_integers_are_exact(kernels):
    dense, weights, xs = all_cases(integers=True)
    for d, ys in zip(dense, every_product(weights, xs), strict=True):
        for x, y in zip(xs[str(d.shape[1])], ys, strict=True):
            assert y.dtype == x.dtype
            # Sums of small integers are exact, so all that may differ is one rounding.
            expected = dense_product(x, d).astype(np.float32).astype(x.dtype)
            np.testing.assert_array_equal(y, expected)


def test_floats_keep_the_bound(kernels):
    dense, weights, xs = all_cases(integers=False)
    for d, ys in zip(dense, every_product(weights, xs), strict=True):
        for x, y in zip(xs[str(d.shape[1])], ys, strict=True):
            assert_product(y, x, d)


EPILOGUES = list(itertools.product(FORMATS, FLOATS, ACTIVATIONS, FLOATS))


@jax.jit
def every_epilogue(weights, xs, biases):
    return [
        jf.spmm(weights[f], xs[x.name], biases[b.name], activation)
        for f, x, activation, b in EPILOGUES
    ]


def test_bias_and_activation(kernels):
    dense = sparse_matrix((37, 100), np.float16, 0.3)
    weights = {f: jf.encode(dense, f, shards=3) for f in FORMATS}
    xs = {d.name: tokens(9, 100, dtype=d) for d in FLOATS}
    biases = {d.name: 3 * tokens(37, dtype=d) for d in FLOATS}
    ys = every_epilogue(weights, xs, biases)
    for y, (_, x, activation, b) in zip(ys, EPILOGUES, strict=True):
        assert_product(y, xs[x.name], dense, biases[b.name], activation)


@pytest.mark.parametrize("format", FORMATS)
def test_infinities_and_nans_go_where_dense_products_put_them(kernels, format):
    rng = np.random.default_rng(0)
    for dtype, x_dtype in itertools.product(HALVES, FLOATS):
        dense = sparse_matrix((50, 130), dtype, 0.5)
        x = tokens(12, 130, dtype=x_dtype)
        for value in [np.inf, -np.inf, np.nan]:
            x[rng.integers(12, size=2), rng.integers(130, size=2)] = value
        for odd in [False, True]:  # also in W
            if odd:
                dense[3, 7], dense[20, 129], dense[21, 0] = np.inf, -np.inf, np.nan
            y = np.asarray(jf.spmm(jf.encode(dense, format), x)).astype(np.float64)
            with np.errstate(invalid="ignore"):
                expected = dense_product(x, dense)
            np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
            np.testing.assert_array_equal(np.isposinf(y), np.isposinf(expected))
            np.testing.assert_array_equal(np.isneginf(y), np.isneginf(expected))


@pytest.mark.parametrize("columns", [12288, 12289, 25000])
def test_delta_csr_in_blocks_of_columns(kernels, columns):
    """One, two and three blocks, some rows with nothing in one of them."""
    for dtype, density in zip(HALVES, (0.002, 0.3), strict=True):
        dense = sparse_matrix((5, columns), dtype, density, integers=True)
        dense[1, :9000] = 0
        dense[2, 1:] = 0
        dense[3, :-1] = 0
        dense[4, [0, -1]] = 1
        w = jf.encode(dense, "delta_csr", shards=2)
        for x_dtype, n in itertools.product(FLOATS, (1, 3, 40)):
            x = np.random.default_rng(n).integers(-1, 2, (n, columns)).astype(x_dtype)
            expected = dense_product(x, dense).astype(np.float32).astype(x_dtype)
            np.testing.assert_array_equal(jf.spmm(w, x), expected)
            x[-1, columns - 1] = np.inf
            with np.errstate(invalid="ignore"):
                expected = dense_product(x, dense).astype(np.float32).astype(x_dtype)
            got = np.asarray(jf.spmm(w, x)).astype(np.float32)
            np.testing.assert_array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize("format", FORMATS)
def test_subnormals_are_numbers(kernels, format):
    x = np.ones((3, 70), np.float32) * np.array([[1.0], [0.5], [2.0]], np.float32)
    for dtype, tiny in [(np.float16, 2.0**-24), (ml_dtypes.bfloat16, 2.0**-133)]:
        dense = sparse_matrix((20, 70), np.float32, 0.5, integers=True) * np.float32(tiny)
        w = jf.encode(dense.astype(dtype), format)
        np.testing.assert_array_equal(jf.spmm(w, x), dense_product(x, dense))
        # x of the weight's own dtype, which may go to another instruction.
        half = jf.spmm(w, x.astype(dtype))
        np.testing.assert_array_equal(half, dense_product(x, dense).astype(dtype))
    # Subnormal x with ordinary weights.
    dense = sparse_matrix((20, 70), ml_dtypes.bfloat16, 0.5, integers=True)
    w = jf.encode(dense, format)
    for dtype, tiny in [(np.float32, 2.0**-149), (ml_dtypes.bfloat16, 2.0**-133)]:
        x = np.random.default_rng(0).integers(-3, 4, (5, 70)) * tiny
        y = jf.spmm(w, x.astype(dtype))
        np.testing.assert_array_equal(y, dense_product(x, dense).astype(dtype))


def test_leading_dimensions():
    w, dense = some()
    for lead in [(), (1,), (2, 3), (2, 1, 4)]:
        x = tokens(*lead, 70)
        assert_product(jf.spmm(w, x), x, dense)
        assert_product(jax.jit(jf.spmm)(w, x), x, dense)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3, 5)])
def test_no_tokens(lead):
    w, _ = some()
    for dtype in FLOATS:
        x = jnp.zeros((*lead, 70), dtype)
        y = jax.jit(jf.spmm, static_argnums=3)(w, x, jnp.ones(40, dtype), "relu")
        assert y.shape == (*lead, 40)
        assert y.dtype == dtype
    assert jax.grad(lambda x: jf.spmm(w, x).sum())(x).shape == x.shape
    g = jax.grad(lambda v: jf.spmm(w.with_values(v), x).sum())(w.values)
    np.testing.assert_array_equal(g, jnp.zeros_like(w.values))


# ---- vmap, scan, remat, jit ----


@pytest.mark.parametrize("format", FORMATS)
def test_vmap(format):
    B = 3
    dense = [sparse_matrix((17, 65), np.float16, 0.4, i) for i in range(B)]
    w = jf.stack([jf.encode(d, format, shards=2) for d in dense])
    one = jf.encode(dense[0], format, shards=2)
    x, biases = tokens(B, 5, 65), tokens(B, 17, seed=2)

    def expect(y, pick_w, pick_x, pick_b, activation=None):
        for i in range(B):
            assert_product(y[i], pick_x(i), pick_w(i), pick_b(i), activation)

    def gelu(w, x, bias):
        return jf.spmm(w, x, bias, "gelu")

    @jax.jit
    def every_vmap(one, w, x, biases):
        return {
            "x in front": jax.vmap(jf.spmm, (None, 0))(one, x),
            "x in the middle": jax.vmap(jf.spmm, (None, 1))(one, x),
            "x and y at the end": jax.vmap(jf.spmm, (None, 2), 1)(one, jnp.moveaxis(x, 0, 2)),
            "w": jax.vmap(jf.spmm, (0, None))(w, x[0]),
            "w and x": jax.vmap(jf.spmm)(w, x),
            "all": jax.vmap(gelu)(w, x, biases),
            "bias": jax.vmap(gelu, (None, None, 0))(one, x[0], biases),
            "x beside bias": jax.vmap(gelu, (None, 0, None))(one, x, biases[0]),
        }

    y = every_vmap(one, w, x, biases)
    expect(y["x in front"], lambda i: dense[0], lambda i: x[i], lambda i: None)
    assert_product(y["x in the middle"], x.swapaxes(0, 1), dense[0])
    assert_product(y["x and y at the end"], x.swapaxes(0, 1), dense[0])
    expect(y["w"], lambda i: dense[i], lambda i: x[0], lambda i: None)
    expect(y["w and x"], lambda i: dense[i], lambda i: x[i], lambda i: None)
    expect(y["all"], lambda i: dense[i], lambda i: x[i], lambda i: biases[i], "gelu")
    expect(y["bias"], lambda i: dense[0], lambda i: x[0], lambda i: biases[i], "gelu")
    expect(y["x beside bias"], lambda i: dense[0], lambda i: x[i], lambda i: biases[0], "gelu")
    # And without jit.
    assert_product(jax.vmap(jf.spmm, (None, 1))(one, x), x.swapaxes(0, 1), dense[0])


@pytest.mark.parametrize("format", FORMATS)
def test_nested_vmap(format):
    dense = [sparse_matrix((17, 65), np.float16, 0.4, i) for i in range(3)]
    w = jf.stack([jf.encode(d, format) for d in dense])
    x = tokens(2, 4, 65)

    @jax.jit
    def every_nest(w, x):
        one = jax.tree.map(lambda a: a[0], w)
        return (
            jax.vmap(jax.vmap(jf.spmm, (None, 0)), (0, None))(w, x),
            jax.vmap(jax.vmap(jf.spmm, (0, None)), (None, 0))(w, x),
            jax.vmap(jax.vmap(jf.spmm, (None, 0)), (None, 1))(one, x),
        )

    every_w_every_x, every_x_every_w, twice = every_nest(w, x)
    assert every_w_every_x.shape == (3, 2, 4, 17)
    for i, j in itertools.product(range(3), range(2)):
        assert_product(every_w_every_x[i, j], x[j], dense[i])
        assert_product(every_x_every_w[j, i], x[j], dense[i])
    assert_product(twice, x.swapaxes(0, 1), dense[0])


@pytest.mark.parametrize("format", FORMATS)
def test_scan_over_stacked_weights(format):
    layers = [some(48, 48, format, density=0.2 + 0.2 * i, seed=i)[0] for i in range(4)]
    w, x = jf.stack(layers), tokens(3, 48)

    def step(x, w):
        return jf.spmm(w, x, activation="relu"), x.sum()

    y, _ = jax.jit(lambda w, x: jax.lax.scan(step, x, w))(w, x)
    expected = x
    for layer in layers:
        expected = jf.spmm(layer, expected, activation="relu")
    np.testing.assert_array_equal(y, expected)

    def loss(values, loop):
        w_ = w.with_values(values)
        if loop:
            y = x
            for i in range(4):
                y, _ = step(y, jax.tree.map(lambda a, i=i: a[i], w_))
        else:
            y, _ = jax.lax.scan(jax.checkpoint(step), x, w_)
        return (y**2).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    looped, scanned = (gradient(w.values, loop) for loop in (True, False))
    np.testing.assert_allclose(
        scanned.astype(np.float32), looped.astype(np.float32), rtol=1e-3, atol=1e-5
    )


def test_remat_changes_nothing():
    w, _ = some(48, 48)
    x = tokens(3, 48)

    def loss(x, wrap):
        layer = wrap(lambda x: jf.spmm(w, x, activation="gelu"))
        return (layer(layer(x)) ** 2).sum()

    plain = jax.jit(jax.grad(loss), static_argnums=1)(x, lambda f: f)
    remat = jax.jit(jax.grad(loss), static_argnums=1)(x, jax.checkpoint)
    np.testing.assert_allclose(plain, remat, rtol=1e-6)


def test_donation():
    w, dense = some(48, 48)
    x = tokens(8, 48)
    given = jnp.array(x)
    y = jax.jit(lambda w, x: jf.spmm(w, x), donate_argnums=1)(w, given)
    assert given.is_deleted()
    assert_product(y, x, dense)

    # A step that replaces the values in place.
    update = jax.jit(lambda w: w.with_values(w.values * 2), donate_argnums=0)
    old = jf.encode(dense)
    new = update(old)
    assert old.values.is_deleted()
    assert_product(jf.spmm(new, x), x, 2 * dense)


def test_eval_shape_needs_no_weights():
    w, _ = some()
    abstract = jax.eval_shape(lambda w: w, w)
    y = jax.eval_shape(jf.spmm, abstract, jax.ShapeDtypeStruct((2, 3, 70), jnp.bfloat16))
    assert (y.shape, y.dtype) == ((2, 3, 40), jnp.bfloat16)
    assert jax.eval_shape(jf.decode, abstract).shape == (40, 70)


def test_weights_may_be_constants_arguments_or_closed_over():
    w, dense = some()
    x = tokens(5, 70)
    for y in [jax.jit(lambda x: jf.spmm(w, x))(x), jax.jit(jf.spmm)(w, x), jf.spmm(w, x)]:
        assert_product(y, x, dense)
    again = jax.lax.cond(True, jf.spmm, lambda w, x: jnp.zeros((5, 40)), w, x)
    assert_product(again, x, dense)


# ---- derivatives ----

quick = pytest.mark.usefixtures("quick_compiles")


def dense_layer(D, x, bias, activation):
    """The same function of a dense float32 D, for JAX to differentiate."""
    act = {None: lambda z: z, "relu": jax.nn.relu, "gelu": lambda z: jax.nn.gelu(z, False)}
    z = jnp.matmul(x, D.T, precision="highest")
    return act[activation](z if bias is None else z + bias)


def close(a, b, dtype=np.float32):
    a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    tolerance = {"float32": 2.0**-18, "float16": 2.0**-10, "bfloat16": 2.0**-7}
    tolerance = tolerance[np.dtype(dtype).name]
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1e-3, np.abs(b).max()))


GRADIENT_CASES = [
    (format, dtype, activation, bias)
    for format, dtype in itertools.product(FORMATS, HALVES)
    for activation, bias in [(None, False), ("relu", True), ("gelu", True)]
]


@quick
@pytest.mark.parametrize(("format", "dtype", "activation", "with_bias"), GRADIENT_CASES)
def test_derivatives_are_those_of_the_dense_product(format, dtype, activation, with_bias):
    w, dense = some(33, 70, format, dtype, shards=2)
    rng = np.random.default_rng(3)
    D, kept = jnp.asarray(dense.astype(np.float32)), dense != 0
    x, c = tokens(2, 5, 70), tokens(2, 5, 33, seed=4)
    bias = tokens(33, seed=5) if with_bias else None

    def sparse(values, x, bias):
        return jf.spmm(w.with_values(values), x, bias, activation)

    def loss(f):
        return lambda *a: (jnp.sin(f(*a)) * c).sum()

    wrt = (0, 1, 2) if with_bias else (0, 1)
    # Reverse mode, in all at once.
    value, got = jax.jit(jax.value_and_grad(loss(sparse), wrt))(w.values, x, bias)
    expected_value, expected = jax.jit(
        jax.value_and_grad(loss(lambda D, x, b: dense_layer(D, x, b, activation)), wrt)
    )(D, x, bias)
    close(value, expected_value)
    assert got[0].dtype == dtype
    close(w.with_values(got[0]).to_dense(), expected[0] * kept, dtype)
    for g, e in zip(got[1:], expected[1:], strict=True):
        close(g, e)

    # Forward mode, in all at once. A tangent in the values is a sparse matrix.
    dD = jnp.asarray(np.where(kept, rng.standard_normal(dense.shape), 0).astype(dtype))
    dw = jf.encode(dD, format, shards=2)
    tangents = [tokens(2, 5, 70, seed=6), tokens(33, seed=7)][: len(wrt) - 1]
    primals = [x, bias][: len(wrt) - 1]

    def partial(f):
        return lambda v, *rest: f(v, *rest, *[None] * (2 - len(rest)))

    y, dy = jax.jit(lambda *a: jax.jvp(partial(sparse), (w.values, *primals), a))(
        dw.values, *tangents
    )
    dense_f = partial(lambda D, x, b: dense_layer(D, x, b, activation))
    ey, edy = jax.jit(lambda *a: jax.jvp(dense_f, (D, *primals), a))(
        dD.astype(jnp.float32), *tangents
    )
    close(y, ey)
    close(dy, edy)


@quick
@pytest.mark.parametrize("x_dtype", HALVES)
def test_derivatives_in_16_bit_x(x_dtype):
    w, dense = some(33, 70, "bitmap", x_dtype)
    x, c = tokens(5, 70, dtype=x_dtype), tokens(5, 33, dtype=x_dtype, seed=4)

    def loss(values, x):
        return (jf.spmm(w.with_values(values), x, activation="relu") * c).sum()

    dv, dx = jax.jit(jax.grad(loss, (0, 1)))(w.values, x)
    assert (dv.dtype, dx.dtype) == (x_dtype, x_dtype)
    eD, ex = jax.grad(lambda D, x: (dense_layer(D, x, None, "relu") * c).sum(), (0, 1))(
        jnp.asarray(dense.astype(np.float32)), x.astype(np.float32)
    )
    close(dx, ex, x_dtype)
    close(w.with_values(dv).to_dense(), eD * (dense != 0), x_dtype)


@quick
@pytest.mark.parametrize("format", FORMATS)
def test_second_derivatives(format):
    w, dense = some(12, 20, format)
    D, x, v = jnp.asarray(dense.astype(np.float32)), tokens(3, 20), tokens(3, 20, seed=2)

    def hvps(layer):
        f = lambda x: (layer(x) ** 2).sum()  # noqa: E731
        forward_over_reverse = jax.jvp(jax.grad(f), (x,), (v,))[1]
        reverse_over_reverse = jax.grad(lambda x: (jax.grad(f)(x) * v).sum())(x)
        reverse_over_forward = jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1])(x)
        return forward_over_reverse, reverse_over_reverse, reverse_over_forward

    got = jax.jit(lambda: hvps(lambda x: jf.spmm(w, x, activation="gelu")))()
    expected = jax.jit(lambda: hvps(lambda x: dense_layer(D, x, None, "gelu")))()
    for g, e in zip(got, expected, strict=True):
        close(g, e)


@quick
@pytest.mark.parametrize("format", FORMATS)
def test_gradient_in_the_weight_has_its_structure(format):
    w, _ = some(17, 65, format)
    x = tokens(4, 65)
    g = jax.grad(lambda w: jf.spmm(w, x).sum(), allow_int=True)(w)
    assert type(g) is type(w)
    assert jax.tree.structure(g) == jax.tree.structure(w)
    assert [b.dtype for b in g.buffers] == [jax.dtypes.float0] * 2
    assert (g.values.shape, g.values.dtype) == (w.values.shape, w.values.dtype)
    by_values = jax.grad(lambda v: jf.spmm(w.with_values(v), x).sum())(w.values)
    np.testing.assert_array_equal(bits(g.values), bits(by_values))


@quick
@pytest.mark.parametrize("format", FORMATS)
def test_vmap_of_grad_and_grad_of_vmap(format):
    dense = [sparse_matrix((17, 65), np.float16, 0.4, i) for i in range(3)]
    w = jf.stack([jf.encode(d, format) for d in dense])
    x = tokens(3, 4, 65)
    loss = lambda w, x: (jf.spmm(w, x) ** 2).sum()  # noqa: E731
    by_x, together, by_values = jax.jit(
        lambda w, x: (
            jax.vmap(jax.grad(loss, 1))(w, x),
            jax.grad(lambda x: jax.vmap(loss)(w, x).sum())(x),
            jax.vmap(jax.grad(lambda v, w, x: loss(w.with_values(v), x)))(w.values, w, x),
        )
    )(w, x)
    for i in range(3):
        D = dense[i].astype(np.float64)
        y_bar = 2 * dense_product(x[i], D)
        close(by_x[i], y_bar @ D)
        close(together[i], y_bar @ D)
        wi = jax.tree.map(lambda a, i=i: a[i], w).with_values(by_values[i])
        close(wi.to_dense(), (y_bar.T @ x[i]) * (D != 0), np.float16)


def test_linear_transpose():
    w, dense = some()
    y_bar = tokens(3, 40)
    (x_bar,) = jax.linear_transpose(lambda x: jf.spmm(w, x), tokens(3, 70))(y_bar)
    close(x_bar, y_bar @ dense.astype(np.float32))
    zeros = np.zeros((3, 70), np.float32)
    (bias_bar,) = jax.linear_transpose(lambda b: jf.spmm(w, zeros, b), y_bar[0])(y_bar)
    np.testing.assert_allclose(bias_bar, y_bar.sum(0), rtol=1e-6)
    relu = jax.linear_transpose(lambda x: jf.spmm(w, x, activation="relu"), tokens(3, 70))
    with pytest.raises(NotImplementedError, match="not linear"):
        relu(y_bar)


@quick
@pytest.mark.parametrize("format", FORMATS)
def test_decode_is_differentiable(format):
    w, dense = some(33, 70, format, shards=2)
    c = tokens(33, 70)
    f = lambda v: (jf.decode(w.with_values(v)).astype(jnp.float32) ** 2 * c).sum()  # noqa: E731
    g = jax.jit(jax.grad(f))(w.values)
    close(w.with_values(g).to_dense(), 2 * dense.astype(np.float32) * c, np.float16)
    y, dy = jax.jvp(lambda v: jf.decode(w.with_values(v)), (w.values,), (3 * w.values,))
    np.testing.assert_array_equal(y, dense)
    np.testing.assert_array_equal(dy, 3 * dense)
    # Twice transposed it is itself again.
    h = jax.grad(lambda v: (jax.grad(f)(v).astype(jnp.float32)).sum())(w.values)
    close(w.with_values(h).to_dense(), 2 * c * (dense != 0), np.float16)


# ---- export ----

EXPORT_CHILD = """
import pickle, sys
import jax, jax.export, numpy as np
import jax_flashllm
folder = sys.argv[1]
w, x = pickle.load(open(folder + "/inputs.pickle", "rb"))
for name, args in [("argument", (w, x)), ("constant", (x,))]:
    exported = jax.export.deserialize(bytearray(open(f"{folder}/{name}", "rb").read()))
    np.save(f"{folder}/{name}.npy", exported.call(*args))
"""


@pytest.mark.parametrize("format", FORMATS)
def test_export_runs_in_a_fresh_process(format, tmp_path, fresh_process):
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")
    import pickle

    w, dense = some(format=format)
    x = tokens(6, 70)
    (N,) = jax.export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((N, 70), np.float32)
    checks = [jax.export.DisabledSafetyCheck.custom_call(f"flashllm_spmm_{format}_v1")]
    relu = jax.jit(lambda w, x: jf.spmm(w, x, activation="relu"))
    for name, f, args in [
        ("argument", relu, (w, shape)),
        ("constant", jax.jit(lambda x: relu(w, x)), (shape,)),
    ]:
        exported = jax.export.export(f, disabled_checks=checks)(*args)
        (tmp_path / name).write_bytes(exported.serialize())
    (tmp_path / "inputs.pickle").write_bytes(pickle.dumps((w, x)))
    fresh_process(EXPORT_CHILD, str(tmp_path))
    for name in ["argument", "constant"]:
        assert_product(np.load(tmp_path / f"{name}.npy"), x, dense, activation="relu")


def test_lowering_for_cuda_without_cuda_says_how_to_build():
    if hasattr(_flashllm, "cuda_targets"):
        pytest.skip("this build has CUDA")
    w, _ = some()
    traced = jax.jit(jf.spmm).trace(w, tokens(1, 70))
    with pytest.raises(NotImplementedError, match="FLASHLLM_CUDA=ON"):
        traced.lower(lowering_platforms=("cuda",))


# ---- threads ----


def test_many_products_at_once_do_not_deadlock():
    # Big enough for every call to want the whole pool; independent, so XLA runs them together.
    weights = [some(512, 1024, f, seed=i)[0] for i in range(8) for f in FORMATS]
    x = tokens(4, 1024)
    run = jax.jit(lambda ws, x: [jf.spmm(w, x) for w in ws])
    expected = [np.asarray(y) for y in run(weights, x)]
    results = []

    def worker():
        for _ in range(10):
            results.append([np.asarray(y) for y in run(weights, x)])

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert not any(t.is_alive() for t in threads), "deadlock"
    assert len(results) == 40
    for result in results:
        jax.tree.map(np.testing.assert_array_equal, result, expected)


# ---- errors ----


def test_errors_name_values_and_the_next_step():
    w, _ = some()

    def refused(error, message, *args, **kwargs):
        for f in [jf.spmm, lambda *a, **k: jax.jit(lambda: jf.spmm(*a, **k))()]:
            with pytest.raises(error) as e:
                f(*args, **kwargs)
            assert str(e.value) == message

    x = tokens(3, 70)
    refused(
        ValueError,
        "spmm: x has 71 features but W is [40, 70]; pass x of shape [..., 70]",
        w,
        tokens(3, 71),
    )
    refused(
        ValueError,
        "spmm: x has no features but W is [40, 70]; pass x of shape [..., 70]",
        w,
        np.float32(1),
    )
    refused(
        TypeError,
        "spmm: x is int32; cast it to float16, bfloat16 or float32, e.g. x.astype(jnp.float32)",
        w,
        x.astype(np.int32),
    )
    refused(TypeError, "spmm: x must be an array, got list", w, [1.0])
    refused(
        TypeError,
        "spmm: w must be an encoded weight, got ndarray; make one with jax_flashllm.encode",
        w.to_dense(),
        x,
    )
    refused(
        ValueError,
        "spmm: bias is [41] but W is [40, 70]; pass bias [40]",
        w,
        x,
        np.zeros(41, np.float32),
    )
    refused(
        TypeError,
        "spmm: bias is float64; cast it to x's dtype, float32",
        w,
        x,
        np.zeros(40),
    )
    refused(TypeError, "spmm: bias must be an array, got list", w, x, [0.0] * 40)
    refused(
        ValueError,
        "spmm: activation must be None, 'relu' or 'gelu', got 'silu'",
        w,
        x,
        activation="silu",
    )
    stacked = jf.stack([w, w])
    refused(
        ValueError,
        f"spmm: w is stacked, with values {list(stacked.values.shape)}; use jax.vmap or lax.scan",
        stacked,
        x,
    )
    refused(
        TypeError,
        "spmm: the values of w are float32; cast them to float16 or bfloat16, "
        "e.g. w.with_values(w.values.astype(jnp.bfloat16))",
        w.with_values(w.values.astype(np.float32)),
        x,
    )
    with pytest.raises(ValueError, match=r"a part of a weight.*pass in_axes=\(None, 0\)"):
        jax.vmap(jf.spmm)(w, x[None])
    with pytest.raises(ValueError, match="decode: w is stacked"):
        jf.decode(stacked)
    with pytest.raises(TypeError, match="decode: w must be an encoded weight, got list"):
        jf.decode([])


@pytest.mark.parametrize("density", [0.4, 0.01])
@pytest.mark.parametrize("format", FORMATS)
def test_garbage_is_an_error_and_no_crash(kernels, format, density):
    w, dense = some(300, 500, format, density=density, dtype=ml_dtypes.bfloat16)
    x = tokens(3, 500)
    spmm = jax.jit(jf.spmm)
    decode = jax.jit(jf.decode)
    sample = jax.jit(lambda w, x: jax.grad(lambda v: jf.spmm(w.with_values(v), x).sum())(w.values))
    rng = np.random.default_rng(0)
    offsets = np.asarray(w.offsets)
    broken = [np.full_like(offsets, 2**32 - 1), offsets + np.uint32(w.values.shape[1] // 8 + 1)]
    if format == "delta_csr":
        broken.append(offsets[:, ::-1].copy())
        for width in (0, 6, 2**31 + 8):
            broken.append(offsets.copy())
            broken[-1][:, -1] = width
    for bad in broken:
        bad = dataclasses.replace(w, offsets=jnp.asarray(bad))
        with pytest.raises(ValueError):  # noqa: PT011
            bad.validate()
        for f in [
            lambda bad=bad: spmm(bad, x),
            lambda bad=bad: spmm(bad, x.astype(ml_dtypes.bfloat16)),
            lambda bad=bad: spmm(bad, np.full_like(x, np.inf)),
            lambda bad=bad: decode(bad),
            lambda bad=bad: sample(bad, x),
        ]:
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"call w.validate\(\)"):
                jax.block_until_ready(f())
    # Random bits must not crash, whatever comes out.
    for _ in range(10):
        noise = {
            f.name: rng.integers(0, np.iinfo(b.dtype).max, b.shape, b.dtype, endpoint=True)
            for f, b in [(f, getattr(w, f.name)) for f in dataclasses.fields(w) if not f.metadata]
            if f.name != "values"
        }
        if rng.random() < 0.5:
            del noise["offsets"]
        bad = dataclasses.replace(w, **jax.tree.map(jnp.asarray, noise))
        for f in [lambda bad=bad: spmm(bad, x), lambda bad=bad: sample(bad, x)]:
            try:
                jax.block_until_ready(f())
            except jax.errors.JaxRuntimeError as e:
                assert "call w.validate()" in str(e)  # noqa: PT017
    assert_product(spmm(w, x), x, dense)  # and the next call works
