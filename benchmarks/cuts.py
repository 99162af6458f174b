"""Times every cut of W that plan.py knows, at every shape of OPT and Llama models.

    python benchmarks/cuts.py --library build/libflashllm_cuda_api.so --csv out.csv

By direct calls, as gpu_timing.py; where a cut beats the model's by 3% in the mean over sparsities
and tokens, it is printed as a line of plan.py's table. A user's own GPU: `jax_flashllm.tune`.
"""

import argparse
import csv
import math
import statistics

import gpu_timing
import shapes
import torch

from jax_flashllm import plan

TOKENS = (1, 8, 16, 64)
GAIN = 0.97


def times(lib, shape, format, sparsities, device):
    """{cut: [microseconds, ...]}, all cuts on the same weights."""
    found: dict[plan.Cut, list[float]] = {}
    for sparsity in sparsities:
        dense = gpu_timing.random_weight(*shape, sparsity, torch.float16)
        w = gpu_timing.Weight(dense, format, lib)
        count = gpu_timing.copies_for(w.nbytes)
        copies = [w] + [w.clone() for _ in range(count - 1)]
        for n in TOKENS:
            for cut in plan.cuts(format, shape[0], 1, shape[1], device):
                p = plan.choose(format, shape[0], 1, shape[1], n, 1, device, cut)
                us, _ = gpu_timing.time_ours(lib, copies, n, torch.float16, p)
                found.setdefault(cut, []).append(us)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True)
    parser.add_argument("--csv", required=True)
    parser.add_argument("--formats", nargs="+", default=["bitmap"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.8])
    args = parser.parse_args()
    lib, device = gpu_timing.Library(args.library), plan.device()
    with open(args.csv, "w", newline="") as f:
        writer = csv.writer(f)
        cases = [f"us at {s} N={n}" for s in args.sparsity for n in TOKENS]
        writer.writerow(["gpu", "format", "M", "K", "warps", "ctas", "score", *cases])
        for format in args.formats:
            for m, k in shapes.all_shapes():
                found = times(lib, (m, k), format, args.sparsity, device)
                base = next(iter(found.values()))
                score = {
                    cut: math.exp(
                        statistics.fmean(math.log(a / b) for a, b in zip(us, base, strict=True))
                    )
                    for cut, us in found.items()
                }
                for cut, us in found.items():
                    rest = (round(score[cut], 4), *(round(u, 2) for u in us))
                    writer.writerow([device.name, format, m, k, cut.warps, cut.ctas, *rest])
                f.flush()
                best = min(score, key=score.__getitem__)
                if score[best] < GAIN:
                    print(f'    ("{format}", {m}, {k}): Cut({best.warps}, {best.ctas}),  # '
                          f"{score[best]:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
