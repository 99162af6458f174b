"""A GPU that runs out of memory in encode, load and generate: on a machine with one.

    python tests/stress/gpu_memory.py

With most of the memory taken each of them must raise an error that says what ran out, how much and
what to do; with the memory given back the same call must work, and leave as much in use as before.
Each case is a process of its own with 2% of the GPU, all at once: XLA waits for ten seconds before
it gives up an allocation. "refused by XLA" is without this package's own sums beforehand. Not
shown: a call with several results, where XLA has room for the first ones only. It keeps those (jax
0.11.2), so that the sums beforehand are there to keep such calls away.
"""

import contextlib
import gc
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

SHARE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.02"}


def in_use() -> int:
    import jax

    gc.collect()
    return jax.devices()[0].memory_stats()["bytes_in_use"]


@contextlib.contextmanager
def full(leave: int):
    """Takes memory until between `leave` and twice as much is free; says how much that is.

    By halves of what is free, none of which can fail: the allocator splits a block in two where
    both parts are large.
    """
    import jax
    import numpy as np

    device, taken = jax.devices()[0], []
    while True:
        stats = device.memory_stats()
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        size = min(free, stats["largest_free_block_bytes"]) // 512 * 256
        if free - size < leave:
            break
        taken.append(jax.device_put(np.zeros(size, np.uint8), device).block_until_ready())
    yield free
    taken.clear()


def exhausts(name: str, work, leave: int, says: str) -> None:
    """`work` fails where between `leave` and twice as many bytes are free; its error `says`."""
    import jax

    work()  # compiled, and constants placed
    before, said = in_use(), None
    with full(leave) as free:
        start = time.monotonic()
        try:
            work()
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
        took = time.monotonic() - start
    assert said is not None, f"{name} fits into {free} bytes; leave less"
    between = in_use()
    work()
    after = in_use()
    print(f"{name}: with {free / 1e6:.1f} MB free, after {took:.1f} s\n    {said}\n"
          f"    in use: {before} bytes before, {between} then, {after} after it worked",
          flush=True)  # fmt: skip
    assert says in said, says
    assert max(between, after) <= before


def run(case: str) -> None:
    import jax
    import numpy as np
    from flax import nnx

    import jax_flashllm as jf
    from jax_flashllm.formats import on_gpu
    from jax_flashllm.models import memory, opt
    from jax_flashllm.models.commands.common import DEMO
    from jax_flashllm.models.generate import generate

    assert jax.default_backend() == "gpu", "needs a GPU"
    if case.endswith("by XLA"):  # what the sums beforehand let pass
        memory.check_fits = on_gpu.check_free = lambda *args: None
    if case.startswith("encode"):
        rng = np.random.default_rng(0)
        dense = np.where(rng.random((4096, 4096), np.float32) < 0.3, np.float16(1.5), np.float16(0))
        if "device" in case:
            dense = jax.device_put(dense)
        format = "bitmap" if "bitmap" in case else "delta_csr"
        exhausts(
            case,
            lambda: jax.block_until_ready(jf.encode(dense, format)),
            5 << 20,  # the masks fit
            "encode: no room",
        )
        return
    if case.startswith("load"):
        says = "opt.load: no room" if case.endswith("by XLA") else "prune it further"
        exhausts(case, lambda: jax.block_until_ready(nnx.state(opt.load(DEMO))), 1 << 20, says)
    else:
        model = opt.load(DEMO)
        prompts = np.full((256, 64), 5)
        says = "generate: no room" if case.endswith("by XLA") else "pass fewer rows"
        exhausts(case, lambda: generate(model, prompts, 2, eos_token_id=()), 8 << 20, says)


CASES = ["encode of the host's to bitmap", "encode on the device to bitmap",
         "encode on the device to delta_csr", "encode on the device to bitmap, refused by XLA",
         "load", "load, refused by XLA", "generate", "generate, refused by XLA"]  # fmt: skip


def main() -> None:
    if len(sys.argv) > 1:
        run(sys.argv[1])
        return

    def child(case: str) -> int:
        done = subprocess.run(
            [sys.executable, "-P", __file__, case],
            env={**os.environ, **SHARE, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(done.stdout if done.returncode == 0 else f"{case} FAILED\n{done.stdout}", flush=True)
        return done.returncode

    with ThreadPoolExecutor(len(CASES)) as threads:
        sys.exit(max(map(abs, threads.map(child, CASES))))


if __name__ == "__main__":
    main()
