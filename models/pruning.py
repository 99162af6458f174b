"""Prunes a checkpoint: matrix by matrix, or block by block from calibration text.

    ids [S, T] -> embed -> x [S, T, H]          on the host
    for each decoder block:                     it and a part of x on the accelerator
        H of every matrix: of the inputs it gets from x, the block being as it was
        prune its matrices, save them, x <- pruned block(x)

So a block's statistics come from blocks already pruned (Frantar & Alistarh, SparseGPT; Wanda does
the same), and a model needs host memory for x alone, S T H numbers. A finished block is on the disk
before the next one starts; a run that was killed goes on from there and ends in the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_flashllm import prune
from jax_flashllm.models import weights
from jax_flashllm.models.checkpoint import Checkpoint
from jax_flashllm.models.config import is_linear
from jax_flashllm.models.opt import OPT, DecoderLayer
from jax_flashllm.models.partial import Partial

METHODS = ("magnitude", "wanda", "sparsegpt")
# Samples a call: as many as keep the attention scores, float32 [B, h, T, T], under this a device.
SCORES_BYTES = 256 << 20

Say = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to prune.

    method: one of METHODS.   sparsity: 0 to 1, of the linear layers together.
    group: what is compared: "row", "uniform" (a matrix; for sparsegpt a block of its columns) or,
      magnitude only and without calibration, "global" (all matrices).
    owl: None, or OWL's (M, lambda): blocks then differ in sparsity.
    block, damping: SparseGPT's.
    """

    method: str
    sparsity: float
    group: str
    owl: tuple[float, float] | None = None
    block: int = 128
    damping: float = 0.01

    def prune(self, w: jax.Array, h: jax.Array, sparsity: float) -> jax.Array:
        """w [M, K] pruned, in w's dtype.   h: float32 [K, K], X^T X over the calibration tokens."""
        group: Any = self.group
        if self.method == "sparsegpt":
            return prune.sparsegpt(w, h, sparsity, group, self.block, self.damping).astype(w.dtype)
        if self.method == "wanda":
            return prune.wanda(w, jnp.sqrt(jnp.diag(h)), sparsity, group)
        return prune.magnitude(w, sparsity, group)


class Source:
    """The tensors of a checkpoint as they are to be written.

    dtype: float16 or bfloat16; None takes the checkpoint's own, float16 for float32 ones.
    zeros: how many each linear layer that was read has, before it is pruned.

    Raises ValueError for what is no OPT. Reads no weights.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str | None):
        self.checkpoint = checkpoint
        self.tensors, self.model = weights.verify(checkpoint)
        self.zeros: dict[str, int] = {}
        # Not the numbers beside the weights that `load` passes over.
        used = set(self.tensors.stored.values())
        if self.model.tie_word_embeddings:  # the head, if stored, is the embedding a second time
            used.discard("lm_head.weight")
        self.names = [n for n in checkpoint.names() if n in used]
        self.linear = [n for n in self.names if is_linear(n)]
        if not self.linear:
            raise ValueError(f"{checkpoint.path} has no decoder layers to prune; is it an OPT?")
        if dtype is None:
            own = checkpoint.dtype(self.linear[0]).name
            dtype = own if own in ("float16", "bfloat16") else "float16"
        self.dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)

    @property
    def config(self) -> dict[str, Any]:
        config = self.checkpoint.config
        return config | {key: self.dtype.name for key in ("dtype", "torch_dtype") if key in config}

    def dense_bytes(self, name: str) -> int:
        return math.prod(self.checkpoint.shape(name)) * self.dtype.itemsize

    def read(self, name: str) -> np.ndarray:
        value = self.checkpoint.read(name)
        with np.errstate(over="ignore"):
            cast = value.astype(self.dtype)
        if is_linear(name) and np.isnan(cast).any():
            raise ValueError(
                f"{self.checkpoint.path}: {name} holds NaN, which has no magnitude to prune by; "
                "fetch the checkpoint again"
            )
        lost = np.isinf(cast) & np.isfinite(value)
        if lost.any():
            raise ValueError(
                f"{self.checkpoint.path}: {name} holds {value[lost][0]}, past the range of "
                f"{self.dtype}; pass --dtype bfloat16"
            )
        if not is_linear(name):
            return cast
        # Weights that the cast or the source made -0.0 are zeros too.
        cast = without_negative_zeros(cast)
        self.zeros[name] = cast.size - int(np.count_nonzero(cast.view(np.uint16)))
        return cast


def by_magnitude(source: Source, recipe: Recipe, say: Say) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor (name, array), linear layers pruned, one in memory at a time."""
    threshold = None
    if recipe.group == "global" and recipe.sparsity > 0:
        say("find the threshold")
        threshold = prune.global_threshold(lambda: map(source.read, source.linear), recipe.sparsity)
    for name in source.names:
        say(block_of(name))
        value = source.read(name)
        if is_linear(name) and threshold is not None:
            value = threshold.prune(value, source.linear.index(name))
        elif is_linear(name) and recipe.sparsity > 0:
            group: Any = recipe.group
            value = np.asarray(prune.magnitude(value, recipe.sparsity, group))
        yield name, value


def windows(ids: Sequence[int], samples: int, context: int, vocab_size: int) -> np.ndarray:
    """`samples` windows of `context` tokens, int32 [S, T], spread evenly over `ids` [n].

    They overlap where the text is shorter than all of them together, and are fewer where it has no
    more different ones. Raises ValueError when it is shorter than one, and for ids past the
    vocabulary.
    """
    if len(ids) < context:
        raise ValueError(
            f"the calibration text has {len(ids)} tokens, fewer than one context of {context}; "
            "pass a longer text or a smaller --context"
        )
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the calibration text has token {max(ids)}, outside the model's vocabulary of "
            f"{vocab_size}; use the tokenizer that came with the model"
        )
    last = len(ids) - context
    starts = np.linspace(0, last, min(samples, last + 1)).astype(int)
    return np.asarray(ids, np.int32)[starts[:, None] + np.arange(context)]


class Blocks:
    """The block-by-block run, its finished blocks in directories under `work`.

    ids: int [S, T], calibration windows.   devices: the windows are shared out over them; None
    takes all.   advance: called with a number of windows whenever a block has seen so many.
    warn: gets a line for every block that was finished but is damaged, and is pruned again.

    Raises ValueError when `work` holds the start of another run or anything else. `close` lets
    another run have it.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        ids: np.ndarray,
        work: Path,
        devices: Sequence[Any] | None = None,
        say: Say = lambda _: None,
        advance: Callable[[int], Any] = lambda _: None,
        warn: Say = lambda _: None,
    ):
        if recipe.group == "global":
            raise ValueError(
                "prune: group 'global' compares the weights of all layers at once, which takes "
                "--method magnitude without --calibration; for unequal layers pass --owl"
            )
        self.source, self.recipe, self.ids = source, recipe, ids
        self.say, self.advance = say, advance
        on_cpu = jax.default_backend() == "cpu"
        self.compute = np.dtype(np.float32) if on_cpu else source.dtype
        self.model = source.model
        heads, T = self.model.num_attention_heads, ids.shape[1]
        devices = jax.devices() if devices is None else devices
        self.mesh = Mesh(np.array(devices), ("samples",))
        # Parts of one size, so that each program compiles once.
        n = len(devices)
        calls = -(-len(ids) // (max(SCORES_BYTES // (4 * heads * T * T), 1) * n))
        self.batch = -(-len(ids) // (calls * n)) * n
        self.sparsities = [recipe.sparsity] * self.count
        shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(self.count)]
        for name in source.linear:
            shapes[layer_of(name)][name] = tuple(source.checkpoint.shape(name))
        self.partial = Partial(work, self._run(), shapes, source.dtype, warn)

    def close(self) -> None:
        self.partial.close()

    @property
    def count(self) -> int:
        return self.model.num_hidden_layers

    @property
    def steps(self) -> int:
        """What `advance` adds up to."""
        return len(self.ids) * self.count * (4 if self.recipe.owl else 2)

    @property
    def finished(self) -> int:
        """How many blocks are on the disk."""
        return self.partial.finished

    def run(self) -> None:
        """Prunes the blocks that are not finished.

        Raises ValueError for NaN on the way and weights past the range of the dtype to be
        written, CheckpointError when the disk is full; finished blocks stay.
        """
        if self.recipe.owl is not None:
            self.sparsities = self._owl(*self.recipe.owl)
        x = self._embed()
        for i in range(self.count):
            self.say(f"layers.{i}")
            self._advance_past(i, x)

    def _advance_past(self, i: int, x: np.ndarray) -> None:
        """Prunes block i if it is not finished, then x <- pruned block(x), in place.

        The block's arrays end with the call, so that two are never on the accelerator.
        """
        block, parts = self._block(i)
        pruned = self.partial.read(i)
        if pruned is None:
            pruned, errors = self._prune(block, parts, x, self.sparsities[i])
            self.partial.save(i, pruned, errors, sparse=self.recipe.sparsity > 0)
        else:
            self.advance(len(x))
        if i + 1 == self.count:
            self.advance(len(x))
            return
        for names, part in parts.items():
            part.kernel[...] = jnp.concatenate([jnp.asarray(pruned[n]) for n in names])
        self._forward(block, x)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor of the model, when all blocks are finished."""
        blocks: dict[int, Checkpoint] = {}
        try:
            for name in self.source.names:
                if not is_linear(name):
                    yield name, self.source.read(name)
                    continue
                i = layer_of(name)
                if i not in blocks:
                    blocks[i] = self.partial.open(i)
                yield name, blocks[i].read(name)
        finally:
            for checkpoint in blocks.values():
                checkpoint.close()

    def errors(self) -> dict[str, float]:
        """|X (W - W')^T|^2 / |X W^T|^2 of every matrix W that became W', X its inputs."""
        errors: dict[str, float] = {}
        for i in range(self.count):
            with self.partial.open(i) as checkpoint:
                errors |= checkpoint.config["errors"]
        return errors

    # ---- one block ----

    def _block(
        self, i: int, diagonal: bool = False
    ) -> tuple[DecoderLayer, dict[tuple[str, ...], Observer]]:
        """Block i as it was, and its linear layers by the names that they are made of."""
        loader = _ObservingLoader(self.source, self.compute, diagonal=diagonal)
        block = DecoderLayer(self.model, loader, f"layers.{i}")
        stored = self.source.tensors.stored
        return block, {
            tuple(stored[f"{n}.weight"] for n in names): part for names, part in loader.made.items()
        }

    def _prune(self, block, parts, x, sparsity) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        self._observe(block, x)
        pruned, errors = {}, {}
        for names, part in parts.items():
            h = part.gram[...]
            self._check_finite(h, names)
            for name, w in zip(names, jnp.split(part.kernel[...], len(names)), strict=True):
                w = self._place(w)
                try:
                    new = self.recipe.prune(w, h, sparsity)
                except ValueError as e:
                    raise ValueError(f"{self.source.checkpoint.path}: {name}: {e}") from e
                if not bool(jnp.isfinite(new).all()):
                    raise ValueError(
                        f"{self.source.checkpoint.path}: the pruned {name} holds Inf; if the "
                        f"checkpoint does not, {self.source.dtype} is too narrow: pass --dtype "
                        "bfloat16 or a larger --damping"
                    )
                errors[name] = float(_reconstruction_error(w, new, h))
                pruned[name] = without_negative_zeros(np.asarray(new))
        return pruned, errors

    def _observe(self, block: DecoderLayer, x: np.ndarray) -> None:
        """Fills the block's Grams from x [S, T, H]."""
        graphdef, grams, rest = nnx.split(block, Gram, ...)
        rest = self._place(rest)
        grams = self._place(grams)
        for part in self._batches(x):
            grams = _observed(graphdef, grams, rest, part)
        nnx.update(block, grams)

    def _forward(self, block: DecoderLayer, x: np.ndarray) -> None:
        """x <- block(x), in place."""
        graphdef, state = nnx.split(block)
        state = self._place(state)
        done = 0
        for part in self._batches(x):
            x[done : done + len(part)] = _outputs(graphdef, state, part)
            done += len(part)

    def _batches(self, x: np.ndarray) -> Iterator[jax.Array]:
        for i in range(0, len(x), self.batch):
            part = x[i : i + self.batch]
            even = len(part) % self.mesh.size == 0
            spec = PartitionSpec("samples") if even else PartitionSpec()
            yield jax.device_put(part, NamedSharding(self.mesh, spec))
            self.advance(len(part))

    def _place(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def _embed(self) -> np.ndarray:
        """x [S, T, H] of the calibration windows, on the host."""
        self.say("embed")
        loader = _Loader(self.source, self.compute)
        config = dataclasses.replace(self.model, num_hidden_layers=0)
        model = OPT(config, make=loader, dtype=self.compute)
        T = self.ids.shape[1]
        x = np.empty((*self.ids.shape, config.hidden_size), self.compute)
        embed = jax.jit(lambda ids: model.embed(ids, jnp.arange(T)[None]))
        for i in range(0, len(x), self.batch):
            x[i : i + self.batch] = embed(self.ids[i : i + self.batch])
        return x

    def _owl(self, M: float, lam: float) -> list[float]:
        """OWL's sparsity of every block, from the dense model."""
        x = self._embed()
        ratios = [self._outlier_ratio(i, x, M) for i in range(self.count)]
        return [float(s) for s in prune.owl(ratios, self.recipe.sparsity, lam)]

    def _outlier_ratio(self, i: int, x: np.ndarray, M: float) -> float:
        """D of block i, and x <- block(x) in place; the block's arrays end with the call."""
        self.say(f"outliers {i}")
        block, parts = self._block(i, diagonal=True)
        self._observe(block, x)
        scores = []
        for names, part in parts.items():
            self._check_finite(part.gram[...], names)
            scores.append(prune.wanda_scores(part.kernel[...], jnp.sqrt(part.gram[...])))
        ratio = prune.outlier_ratio(scores, M)
        del scores
        self._forward(block, x)
        return ratio

    def _check_finite(self, h: jax.Array, names: Sequence[str]) -> None:
        if not bool(jnp.isfinite(h).all()):
            raise ValueError(
                f"{self.source.checkpoint.path}: the calibration activations that reach "
                f"{names[0]} hold NaN or Inf in {self.compute}; look for them in the weights "
                "before it, or pass --dtype bfloat16"
            )

    def _run(self) -> dict[str, Any]:
        """What has to be the same for finished blocks to be taken."""
        checkpoint = self.source.checkpoint
        config = json.dumps(checkpoint.config, sort_keys=True).encode()
        return {
            "model": str(checkpoint.path.resolve()),
            "files": checkpoint.stamps,
            "config": hashlib.sha256(config).hexdigest(),
            "dtype": self.source.dtype.name,
            **dataclasses.asdict(self.recipe),
            "calibration": [*self.ids.shape, hashlib.sha256(self.ids.tobytes()).hexdigest()],
            "devices": [jax.default_backend(), self.mesh.size],
        }


class Gram(nnx.Variable):
    """X^T X summed over the tokens seen, float32 [K, K], or its diagonal [K]."""


class Observer(nnx.Module):
    """A linear layer that adds what it is given to its Gram."""

    def __init__(self, kernel: jax.Array, bias: jax.Array | None, diagonal: bool):
        K = kernel.shape[1]
        self.kernel = nnx.Param(kernel)  # [M, K], as stored
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.gram = Gram(jnp.zeros(K if diagonal else (K, K)))

    def __call__(self, x: jax.Array, activation: str | None = None) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        if self.gram.ndim == 1:
            self.gram[...] += jnp.sum(rows * rows, axis=0)
        else:
            self.gram[...] += jnp.matmul(rows.T, rows, precision="highest")
        y = x @ self.kernel[...].astype(x.dtype).T
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        if activation is None:
            return y
        return jax.nn.relu(y) if activation == "relu" else jax.nn.gelu(y, approximate=False)


class _Loader(weights.Loader):
    """Reads what is to be written, in its dtype."""

    def __init__(self, source: Source, compute: np.dtype):
        super().__init__(source.tensors, source.model, compute, cast=None)
        self.source = source

    def _read_one(self, name: str) -> np.ndarray:
        return self.source.read(self.names.stored[name])


class _ObservingLoader(_Loader):
    """A loader whose linear layers are Observers."""

    def __init__(self, *args: Any, diagonal: bool):
        super().__init__(*args)
        self.diagonal = diagonal
        self.made: dict[tuple[str, ...], Observer] = {}

    def linear(self, names: list[str], in_features: int, out_features: int, bias: bool):
        kernel = jax.device_put(self._read([f"{name}.weight" for name in names]))
        b = self._vector([f"{name}.bias" for name in names]) if bias else None
        self.made[tuple(names)] = layer = Observer(kernel, b, self.diagonal)
        return layer


# The structure is the same for every block of a model: each compiles once.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _observed(graphdef: Any, grams: Any, rest: Any, x: jax.Array) -> Any:
    block = nnx.merge(graphdef, grams, rest)
    with jax.default_matmul_precision("highest"):
        block(x, None)
    return nnx.state(block, Gram)


@functools.partial(jax.jit, static_argnums=0)
def _outputs(graphdef: Any, state: Any, x: jax.Array) -> jax.Array:
    # The Grams are not returned, so XLA leaves their products out.
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graphdef, state)(x, None)[0]


@jax.jit
def _reconstruction_error(w: jax.Array, new: jax.Array, h: jax.Array) -> jax.Array:
    """tr(D H D^T) / tr(W H W^T), D = W - W'."""

    def energy(a):
        return jnp.sum(jnp.matmul(a, h, precision="highest") * a)

    w = w.astype(jnp.float32)
    whole = energy(w)
    return jnp.where(whole > 0, energy(w - new.astype(jnp.float32)) / whole, 0.0)


def block_of(name: str) -> str:
    """ "layers.3" of the names in layer 3, else the name without its ends."""
    parts = name.removeprefix("model.").removeprefix("decoder.").split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def layer_of(name: str) -> int:
    """The decoder block that a matrix is in."""
    return int(block_of(name).split(".")[1])


def without_negative_zeros(w: np.ndarray) -> np.ndarray:
    return np.where(w == 0, w.dtype.type(0), w)
