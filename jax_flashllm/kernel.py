"""The primitives: FFI targets, shapes, what one device runs, batching, derivatives.

    spmm_p    index..., values, x, bias -> act(x W^T + bias)   x [..., K] -> [..., M]
    decode_p  index..., values          -> W                   [M, K]
    sample_p  index..., dense [M, K]    -> values              [S, capacity]

`index` is the two index buffers of the format; M and K are rounded up to whole blocks, S in all.
W is linear in its values: `decode_p` and `sample_p` are each other's transposes, and the
derivatives of `spmm_p` are products with the decoded W. What several devices do is
partition.py's to say; here is what one of them does.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_flashllm import _flashllm, partition
from jax_flashllm.partition import BLOCK, COLUMNS, OWN, ROWS

ACTIVATIONS = {
    None: (0, lambda z: z),
    "relu": (1, jax.nn.relu),
    "gelu": (2, partial(jax.nn.gelu, approximate=False)),
}
# The shape of an absent bias, which nobody reads. Not an empty one: XLA's GPU compiler (jax 0.11.2)
# crashes on empty arrays that enter a shard_map.
NO_BIAS = (1, 1)

_HAS_CUDA = hasattr(_flashllm, "cuda_targets")


def _register_targets():
    for name, capsule in _flashllm.cpu_targets().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    if _HAS_CUDA:
        # Spelt in capitals: lower-case "cuda" is a queue that the CUDA plugin never reads.
        for name, stages in _flashllm.cuda_targets().items():
            jax.ffi.register_ffi_target(name, stages, platform="CUDA")


_register_targets()


def _padded(shape: tuple[int, int], shards: int, columns: int) -> tuple[int, int]:
    """[M, K] rounded up to whole blocks."""
    rows = shards // columns
    return rows * -(-shape[0] // rows), columns * -(-shape[1] // columns)


# ---- lowering ----


def _call(op: str, format: str, out, *operands, **attributes):
    target = f"flashllm_{op}_{format}_v1"
    return jax.ffi.ffi_call(target, out)(*operands, **attributes)


def _no_cuda(*args, **params):
    raise NotImplementedError(
        "jax_flashllm was built without CUDA: put nvcc (CUDA 12.8 or newer) on the PATH and "
        "install again with `pip install . -C cmake.define.FLASHLLM_CUDA=ON`"
    )


def _register(p: Primitive, roles, shape, cpu, cuda):
    partition.register(p, roles, shape, {"cpu": cpu, "cuda": cuda if _HAS_CUDA else _no_cuda})


def _weight_roles(*buffers):
    return [(BLOCK, *(OWN,) * (b.ndim - 1)) for b in buffers]


def _by_column(shape: tuple[int, int], columns: int, *buffers):
    """The column blocks of a weight: (buffers, a slice of K) of each."""
    rows, width = buffers[0].shape[0] // columns, -(-shape[1] // columns)
    for c in range(columns):
        part = [lax.slice_in_dim(b, c * rows, (c + 1) * rows) for b in buffers]
        yield part, slice(c * width, (c + 1) * width)


# ---- spmm ----

spmm_p = Primitive("flashllm_spmm")


def _spmm_roles(index, offsets, values, x, bias):
    x_roles = *range(x.ndim - 1), COLUMNS
    bias_roles = (OWN, OWN) if bias.shape == NO_BIAS else (ROWS,)
    result = *range(x.ndim - 1), ROWS
    return [*_weight_roles(index, offsets, values), x_roles, bias_roles], result


def _spmm_shape(*args, format, shape, activation, columns):
    *_, values, x, bias = args
    rows, features = _padded(shape, values.shape[0], columns)
    if x.shape[-1] != features:
        raise ValueError(
            f"spmm: x has {x.shape[-1]} features but W is [{shape[0]}, {shape[1]}]; pass x of "
            f"shape [..., {features}]"
        )
    if bias.shape not in (NO_BIAS, (rows,)):
        raise ValueError(f"spmm: bias is {list(bias.shape)}, expected [{rows}]")
    if columns > 1 and (activation is not None or bias.shape == (rows,)):
        raise ValueError("spmm: bias and activation come after the sum over column blocks")
    return jax.ShapeDtypeStruct((*x.shape[:-1], rows), x.dtype)


def _has_bias(bias, batch) -> bool:
    return bias.ndim - sum(level[-1] for level in batch) == 1


def _spmm_cpu(*args, format, shape, activation):
    *_, values, x, _bias = args
    rows, _ = _padded(shape, values.shape[0], 1)
    out = jax.ShapeDtypeStruct((*x.shape[:-1], rows), x.dtype)
    code = ACTIVATIONS[activation][0]
    return _call("spmm", format, out, *args, m=shape[0], k=shape[1], activation=code)


def _spmm_cuda(*args, **params):
    from jax_flashllm import plan

    return plan.spmm(_call, *args, **params)


def _spmm_columns(local, /, *args, shape, columns, **params):
    """The sum over the column blocks that a device has, in float32."""
    *w, x, bias = args
    if bias.shape == NO_BIAS:
        bias = jnp.zeros(0, bias.dtype)  # what the handlers take for none
    if columns == 1:
        return local(*w, x, bias, shape=shape, **params)
    y = jnp.zeros((), jnp.float32)
    for part, k in _by_column(shape, columns, *w):
        xk = x[..., k]
        y += local(*part, xk, bias, shape=(shape[0], xk.shape[-1]), **params).astype(jnp.float32)
    return y.astype(x.dtype)


def _spmm_jvp(primals, tangents, *, activation, batch, **params):
    *index, values, x, bias = primals
    *_, dvalues, dx, dbias = tangents
    linear = partial(spmm_p.bind, activation=None, **params)
    # Without the bias, and without the batch axes that it alone has.
    plain = tuple((*level[:-1], False) for level in batch if any(level[:-1]))
    missing = [i for i, level in enumerate(batch) if not any(level[:-1])]
    none = jnp.zeros(NO_BIAS, x.dtype)
    z = linear(*index, values, x, bias, batch=batch)
    dz = []
    if type(dx) is not ad.Zero:
        dz.append(linear(*index, values, dx, none, batch=plain))
    if type(dvalues) is not ad.Zero:
        dz.append(linear(*index, dvalues, x, none, batch=plain))
    if missing:
        dz = [jnp.broadcast_to(jnp.expand_dims(d, missing), z.shape) for d in dz]
    if type(dbias) is not ad.Zero and _has_bias(bias, batch):
        dims = *(i for i, level in enumerate(batch) if level[-1]), z.ndim - 1
        where = partition.explicit(jax.typeof(z))
        dz.append(lax.broadcast_in_dim(dbias.astype(z.dtype), z.shape, dims, out_sharding=where))
    if not dz:
        return ACTIVATIONS[activation][1](z), jnp.zeros_like(z)
    return jax.jvp(ACTIVATIONS[activation][1], (z,), (sum(dz[1:], dz[0]),))


def _spmm_transpose(ct, *args, activation, batch, out_sharding, **params):
    # y = x W^T, so x_bar = y_bar W and W_bar = y_bar^T x, of which the stored part is kept.
    # Gradients do not meet a bias here, since the JVP rule takes it apart; linear_transpose may.
    if activation is not None:
        raise NotImplementedError(f"spmm: with activation {activation!r} it is not linear")
    index, (values, x, bias) = args[:2], args[2:]
    if type(ct) is ad.Zero:
        return [None] * len(args)
    of_x = x.aval if ad.is_undefined_primal(x) else None
    of_values = values.aval if ad.is_undefined_primal(values) else None
    alone = dict(batch=(), out_sharding=None, **params)

    def bars(ct, index, values, x):
        x_bar = values_bar = None
        if of_x is not None:
            dense = decode_p.bind(*index, values, **alone)
            where = partition.explicit(of_x, sum(level[3] for level in batch))
            x_bar = _dot(ct, dense, (ct.ndim - 1,), (0,), where)
            x_bar = x_bar.astype(of_x.dtype)
        if of_values is not None:
            tokens = tuple(range(ct.ndim - 1))
            where = partition.dense_sharding(index[1], params["shape"], params["columns"])
            dense_bar = _dot(ct, x, tokens, tokens, where).astype(of_values.dtype)
            values_bar = sample_p.bind(*index, dense_bar, capacity=of_values.shape[-1], **alone)
        return values_bar, x_bar

    known = [None if ad.is_undefined_primal(a) else a for a in (values, x)]
    for level in reversed(batch):
        axes = [0 if b else None for b in level]
        of_known = [None if a is None else i for a, i in zip(known, axes[2:4], strict=True)]
        bars = jax.vmap(bars, (0, tuple(axes[:2]), *of_known))
    values_bar, x_bar = bars(ct, index, *known)
    bias_bar = None
    if ad.is_undefined_primal(bias) and _has_bias(bias.aval, batch):
        bias_bar = ct.sum(tuple(range(len(batch), ct.ndim - 1)), dtype=jnp.float32)
        bias_bar = _shared(bias_bar, batch, 4).astype(bias.aval.dtype)
    return [None, None, _shared(values_bar, batch, 2), _shared(x_bar, batch, 3), bias_bar]


def _shared(bar: Any, batch, i: int) -> Any:
    """Of operand i's cotangent for each element: what elements share gets the sum."""
    axes = tuple(n for n, level in enumerate(batch) if not level[i])
    return bar if bar is None or not axes else bar.sum(axes)


def _dot(a, b, of_a, of_b, sharding):
    return lax.dot_general(
        a,
        b,
        ((of_a, of_b), ((), ())),
        preferred_element_type=jnp.float32,
        out_sharding=sharding,
    )


def _batch(p, args, dims, *, batch, out_sharding, **params):
    """Batching for anything batched in W or bias: one call an element, in a loop."""
    moved = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True)]
    flags = tuple(d is not None for d in dims)
    like = next(a for a, b in zip(moved, flags, strict=True) if b)
    out_sharding = partition.with_leading(out_sharding, like)
    return p.bind(*moved, batch=(flags, *batch), out_sharding=out_sharding, **params), 0


def _spmm_batch(args, dims, *, batch, out_sharding, **params):
    *w_dims, x_dim, bias_dim = dims
    if bias_dim is None and all(d is None for d in w_dims):
        # More tokens of the same weight: one more axis in front of x's own, one product.
        *rest, x, bias = args
        x = jnp.moveaxis(x, x_dim, at := sum(level[3] for level in batch))
        out_sharding = partition.with_leading(out_sharding, x, at, len(batch))
        y = spmm_p.bind(*rest, x, bias, batch=batch, out_sharding=out_sharding, **params)
        return y, len(batch)
    return _batch(spmm_p, args, dims, batch=batch, out_sharding=out_sharding, **params)


_register(
    spmm_p, _spmm_roles, _spmm_shape, partial(_spmm_columns, _spmm_cpu),
    partial(_spmm_columns, _spmm_cuda),
)  # fmt: skip
ad.primitive_jvps[spmm_p] = _spmm_jvp
ad.primitive_transposes[spmm_p] = _spmm_transpose
batching.primitive_batchers[spmm_p] = _spmm_batch

# ---- decode and sample ----

decode_p = Primitive("flashllm_decode")
sample_p = Primitive("flashllm_sample")


def _decode_shape(index, offsets, values, *, format, shape, columns):
    return jax.ShapeDtypeStruct(_padded(shape, values.shape[0], columns), values.dtype)


def _decode_local(*args, format, shape, columns):
    def one(*w, k):
        out = jax.ShapeDtypeStruct((_padded(shape, w[0].shape[0], 1)[0], k), w[-1].dtype)
        return _call("decode", format, out, *w, m=shape[0], k=k)

    if columns == 1:
        return one(*args, k=shape[1])
    parts = _by_column(shape, columns, *args)
    return jnp.concatenate([one(*w, k=k.stop - k.start) for w, k in parts], axis=1)


def _sample_shape(index, offsets, dense, *, format, shape, columns, capacity):
    return jax.ShapeDtypeStruct((offsets.shape[0], capacity), dense.dtype)


def _sample_local(*args, format, shape, columns, capacity):
    def one(*index, dense):
        out = jax.ShapeDtypeStruct((index[0].shape[0], capacity), dense.dtype)
        return _call("sample", format, out, *index, dense, m=shape[0], k=dense.shape[1])

    *index, dense = args
    if columns == 1:
        return one(*index, dense=dense)
    parts = _by_column(shape, columns, *index)
    return jnp.concatenate([one(*w, dense=dense[:, k]) for w, k in parts])


def _linear_jvp(p, primals, tangents, **params):
    *index, x = primals
    dx = tangents[-1]
    out = p.bind(*index, x, **params)
    if type(dx) is ad.Zero:
        return out, jnp.zeros_like(out)
    return out, p.bind(*index, dx, **params)


def _decode_transpose(ct, *args, batch, **params):
    *index, values = args
    if type(ct) is ad.Zero:
        return [None] * len(args)
    levels = tuple((*level[:-1], True) for level in batch)
    capacity = values.aval.shape[-1]
    bar = sample_p.bind(*index, ct, batch=levels, capacity=capacity, **params)
    return [*[None] * len(index), _shared(bar, batch, 2)]


def _sample_transpose(ct, *args, batch, capacity, **params):
    *index, _ = args
    if type(ct) is ad.Zero:
        return [None] * len(args)
    levels = tuple((*level[:-1], True) for level in batch)
    bar = decode_p.bind(*index, ct, batch=levels, **params)
    return [*[None] * len(index), _shared(bar, batch, 2)]


def _decode_roles(*buffers):
    return _weight_roles(*buffers), (ROWS, COLUMNS)


def _sample_roles(index, offsets, dense):
    return [*_weight_roles(index, offsets), (ROWS, COLUMNS)], (BLOCK, OWN)


_register(decode_p, _decode_roles, _decode_shape, _decode_local, _decode_local)
_register(sample_p, _sample_roles, _sample_shape, _sample_local, _sample_local)
ad.primitive_transposes[decode_p] = _decode_transpose
ad.primitive_transposes[sample_p] = _sample_transpose
for _p in (decode_p, sample_p):
    ad.primitive_jvps[_p] = partial(_linear_jvp, _p)
    batching.primitive_batchers[_p] = partial(_batch, _p)


def cpu_kernels() -> str:
    """The instruction set that CPU products use: "avx512", "avx2" or "portable"."""
    return _flashllm.cpu_kernels()
