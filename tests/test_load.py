"""Threads, many calls, dropped models, a fork: a little of tests/stress/load.py."""

import os
import pathlib
import sys

import pytest
from tiny_opt import quick_compiles  # noqa: F401

sys.path.insert(0, str(pathlib.Path(__file__).parent / "stress"))
import load


def test_products_from_many_threads():
    load.products(600, 16)


def test_generations_leave_no_arrays(tmp_path):
    model = load.tiny_model(tmp_path, num_hidden_layers=1)
    # tests/stress/load.py: 0.01, of a process that does nothing else
    assert load.generations(model, 40, settled=10, most=(1, 16, 8)) < 0.05


def test_models_are_dropped(tmp_path):
    assert load.models(10, tmp_path, settled=4) < 0.05


FORK = """
import sys
sys.path[:0] = sys.argv[1:]
import load
print(load.fork())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_says_that_it_would_hang(fresh_process):
    tests = pathlib.Path(__file__).parent
    said = fresh_process(FORK, str(tests / "stress"), str(tests))
    assert said.startswith("RuntimeError: spmm: this process was forked")
    assert "'spawn'" in said
