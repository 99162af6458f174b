"""Decoding speed of a model as it is, and of the same weights dense, in one process.

`bench decode` needs no model: random weights of any OPT's size.

The dense twins are made in memory; rounds alternate between the models, and the first tokens of
each round are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

from jax_flashllm.models.commands import bench_decode, common

if TYPE_CHECKING:
    from jax_flashllm.models.opt import OPT

ROUNDS, WARM = 3, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    parser.add_argument(
        "--batch", type=common.number(int, 1, 4096), default=1, metavar="N", help="rows (default 1)"
    )
    parser.add_argument(
        "--tokens",
        type=common.number(int, 8),
        default=100,
        metavar="N",
        help="to generate in each of 3 rounds (default 100)",
    )
    parser.add_argument(
        "--prompt-tokens", type=common.number(int, 1), default=16, metavar="N", help="default 16"
    )
    decode = parser.add_subparsers(metavar="decode").add_parser(
        "decode", help="random weights of any OPT's size", description=bench_decode.__doc__,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    bench_decode.add_arguments(decode)
    decode.add_argument("--debug", action="store_true", help="show tracebacks")
    decode.set_defaults(bench=bench_decode.run)


def run(args: argparse.Namespace) -> None:
    getattr(args, "bench", _run)(args)


def _run(args: argparse.Namespace) -> None:
    path = common.model_path(args.model)
    common.use_all_memory()
    common.cache_compilations()
    import jax
    import jax.numpy as jnp
    from tqdm import tqdm

    from jax_flashllm.kernel import cpu_kernels
    from jax_flashllm.models import opt
    from jax_flashllm.models.densify import densify, sparse_share

    model = opt.load(path, args.dtype, format=args.format)
    context = model.config.max_position_embeddings
    if args.prompt_tokens + args.tokens > context:  # before a prompt of that size is made
        raise ValueError(
            f"--prompt-tokens {args.prompt_tokens} and --tokens {args.tokens} exceed the model's "
            f"context of {context}; ask for fewer"
        )
    share = sparse_share(model)
    models: dict[str, OPT] = {}
    if share is not None:
        models[f"sparse ({100 * share:.1f}%)"] = model
        models["dense, 16-bit weights"] = densify(model)
        if model.dtype == jnp.float32:
            models["dense, float32 weights"] = densify(model, jnp.float32)
    else:
        models["dense (no layer is sparse)"] = model
    steps: dict[str, list[float]] = {name: [] for name in models}
    with tqdm(total=ROUNDS * len(models), desc="bench", disable=None, leave=False) as bar:
        for _ in range(ROUNDS):
            for name, each in models.items():
                steps[name] += _steps(each, args.batch, args.prompt_tokens, args.tokens)
                bar.update()

    rows = []
    for name, each in models.items():
        ms = sorted(1e3 * s for s in steps[name])
        median = statistics.median(ms)
        spread = f"{ms[len(ms) // 10]:.2f} to {ms[-1 - len(ms) // 10]:.2f}"
        held, _ = common.weight_bytes(each)
        rows.append((name, f"{1e3 * args.batch / median:.1f}", f"{median:.2f}", spread,
                     common.size(held), f"{held / median / 1e6:.1f}"))  # fmt: skip
    device = jax.devices()[0]
    kernels = f", {cpu_kernels()} kernels" if device.platform == "cpu" else ""
    print(
        f"{path}: {device.device_kind}{kernels}, {model.dtype} activations, batch {args.batch}, "
        f"prompt {args.prompt_tokens}, {ROUNDS} x {args.tokens} tokens\n"
    )
    head = ("weights", "tokens/s", "ms/step", "10% to 90%", "in memory", "GB/s")
    print(common.table(head, rows))
    if len(rows) > 1:
        fastest = max(float(row[1]) for row in rows[1:])
        print(f"\nsparse is {float(rows[0][1]) / fastest:.2f}x the fastest dense")


def _steps(model: OPT, batch: int, prompt: int, tokens: int) -> list[float]:
    """Seconds of each decode step."""
    import numpy as np

    from jax_flashllm.models.generate import generate

    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, prompt))
    times: list[float] = []
    generate(
        model, ids, tokens, eos_token_id=(), on_token=lambda _: times.append(time.perf_counter())
    )
    return [b - a for a, b in zip(times[WARM:], times[WARM + 1 :], strict=False)]
