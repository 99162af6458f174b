"""Perplexity: against a sum written out in NumPy, however the windows are batched."""

import math

import numpy as np
import pytest
import tiny_opt

from jax_flashllm.models import opt
from jax_flashllm.models.evaluate import Perplexity, perplexity

VOCAB = tiny_opt.BASE["vocab_size"]


@pytest.fixture(scope="module", params=[0.0, 0.7], ids=["dense", "sparse"])
def model(request, tmp_path_factory):
    config = tiny_opt.config("plain")
    tensors = tiny_opt.weights(config, np.float16, request.param)
    return opt.load(tiny_opt.save(tmp_path_factory.mktemp("model"), config, tensors))


def by_hand(model, ids, context):
    """Sum of -log p over all but the first token of each window, and how many there are."""
    nats, count = 0.0, 0
    for start in range(0, len(ids), context):
        window = ids[start : start + context]
        if len(window) < 2:
            continue
        logits = np.asarray(model(window[None, :-1])[0], np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        nats -= log_p[np.arange(len(window) - 1), window[1:]].sum()
        count += len(window) - 1
    return nats, count


# Lengths: less than a window, whole windows, a partial one, a last one of a single token.
@pytest.mark.parametrize("length", [2, 24, 48, 59, 49])
def test_it_is_the_sum_over_consecutive_windows(model, length):
    ids = np.random.default_rng(length).integers(0, VOCAB, length)
    nats, count = by_hand(model, ids, 24)
    result = perplexity(model, ids, context=24)
    assert result.tokens == count
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.per_token == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_the_batch_changes_nothing(model):
    ids = np.random.default_rng(0).integers(0, VOCAB, 300)
    results = [perplexity(model, ids, context=16, batch=b) for b in (1, 3, 7, 1000)]
    assert {r.tokens for r in results} == {300 - 19}
    assert np.ptp([r.nats for r in results]) < 1e-3


def test_bytes_are_those_of_the_scored_tokens(model):
    ids = np.arange(40) % VOCAB
    size = np.arange(VOCAB)
    result = perplexity(model, ids, size, context=16)
    assert result.bytes == ids.sum() - ids[[0, 16, 32]].sum()
    assert result.per_byte == pytest.approx(math.exp(result.nats / result.bytes))
    assert result.bits_per_byte == pytest.approx(math.log2(result.per_byte))
    assert math.isnan(perplexity(model, ids).per_byte)


def test_progress_ends_at_the_whole(model):
    seen = []
    ids = np.arange(100) % VOCAB
    result = perplexity(model, ids, context=16, batch=2, on_batch=lambda *x: seen.append(x))
    assert len(seen) == 4
    assert seen[-1] == (result.tokens, result.nats)


def test_a_hopeless_model_is_infinitely_perplexed():
    assert Perplexity(1e6, 10, 10).per_token == math.inf


def test_nan_logits_are_no_perplexity(model):
    import copy

    broken = copy.deepcopy(model)
    broken.embed_positions.embedding[...] = broken.embed_positions.embedding[...].at[2].set(np.nan)
    with pytest.raises(ValueError, match=r"gives NaN within tokens 0 to"):
        perplexity(broken, np.arange(50) % VOCAB)


@pytest.mark.parametrize(
    ("ids", "kwargs", "says"),
    [
        ([], {}, "0 tokens"),
        ([3], {}, "1 tokens"),
        ([1, VOCAB], {}, f"token {VOCAB} is outside"),
        ([1, -1], {}, "token -1 is outside"),
        ([[1, 2]], {}, r"pass integers of shape \[n\]"),
        ([0.5, 1.0], {}, "float64"),
        ([1, 2], {"context": 1}, "windows of 2 to 96"),
        ([1, 2], {"context": 97}, "windows of 2 to 96"),
        ([1, 2], {"batch": 0}, "1 window"),
    ],
)
def test_bad_input_is_refused(model, ids, kwargs, says):
    with pytest.raises(ValueError, match=says):
        perplexity(model, ids, **kwargs)
