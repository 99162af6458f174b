"""The key-value cache: slots written once, read by every later token.

    keys, values  per layer [B * h, S, d]    S slots, allocated up front
    valid         bool [B, S]                False for left pads and for slots not yet written
    length        int32 []                   slots written so far, pads included

Rows and heads share one axis because the products of attention then read the updated buffer as it
is. With [B, S, h, d], XLA's CPU backend transposed all of it at every token: 3 times slower at 128
slots, 14 times at 512.

It is a pytree and every forward returns a new one: donate it to `jax.jit` and the buffers are
updated in place, at addresses that stay put.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashllm.attention import put
from jax_flashllm.models.config import OPTConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    valid: jax.Array
    length: jax.Array

    @classmethod
    def create(cls, config: OPTConfig, batch: int, slots: int, dtype: Any) -> KVCache:
        """An empty cache for `batch` rows of `slots` tokens, in any of attention.py's DTYPES."""
        shape = (batch * config.num_attention_heads, slots, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
            values=tuple(jnp.zeros(shape, dtype) for _ in layers),
            valid=jnp.zeros((batch, slots), bool),
            length=jnp.zeros((), jnp.int32),
        )

    @property
    def slots(self) -> int:
        return self.valid.shape[1]

    def mark(self, new: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Where T new tokens stand, of which `new`, bool [B, T], says which are not pads.

        Returns valid [B, S] after them, their positions [B, T] (-1 at pads) and the attention
        mask [B, T, S]: slot s is open to new token t when it is valid and not after it.
        """
        T = new.shape[1]
        count = new.astype(jnp.int32)
        seen = jnp.sum(self.valid, axis=1, keepdims=True, dtype=jnp.int32)
        positions = (seen + jnp.cumsum(count, axis=1)) * count - 1
        valid = lax.dynamic_update_slice(self.valid, new, (0, self.length))
        causal = jnp.arange(self.slots) <= self.length + jnp.arange(T)[:, None]
        return valid, positions, causal & valid[:, None, :]

    def write(self, layer: int, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Layer `layer`'s keys and values with k and v, [B * h, T, d], put at the next slots."""
        return put(self.keys[layer], k, self.length), put(self.values[layer], v, self.length)
