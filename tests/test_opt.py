"""The OPT model: recorded answers of transformers, the cache, loading."""

import contextlib
import io
import json
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_opt
from flax import nnx
from tiny_opt import quick_compiles  # noqa: F401

from jax_flashllm import nn
from jax_flashllm.models import opt, weights
from jax_flashllm.models.cache import KVCache
from jax_flashllm.models.checkpoint import CheckpointError, save_packed
from jax_flashllm.models.config import OPTConfig
from jax_flashllm.models.weights import tensors


@pytest.fixture(scope="module")
def recorded():
    with np.load(tiny_opt.FIXTURES) as arrays:
        yield dict(arrays)


def load(path, variant="plain", dtype=None, stored=np.float32, sparsity=0.0, **overrides):
    config = tiny_opt.config(variant, **overrides)
    tiny_opt.save(path, config, tiny_opt.weights(config, stored, sparsity))
    return opt.load(path, dtype=dtype)


def logits(model, ids, mask=None):
    return np.asarray(jax.jit(model)(ids, mask))


@pytest.mark.parametrize("variant", tiny_opt.VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, recorded, variant):
    ids, mask = tiny_opt.prompts()
    y = logits(load(tmp_path, variant), ids, mask)
    assert y.dtype == np.float32
    error = np.abs(y - recorded[f"{variant}.logits"])[mask == 1]
    assert error.max() < 1e-4


@pytest.mark.parametrize("variant", ["plain", "opt_350m", "untied_projections"])
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 3, 1, 1)])
def test_a_cache_changes_nothing(tmp_path, variant, pieces):
    model = load(tmp_path, variant)
    ids, mask = tiny_opt.prompts()
    full = logits(model, ids, mask)
    cache = KVCache.create(model.config, batch=3, slots=12, dtype=jnp.float32)
    step = jax.jit(model)
    ends = np.cumsum(pieces)
    for start, end in zip(ends - pieces, ends, strict=True):
        y, cache = step(ids[:, start:end], mask[:, start:end], cache)
        here = mask[:, start:end] == 1
        np.testing.assert_allclose(np.asarray(y)[here], full[:, start:end][here], atol=2e-5)
    assert int(cache.length) == 9


def test_last_only_is_the_last_row_of_all(tmp_path):
    model = load(tmp_path)
    ids, mask = tiny_opt.prompts()
    cache = KVCache.create(model.config, 3, 9, jnp.float32)
    last, _ = jax.jit(lambda *args: model(*args, last_only=True))(ids, mask, cache)
    assert last.shape == (3, 1, 61)
    np.testing.assert_allclose(last[:, 0], logits(model, ids, mask)[:, -1], atol=2e-5)


def test_left_pads_change_nothing(tmp_path):
    model = load(tmp_path)
    ids, mask = tiny_opt.prompts()
    alone = logits(model, ids[1:2, 4:])
    np.testing.assert_allclose(logits(model, ids, mask)[1, 4:], alone[0], atol=2e-5)


@pytest.mark.parametrize("variant", ["plain", "no_bias", "gelu"])
@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_zeros_make_sparse_layers_with_the_same_logits(tmp_path, variant, stored):
    # fp16 first: what float32 then stores is exact in 16 bits.
    config = tiny_opt.config(variant)
    half = stored if stored != np.float32 else np.float16
    weights = {k: v.astype(stored) for k, v in tiny_opt.weights(config, half, 0.7).items()}
    model = opt.load(tiny_opt.save(tmp_path, config, weights))
    dense = opt.OPT(model.config, make=DenseLoader(weights))
    for layer in model.layers:
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.out_proj, layer.fc1, layer.fc2):
            assert isinstance(linear, nn.SparseDense)
            assert linear.weight.sparsity == pytest.approx(0.7, abs=0.05)
    ids, mask = tiny_opt.prompts()
    expected, y = logits(dense, ids, mask), logits(model, ids, mask)
    np.testing.assert_allclose(y[mask == 1], expected[mask == 1], atol=1e-4)


@pytest.mark.parametrize("format", ["bitmap", "delta_csr"])
def test_sparse_layers_take_the_format_that_is_asked_for(tmp_path, format):
    config = tiny_opt.config("plain")
    weights = {
        k: v.astype(np.float16) for k, v in tiny_opt.weights(config, np.float16, 0.7).items()
    }
    model = opt.load(tiny_opt.save(tmp_path, config, weights), format=format)
    for layer in model.layers:
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.out_proj, layer.fc1, layer.fc2):
            assert linear.weight.format == format
    ids, mask = tiny_opt.prompts()
    expected = logits(opt.OPT(model.config, make=DenseLoader(weights)), ids, mask)
    np.testing.assert_allclose(logits(model, ids, mask)[mask == 1], expected[mask == 1], atol=1e-4)
    with pytest.raises(ValueError, match="format must be auto, bitmap or delta_csr, got 'csr'"):
        opt.load(tmp_path, format="csr")


class DenseLoader(opt.Initializer):
    """Gives every tensor in float32 to nnx layers, by names; shares no code with models/weights."""

    def __init__(self, weights):
        self.weights = {k.replace("model.decoder.", ""): v for k, v in weights.items()}

    def get(self, *names):
        arrays = [self.weights[n] for n in names if n in self.weights]
        return jnp.asarray(np.concatenate(arrays).astype(np.float32)) if arrays else None

    def linear(self, names, in_features, out_features, bias):
        layer = nnx.Linear(in_features, out_features, use_bias=bias, rngs=nnx.Rngs(0))
        layer.kernel[...] = self.get(*[f"{n}.weight" for n in names]).T
        if bias:
            layer.bias[...] = self.get(*[f"{n}.bias" for n in names])
        return layer

    def embed(self, name, rows, features):
        layer = nnx.Embed(rows, features, rngs=nnx.Rngs(0))
        layer.embedding[...] = self.get(f"{name}.weight")
        return layer

    def norm(self, name, features):
        layer = nnx.LayerNorm(features, epsilon=1e-5, rngs=nnx.Rngs(0))
        layer.scale[...], layer.bias[...] = self.get(f"{name}.weight"), self.get(f"{name}.bias")
        return layer


def test_fp32_that_16_bits_cannot_hold_stays_dense_and_exact(tmp_path):
    model = load(tmp_path, sparsity=0.7)
    kernel = model.layers[0].fc1.kernel[...]
    assert isinstance(model.layers[0].fc1, nnx.Linear)
    stored = tiny_opt.weights(tiny_opt.config("plain"), sparsity=0.7)
    np.testing.assert_array_equal(kernel.T, stored["model.decoder.layers.0.fc1.weight"])


def test_few_zeros_stay_dense(tmp_path):
    model = load(tmp_path, stored=np.float16, sparsity=0.2)
    assert isinstance(model.layers[0].fc1, nnx.Linear)
    assert model.layers[0].fc1.kernel.dtype == np.float16
    assert model.dtype == np.float32


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_16_bit_dtype_is_used_when_asked_for(tmp_path, dtype, sparsity):
    model = load(tmp_path, dtype=dtype, sparsity=sparsity)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
        jnp.dtype(dtype)
    }
    ids, mask = tiny_opt.prompts()
    y = logits(model, ids, mask)
    assert y.dtype == np.float32
    exact = logits(load(tmp_path, dtype=jnp.float32, sparsity=sparsity), ids, mask)
    bound = 0.5 if dtype == jnp.bfloat16 else 0.05  # of logits up to 20
    np.testing.assert_allclose(y[mask == 1], exact[mask == 1], atol=bound)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("variant", ["opt_350m", "untied"])
def test_16_bit_weights_widened_in_pieces_give_the_same(tmp_path, monkeypatch, variant, stored):
    monkeypatch.setattr("jax_flashllm.models.weights.WIDEN_TABLE_BYTES", 0)
    ids, mask = tiny_opt.prompts()
    whole = logits(load(tmp_path, variant, stored=stored), ids, mask)
    for size in (500, 1):  # pieces that do not divide the matrices, and single rows
        monkeypatch.setattr(opt, "WIDEN_AT_ONCE", size)
        pieces = logits(load(tmp_path, variant, stored=stored), ids, mask)
        np.testing.assert_allclose(pieces[mask == 1], whole[mask == 1], atol=1e-4)


@pytest.mark.parametrize("variant", tiny_opt.VARIANTS)
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_tensors_are_those_that_were_loaded(tmp_path, variant, sparsity):
    config = tiny_opt.config(variant)
    stored = tiny_opt.weights(config, np.float16, sparsity)
    model = opt.load(tiny_opt.save(tmp_path, config, stored), dtype=jnp.float32)
    got = dict(tensors(model))
    assert got.keys() == stored.keys()
    for name, value in got.items():
        np.testing.assert_array_equal(value, stored[name])


def test_a_tensor_under_two_names_is_refused(tmp_path):
    config = tiny_opt.config("plain")
    tensors = tiny_opt.weights(config)
    tensors[FC1.removeprefix("model.decoder.")] = tensors[FC1] + 1
    tiny_opt.save(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=r"fc1.weight': is 'layers.*fc1.weight' once more"):
        opt.load(tmp_path)


def test_a_config_that_asks_for_more_layers_is_refused_at_once(tmp_path):
    config = tiny_opt.config("plain")
    tiny_opt.save(tmp_path, config, tiny_opt.weights(config))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4096}))
    start = time.process_time()
    with pytest.raises(ValueError, match=r"layers\.2\..* is missing \(and \d+ more\)"):
        opt.load(tmp_path)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder.", ""])
def test_every_prefix_loads(tmp_path, prefix):
    config = tiny_opt.config("plain")
    tensors = tiny_opt.weights(config)
    renamed = {k.replace("model.decoder.", prefix): v for k, v in tensors.items()}
    renamed["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]  # a tied copy
    renamed[prefix + "version"] = np.array([3.0], np.float32)  # of metaseq's exports
    model = opt.load(tiny_opt.save(tmp_path, config, renamed))
    assert model.lm_head is None


def _rename(old, new):
    def edit(config, tensors):
        tensors[new] = tensors.pop(old)

    return edit


def _put(name, value):
    def edit(config, tensors):
        tensors[name] = value

    return edit


FC1 = "model.decoder.layers.1.fc1.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c, t: t.pop(FC1), [FC1, "[48, 32]", "missing"]),
        (_put("model.decoder.layers.2.fc1.weight", np.zeros((48, 32), np.float32)),
         ["layers.2.fc1.weight", "not part of the model"]),
        (_put(FC1, np.zeros((32, 48), np.float32)), [FC1, "[32, 48]", "[48, 32]"]),
        (_put(FC1, np.zeros((48, 32), np.int32)), [FC1, "int32", "float16, bfloat16 and float32"]),
        (_put("lm_head.weight", np.ones((61, 32), np.float32)),
         ["lm_head.weight", "differs", "tie_word_embeddings"]),
        (_rename("model.decoder.embed_tokens.weight", "transformer.wte.weight"),
         ["embed_tokens.weight", "is it an OPT"]),
        (lambda c, t: c.update(model_type="gpt2"), ["'gpt2'", "only 'opt'"]),
        (lambda c, t: c.update(num_hidden_layers=3), ["layers.2.", "missing", "more"]),
        (lambda c, t: c.update(tie_word_embeddings=False), ["lm_head.weight", "missing"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, edit, words):
    config = tiny_opt.config("plain")
    tensors = tiny_opt.weights(config)
    edit(config, tensors)
    tiny_opt.save(tmp_path, config, tensors)
    with pytest.raises(CheckpointError) as error:
        opt.load(tmp_path)
    for word in words:
        assert word in str(error.value)


def test_a_value_past_fp16_is_not_made_infinite(tmp_path):
    config = tiny_opt.config("plain")
    tensors = tiny_opt.weights(config)
    tensors[FC1][0, 0] = 1e5
    tiny_opt.save(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=r"fc1.weight.*100000.*bfloat16"):
        opt.load(tmp_path, dtype=jnp.float16)
    opt.load(tmp_path, dtype=jnp.bfloat16)


def test_an_unusable_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"int8.*float16"):
        load(tmp_path, dtype=jnp.int8)
    with pytest.raises(ValueError, match="dtype is half a float; choose float16"):
        load(tmp_path, dtype="half a float")


def test_loading_shows_every_tensor(tmp_path, monkeypatch):
    shown = []

    class Bar(weights.tqdm):
        def __init__(self, **kwargs):
            super().__init__(**(kwargs | {"disable": False, "file": io.StringIO()}))

        def close(self):
            shown.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(weights, "tqdm", Bar)
    load(tmp_path)
    assert shown[0][0] == shown[0][1] > 20


def test_loading_takes_little_more_memory_than_the_file(tmp_path, fresh_process):
    shape = dict(hidden_size=1024, word_embed_proj_dim=1024, ffn_dim=4096, num_hidden_layers=4)
    config = tiny_opt.config("plain", num_attention_heads=16, vocab_size=5000, **shape)
    tiny_opt.save(tmp_path, config, tiny_opt.weights(config, np.float16))  # 112 MB, dense
    source = """
import os, sys
import jax.numpy as jnp, numpy as np
from jax_flashllm import encode
from jax_flashllm.models import opt, weights

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

encode(np.ones((64, 64), np.float16)), jnp.ones(3).block_until_ready()
before = status("VmRSS")
model = opt.load(sys.argv[1])
print((status("VmHWM") - before) / os.path.getsize(sys.argv[1] + "/model.safetensors"))
"""
    assert float(fresh_process(source, str(tmp_path))) < 1.3


def test_a_misspelt_path_says_so(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        opt.load(tmp_path / "nowhere")


def test_shape_errors_name_the_shapes(tmp_path):
    model = load(tmp_path)
    with pytest.raises(ValueError, match=r"\(9,\)"):
        model(jnp.zeros(9, int))
    with pytest.raises(ValueError, match=r"\(2, 9\).*\(1, 9\)"):
        model(jnp.zeros((1, 9), int), jnp.ones((2, 9)))
    cache = KVCache.create(model.config, 1, 4, jnp.float32)
    with pytest.raises(ValueError, match="4 slots"):
        model(jnp.zeros((1, 9), int), None, cache)
    with pytest.raises(TypeError, match=r"float32; pass token ids"):
        model(jnp.zeros((1, 9), jnp.float32))
    context = model.config.max_position_embeddings
    for length in (0, context + 1):  # positions past the end would be clamped, without a word
        with pytest.raises(ValueError, match=f"{length} tokens a row; .* 1 to {context}"):
            model(jnp.zeros((1, length), int))
    with pytest.raises(ValueError, match="rngs"):
        opt.OPT(model.config)


@pytest.mark.parametrize("tree", [False, True])
def test_a_model_trains_in_both_modes_of_nnx(tree):
    config = OPTConfig.from_dict(tiny_opt.config("opt_350m"))
    ids = jnp.asarray(tiny_opt.prompts()[0])
    nnx.set_graph_mode(not tree)
    try:
        model = opt.OPT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        graphdef, params = nnx.split(model)

        def loss(params):
            logp = jax.nn.log_softmax(nnx.merge(graphdef, params)(ids))
            return -jnp.mean(jnp.take_along_axis(logp[:, :-1], ids[:, 1:, None], axis=-1))

        first, grads = jax.jit(jax.value_and_grad(loss))(params)
        assert first == pytest.approx(np.log(61), rel=0.1)  # normal(0.02) knows nothing yet
        assert all(jnp.any(g != 0) for path, g in _named(grads) if "embed" not in path)
        second = loss(jax.tree.map(lambda p, g: p - 0.5 * g, params, grads))
        assert second < first
    finally:
        nnx.set_graph_mode(True)


def _named(tree):
    return [(jax.tree_util.keystr(p), leaf) for p, leaf in jax.tree.leaves_with_path(tree)]


def test_initial_values_are_hugging_faces():
    config = OPTConfig(num_hidden_layers=1, hidden_size=384, vocab_size=999)
    model = opt.OPT(config, rngs=nnx.Rngs(0))
    for kernel in (model.embed_tokens.embedding, model.layers[0].fc1.kernel):
        assert float(kernel[...].std()) == pytest.approx(0.02, rel=0.01)
    assert not model.layers[0].fc1.bias[...].any()


def test_sparsify_takes_the_whole_model(tmp_path):
    model = load(tmp_path, "untied")
    sparse = nn.sparsify(model, 0.5)
    assert isinstance(sparse.lm_head, nn.SparseDense)
    y = logits(sparse, tiny_opt.prompts()[0])
    assert np.isfinite(y).all()
    assert not np.allclose(y, logits(model, tiny_opt.prompts()[0]))


def test_a_sharded_dense_directory_with_an_index_loads(tmp_path):
    config = tiny_opt.config("plain")
    tensors = tiny_opt.weights(config)
    whole = opt.load(tiny_opt.save(tmp_path / "whole", config, tensors))
    names = list(tensors)
    path = tmp_path / "parts"
    weight_map = {}
    for i, part in enumerate((names[:7], names[7:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        tiny_opt.save(path, config, {n: tensors[n] for n in part})
        (path / "model.safetensors").rename(path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    ids, mask = tiny_opt.prompts()
    np.testing.assert_array_equal(logits(opt.load(path), ids, mask), logits(whole, ids, mask))


def test_a_damaged_packed_model_is_refused_or_loads(tmp_path):
    """Bits, row starts and values, which go from the file straight to the C++ encoder."""
    config = tiny_opt.config("plain", num_hidden_layers=1)
    tensors = tiny_opt.weights(config, np.float16, sparsity=0.7)
    save_packed(tmp_path / "m", config, tensors.items())
    file = tmp_path / "m" / "model.safetensors"
    data, rng, loaded = file.read_bytes(), np.random.default_rng(0), 0
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(25):
        damaged = bytearray(data)
        at = int(rng.integers(header, len(data) - 8))
        damaged[at : at + 8] = rng.bytes(8)
        file.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            opt.load(tmp_path / "m")
            loaded += 1
    assert 0 < loaded < 25


def test_a_device_without_room_is_named(tmp_path, monkeypatch):
    """Where XLA says so; mostly memory.py has, before anything is read."""

    def put(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    config = tiny_opt.config("plain")
    tiny_opt.save(tmp_path, config, tiny_opt.weights(config))
    monkeypatch.setattr(jax, "device_put", put)
    said = (
        r"^RESOURCE_EXHAUSTED: opt\.load: no room on .* \(Out of .* 123 bytes\.\); prune it further"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=said):
        opt.load(tmp_path)
