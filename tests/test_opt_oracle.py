"""Live comparison with transformers; tests/fixtures/opt.npz records the same for the plain run."""

import numpy as np
import pytest
import tiny_opt

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from make_fixtures import hf_greedy, hf_logits, hf_model  # noqa: E402
from tiny_opt import quick_compiles  # noqa: E402, F401

from jax_flashllm.models import opt, sampling  # noqa: E402
from jax_flashllm.models.config import OPTConfig  # noqa: E402
from jax_flashllm.models.generate import generate  # noqa: E402


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("variant", tiny_opt.VARIANTS)
def test_logits_and_greedy_tokens(tmp_path, variant, sparsity):
    # With zeros the weights are stored in fp16, so that layers are sparse on our side.
    config = tiny_opt.config(variant)
    tensors = tiny_opt.weights(config, np.float16 if sparsity else np.float32, sparsity)
    reference = hf_model(config, tensors)
    model = opt.load(tiny_opt.save(tmp_path, config, tensors))
    ids, mask = tiny_opt.prompts()
    y = np.asarray(jax.jit(model)(ids, mask))
    assert np.abs(y - hf_logits(reference, ids, mask))[mask == 1].max() < 1e-4
    new = generate(model, ids, 64, mask, eos_token_id=())
    np.testing.assert_array_equal(new, hf_greedy(reference, ids, mask, 64))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_directory_that_transformers_saved(tmp_path, sharded):
    config = tiny_opt.config("opt_350m")
    reference = hf_model(config, tiny_opt.weights(config))
    reference.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    ids, mask = tiny_opt.prompts()
    y = np.asarray(jax.jit(opt.load(tmp_path))(ids, mask))
    assert np.abs(y - hf_logits(reference, ids, mask))[mask == 1].max() < 1e-4


def test_the_config_that_we_write_is_transformers(tmp_path):
    ours = OPTConfig.from_dict(tiny_opt.config("opt_350m", _remove_final_layer_norm=True))
    import json

    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    theirs = transformers.OPTConfig.from_pretrained(tmp_path)
    assert theirs._remove_final_layer_norm
    assert OPTConfig.from_dict(theirs.to_dict()) == ours


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [1, 5, 40, 500])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3, 1.0])
def test_filters_are_those_of_transformers(top_p, top_k, min_p):
    logits = np.random.RandomState(0).standard_normal((6, 60)).astype(np.float32) * 2
    logits[0, 10:20] = logits[0, 10]  # ties for top_k and min_p
    scores = torch.from_numpy(logits.copy())
    warpers = [
        transformers.TemperatureLogitsWarper(0.8),
        transformers.TopKLogitsWarper(top_k),
        transformers.TopPLogitsWarper(top_p),
        transformers.MinPLogitsWarper(min_p),
    ]
    for warp in warpers:
        scores = warp(None, scores)
    s = sampling.Sampling(*map(np.float32, (0.8, top_p, min_p)), np.int32(top_k))
    ours = np.asarray(sampling.filter_logits(jnp.asarray(logits), s))
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(scores.numpy()))
    np.testing.assert_allclose(ours, scores.numpy(), rtol=1e-6)
