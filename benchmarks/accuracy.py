"""Perplexity against sparsity: the demo's dense twin pruned by each method, then fine-tuned.

    python benchmarks/accuracy.py --text books.txt.xz --eval-text tests/testdata/alice29.txt \\
        --csv accuracy.csv [--tokens 38000000]
    python benchmarks/accuracy.py --csv accuracy.csv --plot docs/accuracy.svg

The text is what examples/train_demo.py trained on, and split as there: calibration windows are
spread evenly over the training part, perplexities are those of the held-out books and of
--eval-text. With --tokens, every pruned model is trained for so many tokens with its masks fixed,
and the dense twin while it is pruned gradually; that takes a GPU. Appends a row a model and text
to the CSV; models that are there are not made again.

Weights are rounded to float16, perplexities computed in float32 through dense products. Training
is that of train_demo.py, dense products with masks in bfloat16: for a model this small its one
program for all steps is several times faster than examples/finetune.py.
"""

import argparse
import csv
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashllm.models.checkpoint import open_checkpoint
from jax_flashllm.models.commands.common import DEMO
from jax_flashllm.models.pruning import Blocks, Recipe, Source, by_magnitude, windows
from jax_flashllm.models.tokenizer import open_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import train_demo as demo  # noqa: E402

DENSE = EXAMPLES / "demo_dense"
SAMPLES, CONTEXT = 128, 512
METHODS = {
    "magnitude": ("magnitude", "row", None),
    "wanda": ("wanda", "row", None),
    "wanda + owl": ("wanda", "row", (5.0, 0.08)),
    "sparsegpt": ("sparsegpt", "uniform", None),
    "sparsegpt + owl": ("sparsegpt", "uniform", (5.0, 0.08)),
}
TUNED = ", fine-tuned"
FIELDS = ("method", "sparsity", "text", "per_token", "bits_per_byte", "tokens_trained", "seconds")
STYLES = {"magnitude": "s", "wanda": "^", "wanda + owl": "v", "sparsegpt": "o",
          "sparsegpt + owl": "D"}  # fmt: skip

Tensors = dict[str, np.ndarray]  # as a checkpoint names them, float16
Params = dict[str, np.ndarray]  # as train_demo does


# ---- models -----------------------------------------------------------------------------------


def read_tensors(path: Path) -> Tensors:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names()}


def prune(method: str, sparsity: float, ids: np.ndarray) -> Tensors:
    """The dense twin pruned.   ids: int [S, T], calibration windows."""
    name, group, owl = METHODS[method]
    recipe = Recipe(name, sparsity, group, owl)
    with open_checkpoint(DENSE) as checkpoint, tempfile.TemporaryDirectory() as work:
        source = Source(checkpoint, None)
        if name == "magnitude":
            return dict(by_magnitude(source, recipe, lambda _: None))
        run = Blocks(source, recipe, ids, Path(work))
        run.run()
        return dict(run.tensors())


def to_params(tensors: Tensors) -> Params:
    """The inverse of train_demo's huggingface_names."""
    params = {}
    for name, value in tensors.items():
        base, kind = name.removeprefix("model.decoder.").rsplit(".", 1)
        if base.endswith(("k_proj", "v_proj")):
            continue
        if base.endswith("q_proj"):
            value = np.concatenate([tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            base = base.replace("q_proj", "qkv_proj")
        if kind == "weight" and base.startswith("embed"):
            kind = "embedding"
        elif kind == "weight" and value.ndim == 1:
            kind = "scale"
        elif kind == "weight":
            kind, value = "kernel", value.T
        params[f"{base}.{kind}"] = value
    return params


class Tuner:
    """Trains for `tokens` tokens; the program is compiled once, for all models and sparsities."""

    def __init__(self, ids: np.ndarray, tokens: int, recipe: demo.Recipe):
        self.recipe, self.ids = recipe, jax.device_put(ids)
        attention = demo.choose_attention("auto")
        graphdef, params = demo.flatten(demo.init_model(recipe, 0, jnp.bfloat16, attention))
        per_call = recipe.batch * recipe.context * recipe.steps_per_call
        self.calls = max(round(tokens / per_call), 1)
        self.tokens = self.calls * per_call
        self.init, train = demo.make_train(recipe, graphdef, 0)
        state, counts = self.init(params), demo.prune_counts(params, 0.0)
        jitted = jax.jit(train, donate_argnums=0)
        self.train = jitted.lower(state, self.ids, np.float32(1), counts).compile()

    def __call__(self, params: Params, gradually_to: float | None = None) -> Params:
        """params trained, in float16, with their zeros fixed.

        gradually_to: instead, the sparsity that a cubic ramp reaches half way.
        """
        state = self.init({k: jnp.asarray(v, jnp.float32) for k, v in params.items()})
        counts = {p: int((params[p] == 0).sum()) for p in demo.pruned_paths(params)}
        for call in range(self.calls):
            if gradually_to is not None:
                now = demo.ramp(call + 1, 0, max(self.calls // 2, 1), gradually_to)
                counts = demo.prune_counts(params, now)
            total = np.float32(self.calls * self.recipe.steps_per_call)
            state, history = self.train(state, self.ids, total, counts)
        if not np.isfinite(np.asarray(history)).all():
            raise FloatingPointError(f"loss, gradient norm and rate of the end are {history}.")
        return demo.to_half(state.params)


# ---- rows -------------------------------------------------------------------------------------


class Table:
    """Measures models and appends rows to a CSV.   texts: {name: ids}."""

    def __init__(self, path: Path, texts: dict[str, np.ndarray], recipe: demo.Recipe):
        self.path, self.texts = path, texts
        self.done = {(row["method"], row["sparsity"]) for row in read(path)}
        tokenizer = demo.Tokenizer.from_file(str(DENSE / "tokenizer.json"))
        self.evaluate = demo.Evaluator(recipe, tokenizer)

    def has(self, method: str, sparsity: float) -> bool:
        return (method, f"{sparsity:.2f}") in self.done

    def add(self, method: str, sparsity: float, params: Params, tokens=0, seconds=0.0) -> None:
        single = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
        kernels = [params[p] for p in demo.pruned_paths(params)]
        share = 1 - sum(map(np.count_nonzero, kernels)) / sum(k.size for k in kernels)
        if abs(share - sparsity) > 0.005:
            raise ValueError(f"{method}: {share:.4f} of the weights are zero, not {sparsity}.")
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            for text, ids in self.texts.items():
                result = self.evaluate(single, ids)
                row = {
                    "method": method,
                    "sparsity": f"{sparsity:.2f}",
                    "text": text,
                    "per_token": f"{result['perplexity_per_token']:.3f}",
                    "bits_per_byte": f"{result['bits_per_byte']:.4f}",
                    "tokens_trained": tokens,
                    "seconds": f"{seconds:.1f}",
                }
                writer.writerow(row)
                print(*row.values(), flush=True)


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def plot(rows: list[dict], text: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "accuracy"  # the same file from the same numbers
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a small file
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["text"] == text]
    _, axes = plt.subplots(figsize=(8.5, 4.5))
    dense = next(float(row["per_token"]) for row in rows if row["method"] == "dense")
    axes.axhline(dense, color="black", lw=1, ls=":", label=f"dense, {dense:.1f}")
    colors: dict[str, str] = {}
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"):
        own = sorted((float(r["sparsity"]), float(r["per_token"]))
                     for r in rows if r["method"] == method)  # fmt: skip
        base = method.removesuffix(TUNED)
        colors.setdefault(base, f"C{len(colors)}")
        axes.plot(
            *zip(*own, strict=True), marker=STYLES.get(base, "*"), color=colors[base], label=method,
            ls="-" if base == method else "--", mfc=None if base == method else "white",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("sparsity of the linear layers")
    axes.set_ylabel(f"perplexity per token, {text}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.tight_layout()
    plt.savefig(out, metadata={"Date": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="train_demo.py's, plain or .xz")
    parser.add_argument("--eval-text", type=Path, help="another text to measure on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=0, help="to fine-tune with")
    parser.add_argument("--batch", type=int, default=128, help="windows a step of fine-tuning")
    parser.add_argument("--plot", type=Path, help="draw the CSV instead")
    parser.add_argument("--plot-text", default="alice29.txt")
    args = parser.parse_args(argv)
    if args.plot:
        return plot(read(args.csv), args.plot_text, args.plot)
    recipe = fine_tuning(args.batch)
    tokenizer = open_tokenizer(DENSE)
    documents = demo.read_documents(args.text)
    training, heldout = demo.split_heldout(documents, recipe.heldout_bytes)
    encoder = demo.Tokenizer.from_file(str(DENSE / "tokenizer.json"))
    ids = demo.tokenize(encoder, demo.wrap_some(training))
    texts = {"heldout_books": demo.tokenize(encoder, heldout)}
    if args.eval_text:
        text = args.eval_text.read_text(encoding="utf-8")
        texts[args.eval_text.name] = np.array(tokenizer.encode(text, add_special_tokens=False))
    calibration = windows(ids, args.samples, CONTEXT)

    table = Table(args.csv, texts, recipe)
    dense = to_params(read_tensors(DENSE))
    if not table.has("dense", 0):
        table.add("dense", 0, dense)
        table.add("the demo", 0.7, to_params(read_tensors(DEMO)), 760_217_600)
    tuner = Tuner(ids, args.tokens, recipe) if args.tokens else None
    for sparsity in args.sparsities:
        for method in args.methods:
            wanted = [method, method + TUNED] if tuner else [method]
            if all(table.has(m, sparsity) for m in wanted):
                continue
            start = time.perf_counter()
            params = to_params(prune(method, sparsity, calibration))
            if not table.has(method, sparsity):
                table.add(method, sparsity, params, seconds=time.perf_counter() - start)
            if tuner and not table.has(method + TUNED, sparsity):
                start = time.perf_counter()
                tuned = tuner(params)
                seconds = time.perf_counter() - start
                table.add(method + TUNED, sparsity, tuned, tuner.tokens, seconds)
        if tuner and not table.has("gradual", sparsity):
            start = time.perf_counter()
            tuned = tuner(dense, sparsity)
            table.add("gradual", sparsity, tuned, tuner.tokens, time.perf_counter() - start)


def fine_tuning(batch: int) -> demo.Recipe:
    """The demo's recipe, its rate a third and falling from the start."""
    return dataclasses.replace(
        demo.Recipe(),
        batch=batch,
        steps_per_call=20,
        learning_rate=1e-3,
        warmup_steps=30,
        decay_fraction=1.0,
    )


if __name__ == "__main__":
    main()
