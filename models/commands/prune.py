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
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_flashllm.models.commands import common
from jax_flashllm.models.config import is_linear

if TYPE_CHECKING:
    import numpy as np

    from jax_flashllm.models.pruning import Blocks, Recipe, Source

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip


VISIBLE = 0.0005  # shares that differ by less read the same in per cent


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
        "--samples", type=common.number(int, 1, 1_000_000), metavar="N",
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
        "--owl-m", type=common.number(float, 0, 1000, above=True), metavar="M",
        help="an outlier is M times the mean score (default 5)",
    )  # fmt: skip
    calibration.add_argument(
        "--owl-lambda", type=common.number(float, 0, 1), metavar="L",
        help="sparsities differ by 2 L at most (default 0.08)",
    )  # fmt: skip
    calibration.add_argument(
        "--damping", type=common.number(float, 0, 1000), metavar="D",
        help="SparseGPT's, as a share of the mean of the Hessian's diagonal (default 0.01)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    path = common.model_path(args.model)
    out = _destination(args.out, path)
    if os.path.lexists(out) and not args.overwrite:
        raise ValueError(f"{args.out} exists; choose another --out, or pass --overwrite")
    _check_options(args)
    text = None if args.calibration is None else common.read_text(args.calibration)
    common.cache_compilations()

    from jax_flashllm.models.checkpoint import check_destination, new_parents, open_checkpoint
    from jax_flashllm.models.pruning import Recipe, Source, by_magnitude

    check_destination(out, _tokenizer_files(path), overwrite=args.overwrite)
    recipe = Recipe(
        args.method,
        args.sparsity,
        args.group or ("uniform" if args.method == "sparsegpt" else "row"),
        (_or(args.owl_m, 5.0), _or(args.owl_lambda, 0.08)) if args.owl else None,
        damping=_or(args.damping, 0.01),
    )
    with open_checkpoint(path) as checkpoint:
        source = Source(checkpoint, args.dtype)
        if text is None:
            report = _Report(source, recipe)
            tensors = lambda say: by_magnitude(source, recipe, say)  # noqa: E731
            written = report.save(out, tensors, args.overwrite)
        else:
            with new_parents(out):
                written, report = _by_blocks(args, out, source, recipe, text)
        print(report)
        print(f"\n{args.out}: {common.size(written)}, was {common.size(checkpoint.nbytes)}")
        print(report.prediction())


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _destination(given: str, model: Path) -> Path:
    """The directory that --out means, absolute. Raises ValueError where it is the model's."""
    out = Path(given)
    if not given or out.name == "..":
        raise ValueError(f"--out is {given!r}; pass the name of the directory to write")
    out = Path(os.path.realpath(out.parent)) / out.name
    # A downloaded model may be links to files elsewhere.
    homes = [model, *(Path(os.path.realpath(file)).parent for file in model.iterdir())]
    if out.exists() and any(home.exists() and home.samefile(out) for home in homes):
        raise ValueError(f"{given} is where the model itself lies; choose another --out")
    return out


def _check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that would do nothing."""
    if args.calibration is None and (args.method != "magnitude" or args.owl):
        what = "--owl" if args.method == "magnitude" else f"--method {args.method}"
        raise ValueError(f"{what} looks at activations; pass --calibration FILE")
    if args.calibration is None:
        idle, needed = ("samples", "context", "owl_m", "owl_lambda", "damping"), "--calibration"
    elif not args.owl and (args.owl_m is not None or args.owl_lambda is not None):
        idle, needed = ("owl_m", "owl_lambda"), "--owl"
    elif args.method != "sparsegpt":
        idle, needed = ("damping",), "--method sparsegpt"
    else:
        return
    for name in idle:
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} does nothing without {needed}; pass that too, or neither")


def _tokenizer_files(path: Path) -> list[Path]:
    return [path / name for name in TOKENIZER_FILES if (path / name).is_file()]


def _by_blocks(
    args: argparse.Namespace, out: Path, source: Source, recipe: Recipe, text: str
) -> tuple[int, _Report]:
    from tqdm import tqdm

    from jax_flashllm.models.checkpoint import CheckpointError, check_destination
    from jax_flashllm.models.pruning import Blocks, windows
    from jax_flashllm.models.tokenizer import open_tokenizer

    model, samples = source.model, _or(args.samples, 128)
    longest = model.max_position_embeddings
    context = args.context or longest
    if context > longest:
        raise ValueError(f"--context is {context}, but the model's is {longest}; pass that at most")
    tokens = open_tokenizer(source.checkpoint.path).encode(text, add_special_tokens=False)
    ids = windows(tokens, samples, context, model.vocab_size)
    files = _tokenizer_files(source.checkpoint.path)
    work = out.with_name(out.name + ".partial")
    with tqdm(desc="prune", unit="window", disable=None) as bar:

        def tell(line: str) -> None:
            bar.write(line, file=sys.stderr)

        blocks = Blocks(source, recipe, ids, work, None, bar.set_description, bar.update, tell)
        try:
            # Once more: a run that held `work` may have ended since.
            check_destination(out, files, overwrite=args.overwrite)
            if blocks.finished:
                tell(f"{blocks.finished} of {blocks.count} blocks are finished in {work}")
            bar.reset(blocks.steps)
            blocks.run()
            report = _Report(source, recipe, blocks, _calibration(ids, len(tokens), samples))
            written = report.save(out, lambda _: blocks.tensors(), args.overwrite)
            blocks.partial.remove()
        except CheckpointError as error:
            if not blocks.finished:
                raise
            raise ValueError(
                f"{error}; {blocks.finished} of {blocks.count} blocks are finished in {work}: the "
                "same command goes on from there"
            ) from error
        finally:
            if not blocks.finished:
                blocks.partial.remove()
            blocks.close()
    return written, report


def _calibration(ids: np.ndarray, tokens: int, asked: int) -> str:
    """What was looked at, for the report."""
    count, context = ids.shape
    line = f"calibrated on {count} windows of {context} tokens from a text of {tokens} tokens"
    if count < asked:
        line += f", which has no more of the {asked} asked for"
    elif count * context > tokens:
        line += f": they overlap, side by side it has {tokens // context}"
    return line


class _Report:
    """Saves tensors, counts what is left of them, and tells it.

    blocks: the run that measured the layers' errors; None where none did.
    calibration: a line about what it looked at.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        blocks: Blocks | None = None,
        calibration: str = "",
    ):
        from jax_flashllm.models.pruning import layer_of

        self.source, self.recipe, self.calibration = source, recipe, calibration
        self.errors = {} if blocks is None else blocks.errors()
        # Of each layer; comparing them all together asks nothing of any one.
        asked = {} if recipe.group == "global" else dict.fromkeys(source.linear, recipe.sparsity)
        if blocks is not None:
            asked = {name: blocks.sparsities[layer_of(name)] for name in source.linear}
        self.asked = asked
        self.kept: dict[str, int] = {}
        self.stored: dict[str, int] = {}

    def save(
        self,
        out: Path,
        tensors: Callable[[Callable[[str], Any]], Iterable[tuple[str, np.ndarray]]],
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

            return save_packed(
                out,
                self.source.config,
                counted(),
                sparse=lambda name: is_linear(name) and self.recipe.sparsity > 0,
                tokenizer_files=_tokenizer_files(self.source.checkpoint.path),
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
            rows.append([
                _short(name), f"[{m}, {k}]", f"{100 * (1 - self.kept[name] / (m * k)):.2f}%",
                f"{self.errors[name]:.5f}" if self.errors else "",
                common.size(source.dense_bytes(name)), common.size(self.stored[name]),
            ])  # fmt: skip
        weights = sum(map(self._weights, source.linear))
        rows.append([
            "all linear layers", "", f"{100 * (1 - sum(self.kept.values()) / weights):.2f}%", "",
            common.size(sum(map(source.dense_bytes, source.linear))),
            common.size(sum(self.stored[n] for n in source.linear)),
        ])  # fmt: skip
        head = ["layer", "shape", "sparsity", "error", f"dense {source.dtype}", "packed"]
        notes = self._sparser()
        if self.errors:
            notes += [
                "error: |X (W - W')^T|^2 / |X W^T|^2, X the inputs that calibration gave the layer",
                self.calibration,
            ]
        else:
            for row in (head, *rows):
                del row[3]
        return "\n".join([common.table(head, rows), *notes])

    def _weights(self, name: str) -> int:
        return math.prod(self.source.checkpoint.shape(name))

    def _sparser(self) -> list[str]:
        """A line where the model, or else a layer, was sparser than asked for."""
        zeros, asked = self.source.zeros, self.recipe.sparsity
        weights = sum(map(self._weights, zeros))
        before, after = sum(zeros.values()), weights - sum(self.kept.values())
        if before / weights - asked > VISIBLE:
            line = f"already {_percent(before / weights)} sparse, more than the {_percent(asked)} "
            if after > before:
                more = f"{after - before:,} of {weights:,} weights more were removed"
            elif after < before:
                more = f"SparseGPT's updates filled {before - after:,} zeros"
            else:
                more = "nothing more was removed"
            return [f"{line}asked for: {more}"]
        over = {n: zeros[n] / self._weights(n) for n, share in self.asked.items()}
        over = {n: share for n, share in over.items() if share - self.asked[n] > VISIBLE}
        if not over:
            return []
        most = max(over, key=over.__getitem__)
        return [
            f"{len(over)} of {len(zeros)} layers were sparser already than asked for, "
            f"{_short(most)} {_percent(over[most])} instead of {_percent(self.asked[most])}"
        ]

    def prediction(self) -> str:
        import jax

        sparse, dense = sum(self.stored.values()), self.dense
        rate = common.copy_bandwidth()
        return (
            f"predicted at batch 1, dense -> sparse: at most {_rough(rate / dense)} -> "
            f"{_rough(rate / sparse)} tokens/s ({dense / sparse:.2f}x)\n"
            f"(a token reads every weight once; a copy on this {jax.default_backend()} moves "
            f"{_rough(rate / 1e9)} GB/s; measure with: jax-flashllm bench --model DIR)"
        )


def _short(name: str) -> str:
    return name.removeprefix("model.").removeprefix("decoder.").removesuffix(".weight")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _rough(x: float) -> str:
    """Two significant digits: a copy's speed is worth no more."""
    digits = 1 - math.floor(math.log10(x))
    return f"{round(x, digits):.{max(digits, 0)}f}"
