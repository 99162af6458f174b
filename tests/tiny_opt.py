"""Tiny OPT models for tests: a config.json and weights per variant, the same on every machine.

Weights come from NumPy's legacy RandomState, whose streams are frozen, so that fixtures need to
hold only what transformers answered (tests/make_fixtures.py).
"""

import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

BASE = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 96,
    "word_embed_proj_dim": 32,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
VARIANTS = {
    "plain": {},
    "opt_350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "post_norm": {"do_layer_norm_before": False},
    "projections": {"word_embed_proj_dim": 24},
    "no_bias": {"enable_bias": False},
    "untied": {"tie_word_embeddings": False},
    "untied_projections": {"tie_word_embeddings": False, "word_embed_proj_dim": 16},
    "gelu": {"activation_function": "gelu"},
    "no_affine": {"layer_norm_elementwise_affine": False},
    "no_final_norm": {"_remove_final_layer_norm": True},
    "bare": {"enable_bias": False, "layer_norm_elementwise_affine": False},
}
FIXTURES = Path(__file__).parent / "fixtures" / "opt.npz"


def config(variant: str, **overrides) -> dict:
    return BASE | VARIANTS[variant] | overrides


def weights(config: dict, dtype=np.float32, sparsity: float = 0.0) -> dict[str, np.ndarray]:
    """Every tensor of the config's model, by its name in transformers.

    sparsity: share of weights zeroed at random in the matrices of the layers.
    """
    H, F, E = config["hidden_size"], config["ffn_dim"], config["word_embed_proj_dim"]
    V, rows = config["vocab_size"], config["max_position_embeddings"] + 2
    bias, affine = (
        config.get("enable_bias", True),
        config.get("layer_norm_elementwise_affine", True),
    )
    out = {}

    def draw(name, *shape, scale, center=0.0, sparsity=0.0):
        # Each tensor has its own stream, so that variants do not shift one another.
        random = np.random.RandomState(zlib.crc32(name.encode()))
        tensor = center + scale * random.standard_normal(shape)
        # A product with a mask leaves -0.0 behind, as in most pruned checkpoints.
        out[name] = (tensor * (random.random_sample(shape) >= sparsity)).astype(dtype)

    def linear(name, m, k, bias=bias):
        draw(f"{name}.weight", m, k, scale=2.0 / np.sqrt(k), sparsity=sparsity)
        if bias:
            draw(f"{name}.bias", m, scale=0.3)

    def norm(name):
        if affine:
            draw(f"{name}.weight", H, scale=0.2, center=1.0)
            draw(f"{name}.bias", H, scale=0.2)

    decoder = "model.decoder"
    draw(f"{decoder}.embed_tokens.weight", V, E, scale=0.3)
    draw(f"{decoder}.embed_positions.weight", rows, H, scale=1.0)
    if E != H:
        draw(f"{decoder}.project_in.weight", H, E, scale=1.2 / np.sqrt(E))
        draw(f"{decoder}.project_out.weight", E, H, scale=1.2 / np.sqrt(H))
    for i in range(config["num_hidden_layers"]):
        layer = f"{decoder}.layers.{i}"
        for x in ("q", "k", "v", "out"):
            linear(f"{layer}.self_attn.{x}_proj", H, H)
        linear(f"{layer}.fc1", F, H)
        linear(f"{layer}.fc2", H, F)
        norm(f"{layer}.self_attn_layer_norm")
        norm(f"{layer}.final_layer_norm")
    if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm"):
        norm(f"{decoder}.final_layer_norm")
    if not config.get("tie_word_embeddings", True):
        draw("lm_head.weight", V, E, scale=1 / np.sqrt(E))
    return out


def save(path: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    """Writes a model directory, as transformers would."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Three left-padded prompts: ids and mask, int64 [3, 9]."""
    ids = np.random.RandomState(7).randint(3, BASE["vocab_size"], (3, 9)).astype(np.int64)
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :8] = 0
    ids[:, 0] = np.where(mask[:, 0] == 1, 2, ids[:, 0])
    return np.where(mask == 1, ids, 1), mask


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Import it where tests compile many tiny programs once each: halves their time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
