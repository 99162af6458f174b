"""Times our CUDA kernels and cuBLAS side by side, outside XLA; torch drives both.

Every time is the median over replays of a CUDA graph that walks distinct copies of the
weight, more than 256 MB in all, so that no copy is still in the L2 cache. Each result is
checked against an fp64 product first, into poisoned outputs. For work on the kernels: plans can
be varied, one product profiled; bench_spmm.py compares all shapes with everything.

    python benchmarks/gpu_timing.py --library build/libflashllm_cuda_api.so --csv out.csv
"""

import argparse
import csv
import ctypes
import functools
import itertools
import math
import os
import statistics

import torch

from jax_flashllm import plan as planning
from jax_flashllm.formats.bitmap import grid_of
from jax_flashllm.formats.delta_csr import grid_of as delta_grid_of

ROTATE_BYTES = 300 << 20
REPLAYS, MOST_MS = 12, 15  # fewer replays, but 4, where they take longer
SHAPES = ((28672, 7168), (9216, 36864), (7168, 7168), (21504, 7168), (7168, 28672))
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
FORMATS = ("bitmap", "delta_csr")


# ---- timing ----


@functools.cache
def timing_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one for all: cuBLAS keeps a workspace for each


def graph_time(calls) -> tuple[float, float]:
    """Median and spread (interquartile) of one call's microseconds, calls run in turn."""
    stream = timing_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
        stream.synchronize()
        # Not torch.cuda.graph: it hands torch's spare memory back each time, which is slow.
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
        graph.replay()
        times: list[float] = []
        while len(times) < 4 or (len(times) < REPLAYS and sum(times) * len(calls) < 1e3 * MOST_MS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    quarter = statistics.quantiles(times, n=4)
    return statistics.median(times), quarter[2] - quarter[0]


def copies_for(nbytes: int) -> int:
    return max(2, -(-ROTATE_BYTES // max(nbytes, 1)))


# ---- ours ----


class Library:
    """libflashllm_cuda_api.so."""

    def __init__(self, path: str):
        self.lib = ctypes.CDLL(path)
        p, i, q = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        types = [p, i, p, p, p, i, q, q, q, q]  # W
        types += [p, i, q, p, p, i]  # x, bias, y, activation
        types += [i, i, i, q, i, p, ctypes.c_size_t]  # plan
        self.lib.flashllm_spmm.argtypes = types
        self.lib.flashllm_read.argtypes = [p, p, ctypes.c_size_t, p]
        self.check(self.lib.flashllm_initialize())

    @staticmethod
    def check(code: int):
        if code:
            raise RuntimeError(f"CUDA error {code}")

    def read(self, data, out):
        stream = torch.cuda.current_stream().cuda_stream
        self.check(self.lib.flashllm_read(stream, data.data_ptr(), data.nbytes, out.data_ptr()))

    def encode(self, dense, format):
        """Index, offsets and values, as jax_flashllm.encode makes them."""
        p, i, q = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self.lib.flashllm_count.argtypes = [p, i, p, q, q, p, p]
        self.lib.flashllm_fill.argtypes = [p, i, p, q, q, q, q, p, p, p]
        m, k = dense.shape
        empty = lambda n, dtype: torch.empty(max(n, 8), device="cuda", dtype=dtype)  # noqa: E731
        where = torch.cuda.current_stream().cuda_stream, FORMATS.index(format)
        what = dense.data_ptr(), m, k
        if format == "bitmap":
            bands, tiles, blocks = grid_of(m, k)
            index = empty(bands * tiles * 32, torch.int32)
            offsets = torch.empty(bands * blocks + 1, device="cuda", dtype=torch.int32)
            self.check(self.lib.flashllm_count(*where, *what, index.data_ptr(), offsets.data_ptr()))
            values = empty(8 * int(offsets[-1]), torch.int16)
        else:
            items = m * delta_grid_of(k)[0]
            offsets = torch.empty(items + 2, device="cuda", dtype=torch.int32)
            self.check(self.lib.flashllm_count(*where, *what, None, offsets.data_ptr()))
            groups, bits = map(int, offsets[-2:])
            values = empty(128 * groups, torch.int16)
            index = empty(16 * items + 4 * bits * groups, torch.int32)
        sizes = values.numel(), index.numel()
        buffers = (t.data_ptr() for t in (index, offsets, values))
        self.check(self.lib.flashllm_fill(*where, *what, *sizes, *buffers))
        return index, offsets, values

    def decode(self, w, dense):
        p, i, q = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self.lib.flashllm_decode.argtypes = [p, i, p, p, p, q, q, q, q, p]
        where = torch.cuda.current_stream().cuda_stream, FORMATS.index(w.format)
        buffers = (t.data_ptr() for t in (w.index, w.offsets, w.values))
        sizes = *w.shape, w.values.numel(), w.index.numel()
        self.check(self.lib.flashllm_decode(*where, *buffers, *sizes, dense.data_ptr()))

    def spmm(self, w, x, y, plan, workspace, bias=None, activation=0):
        self.check(
            self.lib.flashllm_spmm(
                torch.cuda.current_stream().cuda_stream,
                0 if w.format == "bitmap" else 1,
                w.index.data_ptr(),
                w.offsets.data_ptr(),
                w.values.data_ptr(),
                TYPES[w.dtype],
                *w.shape,
                w.values.numel(),
                w.index.numel(),
                x.data_ptr(),
                TYPES[x.dtype],
                x.shape[0],
                None if bias is None else bias.data_ptr(),
                y.data_ptr(),
                activation,
                plan.ctas,
                plan.warps,
                plan.group,
                plan.chunk,
                plan.wide,
                workspace.data_ptr(),
                workspace.numel(),
            )
        )


class Weight:
    """A weight encoded on the GPU."""

    def __init__(self, dense: torch.Tensor, format: str, lib: Library):
        self.format, self.shape, self.dtype = format, tuple(dense.shape), dense.dtype
        self.index, self.offsets, self.values = lib.encode(dense, format)

    @property
    def nbytes(self):
        return sum(t.nbytes for t in (self.index, self.offsets, self.values))

    def clone(self):
        other = object.__new__(Weight)
        other.__dict__.update(
            {k: v.clone() if torch.is_tensor(v) else v for k, v in self.__dict__.items()}
        )
        return other


def random_weight(m, k, sparsity, dtype, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    dense = torch.randn(m, k, device="cuda", generator=g).to(dtype)
    keep = torch.rand(m, k, device="cuda", generator=g) >= sparsity
    return torch.where(keep, dense, torch.zeros_like(dense))  # a product would leave -0.0


def plan_for(w: Weight, n: int, token_dtype, warps: int = 16):
    gpu = torch.cuda.get_device_properties(0)
    dev = planning.Device(
        gpu.multi_processor_count,
        warps,
        gpu.shared_memory_per_block_optin,
        gpu.name,
        (gpu.major, gpu.minor) == (9, 0),
    )
    n_terms = 1 if token_dtype == w.dtype else 3 if token_dtype == torch.float32 else 2
    what = w.format, w.shape[0], 1, w.shape[1]
    fill = w.values.numel() / (w.shape[0] * w.shape[1])
    bound = planning.by_memory(w.format, n * n_terms, fill)
    return planning.choose(*what, n, n_terms, dev, planning.cut_for(*what, dev, bound))


def reference(x, dense) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T in float64, and the bound nnz 2^-23 |x| |W|^T on the error of its sums."""
    ref = x.double() @ dense.double().T
    reach = x.double().abs() @ dense.double().abs().T
    return ref, (dense != 0).sum(1).double() * 2**-23 * reach + 1e-30


def worst(y, ref, slack) -> float:
    """Largest error over the bound u |ref| + slack (house-style.md), NaN for what is unwritten."""
    u = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-23}[y.dtype]
    return ((y.double() - ref).abs() / (u * ref.abs() + slack)).max().item()


def product(lib, x, y, plan):
    """A call that multiplies x with a weight into y."""
    workspace = torch.full((max(plan.workspace, 16),), 255, device="cuda", dtype=torch.uint8)
    return lambda w: lib.spmm(w, x, y, plan, workspace)


def decoded(lib, x, y):
    """The same as plan.py has it for many tokens: W is decoded, and cuBLAS multiplies."""
    dense = torch.empty(y.shape[1], x.shape[1], device="cuda", dtype=x.dtype)

    def run(w):
        lib.decode(w, dense)
        torch.mm(x, dense.T, out=y)

    return run


def check(lib, w, dense, n, token_dtype, plan=None) -> float:
    """Largest error over the bound, NaN for anything unwritten."""
    m, k = w.shape
    x = torch.randn(n, k, device="cuda").to(token_dtype)
    y = torch.full((n, m), torch.nan, device="cuda", dtype=token_dtype)
    product(lib, x, y, plan or plan_for(w, n, token_dtype))(w)
    return worst(y, *reference(x, dense))


def time_ours(lib, copies, n, token_dtype, plan=None):
    w = copies[0]
    x = torch.randn(n, w.shape[1], device="cuda").to(token_dtype)
    y = torch.empty(n, w.shape[0], device="cuda", dtype=token_dtype)
    run = product(lib, x, y, plan or plan_for(w, n, token_dtype))
    return graph_time([lambda w=w: run(w) for w in copies])


# ---- the others ----


def read_bandwidth(lib) -> float:
    """Bytes a second of reading 2 GiB."""
    data = torch.randint(0, 127, (1 << 31,), dtype=torch.uint8, device="cuda")
    out = torch.empty(16, dtype=torch.uint8, device="cuda")
    us, _ = graph_time([lambda: lib.read(data, out)] * 4)
    return data.nbytes / us * 1e6


def time_cublas(m, k, tokens, dtype) -> dict[int, tuple[float, float]]:
    """For each N the best of four layouts of the dense product: time and spread."""
    count = copies_for(m * k * 2)
    best = {n: (math.inf, 0.0) for n in tokens}
    for w_rows in (True, False):
        ws = [torch.randn(m, k, device="cuda", dtype=dtype) for _ in range(count)]
        if not w_rows:
            ws = [w.T.contiguous().T for w in ws]
        for n in tokens:
            x = torch.randn(n, k, device="cuda", dtype=dtype)
            flat, tall = (torch.empty(s, device="cuda", dtype=dtype) for s in ((n, m), (m, n)))
            for calls in (
                [lambda w=w, x=x, y=flat: torch.mm(x, w.T, out=y) for w in ws],
                [lambda w=w, x=x, y=tall: torch.mm(w, x.T, out=y) for w in ws],
            ):
                best[n] = min(best[n], graph_time(calls))
        del ws
    return best


# ---- report ----


def parse_shapes(text):
    return [tuple(int(v) for v in s.split("x")) for s in text.split(",")]


def once(lib, args, tokens, dtype):
    for (m, k), sparsity, format, n in itertools.product(
        args.shapes, args.sparsity.split(","), args.formats.split(","), tokens
    ):
        dense = random_weight(m, k, float(sparsity), dtype)
        w = Weight(dense, format, lib)
        plan = plan_for(w, n, dtype, warps=int(args.warps.split(",")[0]))
        print(m, k, sparsity, format, n, check(lib, w, dense, n, dtype, plan), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True)
    parser.add_argument("--csv", default=os.path.join(os.environ.get("OUT", "."), "gpu.csv"))
    parser.add_argument("--shapes", type=parse_shapes, default=SHAPES)
    parser.add_argument("--sparsity", default="0.5,0.6,0.7,0.8,0.9")
    parser.add_argument("--tokens", default="1,8,16,32")
    parser.add_argument("--formats", default="bitmap")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--warps", default="16")
    parser.add_argument("--once", action="store_true", help="one product each, for a profiler")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    dtype = getattr(torch, args.dtype)
    lib = Library(args.library)
    tokens = [int(t) for t in args.tokens.split(",")]
    if args.once:
        return once(lib, args, tokens, dtype)
    bandwidth = read_bandwidth(lib)
    gpu = torch.cuda.get_device_name(0)
    print(f"{gpu}: reads at R = {bandwidth / 1e12:.3f} TB/s; torch {torch.__version__}")
    fields = "gpu m k sparsity format n warps us spread bits fraction_of_R cublas_us speedup error"
    with open(args.csv, "w", newline="") as f:
        writer = csv.DictWriter(f, fields.split())
        writer.writeheader()
        for m, k in args.shapes:
            dense_us = {n: us for n, (us, _) in time_cublas(m, k, tokens, dtype).items()}
            for sparsity, format in itertools.product(
                args.sparsity.split(","), args.formats.split(",")
            ):
                dense = random_weight(m, k, float(sparsity), dtype)
                w = Weight(dense, format, lib)
                errors = {n: check(lib, w, dense, n, dtype) for n in tokens}
                del dense
                copies = [w] + [w.clone() for _ in range(copies_for(w.nbytes) - 1)]
                for n, warps in itertools.product(tokens, args.warps.split(",")):
                    plan = plan_for(w, n, dtype, warps=int(warps))
                    us, spread = time_ours(lib, copies, n, dtype, plan)
                    row = {
                        "gpu": gpu,
                        "m": m,
                        "k": k,
                        "sparsity": sparsity,
                        "format": format,
                        "n": n,
                        "warps": plan.warps,
                        "us": round(us, 2),
                        "spread": round(spread, 2),
                        "bits": round(8 * w.nbytes / (m * k), 3),
                        "fraction_of_R": round(w.nbytes / (us * 1e-6) / bandwidth, 3),
                        "cublas_us": round(dense_us[n], 2),
                        "speedup": round(dense_us[n] / us, 3),
                        "error": round(errors[n], 4),
                    }
                    writer.writerow(row)
                    f.flush()
                    print(
                        f"{m}x{k} {sparsity} {format} N={n} W={plan.warps}: {us:.1f} us "
                        f"+-{spread:.1f}, {row['fraction_of_R']} R, {row['speedup']}x of cuBLAS "
                        f"{dense_us[n]:.1f}, error {errors[n]:.3f}",
                        flush=True,
                    )
                del copies, w


if __name__ == "__main__":
    main()
