"""Times what a new user meets: the first token of `jax-flashllm generate`, tokens/s, encoding.

    python benchmarks/bench_cli.py --csv out.csv

The command runs as a subprocess on a pseudo-terminal, once with an empty compilation cache and then
with the one that it left. The first token is there when the first character behind the prompt is.
"""

import argparse
import csv
import os
import pty
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from bench_spmm import environment
from tqdm import tqdm

import jax_flashllm

PROMPT = "Alice looked up at the window."
RUNS = 5


def generate(cache: str) -> tuple[float, float]:
    """Seconds from the command to the first token, and tokens/s behind it."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "jax_flashllm.models.cli",
        "generate",
        "--prompt",
        PROMPT,
    ]
    reader, terminal = pty.openpty()
    start, first, text = time.perf_counter(), 0.0, b""
    process = subprocess.Popen(
        [*command, "--stats"],
        stdout=terminal,
        stderr=subprocess.PIPE,
        env=os.environ | {"XDG_CACHE_HOME": cache},
    )
    os.close(terminal)
    try:
        while piece := os.read(reader, 1):
            text += piece
            if not first and len(text) > len(PROMPT):
                first = time.perf_counter() - start
    except OSError:  # how a pseudo-terminal ends
        pass
    os.close(reader)
    stats = process.stderr.read().decode()
    if process.wait() or not first:
        raise RuntimeError(f"{command} failed: {stats}")
    return first, float(re.search(r"then (\d+) tokens/s", stats)[1])


def encode_rate(format: str, sparsity: float) -> list[float]:
    """GB/s of dense float16, each of RUNS."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((8192, 4096), np.float32).astype(np.float16)
    dense[rng.random(dense.shape, np.float32) < sparsity] = 0
    rates = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        jax_flashllm.encode(dense, format)
        rates.append(dense.nbytes / 1e9 / (time.perf_counter() - start))
    return rates[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", help="write one row per figure")
    args = parser.parse_args()
    figures: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        figures["first token, empty compilation cache", "s"] = [generate(cache)[0]]
        warm = [generate(cache) for _ in tqdm(range(RUNS), desc="generate", disable=None)]
    figures["first token", "s"] = [first for first, _ in warm]
    figures["decode, demo, batch 1", "tokens/s"] = [rate for _, rate in warm]
    for format in ("bitmap", "delta_csr"):
        for sparsity in (0.5, 0.8):
            figures[f"encode, {format}, {sparsity:.0%}", "GB/s"] = encode_rate(format, sparsity)
    rows = [
        {
            "what": what,
            "unit": unit,
            "median": round(statistics.median(values), 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
            "runs": len(values),
            **environment(),
        }
        for (what, unit), values in figures.items()
    ]
    for row in rows:
        print(f"{row['what']:<40} {row['median']:>8} {row['unit']} ({row['min']} to {row['max']})")
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
