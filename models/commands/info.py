"""What a model directory holds: sparsity, layout, bits a weight and bytes of every matrix."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from jax_flashllm.models.commands import common
from jax_flashllm.models.config import is_linear

if TYPE_CHECKING:
    from jax_flashllm.models.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser, dtype=False, positional=True)


def run(args: argparse.Namespace) -> None:
    path = common.model_path(args.model)
    from jax_flashllm.models.checkpoint import open_checkpoint
    from jax_flashllm.models.config import OPTConfig

    with open_checkpoint(path) as checkpoint:
        config = OPTConfig.from_dict(checkpoint.config)
        print(
            f"{path}: OPT, {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
            f"{config.num_attention_heads} heads, FFN {config.ffn_dim}, "
            f"vocabulary {config.vocab_size}, context {config.max_position_embeddings}\n"
        )
        print(describe(checkpoint))


def describe(checkpoint: Checkpoint) -> str:
    """A table of the matrices and its totals. Reads every dense matrix to count its zeros."""
    from tqdm import tqdm

    rows, small, linear, whole = [], _Sum(), _Sum(), _Sum()
    for name in tqdm(checkpoint.names(), desc="info", disable=None, leave=False, delay=1):
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        entry = _Sum(math.prod(shape), nonzeros(checkpoint, name), checkpoint.stored_bytes(name))
        entry.dense = entry.weights * dtype.itemsize
        whole.add(entry)
        if len(shape) != 2:
            small.add(entry)
            continue
        if is_linear(name):
            linear.add(entry)
        layout = "bitmask" if checkpoint.is_sparse(name) else "dense"
        shown = name.removeprefix("model.").removeprefix("decoder.").removesuffix(".weight")
        rows.append((shown, f"[{shape[0]}, {shape[1]}]", str(dtype), layout, *entry.cells()))
    rows.append(("norms and biases", "", "", "dense", *small.cells()))
    rows.append(("all linear layers", "", "", "", *linear.cells()))
    rows.append(("all", "", "", "", *whole.cells()))
    head = ("tensor", "shape", "dtype", "layout", "sparsity", "bits/weight", "bytes")
    text = common.table(head, rows, left=4)
    return (
        f"{text}\n\n{whole.weights:,} weights in {common.size(checkpoint.nbytes)}; dense in the "
        f"same dtypes they take {common.size(whole.dense)}"
    )


def nonzeros(checkpoint: Checkpoint, name: str) -> int:
    """Weights that are not zero; a packed tensor counts what it stores."""
    import numpy as np

    known = checkpoint.nnz(name)
    if known is not None:
        return known
    value = checkpoint.read(name)
    # Bits without the sign: products with a mask leave -0.0 behind.
    return int(np.count_nonzero(value.view(f"u{value.dtype.itemsize}") << 1))


class _Sum:
    def __init__(self, weights: int = 0, nonzero: int = 0, stored: int = 0, dense: int = 0):
        self.weights, self.nonzero, self.stored, self.dense = weights, nonzero, stored, dense

    def add(self, other: _Sum) -> None:
        self.weights += other.weights
        self.nonzero += other.nonzero
        self.stored += other.stored
        self.dense += other.dense

    def cells(self) -> tuple[str, str, str]:
        if not self.weights:
            return "", "", common.size(self.stored)
        return (
            f"{100 * (1 - self.nonzero / self.weights):.2f}%",
            f"{8 * self.stored / self.weights:.2f}",
            common.size(self.stored),
        )
