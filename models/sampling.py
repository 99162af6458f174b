"""Choosing the next token: filters on logits, then one draw a row.

Every filter takes float32 logits [B, V], sets what it drops to -inf and leaves the rest alone, with
the semantics of the logits processor of that name in transformers (ties and borders included).
They are applied in its order: temperature, top_k, top_p, min_p. All of them are pure, so they work
under jit and vmap.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose a token. None for the whole object means greedy.

    A field that is None leaves its filter out of the compiled program; the others are operands,
    so a new value does not recompile. Only top_k is static, because it is a shape.
    """

    temperature: np.float32
    top_p: np.float32 | None = None
    min_p: np.float32 | None = None
    top_k: int | None = dataclasses.field(default=None, metadata=dict(static=True))

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
            np.float32(temperature),
            None if top_p is None or top_p == 1 else np.float32(top_p),
            None if min_p is None or min_p == 0 else np.float32(min_p),
            None if top_k is None else int(top_k),
        )


def _check(name: str, value: Any, least: float, most: float, wanted: str, integer=False) -> None:
    if value is None and name != "temperature":
        return
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not number or not least <= value <= most or math.isinf(value):
        raise ValueError(f"sampling: {name} is {value!r}; it is {wanted}.")


def greedy(logits: jax.Array) -> jax.Array:
    """The token with the largest logit, the first of equals.   [B, V] -> int32 [B]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def apply_temperature(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """logits / temperature."""
    return logits / temperature


def apply_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keeps the k largest logits and all that equal the k-th; k past V keeps all."""
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def apply_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps the smallest set of likeliest tokens whose probabilities reach p; at least one.

    In rising order of probability, tokens are dropped while their running sum is at most 1 - p.
    """
    rising = jnp.argsort(logits, axis=-1, stable=True)
    ordered = jnp.take_along_axis(logits, rising, axis=-1)
    dropped = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) <= 1 - p
    dropped = dropped.at[..., -1].set(False)
    # Back in vocabulary order: the inverse permutation by a second sort, which beats a scatter.
    place = jnp.argsort(rising, axis=-1)
    return jnp.where(jnp.take_along_axis(dropped, place, axis=-1), -jnp.inf, logits)


def apply_min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
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
    probabilities = jax.nn.softmax(filter_logits(logits, sampling), axis=-1)
    running = jnp.cumsum(probabilities, axis=-1)
    reached = (running > uniform[:, None] * running[:, -1:]) & (probabilities > 0)
    # Rounding may leave nothing reached at uniform = 1 - 2^-24; the likeliest token then stands in.
    fallback = jnp.argmax(probabilities, axis=-1)
    drawn = jnp.where(reached.any(axis=-1), jnp.argmax(reached, axis=-1), fallback)
    return drawn.astype(jnp.int32)
