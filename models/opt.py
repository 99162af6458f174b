"""OPT in Flax NNX: one forward for training, prefill and decode.

    ids [B, T] -> embed + positions -> layers x (attention, MLP) -> norm -> head -> logits [B, T, V]

Letters: B rows, T new tokens, S cache slots, H hidden, h heads, d = H / h, V vocabulary.
Zhang et al., OPT: Open Pre-trained Transformer Language Models (2022).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_flashllm.models.config import OPTConfig

# The position table starts with two rows that real tokens never use; left pads read row 1.
POSITION_OFFSET = 2
LAYER_NORM_EPSILON = 1e-5


class Initializer:
    """Makes the parts of a model with Hugging Face's initial values: normal, zero bias."""

    def __init__(self, config: OPTConfig, rngs: nnx.Rngs, dtype, param_dtype):
        self.normal = jax.nn.initializers.normal(config.init_std)
        self.affine = config.layer_norm_elementwise_affine
        self.kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def linear(self, in_features: int, out_features: int, use_bias: bool) -> nnx.Linear:
        return nnx.Linear(
            in_features, out_features, use_bias=use_bias, kernel_init=self.normal, **self.kwargs
        )

    def embed(self, rows: int, features: int) -> nnx.Embed:
        return nnx.Embed(rows, features, embedding_init=self.normal, **self.kwargs)

    def norm(self, features: int) -> nnx.LayerNorm:
        return nnx.LayerNorm(
            features,
            epsilon=LAYER_NORM_EPSILON,
            use_bias=self.affine,
            use_scale=self.affine,
            use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where OPT's outlier features are
            **self.kwargs,
        )


def apply(layer, x: jax.Array, activation: str | None = None) -> jax.Array:
    """activation(layer(x)); a sparse layer does bias and activation in its kernel's epilogue.

    layer: nnx.Linear or jax_flashllm.nn.SparseDense.   x: [..., K].   Returns [..., M].
    """
    if not isinstance(layer, nnx.Linear):
        return layer(x, activation=activation)
    y = layer(x)
    if activation == "relu":
        return jax.nn.relu(y)
    return jax.nn.gelu(y, approximate=False) if activation == "gelu" else y


class Attention(nnx.Module):
    """Causal self-attention; q, k and v come from one [H, 3H] product."""

    def __init__(self, config: OPTConfig, make: Initializer):
        self.num_heads = config.num_attention_heads
        self.qkv_proj = make.linear(config.hidden_size, 3 * config.hidden_size, config.enable_bias)
        self.out_proj = make.linear(config.hidden_size, config.hidden_size, config.enable_bias)

    def __call__(self, x: jax.Array, mask: jax.Array | None, implementation: str | None):
        """x: [B, T, H].   mask: bool [B, 1, T, T], None for plain causal.   Returns [B, T, H]."""
        B, T, H = x.shape
        qkv = apply(self.qkv_proj, x).reshape(B, T, 3, self.num_heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, T, h, d]
        q = q * q.shape[-1] ** -0.5  # after the bias, as OPT was trained
        y = jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=1.0, is_causal=mask is None, implementation=implementation
        )
        return apply(self.out_proj, y.reshape(B, T, H))


class DecoderLayer(nnx.Module):
    def __init__(self, config: OPTConfig, make: Initializer):
        self.pre_norm = config.do_layer_norm_before
        self.activation = config.activation_function
        self.self_attn_layer_norm = make.norm(config.hidden_size)
        self.self_attn = Attention(config, make)
        self.final_layer_norm = make.norm(config.hidden_size)
        self.fc1 = make.linear(config.hidden_size, config.ffn_dim, config.enable_bias)
        self.fc2 = make.linear(config.ffn_dim, config.hidden_size, config.enable_bias)

    def __call__(self, x: jax.Array, mask: jax.Array | None, implementation: str | None):
        """x: [B, T, H].   Returns [B, T, H]."""
        y = self.self_attn_layer_norm(x) if self.pre_norm else x
        x = x + self.self_attn(y, mask, implementation)
        x = x if self.pre_norm else self.self_attn_layer_norm(x)
        y = self.final_layer_norm(x) if self.pre_norm else x
        x = x + apply(self.fc2, apply(self.fc1, y, self.activation))
        return x if self.pre_norm else self.final_layer_norm(x)


class OPT(nnx.Module):
    """The whole decoder with its head.

    dtype: of activations and products; softmax, norm statistics and logits are float32.
    param_dtype: of the parameters made here.
    attention_implementation: None, "xla" or "cudnn", as in `jax.nn.dot_product_attention`;
      "cudnn" needs a CUDA GPU and a 16-bit dtype.
    """

    def __init__(
        self,
        config: OPTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        attention_implementation: str | None = None,
    ):
        make = Initializer(config, rngs, dtype, param_dtype)
        self.config = config
        self.dtype = dtype
        self.attention_implementation = attention_implementation
        rows = config.max_position_embeddings + POSITION_OFFSET
        self.embed_tokens = make.embed(config.vocab_size, config.word_embed_proj_dim)
        self.embed_positions = make.embed(rows, config.hidden_size)
        self.project_in = self.project_out = nnx.data(None)
        if config.has_projections:
            self.project_in = make.linear(config.word_embed_proj_dim, config.hidden_size, False)
            self.project_out = make.linear(config.hidden_size, config.word_embed_proj_dim, False)
        self.layers = nnx.List(
            [DecoderLayer(config, make) for _ in range(config.num_hidden_layers)]
        )
        self.final_layer_norm = nnx.data(None)
        if config.has_final_layer_norm:
            self.final_layer_norm = make.norm(config.hidden_size)
        self.lm_head = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = make.linear(config.word_embed_proj_dim, config.vocab_size, False)

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Logits of the next token after every position.

        input_ids: int [B, T].   attention_mask: [B, T], nonzero for tokens, zero for left pads;
        None when there are none.   Returns float32 [B, T, V]; rows at pads mean nothing.
        """
        T = input_ids.shape[1]
        if attention_mask is None:
            positions, mask = jnp.arange(T)[None], None
        else:
            valid = attention_mask.astype(jnp.int32)
            positions = jnp.cumsum(valid, axis=1) * valid - 1
            causal = jnp.tril(jnp.ones((T, T), bool))
            mask = causal & (valid > 0)[:, None, None, :]
        x = self.embed_tokens.embedding[...][input_ids].astype(self.dtype)
        if self.project_in is not None:
            x = apply(self.project_in, x)
        x = x + self.embed_positions.embedding[...][positions + POSITION_OFFSET].astype(self.dtype)
        for layer in self.layers:
            x = layer(x, mask, self.attention_implementation)
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        if self.project_out is not None:
            x = apply(self.project_out, x)
        return self._head(x)

    def _head(self, x: jax.Array) -> jax.Array:
        """[B, T, E] -> float32 [B, T, V]; 16-bit products accumulate and stay in float32."""
        if self.lm_head is None:
            kernel, contract = self.embed_tokens.embedding[...], 1  # [V, E]
        elif isinstance(self.lm_head, nnx.Linear):
            kernel, contract = self.lm_head.kernel[...], 0  # [E, V]
        else:
            return apply(self.lm_head, x).astype(jnp.float32)
        return jax.lax.dot_general(
            x,
            kernel.astype(x.dtype),
            (((2,), (contract,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
