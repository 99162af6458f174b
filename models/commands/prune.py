"""Writes a sparse copy of a model, pruned layer by layer.

Only the matrices of the decoder layers are pruned; embeddings, norms and biases are copied.

    jax-flashllm prune facebook-opt-125m --sparsity 0.7 --out opt-125m-70
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_flashllm.models.commands import common
from jax_flashllm.models.commands.info import is_linear

if TYPE_CHECKING:
    import numpy as np

    from jax_flashllm.models.checkpoint import Checkpoint

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory of a Hugging Face OPT, or 'demo'")
    parser.add_argument("--method", choices=("magnitude",), default="magnitude")
    parser.add_argument(
        "--sparsity",
        type=common.number(float, 0, 1),
        required=True,
        metavar="S",
        help="share of weights to remove, 0 to 1",
    )
    parser.add_argument(
        "--group",
        choices=("row", "global"),
        default="row",
        help="compare weights within a row (default), or in all layers together",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        help="of the stored weights (default: the checkpoint's; float16 for float32 ones)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is at DIR")


def run(args: argparse.Namespace) -> None:
    path = common.model_path(args.model)
    out = Path(args.out)
    if os.path.lexists(out) and not args.overwrite:
        raise ValueError(f"{out} exists; choose another --out, or pass --overwrite")
    if out.absolute().parent.exists() and not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: {out.parent} is a file; choose another --out")
    common.cache_compilations()
    from tqdm import tqdm

    from jax_flashllm.models.checkpoint import open_checkpoint, save_packed
    from jax_flashllm.models.weights import verify

    with open_checkpoint(path) as checkpoint:
        verify(checkpoint)  # refuses what is no OPT before any work
        pruner = Pruner(checkpoint, args.sparsity, args.group, args.dtype)
        config = checkpoint.config | {
            key: pruner.dtype.name for key in ("dtype", "torch_dtype") if key in checkpoint.config
        }
        with tqdm(total=pruner.total, desc="prune", unit="B", unit_scale=True, disable=None) as bar:
            stored: dict[str, int] = {}

            def advance(name: str, count: int) -> None:
                stored[name] = count
                bar.update(pruner.dense_bytes(name))

            files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
            written = save_packed(
                out,
                config,
                pruner.tensors(bar.set_description),
                sparse=lambda name: is_linear(name) and args.sparsity > 0,
                tokenizer_files=files,
                overwrite=args.overwrite,
                progress=advance,
            )
    print(pruner.report(stored))
    print(f"\n{out}: {common.size(written)}, was {common.size(checkpoint.nbytes)}")
    print(_prediction(sum(stored.values()), pruner.total))


class Pruner:
    """Magnitude pruning of a checkpoint, one matrix in memory at a time."""

    def __init__(self, checkpoint: Checkpoint, sparsity: float, group: str, dtype: str | None):
        import ml_dtypes
        import numpy as np

        self.checkpoint, self.sparsity, self.group = checkpoint, sparsity, group
        tied = checkpoint.config.get("tie_word_embeddings", True)
        # A tied head that is stored all the same is the embedding a second time.
        self.names = [n for n in checkpoint.names() if not (tied and n == "lm_head.weight")]
        self.linear = [n for n in self.names if is_linear(n)]
        if not self.linear:
            raise ValueError(f"{checkpoint.path} has no decoder layers to prune; is it an OPT?")
        if dtype is None:
            own = checkpoint.dtype(self.linear[0]).name
            dtype = own if own in ("float16", "bfloat16") else "float16"
        self.dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
        self.kept: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Bytes of the model dense, in the dtype to be written."""
        return sum(map(self.dense_bytes, self.names))

    def dense_bytes(self, name: str) -> int:
        return math.prod(self.checkpoint.shape(name)) * self.dtype.itemsize

    def tensors(self, say: Callable[[str], Any]) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array in the dtype to be written); linear layers pruned."""
        import numpy as np

        from jax_flashllm.prune import global_threshold, magnitude

        threshold = None
        if self.group == "global" and self.sparsity > 0:
            say("find the threshold")
            threshold = global_threshold(lambda: map(self._read, self.linear), self.sparsity)
        for name in self.names:
            say(_block(name))
            value = self._read(name)
            if is_linear(name):
                if threshold is not None:
                    value = threshold.prune(value, self.linear.index(name))
                elif self.sparsity > 0:
                    value = np.asarray(magnitude(value, self.sparsity))
                self.kept[name] = int(np.count_nonzero(value.view(np.uint16)))
            yield name, value

    def _read(self, name: str) -> np.ndarray:
        import numpy as np

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
        # Weights that the cast or the source made -0.0 are zeros too.
        return np.where(cast == 0, cast.dtype.type(0), cast) if is_linear(name) else cast

    def report(self, stored: dict[str, int]) -> str:
        rows = []
        for name in self.linear:
            m, k = self.checkpoint.shape(name)
            shown = name.removeprefix("model.").removeprefix("decoder.").removesuffix(".weight")
            rows.append((
                shown, f"[{m}, {k}]", f"{100 * (1 - self.kept[name] / (m * k)):.2f}%",
                common.size(self.dense_bytes(name)), common.size(stored[name]),
            ))  # fmt: skip
        weights = sum(math.prod(self.checkpoint.shape(n)) for n in self.linear)
        rows.append((
            "all linear layers", "", f"{100 * (1 - sum(self.kept.values()) / weights):.2f}%",
            common.size(sum(map(self.dense_bytes, self.linear))),
            common.size(sum(stored[n] for n in self.linear)),
        ))  # fmt: skip
        head = ("layer", "shape", "sparsity", f"dense {self.dtype}", "packed")
        return common.table(head, rows)


def _block(name: str) -> str:
    """ "layers.3" of the names in layer 3, else the name without its ends."""
    parts = name.removeprefix("model.").removeprefix("decoder.").split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def _prediction(sparse: int, dense: int) -> str:
    import jax

    rate = common.copy_bandwidth()
    return (
        f"predicted at batch 1, dense -> sparse: at most {rate / dense:.1f} -> {rate / sparse:.1f} "
        f"tokens/s ({dense / sparse:.2f}x)\n"
        f"(a token reads every weight once; a copy on this {jax.default_backend()} moves "
        f"{rate / 1e9:.1f} GB/s; measure with: jax-flashllm bench --model DIR)"
    )
