"""tune and the file it keeps, as far as a machine without a GPU can check them."""

import json
import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashllm
from jax_flashllm import _flashllm, plan, tuning
from jax_flashllm.formats import delta_csr

H100 = plan.Device(cores=132, warps=16, name="NVIDIA Test GPU/1")
SHAPES = [(1, 1), (64, 64), (768, 768), (4096, 4096), (28672, 7168), (9216, 36864)]

needs_cuda_build = pytest.mark.skipif(
    not hasattr(_flashllm, "cuda_targets"), reason="built without CUDA"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._load.cache_clear()
    yield tmp_path / "jax_flashllm"
    tuning._load.cache_clear()


def _keep(cut, shape=(4096, 4096), by_memory=0):
    tuning._keep(H100.name, tuning._key("bitmap", shape[0], 1, shape[1], by_memory), cut)


def _lookup(shape=(4096, 4096), by_memory=0):
    return tuning.lookup("bitmap", shape[0], 1, shape[1], H100, by_memory)


# ---- cuts ----


@pytest.mark.parametrize("format", ["bitmap", "delta_csr"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_memory", [0, 1, 2])
def test_every_cut_makes_a_sound_plan(shape, format, by_memory):
    m, k = shape
    found = plan.cuts(format, m, 1, k, H100, by_memory)
    assert found[0] == plan.model(format, m, 1, k, H100, by_memory)
    assert len(set(found)) == len(found)
    for cut in found:
        for tokens, terms in [(1, 1), (64, 1), (8, 3), (65, 1), (5000, 1)]:
            p = plan.choose(format, m, 1, k, tokens, terms, H100, cut)
            if format == "delta_csr":
                assert p.ctas == cut.ctas
                assert p.ctas % delta_csr.grid_of(k)[0] == 0
                assert p.warps == min(cut.warps, 32 if p.group < 8 else 20)
                continue
            assert 1 <= p.ctas <= -(-m // (p.warps * 16)) * -(-k // 256)
            assert 1 <= p.warps <= 16
            if tokens <= 64:
                assert (p.warps, p.ctas) == (cut.warps, cut.ctas)
            else:
                assert p == plan.choose(format, m, 1, k, tokens, terms, H100)


def test_measured_cuts_take_the_models_place_and_tuned_ones_theirs():
    for name, table in plan._MEASURED.items():
        gpu = plan.Device(cores=132, warps=16, name=name)
        for (format, m, k), cut in table.items():
            choices = plan.cuts(format, m, 1, k, gpu)
            assert cut in choices[1:]  # the first is the model's
            assert plan.cut_for(format, m, 1, k, gpu) == cut
            assert plan.cut_for(format, m, 2, k, gpu) == plan.model(format, m, 2, k, gpu)
            for by_memory in (0, 1):
                tuned = next(c for c in choices if c != cut)
                tuning._keep(name, tuning._key(format, m, 1, k, by_memory), tuned)
                assert plan.cut_for(format, m, 1, k, gpu, by_memory) == tuned
                assert plan.cut_for(format, m, 1, k, gpu, 1) == (tuned if by_memory else cut)


# ---- the file ----


def test_what_is_kept_is_found_again(cache):
    assert _lookup() is None
    _keep(plan.Cut(8, 132))
    _keep(plan.Cut(4, 7), shape=(5, 6))
    assert _lookup() == plan.Cut(8, 132)
    assert _lookup((5, 6)) == plan.Cut(4, 7)
    assert _lookup((6, 5)) is None
    assert _lookup(by_memory=1) is None
    _keep(plan.Cut(4, 9), by_memory=1)
    assert (_lookup(), _lookup(by_memory=1)) == (plan.Cut(8, 132), plan.Cut(4, 9))
    assert tuning.lookup("delta_csr", 4096, 1, 4096, H100, 0) is None
    (file,) = cache.iterdir()  # nothing temporary stays
    assert file.name == f"plans-{jax_flashllm.__version__}-NVIDIA-Test-GPU-1.json"


def test_each_gpu_model_has_its_own(cache):
    _keep(plan.Cut(8, 132))
    other = plan.Device(cores=132, warps=16, name="NVIDIA Other")
    assert tuning.lookup("bitmap", 4096, 1, 4096, other, 0) is None


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        *("", "{", "[1]", "\0", '{"a": 1}', '{"a": {"warps": 8}}'),
        *('{"a": {"warps": 0, "ctas": 1}}', '{"a": {"warps": "8", "ctas": 1}}'),
        '{"a": {"warps": 8, "ctas": 1, "x": 1}}',
    ],
)
def test_a_corrupt_file_is_ignored_with_a_warning(cache, text):
    cache.mkdir()
    path = tuning._path(H100.name)
    path.write_text(text)
    with pytest.warns(UserWarning, match="ignoring tuned plans"):
        assert _lookup() is None
    with pytest.warns(UserWarning, match="ignoring tuned plans"):
        _keep(plan.Cut(8, 132))
    assert _lookup() == plan.Cut(8, 132)
    assert len(json.loads(path.read_text())) == 1


def test_a_relative_cache_home_does_not_count(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert tuning._path("x").is_relative_to(Path.home() / ".cache")


# ---- use ----


def _lowered(w, x):
    f = jax.jit(lambda w, x: jax_flashllm.spmm(w, x))
    return f.trace(w, x).lower(lowering_platforms=("cuda",)).as_text()


@needs_cuda_build
def test_products_take_the_cut_that_was_kept(monkeypatch):
    monkeypatch.setattr(plan, "device", lambda: H100)
    w = jax_flashllm.encode(np.eye(2048, 4096, dtype=np.float16), "bitmap")
    few, many = (jnp.ones((n, 4096), jnp.float16) for n in (8, 65))
    default = f"warps = {plan.model('bitmap', 2048, 1, 4096, H100).warps} : i64"
    assert default in _lowered(w, few)
    cut = next(c for c in plan.cuts("bitmap", 2048, 1, 4096, H100) if c.warps == 4)
    _keep(cut, (2048, 4096))
    assert f"ctas = {cut.ctas} : i64" in _lowered(w, few)
    assert "warps = 4 : i64" in _lowered(w, few)
    assert default in _lowered(w, many)
    _keep(plan.Cut(999, 132), (2048, 4096))  # no cut of this GPU
    assert default in _lowered(w, few)


@needs_cuda_build
@pytest.mark.parametrize("format", ["bitmap", "delta_csr"])
def test_few_tokens_and_a_w_that_is_not_sparse_have_their_own_cut(format, monkeypatch):
    monkeypatch.setattr(plan, "device", lambda: H100)
    shape, x = (1936, 14848), jnp.ones((17, 14848), jnp.float16)
    usual, half, more = (plan.model(format, 1936, 1, 14848, H100, case) for case in range(3))
    assert len({usual, half, more}) == (3 if format == "bitmap" else 1)
    places = np.arange(math.prod(shape)).reshape(shape)
    for w, cuts in (
        (places % 2 == 0, {1: half, 16: half, 17: usual}),
        (places % 5 < 2, {1: more, 8: more, 9: usual, 17: usual}),
        (places % 3 == 0, {1: usual, 16: usual}),
    ):
        w = jax_flashllm.encode(w.astype(np.float16), format)
        for n, cut in cuts.items():
            text = _lowered(w, x[:n])
            most = 20 if format == "delta_csr" and n > 4 else 32
            assert f"warps = {min(cut.warps, most)} : i64" in text
            assert f"ctas = {cut.ctas} : i64" in text


def test_tune_keeps_the_fastest(monkeypatch):
    monkeypatch.setattr(plan, "device", lambda: H100)
    monkeypatch.setattr(tuning, "_device_of", lambda w: None)
    w = jax_flashllm.encode(np.eye(2048, 4096, dtype=np.float16), "bitmap")
    cuts = plan.cuts("bitmap", 2048, 1, 4096, H100)
    seen = []

    def clock(run, weights, xs):
        (cut, tokens), size = run, sum(w.nbytes for w in weights)
        seen.append((cut, tokens))
        assert size >= 32 * w.nbytes
        assert [x.shape for x in xs] == [(tokens, 4096)] * len(xs)
        return [{cuts[0]: 100.0, cuts[1]: fastest}.get(cut, 200.0) * tokens]

    def lower(f, weights, x, rounds):
        (cut,) = plan._forced
        compiled = types.SimpleNamespace(compile=lambda: (cut, len(x)))
        return compiled, weights, [x] * rounds

    monkeypatch.setattr(tuning, "_lower", lower)
    monkeypatch.setattr(tuning, "_time", clock)
    fastest = 99.5  # no more than noise
    assert jax_flashllm.tune(w, tokens=(1, 8))[0].cut == cuts[0]
    assert sorted(set(seen), key=seen.index) == [(c, n) for c in cuts for n in (1, 8)]
    fastest = 90.0
    lines = []
    trials = jax_flashllm.tune(w, tokens=(1, 4), progress=lines.append)
    assert len(lines) == 1 + len(cuts)
    assert f"{2 * len(cuts)} programs" in lines[0]
    assert trials[0].cut == cuts[1] == _lookup((2048, 4096))
    assert trials[0].microseconds == {1: 90.0, 4: 360.0}
    assert math.isclose(trials[0].score, 180)
    assert [t.cut for t in trials[1:]] == [cuts[0], *cuts[2:]]


def test_tune_keeps_a_cut_for_few_tokens_by_itself(monkeypatch):
    monkeypatch.setattr(plan, "device", lambda: H100)
    monkeypatch.setattr(tuning, "_device_of", lambda w: None)
    w = jax_flashllm.encode(np.ones((4096, 4096), np.float16), "bitmap")
    own, usual = (plan.cuts("bitmap", 4096, 1, 4096, H100, case) for case in (1, 0))
    fast = {8: own[2], 32: usual[3]}

    def lower(f, weights, x, rounds):
        compiled = types.SimpleNamespace(compile=lambda cut=plan._forced[0]: (cut, len(x)))
        return compiled, weights, [x] * rounds

    monkeypatch.setattr(tuning, "_lower", lower)
    monkeypatch.setattr(tuning, "_time", lambda run, *_: [1.0 if fast[run[1]] == run[0] else 2.0])
    trials = jax_flashllm.tune(w, tokens=(8, 32))
    assert [t.cut for t in trials[:2]] == [own[2], usual[3]]
    assert [t.microseconds for t in trials[:2]] == [{8: 1.0}, {32: 1.0}]
    assert len(trials) == len(own) + len(usual)
    assert (_lookup(by_memory=1), _lookup()) == (own[2], usual[3])


def test_tune_says_what_is_wrong():
    w = jax_flashllm.encode(np.eye(16, 64, dtype=np.float16), "bitmap")
    with pytest.raises(ValueError, match="put it on one GPU"):
        jax_flashllm.tune(w)
    with pytest.raises(TypeError, match=r"tune: w must be an encoded weight"):
        jax_flashllm.tune(np.eye(16))


def test_without_a_home_nothing_is_found(monkeypatch):
    """As in a container with a user id that nobody has."""
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert _lookup() is None
