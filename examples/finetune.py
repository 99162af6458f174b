"""Fine-tunes a packed model with its masks fixed: what pruning zeroed stays zero.

    float32 masters --cast--> stored values in 16 bits -> spmm -> loss     values [nnz], not [M, K]
          ^-------------- AdamW <-- gradients in the stored values --------'

The products are `spmm`, forward and for the gradient in x after one decode; the gradient in the
stored values is a dense product [M, N] x [N, K] of which the stored part is kept, so a step costs
what a dense one does plus the decoding, and saves memory in weights, gradients and moments alone.

    python examples/finetune.py --model packed --text books.txt.xz --out tuned --tokens 2000000 \\
        --teacher dense

With --teacher the loss is (1 - alpha) cross entropy + alpha KL(teacher || student), after Hinton et
al., Distilling the Knowledge in a Neural Network (2015), at temperature 1.
"""

from __future__ import annotations

import argparse
import functools
import lzma
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from jax_flashllm.models import opt, weights
from jax_flashllm.models.checkpoint import open_checkpoint, save_packed
from jax_flashllm.models.commands.prune import TOKENIZER_FILES
from jax_flashllm.models.config import is_linear
from jax_flashllm.models.tokenizer import open_tokenizer
from jax_flashllm.nn import SparseDense


def read_ids(path: Path, model: Path) -> np.ndarray:
    """int32 ids [n] of a text or .xz file, by the model's tokenizer."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        text = file.read()
    return np.asarray(open_tokenizer(model).encode(text, add_special_tokens=False), np.int32)


def make_step(model: opt.OPT, teacher: opt.OPT | None, alpha: float, optimizer: Any):
    """(masters, step): float32 parameters, and step(masters, moments, windows [B, T + 1]).

    step returns the new masters and moments, and the cross entropy in nats.
    """
    graphdef, stored, index = nnx.split(model, nnx.Param, ...)
    masters = jax.tree.map(lambda p: p.astype(jnp.float32), stored)
    dtypes = jax.tree.map(lambda p: p.dtype, stored)
    teacher_def, teacher_state = (None, None) if teacher is None else nnx.split(teacher)

    def loss_of(masters, index, teacher_state, windows):
        params = jax.tree.map(lambda p, dtype: p.astype(dtype), masters, dtypes)
        logits = nnx.merge(graphdef, params, index)(windows[:, :-1])
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()
        if teacher_def is None:
            return hard, hard
        wanted = jax.nn.log_softmax(nnx.merge(teacher_def, teacher_state)(windows[:, :-1]))
        soft = jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(logits)), axis=-1).mean()
        return (1 - alpha) * hard + alpha * soft, hard

    # Index and teacher are arguments: closed over, they would be copied into the program.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(masters, moments, windows, index, teacher_state):
        grad = jax.value_and_grad(loss_of, has_aux=True)
        (_, hard), grads = grad(masters, index, teacher_state, windows)
        updates, moments = optimizer.update(grads, moments, masters)
        return optax.apply_updates(masters, updates), moments, hard

    return masters, lambda *state: step(*state, index, teacher_state)


def finish(model: opt.OPT, masters: Any) -> None:
    """Puts the trained values back into the model, in the dtypes that it holds."""
    stored = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda m, p: m.astype(p.dtype), masters, stored))


def save(model: opt.OPT, source: Path, out: Path) -> int:
    with open_checkpoint(source) as checkpoint:
        dtypes = {name: checkpoint.dtype(name) for name in checkpoint.names()}
        tensors = ((n, w.astype(dtypes.get(n, w.dtype))) for n, w in weights.tensors(model))
        files = [source / n for n in TOKENIZER_FILES if (source / n).is_file()]
        sparse = {n for n in dtypes if is_linear(n) and checkpoint.is_sparse(n)}
        return save_packed(out, checkpoint.config, tensors, sparse, files)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="packed model to start from")
    parser.add_argument("--text", type=Path, required=True, help="training text, plain or .xz")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="to train on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier than that")
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--context", type=int, help="tokens a window; default the model's")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="peak")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--teacher", type=Path, help="dense model to distil from")
    parser.add_argument("--alpha", type=float, default=0.5, help="share of the teacher in the loss")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"{args.out} exists; choose another --out.")
    if not 0 <= args.alpha <= 1:
        parser.error(f"--alpha is {args.alpha}; it is from 0 to 1.")

    model = opt.load(args.model, args.dtype)
    if not any(isinstance(module, SparseDense) for _, module in nnx.iter_modules(model)):
        parser.error(f"{args.model} has no sparse layers; prune it first.")
    teacher = opt.load(args.teacher, args.dtype) if args.teacher else None
    context = args.context or model.config.max_position_embeddings
    ids = read_ids(args.text, args.model)
    if len(ids) <= context:
        parser.error(f"--text has {len(ids)} tokens: too few for windows of {context}.")
    steps = max(args.tokens // (args.batch * context), 1)
    # Warm up for a twentieth, then down to zero along a cosine.
    rate = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, -(-steps // 20), steps + 1)
    decays = lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)  # noqa: E731
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.95, weight_decay=args.weight_decay, mask=decays),
    )
    masters, step = make_step(model, teacher, args.alpha, optimizer)
    moments = optimizer.init(masters)
    random = np.random.default_rng(args.seed)
    start, losses = time.perf_counter(), []
    with tqdm(total=steps, desc="finetune", unit="step", disable=None) as bar:
        for done in range(steps):
            at = random.integers(0, len(ids) - context, (args.batch, 1))
            windows = ids[at + np.arange(context + 1)]
            masters, moments, loss = step(masters, moments, windows)
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss of step {done} is {losses[-1]}; stopped.")
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
            if time.perf_counter() - start > 60 * args.minutes:
                break
    finish(model, masters)
    size = save(model, args.model, args.out)
    seconds = time.perf_counter() - start
    tokens = len(losses) * args.batch * context
    tail = losses[-max(len(losses) // 10, 1) :]
    print(
        f"{args.out}: {size / 1e6:.1f} MB; {tokens:,} tokens in {seconds:.0f} s, "
        f"{len(losses)} steps; loss {losses[0]:.3f} -> {np.mean(tail):.3f}"
    )
    return {"tokens": tokens, "seconds": seconds, "first": losses[0], "last": float(np.mean(tail))}


if __name__ == "__main__":
    main()
