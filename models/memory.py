"""What generation needs in memory, before anything is allocated."""

from __future__ import annotations

import dataclasses

import numpy as np

from jax_flashllm.formats import delta_csr
from jax_flashllm.models.config import OPTConfig, is_linear
from jax_flashllm.plan import DELTA_DENSE_TOKENS

# As nvidia-smi shows them, in bytes.
GPUS = {
    "a100-40gb": 40960 << 20,
    "a100-80gb": 81920 << 20,
    "h100": 81559 << 20,
    "h200": 143771 << 20,
    "l40s": 46068 << 20,
    "rtx4090": 24564 << 20,
}
# A matrix with this share of zeros is kept sparse: at 16 (1 - s) + 1 bits a weight it is a quarter
# smaller than dense fp16, and faster.
SPARSE_FROM = 0.3
USABLE = 0.95  # the rest is the driver's, and what CUDA libraries take for themselves


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of each part."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        parts = f"cache {gb(self.cache)}, workspace about {gb(self.workspace)}"
        if self.weights:
            parts = f"weights {gb(self.weights)}, {parts}"
        return f"{gb(self.total)} ({parts})"


def gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def bitmap_bytes(rows: int, columns: int, nonzeros: float) -> int:
    """Of a `formats.Bitmap` in 16 bits: values, in blocks of whole vectors, masks, offsets."""
    bands, blocks = -(-rows // 16), -(-columns // 256)
    masks = bands * -(-columns // 64) * 32 * 4
    return int(2 * nonzeros + masks + bands * blocks * (4 + 7) + 4)


def delta_csr_bytes(rows: int, columns: int, nonzeros: float) -> int:
    """Of a `formats.DeltaCSR` in 16 bits whose nonzeros are spread evenly."""
    return int(rows * delta_csr.row_bytes(nonzeros / (rows * columns), columns))


def held_bytes(
    name: str, shape: tuple[int, ...], dtype: np.dtype, is_sparse: bool, nonzeros: int
) -> int:
    """Of a checkpoint's tensor once it is loaded: a bitmap where `weights.Loader` makes one."""
    size = int(np.prod(shape))
    if is_linear(name) and (is_sparse or 1 - nonzeros / max(size, 1) >= SPARSE_FROM):
        return bitmap_bytes(shape[0], shape[1], nonzeros)
    return size * np.dtype(dtype).itemsize


def matrices(config: OPTConfig) -> list[tuple[int, int]]:
    """[out, in] of the matrices of one layer, q, k and v as one."""
    H, F = config.hidden_size, config.ffn_dim
    return [(3 * H, H), (H, H), (F, H), (H, F)]


def weight_bytes(config: OPTConfig, sparsity: float | None, format: str = "bitmap") -> int:
    """Of a model with 16-bit weights, those of its layers at `sparsity` or, if None, dense."""
    encoded = delta_csr_bytes if format == "delta_csr" else bitmap_bytes
    layer = sum(
        2 * m * k if sparsity is None else encoded(m, k, (1 - sparsity) * m * k)
        for m, k in matrices(config)
    )
    return config.num_hidden_layers * layer + other_bytes(config)


def other_bytes(config: OPTConfig) -> int:
    """Everything but the matrices of the layers, in 16 bits."""
    H, E, V = config.hidden_size, config.embed_dim, config.vocab_size
    count = V * E * (1 if config.tie_word_embeddings else 2)
    count += (config.max_position_embeddings + 2) * H
    count += 2 * E * H if config.has_projections else 0
    count += 2 * H * (config.has_final_layer_norm and config.layer_norm_elementwise_affine)
    small = sum(m for m, _ in matrices(config)) * config.enable_bias
    small += 4 * H * config.layer_norm_elementwise_affine
    return 2 * (count + config.num_hidden_layers * small)


def cache_bytes(config: OPTConfig, batch: int, slots: int, itemsize: int) -> int:
    return 2 * config.num_hidden_layers * batch * slots * config.hidden_size * itemsize


def workspace_bytes(config: OPTConfig, tokens: int, batch: int) -> int:
    """Of a prefill of `batch` rows, `tokens` in all: about what XLA holds beside its operands."""
    H, F, T = config.hidden_size, config.ffn_dim, tokens // batch
    activations = 2 * tokens * (3 * H + max(F, 4 * H))
    scores = batch * config.num_attention_heads * T * T * (4 + 2)
    logits = 3 * 4 * batch * config.vocab_size
    # Where a GPU decodes a matrix for many tokens, the soonest in Delta-CSR: it, and the product
    # in float32.
    decoded = 2 * max(m * k for m, k in matrices(config)) + 4 * tokens * max(3 * H, F)
    return activations + scores + logits + (decoded if tokens >= DELTA_DENSE_TOKENS else 0)


def estimate(
    config: OPTConfig, weights: int, batch: int, slots: int, prompt: int, itemsize: int
) -> Estimate:
    """For `batch` rows of `prompt` tokens that grow to `slots`.

    weights: bytes that they take or will take.   itemsize: of the cache's dtype.
    """
    return Estimate(
        weights,
        cache_bytes(config, batch, slots, itemsize),
        workspace_bytes(config, batch * prompt, batch),
    )


def free_bytes() -> int | None:
    """What JAX may still allocate on its first device; None where it does not know (a CPU)."""
    import jax

    stats = jax.devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def check_fits(what: str, needed: Estimate, free: int | None, advice: str) -> None:
    """Raises ValueError with the numbers where `free` is known and too small."""
    if free is not None and needed.total > free:
        raise ValueError(f"{what} needs {needed}, but {gb(free)} are free on this device; {advice}")
