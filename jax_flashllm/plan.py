"""How a product runs on a GPU: the cut of the work, as static attributes of the custom call.

Chosen from shapes and the device alone, so that it is part of the jit key and equal inputs
give equal bits. csrc/cuda/spmm.h explains strips and units. For up to 64 tokens the cut does
not depend on the number of tokens, so a token's result does not depend on its batch.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

_DEFAULT_CORES = 132  # H100: for lowering where there is no GPU
_WARP_ROWS = {"bitmap": 16, "tiled_csl": 64}
_UNIT_COLS = {"bitmap": 256, "tiled_csl": 128}
_MAX_GROUP = 64
# With x in terms every sum passes through the workspace; this bounds it.
_TERM_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU."""

    cores: int  # streaming multiprocessors
    warps: int  # warps a CTA whose rings fit into shared memory: a bitmap's
    csl_teams: int = 8  # and Tiled-CSL's teams of two, with a dense block each


@dataclasses.dataclass(frozen=True)
class Plan:
    """Attributes of the custom call, and the bytes of its workspace."""

    ctas: int  # CTAs a group of tokens
    warps: int  # a CTA's warps of 16 rows of W each; in Tiled-CSL its teams of two, 64 rows each
    group: int  # tokens a pass over W
    chunk: int  # tokens a round of launches
    workspace: int

    def attributes(self) -> dict[str, int]:
        return {"ctas": self.ctas, "warps": self.warps, "group": self.group, "chunk": self.chunk}


@functools.cache
def device() -> Device:
    """The first CUDA device, or an H100 where there is none."""
    try:
        gpu = jax.devices("cuda")[0]
    except RuntimeError:
        return Device(_DEFAULT_CORES, 16)
    capability = str(getattr(gpu, "compute_capability", "9.0"))
    cores = int(getattr(gpu, "core_count", 0)) or _DEFAULT_CORES
    if capability in ("9.0", "10.0", "10.3"):  # 227 KB of shared memory
        return Device(cores, warps=16, csl_teams=8)
    if capability == "8.0":  # 163 KB
        return Device(cores, warps=12, csl_teams=5)
    return Device(cores, warps=6, csl_teams=2)  # 99 KB on 8.6, 8.9 and 12.x


def terms(weight_dtype, token_dtype) -> int:
    """Terms of W's dtype that hold an x of another dtype (csrc/cuda/spmm.h)."""
    if weight_dtype == token_dtype:
        return 1
    return 3 if token_dtype == np.float32 else 2


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _align(n: int) -> int:
    return _ceil(n, 256) * 256


def choose(
    format: str, rows: int, shards: int, k: int, tokens: int, n_terms: int, dev: Device
) -> Plan:
    """Plans x [tokens, k] times W of `shards` blocks of [rows, k]."""
    warp_rows = _WARP_ROWS[format]
    bands, blocks = shards * _ceil(rows, warp_rows), _ceil(k, _UNIT_COLS[format])
    chunk = max(1, min(tokens, _TERM_TOKENS // n_terms)) if n_terms > 1 else max(tokens, 1)
    if format == "tiled_csl":
        # A unit takes about 8 + warps: the more warps, the less of its latency shows.
        warps = min(
            range(dev.csl_teams, 0, -1),
            key=lambda w: _ceil(_ceil(bands, w) * blocks, dev.cores) * (8 + w),
        )
    else:
        # Narrower CTAs only where wide ones would leave multiprocessors without work.
        warps = dev.warps
        while warps > 4 and _ceil(bands, warps) * blocks < 2 * dev.cores:
            warps //= 2
    strips = _ceil(bands, warps)
    units = strips * blocks
    total = chunk * n_terms
    group = next((g for g in (8, 16, 32) if total <= g), _MAX_GROUP)
    groups = _ceil(total, group)
    # Many tokens fill the GPU with whole strips: nothing to combine.
    ctas = strips if groups > 1 else min(units, dev.cores)
    slots = 0 if strips % ctas == 0 else 1
    if n_terms > 1:
        slots = _ceil(_ceil(units, ctas), blocks) + 1
    workspace = groups * ctas * slots * warps * warp_rows * group * 4
    if n_terms > 1:
        workspace += _align(chunk * 4)
    elif slots:
        workspace += _align(ctas * warps * (2 if format == "tiled_csl" else 1) * 4)
    if n_terms > 1 or k % 64:
        workspace += _align(total * _ceil(k, 64) * 64 * 2)
    return Plan(ctas, warps, group, chunk, workspace)


def spmm(call, *args, format, shape, activation):
    """Lowers one product: `call` is kernel.py's FFI call, `args` its operands."""
    from jax_flashllm.kernel import ACTIVATIONS

    *_, values, x, _ = args
    shards = values.shape[0]
    rows = -(-shape[0] // shards)
    tokens = math.prod(x.shape[:-1])
    n_terms = terms(values.dtype, x.dtype)
    plan = choose(format, rows, shards, shape[1], tokens, n_terms, device())
    out = (
        jax.ShapeDtypeStruct((*x.shape[:-1], shards * rows), x.dtype),
        jax.ShapeDtypeStruct((max(plan.workspace, 16),), jnp.uint8),
    )
    code = ACTIVATIONS[activation][0]
    attributes = {"m": shape[0], "k": shape[1], "activation": code, **plan.attributes()}
    return call("spmm", format, out, *args, **attributes)[0]
