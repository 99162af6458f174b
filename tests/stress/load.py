"""Many calls, many models, threads and a fork; tests/test_load.py runs a little of each.

python tests/stress/load.py        # 10,000 products, 1,000 generations, 64 models
"""

import argparse
import gc
import itertools
import os
import pathlib
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import tiny_opt
from reference import FLOATS, FORMATS, HALVES, bits, sparse_matrix

import jax_flashllm as jf
from jax_flashllm.formats import encode_on_host
from jax_flashllm.models import opt
from jax_flashllm.models.generate import generate


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def products(count: int, threads: int) -> None:
    """Every call of every thread gives the bits that the first one gave."""
    rng, jobs = np.random.default_rng(0), []
    shapes = [(64, 64, 1), (300, 520, 8), (1024, 2048, 3), (2048, 1024, 40)]
    for (m, k, n), format, dtype, token in itertools.product(shapes, FORMATS, HALVES, FLOATS):
        w = jf.encode(sparse_matrix((m, k), dtype, 0.3), format)
        x = jnp.asarray(rng.standard_normal((n, k), np.float32).astype(token))
        jobs.append((w, x))
    multiply = jax.jit(jf.spmm)
    expected = [bits(multiply(*job)) for job in jobs]

    def one(i):
        np.testing.assert_array_equal(bits(multiply(*jobs[i % len(jobs)])), expected[i % len(jobs)])

    with ThreadPoolExecutor(threads) as pool:
        done = sum(1 for _ in pool.map(one, range(count)))
    assert done == count


def tiny_model(directory, **overrides) -> opt.OPT:
    config = tiny_opt.config("plain", **overrides)
    stored = tiny_opt.weights(config, np.float16, sparsity=0.7)
    return opt.load(tiny_opt.save(pathlib.Path(directory), config, stored))


def generations(model, count: int, settled: int = 100, most=(4, 60, 30)) -> float:
    """Growth of the process after the first `settled` calls, as a share of it.

    most: rows, tokens of a prompt, new tokens.
    """
    rng = np.random.default_rng(0)
    # The first calls meet every shape of program that the others ask for.
    lengths = [n for n in (10, 20, 40) if n <= most[1]]
    sizes = list(itertools.product(range(1, most[0] + 1), lengths, (1, most[2]), (0.0, 1.0)))
    assert len(sizes) <= settled
    before = live = None
    for i in range(count):
        if i == settled:
            before, live = resident(), len(jax.live_arrays())
        rows, length, new = (int(n) for n in rng.integers(1, np.add(most, 1)))
        temperature = float(i % 2)
        if i < len(sizes):
            rows, length, new, temperature = sizes[i]
        ids = rng.integers(3, model.config.vocab_size, (rows, length))
        out = generate(model, ids, new, eos_token_id=(), temperature=temperature, seed=i)
        assert out.shape == (rows, new)
    assert before is not None
    gc.collect()
    assert len(jax.live_arrays()) == live
    return resident() / before - 1


def models(count: int, directory, settled: int = 8) -> float:
    """As `generations`, of models loaded, used once and dropped."""
    before = live = None
    path = pathlib.Path(directory)
    tiny_model(path)
    for i in range(count):
        if i == settled:
            before, live = resident(), len(jax.live_arrays())
        model = opt.load(path)
        generate(model, [5, 6, 7], 4, eos_token_id=())
        del model
    assert before is not None
    gc.collect()
    assert len(jax.live_arrays()) == live
    return resident() / before - 1


def fork() -> str:
    """What a forked copy of a process that has multiplied can do, and what it says."""
    w, x = jf.encode(sparse_matrix((512, 512), np.float16, 0.3)), jnp.ones((4, 512))
    multiply = jax.jit(jf.spmm)
    expected = np.asarray(multiply(w, x))
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's own, that forking it is unsafe
        child = os.fork()
    if child == 0:
        signal.alarm(20)  # a hang ends so
        try:
            encode_on_host(w.to_dense())
            np.testing.assert_array_equal(multiply(w, x), expected)
            jf.spmm(w, 2 * np.ones((3, 512), np.float32))
            os.write(write, b"no error")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.close(write)
    assert not os.WIFSIGNALED(status), f"signal {os.WTERMSIG(status)}"
    with os.fdopen(read) as said:
        return said.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--products", type=int, default=10_000)
    parser.add_argument("--generations", type=int, default=1_000)
    parser.add_argument("--models", type=int, default=64)
    options = parser.parse_args()
    start = time.monotonic()

    def say(text):
        print(f"{text} ({time.monotonic() - start:.0f} s)", flush=True)

    print("fork:", fork(), flush=True)
    products(options.products, 16)
    say(f"{options.products} products from 16 threads, the same bits each time")
    with tempfile.TemporaryDirectory() as directory:
        growth = generations(tiny_model(directory), options.generations)
        say(f"{options.generations} generations: {growth:+.2%} of memory after the first 100")
        assert growth <= 0.01
        growth = models(options.models, directory)
        say(f"{options.models} models loaded and dropped: {growth:+.2%} after the first 8")
        assert growth <= 0.01


if __name__ == "__main__":
    main()
