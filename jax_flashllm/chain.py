"""A row of products as one call: on a GPU the next one's weights stream in while the last one ends.

    Stage       y = act(x W^T + bias)
      and       x = y
      or, add   h = h + y,  x = LayerNorm(h) * scale + shift
    Attend      x = attention of x, which is q, k and v, over a cache that is updated in place

The layers of a transformer are such a row when it decodes: q, k and v, attention, the output
projection (add) and the two products of the MLP (the second adds). Each alone would pay for a
launch, for its first bytes and for its tail: 10 to 12 us of 25 to 70.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_flashllm import _flashllm, attention, partition, plan
from jax_flashllm.formats import SparseWeight
from jax_flashllm.kernel import ACTIVATIONS, NO_BIAS
from jax_flashllm.spmm import FLOATS, check_product, spmm

_TARGET = "flashllm_chain_v1"
_FORMATS = ("bitmap", "delta_csr")
_ATTEND = len(_FORMATS)  # in the place of a format
_MOST_FEATURES = 16384  # of h: a token stays in the registers of a cluster's eight CTAs


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attend:
    """One new token of each row attends to its cache, as `jax_flashllm.attention.decode`.

    x is [..., 3 * h * d], q, k and v side by side, and becomes [..., h * d]; B are all its tokens.
    keys, values: [B * h, S, d] in float16, bfloat16, float32 or float8_e4m3fn.
    mask: bool [B, S].   length: int32 [], of the cache before.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    length: jax.Array

    @property
    def width(self) -> int:
        return self.keys.shape[0] // self.mask.shape[0] * self.keys.shape[2]

    def __call__(
        self, x: jax.Array, decode: Callable = attention.decode
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x after it, keys and values."""
        qkv = x.reshape(self.mask.shape[0], 3, -1, self.keys.shape[2])
        y, keys, values = decode(qkv, self.keys, self.values, self.mask, self.length)
        return y.reshape(*x.shape[:-1], self.width), keys, values


def chain(
    x: jax.Array, h: jax.Array, stages: Sequence[Stage | Attend], epsilon: float = 1e-5
) -> tuple[jax.Array, ...]:
    """Returns h and x after `stages`, each of which takes the x of the one before.

    x: [..., K] of the first stage.   h: [..., H], what stages with `add` add to; their M is H.
    Both in one dtype, float16, bfloat16 or float32, and with the same leading axes.
    epsilon: of the LayerNorms, whose statistics are float32.
    Returns h [..., H] and x [..., M of the last stage] in that dtype, and then keys and values of
    each `Attend` in turn, the same buffers where donated.

    One call on a CUDA device, for up to 32 tokens, where h, x and all W have one 16-bit dtype, W
    are one block each with K a multiple of 64, where to `add` H is a multiple of 8 up to 16384,
    without activation, and heads are whole pieces of 16 bytes of the cache, up to 32. Otherwise,
    with a single stage that does not fit too, it is what the stages' `spmm`, LayerNorms and
    `attention.decode` give one by one. So it is for derivatives, for stacked weights and for
    attention under vmap, and on a mesh (`Attend` there: not with tokens on Explicit axes). Results
    agree but for rounding. For `jax.export` see `jax_flashllm.spmm`; the call is
    "flashllm_chain_v1".

    Raises TypeError and ValueError as `spmm`, with the stage's number, and where x, h and stages
    do not fit together.
    """
    stages = tuple(stages)
    _check(x, h, stages)
    leaves, treedef = jax.tree.flatten(stages)
    operands = jnp.asarray(x), jnp.asarray(h), *leaves
    params = {"treedef": treedef, "epsilon": float(epsilon)}
    if any(not jax.typeof(a).sharding.mesh.empty for a in operands):
        return tuple(_composed(*operands, **params))
    return tuple(chain_p.bind(*operands, **params))


def _check(x, h, stages: tuple[Stage | Attend, ...]) -> None:
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
        if isinstance(s, Attend):
            _check_attention(op, x, s)
            x = jax.ShapeDtypeStruct((*x.shape[:-1], s.width), x.dtype)
            continue
        if not isinstance(s, Stage):
            raise TypeError(f"{op} must be a Stage or an Attend, got {type(s).__name__}")
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


def _check_attention(op: str, x, s: Attend) -> None:
    for name in ("keys", "values", "mask", "length"):
        if not hasattr(a := getattr(s, name), "dtype"):
            raise TypeError(f"{op}: {name} must be an array, got {type(a).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x is {x.dtype}; cast it to float16, bfloat16 or float32")
    B, held = math.prod(x.shape[:-1]), (s.keys, s.values)
    if any(a.ndim != 3 or a.shape != s.keys.shape or a.dtype != s.keys.dtype for a in held):
        raise ValueError(
            f"{op}: keys are {s.keys.dtype}{list(s.keys.shape)} and values "
            f"{s.values.dtype}{list(s.values.shape)}; pass both as [B * h, S, d] in one dtype"
        )
    if s.keys.dtype not in attention.DTYPES:
        raise ValueError(
            f"{op}: keys and values are {s.keys.dtype}; pass them in float16, bfloat16, float32 or "
            "float8_e4m3fn"
        )
    rows, S, d = s.keys.shape
    if not B * rows * S * d:
        raise ValueError(
            f"{op}: x is {list(x.shape)} and keys are {list(s.keys.shape)}; attention needs a "
            "token, a head and a slot at least"
        )
    length = jnp.result_type(s.length)  # int32 for NumPy's int64 where JAX has none
    if s.mask.shape != (B, S) or s.mask.dtype != bool or s.length.shape or length != np.int32:
        raise ValueError(
            f"{op}: mask is {s.mask.dtype}{list(s.mask.shape)} and length "
            f"{length}{list(s.length.shape)}; pass bool[{B}, {S}], for {B} tokens and {S} slots, "
            "and int32[]"
        )
    if rows % B or x.shape[-1] != 3 * s.width:
        raise ValueError(
            f"{op}: x is {list(x.shape)} but keys are {list(s.keys.shape)}; with {rows} heads of "
            f"{d} in all, q, k and v of a token are {3 * rows * d} / {B} features"
        )


# ---- one by one ----


def _composed(x, h, *leaves, treedef, epsilon, decode=attention.decode):
    held = []
    for s in treedef.unflatten(leaves):
        if isinstance(s, Attend):
            x, *kv = s(x, decode)
            held += kv
            continue
        y = spmm(s.weight, x, s.bias, s.activation)
        if s.add:
            h = h + y
            x = _layer_norm(h, s.scale, s.shift, epsilon)
        else:
            x = y
    return h, x, *held


def _layer_norm(h, scale, shift, epsilon):
    """As nnx.LayerNorm without its fast variance, bit for bit."""
    z = h.astype(jnp.float32)
    mean = z.mean(-1, keepdims=True)
    variance = lax.square(z - mean).mean(-1, keepdims=True)
    factor = lax.rsqrt(variance + epsilon)
    y = (z - mean) * (factor if scale is None else factor * scale)
    return (y if shift is None else y + shift).astype(h.dtype)


# ---- one call ----


def _supports(x, h, stages: Sequence[Stage | Attend]) -> bool:
    """csrc/cuda/handlers.cc."""

    def fits(s: Stage | Attend) -> bool:
        if isinstance(s, Attend):
            return attention.supports(s.keys)
        m, k = s.weight.shape
        ours = s.weight.dtype == x.dtype and s.weight.shards == 1 and k % 64 == 0
        return ours and not (s.add and (s.activation or m % 8 or m > _MOST_FEATURES))

    return (
        1 <= math.prod(h.shape[:-1]) <= plan.CHAIN_TOKENS
        and any(isinstance(s, Stage) for s in stages)
        and all(map(fits, stages))
    )


def _call(out, *operands, aliases, **attributes):
    return jax.ffi.ffi_call(_TARGET, out, input_output_aliases=aliases)(*operands, **attributes)


def _cuda(x, h, *leaves, treedef, epsilon):
    stages = treedef.unflatten(leaves)
    if not hasattr(_flashllm, "cuda_targets") or not _supports(x, h, stages):
        return _composed(x, h, *leaves, treedef=treedef, epsilon=epsilon)
    tokens, H = math.prod(h.shape[:-1]), h.shape[-1]
    weights = [
        (s.weight.format, s.weight.shape, s.weight.values.size)
        for s in stages
        if isinstance(s, Stage)
    ]
    widths = [_width(s) for s in stages]
    plans, workspace = plan.chain(weights, tokens, max(widths), plan.device())
    out = [
        jax.ShapeDtypeStruct((tokens, H), h.dtype),
        jax.ShapeDtypeStruct((tokens, widths[-1]), x.dtype),
        jax.ShapeDtypeStruct((workspace,), jnp.uint8),
    ]
    absent = jnp.zeros(NO_BIAS, jnp.float32)
    operands, aliases = [x.reshape(tokens, -1), h.reshape(tokens, H)], {}
    of_stage, left = [], iter(plans)
    for s in stages:
        if isinstance(s, Attend):
            for a in (s.keys, s.values):
                aliases[len(operands)] = len(out)
                operands.append(a)
                out.append(jax.ShapeDtypeStruct(a.shape, a.dtype))
            operands += [s.mask, s.length]
            of_stage.append((s.width, 3 * s.width, _ATTEND, 0, 0, 0, 0, 0))
            continue
        operands += [*s.weight.buffers, s.weight.values]
        operands += [absent if a is None else a for a in (s.bias, s.scale, s.shift)]
        code, p = ACTIVATIONS[s.activation][0], next(left)
        format = _FORMATS.index(s.weight.format)
        of_stage.append((*s.weight.shape, format, code, p.ctas, p.warps, p.group, s.add))
    names = "m", "k", "format", "activation", "ctas", "warps", "group", "add"
    columns = (np.array(column, np.int64) for column in zip(*of_stage, strict=True))
    attributes: dict[str, Any] = dict(zip(names, columns, strict=True))
    attributes["epsilon"] = np.float32(epsilon)
    new_h, y, _, *held = _call(out, *operands, aliases=aliases, **attributes)
    return new_h.reshape(h.shape), y.reshape(*x.shape[:-1], widths[-1]), *held


def _width(s: Stage | Attend) -> int:
    """Features that a stage gives."""
    return s.width if isinstance(s, Attend) else s.weight.shape[0]


# ---- the primitive ----

chain_p = Primitive("flashllm_chain")


def _shape(x, h, *leaves, treedef, epsilon):
    stages = treedef.unflatten(leaves)
    held: list[Any] = []
    for s in stages:
        held += [s.keys, s.values] if isinstance(s, Attend) else []
    last = h.update(shape=(*h.shape[:-1], _width(stages[-1])))
    return [a.update(weak_type=False) for a in (h, last, *held)]


def _jvp(primals, tangents, **params):
    moved = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def f(*some):
        operands = list(primals)
        for i, a in zip(moved, some, strict=True):
            operands[i] = a
        return _composed(*operands, **params, decode=attention.decode_xla)

    return jax.jvp(f, [primals[i] for i in moved], [tangents[i] for i in moved])


def _batch(args, dims, *, treedef, epsilon):
    params = {"treedef": treedef, "epsilon": epsilon}
    attends = any(isinstance(s, Attend) for s in treedef.unflatten(args[2:]))
    if attends or any(d is not None for d in dims[2:]):
        composed = functools.partial(_composed, **params, decode=attention.decode_xla)
        out = jax.vmap(composed, in_axes=dims)(*args)
        return out, (0,) * len(out)
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
