"""bench_spmm.py on a GPU: every shape of OPT and Llama, against cuBLAS.

Direct calls (ours, cuBLAS through torch, plugins) are timed as replays of a CUDA graph that walks
copies of the weight (gpu_timing.py). With --xla both products are timed inside a jitted program
too: wall clock, a program of many products. Outputs are poisoned, then compared with float64.
Few tokens of all shapes come first, the most last.
"""

import math
import sys
import time
from collections.abc import Callable
from types import ModuleType

import gpu_timing
import jax
import jax.numpy as jnp
import numpy as np
import shapes
import torch
from bench_cpu import weight_bytes
from tqdm import tqdm

import jax_flashllm
from jax_flashllm import plan as planning
from jax_flashllm import tuning

TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 1024]
PASSES = (0, 65), (65, 257), (257, math.inf)  # over all shapes
SPARSITIES = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
# Unless asked for by --tokens or --sparsity, Delta-CSR has no more tokens and no denser weights
# than these, and matrices with fewer weights than LARGE are not 95% sparse.
DELTA_TOKENS, DELTA_SPARSITY = 32, 0.6
LARGE = 4096 * 4096
XLA_PRODUCTS, XLA_BYTES = 48, 16 << 30  # of a program: its weights may take so much


def run(
    args, plugins: dict[str, ModuleType], save: Callable[[list[dict]], None]
) -> tuple[list[dict], list[str]]:
    """A row a case and contender, and what was wrong, of which there are no rows.

    save: called with all rows so far after every shape.
    """
    if not args.library:
        raise SystemExit(
            "bench_spmm.py --device gpu: pass --library; it is built by "
            "`cmake --build BUILD --target flashllm_cuda_api`"
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    lib = gpu_timing.Library(args.library)
    bandwidth = gpu_timing.read_bandwidth(lib)
    dtype = getattr(torch, args.dtype)
    tokens = args.tokens or TOKENS
    todo = args.shapes or shapes.all_shapes()
    # Products of many tokens lower the GPU's clocks, 10 to 23% of a time: they come last.
    passes = [[n for n in tokens if low <= n < high] for low, high in PASSES]
    work = [(shape, part) for part in passes if part for shape in todo]
    rows, wrong, start = [], [], time.monotonic()
    for at, (shape, part) in enumerate(tqdm(work, desc="bench", disable=None)):
        if time.monotonic() - start > args.budget:
            left = ", ".join(f"{m}x{k} N >= {part[0]}" for (m, k), part in work[at:])
            print(f"the budget is spent; left out: {left}", file=sys.stderr)
            break
        dense_us = gpu_timing.time_cublas(*shape, part, dtype)
        for sparsity in args.sparsity or SPARSITIES:
            if not args.sparsity and sparsity > 0.9 and math.prod(shape) < LARGE:
                continue
            dense = gpu_timing.random_weight(*shape, sparsity, dtype)
            case = Case(dense, part)
            found = [("cuBLAS", n, us, spread, dense.nbytes, 0.0)
                     for n, (us, spread) in dense_us.items()]  # fmt: skip
            for format in args.formats:
                found += ours(lib, case, format, kept(args, format, part, sparsity))
            for name, plugin in plugins.items():
                found += plugged(case, name, plugin)
            if args.xla:
                found += inside_xla(case, args.formats)
            for name, n, us, spread, nbytes, error in found:
                if not error <= 1:
                    wrong.append(f"{name} at {shape}, N = {n}: error {error:.3g} of the bound")
                    continue
                rows.append(
                    {
                        "M": shape[0],
                        "K": shape[1],
                        "N": n,
                        "sparsity": sparsity,
                        "kernel": name,
                        "median_ms": round(us / 1e3, 5),
                        "spread_ms": round(spread / 1e3, 5),
                        "dtype": args.dtype,
                        "roof_ms": round(1e3 * nbytes / bandwidth, 5),
                        "vs_cublas": round(dense_us[n][0] / us, 3),
                        "error": round(error, 3),
                        "matrix": shapes.names(shape),
                    }
                )
            del case, dense
        save(rows)
    print(f"R = {bandwidth / 1e12:.3f} TB/s; {time.monotonic() - start:.0f} s")
    return rows, wrong


def kept(args, format: str, tokens: list[int], sparsity: float) -> list[int]:
    """Those of `tokens` that a run has of a format."""
    if format != "delta_csr":
        return tokens
    if not args.sparsity and sparsity < DELTA_SPARSITY:
        return []
    return [n for n in tokens if args.tokens or n <= DELTA_TOKENS]


class Case:
    """A weight, tokens for every N, and what their products should be."""

    def __init__(self, dense: torch.Tensor, tokens: list[int]):
        self.dense, self.tokens = dense, tokens
        self.x = torch.randn(max(tokens), dense.shape[1], device="cuda").to(dense.dtype)
        self.ref, self.slack = gpu_timing.reference(self.x, dense)

    def error(self, y: torch.Tensor) -> float:
        """Largest error over the bound, NaN for anything unwritten."""
        n = len(y)
        return gpu_timing.worst(y, self.ref[:n], self.slack[:n])


def ours(lib, case: Case, format: str, tokens: list[int]):
    if not tokens:
        return
    w = gpu_timing.Weight(case.dense, format, lib)
    count = gpu_timing.copies_for(w.nbytes)
    copies = [w] + [w.clone() for _ in range(count - 1)]
    for n in tokens:
        x = case.x[:n].contiguous()
        y = torch.full((n, w.shape[0]), torch.nan, device="cuda", dtype=x.dtype)
        plan = gpu_timing.plan_for(w, n, x.dtype)
        dense = planning.WIDE_DENSE_TOKENS if plan.wide else planning.DENSE_TOKENS
        if n >= (planning.DELTA_DENSE_TOKENS if format == "delta_csr" else dense):
            run = gpu_timing.decoded(lib, x, y)
        else:
            run = gpu_timing.product(lib, x, y, plan)
        run(w)
        error = case.error(y)
        us, spread = gpu_timing.graph_time([lambda w=w, run=run: run(w) for w in copies])
        yield f"ours {format}", n, us, spread, w.nbytes, error


def plugged(case: Case, name: str, plugin: ModuleType):
    w = plugin.encode(case.dense)
    nbytes = weight_bytes(w, 2 * int(torch.count_nonzero(case.dense)))
    count = gpu_timing.copies_for(nbytes)
    copies = [w] + [plugin.encode(case.dense) for _ in range(count - 1)]
    for n in case.tokens:
        x = case.x[:n].contiguous()
        error = case.error(plugin.multiply(w, x))
        calls = [lambda w=w, x=x: plugin.multiply(w, x) for w in copies]
        yield name, n, *gpu_timing.graph_time(calls), nbytes, error


def inside_xla(case: Case, formats: list[str]):
    """XLA's dot and our primitive in a program of up to 48 products, a weight each."""
    dense = jax.dlpack.from_dlpack(case.dense)
    weights = {"XLA dot": dense}
    weights |= {f"ours {f}, XLA": jax_flashllm.encode(dense, f) for f in formats}
    for name, w in weights.items():
        f = jax_flashllm.spmm if name.startswith("ours") else lambda w, x: x @ w.T
        count = max(2, min(XLA_PRODUCTS, XLA_BYTES // w.nbytes))
        copies = [w, *(jax.tree.map(jnp.copy, w) for _ in range(count - 1))]
        for n in case.tokens:
            x = jax.dlpack.from_dlpack(case.x[:n].contiguous())
            y = torch.from_dlpack(jax.block_until_ready(jax.jit(f)(w, x)))
            times = tuning.time_products(f, copies, x, rounds=1)
            yield name, n, float(np.median(times)), float(np.ptp(times)), w.nbytes, case.error(y)
        del copies
