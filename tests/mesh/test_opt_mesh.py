"""OPT on meshes: the tokens of one device, two all-reduces a block, each part on its device."""

import contextlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_opt
from collectives import collectives
from flax import nnx
from tiny_opt import quick_compiles  # noqa: F401

from jax_flashllm.models import opt, weights
from jax_flashllm.models.cache import KVCache
from jax_flashllm.models.evaluate import perplexity
from jax_flashllm.models.generate import generate

LAYERS, V = 2, 64


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Paths of models, by variant and sparsity."""
    made = {}

    def get(variant="plain", sparsity=0.7, **overrides):
        key = variant, sparsity, *overrides.items()
        if key not in made:
            config = tiny_opt.config(variant, **{"vocab_size": V} | overrides)
            tensors = tiny_opt.weights(config, np.float16 if sparsity else np.float32, sparsity)
            made[key] = tiny_opt.save(tmp_path_factory.mktemp("opt"), config, tensors)
        return made[key]

    return get


def mesh_of(tp, dp):
    return jax.make_mesh((dp, tp), ("dp", "tp"), devices=jax.devices()[: dp * tp])


PROMPTS = np.random.default_rng(0).integers(3, V, (2, 7))


@pytest.mark.parametrize(("tp", "dp", "sparsity"), [(4, 2, 0.7), (2, 2, 0.0)])
def test_tokens_are_those_of_one_device(path, tp, dp, sparsity):
    where = path(sparsity=sparsity)
    alone = generate(opt.load(where, np.float32), PROMPTS, 12, eos_token_id=())
    model = opt.load(where, np.float32, mesh=mesh_of(tp, dp))
    np.testing.assert_array_equal(generate(model, PROMPTS, 12, eos_token_id=()), alone)


@pytest.mark.parametrize("variant", ["opt_350m", "untied_projections"])
def test_variants(path, variant):
    where = path(variant)
    ids, mask = tiny_opt.prompts()
    ids, mask = ids[1:], mask[1:]
    alone, model = opt.load(where, np.float32), opt.load(where, np.float32, mesh=mesh_of(2, 2))
    logits = jax.jit(lambda m, *a: m(*a))(alone, ids, mask)
    got = jax.jit(lambda m, *a: m(*a))(model, ids, mask)
    tokens = mask == 1
    np.testing.assert_allclose(got[tokens], logits[tokens], rtol=1e-4, atol=1e-4)


def test_draws_are_those_of_one_device(path):
    models = opt.load(path(), np.float32), opt.load(path(), np.float32, mesh=mesh_of(2, 2))
    how = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "eos_token_id": ()}
    np.testing.assert_array_equal(*(generate(m, PROMPTS, 6, **how) for m in models))


def test_a_vocabulary_that_the_mesh_does_not_divide_stays_whole(path):
    where = path(vocab_size=61)
    prompt = PROMPTS % 58 + 3
    model = opt.load(where, np.float32, mesh=mesh_of(4, 1))
    assert model.embed_tokens.embedding[...].sharding.is_fully_replicated
    logits = jax.jit(lambda m, ids: m(ids))
    whole = logits(opt.load(where, np.float32), prompt)
    np.testing.assert_allclose(logits(model, prompt), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.7, 0.0], ids=["sparse", "dense"])
def test_two_all_reduces_a_block_and_no_more(path, sparsity):
    tp, dp, B = 4, 2, 2
    model = opt.load(path(sparsity=sparsity), np.float32, mesh=mesh_of(tp, dp))
    config, layout = model.config, model.layout
    cache = layout.placed(jax.eval_shape(lambda: KVCache.create(config, B, 64, np.float32)))
    ids = jnp.zeros((B, 1), jnp.int32)
    graph, state = nnx.split(model)
    step = jax.jit(lambda s, ids, cache: nnx.merge(graph, s)(ids, None, cache, last_only=True))
    found = collectives(step.lower(state, ids, cache).compile())
    row = 4 * config.hidden_size  # float32, one token of the device's one row
    reduced = [("all-reduce", row)] * (2 * LAYERS + 1)  # and the embedding's
    assert found == [("all-gather", 4 * V), *reduced]


def test_each_device_has_its_part_and_nothing_else(path):
    model = opt.load(path(), np.float32, mesh=mesh_of(4, 2))
    split = {"qkv_proj", "out_proj", "fc1", "fc2", "embed_tokens"}
    seen = set()
    for name, variable in nnx.to_flat_state(nnx.state(model)):
        array = variable.get_value()
        if name[-1] == "kernel_grid":
            continue
        part = next((p for p in name if p in split), None)
        expected = array.nbytes
        if part:
            whole_bias = name[-1] == "bias" and part in ("out_proj", "fc2")
            expected = array.nbytes if whole_bias else array.nbytes // 4
            seen.add(part)
        assert {s.data.nbytes for s in array.addressable_shards} == {expected}, name
    assert seen == split


@pytest.mark.parametrize("sparsity", [0.7, 0.0], ids=["sparse", "dense"])
def test_the_host_holds_one_matrix_on_its_way(path, sparsity):
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 64, "num_hidden_layers": 12}
    where = path(sparsity=sparsity, **sizes)
    mesh = mesh_of(4, 1)
    opt.load(where, np.float32, mesh=mesh)  # imports and caches
    tracemalloc.start()
    model = opt.load(where, np.float32, mesh=mesh)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert model.config.num_hidden_layers == 12  # it is alive until here
    largest = 3 * 64 * 64 * (2 if sparsity else 4)
    whole = 12 * (3 + 1 + 1 + 1) * 64 * 64 * (2 if sparsity else 4)
    # Read, put in order, encoded: some copies of the largest, whatever the model's size.
    assert peak - kept < 8 * largest < whole / 2


@pytest.mark.parametrize("sparsity", [0.7, 0.0], ids=["sparse", "dense"])
def test_tensors_come_back_as_they_were_stored(path, sparsity):
    where = path(sparsity=sparsity)
    alone = dict(weights.tensors(opt.load(where, np.float32)))
    model = opt.load(where, np.float32, mesh=mesh_of(4, 2))
    for name, array in weights.tensors(model):
        np.testing.assert_array_equal(array, alone.pop(name), err_msg=name)
    assert not alone


@pytest.mark.parametrize("loads_inside", [False, True])
def test_under_set_mesh_of_the_same_mesh(path, loads_inside):
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=kinds, devices=jax.devices()[:4])
    alone = opt.load(path(), np.float32)
    inside = jax.set_mesh(mesh) if loads_inside else contextlib.nullcontext()
    with inside:
        model = opt.load(path(), np.float32, mesh=mesh)
    tokens = generate(alone, PROMPTS, 6, eos_token_id=())
    logits, windows = nnx.jit(lambda m, ids: m(ids))(alone, PROMPTS), PROMPTS.ravel()
    score = perplexity(alone, windows, context=5).nats
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(generate(model, PROMPTS, 6, eos_token_id=()), tokens)
        got = nnx.jit(lambda m, ids: m(ids))(model, PROMPTS)
        np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-4)
        assert perplexity(model, windows, context=5).nats == pytest.approx(score, rel=1e-5)


def test_under_set_mesh_of_another_mesh(path):
    model = opt.load(path(), np.float32, mesh=mesh_of(2, 2))
    tokens = generate(model, PROMPTS, 3, eos_token_id=())
    with jax.set_mesh(jax.make_mesh((8,), ("z",))):
        np.testing.assert_array_equal(generate(model, PROMPTS, 3, eos_token_id=()), tokens)
        with pytest.raises(ValueError, match=r"mesh \{'dp': 2, 'tp': 2\}, .* \{'z': 8\}"):
            model(PROMPTS)


@pytest.mark.parametrize("batch", [None, 3])
def test_perplexity_of_any_number_of_windows(path, batch):
    ids = np.random.default_rng(2).integers(3, V, 57)  # 3 windows
    alone, model = opt.load(path(), np.float32), opt.load(path(), np.float32, mesh=mesh_of(1, 2))
    expected = perplexity(alone, ids, context=20)
    got = perplexity(model, ids, context=20, batch=batch)
    assert got.tokens == expected.tokens
    assert got.nats == pytest.approx(expected.nats, rel=1e-5)


def test_errors_say_which_number_to_change(path):
    with pytest.raises(
        ValueError, match=r"axis 'tp' of size 8 does not divide num.*= 4; make it 4"
    ):
        opt.load(path(), mesh=mesh_of(8, 1))
    with pytest.raises(ValueError, match=r"the mesh has axes \['x'\]; name them 'tp'"):
        opt.load(path(), mesh=jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]))
    three = jax.make_mesh((2, 2, 2), ("dp", "tp", "pp"))
    with pytest.raises(ValueError, match=r"over 'tp' and 'dp' alone; make a mesh without \['pp'\]"):
        opt.load(path(), mesh=three)
    with pytest.raises(ValueError, match="tensor and data are both 'x'; name two axes"):
        opt.load(path(), mesh=jax.make_mesh((8,), ("x",)), tensor="x", data="x")
    with pytest.raises(TypeError, match=r"mesh is a int; pass one that jax.make_mesh"):
        opt.load(path(), mesh=4)
    model = opt.load(path(), np.float32, mesh=mesh_of(1, 4))
    with pytest.raises(ValueError, match="generate: 2 rows over mesh axis 'dp' of size 4"):
        generate(model, PROMPTS, 2)


@pytest.mark.parametrize("names", [("x", "y"), ("y",), ("x",)])
def test_other_names_and_kinds_of_axes(path, names):
    n = len(names)
    kinds = (jax.sharding.AxisType.Explicit,) * n
    mesh = jax.make_mesh((2,) * n, names, axis_types=kinds, devices=jax.devices()[: 2**n])
    model = opt.load(path(), np.float32, mesh=mesh, tensor="y", data="x")
    logits = jax.jit(lambda m, ids: m(ids))
    whole = logits(opt.load(path(), np.float32), PROMPTS)
    np.testing.assert_allclose(logits(model, PROMPTS), whole, rtol=1e-4, atol=1e-4)


def test_the_decode_program_compiled_ahead_is_the_one_that_runs(path, caplog):
    model = opt.load(path(), np.float32, mesh=mesh_of(2, 1))
    # log_compiles is set for this thread alone: what the other one compiles is not logged.
    with caplog.at_level("WARNING"), jax.log_compiles(True):
        generate(model, PROMPTS, 4, eos_token_id=())
    here = [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
    assert any("prefill" in message for message in here)
    assert not any("decode" in message for message in here)
