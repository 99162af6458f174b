"""Sampling: each filter against a plain NumPy one, and draws against their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashllm.models import sampling
from jax_flashllm.models.sampling import Sampling

LOGITS = np.random.RandomState(0).standard_normal((4, 50)).astype(np.float32) * 3
TIED = np.array([[1.0, 3.0, 3.0, 2.0, 3.0, 0.0]], np.float32)


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept(filtered, logits):
    """Which tokens a filter kept; all it kept must be untouched."""
    filtered = np.asarray(filtered)
    keep = filtered != -np.inf
    np.testing.assert_array_equal(filtered[keep], logits[keep])
    return keep


@pytest.mark.parametrize("k", [1, 2, 7, 50, 999])
def test_top_k_keeps_the_k_largest(k):
    keep = kept(jax.jit(sampling.apply_top_k)(LOGITS, k), LOGITS)
    rank = np.argsort(np.argsort(-LOGITS, axis=-1), axis=-1)
    np.testing.assert_array_equal(keep, rank < k)


def test_top_k_keeps_all_that_tie_with_the_kth():
    assert kept(sampling.apply_top_k(TIED, 2), TIED)[0].tolist() == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_likeliest_that_reach_p(p):
    keep = kept(jax.jit(sampling.apply_top_p)(LOGITS, np.float32(p)), LOGITS)
    for row, probabilities in zip(keep, softmax(LOGITS), strict=True):
        order = np.argsort(-probabilities)
        enough = np.searchsorted(np.cumsum(probabilities[order]), p) + 1
        assert set(np.flatnonzero(row)) == set(order[:enough])


def test_top_p_of_0_keeps_the_likeliest():
    keep = kept(sampling.apply_top_p(LOGITS, 0.0), LOGITS)
    np.testing.assert_array_equal(keep.sum(-1), 1)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_is_p_times_as_likely_as_the_best(p):
    keep = kept(jax.jit(sampling.apply_min_p)(LOGITS, np.float32(p)), LOGITS)
    probabilities = softmax(LOGITS)
    expected = probabilities >= p * probabilities.max(-1, keepdims=True)
    np.testing.assert_array_equal(keep, expected)


def test_filters_are_applied_in_order():
    s = Sampling.create(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05)
    expected = sampling.apply_temperature(jnp.asarray(LOGITS), s.temperature)
    expected = sampling.apply_top_k(expected, 20)
    expected = sampling.apply_top_p(expected, s.top_p)
    expected = sampling.apply_min_p(expected, s.min_p)
    np.testing.assert_array_equal(sampling.filter_logits(jnp.asarray(LOGITS), s), expected)


def test_draws_follow_the_probabilities():
    n = 20_000
    logits = np.broadcast_to(LOGITS[:1], (n, 50))
    s = Sampling.create(temperature=1.5, top_k=10)
    uniform = sampling.row_uniforms(3, 1, n)[0]
    tokens = jax.jit(sampling.sample)(logits, s, uniform)
    expected = softmax(np.asarray(sampling.filter_logits(jnp.asarray(LOGITS[:1]), s)))[0]
    found = np.bincount(tokens, minlength=50) / n
    assert not found[expected == 0].any()
    # Five standard deviations of a binomial share.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected / n)).all()


@pytest.mark.parametrize("uniform", [0.0, np.float32(1 - 2**-24)])
def test_a_filtered_token_is_never_drawn(uniform):
    logits = np.full((3, 40), 2.0, np.float32)
    logits[:, :5] = logits[:, -5:] = 0.0
    s = Sampling.create(temperature=1.0, top_k=30)
    tokens = np.asarray(sampling.sample(logits, s, np.full(3, uniform, np.float32)))
    assert ((tokens >= 5) & (tokens < 35)).all()


def test_greedy_takes_the_first_of_equals():
    assert sampling.sample(TIED).tolist() == [1]


def test_uniforms_of_a_row_do_not_see_the_batch():
    all_rows = sampling.row_uniforms(5, 4, 6)
    np.testing.assert_array_equal(sampling.row_uniforms(5, 2, 3), all_rows[:2, :3])
    assert len(np.unique(all_rows)) == 24
    assert not np.array_equal(all_rows, sampling.row_uniforms(6, 4, 6))
    assert sampling.row_uniforms(2**64 - 1, 1, 1).dtype == np.float32


def test_temperature_0_is_greedy_whatever_the_filters():
    assert Sampling.create(0, top_k=3, top_p=0.5, min_p=0.1) is None


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-20])
def test_temperature_near_0_is_greedy(temperature):
    logits = jnp.array([[1.0, 30.0, 29.0, -5.0], [-3.0, -4.0, -2.5, -9.0]])
    cold = Sampling.create(temperature, top_p=0.9)
    assert sampling.sample(logits, cold, jnp.array([0.5, 0.99])).tolist() == [1, 2]


def test_filters_that_keep_all_are_left_out():
    s = Sampling.create(1.0, top_p=1.0, min_p=0.0)
    assert (s.top_k, s.top_p, s.min_p) == (None, None, None)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"min_p": -0.1}, r"min_p is -0\.1"),
        ({"min_p": float("nan")}, "min_p is nan"),
    ],
)
def test_bad_parameters_are_named(bad, words):
    with pytest.raises(ValueError, match=words):
        Sampling.create(**({"temperature": 1.0} | bad))
