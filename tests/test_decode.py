"""Decoding: the loop on the device, attention over the cache, sizes, and what fits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_opt
from flax import nnx
from reference import sparse_matrix
from tiny_opt import quick_compiles  # noqa: F401

import jax_flashllm
from jax_flashllm import attention
from jax_flashllm.models import cli, memory, opt, synthetic
from jax_flashllm.models import generate as generation
from jax_flashllm.models.cache import KVCache
from jax_flashllm.models.checkpoint import open_checkpoint
from jax_flashllm.models.commands import bench_decode, common, info
from jax_flashllm.models.config import PRESETS, OPTConfig
from jax_flashllm.models.generate import generate

PROMPT = [2, 17, 40, 5]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_opt.config("plain")
    path = tmp_path_factory.mktemp("plain")
    tiny_opt.save(path, config, tiny_opt.weights(config))
    return opt.load(path)


# ---- the loop ----


def started(model, ends, slots=64):
    programs, weights = generation.programs_of(model)
    ids = np.array([PROMPT, PROMPT[::-1]], np.int32)
    state = programs.prefill(weights, ids, np.ones_like(ids), ends, None, None, slots)
    return programs, weights, state


def test_chunks_of_any_size_give_the_same_tokens(model):
    ends = generation._table([])
    seen = []
    for sizes in ((32,), (1,) * 12 + (20,), (5, 27)):
        programs, weights, state = started(model, ends)
        parts = []
        for steps in sizes:
            state, tokens, count = programs.decode(weights, state, ends, None, None, steps)
            assert int(count) == steps
            parts.append(np.asarray(tokens)[:steps])
        seen.append(np.concatenate(parts))
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[2])


def test_the_device_stops_when_the_last_row_has_ended(model):
    programs, weights, state = started(model, generation._table([]))
    first = np.asarray(state.recent[:, -1])
    _, tokens, _ = programs.decode(weights, state, generation._table([]), None, None, 32)
    tokens = np.asarray(tokens)
    # An end of three tokens in one row, and of one in the other.
    rows = np.concatenate([first[None], tokens])
    long, short = rows[5:8, 0], rows[11:12, 1]
    ends = generation._table([long, short])
    assert ends.shape == (2, 3)

    def end_of(row):
        for n in range(len(rows)):
            tail = rows[: n + 1, row].tolist()
            if tail[-3:] == long.tolist() or tail[-1:] == short.tolist():
                return n
        raise AssertionError

    expected = max(end_of(0), end_of(1))
    programs, weights, state = started(model, ends)
    state, _, count = programs.decode(weights, state, ends, None, None, 32)
    assert int(count) == expected
    assert not np.asarray(state.open).any()
    assert int(state.cache.length) == len(PROMPT) + expected
    state, _, count = programs.decode(weights, state, ends, None, None, 32)
    assert int(count) == 0


def test_tokens_come_in_order_however_many_at_a_time(model, monkeypatch):
    expected = generate(model, PROMPT, 40, eos_token_id=())
    for pause in (0.0, 10.0):  # as many as fit, and one by one
        monkeypatch.setattr(generation, "STREAM_SECONDS", 1 / (pause or 1e-3))
        seen = []
        generate(model, PROMPT, 40, eos_token_id=(), on_token=seen.append)
        np.testing.assert_array_equal(np.stack(seen, axis=1), expected)


def test_the_pace_follows_the_model(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(generation.time, "perf_counter", lambda: now[0])
    pace = generation._Pace(watched=True, shared=False)
    sizes = []
    for _ in range(6):
        sizes.append(pace.steps)
        now[0] += 0.01 * pace.steps  # 10 ms a step
        pace.done(pace.steps)
    assert sizes[:2] == [1, 1]
    assert set(sizes[2:]) == {10}
    assert generation._Pace(watched=False, shared=False).steps == generation.CHUNK
    shared = generation._Pace(watched=True, shared=True)
    fixed = shared.steps
    shared.done(4), shared.done(4)
    assert shared.steps == fixed  # on every process the same


# ---- attention and the cache ----


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn])
def test_one_token_attends_as_in_a_whole_pass(dtype):
    B, h, d, S, length = 2, 3, 16, 12, 7
    random = np.random.default_rng(0)
    qkv = random.standard_normal((B, 3, h, d)).astype(np.float32)
    keys, values = (
        jnp.asarray(random.standard_normal((B * h, S, d)), jnp.float32).astype(dtype)
        for _ in range(2)
    )
    mask = np.arange(S) <= length
    mask = np.stack([mask, mask & (np.arange(S) > 2)])
    operands = jnp.asarray(qkv), keys, values, jnp.asarray(mask), jnp.int32(length)
    y, new_keys, new_values = attention.decode(*operands)
    stored = [np.asarray(a.astype(jnp.float32)) for a in (new_keys, new_values)]
    for held, before, new in zip(stored, (keys, values), (qkv[:, 1], qkv[:, 2]), strict=True):
        wide = np.array(before.astype(jnp.float32))
        wide[:, length] = np.asarray(jnp.asarray(new).astype(dtype).astype(jnp.float32)).reshape(
            B * h, d
        )
        np.testing.assert_array_equal(held, wide)
    k, v = (a.reshape(B, h, S, d).astype(np.float64) for a in stored)
    scores = np.einsum("bhd,bhsd->bhs", qkv[:, 0], k) / 4
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    exact = np.einsum("bhs,bhsd->bhd", weights, v).reshape(B, h * d)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "slot"), [(-1, 0), (3, 3), (5, 5), (9, 5)])
def test_the_new_slot_is_in_the_cache_and_none_counts_behind_it(length, slot):
    """As the CUDA kernel has it, which reads no slot behind the new one's."""
    random = np.random.default_rng(length + 1)
    qkv, held = (random.standard_normal(s).astype(np.float32) for s in ((1, 3, 2, 8), (2, 6, 8)))
    everywhere = jnp.ones((1, 6), bool)
    y, keys, _ = attention.decode(qkv, held, held, everywhere, jnp.int32(length))
    np.testing.assert_array_equal(np.delete(keys, slot, 1), np.delete(held, slot, 1))
    np.testing.assert_array_equal(keys[:, slot], qkv[0, 1])
    short = held[:, : slot + 1]
    want, *_ = attention.decode(qkv, short, short, everywhere[:, : slot + 1], jnp.int32(slot))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


def test_an_fp8_cache_holds_its_largest_number_for_larger_ones():
    cache = KVCache.create(OPTConfig(num_hidden_layers=1), 1, 4, jnp.float8_e4m3fn)
    new = jnp.full((12, 1, 64), 1e4, jnp.float32).at[0].set(-1e4).at[1].set(jnp.nan)
    keys, _ = cache.write(0, new, new)
    held = np.asarray(keys.astype(jnp.float32))[:, 0, 0]
    assert held[0] == -448
    assert np.isnan(held[1])
    assert (held[2:] == 448).all()


def test_generation_with_an_fp8_cache(model):
    exact = generate(model, PROMPT, 5, eos_token_id=())
    new = generate(model, PROMPT, 5, eos_token_id=(), cache_dtype="float8_e4m3fn")
    assert new.shape == exact.shape
    assert new[0, 0] == exact[0, 0]  # the prompt attends to itself, not to what the cache holds


def test_a_prompt_into_an_empty_cache_is_a_prompt_into_any(model):
    ids = np.array([PROMPT], np.int32)
    cache = KVCache.create(model.config, 1, 9, jnp.float32)
    logits, filled = jax.jit(model)(ids, None, cache)
    fresh, same = jax.jit(lambda ids, cache: model(ids, None, cache, empty=True))(ids, cache)
    np.testing.assert_allclose(fresh, logits, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(filled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# ---- random models ----


@pytest.mark.parametrize("shape", [(64, 256), (100, 300), (17, 65)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_drawn_bitmaps_are_bitmaps_of_that_sparsity(shape, sparsity, dtype):
    maker = synthetic._Maker(sparsity, dtype, 1)
    w = maker._bitmap(*shape)
    maker.check()
    w.validate()
    size = shape[0] * shape[1]
    assert abs(w.sparsity - sparsity) < 5 * (0.25 / size) ** 0.5
    dense = w.to_dense().astype(np.float32)
    assert len(np.unique(np.abs(dense[dense != 0]))) > 1 or sparsity > 0.9
    x = jnp.ones((2, shape[1]), jnp.float32)
    exact = np.asarray(x) @ dense.T
    np.testing.assert_allclose(jax_flashllm.spmm(w, x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.999])
def test_drawn_delta_csr_is_of_that_sparsity(sparsity):
    w = synthetic._Maker(sparsity, jnp.float16, 1, format="delta_csr")._sparse(100, 300)
    assert isinstance(w, jax_flashllm.DeltaCSR)
    assert abs(w.sparsity - sparsity) <= 5 * (sparsity * (1 - sparsity) / 30000) ** 0.5


def test_a_matrix_that_outgrew_its_room_is_noticed():
    maker = synthetic._Maker(0.5, jnp.float16, 1)
    w = maker._bitmap(64, 256)
    maker.room[0] = (w.offsets[0, -1], int(w.offsets[0, -1]) - 1)
    with pytest.raises(RuntimeError, match="more nonzeros than room"):
        maker.check()


@pytest.mark.parametrize(
    ("sparsity", "format"), [(0.7, "bitmap"), (0.9, "delta_csr"), (None, "bitmap")]
)
@pytest.mark.parametrize("variant", ["plain", "projections", "untied", "bare"])
def test_weight_bytes_are_those_of_the_model(variant, sparsity, format):
    config = OPTConfig.from_dict(tiny_opt.config(variant, hidden_size=256, ffn_dim=512))
    config = dataclasses.replace(
        config, word_embed_proj_dim=256 if variant != "projections" else 64
    )
    model = synthetic.synthesize(config, sparsity, jnp.float16, format=format)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    # Room for eight standard deviations is a lot where a matrix is small.
    told = memory.weight_bytes(config, sparsity, format)
    assert abs(told / held - 1) < (0.03 if sparsity else 1e-3)


# ---- sizes ----


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.9])
def test_bitmap_bytes(sparsity):
    w = jax_flashllm.encode(sparse_matrix((512, 1024), np.float16, sparsity), format="bitmap")
    # Values are allocated with room for up to 1/256 more.
    assert memory.bitmap_bytes(*w.shape, w.nnz) == pytest.approx(w.nbytes, rel=1 / 256 + 2e-3)


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.9, 0.99])
def test_delta_csr_bytes(sparsity):
    w = jax_flashllm.encode(sparse_matrix((512, 5000), np.float16, sparsity), format="delta_csr")
    assert memory.delta_csr_bytes(*w.shape, w.nnz) == pytest.approx(w.nbytes, rel=0.01)


def test_weights_take_their_bits_and_little_more():
    for name in ("opt-13b", "opt-66b", "opt-175b"):
        config = OPTConfig.preset(name)
        for sparsity in (0.5, 0.8):
            size = sum(m * k for m, k in memory.matrices(config)) * config.num_hidden_layers
            bits = (16 * (1 - sparsity) + 1) * size / 8
            other = memory.other_bytes(config)
            assert memory.weight_bytes(config, sparsity) <= 1.02 * (bits + other)


def test_opt_175b_fits_one_h200_and_its_dense_twin_does_not():
    config = OPTConfig.preset("opt-175b")
    sparse, dense = (
        memory.estimate(config, memory.weight_bytes(config, s), 8, 576, 64, 2) for s in (0.8, None)
    )
    assert sparse.total < 120e9 < memory.USABLE * memory.GPUS["h200"] < dense.total
    assert 174e9 < memory.weight_bytes(config, None) / 2 < 176e9


def test_what_does_not_fit_is_refused_with_its_numbers(model, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "free_bytes", lambda: 3000)
    made = []
    monkeypatch.setattr(KVCache, "create", lambda *args: made.append(args))
    with pytest.raises(ValueError, match=r"1 rows of 64 tokens needs .*cache 0\.0 MB.*0\.0 MB are"):
        generate(model, PROMPT, 4)
    assert not made
    config = tiny_opt.config("plain")
    path = tiny_opt.save(tmp_path / "plain", config, tiny_opt.weights(config))
    with pytest.raises(ValueError, match=r"opt\.load: .*needs 0\.0 MB \(weights.*mesh="):
        opt.load(path)
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    opt.load(path)


# ---- the commands ----


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process with a small model among the presets."""
    tiny = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 512}
    monkeypatch.setitem(PRESETS, "opt-tiny", tiny)
    monkeypatch.setattr(common, "cache_compilations", lambda: None)
    monkeypatch.setattr(bench_decode, "ROUNDS", 1)

    def run(*args):
        try:
            code = cli.main([str(a) for a in args])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_bench_decode(command, tmp_path):
    pytest.importorskip("matplotlib")
    csv, plot = tmp_path / "out.csv", tmp_path / "out.png"
    size = ("--context", 24, "--prompt", 8, "--batch", 1, 3)
    args = ("bench", "decode", "--config", "opt-tiny", "--dense", "--csv", csv, "--plot", plot)
    code, text, error = command(*args, *size)
    assert code == 0, error
    assert "70% sparse, batch 3" in text
    assert "dense, batch 3" in text
    rows = bench_decode._read(csv)
    assert [(r["sparsity"], r["batch"]) for r in rows] == [
        ("0.7", "1"), ("0.7", "3"), ("dense", "1"), ("dense", "3")
    ]  # fmt: skip
    for row in rows:
        assert float(row["step_ms"]) > 0
        assert float(row["tokens_s"]) == pytest.approx(
            1e3 * float(row["batch"]) / float(row["step_ms"]), rel=1e-2
        )
        assert int(row["cache_bytes_read"]) == 2 * 2 * int(row["batch"]) * 16 * 256 * 2
    assert int(rows[0]["weight_bytes"]) < int(rows[2]["weight_bytes"])
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_bench_decode_of_a_format(command, tmp_path):
    csv = tmp_path / "out.csv"
    args = ("bench", "decode", "--config", "opt-tiny", "--context", 12, "--prompt", 8, "--csv", csv)
    for format in ("auto", "delta_csr"):
        code, text, error = command(*args, "--format", format, "--sparsity", 0.9)
        assert code == 0, error
    assert "90% sparse (Delta-CSR), batch 1" in text
    assert [r["format"] for r in bench_decode._read(csv)] == ["bitmap", "delta_csr"]


def test_bench_decode_of_sampled_tokens(command, tmp_path):
    csv = tmp_path / "out.csv"
    args = ("bench", "decode", "--config", "opt-tiny", "--context", 12, "--prompt", 8, "--sample")
    code, _, error = command(*args, "--cache-dtype", "float8_e4m3fn", "--csv", csv)
    assert code == 0, error
    (row,) = bench_decode._read(csv)
    assert (row["choice"], row["cache_dtype"]) == ("sampled", "float8_e4m3fn")


def test_bench_decode_that_does_not_fit_says_so(command, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 100)
    code, _, error = command("bench", "decode", "--config", "opt-tiny")
    assert code == 2
    assert "opt-tiny, 70% sparse needs" in error
    assert "smaller --batch" in error


def test_generate_with_another_cache(command, monkeypatch):
    seen = []
    monkeypatch.setattr(KVCache, "create", _noting(KVCache.create, seen))
    args = ("generate", "--prompt", "Alice", "--max-new-tokens", 3, "--cache-dtype")
    code, text, error = command(*args, "float8_e4m3fn")
    assert code == 0, error
    assert text.startswith("Alice")
    assert {jnp.dtype(dtype) for dtype in seen} == {jnp.dtype(jnp.float8_e4m3fn)}


def _noting(create, seen):
    def noted(config, batch, slots, dtype):
        seen.append(dtype)
        return create(config, batch, slots, dtype)

    return noted


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("bench decode", "--config"),
        ("bench decode --config gpt-2", "gpt-2"),
        ("bench decode --config opt-125m --prompt 64 --context 64", "leaves no new token"),
        ("bench decode --config opt-125m --context 4096", "has 2048 positions"),
        ("bench decode --config opt-125m --sparsity 1.5", "1.5 is out of range"),
        ("info --config opt-125m --context 4096", "has 2048 positions"),
        ("info --gpu tpu", "'tpu' is no GPU known here"),
        ("info --sparsity 0.5", "--sparsity is that of --config"),
    ],
)
def test_mistakes(command, args, says):
    code, _, error = command(*args.split())
    assert code == 2
    assert says in error


def test_info_says_whether_it_fits(command):
    args = "info --config opt-175b --sparsity 0.8 --batch 8 --context 576 --prompt 64 --gpu"
    code, text, _ = command(*args.split(), "h200")
    assert code == 0
    assert "116.3 GB (weights 93.1 GB, cache 21.7 GB" in text
    assert "h200: 143.2 GB can be used: fits, 26.9 GB stay free" in text
    _, text, _ = command(*args.split(), "80")
    assert "GPU of 80: 76.0 GB can be used: 40.3 GB too much" in text


def test_info_of_a_model_counts_what_loading_takes(command, tmp_path, model):
    config = tiny_opt.config("plain", hidden_size=256, word_embed_proj_dim=256, ffn_dim=512)
    tensors = tiny_opt.weights(config, np.float16, sparsity=0.7)
    path = tiny_opt.save(tmp_path / "pruned", config, tensors)
    code, text, _ = command("info", path, "--batch", 2)
    assert code == 0
    assert "batch 2, context 96, prompt 96: " in text
    with open_checkpoint(path) as checkpoint:
        _, said = info.describe(checkpoint)
    loaded = opt.load(path, jnp.float16)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(loaded)))
    assert said == pytest.approx(held, rel=0.005)
