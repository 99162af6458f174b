"""Attention: of many new tokens as two products, of one over its cache as one kernel on a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashllm import kernel

_TARGET = "flashllm_decode_attention_v1"
DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn)  # of a cache


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q k^T) v, the softmax in float32.

    q: [B * h, T, d], scaled.   k, v: [B * h, S, d].   mask: bool [B, T, S] or [1, T, S].
    Returns [B * h, T, d]. A row of the mask that is False throughout (a pad) gives a finite mean.
    """
    scores = jnp.einsum("ntd,nsd->nts", q, k, preferred_element_type=jnp.float32)
    by_row = scores.reshape(mask.shape[0], -1, *scores.shape[1:])  # [B, h, T, S]
    by_row = jnp.where(mask[:, None], by_row, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(by_row.reshape(scores.shape), axis=-1).astype(v.dtype)
    return jnp.einsum("nts,nsd->ntd", weights, v)


def decode(
    qkv: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One new token a row: its k and v go to slot `length`, and it attends to what is there.

    qkv: [B, 3, h, d], q not scaled.   keys, values: [B * h, S, d], a layer's cache.
    mask: bool [B, S], the new token's slot included; slots behind it count as closed.
    length: int32 [], held between 0 and S - 1.
    Returns [B, h * d] in qkv's dtype, and keys and values, the same buffers where donated.
    On CUDA one kernel does it all and reads the slots up to `length` alone.
    """
    operands = qkv, keys, values, mask, length
    if not hasattr(kernel._flashllm, "cuda_targets") or not supports(keys):
        return decode_xla(*operands)
    return lax.platform_dependent(*operands, cuda=_decode_cuda, default=decode_xla)


def supports(keys: jax.Array) -> bool:
    """csrc/cuda/attention.cu: a head is up to 32 pieces of 16 bytes of the cache."""
    piece = 16 // keys.dtype.itemsize
    return keys.shape[2] % piece == 0 and keys.shape[2] <= 32 * piece


def _decode_cuda(qkv, keys, values, mask, length):
    B, _, h, d = qkv.shape
    y = jax.ShapeDtypeStruct((B, h * d), qkv.dtype)
    call = jax.ffi.ffi_call(_TARGET, (y, keys, values), input_output_aliases={1: 1, 2: 2})
    y, keys, values = call(qkv, keys, values, mask, length)
    return y, keys, values


def decode_xla(qkv, keys, values, mask, length):
    """`decode` of XLA's ops, which has derivatives and can be mapped."""
    B, _, h, d = qkv.shape
    q, k, v = (qkv[:, i].reshape(B * h, 1, d) for i in range(3))
    slot = jnp.arange(keys.shape[1])
    length = jnp.clip(length, 0, keys.shape[1] - 1)  # as the kernel; XLA counts -1 from the end
    mask = mask & (slot <= length)
    keys, values = put(keys, k, length), put(values, v, length)
    y = attend(q * d**-0.5, keys.astype(q.dtype), values.astype(q.dtype), mask[:, None])
    return y.reshape(B, h * d), keys, values


def put(held: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """`held` [B * h, S, d] with `new` [B * h, T, d] at slots `at` and on."""
    if held.dtype == jnp.float8_e4m3fn:  # it has no Inf: what is past its range would be NaN
        most = float(jnp.finfo(held.dtype).max)
        new = jnp.clip(new, -most, most)
    return lax.dynamic_update_slice(held, new.astype(held.dtype), (0, at, 0))
