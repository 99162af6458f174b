"""Times spmm against dense and sparse products of other libraries, same process, same data.

    python benchmarks/bench_spmm.py                      # CPU: the shapes of docs/kernels.md
    python benchmarks/bench_spmm.py --shapes 4096x4096 --tokens 1 --sparsity 0.8
    python benchmarks/bench_spmm.py --csv out.csv --plot out.png

Every result is checked against float64 before it is timed. A time is the median of repeated
calls that end with the result in memory, with the fastest beside it. Calls go round copies of the
weight larger than the caches, back to back as in a decode loop; contenders take turns, so that a
change of the machine's speed meets all of them. Needs `pip install '.[bench]'`;
contenders whose library is missing are left out, and said so.
"""

import argparse
import csv
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

import jax_flashllm
from jax_flashllm.kernel import cpu_kernels

SHAPES = ["4096x4096", "11008x4096", "28672x7168"]
TOKENS = [1, 4, 16]
SPARSITIES = [0.5, 0.6, 0.7, 0.8, 0.9]
CACHE_BYTES = 128 << 20  # more than any last-level cache that a guest gets
OURS = ("ours bf16", "ours fp16", "ours fp16, fp32 x")


def streamed(call: Callable, w, nbytes: int, copy: Callable) -> Callable[[], np.ndarray]:
    """call(w) with another copy of w each time, so that weights come from memory, not a cache."""
    turn = itertools.cycle([w, *(copy(w) for _ in range(CACHE_BYTES // nbytes))])
    return lambda: call(next(turn))


def jax_contender(f, w, x) -> Callable[[], np.ndarray]:
    compiled = jax.jit(f)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(w))
    copy = lambda w: jax.tree.map(jnp.copy, w)  # noqa: E731
    return streamed(lambda w: np.asarray(compiled(w, x)), w, nbytes, copy)


def contenders(dense: np.ndarray, x: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
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
    return out


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


def environment() -> dict[str, str]:
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    versions = {
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    for module in ("torch", "scipy"):
        if module in sys.modules:
            versions[module] = sys.modules[module].__version__
    return {
        "cpu": f"{model} x{os.cpu_count()} ({cpu_kernels()})",
        "versions": " ".join(f"{k} {v}" for k, v in versions.items()),
        "commit": git.stdout.strip() or "unknown",
    }


def run(args) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    cases = list(itertools.product(args.shapes, args.sparsity))
    for shape, sparsity in tqdm(cases, desc="bench", disable=None):
        m, k = map(int, shape.split("x"))
        dense = rng.standard_normal((m, k), dtype=np.float32)
        dense[rng.random((m, k), dtype=np.float32) < sparsity] = 0
        dense = dense.astype(ml_dtypes.bfloat16).astype(np.float32)
        for n in args.tokens:
            x = rng.standard_normal((n, k), dtype=np.float32)
            x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
            ref = x.astype(np.float64) @ dense.astype(np.float64).T
            scale = np.sqrt(k * (1 - sparsity))
            calls = contenders(dense, x)
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
                        **environment(),  # torch and scipy are imported by now
                    }
                )
    return rows


def summarise(rows: list[dict]) -> None:
    """One line a case: the best of ours, the best dense and sparse of the others, the ratios."""
    print(f"{'M x K':>12} {'N':>3} {'sparse':>6} | {'ours ms':>8} {'dense ms':>9} {'CSR ms':>8} | "
          f"{'vs dense':>8}  best dense")  # fmt: skip
    key = lambda r: (r["M"], r["K"], r["sparsity"], r["N"])  # noqa: E731
    for (m, k, sparsity, n), group in itertools.groupby(sorted(rows, key=key), key):
        t = {r["kernel"]: r["median_ms"] for r in group}
        ours = min(t[name] for name in OURS)
        dense = {name: v for name, v in t.items() if name not in OURS and "CSR" not in name}
        csr = min((v for name, v in t.items() if "CSR" in name), default=float("nan"))
        best = min(dense, key=dense.get)
        print(f"{m:>6}x{k:<5} {n:>3} {sparsity:>6.0%} | {ours:>8.3f} {dense[best]:>9.3f} "
              f"{csr:>8.3f} | {dense[best] / ours:>7.2f}x  {best}")  # fmt: skip


def plot(rows: list[dict], path: str) -> None:
    """Time against sparsity, a panel for each shape (columns) and token count (rows)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = sorted({(r["M"], r["K"]) for r in rows})
    tokens = sorted({r["N"] for r in rows})
    fig, axes = plt.subplots(
        len(tokens), len(shapes), figsize=(4 * len(shapes), 3 * len(tokens)), squeeze=False
    )
    for i, n in enumerate(tokens):
        for j, (m, k) in enumerate(shapes):
            ax = axes[i][j]
            for name in dict.fromkeys(r["kernel"] for r in rows):
                points = [
                    (100 * r["sparsity"], r["median_ms"])
                    for r in rows
                    if (r["M"], r["K"], r["N"], r["kernel"]) == (m, k, n, name)
                ]
                if points:
                    ax.plot(
                        *zip(*points, strict=True), "-o" if name in OURS else "--", ms=3, label=name
                    )
            ax.set_title(f"{m} x {k}, N = {n}", fontsize=9)
            ax.set_yscale("log")
            ax.set_xlabel("sparsity, %")
            ax.set_ylabel("ms")
    axes[0][0].legend(fontsize=6)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="MxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--sparsity", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each contender and case")
    parser.add_argument("--csv", help="write one row per case and contender")
    parser.add_argument("--plot", help="write a picture (PNG)")
    args = parser.parse_args()
    rows = run(args)
    summarise(rows)
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
