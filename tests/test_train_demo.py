"""The demo's training script: the ramp, exact masks, and a whole run on a toy shape."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax")

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("train_demo", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_demo"]


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Twelve documents of regular sentences, which a toy model learns quickly."""
    rng = np.random.default_rng(0)
    nouns = ["rabbit", "queen", "hatter", "garden", "teapot", "mouse", "river", "watch"]
    verbs = ["saw", "followed", "painted", "lost", "remembered"]
    documents = []
    for _ in range(12):
        paragraphs = [
            " ".join(
                f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}."
                for _ in range(8)
            )
            for _ in range(10)
        ]
        documents.append("\r\n\r\n".join(paragraphs))
    root = tmp_path_factory.mktemp("books")
    (root / "train.txt").write_bytes("\n\n<|endoftext|>\n\n".join(documents).encode())
    (root / "eval.txt").write_bytes(documents[0][:1000].encode())
    return root


def arguments(books, out, *more):
    texts = ["--text", str(books / "train.txt"), "--eval-text", str(books / "eval.txt")]
    return [*texts, "--out", str(out), "--tiny", *more]


def test_the_ramp_fills_the_middle_half_and_ends_on_its_target(demo):
    recipe = demo.Recipe(steps_per_call=10)
    total = 400
    at = [demo.call_sparsity(step, total, recipe) for step in range(100, total, 10)]
    assert 0 < at[0] < 0.15
    assert all(a <= b for a, b in itertools.pairwise(at))
    assert at[200 // 10 - 1] == 0.7  # the last call before 3/4 already prunes fully
    assert at[-1] == 0.7
    # Half way, 1 - (1/2)^3 of the target.
    assert demo.ramp(200, 100, 300, 0.7) == pytest.approx(0.7 * 0.875)


@pytest.mark.parametrize("count", [0, 1, 7, 99, 100])
def test_a_mask_drops_exactly_the_smallest(demo, count):
    w = jax.random.normal(jax.random.key(count), (10, 10)).at[3].set(0.5)  # ties
    keep = np.asarray(demo.keep_mask(w, jnp.int32(count)))
    assert (~keep).sum() == count
    magnitude = np.abs(np.asarray(w))
    if 0 < count < 100:
        assert magnitude[~keep].max() <= magnitude[keep].min()


def test_counts_are_the_fewest_that_reach_the_sparsity(demo):
    params = {"a.kernel": jnp.zeros((10, 1)), "b.kernel": jnp.zeros((3, 3)), "b.bias": jnp.zeros(3)}
    assert demo.prune_counts(params, 0.7) == {"a.kernel": 7, "b.kernel": 7}
    assert demo.prune_counts(params, 0.0) == {"a.kernel": 0, "b.kernel": 0}


def test_pieces_tokenize_as_whole_documents_do(demo, books):
    documents = demo.read_documents(books / "train.txt")
    assert len(documents) == 12
    assert not any("\r" in d for d in documents)
    wrapped = demo.wrap_some(documents)
    assert max(map(len, wrapped[0].split("\n"))) <= 60 < max(map(len, wrapped[1].split("\n")))
    assert wrapped[0].split() == documents[0].split()
    long = ["\n\n".join(documents * 3), wrapped[0]]
    tokenizer = demo.train_tokenizer(documents, 320)
    want = np.concatenate([np.array([*tokenizer.encode(d).ids, demo.EOS]) for d in long])
    np.testing.assert_array_equal(demo.tokenize(tokenizer, long), want)
    sizes = demo.token_bytes(tokenizer)
    assert sizes[want].sum() == sum(len(d.encode()) for d in long)


def test_a_toy_run_learns_prunes_and_saves(demo, books, tmp_path):
    from safetensors.numpy import load_file

    metrics = demo.main(
        arguments(books, tmp_path, "--steps", "160", "--batch", "4", "--shard-mb", "0.06")
    )
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    for branch in ("sparse", "dense"):
        result = metrics["results"][branch]
        assert result["heldout_books"]["perplexity_per_token"] < 60  # 320 at the start
        assert result["eval.txt"]["bits_per_byte"] < 4
        index = json.loads((tmp_path / branch / "model.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert len(files) > 1
        tensors = {}
        for file in files:
            tensors |= load_file(tmp_path / branch / file)
        assert set(tensors) == set(index["weight_map"])
        linear = {k: w for k, w in tensors.items() if ".layers." in k and w.ndim == 2}
        assert len(linear) == 2 * 6
        assert all(w.dtype == np.float16 for w in tensors.values())
        zeros = sum((w == 0).sum() for w in linear.values()) / sum(w.size for w in linear.values())
        assert zeros == result["sparsity_of_linear_kernels"]
        if branch == "sparse":
            assert 0.7 <= zeros < 0.702
            assert np.count_nonzero(tensors["model.decoder.embed_tokens.weight"]) > 0.9 * 320 * 48
        else:
            assert zeros < 0.001
        # q, k and v are cut from one kernel; outputs come first in a saved weight.
        assert linear["model.decoder.layers.0.fc1.weight"].shape == (96, 48)
        assert linear["model.decoder.layers.0.self_attn.q_proj.weight"].shape == (48, 48)
    # Both branches read the same text in the same order, so their logs have the same steps.
    rows = [line.split(",") for line in (tmp_path / "train_log.csv").read_text().splitlines()[1:]]
    steps = {b: [r[1] for r in rows if r[0] == b] for b in ("shared", "sparse", "dense")}
    assert steps["sparse"] == steps["dense"]
    assert steps["shared"][-1] == "40"


def test_steps_must_make_whole_quarters(demo, books, tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(arguments(books, tmp_path, "--steps", "9"))
    assert "a positive multiple of 8" in capsys.readouterr().err
