"""Wanda: weights go by their magnitude times the norm of the input that they meet.

    S_ij = |W_ij| * ||X_j||_2                        (Sun et al., ICLR 2024, equation 1)

W [M, K] = [C_out, C_in], X [N L, K] the layer's inputs over all calibration tokens, X_j its column
j. Scores are compared within an output row. The scale of X is free: sqrt(diag(H)) of any
H ~ X^T X serves.

https://arxiv.org/abs/2306.11695
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from .groups import Array, Group, apply, keep_largest


def wanda_scores(w: Array, x_norm: Array) -> Any:
    """Returns S, float32 [M, K].

    w: [M, K].   x_norm: [K], ||X_j||_2 up to a common factor, finite and not negative.
    Raises ValueError for shapes that do not fit.
    """
    if w.ndim != 2 or x_norm.shape != w.shape[1:]:
        raise ValueError(
            f"wanda: x_norm is {x_norm.shape} and w {w.shape}; pass w [M, K] and x_norm [K]."
        )
    xp = np if isinstance(w, np.ndarray) and isinstance(x_norm, np.ndarray) else jnp
    return xp.abs(w.astype(np.float32)) * x_norm.astype(np.float32)


def wanda(w: Array, x_norm: Array, sparsity: float, group: Group = "row") -> Any:
    """Returns w [M, K] with the round(sparsity * size) lowest-scored of every group set to zero.

    w: float16, bfloat16 or float32.   x_norm, errors: see `wanda_scores`.
    group: "row", as in the paper, or "uniform" for the whole matrix.
    """
    return apply(w, keep_largest(wanda_scores(w, x_norm), sparsity, group))
