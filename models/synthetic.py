"""Random models of any OPT size, made on the device layer by layer, to measure and not to talk to.

Every matrix has buffers of its own, drawn there: no checkpoint, and nothing passes the host. Masks
are Bernoulli, so tiles differ as those of a pruned model do; values are +-[2^-6, 2^-5), even. A
bitmap is drawn as it is, Delta-CSR is encoded from one dense matrix at a time.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jax_flashllm.formats import Bitmap, Format, SparseWeight, encode
from jax_flashllm.formats.bitmap import BAND_ROWS, BLOCK_TILES, TILE_COLS
from jax_flashllm.formats.weight import VECTOR
from jax_flashllm.models.config import OPTConfig
from jax_flashllm.models.opt import LAYER_NORM_EPSILON, OPT
from jax_flashllm.nn import SparseDense

# Sign and mantissa of a random 16-bit word, and the exponent of 2^-6.
_BITS = {
    np.dtype(np.float16): (0x83FF, (15 - 6) << 10),
    np.dtype(jnp.bfloat16): (0x807F, (127 - 6) << 7),
}
_PROBABILITY_BITS = 16


def synthesize(
    config: OPTConfig, sparsity: float | None, dtype: Any, seed: int = 0, format: Format = "bitmap"
) -> OPT:
    """A model whose layers are `sparsity` sparse, or dense where it is None.

    dtype: float16 or bfloat16, of weights and activations.   format: as for `encode`.
    """
    maker = _Maker(sparsity, dtype, seed, config.layer_norm_elementwise_affine, format)
    model = OPT(config, make=maker, dtype=dtype)
    maker.check()
    return model


class _Maker:
    """A maker (`opt.Maker`) of random parts."""

    def __init__(
        self,
        sparsity: float | None,
        dtype: Any,
        seed: int,
        affine: bool = True,
        format: Format = "bitmap",
    ):
        self.sparsity, self.dtype, self.affine = sparsity, np.dtype(dtype), affine
        self.format: Format = format
        # XLA's own generator: threefry takes longer to compile and to run.
        self.key = jax.random.key(seed, impl="rbg")
        self.room: list[tuple[jax.Array, int]] = []

    def linear(self, names: list[str], in_features: int, out_features: int, bias: bool):
        b = self._values(1, out_features)[0] if bias else None
        if self.sparsity is not None and "." in names[0]:
            w = self._sparse(out_features, in_features)
            return SparseDense.from_encoded(w, b, self.dtype)
        kernel = self._values(in_features, out_features)
        return nnx.Linear(
            in_features, out_features, use_bias=bias, dtype=self.dtype, param_dtype=self.dtype,
            kernel_init=lambda *_: kernel, bias_init=lambda *_: b, rngs=_NO_KEYS,
        )  # fmt: skip

    def embed(self, name: str, rows: int, features: int):
        table = self._values(rows, features)
        return nnx.Embed(
            rows, features, dtype=self.dtype, param_dtype=self.dtype, rngs=_NO_KEYS,
            embedding_init=lambda *_: table,
        )  # fmt: skip

    def norm(self, name: str, features: int):
        one, zero = jnp.ones(features, self.dtype), jnp.zeros(features, self.dtype)
        return nnx.LayerNorm(
            features, epsilon=LAYER_NORM_EPSILON, dtype=self.dtype, rngs=_NO_KEYS,
            use_bias=self.affine, use_scale=self.affine, use_fast_variance=False,
            scale_init=lambda *_: one, bias_init=lambda *_: zero,
        )  # fmt: skip

    def check(self) -> None:
        """Raises RuntimeError where a matrix drew more nonzeros than it has room for."""
        used = jax.device_get([u for u, _ in self.room])
        if any(int(u) > room for u, (_, room) in zip(used, self.room, strict=True)):
            raise RuntimeError("synthesize: a matrix has more nonzeros than room; change the seed")

    def _next(self) -> jax.Array:
        self.key, key = jax.random.split(self.key)
        return key

    def _values(self, rows: int, columns: int) -> jax.Array:
        return _values(self._next(), (rows, columns), self.dtype.name)

    def _sparse(self, M: int, K: int) -> SparseWeight:
        if self.format == "bitmap":
            return self._bitmap(M, K)
        kept = round((1 - (self.sparsity or 0.0)) * 2**_PROBABILITY_BITS)
        return encode(_dense(self._next(), (M, K), self.dtype.name, kept), self.format)

    def _bitmap(self, M: int, K: int) -> Bitmap:
        density = 1 - (self.sparsity or 0.0)
        masks, offsets = _index(self._next(), M, K, round(density * 2**_PROBABILITY_BITS))
        # A block's values fill whole vectors, the last one by half in the mean; eight standard
        # deviations of room for the sum.
        blocks = offsets.shape[1] - 1
        gap = VECTOR / 2 if M % BAND_ROWS == K % TILE_COLS == 0 else VECTOR
        spread = 8 * math.sqrt(M * K * density * (1 - density) + blocks * VECTOR)
        capacity = VECTOR * math.ceil((M * K * density + blocks * gap + spread) / VECTOR)
        self.room.append((offsets[0, -1], capacity // VECTOR))
        return Bitmap(
            offsets, _values(self._next(), (1, capacity), self.dtype.name), (M, K), masks,
            grid=(1, 1),
        )  # fmt: skip


class _NoKeys:
    def params(self) -> None:
        return None


_NO_KEYS: Any = _NoKeys()


@functools.partial(jax.jit, static_argnums=(1, 2))
def _values(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    mask, exponent = _BITS[np.dtype(dtype)]
    words = jax.random.bits(key, shape, jnp.uint16) & jnp.uint16(mask) | jnp.uint16(exponent)
    return lax.bitcast_convert_type(words, np.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dense(key: jax.Array, shape: tuple[int, int], dtype: str, threshold: jax.Array) -> jax.Array:
    """[M, K], each weight other than +0 with probability threshold / 2^16."""
    drawn, kept = jax.random.split(key)
    values = _values(drawn, shape, dtype)
    words = jax.random.bits(kept, shape, jnp.uint16).astype(jnp.int32)
    return jnp.where(words < threshold, values, 0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _index(key: jax.Array, M: int, K: int, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """masks and offsets of a bitmap [M, K] whose bits are 1 with probability threshold / 2^16."""
    bands, tiles = -(-M // BAND_ROWS), -(-K // TILE_COLS)
    shape = bands, tiles, 32

    def add_digit(i, masks):
        # The binary digits of the probability, last one first: or halves the distance to 1, and
        # to 0, with a random word each.
        words = jax.random.bits(jax.random.fold_in(key, i), shape, jnp.uint32)
        return jnp.where(threshold >> i & 1 == 1, masks | words, masks & words)

    masks = lax.fori_loop(0, _PROBABILITY_BITS, add_digit, jnp.zeros(shape, jnp.uint32))
    masks = jnp.where(threshold >> _PROBABILITY_BITS == 1, jnp.uint32(0xFFFFFFFF), masks)
    if M % BAND_ROWS or K % TILE_COLS:
        masks &= _inside(M, K, shape)
    counts = lax.population_count(masks).sum(axis=2)
    blocks = -(-tiles // BLOCK_TILES)
    counts = jnp.pad(counts, ((0, 0), (0, blocks * BLOCK_TILES - tiles)))
    counts = counts.reshape(bands * blocks, BLOCK_TILES).sum(axis=1)
    ends = jnp.cumsum(-(counts.astype(jnp.int32) // -VECTOR)).astype(jnp.uint32)
    return masks[None], jnp.concatenate([jnp.zeros(1, jnp.uint32), ends])[None]


def _inside(M: int, K: int, shape: tuple[int, int, int]) -> jax.Array:
    """Mask words with the bits of all weights that lie in [M, K]; formats/bitmap.py's picture."""
    band, tile, lane = (lax.broadcasted_iota(jnp.int32, shape, i) for i in range(3))
    words = jnp.zeros(shape, jnp.uint32)
    for bit in range(32):
        row = band * BAND_ROWS + lane // 4 + bit % 8 // 4 * 8
        column = tile * TILE_COLS + lane % 4 * 16 + bit // 8 * 4 + bit % 4
        words |= ((row < M) & (column < K)).astype(jnp.uint32) << bit
    return words
