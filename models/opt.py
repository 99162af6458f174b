"""OPT in Flax NNX: one forward for training, prefill and decode.

    ids [B, T] -> embed + positions -> layers x (attention, MLP) -> norm -> head -> logits [B, T, V]

Letters: B rows, T new tokens, S key slots, H hidden, h heads, d = H / h, E embedding width, V
vocabulary. Zhang et al., OPT: Open Pre-trained Transformer Language Models (2022).
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from jax_flashllm.attention import attend, decode, supports
from jax_flashllm.chain import Attend, Stage, chain
from jax_flashllm.formats import Format
from jax_flashllm.models.cache import KVCache
from jax_flashllm.models.config import OPTConfig
from jax_flashllm.models.mesh import Layout
from jax_flashllm.nn import SparseDense
from jax_flashllm.spmm import spmm

# The position table starts with two rows that real tokens never use; left pads read row 1.
POSITION_OFFSET = 2
LAYER_NORM_EPSILON = 1e-5
# Weights narrower than the activations are widened this many at a time, so that what a CPU widens
# stays in its cache. Widened whole, OPT-125M's head took 50 ms a token; in pieces, 6 ms.
WIDEN_AT_ONCE = 1 << 20


Implementation = Literal["xla", "cudnn"] | None  # of attention, as jax.nn.dot_product_attention


class Maker(Protocol):
    """Makes the parts of a model. `OPT` asks for each by its name in a checkpoint."""

    def linear(self, names: list[str], in_features: int, out_features: int, bias: bool) -> Any:
        """One layer for `names`, whose outputs, `out_features` in all, lie side by side."""

    def embed(self, name: str, rows: int, features: int) -> Any: ...

    def norm(self, name: str, features: int) -> Any: ...


class Initializer:
    """A maker of Hugging Face's initial values: normal(init_std), zero bias."""

    def __init__(self, config: OPTConfig, rngs: nnx.Rngs, dtype, param_dtype):
        self.normal = jax.nn.initializers.normal(config.init_std)
        self.affine = config.layer_norm_elementwise_affine
        self.kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    def linear(self, names: list[str], in_features: int, out_features: int, bias: bool):
        return nnx.Linear(
            in_features, out_features, use_bias=bias, kernel_init=self.normal, **self.kwargs
        )

    def embed(self, name: str, rows: int, features: int):
        return nnx.Embed(rows, features, embedding_init=self.normal, **self.kwargs)

    def norm(self, name: str, features: int):
        return nnx.LayerNorm(
            features,
            epsilon=LAYER_NORM_EPSILON,
            use_bias=self.affine,
            use_scale=self.affine,
            use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where OPT's outlier features are
            **self.kwargs,
        )


def apply(
    layer, x: jax.Array, activation: str | None = None, layout: Layout | None = None
) -> jax.Array:
    """activation(layer(x)); a sparse layer does bias and activation in its kernel's epilogue.

    layer: nnx.Linear or jax_flashllm.nn.SparseDense.   x: [..., K].   Returns [..., M].
    layout: of a layer whose K is split over a mesh, products are summed before the bias.
    """
    add_up = layout.sum if layout is not None and layout.parts > 1 else None
    if not isinstance(layer, nnx.Linear):
        if add_up is None:
            return layer(x, activation=activation)
        return _add(add_up(spmm(layer.weight, x)), layer.bias)
    kernel = layer.kernel[...]
    if _is_narrow(kernel, x) and kernel.size > WIDEN_AT_ONCE:
        y = _widen_by_input(x, kernel)
        y = _add(y if add_up is None else add_up(y), layer.bias)
    elif add_up is not None:
        y = _add(add_up(x @ kernel.astype(x.dtype)), layer.bias)
    else:
        y = layer(x)
    if activation == "relu":
        return jax.nn.relu(y)
    return jax.nn.gelu(y, approximate=False) if activation == "gelu" else y


class Product(NamedTuple):
    """One of a row of products: x = activation(layer(x)); or h += that, and x = norm(h)."""

    layer: Any
    activation: str | None = None
    add: bool = False
    norm: nnx.LayerNorm | None = None


def apply_row(
    stages: Sequence[Product | Attend], x: jax.Array, h: jax.Array
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """h and x after all `stages`, and keys and values of each attention in turn.

    As few calls of `chain` as there can be, with what cannot be part of one in between.
    x: [..., K] of the first.   h: [..., H], the residual stream.
    """
    rest, held = list(stages), []
    while rest:
        can_chain = functools.partial(_can_chain, dtypes=(x.dtype, h.dtype))
        run = list(itertools.takewhile(can_chain, rest))
        if any(isinstance(s, Product) for s in run):
            row = [s if isinstance(s, Attend) else _stage(s) for s in run]
            h, x, *kv = chain(x, h, row, LAYER_NORM_EPSILON)
            held += kv
            del rest[: len(run)]
            continue
        s = rest.pop(0)
        if isinstance(s, Attend):
            x, *kv = s(x)
            held += kv
            continue
        y = apply(s.layer, x, s.activation)
        if s.add:
            h = h + y
            x = h if s.norm is None else s.norm(h)
        else:
            x = y
    return h, x, held


def _can_chain(p: Product | Attend, dtypes: tuple) -> bool:
    """Whether a stage of a chain gives what layer and norm give, in these dtypes."""
    if isinstance(p, Attend):
        return supports(p.keys)
    parts = (p.layer, p.norm) if p.add else (p.layer,)
    return isinstance(p.layer, SparseDense) and all(
        part is not None and part.dtype is not None and jnp.dtype(part.dtype) == dtype
        for part in parts
        for dtype in dtypes
    )


def _stage(p: Product) -> Stage:
    vectors = p.layer.bias, getattr(p.norm, "scale", None), getattr(p.norm, "bias", None)
    # In the dtype of the layer, as that itself takes them.
    bias, scale, shift = (None if v is None else v[...].astype(p.layer.dtype) for v in vectors)
    return Stage(p.layer.weight, bias, p.activation, p.add, scale, shift)


def _add(y: jax.Array, bias: nnx.Variable | None) -> jax.Array:
    return y if bias is None else y + bias[...].astype(y.dtype)


def _is_narrow(kernel: jax.Array, x: jax.Array) -> bool:
    return kernel.dtype.itemsize < x.dtype.itemsize


def _widen_by_input(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., K] @ kernel [K, M], a run of rows of the kernel at a time."""
    K, M = kernel.shape
    n = max(WIDEN_AT_ONCE // M, 1)

    def add(y, start, rows):
        part = lax.dynamic_slice_in_dim(kernel, start, rows).astype(x.dtype)
        return y + lax.dynamic_slice_in_dim(x, start, rows, axis=-1) @ part

    y = jnp.zeros((*x.shape[:-1], M), x.dtype)
    y = lax.fori_loop(0, K // n, lambda i, y: add(y, i * n, n), y)
    return add(y, K - K % n, K % n) if K % n else y


def _widen_by_output(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [B, T, E] @ table.T, table [V, E], a run of rows of the table at a time."""
    V, E = table.shape
    n = min(max(WIDEN_AT_ONCE // E, 1), V)

    def chunk(i, y):
        start = jnp.minimum(i * n, V - n)  # the last one overlaps
        rows = lax.dynamic_slice_in_dim(table, start, n).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(y, x @ rows.T, start, axis=2)

    return lax.fori_loop(0, -(-V // n), chunk, jnp.zeros((*x.shape[:2], V), x.dtype))


class Attention(nnx.Module):
    """Causal self-attention; q, k and v come from one [3H, H] product."""

    def __init__(self, config: OPTConfig, make: Maker, name: str, layout: Layout | None = None):
        H, bias = config.hidden_size, config.enable_bias
        self.layout = layout
        self.num_heads = config.num_attention_heads // (layout.parts if layout else 1)
        self.qkv_proj = make.linear([f"{name}.{x}_proj" for x in "qkv"], H, 3 * H, bias)
        self.out_proj = make.linear([f"{name}.out_proj"], H, H, bias)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        implementation: Implementation = None,
        cache: KVCache | None = None,
        layer: int = 0,
        empty: bool = False,
    ):
        """x: [B, T, H].   mask: bool [B, T, S] or [1, T, S], or None for plain causal where S = T.

        empty: nothing is in the cache yet, so the new tokens attend to one another, and S = T.
        `implementation` counts where they do.
        Returns [B, T, H] and, with a cache, the layer's keys and values after this.
        """
        B, T, _ = x.shape
        qkv = apply(self.qkv_proj, x).reshape(B, T, 3, self.num_heads, -1)
        if T == 1 and cache is not None and mask is not None and not empty:
            held = cache.keys[layer], cache.values[layer]
            y, *kv = decode(qkv[:, 0], *held, mask[:, 0], cache.length)
            return apply(self.out_proj, y[:, None], None, self.layout), tuple(kv)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, T, h, d]
        q = q * q.shape[-1] ** -0.5  # after the bias, as OPT was trained
        # [B, T, h, d] -> [B * h, T, d]
        Q, K, V = (a.swapaxes(1, 2).reshape(B * self.num_heads, T, -1) for a in (q, k, v))
        kv = None if cache is None else cache.write(layer, K, V)
        if (cache is None or empty) and implementation is not None:
            mask = None if mask is None else mask[:, None]
            y = jax.nn.dot_product_attention(
                q, k, v, mask=mask, scale=1.0, is_causal=mask is None, implementation=implementation
            )
        else:
            if kv is not None and not empty:
                K, V = (a.astype(q.dtype) for a in kv)
            if mask is None:
                mask = jnp.tril(jnp.ones((1, T, T), bool))
            y = attend(Q, K, V, mask).reshape(B, self.num_heads, T, -1).swapaxes(1, 2)
        return apply(self.out_proj, y.reshape(B, T, -1), None, self.layout), kv


class DecoderLayer(nnx.Module):
    def __init__(self, config: OPTConfig, make: Maker, name: str, layout: Layout | None = None):
        H, F, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        self.layout = layout
        self.pre_norm = config.do_layer_norm_before
        self.activation = config.activation_function
        self.self_attn_layer_norm = make.norm(f"{name}.self_attn_layer_norm", H)
        self.self_attn = Attention(config, make, f"{name}.self_attn", layout)
        self.final_layer_norm = make.norm(f"{name}.final_layer_norm", H)
        self.fc1 = make.linear([f"{name}.fc1"], H, F, bias)
        self.fc2 = make.linear([f"{name}.fc2"], F, H, bias)

    def __call__(self, x: jax.Array, *attention):
        """x: [B, T, H]; `attention` goes to `Attention`.   Returns [B, T, H] and (keys, values)."""
        y, kv = self.self_attn(self.self_attn_layer_norm(x) if self.pre_norm else x, *attention)
        x = x + y
        x = x if self.pre_norm else self.self_attn_layer_norm(x)
        y = self.final_layer_norm(x) if self.pre_norm else x
        y = apply(self.fc1, y, self.activation)
        x = x + apply(self.fc2, y, None, self.layout)
        return x if self.pre_norm else self.final_layer_norm(x), kv


class OPT(nnx.Module):
    """The whole decoder with its head.

    rngs: draws the initial parameters.   param_dtype: of those parameters.
    dtype: of activations and products; softmax, norm statistics and logits are float32.
    attention_implementation: None, or "xla" or "cudnn" for `jax.nn.dot_product_attention`;
      "cudnn" needs a CUDA GPU and a 16-bit dtype.
    make: makes the parts instead of drawing them from `rngs` (`load` passes one).
    layout: how they are split over a mesh; only `load` makes such parts.
    """

    def __init__(
        self,
        config: OPTConfig,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        attention_implementation: Implementation = None,
        make: Maker | None = None,
        layout: Layout | None = None,
    ):
        if make is None:
            if rngs is None:
                raise ValueError("OPT: pass rngs=nnx.Rngs(seed) to draw initial parameters from.")
            make = Initializer(config, rngs, dtype, param_dtype)
        self.config = config
        self.layout = layout
        self.dtype = jnp.dtype(dtype)
        self.attention_implementation = attention_implementation
        H, E, V = config.hidden_size, config.embed_dim, config.vocab_size
        rows = config.max_position_embeddings + POSITION_OFFSET
        self.embed_tokens = make.embed("embed_tokens", V, E)
        self.embed_positions = make.embed("embed_positions", rows, H)
        self.project_in = self.project_out = nnx.data(None)
        if config.has_projections:
            self.project_in = make.linear(["project_in"], E, H, False)
            self.project_out = make.linear(["project_out"], H, E, False)
        self.layers = nnx.List(
            [
                DecoderLayer(config, make, f"layers.{i}", layout)
                for i in range(config.num_hidden_layers)
            ]
        )
        self.final_layer_norm = nnx.data(None)
        if config.has_final_layer_norm:
            self.final_layer_norm = make.norm("final_layer_norm", H)
        self.lm_head = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = make.linear(["lm_head"], E, V, False)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        empty: bool = False,
    ):
        """Logits of the next token after every position.

        input_ids: int [B, T].   attention_mask: [B, T], nonzero for tokens, zero for left pads;
        None when there are none.   cache: holds what came before, with T free slots at least.
        last_only: logits after the last position alone, T = 1 in the result.
        empty: the cache is new, so that attention need not look into it.
        Returns float32 [B, T, V], and the cache with the new tokens in it if one was passed. Rows
        at pads mean nothing. Raises ValueError where shapes disagree.
        """
        self._check(input_ids, attention_mask, cache)
        if self.layout is not None:
            return self.layout.forward(self, input_ids, attention_mask, cache, last_only, empty)
        return self._forward(input_ids, attention_mask, cache, last_only, empty)

    def _forward(self, input_ids, attention_mask, cache, last_only, empty):
        """`__call__` on one device, or on one device's part of everything."""
        B, T = input_ids.shape
        if cache is not None:
            new = jnp.ones((B, T), bool) if attention_mask is None else attention_mask != 0
            valid, positions, mask = cache.mark(new)
            mask = mask[:, :, :T] if empty else mask
        elif attention_mask is None:
            positions, mask = jnp.arange(T)[None], None
        else:
            new = attention_mask.astype(jnp.int32)
            positions = jnp.cumsum(new, axis=1) * new - 1
            mask = jnp.tril(jnp.ones((T, T), bool)) & (new > 0)[:, None, :]

        x = self.embed(input_ids, positions)
        if T == 1 and cache is not None and mask is not None and not empty and self._has_rows:
            x, written = self._next(x, mask, cache)
        else:
            written = []
            for i, layer in enumerate(self.layers):
                x, kv = layer(x, mask, self.attention_implementation, cache, i, empty)
                written.append(kv)
            if last_only:
                x = x[:, -1:]
            if self.final_layer_norm is not None:
                x = self.final_layer_norm(x)
        if self.project_out is not None:
            x = apply(self.project_out, x)
        logits = self._head(x)
        if self.layout is not None:
            logits = self.layout.gather(logits)
        if cache is None:
            return logits
        keys, values = zip(*written, strict=True) if written else ((), ())
        return logits, KVCache(keys, values, valid, cache.length + T)

    @property
    def _has_rows(self) -> bool:
        """Whether a residual stream passes from attention to attention, on one device."""
        return self.config.do_layer_norm_before and self.layout is None and len(self.layers) > 0

    def _next(self, h: jax.Array, mask: jax.Array, cache: KVCache):
        """The layers and the last norm for one token, h [B, 1, H], after what the cache holds.

        They are one row: where all is sparse, one call.
        """
        row = []
        for i, layer in enumerate(self.layers):
            attention = layer.self_attn
            after = self.layers[i + 1] if i + 1 < len(self.layers) else None
            norm = self.final_layer_norm if after is None else after.self_attn_layer_norm
            row += [
                Product(attention.qkv_proj),
                Attend(cache.keys[i], cache.values[i], mask[:, 0], cache.length),
                Product(attention.out_proj, add=True, norm=layer.final_layer_norm),
                Product(layer.fc1, layer.activation),
                Product(layer.fc2, add=True, norm=norm),
            ]
        _, x, held = apply_row(row, self.layers[0].self_attn_layer_norm(h), h)
        return x, list(zip(held[::2], held[1::2], strict=True))

    def embed(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """What the first layer sees, [B, T, H].   input_ids: int [B, T].   positions: from 0."""
        table = self.embed_tokens.embedding[...]
        x = table[input_ids] if self.layout is None else self.layout.embed(table, input_ids)
        x = x.astype(self.dtype)
        if self.project_in is not None:
            x = apply(self.project_in, x)
        return x + self.embed_positions.embedding[...][positions + POSITION_OFFSET].astype(
            self.dtype
        )

    def _check(self, input_ids, attention_mask, cache) -> None:
        if input_ids.ndim != 2:
            raise ValueError(
                f"OPT: input_ids has shape {input_ids.shape}; pass [B, T], a row per sequence."
            )
        if not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise TypeError(f"OPT: input_ids is {input_ids.dtype}; pass token ids, e.g. int32.")
        most = self.config.max_position_embeddings
        if not 1 <= input_ids.shape[1] <= most:
            raise ValueError(
                f"OPT: input_ids has {input_ids.shape[1]} tokens a row; this model takes 1 to "
                f"{most}."
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"OPT: attention_mask is {attention_mask.shape} but input_ids is "
                f"{input_ids.shape}; pass a mask of the ids' own shape."
            )
        B, T = input_ids.shape
        if cache is not None and (cache.valid.shape[0] != B or cache.slots < T):
            raise ValueError(
                f"OPT: input_ids is {input_ids.shape} but the cache has {cache.valid.shape[0]} "
                f"rows of {cache.slots} slots; make one with KVCache.create(config, {B}, slots)."
            )

    def _head(self, x: jax.Array) -> jax.Array:
        """[B, T, E] -> float32 [B, T, V]; 16-bit products accumulate and stay in float32."""
        if self.lm_head is None:
            table, contract = self.embed_tokens.embedding[...], 1  # [V, E]
            if _is_narrow(table, x) and table.size > WIDEN_AT_ONCE:
                return _widen_by_output(x, table).astype(jnp.float32)
        elif isinstance(self.lm_head, nnx.Linear) and x.dtype.itemsize == 2:
            table, contract = self.lm_head.kernel[...], 0  # [E, V]
        else:
            return apply(self.lm_head, x).astype(jnp.float32)
        return lax.dot_general(
            x,
            table.astype(x.dtype),
            (((2,), (contract,)), ((), ())),
            preferred_element_type=jnp.float32,
        )


def load(
    path: str | os.PathLike,
    dtype: Any = None,
    attention_implementation: Implementation = None,
    *,
    mesh: Mesh | None = None,
    tensor: str = "tp",
    data: str = "dp",
    format: Format = "auto",
) -> OPT:
    """The model of a Hugging Face OPT directory: dense, dense with zeros, or packed by us.

    dtype: float16, bfloat16 or float32 for activations; weights are cast to the first two, and
      kept as they are stored for float32. None is float32 on a CPU, with weights as stored, and
      the checkpoint's own dtype elsewhere.
    attention_implementation: see `OPT`.
    mesh: puts each device's part of the weights there, and nothing else (docs/sharding.md). Its
      axis `tensor` splits heads, FFN and vocabulary, `data` rows of a batch; one may be missing.
    format: of sparse matrices, as in `jax_flashllm.encode`. "delta_csr" decodes faster on a GPU for
      up to four rows from about 70% sparsity on, eight from 85%; it reads prompts more slowly.

    Matrices stored as sparse bitmasks, or of which 30% and more are zero, become
    `jax_flashllm.nn.SparseDense`; q, k and v count as one. A float32 matrix does so only if its
    values are exact in 16 bits; no value is rounded that `dtype` did not ask to round. bfloat16
    matrices that meet float32 activations become SparseDense too, full or not: it is faster.
    Memory: the weights once, and one matrix on its way; on a mesh the host holds that matrix only.
    Raises CheckpointError, a ValueError, for files, configs and tensors that do not fit together,
    naming the tensor; ValueError for what does not fit the device, and for values that `dtype` has
    no room for.
    """
    from jax_flashllm.models import weights

    return weights.load(path, dtype, attention_implementation, mesh, tensor, data, format)
