"""Load, faults and repetition: a little of each script in tests/stress."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from tiny_opt import quick_compiles  # noqa: F401

sys.path.append(str(pathlib.Path(__file__).parent / "stress"))
import determinism
import faults
import load
import sanitize_gpu


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


def test_killed_while_saving(tmp_path):
    faults.kill_while_saving(8, tmp_path)


def test_killed_while_pruning(tmp_path):
    faults.kill_while_pruning(4, tmp_path)


def test_interrupted_generations(tmp_path):
    faults.interrupt_generations(4, tmp_path)


def test_a_full_disk(tmp_path):
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("needs root, for a tmpfs")
    try:
        assert "the disk is full; free space there" in faults.fill_a_disk(tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("no tmpfs can be mounted here")


def test_the_same_tokens_and_bits_every_time(tmp_path):
    determinism.determinism(load.tiny_model(tmp_path, num_hidden_layers=1), 5, tokens=24)


def test_handlers_called_by_themselves():
    """What compute-sanitizer runs on a GPU, with the CPU's handlers."""
    run = sanitize_gpu.Runtime(host=True)
    assert sanitize_gpu.valid(run, quick=True) == 84
    assert 0 < sanitize_gpu.garbage(run, 30, seed=0) < 90
    assert run.called == run.targets.keys()
