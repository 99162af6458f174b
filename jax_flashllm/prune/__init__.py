"""Pruning methods: arrays in, arrays out, one method a file."""

from .groups import Threshold, global_threshold, keep_largest, keep_n_of_m
from .magnitude import magnitude, magnitude_mask, n_m
from .owl import outlier_ratio, owl
from .sparsegpt import sparsegpt
from .wanda import wanda, wanda_scores

__all__ = [
    "Threshold",
    "global_threshold",
    "keep_largest",
    "keep_n_of_m",
    "magnitude",
    "magnitude_mask",
    "n_m",
    "outlier_ratio",
    "owl",
    "sparsegpt",
    "wanda",
    "wanda_scores",
]
