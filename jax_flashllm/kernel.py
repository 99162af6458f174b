"""The one-device primitives: FFI targets, abstract evaluation, lowerings, batching, derivatives.

    spmm_p    index..., values, x, bias -> act(x W^T + bias)   x [..., K] -> [..., S R]
    decode_p  index..., values          -> W                   [S R, K]
    sample_p  index..., dense [S R, K]  -> values              [S, capacity]

`index` is the two index buffers of the format, S the row blocks of R rows, M <= S R. W is
linear in its values: `decode_p` and `sample_p` are each other's transposes, and the
derivatives of `spmm_p` are products with the decoded W.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_flashllm import _flashllm

ACTIVATIONS = {
    None: (0, lambda z: z),
    "relu": (1, jax.nn.relu),
    "gelu": (2, partial(jax.nn.gelu, approximate=False)),
}
NO_BIAS = (0,)  # the shape of an absent bias

_HAS_CUDA = hasattr(_flashllm, "cuda_targets")


def _register_targets():
    for name, capsule in _flashllm.cpu_targets().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    if _HAS_CUDA:
        # Spelt in capitals: lower-case "cuda" is a queue that the CUDA plugin never reads.
        for name, stages in _flashllm.cuda_targets().items():
            jax.ffi.register_ffi_target(name, stages, platform="CUDA")


_register_targets()


def _shard_rows(shape, shards: int) -> int:
    return -(-shape[0] // shards)


# ---- lowering ----


def _call(op: str, format: str, out, *operands, **attributes):
    target = f"flashllm_{op}_{format}_v1"
    return jax.ffi.ffi_call(target, out)(*operands, **attributes)


def _no_cuda(ctx, *args, **params):
    raise NotImplementedError(
        "jax_flashllm was built without CUDA: put nvcc (CUDA 12.8 or newer) on the PATH and "
        "install again with `pip install . -C cmake.define.FLASHLLM_CUDA=ON`"
    )


def _register(p: Primitive, abstract_eval, cpu, cuda):
    p.def_impl(partial(xla.apply_primitive, p))
    p.def_abstract_eval(abstract_eval)
    mlir.register_lowering(p, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")
    cuda_rule = mlir.lower_fun(cuda, multiple_results=False) if _HAS_CUDA else _no_cuda
    mlir.register_lowering(p, cuda_rule, platform="cuda")


# ---- spmm ----

spmm_p = Primitive("flashllm_spmm")


def _spmm_abstract(*args, format, shape, activation):
    *_, values, x, bias = args
    rows = values.shape[0] * _shard_rows(shape, values.shape[0])
    if x.shape[-1] != shape[1]:
        raise ValueError(
            f"spmm: x has {x.shape[-1]} features but W is [{shape[0]}, {shape[1]}]; pass x of "
            f"shape [..., {shape[1]}]"
        )
    if bias.shape not in (NO_BIAS, (rows,)):
        raise ValueError(f"spmm: bias is {list(bias.shape)}, expected [{rows}]")
    return x.update(shape=(*x.shape[:-1], rows), weak_type=False)


def _spmm_cpu(*args, format, shape, activation):
    *_, values, x, _bias = args
    rows = values.shape[0] * _shard_rows(shape, values.shape[0])
    out = jax.ShapeDtypeStruct((*x.shape[:-1], rows), x.dtype)
    code = ACTIVATIONS[activation][0]
    return _call("spmm", format, out, *args, m=shape[0], k=shape[1], activation=code)


def _spmm_cuda(*args, **params):
    from jax_flashllm import plan

    return plan.spmm(_call, *args, **params)


def _spmm_jvp(primals, tangents, *, format, shape, activation):
    *index, values, x, bias = primals
    *_, dvalues, dx, dbias = tangents
    linear = partial(spmm_p.bind, format=format, shape=shape, activation=None)
    none = jnp.zeros(NO_BIAS, x.dtype)
    z = linear(*index, values, x, bias)
    dz = []
    if type(dx) is not ad.Zero:
        dz.append(linear(*index, values, dx, none))
    if type(dvalues) is not ad.Zero:
        dz.append(linear(*index, dvalues, x, none))
    if type(dbias) is not ad.Zero and dbias.size:
        dz.append(jnp.broadcast_to(dbias.astype(z.dtype), z.shape))
    if not dz:
        return ACTIVATIONS[activation][1](z), jnp.zeros_like(z)
    return jax.jvp(ACTIVATIONS[activation][1], (z,), (sum(dz[1:], dz[0]),))


def _spmm_transpose(ct, *args, format, shape, activation):
    # y = x W^T, so x_bar = y_bar W and W_bar = y_bar^T x, of which the stored part is kept.
    # Gradients do not meet a bias here, since the JVP rule takes it apart; linear_transpose may.
    if activation is not None:
        raise NotImplementedError(f"spmm: with activation {activation!r} it is not linear")
    *index, values, x, bias = args
    x_bar = values_bar = bias_bar = None
    if type(ct) is ad.Zero:
        return [None] * len(args)
    if ad.is_undefined_primal(x):
        dense = decode_p.bind(*index, values, format=format, shape=shape)
        x_bar = jnp.matmul(ct, dense, preferred_element_type=jnp.float32).astype(x.aval.dtype)
    if ad.is_undefined_primal(values):
        n = math.prod(x.shape[:-1])
        dense_bar = jnp.matmul(
            ct.reshape(n, -1).T, x.reshape(n, -1), preferred_element_type=jnp.float32
        ).astype(values.aval.dtype)
        values_bar = sample_p.bind(
            *index, dense_bar, format=format, shape=shape, capacity=values.aval.shape[1]
        )
    if ad.is_undefined_primal(bias) and bias.aval.size:
        bias_bar = ct.reshape(-1, ct.shape[-1]).sum(0, dtype=jnp.float32).astype(bias.aval.dtype)
    return [*[None] * len(index), values_bar, x_bar, bias_bar]


def _map_over(p, args, dims, params):
    """Batching for anything batched in W or bias: one call an element, in a loop."""
    batched = [d is not None for d in dims]
    moved = [jnp.moveaxis(a, d, 0) if b else a for a, d, b in zip(args, dims, batched, strict=True)]

    def one(slices):
        it = iter(slices)
        return p.bind(
            *[next(it) if b else a for a, b in zip(moved, batched, strict=True)], **params
        )

    return lax.map(one, [a for a, b in zip(moved, batched, strict=True) if b]), 0


def _spmm_batch(args, dims, **params):
    *w_dims, x_dim, bias_dim = dims
    if bias_dim is None and all(d is None for d in w_dims):
        # More tokens of the same weight: one more leading axis, one product.
        *rest, x, bias = args
        return spmm_p.bind(*rest, jnp.moveaxis(x, x_dim, 0), bias, **params), 0
    return _map_over(spmm_p, args, dims, params)


_register(spmm_p, _spmm_abstract, _spmm_cpu, _spmm_cuda)
ad.primitive_jvps[spmm_p] = _spmm_jvp
ad.primitive_transposes[spmm_p] = _spmm_transpose
batching.primitive_batchers[spmm_p] = _spmm_batch

# ---- decode and sample ----

decode_p = Primitive("flashllm_decode")
sample_p = Primitive("flashllm_sample")


def _dense_shape(shards, shape):
    return shards * _shard_rows(shape, shards), shape[1]


def _decode_abstract(*args, format, shape):
    values = args[-1]
    return values.update(shape=_dense_shape(values.shape[0], shape), weak_type=False)


def _decode_lowered(*args, format, shape):
    values = args[-1]
    out = jax.ShapeDtypeStruct(_dense_shape(values.shape[0], shape), values.dtype)
    return _call("decode", format, out, *args, m=shape[0], k=shape[1])


def _sample_abstract(*args, format, shape, capacity):
    *_, offsets, dense = args
    return dense.update(shape=(offsets.shape[0], capacity), weak_type=False)


def _sample_lowered(*args, format, shape, capacity):
    *_, offsets, dense = args
    out = jax.ShapeDtypeStruct((offsets.shape[0], capacity), dense.dtype)
    return _call("sample", format, out, *args, m=shape[0], k=shape[1])


def _linear_jvp(p, primals, tangents, **params):
    *index, x = primals
    dx = tangents[-1]
    out = p.bind(*index, x, **params)
    if type(dx) is ad.Zero:
        return out, jnp.zeros_like(out)
    return out, p.bind(*index, dx, **params)


def _decode_transpose(ct, *args, format, shape):
    *index, values = args
    if type(ct) is ad.Zero:
        return [None] * len(args)
    capacity = values.aval.shape[1]
    bar = sample_p.bind(*index, ct, format=format, shape=shape, capacity=capacity)
    return [*[None] * len(index), bar]


def _sample_transpose(ct, *args, format, shape, capacity):
    *index, _ = args
    if type(ct) is ad.Zero:
        return [None] * len(args)
    return [*[None] * len(index), decode_p.bind(*index, ct, format=format, shape=shape)]


_register(decode_p, _decode_abstract, _decode_lowered, _decode_lowered)
_register(sample_p, _sample_abstract, _sample_lowered, _sample_lowered)
ad.primitive_transposes[decode_p] = _decode_transpose
ad.primitive_transposes[sample_p] = _sample_transpose
for _p in (decode_p, sample_p):
    ad.primitive_jvps[_p] = partial(_linear_jvp, _p)
    batching.primitive_batchers[_p] = lambda args, dims, _p=_p, **params: _map_over(
        _p, args, dims, params
    )


def cpu_kernels() -> str:
    """The instruction set that CPU products use: "avx512", "avx2" or "portable"."""
    return _flashllm.cpu_kernels()
