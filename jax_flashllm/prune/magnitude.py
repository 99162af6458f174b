"""Magnitude pruning: the weights nearest to zero go.

    keep W_ij  iff  |W_ij| > t                      (Han et al., NeurIPS 2015, section 3)

with t the k-th smallest magnitude of a comparison group, k = round(sparsity * group size). A
group is one output row, or the whole matrix, or several matrices (`global_threshold`). Wanda
(Sun et al., ICLR 2024, section 3) found that groups of rows do better in language models.

https://arxiv.org/abs/1506.02626   https://arxiv.org/abs/2306.11695
"""

from __future__ import annotations

from typing import Any

from .groups import Array, Group, apply, keep_largest, keep_n_of_m


def magnitude(w: Array, sparsity: float, group: Group = "row") -> Any:
    """Returns w [M, K] with round(sparsity * size) weights of every group set to zero.

    w: float16, bfloat16 or float32, NumPy or JAX (also under jit, sparsity being static).
    group: "row" compares within each row of K, "uniform" within the whole matrix.
    Raises ValueError for NaN (not under jit), other dtypes, other shapes, a sparsity outside 0..1.
    """
    return apply(w, magnitude_mask(w, sparsity, group))


def magnitude_mask(w: Array, sparsity: float, group: Group = "row") -> Array:
    """Returns bool [M, K], True where `magnitude` keeps the weight."""
    return keep_largest(w, sparsity, group)


def n_m(w: Array, n: int, m: int, scores: Array | None = None) -> Any:
    """Returns w [M, K] with the n highest-scored of every m consecutive weights of a row kept.

    scores: [M, K], such as `wanda_scores`; None scores by magnitude.
    2:4 is the pattern of NVIDIA's sparse tensor cores. Raises ValueError when m does not divide K.
    """
    return apply(w, keep_n_of_m(w if scores is None else scores, n, m))
