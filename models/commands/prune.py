"""Writes a sparse copy of a model.

Only the matrices of the decoder layers are pruned; embeddings, norms and biases are copied.
Magnitudes need nothing but the weights. Wanda and SparseGPT look at the activations of a
calibration text, block by block, each block after the ones before it are pruned; with
--calibration, magnitude pruning runs so too and tells the error of every layer.

    jax-flashllm prune opt-125m --sparsity 0.7 --out opt-125m-70
    jax-flashllm prune opt-125m --method sparsegpt --sparsity 0.7 --calibration books.txt --out DIR

Finished blocks wait in DIR.partial: after an interruption the same command goes on from there.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_flashllm.models.commands import common
from jax_flashllm.models.config import is_linear

if TYPE_CHECKING:
    import numpy as np

    from jax_flashllm.models.pruning import Recipe, Source

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser, dtype=False, positional=True)
    parser.add_argument(
        "--method", choices=("magnitude", "wanda", "sparsegpt"), default="magnitude"
    )
    parser.add_argument(
        "--sparsity",
        type=common.number(float, 0, 1),
        required=True,
        metavar="S",
        help="share of weights to remove, 0 to 1",
    )
    parser.add_argument(
        "--group",
        choices=("row", "uniform", "global"),
        help="compare weights within a row (default), a matrix (for sparsegpt a block of its "
        "columns, and its default), or, for magnitude, in all layers together",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        help="of the stored weights (default: the checkpoint's; float16 for float32 ones)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is at DIR")
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration", metavar="FILE", help="UTF-8 text, unlike what you evaluate on"
    )
    calibration.add_argument(
        "--samples", type=common.number(int, 1), default=128, metavar="N",
        help="windows of the text (default 128)",
    )  # fmt: skip
    calibration.add_argument(
        "--context", type=common.number(int, 1), metavar="N",
        help="tokens a window (default: the model's context)",
    )  # fmt: skip
    calibration.add_argument(
        "--owl", action="store_true", help="prune blocks with more outliers less (OWL)"
    )
    calibration.add_argument(
        "--owl-m", type=common.number(float, 0, above=True), default=5.0, metavar="M",
        help="an outlier is M times the mean score (default 5)",
    )  # fmt: skip
    calibration.add_argument(
        "--owl-lambda", type=common.number(float, 0, 1), default=0.08, metavar="L",
        help="sparsities differ by 2 L at most (default 0.08)",
    )  # fmt: skip
    calibration.add_argument(
        "--damping", type=common.number(float, 0), default=0.01, metavar="D",
        help="SparseGPT's, as a share of the mean of the Hessian's diagonal (default 0.01)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    path = common.model_path(args.model)
    out = Path(args.out)
    if os.path.lexists(out) and not args.overwrite:
        raise ValueError(f"{out} exists; choose another --out, or pass --overwrite")
    if out.absolute().parent.exists() and not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: {out.parent} is a file; choose another --out")
    if args.calibration is None and (args.method != "magnitude" or args.owl):
        what = "--owl" if args.method == "magnitude" else f"--method {args.method}"
        raise ValueError(f"{what} looks at activations; pass --calibration FILE")
    text = None if args.calibration is None else common.read_text(args.calibration)
    common.cache_compilations()

    from jax_flashllm.models.checkpoint import open_checkpoint
    from jax_flashllm.models.pruning import Recipe, Source
    from jax_flashllm.models.weights import verify

    recipe = Recipe(
        args.method,
        args.sparsity,
        args.group or ("uniform" if args.method == "sparsegpt" else "row"),
        (args.owl_m, args.owl_lambda) if args.owl else None,
        damping=args.damping,
    )
    with open_checkpoint(path) as checkpoint:
        verify(checkpoint)  # refuses what is no OPT before any work
        source = Source(checkpoint, args.dtype)
        if text is None:
            from jax_flashllm.models.pruning import by_magnitude

            report = _Report(source, {})
            written = report.save(
                out, lambda say: by_magnitude(source, recipe, say), recipe, args.overwrite
            )
        else:
            written, report = _by_blocks(args, out, source, recipe, text)
        print(report)
        print(f"\n{out}: {common.size(written)}, was {common.size(checkpoint.nbytes)}")
        print(report.prediction())


def _by_blocks(
    args: argparse.Namespace, out: Path, source: Source, recipe: Recipe, text: str
) -> tuple[int, _Report]:
    from tqdm import tqdm

    from jax_flashllm.models.checkpoint import CheckpointError
    from jax_flashllm.models.config import OPTConfig
    from jax_flashllm.models.pruning import Blocks, windows
    from jax_flashllm.models.tokenizer import open_tokenizer

    longest = OPTConfig.from_dict(source.checkpoint.config).max_position_embeddings
    context = args.context or longest
    if context > longest:
        raise ValueError(f"--context is {context}, but the model's is {longest}; pass that at most")
    tokenizer = open_tokenizer(source.checkpoint.path)
    ids = windows(tokenizer.encode(text, add_special_tokens=False), args.samples, context)
    work = out.absolute().with_name(out.name + ".partial")
    blocks = None
    try:
        with tqdm(desc="prune", unit="window", disable=None) as bar:
            blocks = Blocks(source, recipe, ids, work, None, bar.set_description, bar.update)
            if blocks.finished:
                bar.write(f"{blocks.finished} of {blocks.count} blocks are finished in {work}")
            bar.reset(blocks.steps)
            blocks.run()
        report = _Report(source, blocks.errors())
        written = report.save(out, lambda _: blocks.tensors(), recipe, args.overwrite)
    except CheckpointError as error:
        if blocks is None or not blocks.finished:
            raise
        raise ValueError(
            f"{error}; {blocks.finished} of {blocks.count} blocks are finished in {work}: the same "
            "command goes on from there"
        ) from error
    finally:
        if blocks is not None and not blocks.finished:
            shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)
    return written, report


class _Report:
    """Saves tensors, counts what is left of them, and tells it.

    errors: the reconstruction error of each linear layer; empty where none was measured.
    """

    def __init__(self, source: Source, errors: dict[str, float]):
        self.source, self.errors = source, errors
        self.kept: dict[str, int] = {}
        self.stored: dict[str, int] = {}

    def save(
        self,
        out: Path,
        tensors: Callable[[Callable[[str], Any]], Iterable[tuple[str, np.ndarray]]],
        recipe: Recipe,
        overwrite: bool,
    ) -> int:
        """Writes tensors(say) to `out`; returns the bytes of its weight files."""
        import numpy as np
        from tqdm import tqdm

        from jax_flashllm.models.checkpoint import save_packed

        with tqdm(total=self.dense, desc="save", unit="B", unit_scale=True, disable=None) as bar:

            def counted():
                for name, value in tensors(bar.set_description):
                    if is_linear(name):
                        self.kept[name] = int(np.count_nonzero(value.view(np.uint16)))
                    yield name, value

            def advance(name: str, count: int) -> None:
                self.stored[name] = count
                bar.update(self.source.dense_bytes(name))

            path = self.source.checkpoint.path
            return save_packed(
                out,
                self.source.config,
                counted(),
                sparse=lambda name: is_linear(name) and recipe.sparsity > 0,
                tokenizer_files=[path / n for n in TOKENIZER_FILES if (path / n).is_file()],
                overwrite=overwrite,
                progress=advance,
            )

    @property
    def dense(self) -> int:
        """Bytes of the model dense, in the dtype to be written."""
        return sum(map(self.source.dense_bytes, self.source.names))

    def __str__(self) -> str:
        source, rows = self.source, []
        for name in source.linear:
            m, k = source.checkpoint.shape(name)
            shown = name.removeprefix("model.").removeprefix("decoder.").removesuffix(".weight")
            rows.append([
                shown, f"[{m}, {k}]", f"{100 * (1 - self.kept[name] / (m * k)):.2f}%",
                f"{self.errors[name]:.5f}" if self.errors else "",
                common.size(source.dense_bytes(name)), common.size(self.stored[name]),
            ])  # fmt: skip
        weights = sum(math.prod(source.checkpoint.shape(n)) for n in source.linear)
        rows.append([
            "all linear layers", "", f"{100 * (1 - sum(self.kept.values()) / weights):.2f}%", "",
            common.size(sum(map(source.dense_bytes, source.linear))),
            common.size(sum(self.stored[n] for n in source.linear)),
        ])  # fmt: skip
        head = ["layer", "shape", "sparsity", "error", f"dense {source.dtype}", "packed"]
        if not self.errors:
            for row in (head, *rows):
                del row[3]
            return common.table(head, rows)
        return (
            f"{common.table(head, rows)}\n"
            "error: |X (W - W')^T|^2 / |X W^T|^2, X the inputs that calibration gave the layer"
        )

    def prediction(self) -> str:
        import jax

        sparse, dense = sum(self.stored.values()), self.dense
        rate = common.copy_bandwidth()
        return (
            f"predicted at batch 1, dense -> sparse: at most {rate / dense:.1f} -> "
            f"{rate / sparse:.1f} tokens/s ({dense / sparse:.2f}x)\n"
            f"(a token reads every weight once; a copy on this {jax.default_backend()} moves "
            f"{rate / 1e9:.1f} GB/s; measure with: jax-flashllm bench --model DIR)"
        )
