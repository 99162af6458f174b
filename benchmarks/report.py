"""What bench_spmm.py and `bench decode` measured on a GPU, as the tables of the docs.

    python benchmarks/report.py benchmarks/results/h100_spmm_2026-11-21.csv [more.csv]
    python benchmarks/report.py FILE.csv --plot out.png --shapes 28672x7168 4096x4096
    python benchmarks/report.py benchmarks/results/h100_decode_2026-11-22.csv

Products: geometric means over the shapes of OPT-30B, 66B and 175B, of each format and of the faster
of them, in brackets what is wanted; then the formats side by side; then every shape, by the faster
format, "d" where that is Delta-CSR. Decoding: a line a model, format and batch.
"""

import argparse
import csv
import math
import statistics
from collections.abc import Iterable

import shapes

MEAN = ("OPT-30B", "OPT-66B", "OPT-175B")
BITMAP, DELTA, FASTER = "ours bitmap", "ours delta_csr", "ours, the faster format"
# cuBLAS / ours that is wanted, by sparsity and N, and the fraction of R for N up to 16.
FEW = (1, 8, 16)
WANTED = {
    0.5: {**dict.fromkeys(FEW, 1.7), 32: 1.6, 64: 1.45, 128: 1.3},
    0.6: {**dict.fromkeys(FEW, 2.05), 32: 1.9, 64: 1.6, 128: 1.35},
    0.7: {**dict.fromkeys(FEW, 2.5), 32: 2.3, 64: 1.8, 128: 1.45},
    0.8: {**dict.fromkeys(FEW, 3.1), 32: 2.8, 64: 2.0, 128: 1.55},
    0.9: {**dict.fromkeys(FEW, 4.3), 32: 3.8, 64: 2.3, 128: 1.6},
}
WANTED_OF_R = {0.5: 0.9, 0.6: 0.9, 0.7: 0.85, 0.8: 0.78}
# D / step that is wanted with 1 and 8 rows.
WANTED_STEP = {
    ("opt-13b", "0.6"): 1.65,
    ("opt-30b", "0.6"): 1.65,
    ("opt-30b", "0.7"): 2.1,
    ("opt-66b", "0.7"): 2.1,
    ("opt-66b", "0.8"): 2.5,
    ("opt-175b", "0.8"): 2.5,
}
LEAST = 4096 * 4096  # weights; from here on no product should be slower than cuBLAS's


def read(paths: Iterable[str]) -> list[dict]:
    """Rows of CSV files, numbers as numbers; the last of a case counts."""
    rows: dict[tuple, dict] = {}
    for path in paths:
        with open(path) as f:
            for r in csv.DictReader(line for line in f if not line.startswith("#")):
                for name in ("M", "K", "N"):
                    r[name] = int(r[name])
                for name in ("sparsity", "median_ms", "roof_ms", "vs_cublas"):
                    r[name] = float(r[name])
                rows[r["M"], r["K"], r["N"], r["sparsity"], r["kernel"], r["dtype"]] = r
    return list(rows.values())


def faster(rows: Iterable[dict]) -> list[dict]:
    """Of each case the row of the faster format."""
    best: dict[tuple, dict] = {}
    for r in rows:
        case = r["M"], r["K"], r["N"], r["sparsity"], r["dtype"]
        if r["kernel"] in (BITMAP, DELTA):
            best[case] = min(best.get(case, r), r, key=lambda r: r["median_ms"])
    return list(best.values())


def means(rows: list[dict]) -> None:
    """cuBLAS / ours, a line a sparsity and a column an N; then the share of R; then who loses."""
    wanted = {s for model in MEAN for s in shapes.MODELS[model].values()}
    rows = [r for r in rows if "vs_cublas" in r]
    kernels = dict.fromkeys(r["kernel"] for r in rows if r["kernel"].startswith("ours "))
    parts = {kernel: [r for r in rows if r["kernel"] == kernel] for kernel in kernels}
    if BITMAP in parts and DELTA in parts:
        parts = {FASTER: faster(rows), **parts}
    for kernel, ours in parts.items():
        counted = [r for r in ours if (r["M"], r["K"]) in wanted]
        tokens = sorted({r["N"] for r in counted})
        if not counted:
            continue
        have = len({(r["M"], r["K"]) for r in counted})
        print(f"\n{kernel}, geometric means over {have} of the {len(wanted)} shapes of "
              f"{', '.join(MEAN)}: cuBLAS / ours; fraction of R")  # fmt: skip
        print("| | " + " | ".join(f"N = {n}" for n in tokens) + " |")
        print("|---" * (len(tokens) + 1) + "|")
        for sparsity in sorted({r["sparsity"] for r in counted}):
            cells = []
            for n in tokens:
                case = [r for r in counted if (r["N"], r["sparsity"]) == (n, sparsity)]
                if not case:
                    cells.append("")
                    continue
                speedup = statistics.geometric_mean(r["vs_cublas"] for r in case)
                of_roof = statistics.geometric_mean(r["roof_ms"] / r["median_ms"] for r in case)
                wanted_here = WANTED.get(sparsity, {}).get(n, 0.97 if n >= 256 else None)
                of_r = WANTED_OF_R.get(sparsity) if n in FEW else None
                cells.append(
                    _below(speedup, 1)
                    + (f" ({wanted_here})" if wanted_here else "")
                    + f"; {of_roof:.2f}" + (f" ({of_r})" if of_r else "")
                )  # fmt: skip
            print(f"| {sparsity:.0%} | " + " | ".join(cells) + " |")
        large = [r for r in ours if r["M"] * r["K"] >= LEAST and r["N"] <= 64]
        slower = sorted((r for r in large if r["vs_cublas"] < 1), key=lambda r: r["vs_cublas"])
        print(f"slower than cuBLAS: {len(slower)} of {len(large)} cases from 4096x4096 up, N <= 64")
        for n in sorted({r["N"] for r in slower}):
            here = [r for r in slower if r["N"] == n]
            worst = ", ".join(f"{r['M']}x{r['K']} {r['sparsity']:.0%} {r['vs_cublas']:.2f}"
                              for r in here[:4])  # fmt: skip
            print(f"  N = {n}: {len(here)}; {worst}")


def side_by_side(rows: list[dict]) -> None:
    """The bitmap's time over Delta-CSR's, a line a sparsity and a column an N: the geometric mean
    over the shapes of OPT-30B, 66B and 175B, then the least and the most of all large shapes."""
    times = {(r["M"], r["K"], r["N"], r["sparsity"], r["kernel"]): r["median_ms"] for r in rows}
    ratios = {
        (m, k, n, s): times[m, k, n, s, BITMAP] / ms
        for (m, k, n, s, kernel), ms in times.items()
        if kernel == DELTA and (m, k, n, s, BITMAP) in times and m * k >= LEAST
    }
    if not ratios:
        return
    wanted = {s for model in MEAN for s in shapes.MODELS[model].values()}
    tokens = sorted({n for _, _, n, _ in ratios})
    print("\n| bitmap / Delta-CSR | " + " | ".join(f"N = {n}" for n in tokens) + " |")
    print("|---" * (len(tokens) + 1) + "|")
    for sparsity in sorted({s for *_, s in ratios}):
        cells = []
        for n in tokens:
            here = {(m, k): v for (m, k, *of), v in ratios.items() if of == [n, sparsity]}
            mean = statistics.geometric_mean([v for s, v in here.items() if s in wanted] or [1])
            low, high = min(here.values(), default=1), max(here.values(), default=1)
            cells.append(f"{_below(mean, 1)}; {low:.2f} to {high:.2f}" if here else "")
        print(f"| {sparsity:.0%} | " + " | ".join(cells) + " |")


def _below(value: float, limit: float) -> str:
    return f"**{value:.2f}**" if value < limit else f"{value:.2f}"


def every_shape(rows: list[dict]) -> None:
    """A line a shape: cuBLAS / ours by sparsity and N; a table up to 64 tokens, one for more."""
    ours = faster(rows)
    for part in ([r for r in ours if r["N"] <= 64], [r for r in ours if r["N"] > 64]):
        if not part:
            continue
        tokens = sorted({r["N"] for r in part})
        kept = sorted({r["sparsity"] for r in part})
        print(f"\n| cuBLAS / ours, N = {', '.join(map(str, tokens))} | "
              + " | ".join(f"{s:.0%}" for s in kept) + " |")  # fmt: skip
        print("|---" * (len(kept) + 1) + "|")
        found = {(r["M"], r["K"], r["sparsity"], r["N"]): r for r in part}
        for m, k in sorted({(r["M"], r["K"]) for r in part}, key=lambda s: (s[0] * s[1], s)):
            cells = [" ".join(cell(found.get((m, k, s, n))) for n in tokens) for s in kept]
            print(f"| {m}x{k} | " + " | ".join(cells) + " |")


def cell(row: dict | None) -> str:
    """cuBLAS / ours, bold where ours is slower, and "d" where it is Delta-CSR."""
    if row is None:
        return "-"
    return _below(row["vs_cublas"], 1) + "d" * (row["kernel"] == DELTA)


def decoding(paths: Iterable[str]) -> None:
    """A table a GPU with a line a model, weights and batch: the last one measured."""
    rows: dict[tuple, dict[str, str]] = {}
    for path in paths:
        with open(path) as f:
            for r in csv.DictReader(f):
                r.setdefault("format", "bitmap")  # files of before there was a choice
                what = ("device", "config", "sparsity", "format", "batch", "context", "dtype",
                        "cache_dtype", "choice")  # fmt: skip
                rows[tuple(r[name] for name in what)] = r
    for device in dict.fromkeys(r["device"] for r in rows.values()):
        decoding_on(device, [r for r in rows.values() if r["device"] == device])


def decoding_on(device: str, rows: list[dict[str, str]]) -> None:
    print(f"\n{device}\n")
    print("| model | weights of the layers | batch | ms a step | D | D / step | wanted | of R "
          "| tokens/s | prompt tokens/s | in use |\n|" + "---|" * 11)  # fmt: skip
    order = {name: i for i, (name, _) in enumerate(WANTED_STEP)}
    kept = sorted(
        rows,
        key=lambda r: (
            order.get(r["config"], 9),
            r["sparsity"],
            r["choice"],
            r["cache_dtype"],
            r["format"],
            int(r["batch"]),
        ),
    )
    before = None
    for r in kept:
        model = r["config"].upper()
        weights = "dense" if r["sparsity"] == "dense" else f"{float(r['sparsity']):.0%} sparse"
        if r["format"] == "delta_csr":
            weights += ", Delta-CSR"
        if r["cache_dtype"] != r["dtype"]:
            weights += f", cache {r['cache_dtype']}"
        if r["choice"] != "greedy":
            weights += f", {r['choice']}"
        step, limit = float(r["step_ms"]), float(r["dense_limit_ms"])
        wanted = WANTED_STEP.get((r["config"], r["sparsity"])) if r["batch"] in ("1", "8") else None
        short = limit / step < (wanted or 1)
        cells = [
            "" if before and model == before[0] else model,
            "" if (model, weights) == before else weights,
            r["batch"],
            f"{step:.2f}",
            f"{limit:.2f}",
            f"**{limit / step:.2f}**" if short else f"{limit / step:.2f}",
            str(wanted or ""),
            f"{float(r['fraction_of_read']):.2f}",
            f"{float(r['tokens_s']):.0f}",
            f"{float(r['prefill_tokens_s']):.0f}",
            f"{float(r['in_use_bytes']) / 1e9:.1f} GB",
        ]
        print("| " + " | ".join(cells) + " |")
        before = model, weights
    for r in kept:
        if r["long_prompt"] not in ("", "None"):
            print(f"{r['config']} {r['sparsity']}: one prompt of {r['long_prompt']} tokens, "
                  f"{float(r['long_prompt_ms']):.1f} ms")  # fmt: skip


def plot(rows: list[dict], path: str) -> None:
    """Time against sparsity, a panel for each of four shapes (columns) and token count (rows).

    On a GPU with the roofline: the bytes that the best of ours reads, at the bandwidth measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((r["M"], r["K"]) for r in rows))[:4]
    tokens = sorted({r["N"] for r in rows})
    fig, axes = plt.subplots(
        len(tokens), len(shapes), figsize=(4 * len(shapes), 2.6 * len(tokens)), squeeze=False
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
                line = "-o" if name.startswith("ours") else "--"
                if points:
                    ax.plot(*zip(*points, strict=True), line, ms=3, label=name)
            roof: dict[float, float] = {}
            for r in rows:
                if (r["M"], r["K"], r["N"]) == (m, k, n) and r.get("roof_ms"):
                    at = 100 * r["sparsity"]
                    roof[at] = min(roof.get(at, math.inf), r["roof_ms"])
            if roof:
                ax.plot(*zip(*sorted(roof.items()), strict=True), "k:", label="roofline")
            ax.set_title(f"{m} x {k}, N = {n}", fontsize=9)
            low, high = ax.dataLim.intervaly
            if high > 20 * low:  # CPUs: some contenders are far behind
                ax.set_yscale("log")
            else:
                ax.set_ylim(0)
            ax.set_xlabel("sparsity, %")
            ax.set_ylabel("ms")
    axes[0][0].legend(fontsize=6)
    fig.tight_layout()
    fig.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", nargs="+")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--plot", help="write a picture (PNG)")
    parser.add_argument("--shapes", nargs="+", help="of the picture, MxK")
    args = parser.parse_args()
    with open(args.csv[0]) as f:
        if f.readline().startswith("device,"):  # of `bench decode`
            decoding(args.csv)
            return
    rows = [r for r in read(args.csv) if r["dtype"] == args.dtype]
    means(rows)
    side_by_side(rows)
    every_shape(rows)
    if args.plot:
        chosen = args.shapes or list(dict.fromkeys(f"{r['M']}x{r['K']}" for r in rows))
        plot([r for s in chosen for r in rows if f"{r['M']}x{r['K']}" == s], args.plot)


if __name__ == "__main__":
    main()
