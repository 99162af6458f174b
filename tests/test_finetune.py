"""The fine-tuning example: masks stay, the loss falls, what is saved is what was trained."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_opt
from tiny_opt import quick_compiles  # noqa: F401

from jax_flashllm.models import opt
from jax_flashllm.models.checkpoint import open_checkpoint, save_packed
from jax_flashllm.models.commands.common import DEMO

pytest.importorskip("optax")

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune.py"


@pytest.fixture(scope="module")
def finetune():
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["finetune"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A dense and a 60% sparse tiny model with the demo's tokenizer, and a text."""
    root = tmp_path_factory.mktemp("models")
    config = tiny_opt.config("plain", vocab_size=4096, max_position_embeddings=32)
    for name, sparsity in (("dense", 0.0), ("sparse", 0.6)):
        tensors = tiny_opt.weights(config, np.float16, sparsity)
        sparse = [
            n for n in tensors if ".layers." in n and n.endswith(".weight") and "norm" not in n
        ]
        files = [DEMO / "tokenizer.json"]
        save_packed(root / name, config, tensors.items(), sparse if sparsity else [], files)
    (root / "text.txt").write_text("It was a dark night, and the moon was not to be seen. " * 60)
    return root


def arguments(packed, out, *more):
    return [
        "--model", str(packed / "sparse"), "--text", str(packed / "text.txt"), "--out", str(out),
        "--batch", "4", "--tokens", str(4 * 32 * 12), "--learning-rate", "0.02", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("teacher", [False, True], ids=["alone", "taught"])
def test_the_loss_falls_and_the_masks_stay(finetune, packed, tmp_path, teacher):
    more = ["--teacher", str(packed / "dense"), "--alpha", "0.1"] if teacher else []
    result = finetune.main(arguments(packed, tmp_path / "out", *more))
    assert result["tokens"] == 4 * 32 * 12
    assert result["last"] < 0.6 * result["first"]
    with open_checkpoint(packed / "sparse") as old, open_checkpoint(tmp_path / "out") as new:
        assert set(new.names()) == set(old.names())
        for name in old.names():
            before, after = old.read(name), new.read(name)
            assert after.dtype == before.dtype == np.float16
            assert (before != after).any()
            if old.is_sparse(name):
                assert new.is_sparse(name)
                # A value may become zero, a zero stays one.
                assert (after[before == 0] == 0).all()
                assert np.count_nonzero(after) > 0.99 * np.count_nonzero(before)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    opt.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--alpha", "2"], "--alpha is 2"),
        (["--context", "32", "--text", "short"], "too few for windows of 32"),
        (["--model", "dense"], "no sparse layers"),
        (["--out", "dense"], "exists; choose another"),
    ],
)
def test_mistakes_say_what_to_do(finetune, packed, tmp_path, capsys, change, says):
    (packed / "short").write_text("two words")
    change = [str(packed / c) if c in ("dense", "short") else c for c in change]
    with pytest.raises(SystemExit):
        finetune.main([*arguments(packed, tmp_path / "out"), *change])
    assert says in capsys.readouterr().err
