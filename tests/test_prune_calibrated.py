"""Wanda, SparseGPT and OWL against float64 references that share no code with them."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_flashllm.prune import (
    global_threshold,
    n_m,
    outlier_ratio,
    owl,
    sparsegpt,
    wanda,
    wanda_scores,
)


def inputs(tokens, k, seed=0):
    """Correlated activations [tokens, K] whose features differ in scale, as a network's do."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) / math.sqrt(k) + np.eye(k)
    return (rng.standard_normal((tokens, k)) @ mix) * np.exp(rng.standard_normal(k))


def weights(m, k, seed=0):
    return np.random.default_rng(seed + 100).standard_normal((m, k)).astype(np.float32)


# ---- Wanda ----


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("group", ["row", "uniform"])
@pytest.mark.parametrize("on", ["numpy", "jax"])
def test_wanda_drops_the_lowest_products(dtype, group, on):
    w, x = weights(13, 40).astype(dtype), inputs(200, 40)
    norm = np.linalg.norm(x, axis=0).astype(np.float32)
    scores = np.abs(w.astype(np.float64)) * norm
    grouped = scores if group == "row" else scores.reshape(1, -1)
    drop = round(0.6 * grouped.shape[1])
    gone = np.argsort(grouped, axis=1, kind="stable")[:, :drop]
    expected = grouped * 0 + 1
    np.put_along_axis(expected, gone, 0, axis=1)
    expected = np.where(expected.reshape(w.shape), w, 0).astype(dtype)
    args = (w, norm) if on == "numpy" else (jnp.asarray(w), jnp.asarray(norm))
    pruned = wanda(*args, 0.6, group)
    assert pruned.dtype == dtype
    np.testing.assert_array_equal(np.asarray(pruned), expected)


def test_scores_serve_other_groups():
    ws = [weights(4, 8, i) for i in range(3)]
    norm = np.linspace(0.1, 3, 8, dtype=np.float32)
    scores = [wanda_scores(w, norm) for w in ws]
    threshold = global_threshold(scores, 0.5)
    kept = [threshold.mask(s, i) for i, s in enumerate(scores)]
    assert sum(k.sum() for k in kept) == 48
    dropped = max(s[~k].max() for s, k in zip(scores, kept, strict=True))
    assert dropped <= min(s[k].min() for s, k in zip(scores, kept, strict=True))
    pruned = n_m(ws[0], 2, 4, scores[0])
    fours = scores[0].reshape(-1, 4)
    best = np.sort(fours, axis=1)[:, 2:3]
    expected = np.where(fours >= best, ws[0].reshape(-1, 4), 0).reshape(4, 8)
    np.testing.assert_array_equal(pruned, expected)


def test_wanda_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"x_norm is \(7,\) and w \(4, 8\)"):
        wanda(weights(4, 8), np.ones(7, np.float32), 0.5)
    with pytest.raises(ValueError, match=r"\[0, 3\] is NaN"):
        wanda(weights(4, 8), np.array([1, 1, 1, np.nan, 1, 1, 1, 1], np.float32), 0.5)


# ---- SparseGPT ----


def obs(w, h, sparsity, group, block, damping):
    """Optimal brain surgeon, one column at a time, with a fresh inverse for each."""
    w, h = w.astype(np.float64), h.astype(np.float64).copy()
    m, k = w.shape
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    h += damping * np.diag(h).mean() * np.eye(k)
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(k)]
    keep = np.ones(w.shape, bool)
    for start in range(0, k, block):
        stop = min(start + block, k)
        d = np.array([inverses[j][0, 0] for j in range(start, stop)])
        scores = np.where(dead[start:stop], 0, w[:, start:stop] ** 2 / d)
        grouped = scores if group == "row" else scores.reshape(1, -1)
        chosen = np.ones(grouped.shape, bool)
        order = np.argsort(grouped, axis=1, kind="stable")
        np.put_along_axis(chosen, order[:, : round(sparsity * grouped.shape[1])], False, axis=1)
        keep[:, start:stop] = chosen.reshape(m, -1)
        for j in range(start, stop):
            inverse = inverses[j]
            lost = np.where(keep[:, j], 0, w[:, j])
            w[:, j:] -= np.outer(lost / inverse[0, 0], inverse[0])
            w[~keep[:, j], j] = 0
    return w


# A rest of a block, one block, blocks of one, many tokens and fewer tokens than features.
@pytest.mark.parametrize(
    ("shape", "block", "tokens"),
    [((24, 40), 16, 400), ((24, 40), 128, 400), ((5, 9), 1, 100), ((16, 32), 8, 20)],
)
@pytest.mark.parametrize("group", ["row", "uniform"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 1.0])
def test_sparsegpt_is_the_optimal_brain_surgeon(shape, block, tokens, group, sparsity):
    w, x = weights(*shape), inputs(tokens, shape[1])
    h = (x.T @ x).astype(np.float32)
    got = np.asarray(sparsegpt(w, h, sparsity, group, block))
    expected = obs(w, h, sparsity, group, block, 0.01)
    assert ((got != 0) == (expected != 0)).all()
    # The damping bounds the condition of H by 100 K; products of float32 lose no more than that.
    scale = np.abs(expected).max() if sparsity < 1 else 1
    np.testing.assert_allclose(got, expected, atol=2.0**-23 * 100 * shape[1] * scale)


def test_each_group_loses_exactly_its_share():
    w, x = weights(16, 40), inputs(100, 40)
    h = (x.T @ x).astype(np.float32)
    by_row = np.asarray(sparsegpt(w, h, 0.7, "row", 16)) == 0
    for start, size in ((0, 16), (16, 16), (32, 8)):
        assert (by_row[:, start : start + size].sum(axis=1) == round(0.7 * size)).all()
    whole = np.asarray(sparsegpt(w, h, 0.7, "uniform", 16)) == 0
    for start, size in ((0, 16), (16, 16), (32, 8)):
        assert whole[:, start : start + size].sum() == round(0.7 * size * 16)


def test_columns_that_go_first_are_made_up_for_by_least_squares():
    w, x = weights(6, 12), inputs(300, 12)
    w[:, :6] *= 1e-3  # so small that the mask is these
    h = (x.T @ x).astype(np.float32)
    got = np.asarray(sparsegpt(w, h, 0.5, "row", 12, damping=0.0), np.float64)
    assert (got[:, :6] == 0).all()
    best = np.linalg.lstsq(x[:, 6:], x @ w.T.astype(np.float64), rcond=None)[0].T
    np.testing.assert_allclose(got[:, 6:], best, rtol=1e-3)


def test_updates_pay_on_correlated_inputs():
    rng = np.random.default_rng(3)
    # 24 directions and a little noise: what one feature says, others say too.
    x = rng.standard_normal((500, 24)) @ inputs(24, 64, seed=3) + rng.standard_normal((500, 64))
    w = weights(48, 64)
    h = (x.T @ x).astype(np.float32)
    norm = np.sqrt(np.diag(h))

    def error(pruned):
        return np.linalg.norm(x @ (np.asarray(pruned, np.float64) - w).T)

    assert error(sparsegpt(w, h, 0.6)) < 0.9 * error(wanda(w, norm, 0.6))
    assert error(wanda(w, norm, 0.6)) < 0.9 * error(wanda(w, np.ones_like(norm), 0.6))


def test_dead_inputs_go_first_and_no_more_goes_than_was_asked_for():
    w, x = weights(8, 16), inputs(200, 16)
    x[:, ::2] = 0
    h = (x.T @ x).astype(np.float32)
    for sparsity in (0.25, 0.75):
        got = np.asarray(sparsegpt(w, h, sparsity))
        assert np.isfinite(got).all()
        assert (got == 0).sum() == round(sparsity * got.size)
    assert (got[:, ::2] == 0).all()
    # With nothing at all to go by, the weights stay as they are.
    kept = np.asarray(sparsegpt(w, np.zeros_like(h), 0.5))
    assert (kept[kept != 0] == w[kept != 0]).all()


def test_sparsegpt_runs_under_jit_and_leaves_its_arguments():
    w, x = jnp.asarray(weights(8, 16)), inputs(100, 16)
    h = jnp.asarray(x.T @ x, jnp.float32)
    eager = sparsegpt(w, h, 0.5, block=8)
    jitted = jax.jit(functools.partial(sparsegpt, sparsity=0.5, block=8))(w, h)
    np.testing.assert_allclose(jitted, eager, rtol=1e-5, atol=1e-6)
    assert not w.is_deleted()
    assert not h.is_deleted()


@pytest.mark.parametrize(
    ("change", "kwargs", "says"),
    [
        ("nothing", {"sparsity": 1.2}, r"sparsity is 1\.2"),
        ("nothing", {"group": "global"}, "group is 'global'"),
        ("nothing", {"block": 0}, "block is 0"),
        ("nothing", {"damping": -1.0}, "damping -1"),
        ("shape", {}, r"w is \(4, 8\) and h \(7, 7\)"),
        ("nan", {}, "H holds NaN or Inf"),
        ("weight", {}, "w holds NaN or Inf"),
        ("singular", {"damping": 0.0}, "not positive definite.*larger damping"),
    ],
)
def test_sparsegpt_says_what_is_wrong(change, kwargs, says):
    w, h = weights(4, 8), np.eye(8, dtype=np.float32)
    if change == "shape":
        h = np.eye(7, dtype=np.float32)
    elif change == "nan":
        h[2, 2] = np.nan
    elif change == "weight":
        w[1, 1] = np.inf
    elif change == "singular":
        h[:] = 1  # all inputs the same
    with pytest.raises(ValueError, match=says):
        sparsegpt(w, h, **({"sparsity": 0.5} | kwargs))


# ---- OWL ----


def test_outliers_are_counted_over_the_whole_layer():
    a, b = np.ones((4, 4), np.float32), np.ones((2, 8), np.float32)
    b[0, :3] = 100  # the mean of all is 10.3
    for scores in ([a, b], [jnp.asarray(a), jnp.asarray(b)]):
        assert outlier_ratio(scores, 5.0) == 3 / 32
        assert outlier_ratio(scores, 10.0) == 0


def test_more_outliers_keep_more_and_the_mean_is_exact():
    D = [0.01, 0.05, 0.02, 0.03]
    S = owl(D, 0.7, 0.08)
    assert S.mean() == pytest.approx(0.7, abs=1e-15)
    assert np.ptp(S) == pytest.approx(0.16)
    assert (np.argsort(S) == np.argsort(D)[::-1]).all()
    # By hand: kept 0.16 (D - 0.01) / 0.04, less its mean 0.07, off 0.7.
    np.testing.assert_allclose(S, [0.77, 0.61, 0.73, 0.69], atol=1e-12)
    np.testing.assert_array_equal(owl([0.1, 0.1], 0.7), [0.7, 0.7])
    np.testing.assert_array_equal(owl(D, 0.7, 0.0), [0.7] * 4)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (([0.1, 0.2], 1.5), r"sparsity is 1\.5"),
        (([0.1, math.nan], 0.5), "one finite number a layer"),
        (([], 0.5), "one finite number a layer"),
        (([0.1, 0.2], 0.95), r"layer 0 for 1\.030; pass a smaller lambda"),
    ],
)
def test_owl_says_what_is_wrong(args, says):
    with pytest.raises(ValueError, match=says):
        owl(*args)
