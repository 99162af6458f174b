"""Encoding of weights that lie on a GPU: GB/s of dense weights, memory, first calls.

    python benchmarks/bench_encode.py --csv out.csv

`warm` is a call of `jax_flashllm.encode` as a user makes it, the host's reading of the size
included, after others have compiled it and woken the GPU up; `others` the same with other
matrices, as sparse, the median of seven calls; `kernels` its programs alone, launched back to back;
`first` the first call with this shape, which compiles. `peak` is what the first case added to the
memory in use at its highest, over the result's bytes.
"""

import argparse
import csv
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

import jax_flashllm
from jax_flashllm.formats import on_gpu


@partial(jax.jit, static_argnums=(0, 1))
def random_bits(rows: int, columns: int, sparsity: float, seed: int) -> jax.Array:
    """Row by row, so that this needs less memory than what is measured."""

    def row(key):
        keep, value = jax.random.split(key)
        bits = jax.random.bits(value, (columns,), jnp.uint16) >> 1 | 1  # not 0
        return jnp.where(jax.random.uniform(keep, (columns,)) >= sparsity, bits, jnp.uint16(0))

    bits = lax.map(row, jax.random.split(jax.random.key(seed), rows), batch_size=256)
    return lax.bitcast_convert_type(bits, jnp.float16)


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
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    gpu = jax.devices("cuda")[0]
    memory = lambda: gpu.memory_stats() or {}  # noqa: E731
    rows = []
    for shape in args.shapes:
        for sparsity in args.sparsity:
            m, k = map(int, shape.split("x"))
            dense = random_bits(m, k, sparsity, 0).block_until_ready()
            for format in ("bitmap", "delta_csr"):
                before, highest = (
                    memory().get(name, 0) for name in ("bytes_in_use", "peak_bytes_in_use")
                )
                start = time.perf_counter()
                w = jax.block_until_ready(jax_flashllm.encode(dense, format))
                first = time.perf_counter() - start
                after = memory().get("peak_bytes_in_use", 0)
                peak = (after - before) / w.nbytes if after > highest else float("nan")
                again = partial(jax_flashllm.encode, dense, format)
                seconds(again, 100 if dense.size >> 26 else 300)  # an idle GPU has low clocks
                warm = seconds(again, 50)
                others = statistics.median(
                    seconds(partial(jax_flashllm.encode, other.block_until_ready(), format), 1)
                    for other in (random_bits(m, k, sparsity, seed) for seed in range(1, 8))
                )
                alone = seconds(kernels(dense, w), 5) / 4
                row = {
                    "gpu": gpu.device_kind,
                    "jax": jax.__version__,
                    "shape": shape,
                    "sparsity": sparsity,
                    "format": format,
                    "warm_GB_s": round(dense.nbytes / warm / 1e9, 1),
                    "others_GB_s": round(dense.nbytes / others / 1e9, 1),
                    "kernels_GB_s": round(dense.nbytes / alone / 1e9, 1),
                    "warm_ms": round(1e3 * warm, 3),
                    "others_ms": round(1e3 * others, 3),
                    "kernels_ms": round(1e3 * alone, 3),
                    "first_ms": round(1e3 * first, 1),
                    "peak_over_result": round(peak, 3),
                }
                rows.append(row)
                with args.csv.open("w", newline="") as file:  # each time: a run may be cut short
                    writer = csv.DictWriter(file, row)
                    writer.writeheader()
                    writer.writerows(rows)
                print(*(f"{k}={v}" for k, v in list(row.items())[2:]), flush=True)
                del w


if __name__ == "__main__":
    main()
