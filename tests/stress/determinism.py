"""One generation again and again, on the CPU or the GPU that JAX finds.

    python tests/stress/determinism.py --repeats 100

The same 256 tokens, and the same logits bit for bit, every time, in every row, beside any others.
"""

import argparse
import time

import jax
import numpy as np

from jax_flashllm.models import opt
from jax_flashllm.models.commands.common import DEMO
from jax_flashllm.models.generate import generate


def determinism(model: opt.OPT, repeats: int, tokens: int = 256) -> None:
    prompt = np.random.default_rng(0).integers(3, model.config.vocab_size, 16)
    start = time.monotonic()
    first = generate(model, prompt, tokens, eos_token_id=())
    forward = jax.jit(model)
    logits = np.asarray(forward(first)).tobytes()
    for _ in range(repeats - 1):
        np.testing.assert_array_equal(generate(model, prompt, tokens, eos_token_id=()), first)
        assert np.asarray(forward(first)).tobytes() == logits
    print(f"{repeats} generations of {tokens} tokens: the same, logits to the last bit "
          f"({time.monotonic() - start:.0f} s)", flush=True)  # fmt: skip
    rows = generate(model, np.tile(prompt, (8, 1)), tokens, eos_token_id=())
    assert (rows == rows[0]).all()
    same = int((rows[0] == first[0]).cumprod().sum())
    print(
        f"8 rows of the same prompt: the same tokens; {same} of {tokens} as in a batch of 1",
        flush=True,
    )
    others = np.random.default_rng(1).integers(3, model.config.vocab_size, (8, 16))
    for at in (0, 3, 7):
        batch = others.copy()
        batch[at] = prompt
        got = generate(model, batch, tokens, eos_token_id=())
        np.testing.assert_array_equal(got[at], rows[0])
    print("the same tokens in rows 0, 3 and 7 beside other prompts", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=100)
    determinism(opt.load(DEMO), parser.parse_args().repeats)


if __name__ == "__main__":
    main()
