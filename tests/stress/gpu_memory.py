"""A GPU that runs out of memory, and a generation repeated: on a machine with one.

    XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.05 \\
        python tests/stress/gpu_memory.py --repeats 100

Memory: with the rest of it taken, encode, load and generate must raise RESOURCE_EXHAUSTED; with the
rest given back the same call must work, and all memory come back after it.
Determinism: the same tokens, and the same logits bit for bit, every time and in every row.
"""

import contextlib
import gc

import jax
import numpy as np

import jax_flashllm as jf
from jax_flashllm.models import opt
from jax_flashllm.models.commands.common import DEMO
from jax_flashllm.models.generate import generate

DEVICE = jax.devices()[0]


def in_use() -> int:
    gc.collect()
    return DEVICE.memory_stats()["bytes_in_use"]


@contextlib.contextmanager
def full(leave: int):
    """All memory taken but about `leave` bytes: in halves, as the allocator has it in pieces."""
    taken, size = [], 1 << 40
    stats = DEVICE.memory_stats()
    room = stats["bytes_limit"] - stats["bytes_in_use"] - leave
    while size > 1 << 20:
        if size > room:
            size //= 2
            continue
        try:
            taken.append(jax.device_put(np.empty(size, np.uint8), DEVICE).block_until_ready())
            room -= size
        except jax.errors.JaxRuntimeError:
            size //= 2
    yield
    taken.clear()


def exhausts(name: str, work, leave: int) -> None:
    """`work` returns what it made; it is dropped, and memory must be as before."""
    work()  # compiled, and constants placed
    before = in_use()
    with full(leave):
        try:
            work()
            raise SystemExit(f"{name}: fits into {leave} bytes; leave less")
        except jax.errors.JaxRuntimeError as error:
            text = str(error).splitlines()[0]
            assert "RESOURCE_EXHAUSTED" in text, text
    between = in_use()
    work()
    after = in_use()
    assert max(between, after) <= before, (before, between, after)
    print(f"{name}: {text[:110]!r}; {before} bytes in use before, {between} then, {after} after "
          "it worked", flush=True)  # fmt: skip


def memory() -> None:
    def encode(dense, format):
        exhausts(
            f"encode {format} from {type(dense).__name__}",
            lambda: jax.block_until_ready(jf.encode(dense, format)),
            4 << 20,
        )

    rng = np.random.default_rng(0)
    dense = np.where(rng.random((4096, 4096), np.float32) < 0.3, np.float16(1.5), np.float16(0))
    encode(dense, "bitmap")
    encode(jax.device_put(dense), "bitmap")
    encode(jax.device_put(dense), "tiled_csl")
    exhausts("load", lambda: opt.load(DEMO), 2 << 20)
    model = opt.load(DEMO)
    prompts = np.full((512, 64), 5)
    exhausts("generate", lambda: generate(model, prompts, 2, eos_token_id=()), 32 << 20)


if __name__ == "__main__":
    memory()
