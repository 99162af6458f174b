"""Generation: recorded tokens of transformers, batches, ends, compiled programs, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_opt
from flax import nnx
from tiny_opt import quick_compiles  # noqa: F401

from jax_flashllm.models import generate as generation
from jax_flashllm.models import opt
from jax_flashllm.models.config import OPTConfig
from jax_flashllm.models.generate import generate


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Loads a variant once."""
    loaded = {}

    def get(variant="plain"):
        if variant not in loaded:
            config = tiny_opt.config(variant)
            path = tmp_path_factory.mktemp(variant)
            tiny_opt.save(path, config, tiny_opt.weights(config))
            loaded[variant] = opt.load(path)
        return loaded[variant]

    return get


@pytest.fixture(scope="module")
def model(models):
    return models()


@pytest.fixture(scope="module")
def recorded():
    with np.load(tiny_opt.FIXTURES) as arrays:
        yield dict(arrays)


PROMPT = [2, 17, 40, 5]


@pytest.mark.parametrize("variant", tiny_opt.VARIANTS)
def test_greedy_tokens_are_those_of_transformers(models, recorded, variant):
    ids, mask = tiny_opt.prompts()
    new = generate(models(variant), ids, 64, mask, eos_token_id=())
    assert new.dtype == np.int32
    np.testing.assert_array_equal(new, recorded[f"{variant}.greedy"])


def test_every_token_is_the_argmax_of_a_full_forward(model):
    new = generate(model, PROMPT, 20, eos_token_id=())[0]
    ids = np.array([*PROMPT, *new])
    logits = np.asarray(jax.jit(model)(ids[None]))[0]
    np.testing.assert_array_equal(logits[len(PROMPT) - 1 : -1].argmax(-1), new)


def test_columns_of_pads_alone_change_nothing(model):
    ids, mask = tiny_opt.prompts()
    wide = np.pad(ids, ((0, 0), (7, 0)), constant_values=1), np.pad(mask, ((0, 0), (7, 0)))
    np.testing.assert_array_equal(
        generate(model, wide[0], 8, wide[1]), generate(model, ids, 8, mask)
    )


@pytest.mark.parametrize("cache_dtype", [jnp.float16, jnp.bfloat16])
def test_a_16_bit_cache_begins_the_same(model, cache_dtype):
    exact = generate(model, PROMPT, 3, eos_token_id=())
    new = generate(model, PROMPT, 3, eos_token_id=(), cache_dtype=cache_dtype)
    np.testing.assert_array_equal(new, exact)


def test_a_row_ends_at_eos_and_then_holds_pads(model, recorded):
    ids, mask = tiny_opt.prompts()
    free = recorded["plain.greedy"]
    eos = int(free[0, 5])
    first = [row.tolist().index(eos) if eos in row else 63 for row in free]
    seen = []
    new = generate(model, ids, 64, mask, eos_token_id=eos, on_token=seen.append)
    assert new.shape == (3, max(first) + 1)  # stops when the last row has
    np.testing.assert_array_equal(np.stack(seen, axis=1), new)
    for row, end, expected in zip(new, first, free, strict=True):
        np.testing.assert_array_equal(row[: end + 1], expected[: end + 1])
        assert (row[end + 1 :] == 1).all()


def test_eos_comes_from_the_config(model, recorded):
    row = recorded["plain.greedy"][0].astype(int)
    config = OPTConfig.from_dict(tiny_opt.config("plain", eos_token_id=[int(row[3]), 2]))
    model = opt.OPT(config, make=_Parts(model))
    ids, mask = tiny_opt.prompts()
    end = row.tolist().index(row[3])
    assert generate(model, ids[:1], 64, mask[:1]).shape == (1, end + 1)


class _Parts(opt.Initializer):
    """Hands out the parts of another model."""

    def __init__(self, model):
        self.model = model

    def linear(self, names, *_):
        part = self.model
        for name in names[0].split("."):
            name = "qkv_proj" if name == "q_proj" else name
            part = part[int(name)] if name.isdigit() else getattr(part, name)
        return part

    def embed(self, name, *_):
        return self.linear([name])

    def norm(self, name, *_):
        return self.linear([name])


@pytest.mark.parametrize("several", [False, True])
def test_a_row_ends_at_a_stop_sequence(model, recorded, several):
    ids, mask = tiny_opt.prompts()
    row = recorded["plain.greedy"][0].astype(int).tolist()
    stop = row[4:7]
    starts = [i for i in range(62) if row[i : i + 3] == stop]
    new = generate(
        model,
        ids[:1],
        64,
        mask[:1],
        eos_token_id=(),
        stop=[[60, 60, 60], stop] if several else stop,
    )
    assert new[0].tolist() == row[: starts[0] + 3]


def test_a_stop_sequence_does_not_reach_into_the_prompt(model):
    free = generate(model, PROMPT, 6, eos_token_id=())[0]
    stop = [PROMPT[-1], int(free[0])]
    assert generate(model, PROMPT, 6, eos_token_id=(), stop=stop)[0].tolist()[:2] == [
        *free[:2].tolist()
    ]


def test_one_token_needs_no_decode(model):
    assert generate(model, PROMPT, 1).shape == (1, 1)


def test_an_exception_in_on_token_is_the_callers(model):
    def fail(token):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        generate(model, PROMPT, 4, on_token=fail)


SAMPLED = dict(temperature=1.5, top_k=30, top_p=0.95, min_p=0.01, eos_token_id=())


def test_samples_depend_on_the_seed_alone(model):
    new = generate(model, PROMPT, 24, seed=1, **SAMPLED)
    np.testing.assert_array_equal(generate(model, PROMPT, 24, seed=1, **SAMPLED), new)
    assert not np.array_equal(generate(model, PROMPT, 24, seed=2, **SAMPLED), new)
    np.testing.assert_array_equal(generate(model, PROMPT, 9, seed=1, **SAMPLED), new[:, :9])


def test_a_sampled_row_does_not_see_the_others(model):
    ids, mask = tiny_opt.prompts()
    new = generate(model, ids, 24, mask, seed=3, **SAMPLED)
    other = ids.copy()
    other[1:] = np.where(mask[1:] == 1, 30, 1)
    np.testing.assert_array_equal(generate(model, other, 24, mask, seed=3, **SAMPLED)[0], new[0])
    np.testing.assert_array_equal(generate(model, ids[:1], 24, seed=3, **SAMPLED)[0], new[0])


def test_rows_of_one_prompt_differ(model):
    new = generate(model, [PROMPT] * 4, 24, **SAMPLED)
    assert len({tuple(row) for row in new.tolist()}) == 4


def test_a_bucket_compiles_once(model):
    programs, _ = generation.programs_of(model, None)

    def compiled():
        return programs.prefill._cache_size(), programs.decode._cache_size()

    generate(model, PROMPT, 20, temperature=0.5)
    before = compiled()
    for prompt, new, temperature in (([3], 30, 0.7), (PROMPT * 3, 9, 1.1), (PROMPT, 20, 0.6)):
        generate(model, prompt, new, temperature=temperature, seed=new)
    assert generation.programs_of(model, None)[0] is programs
    assert compiled() == before


def test_the_decode_program_compiled_ahead_is_the_one_that_runs(models, caplog):
    generation._programs.cache_clear()
    # log_compiles is set for this thread alone: what the other one compiles is not logged.
    with caplog.at_level("WARNING"), jax.log_compiles(True):
        generate(models("gelu"), PROMPT, 40)
    here = [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
    assert any("prefill" in message for message in here)
    assert not any("decode" in message for message in here)


def test_tree_mode_generates_the_same(model):
    expected = generate(model, PROMPT, 8)
    nnx.set_graph_mode(False)
    try:
        np.testing.assert_array_equal(generate(model, PROMPT, 8), expected)
    finally:
        nnx.set_graph_mode(True)


def test_weights_that_moved_on_are_used(model):
    before = generate(model, PROMPT, 8, eos_token_id=())
    bias = model.layers[1].fc2.bias
    old = bias[...]
    bias[...] = old + np.linspace(-3, 3, len(old), dtype=np.float32)
    try:
        assert not np.array_equal(generate(model, PROMPT, 8, eos_token_id=()), before)
    finally:
        bias[...] = old
    np.testing.assert_array_equal(generate(model, PROMPT, 8, eos_token_id=()), before)


def test_the_cache_is_donated(model):
    programs, weights = generation.programs_of(model, None)
    ids = np.array([PROMPT], np.int32)
    ends = np.zeros((0, 1), np.int32)
    state = programs.prefill(weights, ids, np.ones_like(ids), ends, None, None, 64)
    cache = state.cache
    addresses = {k.unsafe_buffer_pointer() for k in cache.keys}
    state, *_ = programs.decode(weights, state, ends, None, None, 3)
    assert cache.keys[0].is_deleted()
    assert {k.unsafe_buffer_pointer() for k in state.cache.keys} == addresses


@pytest.mark.parametrize(
    ("n", "least", "steps", "expected"),
    [(1, 16, 1, 16), (16, 16, 1, 16), (17, 16, 1, 32), (33, 16, 1, 64), (512, 16, 1, 512),
     (1, 64, 4, 64), (65, 64, 4, 128), (257, 64, 4, 320), (600, 64, 4, 640), (1024, 64, 4, 1024),
     (1025, 64, 4, 1280)],
)  # fmt: skip
def test_buckets(n, least, steps, expected):
    assert generation._bucket(n, least, steps) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(input_ids=[]), "prompt is empty"),
        (dict(input_ids=np.zeros((2, 0), int)), "prompt is empty"),
        (dict(input_ids=[[1.5]]), r"float64 \(1, 1\)"),
        (dict(input_ids=[[[1]]]), r"\(1, 1, 1\)"),
        (dict(input_ids=[[1, 2], [3]]), "differ in length; pad"),
        (dict(input_ids=[3, 61]), r"input_ids\[0, 1\] is 61.*vocabulary of 61"),
        (dict(input_ids=[3, -1]), r"input_ids\[0, 1\] is -1"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=2.0), r"max_new_tokens is 2\.0"),
        (dict(max_new_tokens=93), "4 prompt tokens and 93 .* context of 96; .*92 new"),
        (dict(input_ids=[3] * 97), "97 prompt tokens.*context of 96; shorten"),
        (dict(attention_mask=[1, 1, 1, 0]), "pads after tokens; pad on the left"),
        (dict(attention_mask=[1, 0, 1, 1]), "pads after tokens"),
        (dict(attention_mask=[0, 0, 0, 0]), "has no token"),
        (dict(attention_mask=[1, 1, 2, 1]), "other values than 0"),
        (dict(attention_mask=[1, 1]), r"attention_mask is \(1, 2\) but input_ids is \(1, 4\)"),
        (dict(temperature=-1), "temperature is -1"),
        (dict(top_p=7), "top_p is 7"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=2**64), f"seed is {2**64}"),
        (dict(seed=0.5), r"seed is 0\.5"),
        (dict(stop=[[]]), r"stop sequence \[\]"),
        (dict(stop="end"), "stop sequence 'e'.*tokenizer"),
        (dict(stop=[3, 10**12]), r"stop sequence \[3, 1000000000000\] leaves the vocabulary"),
        (dict(stop=5), "stop is 5; pass a list of token ids"),
        (dict(stop=["end"]), "stop sequence 'end'.*tokenizer"),
        (dict(eos_token_id=61), "eos_token_id.*61.*vocabulary of 61"),
        (dict(eos_token_id="x"), "eos_token_id is 'x'"),
        (dict(cache_dtype=jnp.int8), "cache_dtype is int8"),
        (dict(cache_dtype="no"), "cache_dtype is 'no'"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        generate(**({"model": model, "input_ids": PROMPT, "max_new_tokens": 3} | arguments))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nan_logits_are_an_error_not_a_token(model, temperature):
    bias = model.layers[1].fc2.bias
    old = bias[...]
    bias[...] = old.at[3].set(np.nan)
    try:
        with pytest.raises(ValueError, match="logits of step 0 are NaN"):
            generate(model, PROMPT, 4, temperature=temperature)
    finally:
        bias[...] = old


def test_a_device_without_room_is_named(model, monkeypatch):
    """Where XLA says so; mostly memory.py has, before anything runs. The next call works."""
    expected = generate(model, PROMPT, 4)

    def prefill(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    programs, _ = generation.programs_of(model)
    said = r"generate: no room on .* for 1 rows of 8 tokens \(Out of .* 123 bytes\.\); pass fewer"
    with monkeypatch.context() as m:
        m.setattr(programs, "prefill", prefill)
        m.setattr(programs, "compile", lambda *args: None)
        with pytest.raises(jax.errors.JaxRuntimeError, match=said):
            generate(model, PROMPT, 4)
    np.testing.assert_array_equal(generate(model, PROMPT, 4), expected)
