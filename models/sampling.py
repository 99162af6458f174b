"""Choosing the next token: filters on logits, then one draw a row.

Every filter takes float32 logits [B, V], sets what it drops to -inf and leaves the rest alone, with
the semantics of the logits processor of that name in transformers (ties and borders included).
They are applied in its order: temperature, top_k, top_p, min_p. All of them are pure, so they work
under jit and vmap.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose a token. None for the whole object means greedy.

    A field that is None leaves its filter out of the compiled program; the others are operands,
    so a new value does not recompile.
    """

    temperature: np.float32
    top_p: np.float32 | None = None
    min_p: np.float32 | None = None
    top_k: np.int32 | None = None

    @classmethod
    def create(
        cls,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> Sampling | None:
        """Checks the values; None when temperature is 0, since no filter moves the argmax.

        Raises ValueError for temperature < 0 or not finite, top_k < 1, top_p outside (0, 1] or
        min_p outside [0, 1].
        """
        _check("temperature", temperature, 0, math.inf, "a finite number from 0 (greedy)")
        _check("top_p", top_p, math.ulp(0.0), 1, "above 0 and at most 1, or None for all")
        _check("min_p", min_p, 0, 1, "from 0 to 1, or None for all")
        _check("top_k", top_k, 1, math.inf, "an integer from 1, or None for all", integer=True)
        if temperature == 0:
            return None
        return cls(
            # Colder could be 0 in float32 or make logits infinite; this is greedy already.
            np.float32(max(temperature, 1e-30)),
            None if top_p is None or top_p == 1 else np.float32(top_p),
            None if min_p is None or min_p == 0 else np.float32(min_p),
            None if top_k is None else np.int32(min(top_k, 2**31 - 1)),
        )


def _check(name: str, value: Any, least: float, most: float, wanted: str, integer=False) -> None:
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    if value is None:
        valid = name != "temperature"
    elif isinstance(value, kinds) and not isinstance(value, bool):
        valid = least <= value <= most and value < math.inf
    else:
        valid = False
    if not valid:
        raise ValueError(f"sampling: {name} is {value!r}; it is {wanted}.")


def greedy(logits: jax.Array) -> jax.Array:
    """The token with the largest logit, the first of equals.   [B, V] -> int32 [B]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def apply_temperature(logits: jax.Array, temperature: ArrayLike) -> jax.Array:
    """logits / temperature."""
    return logits / temperature


def apply_top_k(logits: jax.Array, k: ArrayLike) -> jax.Array:
    """Keeps the k largest logits and all that equal the k-th; k past V keeps all."""
    # By bisection, as below: of a top_k whose indices or values go unused XLA makes a full sort.
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    keys = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # in order of their floats
    k = jnp.minimum(k, logits.shape[-1])
    kth = _first(lambda n: jnp.sum(keys > n, axis=-1, keepdims=True) < k, 2**32 - 1, logits)
    kth = lax.bitcast_convert_type(
        jnp.where(kth >> 31 == 1, kth & jnp.uint32(0x7FFFFFFF), ~kth), jnp.float32
    )
    return jnp.where(logits < kth, -jnp.inf, logits)


def apply_top_p(logits: jax.Array, p: ArrayLike) -> jax.Array:
    """Keeps the smallest set of likeliest tokens whose probabilities reach p; at least one.

    In rising order of probability, and of index among equals, tokens are dropped while their
    running sum is at most 1 - p.
    """
    # Bisection finds where that sum passes 1 - p in some fifty sweeps over the row. On a CPU that
    # is 0.6 ms for 50272 tokens, where XLA's sort with indices takes 12.
    probabilities = jax.nn.softmax(logits, axis=-1)
    bits = lax.bitcast_convert_type(probabilities, jnp.uint32)  # in the order of their floats
    index = lax.broadcasted_iota(jnp.uint32, logits.shape, logits.ndim - 1)

    def passes(counted):
        return jnp.sum(jnp.where(counted, probabilities, 0), axis=-1, keepdims=True) > 1 - p

    # Where rounding keeps even the whole sum from passing, the last of the likeliest is kept.
    border = jnp.minimum(
        _first(lambda n: passes(bits <= n), _BITS_OF_1, logits), bits.max(-1, keepdims=True)
    )
    ties = bits == border
    rank = _first(
        lambda n: passes((bits < border) | (ties & (index <= n))), logits.shape[-1] - 1, logits
    )
    rank = jnp.minimum(rank, jnp.where(ties, index, 0).max(-1, keepdims=True))
    return jnp.where((bits > border) | (ties & (index >= rank)), logits, -jnp.inf)


_BITS_OF_1 = 0x3F800000


def _first(test: Callable[[jax.Array], jax.Array], most: int, like: jax.Array) -> jax.Array:
    """For each row of `like` the least n in [0, most] with test(n), or `most`: uint32 [..., 1].

    test: from such an array to bool of its shape; once true for a row, true for all larger n.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = low + ((high - low) >> 1)
        found = test(middle)
        return jnp.where(found, low, jnp.minimum(middle + 1, high)), jnp.where(found, middle, high)

    low = jnp.zeros((*like.shape[:-1], 1), jnp.uint32)
    return lax.fori_loop(0, most.bit_length(), halve, (low, jnp.full_like(low, np.uint32(most))))[1]


def apply_min_p(logits: jax.Array, p: ArrayLike) -> jax.Array:
    """Keeps tokens at least p times as likely as the likeliest."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    dropped = probabilities < p * jnp.max(probabilities, axis=-1, keepdims=True)
    # The first likeliest stays even if rounding puts p * max above max.
    best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    return jnp.where(dropped & ~best, -jnp.inf, logits)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """`logits` [B, V] after the filters of `sampling`, in transformers' order."""
    logits = apply_temperature(logits.astype(jnp.float32), sampling.temperature)
    if sampling.top_k is not None:
        logits = apply_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = apply_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = apply_min_p(logits, sampling.min_p)
    return logits


def row_uniforms(seed: int, rows: int, steps: int) -> np.ndarray:
    """The draws of every row and step, float32 [rows, steps] in [0, 1).

    Row r reads its own Philox stream, keyed by (seed, r): what else is in the batch is not seen.
    One number a token is all that sampling needs, and drawing it here keeps threefry out of the
    compiled step, where it took longer to compile than the whole of a small model.
    """
    draws = [
        np.random.Generator(np.random.Philox(key=np.array([seed, row], np.uint64))).random(
            steps, np.float32
        )
        for row in range(rows)
    ]
    return np.stack(draws)


def sample(
    logits: jax.Array, sampling: Sampling | None = None, uniform: jax.Array | None = None
) -> jax.Array:
    """The next token of every row: int32 [B].

    logits: [B, V].   uniform: [B] in [0, 1), which `sampling` None (greedy) does without.
    Draws from softmax(filter_logits(logits)): the first token where the running sum of the
    probabilities exceeds `uniform`. A token that was filtered out is never drawn.
    """
    if sampling is None:
        return greedy(logits)
    if uniform is None:
        raise ValueError("sample: pass uniform, a number in [0, 1) for each row of logits.")
    probabilities = jax.nn.softmax(filter_logits(logits, sampling), axis=-1)
    index = lax.broadcasted_iota(jnp.uint32, logits.shape, 1)

    def running(n):
        return jnp.sum(jnp.where(index <= n, probabilities, 0), axis=-1, keepdims=True)

    last = logits.shape[1] - 1
    # Rounding may bring uniform = 1 - 2^-24 up to the whole sum, which no sum exceeds.
    whole = running(last)
    target = jnp.minimum(uniform[:, None] * whole, jnp.nextafter(whole, 0.0))
    return _first(lambda n: running(n) > target, last, logits)[:, 0].astype(jnp.int32)
