"""Times spmm against dense and sparse products of other libraries, same process, same data.

    python benchmarks/bench_spmm.py                      # the shapes of docs/kernels.md on a CPU
    python benchmarks/bench_spmm.py --shapes 4096x4096 --tokens 1 --sparsity 0.8
    python benchmarks/bench_spmm.py --csv out.csv --plot out.png --plugin mine.py
    python benchmarks/bench_spmm.py --device gpu --library build/libflashllm_cuda_api.so

On a CPU against XLA, torch and scipy (bench_cpu.py); on a GPU against cuBLAS, by direct calls and
through XLA, at every shape of OPT and Llama models (bench_gpu.py). Every result is checked against
float64 before it is timed. Needs `pip install '.[bench]'`; contenders whose library is missing are
left out, and said so. The library of the GPU's direct calls is `cmake --build build --target
flashllm_cuda_api`.

A plugin is a Python file with two functions; its name in the tables is the file's:

    def encode(dense): ...         # dense [M, K] -> a weight; called once for each copy
    def multiply(weight, x): ...   # x [N, K] -> y [N, M]

On a CPU arrays are NumPy's, float32 that bf16 holds exactly; y is anything NumPy can read. On a
GPU they are torch's, on the GPU, in --dtype; `multiply` returns the same y each time or a new one,
and launches on torch's current stream what a CUDA graph can hold: no synchronisation.
"""

import argparse
import csv
import functools
import importlib.util
import itertools
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import bench_cpu
import jax
import numpy as np
import report

from jax_flashllm.kernel import cpu_kernels


def load_plugin(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise SystemExit(f"--plugin {path}: no Python file")
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    for name in ("encode", "multiply"):
        if not callable(getattr(plugin, name, None)):
            raise SystemExit(f"--plugin {path}: has no function {name}; see bench_spmm.py --help")
    return plugin


@functools.cache
def environment(commit: str | None = None) -> dict[str, str]:
    """What a result depends on besides the code; versions of what is imported by now."""
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
    gpus = {}
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        gpus["gpu"] = " | ".join(found.strip().splitlines())
        versions["cuda"] = sys.modules["torch"].version.cuda
    return {
        **gpus,
        "cpu": f"{model} x{os.cpu_count()} ({cpu_kernels()})",
        "versions": " ".join(f"{k} {v}" for k, v in versions.items()),
        "commit": commit or git.stdout.strip() or "unknown",
    }


DENSE = ("XLA", "torch f32", "torch bf16", "cuBLAS")  # how names of dense products begin


def summarise(rows: list[dict]) -> None:
    """One line a case: the best of ours, the best dense product, their ratio, all others of ours
    and of other libraries."""
    print(f"{'M x K':>12} {'N':>5} {'sparse':>6} | {'ours ms':>8} {'dense ms':>9} | {'ratio':>6}")
    key = lambda r: (r["M"], r["K"], r["sparsity"], r["N"])  # noqa: E731
    for (m, k, sparsity, n), group in itertools.groupby(sorted(rows, key=key), key):
        t = {r["kernel"]: r["median_ms"] for r in group}
        if not any(name.startswith("ours") for name in t):
            continue  # they were wrong
        ours = min((name for name in t if name.startswith("ours")), key=t.__getitem__)
        dense = min((name for name in t if name.startswith(DENSE)), key=t.__getitem__)
        rest = [f"{k} {v:.4f}" for k, v in t.items() if k != ours and not k.startswith(DENSE)]
        print(f"{m:>6}x{k:<5} {n:>5} {sparsity:>6.0%} | {t[ours]:>8.4f} {t[dense]:>9.4f} | "
              f"{t[dense] / t[ours]:>5.2f}x  {ours}, {dense}; {', '.join(rest)}")  # fmt: skip


def write_csv(rows: list[dict], path: str, about: dict[str, str]) -> None:
    """One row per case and contender, under comments that say where they were measured."""
    with open(path, "w", newline="") as f:
        f.writelines(f"# {k}: {v}\n" for k, v in about.items())
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def shape(text: str) -> tuple[int, int]:
    m, k = text.split("x")
    return int(m), int(k)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--shapes", nargs="+", type=shape, help="MxK; on a GPU by default all")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--sparsity", nargs="+", type=float)
    parser.add_argument("--seconds", type=float, default=0.5, help="CPU: a contender and case")
    parser.add_argument("--csv", help="write one row per case and contender")
    parser.add_argument("--plot", help="write a picture (PNG)")
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", help="see above")
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--library", help="libflashllm_cuda_api.so")
    gpu.add_argument("--formats", nargs="+", default=["bitmap", "delta_csr"])
    gpu.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    gpu.add_argument("--xla", action="store_true", help="also both products inside XLA: compiles")
    gpu.add_argument("--budget", type=float, default=math.inf, help="begin no shape later, seconds")
    gpu.add_argument("--commit", help="what to write down where the tree has no git")
    args = parser.parse_args()
    plugins = {Path(p).stem: load_plugin(p) for p in args.plugin}
    if args.device == "gpu":
        import bench_gpu

        def save(rows):
            if args.csv and rows:
                write_csv(rows, args.csv, environment(args.commit))

        rows, wrong = bench_gpu.run(args, plugins, save)
    else:
        rows, wrong = bench_cpu.run(args, plugins), []
    summarise(rows)
    report.means(rows)
    if args.csv and rows:
        write_csv(rows, args.csv, environment(args.commit))
    if args.plot and rows:
        report.plot(rows, args.plot)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
