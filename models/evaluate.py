"""Perplexity as the literature reports it: consecutive windows of the context, no overlap.

    ids      |-- window 0 --|-- window 1 --|-- last --|
    scored    .xxxxxxxxxxxxx .xxxxxxxxxxxxx .xxxxxxxxx     every token but a window's first

    per token = exp(sum of -log p / tokens scored)     per byte = exp(the same sum / their bytes)

Perplexities per token compare only models of one tokenizer; per byte they compare any.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_flashllm.models.mesh import model_mesh
from jax_flashllm.models.opt import OPT

# Windows a call: as many as keep the logits, float32 [windows, context, vocabulary], under this.
LOGITS_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """nats: sum of -log p over the scored tokens.   tokens, bytes: how many were scored.

    bytes is 0 where the sizes of tokens were not given; the rates per byte are then NaN.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def per_token(self) -> float:
        return _exp(self.nats / self.tokens)

    @property
    def per_byte(self) -> float:
        return _exp(self.nats / self.bytes) if self.bytes else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2) if self.bytes else math.nan


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def perplexity(
    model: OPT,
    ids: Any,
    token_bytes: np.ndarray | None = None,
    context: int | None = None,
    batch: int | None = None,
    on_batch: Callable[[int, float], Any] | None = None,
) -> Perplexity:
    """Scores `ids` under `model`, sparse or dense, in the model's own dtype.

    ids: int [n], n >= 2, of one text.   token_bytes: int [V], bytes that each token stands for.
    context: tokens a window, 2 to the model's; None takes the model's.
    batch: windows a call; None takes as many as fit 64 MB of logits. On a mesh rounded up to
      a multiple of its data axis.
    on_batch: called with (tokens scored so far, nats so far) after each call.
    Raises ValueError for ids, contexts and batches that do not fit.
    """
    config = model.config
    T = config.max_position_embeddings if context is None else context
    ids = _check(ids, T, config.max_position_embeddings, config.vocab_size)
    rows = -(-len(ids) // T)
    if batch is not None and batch < 1:
        raise ValueError(f"perplexity: batch is {batch}; evaluate 1 window at a time at least.")
    B = batch or max(LOGITS_BYTES // (4 * T * config.vocab_size), 1)
    # No larger than the text, and split evenly: a short last call would be padded with windows.
    B = min(B, rows)
    B = -(-rows // -(-rows // B))
    if model.layout is not None:
        B += -B % model.layout.rows
    padded = rows + -rows % B

    windows = np.zeros((padded, T), np.int32)
    windows.ravel()[: len(ids)] = ids
    scored = (np.arange(padded * T) < len(ids)).reshape(padded, T)[:, 1:]
    graphdef, state = nnx.split(model)
    losses = _losses(graphdef)
    nats = 0.0
    for i in range(0, padded, B):
        with model_mesh(model.layout):
            part = np.asarray(losses(state, windows[i : i + B]), np.float64)
        nats += float(part[scored[i : i + B]].sum())
        if math.isnan(nats):
            raise ValueError(
                f"perplexity: the model gives NaN within tokens {i * T} to {(i + B) * T}; are its "
                "weights damaged, or is the dtype too narrow for them? Try float32."
            )
        if on_batch is not None:
            on_batch(int(scored[: i + B].sum()), nats)
    size = 0 if token_bytes is None else int(token_bytes[windows[:, 1:]][scored].sum())
    return Perplexity(nats, int(scored.sum()), size)


@functools.lru_cache(maxsize=8)
def _losses(graphdef: Any):
    """(state, windows [B, T]) -> -log p of every token but the first, float32 [B, T - 1]."""

    @jax.jit
    def losses(state, windows):
        # For float32 models on a GPU, whose default is TF32; nothing changes for others.
        with jax.default_matmul_precision("highest"):
            logits = nnx.merge(graphdef, state)(windows[:, :-1])
        targets = windows[:, 1:, None]
        chosen = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    return losses


def _check(ids: Any, context: int, longest: int, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids)
    if not 2 <= context <= longest:
        raise ValueError(
            f"perplexity: context is {context}; this model takes windows of 2 to {longest} tokens."
        )
    if ids.ndim != 1 or not (ids.size == 0 or np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"perplexity: ids is {ids.dtype} {ids.shape}; pass integers of shape [n].")
    if len(ids) < 2:
        raise ValueError(
            f"perplexity: the text has {len(ids)} tokens; 2 are needed, for the first of a window "
            "is not scored. Pass a longer text."
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise ValueError(
            f"perplexity: token {bad} is outside the model's vocabulary of {vocab_size}; use the "
            "tokenizer that came with the model."
        )
    # A last window of one token has nothing to score, and changes nothing.
    return ids
