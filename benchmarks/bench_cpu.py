"""bench_spmm.py on a CPU: contenders and how they are timed.

A time is the median of repeated calls that end with the result in memory, with the fastest beside
it. Calls go round copies of the weight larger than the caches, back to back as in a decode loop;
contenders take turns, so that a change of the machine's speed meets all of them.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

import jax_flashllm

SHAPES = [(4096, 4096), (11008, 4096), (28672, 7168)]
TOKENS = [1, 4, 16]
SPARSITIES = [0.5, 0.6, 0.7, 0.8, 0.9]
CACHE_BYTES = 128 << 20  # more than any last-level cache that a guest gets
MOST_COPIES = 256  # of matrices so small that decoding finds them in a cache too


def streamed(call: Callable, w, nbytes: int, copy: Callable) -> Callable[[], np.ndarray]:
    """call(w) with another copy of w each time, so that weights come from memory, not a cache."""
    copies = min(MOST_COPIES, CACHE_BYTES // nbytes)
    turn = itertools.cycle([w, *(copy(w) for _ in range(copies))])
    return lambda: call(next(turn))


def jax_contender(f, w, x) -> Callable[[], np.ndarray]:
    compiled = jax.jit(f)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(w))
    copy = lambda w: jax.tree.map(jnp.copy, w)  # noqa: E731
    return streamed(lambda w: np.asarray(compiled(w, x)), w, nbytes, copy)


def plugin_contender(plugin: ModuleType, dense, x) -> Callable[[], np.ndarray]:
    w = plugin.encode(dense)
    nbytes = weight_bytes(w, 2 * np.count_nonzero(dense))
    call = lambda w: np.asarray(plugin.multiply(w, x))  # noqa: E731
    return streamed(call, w, nbytes, lambda _: plugin.encode(dense))


def weight_bytes(w, at_least: int) -> int:
    """Bytes of the arrays in w, as far as it shows them."""
    return max(sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(w)), at_least, 1)


def contenders(
    dense: np.ndarray, x: np.ndarray, plugins: dict[str, ModuleType]
) -> dict[str, Callable[[], np.ndarray]]:
    """Name -> a call that computes x @ dense.T. dense, x: float32 that bf16 holds exactly."""
    to_bf16, to_f16 = (lambda a: a.astype(ml_dtypes.bfloat16)), (lambda a: a.astype(np.float16))
    w_bf16 = jax_flashllm.encode(to_bf16(dense), "bitmap")
    w_f16 = jax_flashllm.encode(to_f16(dense), "bitmap")
    x_jax = jnp.asarray(x)
    out = {
        "ours bf16": jax_contender(jax_flashllm.spmm, w_bf16, x_jax.astype(jnp.bfloat16)),
        "ours fp16": jax_contender(jax_flashllm.spmm, w_f16, x_jax.astype(jnp.float16)),
        "ours fp16, fp32 x": jax_contender(jax_flashllm.spmm, w_f16, x_jax),
        "XLA f32": jax_contender(lambda w, x: x @ w.T, jnp.asarray(dense), x_jax),
        "XLA f32, W as [K, M]": jax_contender(lambda w, x: x @ w, jnp.asarray(dense.T), x_jax),
    }
    try:
        import torch

        tw, tx = torch.from_numpy(dense), torch.from_numpy(x)
        tx16 = tx.bfloat16()
        tcsr = tw.to_sparse_csr()
        csr_bytes = tcsr.values().nbytes + tcsr.col_indices().nbytes
        linear = torch.nn.functional.linear
        out |= {
            "torch f32": streamed(lambda w: linear(tx, w).numpy(), tw, tw.nbytes, torch.clone),
            "torch bf16": streamed(
                lambda w: linear(tx16, w).float().numpy(),
                tw.bfloat16(),
                tw.nbytes // 2,
                torch.clone,
            ),
            "torch CSR": streamed(lambda w: (w @ tx.T).T.numpy(), tcsr, csr_bytes, torch.clone),
        }
    except ImportError:
        print("torch is missing: left out", file=sys.stderr)
    try:
        import scipy.sparse

        scsr = scipy.sparse.csr_array(dense)
        csr_bytes = scsr.data.nbytes + scsr.indices.nbytes
        out["scipy CSR"] = streamed(lambda w: (w @ x.T).T, scsr, csr_bytes, lambda w: w.copy())
    except ImportError:
        print("scipy is missing: left out", file=sys.stderr)
    return out | {name: plugin_contender(p, dense, x) for name, p in plugins.items()}


def measure(calls: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call. Contenders take turns of back-to-back calls, as in a decode loop."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    while any(sum(t) < seconds for t in times.values()):
        for name, f in calls.items():
            f()  # not timed: the threads of the contender before may still spin
            end = time.perf_counter() + seconds / 4
            while (start := time.perf_counter()) < end:
                f()
                times[name].append(time.perf_counter() - start)
    return times


def check(name: str, got: np.ndarray, ref: np.ndarray, scale: np.ndarray) -> None:
    # Half-precision outputs are within 2^-8; sums of CSR and dense float32 well within it.
    worst = np.max(np.abs(np.asarray(got, np.float64) - ref) / (np.abs(ref) + 1e-2 * scale))
    if not worst < 2**-7:
        raise SystemExit(f"{name}: relative error {worst:.3g}; not timed")


def run(args, plugins: dict[str, ModuleType]) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    cases = list(itertools.product(args.shapes or SHAPES, args.sparsity or SPARSITIES))
    for (m, k), sparsity in tqdm(cases, desc="bench", disable=None):
        dense = rng.standard_normal((m, k), dtype=np.float32)
        dense[rng.random((m, k), dtype=np.float32) < sparsity] = 0
        dense = dense.astype(ml_dtypes.bfloat16).astype(np.float32)
        for n in args.tokens or TOKENS:
            x = rng.standard_normal((n, k), dtype=np.float32)
            x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
            ref = x.astype(np.float64) @ dense.astype(np.float64).T
            scale = np.sqrt(k * (1 - sparsity))
            calls = contenders(dense, x, plugins)
            for name, f in calls.items():
                check(name, f(), ref, scale)
            for name, times in measure(calls, args.seconds).items():
                rows.append(
                    {
                        "M": m,
                        "K": k,
                        "N": n,
                        "sparsity": sparsity,
                        "kernel": name,
                        "median_ms": round(statistics.median(times) * 1e3, 4),
                        "min_ms": round(min(times) * 1e3, 4),
                        "max_ms": round(max(times) * 1e3, 4),
                        "calls": len(times),
                    }
                )
    return rows
