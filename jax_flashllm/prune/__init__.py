"""Pruning methods: arrays in, arrays out, one method a file."""

from .magnitude import Threshold, global_threshold, magnitude, magnitude_mask, n_m

__all__ = ["Threshold", "global_threshold", "magnitude", "magnitude_mask", "n_m"]
