"""A row of products as one call: on a GPU the next one's weights stream in while the last one ends.

    stage       y = act(x W^T + bias)
      and       x = y
      or, add   h = h + y,  x = LayerNorm(h) * scale + shift

A decode step of a transformer is such a row from one attention to the next: the output projection
(add), the two of the MLP (the second adds), and the next layer's q, k and v. Each product alone
would pay for a launch, for its first bytes and for its tail: 10 to 12 us of 25 to 70.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_flashllm import _flashllm, partition, plan
from jax_flashllm.formats import SparseWeight
from jax_flashllm.kernel import ACTIVATIONS, NO_BIAS
from jax_flashllm.spmm import FLOATS, check_product, spmm

_TARGET = "flashllm_chain_v1"
_FORMATS = ("bitmap", "tiled_csl")
_MOST_FEATURES = 16384  # of h: a token stays in the registers of a cluster's four CTAs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stage:
    """One product of a chain, and whether its result goes to h.

    weight: encoded [M, K].   bias: [M] or None.   activation: None, "relu" or "gelu" (exact).
    add: h = h + y, and the next x is LayerNorm(h), times `scale` and plus `shift`, [M] or None.
    """

    weight: SparseWeight
    bias: jax.Array | None = None
    activation: str | None = dataclasses.field(default=None, metadata={"static": True})
    add: bool = dataclasses.field(default=False, metadata={"static": True})
    scale: jax.Array | None = None
    shift: jax.Array | None = None


def chain(
    x: jax.Array, h: jax.Array, stages: Sequence[Stage], epsilon: float = 1e-5
) -> tuple[jax.Array, jax.Array]:
    """Returns h and x after `stages`, each of which takes the x of the one before.

    x: [..., K] of the first stage.   h: [..., H], what stages with `add` add to; their M is H.
    Both in one dtype, float16, bfloat16 or float32, and with the same leading axes.
    epsilon: of the LayerNorms, whose statistics are float32.
    Returns h [..., H] and x [..., M of the last stage] in that dtype.

    One call on a CUDA device, for up to 32 tokens, where h, x and all W have one 16-bit dtype, W
    are one block each with K a multiple of 64, and where to `add` H is a multiple of 8 up to 16384,
    without activation. Otherwise, and for derivatives, it is what the stages' `spmm` and LayerNorms
    give one by one; so are stacked weights under vmap, and everything on a mesh. Results agree but
    for rounding. For `jax.export` see `jax_flashllm.spmm`; the call is "flashllm_chain_v1".

    Raises TypeError and ValueError as `spmm`, with the stage's number, and where x, h and stages
    do not fit together.
    """
    stages = tuple(stages)
    _check(x, h, stages)
    leaves, treedef = jax.tree.flatten(stages)
    operands = jnp.asarray(x), jnp.asarray(h), *leaves
    params = {"treedef": treedef, "epsilon": float(epsilon)}
    if any(not jax.typeof(a).sharding.mesh.empty for a in operands):
        h, x = _composed(*operands, **params)
    else:
        h, x = chain_p.bind(*operands, **params)
    return h, x


def _check(x, h, stages: tuple[Stage, ...]) -> None:
    if not stages:
        raise ValueError("chain: no stages; pass at least one")
    for name, a in (("x", x), ("h", h)):
        if not hasattr(a, "dtype"):
            raise TypeError(f"chain: {name} must be an array, got {type(a).__name__}")
    if x.dtype != h.dtype or x.shape[:-1] != h.shape[:-1] or not h.ndim:
        raise ValueError(
            f"chain: x is {x.dtype}{list(x.shape)} and h {h.dtype}{list(h.shape)}; they need one "
            "dtype and the same axes before the last"
        )
    H = h.shape[-1]
    for i, s in enumerate(stages):
        op = f"chain: stage {i}"
        check_product(op, s.weight, x, s.bias, s.activation)
        m = s.weight.local_shape[0]
        if s.add and m != H:
            raise ValueError(f"{op}: its {m} results cannot be added to h, which has {H} features")
        for name, a in (("scale", s.scale), ("shift", s.shift)):
            if a is not None and not s.add:
                raise ValueError(f"{op}: it has a {name} but no LayerNorm; pass add=True")
            if a is not None and (a.shape != (H,) or a.dtype not in FLOATS):
                raise ValueError(
                    f"{op}: {name} is {a.dtype}{list(a.shape)}; pass [{H}], h's features, in "
                    "float16, bfloat16 or float32"
                )
        x = jax.ShapeDtypeStruct((*x.shape[:-1], m), x.dtype)


# ---- one by one ----


def _composed(x, h, *leaves, treedef, epsilon):
    for s in treedef.unflatten(leaves):
        y = spmm(s.weight, x, s.bias, s.activation)
        if s.add:
            h = h + y
            x = _layer_norm(h, s.scale, s.shift, epsilon)
        else:
            x = y
    return h, x


def _layer_norm(h, scale, shift, epsilon):
    """As nnx.LayerNorm without its fast variance, bit for bit."""
    z = h.astype(jnp.float32)
    mean = z.mean(-1, keepdims=True)
    variance = lax.square(z - mean).mean(-1, keepdims=True)
    factor = lax.rsqrt(variance + epsilon)
    y = (z - mean) * (factor if scale is None else factor * scale)
    return (y if shift is None else y + shift).astype(h.dtype)


# ---- one call ----


def _supports(x, h, stages: Sequence[Stage]) -> bool:
    """csrc/cuda/handlers.cc."""

    def fits(s: Stage) -> bool:
        m, k = s.weight.shape
        ours = s.weight.dtype == x.dtype and s.weight.shards == 1 and k % 64 == 0
        return ours and not (s.add and (s.activation or m % 8 or m > _MOST_FEATURES))

    return 1 <= math.prod(h.shape[:-1]) <= plan.CHAIN_TOKENS and all(map(fits, stages))


def _call(out, *operands, **attributes):
    return jax.ffi.ffi_call(_TARGET, out)(*operands, **attributes)


def _cuda(x, h, *leaves, treedef, epsilon):
    stages = treedef.unflatten(leaves)
    if not hasattr(_flashllm, "cuda_targets") or not _supports(x, h, stages):
        return _composed(x, h, *leaves, treedef=treedef, epsilon=epsilon)
    tokens, H, M = math.prod(h.shape[:-1]), h.shape[-1], stages[-1].weight.shape[0]
    weights = [(s.weight.format, s.weight.shape, s.weight.values.size) for s in stages]
    plans, workspace = plan.chain(weights, tokens, plan.device())
    absent = jnp.zeros(NO_BIAS, jnp.float32)
    operands = [x.reshape(tokens, -1), h.reshape(tokens, H)]
    for s in stages:
        operands += [*s.weight.buffers, s.weight.values]
        operands += [absent if a is None else a for a in (s.bias, s.scale, s.shift)]
    out = (
        jax.ShapeDtypeStruct((tokens, H), h.dtype),
        jax.ShapeDtypeStruct((tokens, M), x.dtype),
        jax.ShapeDtypeStruct((workspace,), jnp.uint8),
    )
    each = {
        "m": [m for _, (m, _), _ in weights],
        "k": [k for _, (_, k), _ in weights],
        "format": [_FORMATS.index(f) for f, *_ in weights],
        "activation": [ACTIVATIONS[s.activation][0] for s in stages],
        "ctas": [p.ctas for p in plans],
        "warps": [p.warps for p in plans],
        "add": [s.add for s in stages],
    }
    attributes: dict[str, Any] = {name: np.array(values, np.int64) for name, values in each.items()}
    attributes |= {"group": plans[0].group, "epsilon": np.float32(epsilon)}
    new_h, y, _ = _call(out, *operands, **attributes)
    return new_h.reshape(h.shape), y.reshape(*x.shape[:-1], M)


# ---- the primitive ----

chain_p = Primitive("flashllm_chain")


def _shape(x, h, *leaves, treedef, epsilon):
    last = treedef.unflatten(leaves)[-1].weight
    return [
        h.update(weak_type=False),
        h.update(shape=(*h.shape[:-1], last.shape[0]), weak_type=False),
    ]


def _jvp(primals, tangents, **params):
    moved = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def f(*some):
        operands = list(primals)
        for i, a in zip(moved, some, strict=True):
            operands[i] = a
        return _composed(*operands, **params)

    return jax.jvp(f, [primals[i] for i in moved], [tangents[i] for i in moved])


def _batch(args, dims, **params):
    if any(d is not None for d in dims[2:]):
        return jax.vmap(functools.partial(_composed, **params), in_axes=dims)(*args), (0, 0)
    # More tokens of the same weights: one more axis in front.
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    x, h = (
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args[:2], dims[:2], strict=True)
    )
    return chain_p.bind(x, h, *args[2:], **params), (0, 0)


partition.register_composed(chain_p, _shape, _composed, {"cuda": _cuda})
ad.primitive_jvps[chain_p] = _jvp
batching.primitive_batchers[chain_p] = _batch
