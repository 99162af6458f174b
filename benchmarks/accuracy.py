"""Perplexity against sparsity: the demo's dense twin pruned by each method, and the plot of it.

    python benchmarks/accuracy.py --calibration books.txt --eval-text tests/testdata/alice29.txt \\
        --csv accuracy.csv
    python benchmarks/accuracy.py --plot docs/accuracy.svg --csv accuracy.csv

Appends a row a model to the CSV; rows that are there are not measured again. Packed models stay
under --keep, for examples/finetune.py, whose results `--measure DIR --method NAME` adds.
"""

import argparse
import csv
import tempfile
import time
from pathlib import Path

import numpy as np

from jax_flashllm.models import opt
from jax_flashllm.models.checkpoint import open_checkpoint, save_packed
from jax_flashllm.models.config import is_linear
from jax_flashllm.models.densify import sparse_share
from jax_flashllm.models.evaluate import perplexity
from jax_flashllm.models.pruning import Blocks, Recipe, Source, by_magnitude, windows
from jax_flashllm.models.tokenizer import open_tokenizer

DENSE = Path(__file__).parent.parent / "examples" / "demo_dense"
METHODS = {
    "magnitude": ("magnitude", "row", None),
    "wanda": ("wanda", "row", None),
    "wanda + owl": ("wanda", "row", (5.0, 0.08)),
    "sparsegpt": ("sparsegpt", "uniform", None),
    "sparsegpt + owl": ("sparsegpt", "uniform", (5.0, 0.08)),
}
FIELDS = (
    "method", "sparsity", "text", "per_token", "bits_per_byte", "windows", "tokens_trained",
    "seconds",
)  # fmt: skip
STYLES = {"magnitude": "s", "wanda": "^", "wanda + owl": "v", "sparsegpt": "o"}


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add(path: Path, row: dict) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


def measure(model_path: Path, texts: list[Path], row: dict, csv_path: Path) -> None:
    model, tokenizer = opt.load(model_path), open_tokenizer(DENSE)
    share = sparse_share(model)
    for text in texts:
        ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
        result = perplexity(model, ids, tokenizer.token_bytes(), batch=8)
        add(
            csv_path,
            row
            | {
                "sparsity": f"{share or 0:.2f}",
                "text": text.name,
                "per_token": f"{result.per_token:.3f}",
                "bits_per_byte": f"{result.bits_per_byte:.4f}",
            },
        )


def prune(method: str, sparsity: float, ids: np.ndarray, out: Path) -> float:
    """Writes the pruned twin to `out`; returns the seconds it took."""
    name, group, owl = METHODS[method]
    recipe = Recipe(name, sparsity, group, owl)
    start = time.perf_counter()
    with open_checkpoint(DENSE) as checkpoint, tempfile.TemporaryDirectory() as work:
        source = Source(checkpoint, None)
        tensors = by_magnitude(source, recipe, lambda _: None)
        if name != "magnitude":
            run = Blocks(source, recipe, ids, Path(work))
            run.run()
            tensors = run.tensors()
        tokenizer = [DENSE / "tokenizer.json"]
        save_packed(out, source.config, tensors, is_linear, tokenizer, overwrite=True)
    return time.perf_counter() - start


def plot(rows: list[dict], text: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "accuracy"  # the same file from the same numbers
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["text"] == text]
    _, axes = plt.subplots(figsize=(7, 4.5))
    dense = next(float(row["per_token"]) for row in rows if row["method"] == "dense")
    axes.axhline(dense, color="black", lw=1, ls=":", label=f"dense, {dense:.1f}")
    colors: dict[str, str] = {}
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"):
        own = sorted((float(r["sparsity"]), float(r["per_token"]))
                     for r in rows if r["method"] == method)  # fmt: skip
        base = method.removesuffix(", fine-tuned")
        colors.setdefault(base, f"C{len(colors)}")
        axes.plot(
            *zip(*own, strict=True), marker=STYLES.get(base, "*"), color=colors[base], label=method,
            ls="-" if base == method else "--",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("sparsity of the linear layers")
    axes.set_ylabel(f"perplexity per token, {text}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--eval-text", type=Path, nargs="+", help="texts to measure on")
    parser.add_argument("--calibration", type=Path, help="text to prune by, unlike those")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--keep", type=Path, help="directory for the packed models")
    parser.add_argument("--measure", type=Path, help="measure this model and no other")
    parser.add_argument("--method", help="what to call it in the CSV")
    parser.add_argument("--tokens", type=int, default=0, help="it was fine-tuned with")
    parser.add_argument("--plot", type=Path, help="draw the CSV instead")
    parser.add_argument("--plot-text", default="alice29.txt")
    args = parser.parse_args()
    if args.plot:
        return plot(read(args.csv), args.plot_text, args.plot)
    if args.measure:
        row = {"method": args.method, "tokens_trained": args.tokens}
        return measure(args.measure, args.eval_text, row, args.csv)
    done = {(row["method"], row["sparsity"]) for row in read(args.csv)}
    if ("dense", "0.00") not in done:
        measure(DENSE, args.eval_text, {"method": "dense"}, args.csv)
    text = args.calibration.read_text(encoding="utf-8")
    ids = windows(open_tokenizer(DENSE).encode(text, add_special_tokens=False), args.samples, 512)
    for sparsity in args.sparsities:
        for method in args.methods:
            if (method, f"{sparsity:.2f}") in done:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                out = (args.keep or Path(scratch)) / f"{method.replace(' + ', '-')}-{sparsity:.2f}"
                seconds = prune(method, sparsity, ids, out)
                used = 0 if method == "magnitude" else len(ids)
                row = {"method": method, "windows": used, "seconds": f"{seconds:.0f}"}
                measure(out, args.eval_text, row, args.csv)


if __name__ == "__main__":
    main()
