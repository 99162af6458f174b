"""The model that ships: its size, its sparsity, and that it is as good as its card says."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from jax_flashllm.models import opt
from jax_flashllm.models.checkpoint import open_checkpoint
from jax_flashllm.models.commands.common import DEMO
from jax_flashllm.models.commands.info import is_linear
from jax_flashllm.models.densify import densify, sparse_share
from jax_flashllm.models.evaluate import perplexity
from jax_flashllm.models.generate import generate
from jax_flashllm.models.tokenizer import open_tokenizer
from jax_flashllm.nn import SparseDense

ROOT = Path(__file__).parent.parent
ALICE = Path(__file__).parent / "testdata" / "alice29.txt"
TRAINING = ROOT / "benchmarks" / "results" / "demo_training.json"


@pytest.fixture(scope="module")
def model():
    return opt.load(DEMO)


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(DEMO)


def card_rows():
    """(text, model, tokens, bytes, per token, per byte, bits per byte) of the card's table."""
    card = (DEMO / "MODEL_CARD.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+?twin|[^|]+?sparse) \|((?:[^|]+\|){5})$", card, re.M)
    return [
        (text, which, *(float(x.replace(",", "")) for x in cells.split("|")[:5]))
        for text, which, cells in rows
    ]


def test_it_is_small_enough_to_ship():
    assert sum(f.stat().st_size for f in DEMO.iterdir()) <= 12e6


def test_every_linear_layer_is_packed_and_70_percent_of_them_zero():
    with open_checkpoint(DEMO) as checkpoint:
        names = [n for n in checkpoint.names() if is_linear(n)]
        assert len(names) == 36
        assert all(checkpoint.is_sparse(n) for n in names)
        weights = sum(math.prod(checkpoint.shape(n)) for n in names)
        assert 1 - sum(checkpoint.nnz(n) for n in names) / weights >= 0.7


def test_it_loads_sparse(model):
    assert sparse_share(model) >= 0.7
    assert isinstance(model.layers[0].fc1, SparseDense)


@pytest.mark.skipif(not TRAINING.exists(), reason="the training record is not installed")
def test_the_card_says_what_training_measured():
    results = json.loads(TRAINING.read_text())["results"]
    rows = card_rows()
    assert len(rows) == 4
    for text, which, *numbers in rows:
        measured = results["dense" if "twin" in which else "sparse"]
        measured = measured["alice29.txt" if "alice" in text else "heldout_books"]
        keys = ("tokens", "bytes", "perplexity_per_token", "perplexity_per_byte", "bits_per_byte")
        assert numbers == pytest.approx([measured[k] for k in keys], rel=3e-5)


def test_it_is_as_good_as_its_card_says(model, tokenizer):
    ids = tokenizer.encode(ALICE.read_text(encoding="utf-8"), add_special_tokens=False)
    result = perplexity(model, ids, tokenizer.token_bytes())
    _, _, tokens, size, per_token, per_byte, bits = card_rows()[0]
    assert (result.tokens, result.bytes) == (tokens, size)
    assert result.per_token == pytest.approx(per_token, rel=1e-3)
    assert result.per_byte == pytest.approx(per_byte, rel=1e-3)
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-3)


def test_dense_layers_of_the_same_weights_write_the_same_text(model, tokenizer):
    dense = densify(model, np.float32)
    assert sparse_share(dense) is None
    assert sparse_share(model) is not None  # densify copies
    ids = tokenizer.encode("It was a dark night, and the")
    np.testing.assert_array_equal(
        generate(model, ids, 32, eos_token_id=()), generate(dense, ids, 32, eos_token_id=())
    )


def test_its_text_round_trips(tokenizer):
    text = "“Curiouser—and curiouser!” cried Alice.\n\n  Tab\tand é, 漢字, 🙂."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())
