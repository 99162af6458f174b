"""Encoding of weights that lie on a GPU: GB/s of dense weights, memory, first calls.

    python benchmarks/bench_encode.py --csv out.csv

`warm` is a call of `jax_flashllm.encode` as a user makes it, the host's reading of the size
included, and compiled before; `kernels` its programs alone, launched back to back; `first` the
first call with this shape and number of nonzeros, which compiles. `peak` is what the first case
added to the memory in use at its highest, over the result's bytes.
"""

import argparse
import csv
import statistics
import time
from functools import partial

import jax
import numpy as np

import jax_flashllm
from jax_flashllm.formats import on_gpu


def random_bits(shape, sparsity, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kept = rng.random(shape, np.float32) >= sparsity
    return np.where(kept, rng.integers(1, 1 << 15, shape, np.uint16), 0).view(np.float16)


def seconds(f, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def kernels(dense, w):
    """The programs of `encode` without the host between them, four times."""
    same = {"format": w.format, "grid": w.grid}
    sizes = {"capacity": w.values.shape[1], "index_capacity": w.buffers[0].shape[-1]}
    known = w.buffers if w.format == "bitmap" else (w.offsets,)
    step = max(1, dense.size >> 22)
    return lambda: [
        (on_gpu.count(dense, step=step, **same), on_gpu.fill(known, dense, **same, **sizes))
        for _ in range(4)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["28672x7168", "4096x4096"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.8])
    parser.add_argument("--csv", required=True)
    args = parser.parse_args()
    gpu = jax.devices("cuda")[0]
    memory = lambda: gpu.memory_stats() or {}  # noqa: E731
    rows = []
    for shape in args.shapes:
        for sparsity in args.sparsity:
            host = random_bits(tuple(map(int, shape.split("x"))), sparsity)
            dense = jax.device_put(host, gpu).block_until_ready()
            for format in ("bitmap", "tiled_csl"):
                before, highest = (
                    memory().get(k, 0) for k in ("bytes_in_use", "peak_bytes_in_use")
                )
                start = time.perf_counter()
                w = jax.block_until_ready(jax_flashllm.encode(dense, format))
                first = time.perf_counter() - start
                after = memory().get("peak_bytes_in_use", 0)
                peak = (after - before) / w.nbytes if after > highest else float("nan")
                warm = seconds(partial(jax_flashllm.encode, dense, format), 10)
                alone = seconds(kernels(dense, w), 5) / 4
                rows.append(
                    {
                        "gpu": gpu.device_kind,
                        "jax": jax.__version__,
                        "shape": shape,
                        "sparsity": sparsity,
                        "format": format,
                        "warm_GB_s": round(dense.nbytes / warm / 1e9, 1),
                        "kernels_GB_s": round(dense.nbytes / alone / 1e9, 1),
                        "warm_ms": round(1e3 * warm, 3),
                        "kernels_ms": round(1e3 * alone, 3),
                        "first_ms": round(1e3 * first, 1),
                        "peak_over_result": round(peak, 3),
                    }
                )
                print(*(f"{k}={v}" for k, v in list(rows[-1].items())[2:]), flush=True)
                del w
    with open(args.csv, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
