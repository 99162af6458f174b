"""The CUDA handlers by themselves, for compute-sanitizer: no XLA, each buffer its own allocation.

    compute-sanitizer --tool memcheck python tests/stress/sanitize_gpu.py
    compute-sanitizer --tool memcheck python tests/stress/sanitize_gpu.py --garbage 200
    compute-sanitizer --tool racecheck --num-cuda-barriers 1024 python tests/stress/sanitize_gpu.py
        --one-warp
    compute-sanitizer --tool synccheck python tests/stress/sanitize_gpu.py --many-tokens
    compute-sanitizer --tool racecheck python tests/stress/sanitize_gpu.py --delta-csr --quick

Handlers are called as XLA calls them, through a call frame, here made by ctypes; memory comes from
the CUDA driver. Products, chains of them, decoding, sampling and encoding of small weights and
attention over small caches reach every kernel: each group of tokens, x in terms, ragged K, split K,
each head size.
The last line names the handlers that were not called. --garbage changes offsets, masks, codes,
positions and lengths first: results are then any numbers, but no access may leave a buffer.
--one-warp: bitmaps alone, by CTAs with one warp that computes (docs/reliability.md says why).
--many-tokens: products of more than 128 tokens alone, bitmap_gemm.cu.
--delta-csr: that format alone, neither bitmaps nor attention.
--host runs the CPU's handlers, which checks this script where there is no GPU.
"""

import argparse
import contextlib
import ctypes as c
import dataclasses
import itertools
import math
import os
import pathlib
import sys
import time

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from reference import (
    FLOATS,
    FORMATS,
    HALVES,
    DenseStage,
    assert_chain,
    assert_product,
    bits,
    damage,
    sparse_matrix,
)

import jax_flashllm as jf
from jax_flashllm import _flashllm, attention, plan
from jax_flashllm import chain as chains
from jax_flashllm.formats import on_gpu

P, I64 = c.c_void_p, c.c_int64
DTYPES = {"uint8": 6, "uint32": 8, "float16": 10, "float32": 11, "bfloat16": 16, "int64": 5,
          "bool": 1, "int32": 4, "float8_e4m3fn": 20}  # fmt: skip
INITIALIZE, EXECUTE = 2, 3
CACHES = [np.dtype(t) for t in attention.DTYPES]


# ---- XLA's C interface (xla/ffi/api/c_api.h) ----


def struct(name, **fields):
    head = [("struct_size", c.c_size_t), ("extension", P)]
    return type(name, (c.Structure,), {"_fields_": head + list(fields.items())})


Buffer = struct("Buffer", dtype=c.c_int, data=P, rank=I64, dims=P)
List = struct("List", size=I64, types=P, items=P)
Attributes = struct("Attributes", size=I64, types=P, names=P, items=P)
Frame = struct(
    "Frame", api=P, ctx=P, stage=c.c_int, args=List, rets=List, attrs=Attributes, future=P
)
Span = type("Span", (c.Structure,), {"_fields_": [("ptr", c.c_char_p), ("len", c.c_size_t)]})
Scalar = type("Scalar", (c.Structure,), {"_fields_": [("dtype", c.c_int), ("value", P)]})
Array = type(
    "Array", (c.Structure,), {"_fields_": [("dtype", c.c_int), ("size", c.c_size_t), ("data", P)]}
)
Version = struct("Version", major=c.c_int, minor=c.c_int)
FUNCTIONS = [
    *("Error_Create", "Error_GetMessage", "Error_Destroy", "Handler_Register", "Stream_Get"),
    *("Type_Register", "ExecutionContext_Get", "State_Set", "State_Get", "DeviceMemory_Allocate"),
    *("DeviceMemory_Free", "ThreadPool_Schedule", "ThreadPool_NumThreads", "Future_Create"),
    *("Future_SetAvailable", "Future_SetError", "RunId_Get", "DeviceOrdinal_Get"),
]
Api = struct("Api", version=Version, internal=P, **dict.fromkeys(FUNCTIONS, P))
ErrorArgs = struct("ErrorArgs", message=c.c_char_p, code=c.c_int)
StreamArgs = struct("StreamArgs", ctx=P, stream=P)
ScheduleArgs = struct("ScheduleArgs", ctx=P, task=P, data=P)
ThreadsArgs = struct("ThreadsArgs", ctx=P, count=c.POINTER(I64))


class Refused(Exception):
    pass


class Runtime:
    """What a handler finds behind its call frame, and the memory of its buffers."""

    def __init__(self, host: bool):
        self.host, self.message = host, ""
        self.targets = _flashllm.cpu_targets() if host else _flashllm.cuda_targets()
        self.api = Api(struct_size=c.sizeof(Api))
        self.kept, self.called = [], set()
        for name, kind, function in [
            ("Error_Create", ErrorArgs, self._error),
            ("Stream_Get", StreamArgs, lambda args: setattr(args[0], "stream", None)),
            ("ThreadPool_Schedule", ScheduleArgs, self._schedule),
            ("ThreadPool_NumThreads", ThreadsArgs, self._threads),
        ]:
            callback = c.CFUNCTYPE(P, c.POINTER(kind))(function)
            self.kept.append(callback)
            setattr(self.api, name, c.cast(callback, P).value)
        if not host:
            self.cuda = c.CDLL("libcuda.so.1")
            context = P()
            self.check("cuInit", 0)
            self.check("cuDevicePrimaryCtxRetain", c.byref(context), 0)
            self.check("cuCtxSetCurrent", context)
            for stages in self.targets.values():
                self._call(stages["initialize"], INITIALIZE, [], [], {})

    def check(self, name, *args):
        if code := getattr(self.cuda, name)(*args):
            raise RuntimeError(f"{name}: CUDA error {code}")

    def _error(self, args):
        self.message = args[0].message.decode()
        return 1  # a token; only `_call` sees it

    def _schedule(self, args):
        c.CFUNCTYPE(None, P)(args[0].task)(args[0].data)

    def _threads(self, args):
        args[0].count[0] = 1

    def allocate(self, array: np.ndarray | None, bytes: int):
        """An address, after a copy of `array`; without one the memory is left as it is."""
        if self.host:
            memory = (c.c_char * max(bytes, 1))()
            if array is not None:
                c.memmove(memory, array.ctypes.data, bytes)
            return memory, c.addressof(memory)
        pointer = c.c_uint64()
        self.check("cuMemAlloc_v2", c.byref(pointer), c.c_size_t(max(bytes, 1)))
        if array is not None:
            self.check("cuMemcpyHtoD_v2", pointer, P(array.ctypes.data), c.c_size_t(bytes))
        return pointer, pointer.value

    def call(self, target: str, out, *operands, aliases=(), **attributes) -> list[np.ndarray]:
        """Results of the handler; raises Refused with its message.

        aliases: pairs (result, operand) of which one buffer is both.
        """
        self.called.add(target)
        outs = out if isinstance(out, tuple | list) else (out,)
        arrays = [np.ascontiguousarray(o) for o in operands]
        memory = [self.allocate(a, a.nbytes) for a in arrays]
        sizes = [math.prod(o.shape) * np.dtype(o.dtype).itemsize for o in outs]
        memory += [self.allocate(None, size) for size in sizes]
        handler = self.targets[target]
        handler = handler if self.host else handler["execute"]
        results = []
        try:
            at = [address for _, address in memory]
            for result, operand in aliases:
                at[len(arrays) + result] = at[operand]
            args = [(a.dtype, a.shape, p) for a, p in zip(arrays, at, strict=False)]
            rets = [(o.dtype, o.shape, p) for o, p in zip(outs, at[len(arrays) :], strict=True)]
            self._call(handler, EXECUTE, args, rets, attributes)
            if not self.host:
                self.check("cuCtxSynchronize")
            for o, size, address in zip(outs, sizes, at[len(arrays) :], strict=True):
                result = np.empty(o.shape, o.dtype)
                if self.host:
                    c.memmove(result.ctypes.data, address, size)
                elif result.dtype != np.uint8:  # but for the workspace
                    source = P(result.ctypes.data), c.c_uint64(address), c.c_size_t(size)
                    self.check("cuMemcpyDtoH_v2", *source)
                results.append(result)
        finally:
            if not self.host:
                for pointer, _ in memory:
                    self.check("cuMemFree_v2", pointer)
        return results

    def _call(self, capsule, stage, args, rets, attributes):
        pointer = c.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = P, [c.py_object, c.c_char_p]
        keep = []

        def array(kind, values):
            made = (kind * max(len(values), 1))(*values)
            keep.append(made)
            return c.addressof(made)

        def addresses(items):
            return array(P, [c.addressof(item) for item in items])

        def buffers(items):
            made = [
                Buffer(c.sizeof(Buffer), None, DTYPES[np.dtype(d).name], p, len(s), array(I64, s))
                for d, s, p in items
            ]
            keep.append(made)
            kinds = array(c.c_int, [1] * len(made))
            return List(c.sizeof(List), None, len(made), kinds, addresses(made))

        names = sorted(attributes)
        spans = [Span(n.encode(), len(n)) for n in names]
        arrays = [np.array(attributes[n], order="C") for n in names]
        values = [
            Array(DTYPES[a.dtype.name], a.size, a.ctypes.data)
            if a.ndim
            else Scalar(DTYPES[a.dtype.name], a.ctypes.data)
            for a in arrays
        ]
        keep += [spans, arrays, values]
        kinds = array(c.c_int, [1 if a.ndim else 3 for a in arrays])
        attrs = Attributes(
            c.sizeof(Attributes), None, len(names), kinds, addresses(spans), addresses(values)
        )
        size = Frame.attrs.offset + c.sizeof(Attributes)
        api = c.addressof(self.api)
        frame = Frame(size, None, api, None, stage, buffers(args), buffers(rets), attrs)
        if c.CFUNCTYPE(P, P)(pointer(capsule, None))(c.addressof(frame)):
            raise Refused(self.message)


# ---- cases ----


def spmm(run: Runtime, w, x, bias, activation):
    code = {None: 0, "relu": 1, "gelu": 2}[activation]
    bias = np.zeros(0, np.float32) if bias is None else bias
    operands = [*map(np.asarray, w.buffers), np.asarray(w.values), x, bias]

    def call(op, format, out, *operands, **attributes):
        results = run.call(f"flashllm_{op}_{format}_v1", out, *operands, **attributes)
        return results if isinstance(out, tuple) else results[0]

    if run.host:
        out = jax.ShapeDtypeStruct((*x.shape[:-1], w.shards * w.shard_rows), x.dtype)
        m, k = w.shape
        return call("spmm", w.format, out, *operands, m=m, k=k, activation=code)[:, :m]
    y = plan.spmm(call, *operands, format=w.format, shape=w.shape, activation=activation)
    return np.asarray(y)[:, : w.shape[0]]


def chain(run: Runtime, x, h, stages):
    """h and x after the stages, and caches."""

    def call(out, *operands, aliases, **attributes):
        pairs = [(result, operand) for operand, result in aliases.items()]
        operands = map(np.asarray, operands)
        return run.call(chains._TARGET, out, *operands, aliases=pairs, **attributes)

    chains._call = call
    stages = [s if isinstance(s, chains.Attend) else chains.Stage(*s) for s in stages]
    leaves, treedef = jax.tree.flatten(stages)
    return chains._cuda(x, h, *leaves, treedef=treedef, epsilon=1e-5)


def row(format, dtype, H, F, seed):
    """Of a layer out_proj, fc1, fc2 and qkv_proj: dense, and encoded."""
    rng = np.random.default_rng(seed)
    stages, coded = [], []
    for i, (m, k) in enumerate([(H, H), (F, H), (H, F), (3 * H + seed % 5, H)]):
        formats = format, FORMATS[i % len(FORMATS)]
        dense, w = weight((m, k), dtype, (0.3, 0.9, 0.02)[(seed + i) % 3], formats[seed % 2], 1, i)
        add, activation = i in (0, 2), (None, "relu", None, "gelu")[i]
        bias, scale, shift = (rng.standard_normal(n, np.float32) for n in (m, H, H))
        bias, scale, shift = bias.astype(dtype), scale.astype(dtype), shift.astype(dtype)
        rest = bias if i else None, activation, add, scale if i == 2 else None
        stages.append(DenseStage(dense, *rest, shift if add else None))
        coded.append((w, *stages[-1][1:]))
    return stages, coded


def decode(run: Runtime, w):
    m, k = w.shape
    out = jax.ShapeDtypeStruct((w.shards * w.shard_rows, k), w.dtype)
    operands = map(np.asarray, (*w.buffers, w.values))
    return run.call(f"flashllm_decode_{w.format}_v1", out, *operands, m=m, k=k)[0]


def sample(run: Runtime, w, dense):
    m, k = w.shape
    out = jax.ShapeDtypeStruct(w.values.shape, w.dtype)
    operands = *map(np.asarray, w.buffers), dense
    return run.call(f"flashllm_sample_{w.format}_v1", out, *operands, m=m, k=k)[0]


def encode(run: Runtime, dense, w, damaged=None) -> list[np.ndarray]:
    """The buffers of w as the GPU encodes `dense`; `damaged` is taken for what was counted."""
    on_gpu._call = lambda target, out, *operands, grid: run.call(
        f"flashllm_{target}_v1", out, *operands, row_blocks=grid[0], column_blocks=grid[1]
    )
    how = {"format": w.format, "grid": (w.row_shards, w.column_shards)}
    known, *_ = on_gpu.count.__wrapped__(jnp.asarray(dense), step=1, **how)
    sizes = {"capacity": w.values.shape[1], "index_capacity": w.buffers[0].shape[-1]}
    known = known if damaged is None else damaged
    rest = on_gpu.fill.__wrapped__(known, jnp.asarray(dense), **sizes, **how)
    return [*known, *rest]


def attend(run: Runtime, qkv, keys, values, mask, length) -> list[np.ndarray]:
    """A token's attention, and the cache after it."""
    y = np.empty((qkv.shape[0], qkv.shape[2] * qkv.shape[3]), qkv.dtype)
    operands = qkv, keys, values, mask, np.int32(length)
    return run.call(attention._TARGET, (y, keys, values), *operands, aliases=[(1, 1), (2, 2)])


def cache(rng, token, cached, d, slots, rows=2):
    """Operands of `attend`: 3 heads a row."""
    qkv = rng.standard_normal((rows, 3, 3, d), np.float32).astype(token)
    shape = 3 * rows, slots, d
    keys, values = (rng.standard_normal(shape, np.float32).astype(cached) for _ in range(2))
    length = int(rng.integers(slots))
    slot = np.arange(slots)
    mask = (slot >= rng.integers(0, length + 1, (rows, 1))) & (slot <= length)
    return qkv, keys, values, mask, length


def weight(shape, dtype, density, format, shards, seed):
    dense = sparse_matrix(shape, dtype, density, seed)
    return dense, jax.tree.map(np.asarray, jf.encode(dense, format, shards))


def valid(run: Runtime, quick: bool) -> int:
    """Every kernel on what `encode` writes."""
    count, shapes = 0, [(40, 136), (300, 1088), (128, 512)]
    for format, dtype, token in itertools.product(FORMATS, HALVES, FLOATS):
        # One to 64 tokens a group, several groups; K ragged and not; units split and not.
        for i, n in enumerate((3, 33) if quick else (1, 12, 20, 40, 130)):
            shape = shapes[(count + i) % len(shapes)]
            dense, w = weight(shape, dtype, [0.3, 0.9, 0.02][i % 3], format, 1 + i % 2, count)
            rng = np.random.default_rng(count)
            x = rng.standard_normal((n, shape[1]), np.float32).astype(token)
            bias = rng.standard_normal(shape[0], np.float32).astype(token) if i % 2 else None
            rows = w.shards * w.shard_rows
            padded = None if bias is None else np.pad(bias, (0, rows - shape[0]))
            activation = [None, "relu", "gelu"][i % 3]
            assert_product(spmm(run, w, x, padded, activation), x, dense, bias, activation)
            count += 1
        decoded = decode(run, w)
        np.testing.assert_array_equal(bits(decoded[: shape[0]]), bits(dense))
        np.testing.assert_array_equal(bits(sample(run, w, decoded)), bits(w.values))
        if not run.host:
            index, offsets = w.buffers
            expected = [index, offsets] if format == "bitmap" else [offsets, index]
            for got, want in zip(encode(run, dense, w), [*expected, w.values], strict=True):
                np.testing.assert_array_equal(bits(got), bits(want))
        count += 4
    count += not_finite(run)
    if run.host:
        return count
    count += long_strips(run, quick)
    if "bitmap" in FORMATS:
        count += many_tokens(run, quick)
    # 2048 tokens, for which W is decoded and XLA multiplies.
    for format in FORMATS:
        dense, w = weight((40, 136), np.float16, 0.3, format, 1, 0)
        x = np.random.default_rng(0).standard_normal((2048, 136), np.float32).astype(np.float16)
        assert_product(spmm(run, w, x, None, None), x, dense, None, None)
        count += 1
    for i, (format, dtype) in enumerate(itertools.product(FORMATS, HALVES)):
        for n in (1, 20) if quick else (1, 12, 20, 32):
            H, F = [(64, 192), (320, 1088), (1024, 256)][(count + i) % 3]
            stages, coded = row(format, dtype, H, F, count)
            rng = np.random.default_rng(count)
            x, h = (rng.standard_normal((n, H), np.float32).astype(dtype) for _ in range(2))
            results = [chain(run, x, h, coded[: j + 1]) for j in range(len(stages))]
            assert_chain(results, x, h, stages)
            count += 1
    return count + attentions(run, quick) if "bitmap" in FORMATS else count


def attentions(run: Runtime, quick: bool) -> int:
    """Alone and as a stage of a chain."""
    count = 0
    # Attention between two products: as it is alone.
    for i, (cached, n) in enumerate(itertools.product(CACHES, (1, 8) if quick else (1, 8, 32))):
        rng, d = np.random.default_rng(i), (64, 128)[i % 2]
        _, keys, values, mask, length = cache(rng, np.float16, cached, d, (5, 130, 300)[i % 3], n)
        at = chains.Attend(keys, values, mask, np.int32(length))
        qkv, out = (
            (weight((m, k), np.float16, 0.3, "bitmap", 1, i)[1], None, None, add)
            for m, k, add in ((3 * at.width, 64, False), (64, at.width, True))
        )
        x = rng.standard_normal((n, 64), np.float32).astype(np.float16)
        got = chain(run, x, x, [qkv, at, out])
        _, q = chain(run, x, x, [qkv])
        y, *held = attend(run, np.asarray(q).reshape(n, 3, -1, d), keys, values, mask, length)
        for a, b in zip(got, (*chain(run, y, x, [out]), *held), strict=True):
            np.testing.assert_array_equal(
                np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)
            )
        count += 1
    # One lane to 32 a slot, some of them past the head's end; one round of slots and several.
    for i, (cached, d) in enumerate(itertools.product(CACHES, (16, 32, 48, 64, 80, 128, 256))):
        if d * cached.itemsize > 512 or (quick and i % 3):
            continue
        rng = np.random.default_rng(i)
        operands = cache(rng, FLOATS[i % 3], cached, d, (5, 130, 700)[i % 3])
        got, want = attend(run, *operands), attention.decode_xla(*operands)
        for g, e, tolerance in zip(got, want, (2.0**-6, 0, 0), strict=True):
            g, e = (np.asarray(a, np.float32) for a in (g, e))
            np.testing.assert_allclose(g, e, rtol=tolerance, atol=tolerance)
        count += 1
    return count


def not_finite(run: Runtime) -> int:
    """Numbers of x that are not finite meet weights that are not stored, too."""
    count = 0
    for i, (format, dtype, n) in enumerate(itertools.product(FORMATS, HALVES, (1, 3, 12))):
        dense, w = weight((40, 1136), dtype, (0.3, 0.02)[i % 2], format, 1, i)
        x = np.random.default_rng(i).standard_normal((n, 1136), np.float32).astype(dtype)
        x[n // 2, 300] = (np.inf, np.nan)[i % 2]
        with np.errstate(invalid="ignore"):
            want = x.astype(np.float64) @ dense.T.astype(np.float64)
        y = spmm(run, w, x, None, None)
        np.testing.assert_array_equal(np.isnan(np.asarray(y, np.float32)), np.isnan(want))
        count += 1
    return count


def long_strips(run: Runtime, quick: bool, cut: plan.Cut | None = None) -> int:
    """Products by few CTAs, where every ring comes round, some often."""
    device, count = plan.device(), 0
    plan.device = lambda: dataclasses.replace(device, cores=2)
    for i, (format, n) in enumerate(itertools.product(FORMATS, (3, 12, 20, 40, 100, 200))):
        if (quick and i % 2) or (cut and (n > plan.MAX_GROUP or format != "bitmap")):
            continue
        dtype = HALVES[i % 2]
        token = FLOATS[0] if n == 20 else dtype  # in terms: 64 tokens a group
        shape, density, shards = [((200, 4160), 0.3, 1), ((700, 1100), 0.9, 2)][i // 2 % 2]
        dense, w = weight(shape, dtype, density, format, shards, i)
        rng, activation = np.random.default_rng(i), (None, "relu", "gelu")[i % 3]
        x = rng.standard_normal((n, shape[1]), np.float32).astype(token)
        bias = rng.standard_normal(shape[0], np.float32).astype(token) if i % 2 else None
        padded = None if bias is None else np.pad(bias, (0, w.shards * w.shard_rows - shape[0]))
        with plan.forced(cut) if cut else contextlib.nullcontext():
            y = spmm(run, w, x, padded, activation)
        assert_product(y, x, dense, bias, activation)
        count += 1
    plan.device = lambda: device
    return count


def many_tokens(run: Runtime, quick: bool) -> int:
    """Products by bitmap_gemm.cu: K and M ragged and not, groups full and not, strips shared."""
    device, cases = plan.device(), 0
    for i, ((m, k), n, density, shards, cores) in enumerate(
        [
            ((200, 4160), 200, 0.3, 1, 6),  # two strips by three clusters
            ((700, 1100), 300, 0.9, 2, 2),  # K of no tensor map; two groups by one cluster
            ((40, 136), 129, 0.3, 1, 132),
            ((1111, 520), 257, 0.02, 1, 132),
            ((256, 8192), 512, 0.05, 1, 132),  # a unit a cluster
            ((64, 64), 130, 0.0, 1, 132),
        ]
    ):
        if quick and i != 2:
            continue
        plan.device = lambda cores=cores: dataclasses.replace(device, cores=cores)
        dtype, activation = HALVES[i % 2], (None, "relu", "gelu")[i % 3]
        dense, w = weight((m, k), dtype, density, "bitmap", shards, i)
        rng = np.random.default_rng(i)
        x = rng.standard_normal((n, k), np.float32).astype(dtype)
        bias = rng.standard_normal(m, np.float32).astype(dtype) if i % 3 else None
        padded = None if bias is None else np.pad(bias, (0, w.shards * w.shard_rows - m))
        y = spmm(run, w, x, padded, activation)
        assert_product(y, x, dense, bias, activation)
        cases += 1
    plan.device = lambda: device
    return cases


def garbage(run: Runtime, count: int, seed: int) -> int:
    """Returns how many handler calls were refused."""
    refused = 0
    for i in range(count):
        rng = np.random.default_rng(seed + i)
        shape = int(rng.integers(1, 300)), int(rng.integers(1, 1100))
        shards = int(rng.integers(1, min(shape[0], 3) + 1))
        if square := i % 3 == 0:
            shape, shards = (shape[0] // 64 * 64 + 64,) * 2, 1
        format, dtype = FORMATS[i % len(FORMATS)], HALVES[i // 2 % 2]
        dense, w = weight(shape, dtype, rng.choice([0.02, 0.3, 0.9]), format, shards, seed + i)
        index, offsets = (np.array(b) for b in w.buffers)
        kind = rng.integers(4)
        for _ in range(rng.integers(1, 3)):
            if kind != 0:
                damage(rng, index)
            if kind != 1:
                damage(rng, offsets)
        values = np.asarray(w.values)
        if rng.random() < 0.2:  # fewer than the offsets say
            unit = 8 if format == "bitmap" else 128
            values = values[:, : max(unit, values.shape[1] // (2 * unit) * unit)]
        name = "masks" if format == "bitmap" else "index"
        w = type(w)(offsets=offsets, values=values, shape=shape, grid=w.grid, **{name: index})
        n, token = int(rng.choice([1, 8, 12, 20, 40, 70, 150])), FLOATS[i % 3]
        x = rng.standard_normal((n, shape[1]), np.float32).astype(token)
        if i % 4 == 0:
            x[-1, shape[1] // 2] = np.inf  # rows are walked another way then
        rows = np.resize(dense, (w.shards * w.shard_rows, shape[1]))
        calls = [(spmm, w, x, None, None), (decode, w), (sample, w, rows)]
        if not run.host:
            known = [index, offsets] if format == "bitmap" else [offsets]
            calls.append((encode, dense, w, known))
            cached = CACHES[i % len(CACHES)]
            operands = [*cache(rng, token, cached, int(rng.integers(1, 17)) * 16, n)]
            operands[3] = rng.integers(0, 256, operands[3].shape, np.uint8).view(bool)
            operands[4] = rng.integers(-(2**31), 2**31)
            calls.append((attend, *operands))
            if square and n <= 32:
                h = rng.standard_normal((n, shape[0]), np.float32).astype(dtype)
                stages = [(w, None, None, True), (w, None, "relu"), (w, None, None, True)]
                calls.append((chain, x.astype(dtype), h, stages))
        for call, *args in calls:
            try:
                call(run, *args)
            except Refused:
                refused += 1
    return refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--garbage", type=int, default=0, help="damaged weights instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer numbers of tokens")
    parser.add_argument("--one-warp", action="store_true", help="for racecheck")
    parser.add_argument("--many-tokens", action="store_true", help="more than 128, alone")
    parser.add_argument("--delta-csr", action="store_true", help="that format alone")
    parser.add_argument("--host", action="store_true")
    options = parser.parse_args()
    if options.delta_csr:
        FORMATS[:] = ["delta_csr"]
    run, start = Runtime(options.host), time.monotonic()
    if options.one_warp:
        done = f"{long_strips(run, options.quick, plan.Cut(1, 2))} products by one warp, all right"
    elif options.many_tokens:
        done = f"{many_tokens(run, options.quick)} products of many tokens, all right"
    elif options.garbage:
        refused = garbage(run, options.garbage, options.seed)
        done = f"{options.garbage} damaged weights, {refused} calls refused"
    else:
        done = f"{valid(run, options.quick)} calls on what encode wrote, all right"
    missing = ", ".join(sorted(run.targets.keys() - run.called)) or "none"
    took = f"{time.monotonic() - start:.1f} s"
    print(f"sanitize_gpu: {done}, {took}; handlers not called: {missing}", flush=True)


if __name__ == "__main__":
    assert ml_dtypes  # bfloat16's dtype has its name from here
    main()
