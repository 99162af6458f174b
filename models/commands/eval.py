"""Perplexity of a model on a text file, per token and per byte.

The text is cut into consecutive windows of the context without overlap; every token but the first
of each window is scored.

    jax-flashllm eval --model DIR --text FILE
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from jax_flashllm.models.commands import common

if TYPE_CHECKING:
    from jax_flashllm.models.evaluate import Perplexity
    from jax_flashllm.models.opt import OPT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--context",
        type=common.number(int, 2),
        metavar="N",
        help="tokens a window (default: the model's context)",
    )
    parser.add_argument(
        "--batch",
        type=common.number(int, 1),
        metavar="N",
        help="windows at a time (default: as many as fit 64 MB of logits)",
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="run the same weights dense as well, and tell the difference",
    )


def run(args: argparse.Namespace) -> None:
    path = common.model_path(args.model)
    text = common.read_text(args.text)
    if not text:
        raise ValueError(f"{args.text} is empty; pass a file with some text")
    common.cache_compilations()
    import numpy as np
    from tqdm import tqdm

    from jax_flashllm.models import opt
    from jax_flashllm.models.densify import densify
    from jax_flashllm.models.evaluate import perplexity
    from jax_flashllm.models.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(path)
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int64)
    model = opt.load(path, args.dtype, format=args.format)
    context = args.context or model.config.max_position_embeddings

    def measure(model: OPT) -> tuple[Perplexity, float]:
        start = time.perf_counter()
        with tqdm(total=len(ids), desc="eval", unit="token", disable=None, leave=False) as bar:

            def advance(tokens: int, nats: float) -> None:
                bar.update(tokens - bar.n)
                bar.set_postfix_str(f"{np.exp(nats / max(tokens, 1)):.3f} per token")

            result = perplexity(model, ids, tokenizer.token_bytes(), context, args.batch, advance)
        return result, time.perf_counter() - start

    result, seconds = measure(model)
    print(
        f"perplexity {result.per_token:.4f} per token, {result.per_byte:.5f} per byte; "
        f"{result.bits_per_byte:.5f} bits per byte\n"
        f"{result.tokens} tokens and {result.bytes} bytes scored in {seconds:.1f} s, windows of "
        f"{context}, {model.dtype} activations"
    )
    if args.dense:
        dense, seconds = measure(densify(model))
        change = round(100 * (result.per_token / dense.per_token - 1), 4) + 0.0  # no -0.0000
        print(
            f"the same weights dense: {dense.per_token:.4f} per token in {seconds:.1f} s; the "
            f"sparse kernels differ by {change:+.4f}%"
        )
