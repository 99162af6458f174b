"""Magnitude pruning against a full stable sort of |w|."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_flashllm.prune import global_threshold, magnitude, magnitude_mask, n_m

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
SPARSITIES = [0.0, 0.001, 0.3, 0.5, 0.7, 0.999, 1.0]


def matrix(shape, dtype, seed=0, levels=None):
    """Random weights; with `levels`, few distinct magnitudes, so that nearly all are tied."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape, dtype=np.float32)
    if levels:
        w = np.sign(w) * rng.integers(0, levels, shape)
    return w.astype(dtype)


def reference(w, drop):
    """Per row, the first `drop` of a stable sort go."""
    keep = np.ones(w.shape, bool)
    order = np.argsort(np.abs(w.astype(np.float64)), axis=1, kind="stable")
    np.put_along_axis(keep, order[:, :drop], False, axis=1)
    return keep


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("group", ["row", "uniform"])
def test_drops_the_first_smallest_exactly(dtype, levels, sparsity, group):
    w = matrix((17, 61), dtype, levels=levels)
    grouped = w if group == "row" else w.reshape(1, -1)
    drop = round(sparsity * grouped.shape[1])
    expected = reference(grouped, drop).reshape(w.shape)
    on_jax = jax.jit(magnitude_mask, static_argnums=(1, 2))(jnp.asarray(w), sparsity, group)
    assert (magnitude_mask(w, sparsity, group) == expected).all()
    assert (np.asarray(on_jax) == expected).all()
    pruned = magnitude(w, sparsity, group)
    assert pruned.dtype == w.dtype
    assert pruned.tobytes() == np.where(expected, w, 0).astype(dtype).tobytes()


@settings(max_examples=200, deadline=None)
@given(
    # JAX compiles for each shape, so they are few.
    shape=st.sampled_from([(0, 5), (3, 0), (1, 1), (4, 33), (9, 8)]),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.sampled_from(SPARSITIES),
    bits=st.integers(0, 2**32 - 1),
)
def test_any_bits_but_nan(shape, dtype, sparsity, bits):
    rng = np.random.default_rng(bits)
    word = np.uint32 if dtype == np.float32 else np.uint16
    w = rng.integers(0, np.iinfo(word).max, shape, word, endpoint=True).view(dtype)
    w = np.where(np.isnan(w.astype(np.float32)), dtype(0), w)
    drop = round(sparsity * shape[1])
    assert (magnitude_mask(w, sparsity) == reference(w, drop)).all()
    on_jax = magnitude_mask(jnp.asarray(w), sparsity)
    assert (np.asarray(on_jax) == reference(w, drop)).all()


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_one_threshold_for_matrices_of_several_dtypes(sparsity, levels):
    ws = [matrix((5, 7 + i), DTYPES[i % 3], seed=i, levels=levels) for i in range(7)]
    flat = np.concatenate([w.astype(np.float32).ravel() for w in ws])[None]
    drop = round(sparsity * flat.size)
    expected = reference(flat, drop)[0]
    for source in (ws, lambda: iter(ws)):
        threshold = global_threshold(source, sparsity)
        got = np.concatenate([threshold.mask(w, i).ravel() for i, w in enumerate(ws)])
        assert (got == expected).all()
    pruned = threshold.prune(ws[1], 1)
    assert pruned.dtype == ws[1].dtype
    assert (pruned[threshold.mask(ws[1], 1)] == ws[1][threshold.mask(ws[1], 1)]).all()


def test_two_of_four():
    w = np.array([[1, -4, 3, 2, 5, 5, -5, 5]], np.float16)
    expected = np.array([[0, -4, 3, 0, 0, 0, -5, 5]], np.float16)
    assert (n_m(w, 2, 4) == expected).all()
    assert (np.asarray(n_m(jnp.asarray(w), 2, 4)) == expected).all()


def test_subnormals_are_ordered():
    w = np.array([[3, 0x8001, 2, 0x8000]], np.uint16).view(ml_dtypes.bfloat16)
    for x in (w, jnp.asarray(w)):
        assert np.asarray(magnitude_mask(x, 0.5)).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: magnitude(w, 1.5), r"sparsity is 1\.5; pass a fraction"),
        (lambda w: magnitude(w, float("nan")), "sparsity is nan"),
        (lambda w: magnitude(w, 0.5, "column"), "group is 'column'; pass 'row'"),
        (lambda w: magnitude(w[0], 0.5), r"shape \(8,\); pass a matrix"),
        (lambda w: magnitude(w.astype(np.int8), 0.5), "w is int8; cast it"),
        (lambda w: n_m(w, 2, 3), r"2:3 does not fit \(4, 8\)"),
        (lambda w: n_m(w, 5, 4), "5:4 does not fit"),
    ],
)
def test_errors_name_the_value_and_the_next_step(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((4, 8), np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_refused_and_located(dtype):
    w = np.ones((4, 8), dtype)
    w[2, 3] = np.nan
    for x in (w, jnp.asarray(w)):
        with pytest.raises(ValueError, match=r"w\[2, 3\] is NaN"):
            magnitude(x, 0.5)
    with pytest.raises(ValueError, match="is NaN"):
        global_threshold([w], 0.5)


def test_infinity_is_kept():
    w = np.array([[1, -np.inf, np.inf, 2]], np.float16)
    assert magnitude_mask(w, 0.5).tolist() == [[False, True, True, False]]
