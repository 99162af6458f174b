"""OWL: layers with more outliers keep more weights.

    D^l = share of A^l_ij > M * mean(A^l)            (Yin et al., ICML 2024, equation 1)
    S^l proportional to 1 - D^l,  |S^l - S| <= lambda,  mean(S^l) = S      (section 3.2)

A^l are Wanda's scores of all weights of layer l, a whole decoder block. The ratios D are brought
to a range of 2 lambda, and shifted so that the mean is S, as the authors' code does; the bound on
|S^l - S| is then 2 lambda. Any method can prune to the sparsities S^l.

https://arxiv.org/abs/2310.05175
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .groups import Array, check_sparsity


def outlier_ratio(scores: Sequence[Array], M: float = 5.0) -> float:
    """Returns D of one layer, 0 to 1: the share of its scores above M times their mean.

    scores: Wanda's scores of every matrix of the layer.
    """
    size = sum(s.size for s in scores)
    mean = sum(float(s.mean(dtype=np.float64 if isinstance(s, np.ndarray) else None)) * s.size
               for s in scores) / size  # fmt: skip
    return sum(int((s > M * mean).sum()) for s in scores) / size


def owl(D: Sequence[float], sparsity: float, lam: float = 0.08) -> np.ndarray:
    """Returns the sparsity S^l of every layer, float64 [layers], whose mean is `sparsity`.

    D: outlier ratios, one a layer.   lam: the paper's lambda; 0 is the same sparsity everywhere.
    Raises ValueError when a layer would leave 0..1, and for D that are not finite.
    """
    check_sparsity(sparsity)
    d = np.asarray(D, np.float64)
    if d.ndim != 1 or not d.size or not np.isfinite(d).all():
        raise ValueError(f"owl: outlier ratios are {d}; pass one finite number a layer.")
    spread = np.ptp(d)
    kept = 2 * lam * (d - d.min()) / spread if spread else np.zeros_like(d)
    S = sparsity - (kept - kept.mean())
    if S.min() < 0 or S.max() > 1:
        layer = int(np.argmin(S) if S.min() < 0 else np.argmax(S))
        raise ValueError(
            f"owl: lambda {lam} at sparsity {sparsity} asks layer {layer} for {S[layer]:.3f}; "
            "pass a smaller lambda."
        )
    return S
