"""Trains the demo model: one small OPT, dense for a quarter of the steps, then twice from there.

    step   0        N/4                    3N/4        N
           |--shared--|--------dense twin----------------|   same windows, same learning rate
                      |--ramp 0 -> 70%------|fixed masks-|   the sparse model

The ramp is the cubic schedule of Zhu & Gupta, To prune, or not to prune (2017), equation 1, on the
magnitudes within each linear kernel; embeddings, norms and biases stay dense. The learning rate
warms up, stays, and falls linearly to zero over the last two fifths.

    python examples/train_demo.py --text books.txt.xz --eval-text tests/testdata/alice29.txt \\
        --out /tmp/demo --minutes 9

Needs optax and safetensors, which `pip install '.[test]'` brings.

The text holds documents with <|endoftext|> between them; the whole of it lives on the GPU as
uint16 tokens, and a jitted scan draws its windows there. Writes under --out:

    sparse/, dense/   float16 Hugging Face OPT directories (transformers reads them)
    train_log.csv     one row per jitted call          metrics.json   what a model card needs
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import lzma
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from jax_flashllm.models.config import OPTConfig
from jax_flashllm.models.opt import OPT

END_OF_TEXT = "<|endoftext|>"
EOS = 0  # its id: the only special token, so bos, eos and pad are all this one

# Words with one leading mark or space, up to three digits, punctuation with the newlines after
# it, and runs of newlines: a paragraph's end is then one token rather than three.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the text, the seed and the step count."""

    vocab_size: int = 4096
    context: int = 512
    hidden_size: int = 384
    layers: int = 6
    heads: int = 6
    ffn_dim: int = 1536
    batch: int = 256
    steps_per_call: int = 50  # per jitted call, and between two updates of the masks
    learning_rate: float = 3e-3
    warmup_steps: int = 400
    decay_fraction: float = 0.4
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    sparsity: float = 0.7
    heldout_bytes: int = 1_000_000
    eval_windows: int = 32  # windows per call of the float32 evaluation

    @property
    def config(self) -> OPTConfig:
        return OPTConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            ffn_dim=self.ffn_dim,
            max_position_embeddings=self.context,
            pad_token_id=EOS,
            bos_token_id=EOS,
            eos_token_id=EOS,
        )


# A minute on two CPU cores, for the tests and for trying the script out.
TINY = Recipe(
    vocab_size=320,
    context=32,
    hidden_size=48,
    layers=2,
    heads=2,
    ffn_dim=96,
    batch=2,
    steps_per_call=2,
    warmup_steps=2,
    heldout_bytes=2_000,
    eval_windows=8,
)


# ---- text -------------------------------------------------------------------------------------


def read_documents(path: Path) -> list[str]:
    """The documents of a text or .xz file, newlines as \\n, without byte-order marks."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as f:
        text = f.read().replace("\ufeff", "")
    return [d for d in (d.strip("\n") for d in text.split(END_OF_TEXT)) if d]


def split_heldout(documents: list[str], min_bytes: int) -> tuple[list[str], list[str]]:
    """(training, held out): whole documents spread over the file, until they hold min_bytes."""
    order = sorted(range(len(documents)), key=lambda i: i * 0.6180339887498949 % 1)
    heldout: set[int] = set()
    size = 0
    for i in order:
        if size >= min_bytes:
            break
        heldout.add(i)
        size += len(documents[i].encode())
    if len(heldout) >= len(documents):
        raise ValueError(
            f"split_heldout: {len(documents)} documents hold {size} bytes, and {min_bytes} are "
            "wanted for the held-out text alone; pass a longer --text."
        )
    return (
        [d for i, d in enumerate(documents) if i not in heldout],
        [documents[i] for i in sorted(heldout)],
    )


def wrap_some(documents: list[str], every: int = 8) -> list[str]:
    """Breaks the lines of every eighth document at 60 to 79 columns.

    Nearly all of the books have one line per paragraph; plain text elsewhere (the held-out Alice,
    what people paste as a prompt) has short lines, which the model should have met.
    """
    wrapped = list(documents)
    for n, i in enumerate(range(0, len(documents), every)):
        width = 60 + 7 * n % 20
        # Breaks only where the rest of the line is longer than the width.
        pattern = rf"(?=[^\n]{{{width + 1}}})([^\n]{{1,{width}}}) +"
        wrapped[i] = re.sub(pattern, r"\1\n", documents[i])
    return wrapped


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE from a fifth of the text: 16,000 characters out of every 80,000."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sample = [d[i : i + 16_000] for d in documents for i in range(0, len(d), 80_000)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    return tokenizer


def tokenize(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """uint16 ids of all documents, each followed by EOS."""
    # A cut before a line that follows a blank one never falls inside a token (see WORDS), so the
    # pieces can be encoded in parallel and give what the whole document would.
    pieces: list[str] = []
    ends: list[int] = []  # pieces after which a document ends
    for document in documents:
        start = 0
        for cut in re.finditer(r"\n\n(?=\S)", document):
            if cut.end() - start >= 32_000:
                pieces.append(document[start : cut.end()])
                start = cut.end()
        pieces.append(document[start:])
        ends.append(len(pieces))
    ids: list[np.ndarray] = []
    for i in tqdm(range(0, len(pieces), 256), desc="tokenize", mininterval=interval()):
        batch = tokenizer.encode_batch_fast(pieces[i : i + 256], add_special_tokens=False)
        ids.extend(np.asarray(e.ids, np.uint16) for e in batch)
    eos = np.array([EOS], np.uint16)
    for end in reversed(ends):
        ids.insert(end, eos)
    return np.concatenate(ids)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [vocab]: bytes of text that each token stands for; 0 for special tokens."""
    # A byte-level token's spelling has one character per byte.
    size = np.zeros(tokenizer.get_vocab_size(), np.int32)
    for token, i in tokenizer.get_vocab().items():
        size[i] = 0 if token == END_OF_TEXT else len(token)
    return size


# ---- training ---------------------------------------------------------------------------------


class State(NamedTuple):
    """What a step changes; `params` are OPT's own, float32, as a flat dict by path."""

    params: dict[str, jax.Array]
    moments: Any
    step: jax.Array


def flatten(model: OPT) -> tuple[Any, dict[str, jax.Array]]:
    """(graphdef, parameters by path such as "layers.0.fc1.kernel")."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_pure_dict(state)
    paths, _ = jax.tree_util.tree_flatten_with_path(flat)
    return graphdef, {".".join(str(k.key) for k in path): leaf for path, leaf in paths}


def rebuild(graphdef: Any, params: dict[str, jax.Array]) -> OPT:
    """The model again; the inverse of `flatten`."""
    nested: dict[Any, Any] = {}
    for path, value in params.items():
        *parents, last = (int(k) if k.isdigit() else k for k in path.split("."))
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = nnx.Param(value)
    return nnx.merge(graphdef, nnx.State(nested))


def init_model(recipe: Recipe, seed: int, dtype: Any, attention: str) -> OPT:
    model = OPT(
        recipe.config,
        rngs=nnx.Rngs(seed),
        dtype=dtype,
        param_dtype=jnp.float32,
        attention_implementation=attention,
    )
    # Each layer adds twice to the residual stream: keep its variance at 1 (GPT-2, section 2.3).
    for layer in model.layers:
        for linear in (layer.self_attn.out_proj, layer.fc2):
            linear.kernel[...] = linear.kernel[...] / math.sqrt(2 * recipe.layers)
    return model


def pruned_paths(params: dict[str, jax.Array]) -> list[str]:
    """The linear kernels: all that is pruned."""
    return sorted(path for path in params if path.endswith(".kernel"))


def ramp(step: int, begin: int, end: int, final: float) -> float:
    """Sparsity at `step`: final (1 - (1 - (step - begin) / (end - begin))^3), Zhu & Gupta eq. 1."""
    t = min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
    return final * (1 - (1 - t) ** 3)


def call_sparsity(step: int, total: int, recipe: Recipe) -> float:
    """Sparsity for the call that begins at `step`, the ramp filling the middle half of `total`."""
    # A call prunes at its start: aim at its end, so that the ramp is over by 3/4.
    return ramp(step + recipe.steps_per_call, total // 4, 3 * total // 4, recipe.sparsity)


def prune_counts(params: dict[str, jax.Array], sparsity: float) -> dict[str, int]:
    """How many weights of each kernel go: the fewest that reach `sparsity` in every one."""
    # The 1e-9 keeps 0.7 * 10 from being 7.000000000000001.
    return {p: math.ceil(sparsity * params[p].size - 1e-9) for p in pruned_paths(params)}


def keep_mask(w: jax.Array, count: jax.Array) -> jax.Array:
    """True but for the `count` weights of least magnitude, exactly that many."""
    order = jnp.argsort(jnp.abs(w).ravel())
    keep = jnp.zeros(w.size, bool).at[order].set(jnp.arange(w.size) >= count)
    return keep.reshape(w.shape)


def token_losses(model: OPT, windows: jax.Array) -> jax.Array:
    """windows: int [B, T + 1].   Returns float32 [B, T], in nats."""
    logits = model(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


def make_train(recipe: Recipe, graphdef: Any, seed: int):
    """(init, train): the state at step 0, and `steps_per_call` steps as one jittable function."""
    # Matrices decay, vectors do not (they are biases and norm scales).
    adam = optax.chain(
        optax.scale_by_adam(b1=recipe.b1, b2=recipe.b2),
        optax.add_decayed_weights(
            recipe.weight_decay, mask=lambda params: {k: v.ndim > 1 for k, v in params.items()}
        ),
    )

    def init(params: dict[str, jax.Array]) -> State:
        return State(params, adam.init(params), jnp.zeros((), jnp.int32))

    def learning_rate(step, total):
        warm = jnp.minimum(1.0, (step + 1) / recipe.warmup_steps)
        left = (total - step) / (recipe.decay_fraction * total)
        return recipe.learning_rate * warm * jnp.clip(left, 0.0, 1.0)

    def train(state: State, tokens: jax.Array, total: jax.Array, counts: dict[str, jax.Array]):
        """tokens: uint16 [n].   total: float32, the run's steps.   counts: weights to prune.

        Returns the state and the means of loss, gradient norm and learning rate over the call.
        """
        # Pruned weights are zero, so they stay the smallest: masks only ever shrink.
        masks = {p: keep_mask(state.params[p], count) for p, count in counts.items()}

        def masked(tree):
            return {k: v * masks[k] if k in masks else v for k, v in tree.items()}

        def loss_of(params, windows):
            return token_losses(rebuild(graphdef, params), windows).mean()

        def step(state: State, _):
            # One window from each of `batch` equal parts of the text, from the step number alone:
            # both branches read the same.
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            part = (tokens.size - recipe.context) // recipe.batch
            starts = part * jnp.arange(recipe.batch) + jax.random.randint(
                key, (recipe.batch,), 0, part
            )
            windows = jax.vmap(
                lambda s: jax.lax.dynamic_slice(tokens, (s,), (recipe.context + 1,))
            )(starts).astype(jnp.int32)
            loss, grads = jax.value_and_grad(loss_of)(state.params, windows)
            grads = masked(grads)
            norm = jnp.sqrt(sum(jnp.sum(g * g) for g in grads.values()))
            # A step that overflowed is skipped rather than spoiling a run that nobody watches.
            scale = jnp.where(
                jnp.isfinite(norm), jnp.minimum(1.0, recipe.clip_norm / (norm + 1e-6)), 0.0
            )
            grads = {k: jnp.nan_to_num(g) * scale for k, g in grads.items()}
            updates, moments = adam.update(grads, state.moments, state.params)
            lr = learning_rate(state.step, total)
            params = masked({k: p - lr * updates[k] for k, p in state.params.items()})
            return State(params, moments, state.step + 1), jnp.stack([loss, norm, lr])

        state = state._replace(params=masked(state.params))
        state, history = jax.lax.scan(step, state, length=recipe.steps_per_call)
        return state, history.mean(axis=0)

    return init, train


def choose_attention(wanted: str) -> str:
    """ "cudnn" or "xla". "auto" tries cuDNN's forward and backward once and says what it chose."""
    if wanted != "auto":
        return wanted
    if jax.default_backend() != "gpu":
        return "xla"
    q = jax.random.normal(jax.random.key(0), (2, 512, 6, 64), jnp.bfloat16)

    def total(q, implementation):
        y = jax.nn.dot_product_attention(q, q, q, is_causal=True, implementation=implementation)
        return (y.astype(jnp.float32) ** 2).sum()

    grad = jax.jit(jax.grad(total), static_argnums=1)
    want = grad(q, "xla").astype(jnp.float32)
    try:
        error = jnp.abs(grad(q, "cudnn").astype(jnp.float32) - want).max() / jnp.abs(want).max()
    except Exception as e:  # whatever cuDNN's loader raises; the choice is printed, not silent
        print(f"attention: xla, because cudnn failed: {str(e).splitlines()[0][:200]}")
        return "xla"
    chosen = "cudnn" if error < 0.05 else "xla"
    print(f"attention: {chosen} (cudnn's gradient differs by {float(error):.2e} of the largest)")
    return chosen


# ---- evaluation -------------------------------------------------------------------------------


class Evaluator:
    """Perplexity in float32 over consecutive windows of the context, without overlap.

    Every token counts except the first of each window, which has nothing before it. The bytes
    counted are those of the tokens counted.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer):
        self.recipe = recipe
        self.bytes = token_bytes(tokenizer)
        # The XLA attention: cuDNN's takes no float32.
        graphdef, _ = flatten(init_model(recipe, 0, jnp.float32, "xla"))

        @jax.jit
        def losses(params, windows):
            with jax.default_matmul_precision("highest"):
                return token_losses(rebuild(graphdef, params), windows)

        self.losses = losses

    def __call__(self, params: dict[str, jax.Array], ids: np.ndarray) -> dict[str, float]:
        """ids: [n], n > 1.   Returns counts, nats per token, perplexities and bits per byte."""
        T, B = self.recipe.context, self.recipe.eval_windows
        rows = -(-len(ids) // T)
        rows += -rows % B
        windows = np.zeros((rows, T), np.int32)
        windows.ravel()[: len(ids)] = ids
        counted = (np.arange(rows * T) < len(ids)).reshape(rows, T)[:, 1:]
        nats = [self.losses(params, windows[i : i + B]) for i in range(0, rows, B)]
        total = np.concatenate([np.asarray(n, np.float64) for n in nats])[counted].sum()
        tokens = int(counted.sum())
        size = int(self.bytes[windows[:, 1:]][counted].sum())
        return {
            "tokens": tokens,
            "bytes": size,
            "nats_per_token": total / tokens,
            "perplexity_per_token": math.exp(total / tokens),
            "perplexity_per_byte": math.exp(total / size),
            "bits_per_byte": total / size / math.log(2),
        }


# ---- saving -----------------------------------------------------------------------------------


def to_half(params: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """float16 copies on the host; ValueError where a value is too large for one."""
    half = {k: np.asarray(v).astype(np.float16) for k, v in params.items()}
    for path, value in half.items():
        if not np.isfinite(value).all():
            raise ValueError(f"to_half: {path} has values that float16 cannot hold.")
    return half


def huggingface_names(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """OPT's parameters under the names and layouts of transformers: weights [out, in]."""
    tensors = {}
    for path, value in params.items():
        base, kind = path.rsplit(".", 1)
        if kind == "kernel":
            value = value.T
        kind = "bias" if kind == "bias" else "weight"
        if base.endswith("qkv_proj"):
            for name, part in zip("qkv", np.split(value, 3), strict=True):
                tensors[f"model.decoder.{base[:-8]}{name}_proj.{kind}"] = part
        else:
            tensors[f"model.decoder.{base}.{kind}"] = value
    return {k: np.ascontiguousarray(v) for k, v in sorted(tensors.items())}


def save_huggingface(
    out: Path, recipe: Recipe, params: dict[str, np.ndarray], tokenizer: Tokenizer, shard_bytes: int
) -> None:
    """An OPT directory, its weights in files of at most `shard_bytes` each."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = huggingface_names(params)
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    names = ["model.safetensors"]
    if len(shards) > 1:
        of = f"of-{len(shards):05}.safetensors"
        names = [f"model-{i + 1:05}-{of}" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, out / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {k: f for f, s in zip(names, shards, strict=True) for k in s},
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    config = recipe.config.to_dict() | {"dtype": "float16", "torch_dtype": "float16"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))


# ---- the run ----------------------------------------------------------------------------------


def interval() -> float:
    """Seconds between redraws of a progress bar: few where they land in a log."""
    return 0.5 if sys.stderr.isatty() else 15.0


class Run:
    """Calls `train`, times it, draws its progress and keeps the log."""

    def __init__(self, recipe: Recipe, train, tokens: jax.Array, evaluate, heldout: np.ndarray):
        self.recipe, self.train, self.tokens = recipe, train, tokens
        self.evaluate, self.heldout = evaluate, heldout
        self.rows: list[dict[str, Any]] = []
        self.seconds = {"shared": 0.0, "sparse": 0.0, "dense": 0.0}

    def advance(self, state: State, branch: str, until: int, total: float, schedule=None) -> State:
        """Trains up to step `until`; schedule(step) is the sparsity for the call from `step`."""
        n = self.recipe.steps_per_call
        step = int(state.step)
        begin, bad = step, 0
        bar = tqdm(total=until, initial=step, desc=branch, unit="step", mininterval=interval())
        while step < until:
            start = time.perf_counter()
            sparsity = schedule(step) if schedule else 0.0
            counts = prune_counts(state.params, sparsity)
            state, history = self.train(state, self.tokens, np.float32(total), counts)
            loss, norm, lr = (float(x) for x in history)  # waits for the device
            bad = 0 if math.isfinite(loss) else bad + 1
            if bad == 2:  # one can be a step that overflowed and was skipped
                raise FloatingPointError(f"{branch}: the loss is {loss} at step {step}; stopped.")
            seconds = time.perf_counter() - start
            self.seconds[branch] += seconds
            step += n
            row = {
                "branch": branch,
                "step": step,
                "tokens": step * self.recipe.batch * self.recipe.context,
                "loss": round(loss, 5),
                "grad_norm": round(norm, 4),
                "learning_rate": f"{lr:.3e}",
                "sparsity": round(sparsity, 6),
                "tokens_per_s": round(n * self.recipe.batch * self.recipe.context / seconds),
                "heldout_perplexity": "",
            }
            # Ten points on the curve, and the end.
            if (step - begin) * 10 // (until - begin) > (step - n - begin) * 10 // (until - begin):
                heldout = self.evaluate(state.params, self.heldout)["perplexity_per_token"]
                row["heldout_perplexity"] = round(heldout, 4)
            self.rows.append(row)
            bar.set_postfix(loss=f"{loss:.3f}", sparsity=f"{sparsity:.3f}", refresh=False)
            bar.update(n)
        bar.close()
        return state


def plan_steps(recipe: Recipe, seconds: float, seconds_per_call: float, done: int) -> int:
    """Total steps N, quarters of whole calls: a shared quarter and twice the rest in `seconds`."""
    n = recipe.steps_per_call
    calls = (seconds / seconds_per_call + done / n) / 1.75  # N/4 + 2 * 3N/4
    return max(4 * n * int(calls / 4), 4 * done, 4 * n)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="training text, plain or .xz")
    parser.add_argument("--eval-text", type=Path, required=True, help="text for the perplexities")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; default: train one")
    parser.add_argument("--minutes", type=float, default=9.0, help="budget for the whole command")
    parser.add_argument("--steps", type=int, help="total steps, instead of a budget")
    parser.add_argument("--batch", type=int, help="sequences per step")
    parser.add_argument("--learning-rate", type=float, help="peak")
    parser.add_argument("--sparsity", type=float, help="of the linear kernels, default 0.7")
    parser.add_argument("--attention", choices=("auto", "cudnn", "xla"), default="auto")
    parser.add_argument("--shard-mb", type=float, default=15.0, help="largest weight file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a toy shape, for trying the script")
    args = parser.parse_args(argv)
    wanted = {k: getattr(args, k) for k in ("batch", "learning_rate", "sparsity")}
    recipe = dataclasses.replace(
        TINY if args.tiny else Recipe(), **{k: v for k, v in wanted.items() if v is not None}
    )
    if not 0 <= recipe.sparsity < 1:
        parser.error(f"--sparsity is {recipe.sparsity}; it is in [0, 1).")
    quarter = 4 * recipe.steps_per_call
    if args.steps is not None and (args.steps <= 0 or args.steps % quarter):
        parser.error(f"--steps is {args.steps}; it is a positive multiple of {quarter}.")

    def elapsed() -> float:
        return time.perf_counter() - started

    def say(message: str) -> None:
        print(f"[{elapsed():6.1f} s] {message}", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    training, heldout = split_heldout(read_documents(args.text), recipe.heldout_bytes)
    training = wrap_some(training)
    say(f"read {len(training)} documents to train on, {len(heldout)} held out")
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(str(args.tokenizer))
    else:
        tokenizer = train_tokenizer(training, recipe.vocab_size)
        say(f"trained a tokenizer of {tokenizer.get_vocab_size()} entries")
    if tokenizer.get_vocab_size() > recipe.vocab_size or tokenizer.token_to_id(END_OF_TEXT) != EOS:
        parser.error(
            f"the tokenizer has {tokenizer.get_vocab_size()} entries and {END_OF_TEXT} as "
            f"{tokenizer.token_to_id(END_OF_TEXT)}; at most {recipe.vocab_size} and {EOS} are "
            "expected."
        )
    train_bytes = sum(len(d.encode()) for d in training)
    ids = tokenize(tokenizer, training)
    heldout_ids = tokenize(tokenizer, heldout)
    eval_ids = np.array(tokenizer.encode(args.eval_text.read_text(encoding="utf-8")).ids)
    if (len(ids) - recipe.context) // recipe.batch < 1:
        parser.error(f"--text has {len(ids)} tokens: too few for windows of {recipe.context}.")
    say(f"{len(ids):,} tokens to train on ({train_bytes / len(ids):.3f} bytes each)")

    device = jax.devices()[0]
    attention = choose_attention(args.attention)
    graphdef, params = flatten(init_model(recipe, args.seed, jnp.bfloat16, attention))
    count = sum(p.size for p in params.values())
    prunable = sum(params[p].size for p in pruned_paths(params))
    say(f"{count:,} parameters, {prunable:,} of them in linear kernels, on {device.device_kind}")
    init, train = make_train(recipe, graphdef, args.seed)
    tokens = jax.device_put(ids)
    state = init(params)
    counts = prune_counts(params, 0.0)
    jitted = jax.jit(train, donate_argnums=0)
    compiled = jitted.lower(state, tokens, np.float32(1), counts).compile()
    evaluate = Evaluator(recipe, tokenizer)
    evaluate(state.params, heldout_ids)  # compiles
    start = time.perf_counter()
    evaluate(state.params, heldout_ids)
    eval_seconds = time.perf_counter() - start
    say(f"compiled; {recipe.steps_per_call} steps a call, {eval_seconds:.2f} s an evaluation")

    run = Run(recipe, compiled, tokens, evaluate, heldout_ids)
    if args.steps is None:
        # Real steps, from before the learning rate depends on the total (any large one will do);
        # the first call warms up.
        n = recipe.steps_per_call
        state = run.advance(state, "shared", n, 1e9)
        first = run.seconds["shared"]
        state = run.advance(state, "shared", 3 * n, 1e9)
        per_call = (run.seconds["shared"] - first) / 2
        # Evaluations on the way, saving, and slack for a device that slows down as it warms.
        reserve = 34 * eval_seconds + 15 + 0.02 * 60 * args.minutes
        total = plan_steps(recipe, 60 * args.minutes - elapsed() - reserve, per_call, 3 * n)
        say(f"{per_call / n * 1e3:.1f} ms a step: {total} steps fit in {args.minutes} minutes")
    else:
        total = args.steps

    state = run.advance(state, "shared", total // 4, total)
    shared = jax.tree.map(jnp.copy, state)
    results = {}
    for branch in ("sparse", "dense"):
        schedule = (lambda step: call_sparsity(step, total, recipe)) if branch == "sparse" else None
        begin = jax.tree.map(jnp.copy, shared)  # the call donates its state
        params = run.advance(begin, branch, total, total, schedule).params
        half = to_half(params)
        save_huggingface(args.out / branch, recipe, half, tokenizer, int(args.shard_mb * 1e6))
        single = {k: jnp.asarray(v, jnp.float32) for k, v in half.items()}
        zeros = sum(int((half[p] == 0).sum()) for p in pruned_paths(half))
        results[branch] = {
            "sparsity_of_linear_kernels": zeros / prunable,
            args.eval_text.name: evaluate(single, eval_ids),
            "heldout_books": evaluate(single, heldout_ids),
        }
        say(
            f"{branch}: {100 * zeros / prunable:.2f}% zeros, perplexity "
            + ", ".join(
                f"{results[branch][k]['perplexity_per_token']:.3f} "
                f"({results[branch][k]['bits_per_byte']:.4f} bits per byte) on {k}"
                for k in (args.eval_text.name, "heldout_books")
            )
        )
        with open(args.out / "train_log.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, run.rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(run.rows)
        metrics = {
            "recipe": dataclasses.asdict(recipe),
            "seed": args.seed,
            "steps": total,
            "parameters": count,
            "parameters_in_linear_kernels": prunable,
            "training_tokens_in_text": len(ids),
            "training_bytes_in_text": train_bytes,
            "tokens_seen_by_each_model": total * recipe.batch * recipe.context,
            "device": device.device_kind,
            "device_seconds": {k: round(v, 2) for k, v in run.seconds.items()},
            "wall_seconds": round(elapsed(), 1),
            "attention": attention,
            "versions": {"jax": jax.__version__, "optax": optax.__version__},
            "evaluation": (
                "float16 weights, float32 arithmetic; consecutive windows of the context without "
                "overlap; every token but the first of each window"
            ),
            "results": results,
        }
        (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    say(f"wrote {args.out}")
    return metrics


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
