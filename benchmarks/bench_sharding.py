"""Times decode steps of OPT shapes over tensor parallel devices, sparse against dense.

    python benchmarks/bench_sharding.py --models opt-66b opt-175b --tp 1 2 4 --csv out.csv
    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        python benchmarks/bench_sharding.py --models opt-125m --tp 1 2 --layers 2 --steps 5

Weights are synthetic: random places, each layer with buffers of its own, so that every step reads
all of them from memory. `--layers` bounds how many are built; where even they do not fit, the row
says so and has no time. A step is `OPT.__call__` for one token of each row with a full cache,
the cache donated. Its time is the median of `--steps` calls in a row, each waited for.

The profile of a few more steps gives us_kernels, what a device spends in kernels, of which
us_collectives in those of collectives, waiting for the others included (means over devices and
steps), and counts the latter; share_collectives is their share of us. With --without-sums there is
also share_without, 1 - t'/t, t' the same step with the sums over devices left out (its results are
wrong, its other work is the same). efficiency is t(1) / (n t(n)), 1 the smallest tp of the same
rows. Rows that are in the CSV stay. The compiled step is searched for gathers of more than the
logits; there must be none.
"""

import argparse
import collections
import csv
import dataclasses
import functools
import platform
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_flashllm.formats import encode_on_host
from jax_flashllm.formats.layout import place
from jax_flashllm.models.cache import KVCache
from jax_flashllm.models.config import OPTConfig
from jax_flashllm.models.mesh import Layout
from jax_flashllm.models.opt import LAYER_NORM_EPSILON, OPT
from jax_flashllm.nn import SparseDense

# In the name of a kernel: NCCL's ncclDevKernel_AllReduce_..., XLA's own psum_933_0_fusion_1.
COLLECTIVE = re.compile("psum|(all|reduce)[-_ ]?(reduce|gather|scatter)", re.IGNORECASE)
SLAB = 512  # rows of a matrix that are drawn; the others repeat them


class WithoutSums(Layout):
    """Each device keeps its own partial sums."""

    def sum(self, y):
        return y

    def gather(self, logits):
        return logits if self.parts == 1 else jnp.tile(logits, self.parts)


class Synthetic:
    """A maker (`opt.Maker`) of random parts. sparsity None makes dense layers."""

    def __init__(self, layout: Layout, dtype, sparsity: float | None):
        self.layout, self.dtype, self.sparsity = layout, np.dtype(dtype), sparsity
        self.drawn: dict = {}

    def linear(self, names, in_features, out_features, bias):
        part = names[0].rpartition(".")[2]
        rows = self.layout.tensor if part in ("q_proj", "fc1", "lm_head") else None
        columns = self.layout.tensor if part in ("out_proj", "fc2") else None
        b = self.layout.put(np.zeros(out_features, self.dtype), rows) if bias else None
        if self.sparsity is not None and "." in names[0]:
            variable = None if b is None else nnx.Param(b, **self.layout.metadata(rows))
            w = self._weight(out_features, in_features, rows, columns)
            return SparseDense.from_encoded(w, variable, self.dtype)
        kernel = self._filled((in_features, out_features), columns, rows)
        return nnx.Linear(
            in_features, out_features, use_bias=bias, dtype=self.dtype, param_dtype=self.dtype,
            kernel_init=lambda *_: kernel, bias_init=lambda *_: b, rngs=nnx.Rngs(0),
            kernel_metadata=self.layout.metadata(columns, rows),
            bias_metadata=self.layout.metadata(rows),
        )  # fmt: skip

    def embed(self, name, rows, features):
        split = self.layout.tensor if name == "embed_tokens" else None
        table = self._filled((rows, features), split)
        return nnx.Embed(
            rows, features, dtype=self.dtype, param_dtype=self.dtype, rngs=nnx.Rngs(0),
            embedding_init=lambda *_: table, embedding_metadata=self.layout.metadata(split),
        )  # fmt: skip

    def norm(self, name, features):
        one = self.layout.put(np.ones(features, self.dtype))
        return nnx.LayerNorm(
            features, epsilon=LAYER_NORM_EPSILON, dtype=self.dtype, rngs=nnx.Rngs(0),
            scale_init=lambda *_: one, bias_init=lambda *_: one, use_fast_variance=False,
        )  # fmt: skip

    def _filled(self, shape, *spec):
        """Made where it lies: dense matrices of a large model do not fit on a host."""
        return _filling(shape, self.dtype, self.layout.sharding(*spec))()

    def _weight(self, M, K, rows, columns):
        key = M, K, rows, columns
        sharding = self.layout.sharding(columns or rows)
        if key not in self.drawn:
            random = np.random.default_rng(M + K)
            slab = random.random((SLAB, K), np.float32)
            slab = np.where(slab < self.sparsity, 0, slab - 0.5).astype(self.dtype)
            dense = np.tile(slab, (-(-M // SLAB), 1))[:M]
            n = self.layout.parts
            grid = n if rows else 1, n if columns else 1
            self.drawn[key] = place(encode_on_host(dense, "bitmap", grid), sharding)
        return jax.tree.map(jnp.copy, self.drawn[key])


@functools.cache
def _filling(shape, dtype, sharding):
    return jax.jit(lambda: jnp.full(shape, 0.01, dtype), out_shardings=sharding)


def step_of(model: OPT, batch: int, slots: int):
    """The compiled step, and its arguments."""
    layout = model.layout
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)

    def step(leaves, token, cache):
        model = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        logits, new = model(token[:, None], None, cache, last_only=True)
        # The next step writes to the same slot, so that all steps do the same work.
        new = dataclasses.replace(new, length=cache.length)
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), new

    specs = layout.placed(
        jax.eval_shape(lambda: KVCache.create(model.config, batch, slots, model.dtype))
    )
    shardings = jax.tree.map(lambda s: s.sharding, specs)
    make = jax.jit(
        lambda: dataclasses.replace(
            KVCache.create(model.config, batch, slots, model.dtype),
            valid=jnp.ones((batch, slots), bool),
            length=jnp.int32(slots - 1),
        ),
        out_shardings=shardings,
    )
    token = jax.device_put(np.full(batch, 5, np.int32), layout.sharding())
    run = jax.jit(step, donate_argnums=2, out_shardings=(layout.sharding(), shardings))
    cache = make()
    return run.lower(leaves, token, cache).compile(), leaves, token, cache


def time_steps(compiled, leaves, token, cache, steps: int):
    """Median and interquartile range, in microseconds; then the token and the cache."""
    times = []
    for i in range(steps + 3):
        start = time.perf_counter()
        token, cache = compiled(leaves, token, cache)
        token.block_until_ready()
        if i >= 3:
            times.append((time.perf_counter() - start) * 1e6)
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times), quarters[2] - quarters[0], token, cache


def profile(compiled, leaves, token, cache, steps: int = 5) -> dict:
    """Columns from a profile: what a device spends in kernels, and in which collectives."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as where:
        with jax.profiler.trace(where, profiler_options=options):
            for _ in range(steps):
                token, cache = compiled(leaves, token, cache)
                token.block_until_ready()
        (file,) = Path(where).rglob("*.xplane.pb")
        planes = [
            plane
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            if plane.name.startswith("/device:GPU")
        ]
        counts: collections.Counter = collections.Counter()
        micros: collections.Counter = collections.Counter()
        for line in (line for plane in planes for line in plane.lines if "Stream" in line.name):
            for event in line.events:
                counts[event.name] += 1 / steps / len(planes)
                micros[event.name] += event.duration_ns / 1000 / steps / len(planes)
    if not planes:
        return {}
    for name, spent in micros.most_common(8):
        print(f"  {spent:9.1f} us in {counts[name]:g} x {name[:80]}")
    kinds: collections.Counter = collections.Counter()
    for name, n in counts.items():
        if kind := COLLECTIVE.search(name):
            kinds[re.sub("[^a-z]", "", kind[0].lower())] += n
    spent = sum(t for name, t in micros.items() if COLLECTIVE.search(name))
    return {"us_kernels": round(sum(micros.values()), 1), "us_collectives": round(spent, 1),
            "collectives": " ".join(f"{k}:{n:g}" for k, n in sorted(kinds.items()))}  # fmt: skip


def largest_gather(compiled) -> int:
    """Elements of the largest all-gather."""
    shapes = re.findall(r"\w+\[([\d,]+)\][^=]* all-gather(?:-start)?\(", compiled.as_text())
    return max((int(np.prod([int(n) for n in s.split(",")])) for s in shapes), default=0)


def measure(name, tp, sparsity, args) -> dict:
    config = OPTConfig.preset(name)
    layers = min(args.layers or config.num_hidden_layers, config.num_hidden_layers)
    config = OPTConfig.preset(name, num_hidden_layers=layers)
    dtype = jnp.dtype(args.dtype)
    mesh = jax.make_mesh((tp,), ("tp",), devices=jax.devices()[:tp])
    layout = Layout.create(mesh, config, "tp", "dp")
    model = OPT(config, make=Synthetic(layout, dtype, sparsity), layout=layout, dtype=dtype)
    arrays = [a for a in jax.tree.leaves(nnx.state(model)) if isinstance(a, jax.Array)]
    held = sum(a.addressable_shards[0].data.nbytes for a in arrays)
    compiled, *arguments = step_of(model, args.batch, args.slots)
    gathered = largest_gather(compiled)
    assert gathered <= args.batch * config.vocab_size, f"a gather of {gathered} elements"
    micros, spread, token, cache = time_steps(compiled, *arguments, args.steps)
    row = {"layers": layers, "bytes_per_device": held, "us": round(micros, 1),
           "us_spread": round(spread, 1)}  # fmt: skip
    print(f"{name}, tp {tp}: {micros:.0f} us", flush=True)
    row |= profile(compiled, arguments[0], token, cache)
    if "us_collectives" in row:
        row["share_collectives"] = round(row["us_collectives"] / micros, 3)
    if args.without_sums and tp > 1:
        fields = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
        for module in [model, *(m for _, m in nnx.iter_modules(model))]:
            if getattr(module, "layout", None) is not None:
                module.layout = WithoutSums(**fields)
        compiled, *arguments = step_of(model, args.batch, args.slots)
        without = time_steps(compiled, *arguments, args.steps)[0]
        row["share_without"] = round(1 - without / micros, 3)
    return row


def read(path: Path | None) -> list[dict]:
    if path is None or not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def write(path: Path, rows: list[dict]) -> None:
    fields = list(dict.fromkeys(k for r in rows for k in r))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def efficiency(row: dict, rows: list[dict]) -> float | None:
    """Of a row with a time, against the smallest tp among rows like it."""
    same = ("model", "weights", "sparsity", "batch", "slots", "dtype", "layers", "device")
    like = [r for r in [*rows, row] if r.get("us") and all(str(r[k]) == str(row[k]) for k in same)]
    first = min(like, key=lambda r: int(r["tp"]))
    return round(int(first["tp"]) * float(first["us"]) / (row["tp"] * row["us"]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["opt-66b", "opt-175b"])
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--layers", type=int, help="of each model (default: all)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--weights", nargs="+", default=["sparse", "dense"])
    parser.add_argument("--without-sums", action="store_true", help="time that as well")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    ).stdout.strip()
    rows = read(args.csv)
    for name in args.models:
        for weights in args.weights:
            sparsity = args.sparsity if weights == "sparse" else None
            for tp in args.tp:
                row = {"model": name, "weights": weights, "sparsity": sparsity or "", "tp": tp,
                       "batch": args.batch, "slots": args.slots, "dtype": args.dtype,
                       "device": jax.devices()[0].device_kind, "jax": jax.__version__,
                       "host": platform.machine(), "commit": commit}  # fmt: skip
                try:
                    row |= measure(name, tp, sparsity, args)
                    row["efficiency"] = efficiency(row, rows)
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    row["note"] = "does not fit"
                rows.append(row)
                print(row, flush=True)
                if args.csv:
                    write(args.csv, rows)


if __name__ == "__main__":
    main()
