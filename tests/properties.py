"""Random cases and what must hold for each of them.

tests/test_properties.py runs some of each in CI, tests/stress/properties.py any number.
"""

import contextlib
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from reference import (
    ACTIVATIONS,
    FLOATS,
    FORMATS,
    HALVES,
    assert_product,
    bits,
    damage,
    sparse_matrix,
)

import jax_flashllm as jf
from jax_flashllm import _flashllm

# -0, subnormals at both ends of both types, infinities, NaNs with and without a payload.
SPECIAL = np.array(
    [0x8000, 0x0001, 0x8001, 0x03FF, 0x007F, 0x7C00, 0xFC00, 0x7E01, 0xFFFF, 0x7F80, 0xFF80,
     0x7FC1],
    np.uint16,
)  # fmt: skip
DENSITIES = [0, 0.002, 0.01, 0.06, 0.07, 0.3, 0.5, 0.9, 1]
PLACES = ["all", "a tile", "all but a tile", "a row", "a column", "every 16th row", "a diagonal"]

seeds = st.integers(0, 2**32 - 1)


# ---- encode and decode: every bit comes back ----


@st.composite
def encodings(draw):
    """(dense, format, shards): any bits in any places, 0 to 300 by 0 to 700, or few long rows."""
    m, k = draw(st.integers(0, 300)), draw(st.integers(0, 700))
    if draw(st.integers(0, 9)) == 0:  # blocks of columns of Delta-CSR
        m, k = draw(st.integers(1, 4)), draw(st.sampled_from([6000, 12288, 12289, 25000]))
    rng = np.random.default_rng(draw(seeds))
    words = rng.integers(0, 2**16, (m, k), dtype=np.uint16)
    if draw(st.booleans()):
        words = rng.choice(SPECIAL, (m, k))
    keep = rng.random((m, k)) < draw(st.sampled_from(DENSITIES))
    place = draw(st.sampled_from(PLACES))
    if m and k and place != "all":
        row, col = rng.integers(m) // 64 * 64, rng.integers(k) // 128 * 128
        where = np.zeros((m, k), bool)
        if "tile" in place:
            where[row : row + 64, col : col + 128] = True
        elif "row" in place:
            where[:: 16 if "16" in place else m] = True
        else:
            where[:, rng.integers(k)] = place == "a column"
            np.fill_diagonal(where, True)
        keep &= ~where if "but" in place else where
    words[~keep] = 0
    dense = words.view(draw(st.sampled_from(HALVES)))
    shards = draw(st.integers(1, 5)), draw(st.sampled_from([1, 1, 2, 3]))
    return dense, draw(st.sampled_from([*FORMATS, "auto"])), shards


def check_encoding(case):
    dense, format, (rows, columns) = case
    if dense.size == 0:
        with pytest.raises(ValueError, match="expected a matrix"):
            jf.encode(dense, format)
        return
    m, k = dense.shape
    shards = min(rows, m), min(columns, k)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*-0.0")
        w = jf.encode(dense, format, shards)
    np.testing.assert_array_equal(bits(w.to_dense()), bits(dense))
    w.validate()
    assert (w.row_shards, w.column_shards) == shards
    assert (w.shape, w.dtype) == (dense.shape, dense.dtype)
    assert w.nnz == np.count_nonzero(bits(dense))
    assert w.sparsity == pytest.approx(1 - w.nnz / dense.size)
    assert w.nbytes == sum(np.asarray(b).nbytes for b in jax.tree.leaves(w))
    assert w.bits_per_weight == pytest.approx(8 * w.nbytes / dense.size)


# ---- damaged weights: what `validate` lets pass is a weight ----

decode = jax.jit(jf.decode)


@st.composite
def damages(draw):
    return {
        "shape": draw(st.sampled_from([(40, 136), (64, 256), (17, 65), (130, 300)])),
        "format": draw(st.sampled_from(FORMATS)),
        "density": draw(st.sampled_from([0.02, 0.3, 0.9])),
        "shards": draw(st.integers(1, 2)),
        "whole words": draw(st.booleans()),
        "seed": draw(seeds),
    }


def check_damage(case):
    """`validate` and `to_dense` raise ValueError at most; a kernel refuses, or agrees with both."""
    rng = np.random.default_rng(case["seed"])
    dense = sparse_matrix(case["shape"], np.float16, case["density"], case["seed"] % 3)
    w = jf.encode(dense, case["format"], case["shards"])
    index = "masks" if case["format"] == "bitmap" else "index"
    buffers = {name: np.array(getattr(w, name)) for name in (index, "offsets")}
    words = buffers[rng.choice([*buffers])]
    if case["whole words"]:
        damage(rng, words)
    else:
        words.reshape(-1)[rng.integers(words.size)] ^= np.uint32(1 << rng.integers(32))
    w = dataclasses.replace(w, **buffers)
    repr(w)
    expected = decoded = None
    with contextlib.suppress(ValueError):
        expected = w.to_dense()
    with contextlib.suppress(ValueError, jax.errors.JaxRuntimeError):
        decoded = np.asarray(decode(w))
    try:
        w.validate()
    except ValueError:
        return
    np.testing.assert_array_equal(bits(decoded), bits(expected))


# ---- products: the derived bound ----


@st.composite
def products(draw):
    """Arguments of `check_product`: any shape, dtype, format, shards, epilogue, CPU kernels."""
    m, k = draw(st.integers(1, 200)), draw(st.integers(1, 600))
    lead = tuple(draw(st.lists(st.integers(0, 9), max_size=2))) or (draw(st.integers(1, 40)),)
    dtype = draw(st.sampled_from(FLOATS))
    # Halves are rounded once a column block, which the bound does not allow for.
    columns = draw(st.integers(1, 3)) if dtype == np.float32 else 1
    return {
        "shape": (m, k),
        "lead": lead,
        "dtypes": (draw(st.sampled_from(HALVES)), dtype, draw(st.sampled_from(FLOATS))),
        "density": draw(st.sampled_from(DENSITIES)),
        "format": draw(st.sampled_from(FORMATS)),
        "shards": (min(m, draw(st.integers(1, 4))), min(k, columns)),
        "bias": draw(st.booleans()),
        "activation": draw(st.sampled_from([*ACTIVATIONS])),
        "kernels": draw(st.sampled_from(["portable", "avx2", "avx512"])),
        "seed": draw(seeds),
    }


def check_product(shape, lead, dtypes, density, format, shards, bias, activation, kernels, seed):
    before = _flashllm.cpu_kernels()
    _flashllm.select_cpu_kernels(kernels)  # keeps the others where this CPU has not got them
    try:
        dense = sparse_matrix(shape, dtypes[0], density, seed)
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((*lead, shape[1]), np.float32).astype(dtypes[1])
        b = rng.standard_normal(shape[0], np.float32).astype(dtypes[2]) if bias else None
        y = jf.spmm(jf.encode(dense, format, shards), x, b, activation)
        assert y.dtype == x.dtype
        assert_product(y, x, dense, b, activation)
    finally:
        _flashllm.select_cpu_kernels(before)


# ---- derivatives: those of the dense product, to the last bit on small integers ----


@st.composite
def derivatives(draw):
    m, k = draw(st.integers(1, 80)), draw(st.integers(1, 200))
    return {
        "shape": (m, k),
        "n": draw(st.integers(1, 9)),
        "dtype": draw(st.sampled_from(HALVES)),
        "density": draw(st.sampled_from(DENSITIES)),
        "format": draw(st.sampled_from(FORMATS)),
        "shards": (min(m, draw(st.integers(1, 3))), min(k, draw(st.integers(1, 2)))),
        "relu": draw(st.booleans()),
        "seed": draw(seeds),
    }


def check_derivatives(shape, n, dtype, density, format, shards, relu, seed):
    (m, k), rng = shape, np.random.default_rng(seed)
    dense = sparse_matrix(shape, np.float32, density, seed, integers=True)
    w = jf.encode(dense.astype(dtype), format, shards)
    x, bias, c = (rng.integers(-2, 3, s).astype(np.float32) for s in ((n, k), (m,), (n, m)))
    activation = "relu" if relu else None

    def sparse_loss(values, x, bias):
        return (jf.spmm(w.with_values(values), x, bias, activation) * c).sum()

    def dense_loss(dense, x, bias):
        z = jnp.dot(x, dense.T, precision="highest") + bias
        return ((jax.nn.relu(z) if relu else z) * c).sum()

    @jax.jit
    def both(values, dense, x, bias):
        return (
            jax.value_and_grad(sparse_loss, (0, 1, 2))(values, x, bias),
            jax.value_and_grad(dense_loss, (0, 1, 2))(dense, x, bias),
        )

    # Values are halves, and so is their gradient: sums of at most 2 * 2 * 9 are exact in both.
    (loss, grads), (expected, dense_grads) = both(w.values, dense, x, bias)
    np.testing.assert_array_equal(loss, expected)
    stored = np.where(dense != 0, dense_grads[0], 0)
    np.testing.assert_array_equal(w.with_values(grads[0]).to_dense().astype(np.float32), stored)
    for got, want in zip(grads[1:], dense_grads[1:], strict=True):
        np.testing.assert_array_equal(got, want)


# ---- compositions of jit, vmap, scan, remat, jvp and grad ----

# A program is a nest of tuples. It maps x [n, k] to as much, with weights [3, k, k], biases [3, k].
LEAVES = ["layer", "scan", "vmap of weights", "vmap of tokens"]
WRAPPERS = ["jit", "remat", "vmap", "jvp", "grad", "twice"]


def programs():
    leaf = st.tuples(st.sampled_from(LEAVES), st.integers(0, 2), st.booleans(), st.booleans())
    return st.recursive(
        leaf, lambda inner: st.tuples(st.sampled_from(WRAPPERS), inner), max_leaves=4
    )


def run(program, multiply, w, biases, x):
    """The program's value: small integers, clipped after every step."""
    kind, *rest = program

    def layer(w, x, bias):
        return multiply(w, x, bias if rest[1] else None, "relu" if rest[2] else None)

    def inner(x):
        return run(rest[0], multiply, w, biases, x)

    def one(i):
        return jax.tree.map(lambda a: a[i], w), biases[i]

    if kind == "layer":
        y = layer(one(rest[0])[0], x, one(rest[0])[1])
    elif kind == "scan":
        y, _ = jax.lax.scan(
            lambda x, each: (clip(layer(each[0], x, each[1])), None), x, (w, biases)
        )
    elif kind == "vmap of weights":
        y = jax.vmap(layer, (0, None, 0))(w, x, biases).sum(0)
    elif kind == "vmap of tokens":
        y = jax.vmap(layer, (None, 1, None), 1)(one(rest[0])[0], x[None], one(rest[0])[1])[0]
    elif kind == "jit":
        y = jax.jit(inner)(x)
    elif kind == "remat":
        y = jax.checkpoint(inner)(x)
    elif kind == "vmap":
        a, b = jax.vmap(inner)(jnp.stack([x, 1 - x]))
        y = a - b
    elif kind == "jvp":
        primal, tangent = jax.jvp(inner, (x,), (jnp.ones_like(x),))
        y = primal + tangent
    elif kind == "grad":
        y = x + jax.grad(lambda x: (inner(x) * x).sum())(x)
    else:
        y = inner(inner(x))
    return clip(y)


def clip(y):
    return jnp.clip(y, -3, 3)


@st.composite
def compositions(draw):
    return {
        "program": draw(programs()),
        "of": draw(st.sampled_from(["value", "grad of x", "grad of biases", "grad of weights"])),
        "k": draw(st.integers(1, 40)),
        "n": draw(st.integers(1, 5)),
        "format": draw(st.sampled_from(FORMATS)),
        "shards": draw(st.integers(1, 2)),
        "seed": draw(seeds),
    }


def check_composition(program, of, k, n, format, shards, seed):
    rng = np.random.default_rng(seed)
    dense = np.stack(
        [np.sign(sparse_matrix((k, k), np.float32, 0.3, seed + i, integers=True)) for i in range(3)]
    )
    w = jf.stack([jf.encode(d.astype(np.float16), format, min(shards, k)) for d in dense])
    x, biases = (rng.integers(-1, 2, s).astype(np.float32) for s in ((n, k), (3, k)))

    def dense_multiply(w, x, bias, activation):
        z = jnp.dot(x, w.T, precision="highest")
        z = z if bias is None else z + bias
        return jax.nn.relu(z) if activation else z

    def sparse_value(values, biases, x):
        return run(program, jf.spmm, w.with_values(values), biases, x)

    def dense_value(dense, biases, x):
        return run(program, dense_multiply, dense, biases, x)

    def result(value, weights):
        if of == "value":
            return jax.jit(value)(weights, biases, x)
        at = {"grad of weights": 0, "grad of biases": 1, "grad of x": 2}[of]
        return jax.jit(jax.grad(lambda *a: (value(*a) * (1 + x)).sum(), at))(weights, biases, x)

    got, expected = result(sparse_value, w.values), result(dense_value, dense)
    # Between clip's ends gradients are integers; at them, halves of halves. Those of the values are
    # added up in fp16.
    precision = 2.0**-20
    if of == "grad of weights":
        got = w.with_values(got).to_dense().astype(np.float32)
        expected = np.where(dense != 0, expected, 0)
        precision = 2.0**-8
    np.testing.assert_allclose(got, expected, rtol=0, atol=precision * np.abs(expected).max())


PROPERTIES = {
    "encode and decode, bit for bit": (encodings(), check_encoding),
    "damaged weights are refused, or weights": (damages(), check_damage),
    "spmm within the bound": (products(), lambda case: check_product(**case)),
    "derivatives of the dense product": (derivatives(), lambda case: check_derivatives(**case)),
    "compositions of transforms": (compositions(), lambda case: check_composition(**case)),
}
