"""SparseGPT: prunes column by column, and lets the columns to come make up for what went.

    H = X^T X + lambda I                             (Frantar & Alistarh, ICML 2023, section 3)
    U = chol(H^-1)^T, upper, H^-1 = U^T U:  row j of U, from j on, is what the inverse Hessian of
        the columns j.. has to say of column j                          (section 3.2, step 1)

    for blocks of B columns (Algorithm 1; the mask is chosen once a block, B_s = B):
        M    the block's lowest W_ij^2 / U_jj^2 go                      (equation 3 with [H^-1]_jj)
        for columns j of the block:
            E_j = W_j / U_jj where M drops, else 0
            W_{:, j..} -= E_j U_{j, j..}    in this block now, in later ones at the block's end

The scale of H is free. Everything is float32.

https://arxiv.org/abs/2301.00774
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from .groups import Array, Group, check_group, check_sparsity, drop_smallest

HIGHEST = lax.Precision.HIGHEST


def sparsegpt(
    w: Array,
    h: Array,
    sparsity: float,
    group: Group = "uniform",
    block: int = 128,
    damping: float = 0.01,
) -> jax.Array:
    """Returns the pruned and updated weights, float32 [M, K].

    w: [M, K].   h: [K, K], X^T X up to a factor.   damping: lambda as a share of mean(diag(H)).
    group: what is compared within each block of columns: "uniform" all of it, as in the paper, or
        each "row" of it. Each group loses round(sparsity * its size) weights.

    Inputs that are always zero (dead: H_jj = 0) meet nothing: their weights go first.
    Raises ValueError for shapes that do not fit, NaN and Inf, and an H that is not positive
    definite in float32 (the last two not under jit).
    """
    check_sparsity(sparsity)
    check_group(group)
    if w.ndim != 2 or h.shape != (w.shape[1],) * 2:
        raise ValueError(f"sparsegpt: w is {w.shape} and h {h.shape}; pass w [M, K], h [K, K].")
    if block < 1 or damping < 0:
        raise ValueError(
            f"sparsegpt: block is {block} and damping {damping}; pass block >= 1, damping >= 0."
        )
    pruned, h = jnp.array(w, jnp.float32), jnp.asarray(h, jnp.float32)  # donated: a copy of w
    dead = jnp.diag(h) == 0
    _require(jnp.isfinite(pruned).all(), "w holds NaN or Inf; repair the checkpoint first.")
    _require(jnp.isfinite(h).all(), "H holds NaN or Inf; look at the calibration activations.")
    u = _inverse_factor(h, damping)
    _require(
        jnp.isfinite(u).all(),
        f"H is not positive definite in float32 with damping {damping}; pass a larger damping, or "
        "more calibration tokens.",
    )
    M, K = pruned.shape
    sizes = [min(block, K - i) for i in range(0, K, block)]
    # Two programs at most: whole blocks, and the last one where K leaves a rest.
    for i, n in enumerate(sizes):
        drop = round(sparsity * n) if group == "row" else round(sparsity * n * M)
        pruned = _prune_block(pruned, u, dead, i * block, drop, n, group)
    return pruned


def _require(condition: jax.Array, otherwise: str) -> None:
    if not isinstance(condition, Tracer) and not condition:
        raise ValueError(f"sparsegpt: {otherwise}")


@partial(jax.jit, static_argnames="damping")
def _inverse_factor(h: jax.Array, damping: float) -> jax.Array:
    """U, upper triangular, with U^T U the inverse of the damped H; NaN where there is none."""
    K = len(h)
    h = h + jnp.diag(jnp.where(jnp.diag(h) == 0, 1.0, 0.0))
    h = h + damping * jnp.mean(jnp.diag(h)) * jnp.eye(K)
    with jax.default_matmul_precision("highest"):
        # chol of H turned about both axes is that of H^-1, inverted: one factorisation, one solve.
        low = jnp.linalg.cholesky(h[::-1, ::-1])
        inverse = lax.linalg.triangular_solve(low, jnp.eye(K), left_side=True, lower=True)
    return inverse[::-1, ::-1]


@partial(jax.jit, static_argnames=("n", "group"), donate_argnums=0)
def _prune_block(
    w: jax.Array, u: jax.Array, dead: jax.Array, start: Any, drop: Any, n: int, group: str
) -> jax.Array:
    """Algorithm 1's inner loop for columns start..start + n, and its update of all later ones."""
    M = w.shape[0]
    w1 = lax.dynamic_slice_in_dim(w, start, n, axis=1)
    rows = lax.dynamic_slice_in_dim(u, start, n)  # [n, K], zero before `start`
    u1 = lax.dynamic_slice_in_dim(rows, start, n, axis=1)
    scores = w1**2 / jnp.diag(u1) ** 2
    scores = jnp.where(lax.dynamic_slice_in_dim(dead, start, n), 0.0, scores)
    grouped = scores if group == "row" else scores.reshape(1, -1)
    gone = drop_smallest(grouped, drop).reshape(M, n)

    def column(j, state):
        w1, errors = state
        e = jnp.where(gone[:, j], w1[:, j] / u1[j, j], 0.0)
        # u1[j] is zero before j: columns that are done do not move.
        return w1 - e[:, None] * u1[j], errors.at[:, j].set(e)

    w1, errors = lax.fori_loop(0, n, column, (w1, jnp.zeros_like(w1)))
    w = w - jnp.matmul(errors, rows, precision=HIGHEST)
    return lax.dynamic_update_slice_in_dim(w, jnp.where(gone, 0.0, w1), start, axis=1)
