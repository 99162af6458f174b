"""How a product runs on a GPU: the cut of the work, as static attributes of the custom call.

Chosen from shapes, the room for W's values and the device, which are part of the jit key, so that
equal inputs give equal bits. csrc/cuda/spmm.h explains strips and units. What `tune` kept and the
variable below are read when a program is lowered: set it before the first product.

For up to 64 tokens there are two cuts of a bitmap that is not very sparse: one for few tokens,
where memory is the limit (`by_memory`), and one for more. Sums of another cut are rounded in
another order, so a token's last bit depends on which of them its batch takes. In an environment
with JAX_FLASHLLM_BATCH_INVARIANT=1 all take the second: a token's result is the same in any batch
of up to 64 then. Delta-CSR's sums have one order, whatever the cut: a token's result is the same in
any batch of fewer than DELTA_DENSE_TOKENS.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_flashllm.formats import delta_csr

_DEFAULT_CORES = 132  # H100: for lowering where there is no GPU
MAX_GROUP = 64
CHAIN_TOKENS = 32  # from 33 on products with wgmma, which chains lack, gain more
# From so many tokens in W's dtype on, decoding it once costs less (docs/kernels.md) than eight
# passes over W of 64 tokens, or five of 256 with wgmma.
DENSE_TOKENS, WIDE_DENSE_TOKENS = 512, 1025
# A pass of Delta-CSR is for so many tokens, by warps a CTA at most (csrc/cuda/delta_csr_spmm.cu),
# and has x of a block of columns in shared memory, with a margin: so many bytes a column.
_PASSES = {1: (32, 4), 2: (32, 4), 4: (32, 8), 8: (20, 16)}
_MARGIN_COLS, _CONTROL_BYTES = 1040, 128
# From so many tokens on, passes of 8, decoding W once costs less. On an H100 at 80% zeros both take
# 345 us with 40 tokens at 28672x7168; at 60% it does from 24 to 26 on, at 90% from 56 to 72.
DELTA_DENSE_TOKENS = 41
# With x in terms every sum passes through the workspace; this bounds it.
_TERM_TOKENS = 512
# The copy of x that the wide kernel reads: this many tokens of it at a time.
_WIDE_TOKENS = 4096
_WIDE_WARPS = 12  # most, for 128 tokens
# Where memory is a bitmap's limit: from so much of W stored on and up to so many tokens. Of the
# warps that a CTA may have these parts decode fast enough; the fewer, the less all of them have to
# fetch before they start.
_BY_MEMORY = ((0.45, 16, (1 / 2, 1 / 4)), (0.35, 8, (3 / 4, 1 / 2)))


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU."""

    cores: int  # streaming multiprocessors
    warps: int  # warps a CTA whose rings fit into shared memory: a bitmap's
    shared: int = 227 << 10  # bytes of shared memory, of a CTA at most
    name: str = ""  # model, for what `tune` kept; empty where there is no GPU
    wgmma: bool = False  # Hopper's own instructions, for more than 16 tokens


@dataclasses.dataclass(frozen=True)
class Cut:
    """How W is shared out for up to 64 tokens; see `Plan`."""

    warps: int
    ctas: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Attributes of the custom call, and the bytes of its workspace."""

    ctas: int  # CTAs a group of tokens
    warps: int  # of a CTA
    group: int  # tokens a pass over W
    chunk: int  # tokens a round of launches
    wide: int  # 1: wgmma (csrc/cuda/bitmap_wide.cu; a group of 256: bitmap_gemm.cu)
    workspace: int

    def attributes(self) -> dict[str, int]:
        fields = ("ctas", "warps", "group", "chunk", "wide")
        return {name: getattr(self, name) for name in fields}


@functools.cache
def device() -> Device:
    """The first CUDA device, or an H100 where there is none."""
    try:
        gpu = jax.devices("cuda")[0]
    except RuntimeError:
        return Device(_DEFAULT_CORES, 16, wgmma=True)
    capability = str(getattr(gpu, "compute_capability", "9.0"))
    cores = int(getattr(gpu, "core_count", 0)) or _DEFAULT_CORES
    if capability in ("9.0", "10.0", "10.3"):  # 227 KB of shared memory
        return Device(cores, 16, 227 << 10, gpu.device_kind, capability == "9.0")
    if capability == "8.0":
        return Device(cores, 12, 163 << 10, gpu.device_kind)
    return Device(cores, 6, 99 << 10, gpu.device_kind)  # on 8.6, 8.9 and 12.x


def terms(weight_dtype, token_dtype) -> int:
    """Terms of W's dtype that hold an x of another dtype (csrc/cuda/spmm.h)."""
    if weight_dtype == token_dtype:
        return 1
    return 3 if token_dtype == np.float32 else 2


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _align(n: int) -> int:
    return _ceil(n, 256) * 256


def _units(rows: int, shards: int, k: int, warps: int) -> tuple[int, int]:
    """A bitmap's strips of a CTA's warps, and units in all (csrc/cuda/spmm.h)."""
    strips = _ceil(shards * _ceil(rows, 16), warps)
    return strips, strips * _ceil(k, 256)


def by_memory(format: str, tokens: int, fill: float) -> int:
    """The case of _BY_MEMORY, from 1 on, or 0. fill: the part of W that is stored."""
    if format != "bitmap" or os.environ.get("JAX_FLASHLLM_BATCH_INVARIANT", "") not in ("", "0"):
        return 0
    cases = enumerate(_BY_MEMORY, 1)
    return next((i for i, (least, most, _) in cases if fill > least and tokens <= most), 0)


def model(format: str, rows: int, shards: int, k: int, dev: Device, by_memory: int = 0) -> Cut:
    """The cut of a shape that nobody measured."""
    if format == "delta_csr":
        return _delta_cut(rows, shards, k, None, dev.cores)
    # As measured on an H100 (docs/every-shape.md): a unit takes 4 + warps, and the start of a
    # CTA 2 a warp, whose first loads all others wait for.
    parts = _BY_MEMORY[by_memory - 1][2] if by_memory else (1, 1 / 2, 1 / 4)
    units = {w: _units(rows, shards, k, w)[1] for w in (math.ceil(dev.warps * p) for p in parts)}
    warps = min(units, key=lambda w: _ceil(units[w], dev.cores) * (4 + w) + 2 * w)
    return Cut(warps, min(units[warps], dev.cores))


def _delta_cut(rows: int, shards: int, k: int, warps: int | None, ctas: int) -> Cut:
    """As many CTAs for each block of columns, but not more than it has rows.

    warps: None for the fewest that have no more rows each than 32 would; 24 at least, for x.
    """
    blocks, _ = delta_csr.grid_of(k)
    each = max(1, min(ctas // blocks, shards * rows))
    if warps is None:
        deepest = _ceil(shards * rows, each * 32)
        warps = max(24, _ceil(shards * rows, each * deepest))
    return Cut(warps, blocks * each)


def cuts(format: str, rows: int, shards: int, k: int, dev: Device, by_memory: int = 0) -> list[Cut]:
    """What `tune` tries: the model's choice first, then others."""
    found = [model(format, rows, shards, k, dev, by_memory)]
    if format == "delta_csr":
        others = (32, 1), (24, 1), (16, 1), (16, 2), (8, 4)  # warps, CTAs a multiprocessor
        found += [_delta_cut(rows, shards, k, w, each * dev.cores) for w, each in others]
        return list(dict.fromkeys(found))
    most = dev.warps
    for warps in sorted({most, *(most * i // 4 for i in (1, 2, 3)), 1} - {0}, reverse=True):
        strips, units = _units(rows, shards, k, warps)
        # One CTA a multiprocessor, as many as fit there, or a whole strip each.
        for ctas in (dev.cores, dev.cores * (most // warps), strips):
            found.append(Cut(warps, min(units, ctas, 4 * dev.cores)))
    return list(dict.fromkeys(found))


_forced: list[Cut] = []


@contextlib.contextmanager
def forced(cut: Cut) -> Iterator[None]:
    """What is lowered inside takes this cut: for `tune`."""
    _forced.append(cut)
    try:
        yield
    finally:
        _forced.pop()


def choose(
    format: str,
    rows: int,
    shards: int,
    k: int,
    tokens: int,
    n_terms: int,
    dev: Device,
    cut: Cut | None = None,
) -> Plan:
    """Plans x [tokens, k] times W of `shards` blocks of [rows, k]; cut: other than the model's."""
    wide = dev.wgmma and format == "bitmap" and n_terms == 1 and tokens > 16
    if wide and tokens > MAX_GROUP:
        return _wide(shards * _ceil(rows, 16), k, tokens, dev)
    chunk = max(1, min(tokens, _TERM_TOKENS // n_terms)) if n_terms > 1 else max(tokens, 1)
    total = chunk * n_terms
    scales = _align(chunk * 4) if n_terms > 1 else 0
    prepared = _align(total * _ceil(k, 64) * 64 * 2) if n_terms > 1 or k % 64 else 0
    if format == "delta_csr":
        cut = cut or model(format, rows, shards, k, dev)
        blocks, block_cols = delta_csr.grid_of(k)
        room = dev.shared - _CONTROL_BYTES
        fits = [g for g, (_, b) in _PASSES.items() if (block_cols + _MARGIN_COLS) * b <= room]
        group = next((g for g in fits if total <= g), fits[-1])
        partial = blocks * total * shards * rows * 4 if blocks > 1 or n_terms > 1 else 0
        warps = min(cut.warps, _PASSES[group][0])
        return Plan(cut.ctas, warps, group, chunk, 0, partial + scales + prepared)
    group = next((g for g in (8, 16, 32) if total <= g), MAX_GROUP)
    groups = _ceil(total, group)
    default = model(format, rows, shards, k, dev)
    # Many tokens fill the GPU with whole strips: nothing to combine. Up to 64 a token's sums are
    # cut alike, in terms or not.
    few = tokens <= MAX_GROUP
    warps = (cut or default).warps if few else default.warps
    strips, units = _units(rows, shards, k, warps)
    ctas = min(units, (cut or default).ctas) if few else strips
    slots = 0 if strips % ctas == 0 else 2
    if n_terms > 1:
        slots = _ceil(_ceil(units, ctas), _ceil(k, 256)) + 1
    workspace = groups * ctas * slots * warps * 16 * group * 4 + scales
    wide = wide and warps % 4 == 0  # whole warpgroups
    workspace += group * _ceil(k, 256) * 512 if wide else prepared
    return Plan(ctas, warps, group, chunk, int(wide), workspace)


def _wide(bands: int, k: int, tokens: int, dev: Device) -> Plan:
    """For more than 64 tokens."""
    chunk, blocks = min(tokens, _WIDE_TOKENS), _ceil(k, 256)
    if chunk <= 128:  # csrc/cuda/bitmap_wide.cu
        warps = _WIDE_WARPS
        while warps > 4 and _ceil(bands, warps) * blocks < 2 * dev.cores:
            warps -= 4
        strips = _ceil(bands, warps)
        ctas = min(strips * blocks, dev.cores)
        slots = 0 if strips % ctas == 0 else 2
        workspace = 128 * blocks * 512 + ctas * slots * warps * 16 * 128 * 4
        return Plan(ctas, warps, 128, chunk, 1, workspace)
    # csrc/cuda/bitmap_gemm.cu: clusters of two CTAs share a strip of 16 bands; sums of one strip
    # each, and their flags.
    warps, group = 16, 256
    ctas = min(_ceil(bands, warps) * _ceil(chunk, group) * blocks, dev.cores // 2)
    workspace = ctas * warps * (16 * group + 1) * 4
    if k % 64:  # as code for another GPU's tensor cores needs x, which may run here
        workspace += _align(chunk * _ceil(k, 64) * 64 * 2)
    return Plan(ctas, warps, group, chunk, 1, workspace)


def chain(
    weights: Sequence[tuple[str, tuple[int, int], int]], tokens: int, widest: int, dev: Device
) -> tuple[list[Plan], int]:
    """Plans the products of a chain, for 1 to 32 tokens, and the bytes of its workspace.

    weights: format, [M, K] and room for values of each W, which is one block.   widest: the most
    features that a stage gives. The workspace is two stages' results, which take turns, and then
    what a product needs for itself.
    """
    dev = dataclasses.replace(dev, wgmma=False)  # csrc/cuda/handlers.cc: mma alone
    plans = []
    for format, (m, k), values in weights:
        cut = cut_for(format, m, 1, k, dev, by_memory(format, tokens, values / (m * k)))
        plans.append(choose(format, m, 1, k, tokens, 1, dev, cut))
    return plans, 2 * _align(tokens * widest * 2) + max(_align(p.workspace) for p in plans)


# Cuts 3% faster or more than the model's (benchmarks/cuts.py), by GPU, format, M and K; one shard.
# Without those of 12 warps, which are not taken over yet (docs/every-shape.md). Measured against
# the cut of more tokens; few tokens take them too.
_MEASURED = {
    "NVIDIA H100 80GB HBM3": {
        ("bitmap", 3072, 1024): Cut(4, 192),  # 0.82
        ("bitmap", 2048, 2048): Cut(4, 256),  # 0.94
    }
}
# What `tune` has kept. tuning.py, which multiplies and so lies above this, puts its lookup here.
tuned: Callable[[str, int, int, int, Device, int], Cut | None] | None = None


def cut_for(format: str, rows: int, shards: int, k: int, dev: Device, by_memory: int = 0) -> Cut:
    """The cut to take: what was measured, or the model's."""
    if _forced:
        return _forced[-1]
    cut = tuned(format, rows, shards, k, dev, by_memory) if tuned is not None else None
    if cut is None and shards == 1:
        cut = _MEASURED.get(dev.name, {}).get((format, rows, k))
    found = cuts(format, rows, shards, k, dev, by_memory)
    return cut if cut in found else found[0]


def spmm(call, *args, format, shape, activation):
    """Lowers one product: `call` is kernel.py's FFI call, `args` its operands."""
    from jax_flashllm.kernel import ACTIVATIONS

    *_, values, x, _ = args
    shards = values.shape[0]
    rows = -(-shape[0] // shards)
    tokens = math.prod(x.shape[:-1])
    n_terms = terms(values.dtype, x.dtype)
    dev = device()
    fill = values.shape[1] / max(rows * shape[1], 1)
    bound = by_memory(format, tokens * n_terms, fill)
    cut = cut_for(format, rows, shards, shape[1], dev, bound)
    plan = choose(format, rows, shards, shape[1], tokens, n_terms, dev, cut)
    dense = WIDE_DENSE_TOKENS if plan.wide else DENSE_TOKENS
    if format == "delta_csr":
        dense = DELTA_DENSE_TOKENS
    if n_terms == 1 and tokens >= dense:
        return _decoded(call, *args, format=format, shape=shape, activation=activation)
    out = (
        jax.ShapeDtypeStruct((*x.shape[:-1], shards * rows), x.dtype),
        jax.ShapeDtypeStruct((max(plan.workspace, 16),), jnp.uint8),
    )
    code = ACTIVATIONS[activation][0]
    attributes = {"m": shape[0], "k": shape[1], "activation": code, **plan.attributes()}
    return call("spmm", format, out, *args, **attributes)[0]


def _decoded(call, *args, format, shape, activation):
    """The product with many tokens: W is decoded to a temporary, and multiplied by cuBLAS."""
    from jax_flashllm.kernel import ACTIVATIONS

    *w, x, bias = args
    shards = w[-1].shape[0]
    out = jax.ShapeDtypeStruct((shards * _ceil(shape[0], shards), shape[1]), w[-1].dtype)
    dense = call("decode", format, out, *w, m=shape[0], k=shape[1])
    features = ((x.ndim - 1,), (1,)), ((), ())
    y = lax.dot_general(x, dense, features, preferred_element_type=jnp.float32)
    if bias.size:
        y = y + bias.astype(jnp.float32)
    return ACTIVATIONS[activation][1](y).astype(x.dtype)
