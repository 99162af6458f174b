"""What a model directory holds: sparsity, layout, bits a weight and bytes of every matrix.

    jax-flashllm info --model DIR --batch 8 --context 576 --gpu h200
    jax-flashllm info --config opt-175b --sparsity 0.8 --batch 8 --context 576 --gpu h200

With --batch, --context or --gpu: what generation takes in memory too, and whether it fits.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from jax_flashllm.models import memory
from jax_flashllm.models.commands import common
from jax_flashllm.models.config import PRESETS, OPTConfig, is_linear

if TYPE_CHECKING:
    from jax_flashllm.models.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser, dtype=False, positional=True)
    parser.add_argument("--config", choices=PRESETS, help="an OPT by its size, without a directory")
    parser.add_argument(
        "--sparsity", type=common.number(float, 0, 1), metavar="S", help="of --config; else dense"
    )
    parser.add_argument(
        "--batch", type=common.number(int, 1, 1 << 20), metavar="N", help="rows (default 1)"
    )
    parser.add_argument(
        "--context", type=common.number(int, 1, 1 << 24), metavar="N",
        help="tokens of a row, the prompt's and new ones (default: the model's most)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", type=common.number(int, 1, 1 << 24), metavar="N", help="of them (default: all)"
    )
    parser.add_argument(
        "--cache-dtype", choices=("float16", "float32", "float8_e4m3fn"), default="float16"
    )
    parser.add_argument(
        "--gpu", type=gpu_bytes, metavar="NAME",
        help=f"{', '.join(memory.GPUS)}, or its memory in GB, such as 80",
    )  # fmt: skip


def gpu_bytes(text: str) -> tuple[str, float]:
    """A GPU's name and what of its memory programs can use."""
    if text.lower() in memory.GPUS:
        return text.lower(), memory.USABLE * memory.GPUS[text.lower()]
    try:
        size = float(text.lower().removesuffix("gb")) * 1e9
    except ValueError:
        size = 0.0
    if not 1e9 <= size < 1e15:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no GPU known here; pass one of {', '.join(memory.GPUS)}, or its memory "
            "in GB, such as 80"
        )
    return f"GPU of {text}", memory.USABLE * size


def run(args: argparse.Namespace) -> None:
    if args.config is not None:
        config = OPTConfig.preset(args.config)
        layers = "dense" if args.sparsity is None else f"{100 * args.sparsity:g}% sparse"
        print(f"{args.config}, {layers}: {_shape(config)}")
        print(needs(args, config, memory.weight_bytes(config, args.sparsity)))
        return
    if args.sparsity is not None:
        raise ValueError("--sparsity is that of --config; a model's own is counted")
    path = common.model_path(args.model)
    from jax_flashllm.models.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        config = OPTConfig.from_dict(checkpoint.config)
        print(f"{path}: OPT, {_shape(config)}\n")
        text, held = describe(checkpoint)
        print(text)
        if args.batch or args.context or args.gpu:
            print(needs(args, config, held))


def _shape(config: OPTConfig) -> str:
    return (
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads, FFN {config.ffn_dim}, "
        f"vocabulary {config.vocab_size}, context {config.max_position_embeddings}"
    )


def needs(args: argparse.Namespace, config: OPTConfig, weights: int) -> str:
    """A line about memory in generation, and one about whether it fits."""
    context, batch = args.context or config.max_position_embeddings, args.batch or 1
    if context > config.max_position_embeddings:
        raise ValueError(
            f"--context is {context}, but the model has {config.max_position_embeddings} "
            "positions; pass that at most"
        )
    prompt = min(args.prompt or context, context)
    itemsize = {"float16": 2, "float32": 4, "float8_e4m3fn": 1}[args.cache_dtype]
    sum_ = memory.estimate(config, weights, batch, context, prompt, itemsize)
    line = f"batch {batch}, context {context}, prompt {prompt}: {sum_}"
    if args.gpu is None:
        return line
    name, usable = args.gpu
    rest = usable - sum_.total
    verdict = f"fits, {memory.gb(rest)} stay free" if rest >= 0 else f"{memory.gb(-rest)} too much"
    return f"{line}\n{name}: {memory.gb(usable)} can be used: {verdict}"


def describe(checkpoint: Checkpoint) -> tuple[str, int]:
    """A table of the matrices and its totals, and the bytes that they take once loaded.

    Reads every dense matrix to count its zeros.
    """
    from tqdm import tqdm

    rows, small, linear, whole = [], _Sum(), _Sum(), _Sum()
    held = 0
    for name in tqdm(checkpoint.names(), desc="info", disable=None, leave=False, delay=1):
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        entry = _Sum(math.prod(shape), nonzeros(checkpoint, name), checkpoint.stored_bytes(name))
        entry.dense = entry.weights * dtype.itemsize
        whole.add(entry)
        held += memory.held_bytes(name, shape, dtype, checkpoint.is_sparse(name), entry.nonzero)
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
    totals = (
        f"{whole.weights:,} weights in {common.size(checkpoint.nbytes)}; dense in the same dtypes "
        f"they take {common.size(whole.dense)}"
    )
    return f"{text}\n\n{totals}", held


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
