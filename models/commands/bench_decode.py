"""Decoding at full size without a checkpoint: random weights, made on the device.

    jax-flashllm bench decode --config opt-66b --sparsity 0.7 --batch 1 8 --dense --csv out.csv

R is the read bandwidth measured in the same run; D, 16-bit dense weight bytes / R, is the time that
no dense engine can beat. A step's time is the mean over its place in the run from --prompt to
--context; every window of steps is one dispatch, as in generation. docs/performance.md explains
the columns.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import gc
import glob
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from jax_flashllm.models import memory
from jax_flashllm.models.commands import common
from jax_flashllm.models.config import PRESETS, OPTConfig

if TYPE_CHECKING:
    import jax

    from jax_flashllm.models.opt import OPT

ROUNDS = 3
SECONDS = 10  # of the steps of one batch; slow models do fewer
READ_BYTES = 2 << 30

# Names of GPU kernels, first match wins.
KINDS = [
    ("spmm", r"BitmapKernel|(?<!Combine)DeltaCsrKernel|WideKernel|GemmKernel"),
    ("spmm, before and after", r"ClearFlags|Combine|Prepare"),
    ("W made dense", r"BitmapConvert|DeltaCsrConvert"),
    ("attention", r"AttentionKernel|cudnn|flash_fprop"),
    ("dense products", r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitK"),
    ("copies", r"[Mm]emcpy|[Mm]emset|wrapped_copy|^copy|_copy_"),
]
OTHER = "norms, residuals, sampling"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    number = common.number
    parser.add_argument("--config", required=True, choices=PRESETS, help="the model's size")
    parser.add_argument(
        "--sparsity", type=number(float, 0, 1), default=0.7, metavar="S", help="default 0.7"
    )
    parser.add_argument(
        "--format", choices=common.FORMATS, default="auto",
        help="of sparse weights (default: auto, the smaller)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=number(int, 1, 4096), nargs="+", default=[1], metavar="N", help="rows"
    )
    parser.add_argument(
        "--context", type=number(int, 2), default=576, metavar="N",
        help="prompt and new tokens (default 576)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", type=number(int, 1), default=64, metavar="N", help="of them (default 64)"
    )
    parser.add_argument(
        "--long-prompt", type=number(int, 1), metavar="N",
        help="time one prompt of N tokens too, with the first of --batch",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument(
        "--cache-dtype", choices=("float16", "bfloat16", "float8_e4m3fn"), help="default --dtype"
    )
    parser.add_argument(
        "--sample", action="store_true",
        help="draw tokens at temperature 0.75 and top-p 0.9, instead of the likeliest",
    )  # fmt: skip
    parser.add_argument("--dense", action="store_true", help="the dense twin too, where it fits")
    parser.add_argument(
        "--layers", type=number(int, 1), metavar="N", help="fewer layers than the model has"
    )
    parser.add_argument("--seconds", type=number(float, 0), metavar="S",
        help="begin no further batch or twin after so long")  # fmt: skip
    parser.add_argument("--csv", metavar="FILE", help="append the figures to a CSV file")
    parser.add_argument("--plot", metavar="FILE", help="draw them, with those of --csv")


@dataclasses.dataclass
class Result:
    """A row of the CSV. Times of a step in ms, sizes in bytes."""

    device: str
    jax: str
    config: str
    layers: int
    sparsity: float | str  # "dense"
    format: str  # "dense"
    batch: int
    prompt: int
    context: int
    dtype: str
    cache_dtype: str
    choice: str  # of a token: "greedy" or "sampled"
    read_gb_s: float  # R
    step_ms: float
    step_ms_first: float  # after the prompt
    step_ms_last: float  # at the end of the context
    spread_ms: float  # between rounds, largest minus smallest
    dense_limit_ms: float  # D
    weight_bytes: int
    cache_bytes_read: int  # a step, in the mean
    fraction_of_read: float
    tokens_s: float
    in_use_bytes: int
    workspace_bytes: int  # of the decode program
    cache_copies: int
    graph_launches: float  # a step
    prefill_ms: float
    prefill_tokens_s: float
    build_s: float
    compile_prefill_s: float
    compile_decode_s: float
    kinds: str  # microseconds a step by kind of kernel
    prompt_kinds: str  # microseconds of the prompt
    long_prompt: int | None  # tokens of one row
    long_prompt_ms: float | None
    long_prompt_kinds: str


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    if args.prompt >= args.context:
        raise ValueError(
            f"--prompt {args.prompt} leaves no new token in --context {args.context}; ask for less"
        )
    overrides = {} if args.layers is None else {"num_hidden_layers": args.layers}
    config = OPTConfig.preset(args.config, **overrides)
    for option, tokens in (("--context", args.context), ("--long-prompt", args.long_prompt or 0)):
        if tokens > config.max_position_embeddings:
            raise ValueError(
                f"{option} is {tokens}, but {args.config} has "
                f"{config.max_position_embeddings} positions; pass that at most"
            )
    common.use_all_memory()
    common.cache_compilations()
    import jax

    from jax_flashllm.formats import smaller_format
    from jax_flashllm.models.synthetic import synthesize

    if args.format == "auto":
        args.format = smaller_format(1 - args.sparsity, config.hidden_size)
    device = jax.devices()[0]
    bandwidth = read_bandwidth()
    print(
        f"{args.config}, {config.num_hidden_layers} layers, on {device.device_kind}: reads at "
        f"R = {bandwidth / 1e12:.3f} TB/s; prompt {args.prompt}, context {args.context}",
        flush=True,
    )
    results: list[Result] = []
    for sparsity in (args.sparsity, None) if args.dense else (args.sparsity,):
        if args.seconds is not None and time.perf_counter() - started > args.seconds:
            print("out of --seconds")
            break
        weights = memory.weight_bytes(config, sparsity, args.format)
        name = "dense" if sparsity is None else _sparse(sparsity, args.format)
        needs = [_estimate(args, config, weights, batch) for batch in args.batch]
        free = memory.free_bytes()
        advice = "a smaller --batch or --context, or a larger --sparsity, needs less"
        if sparsity is None and free is not None and needs[0].total > free:
            print(f"dense: needs {needs[0]}, {memory.gb(free)} are free: not measured")
            continue
        memory.check_fits(f"{args.config}, {name}", needs[0], free, advice)
        begin = time.perf_counter()
        model = synthesize(config, sparsity, args.dtype, format=args.format)
        jax.block_until_ready(_arrays(model))
        build = time.perf_counter() - begin
        fitting = []
        for batch, need in zip(args.batch, needs, strict=True):
            rest, now = dataclasses.replace(need, weights=0), memory.free_bytes()
            if now is not None and rest.total > now:
                print(f"batch {batch}: needs {need}, {memory.gb(free or 0)} were free")
            else:
                fitting.append(batch)
        for runner in _compile(args, config, model, fitting):
            if args.seconds is not None and time.perf_counter() - started > args.seconds:
                print("out of --seconds")
                break
            result = runner.measure(sparsity, bandwidth, build)
            results.append(result)
            print(describe(result), flush=True)
            if args.csv:
                _append(args.csv, result)
        runner = None
        del model
        gc.collect()
    if results:
        print("\n" + _table(results))
    if args.plot:
        plot(args.plot, _read(args.csv) if args.csv else [_as_text(r) for r in results])


def _estimate(args, config: OPTConfig, weights: int, batch: int) -> memory.Estimate:
    cache_dtype = args.cache_dtype or args.dtype
    slots = args.context
    return memory.estimate(config, weights, batch, slots, args.prompt, _dtype(cache_dtype).itemsize)


def _dtype(name: str) -> Any:
    import jax.numpy as jnp

    return jnp.dtype(name)


def _arrays(model: OPT) -> list[jax.Array]:
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(model))


def _compile(args: argparse.Namespace, config: OPTConfig, model: OPT, batches: list[int]):
    """A runner of each batch, their programs compiled side by side."""
    with ThreadPoolExecutor(max(2 * len(batches), 1)) as pool:
        runners = [_Runner(args, config, model, batch, pool) for batch in batches]
        for runner in runners:
            runner.wait()
    for runner in runners:
        print(
            f"batch {runner.batch}: compiled in {runner.prefill_s:.1f} s (prompt) and "
            f"{runner.decode_s:.1f} s (decode), {len(runners)} batches side by side",
            flush=True,
        )
    return runners


class _Runner:
    """The two programs of one batch, and what runs them."""

    def __init__(
        self, args: argparse.Namespace, config: OPTConfig, model: OPT, batch: int, pool: Any
    ):
        import numpy as np

        from jax_flashllm.models import generate
        from jax_flashllm.models.sampling import Sampling

        self.args, self.config, self.batch, self.slots = args, config, batch, args.context
        self.cache_dtype = _dtype(args.cache_dtype or args.dtype)
        programs, self.weights = generate.programs_of(model, self.cache_dtype)
        self.ends = np.zeros((0, 1), np.int32)
        random = np.random.default_rng(0)
        ids = random.integers(0, config.vocab_size, (batch, args.prompt)).astype(np.int32)
        sampling = Sampling.create(0.75, top_p=0.9) if args.sample else None
        uniforms = random.random((generate.CHUNK, batch), np.float32) if args.sample else None
        self.draws = sampling, uniforms
        first = None if uniforms is None else uniforms[0]
        self.operands = (self.weights, ids, np.ones_like(ids), self.ends, sampling, first)
        self.long_operands = None
        if args.long_prompt and batch == args.batch[0]:
            ids = random.integers(0, config.vocab_size, (1, args.long_prompt)).astype(np.int32)
            first = None if first is None else first[:1]
            self.long_operands = (self.weights, ids, np.ones_like(ids), self.ends, sampling, first)

        def compiled(lower: Callable[[], Any]) -> tuple[Any, float]:
            begin = time.perf_counter()
            program = lower().compile()
            return program, time.perf_counter() - begin

        self.programs = [
            pool.submit(compiled, lambda: programs.prefill.lower(*self.operands, self.slots)),
            pool.submit(
                compiled,
                lambda: programs.lower_decode(self.weights, batch, self.slots, self.ends, sampling),
            ),
        ]
        if (long := self.long_operands) is not None:
            lower = programs.prefill.lower
            self.programs.append(pool.submit(compiled, lambda: lower(*long, args.long_prompt)))

    def wait(self) -> None:
        (self.prefill, self.prefill_s), (self.decode, self.decode_s), *long = (
            program.result() for program in self.programs
        )
        self.long_prefill = long[0][0] if long else None

    def prompt(self, prefill: Any, operands: tuple) -> tuple[Any, float, dict[str, float]]:
        """The state after a prompt, the median seconds of it, and microseconds by kind."""
        import jax

        def run() -> Any:
            return jax.block_until_ready(prefill(*operands))

        run()  # warms up
        kinds, _ = profile(run, 1)
        seconds, state = [], None
        while len(seconds) < ROUNDS and sum(seconds) < SECONDS / 2:
            state = None  # one cache at a time
            begin = time.perf_counter()
            state = run()
            seconds.append(time.perf_counter() - begin)
        return state, statistics.median(seconds), kinds

    def window(self, state: Any, length: int, steps: int) -> tuple[Any, float]:
        """`steps` steps in one dispatch, the first one with `length` slots: seconds of each."""
        import jax
        import jax.numpy as jnp

        cache = dataclasses.replace(
            state.cache,
            length=jnp.int32(length),
            valid=jnp.broadcast_to(jnp.arange(self.slots) < length, (self.batch, self.slots)),
        )
        state = dataclasses.replace(state, cache=cache, open=jnp.ones(self.batch, bool))
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state, tokens, count = self.decode(self.weights, state, self.ends, *self.draws, steps)
        tokens.block_until_ready()
        each = (time.perf_counter() - begin) / steps
        if int(count) != steps:
            raise RuntimeError(f"bench decode: {int(count)} steps were done of {steps}")
        return state, each

    def measure(self, sparsity: float | None, bandwidth: float, build: float) -> Result:
        import jax

        from jax_flashllm.models import generate

        args, config, batch = self.args, self.config, self.batch
        device = jax.devices()[0]
        long_s, long_kinds = None, {}
        if self.long_operands is not None:
            _, long_s, long_kinds = self.prompt(self.long_prefill, self.long_operands)
        state, prefill_s, prompt_kinds = self.prompt(self.prefill, self.operands)
        # Zeros can be read faster than numbers: slots that later tokens fill get random ones now.
        keys = iter(jax.random.split(jax.random.key(1, impl="rbg"), 2 * config.num_hidden_layers))
        filled = dataclasses.replace(
            state.cache,
            keys=tuple(_fill(k, next(keys), args.prompt) for k in state.cache.keys),
            values=tuple(_fill(v, next(keys), args.prompt) for v in state.cache.values),
        )
        state = dataclasses.replace(state, cache=filled)
        del filled

        new = args.context - args.prompt
        steps = min(generate.CHUNK, new)
        state, each = self.window(state, args.prompt, min(steps, 4))
        steps = max(1, min(steps, int(SECONDS / (3 * ROUNDS * each))))
        places = sorted({args.prompt, args.prompt + (new - steps) // 2, args.context - steps})
        times = []
        for _ in range(ROUNDS):
            row = []
            for length in places:
                state, each = self.window(state, length, steps)
                row.append(each)
            times.append(row)
        rounds = [statistics.mean(row) for row in times]
        step = statistics.median(rounds)
        in_use = (device.memory_stats() or {}).get("bytes_in_use", 0)
        few = min(8, steps)
        middle = places[len(places) // 2]
        kinds, launches = profile(lambda: self.window(state, middle, few), few)

        analysis = self.decode.memory_analysis()
        weight_bytes = sum(w.nbytes for w in self.weights)
        cache_read = memory.cache_bytes(config, batch, 1, self.cache_dtype.itemsize) * (
            args.prompt + new / 2
        )
        dense_limit = memory.weight_bytes(config, None) / bandwidth
        shape = (batch * config.num_attention_heads, self.slots, config.head_dim)
        return Result(
            device=device.device_kind, jax=jax.__version__, config=args.config,
            layers=config.num_hidden_layers, sparsity="dense" if sparsity is None else sparsity,
            format="dense" if sparsity is None else args.format,
            batch=batch, prompt=args.prompt, context=args.context, dtype=args.dtype,
            cache_dtype=self.cache_dtype.name, choice="sampled" if args.sample else "greedy",
            read_gb_s=round(bandwidth / 1e9, 1),
            step_ms=round(1e3 * step, 4),
            step_ms_first=round(1e3 * statistics.median(row[0] for row in times), 4),
            step_ms_last=round(1e3 * statistics.median(row[-1] for row in times), 4),
            spread_ms=round(1e3 * (max(rounds) - min(rounds)), 4),
            dense_limit_ms=round(1e3 * dense_limit, 4),
            weight_bytes=weight_bytes, cache_bytes_read=round(cache_read),
            fraction_of_read=round((weight_bytes + cache_read) / bandwidth / step, 4),
            tokens_s=round(batch / step, 2), in_use_bytes=in_use,
            workspace_bytes=0 if analysis is None else int(analysis.temp_size_in_bytes),
            cache_copies=cache_copies(self.decode.as_text() or "", shape),
            graph_launches=round(launches, 2),
            prefill_ms=round(1e3 * prefill_s, 3),
            prefill_tokens_s=round(batch * args.prompt / prefill_s, 1),
            build_s=round(build, 2), compile_prefill_s=round(self.prefill_s, 2),
            compile_decode_s=round(self.decode_s, 2),
            kinds=_sums(kinds), prompt_kinds=_sums(prompt_kinds),
            long_prompt=None if long_s is None else args.long_prompt,
            long_prompt_ms=None if long_s is None else round(1e3 * long_s, 3),
            long_prompt_kinds=_sums(long_kinds),
        )  # fmt: skip


def _fill(held: jax.Array, key: jax.Array, start: int) -> jax.Array:
    """Random numbers in the slots from `start` on; `held` is donated."""
    import jax
    import jax.numpy as jnp

    global _filler
    if _filler is None:

        def fill(held, key, start):
            # Even over [-1, 1), in steps of 1/128.
            drawn = jax.random.bits(key, held.shape, jnp.uint8).astype(jnp.float32) / 128 - 1
            late = jnp.arange(held.shape[1])[:, None] >= start
            return jnp.where(late, drawn.astype(held.dtype), held)

        _filler = jax.jit(fill, donate_argnums=0)
    return _filler(held, key, start)


_filler: Any = None


def read_bandwidth() -> float:
    """Bytes a second of reading READ_BYTES (64 MiB on a CPU), the best of several ways."""
    import jax
    import jax.numpy as jnp

    nbytes = READ_BYTES if jax.default_backend() != "cpu" else 64 << 20
    # rbg: threefry would need several times the memory.
    x = jax.random.bits(jax.random.key(0, impl="rbg"), (nbytes // 4,), jnp.uint32)
    x = jax.lax.bitcast_convert_type(x >> 9, jnp.float32)  # finite
    ways = [jax.jit(lambda x, n=n: jnp.max(x.reshape(-1, n), axis=1)) for n in (1024, 4096, 16384)]
    ways.append(jax.jit(jnp.max))
    best = float("inf")
    for way in ways:
        way(x).block_until_ready()
        for _ in range(3):
            begin = time.perf_counter()
            out = [way(x) for _ in range(8)]
            out[-1].block_until_ready()
            best = min(best, (time.perf_counter() - begin) / 8)
    return nbytes / best


def cache_copies(hlo: str, shape: tuple[int, ...]) -> int:
    """Copies of a layer's whole keys or values in a compiled program."""
    dims = ",".join(map(str, shape))
    return len(re.findall(rf"\w+\[{dims}\]\S* copy\(", hlo))


def profile(work: Callable[[], Any], steps: int) -> tuple[dict[str, float], float]:
    """Microseconds a step by kind of GPU kernel, and launches of CUDA graphs; {} on a CPU."""
    import jax

    if jax.default_backend() == "cpu":
        return {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            work()
        files = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        if not files:
            return {}, 0.0
        data = jax.profiler.ProfileData.from_file(files[0])
        sums: dict[str, float] = collections.defaultdict(float)
        names: dict[str, list[float]] = collections.defaultdict(list)
        launches = 0
        for plane in data.planes:
            gpu = plane.name.startswith("/device:GPU")
            for line in plane.lines:
                if gpu and not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    if gpu:
                        sums[kind_of(event.name)] += event.duration_ns / 1e3 / steps
                        names[event.name].append(event.duration_ns / 1e3)
                    elif "cuGraphLaunch" in event.name:
                        launches += 1
    _print_kernels(names, steps)
    return dict(sorted(sums.items(), key=lambda item: -item[1])), launches / steps


def _sums(kinds: dict[str, float]) -> str:
    return "; ".join(f"{kind} {us:.1f}" for kind, us in kinds.items())


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), OTHER)


def _print_kernels(names: dict[str, list[float]], steps: int) -> None:
    """The kernels that take most of a step."""
    rows = sorted(names.items(), key=lambda item: -sum(item[1]))[:12]
    for name, times in rows:
        print(
            f"  {sum(times) / steps:9.1f} us a step, {len(times) / steps:6.1f} x "
            f"{statistics.median(times):7.2f} us  {kind_of(name)[:14]:14}  {name[:80]}"
        )


def _sparse(sparsity: float, format: str) -> str:
    return f"{100 * sparsity:g}% sparse" + " (Delta-CSR)" * (format == "delta_csr")


def describe(r: Result) -> str:
    name = "dense" if r.sparsity == "dense" else _sparse(float(r.sparsity), r.format)
    lines = [
        f"{name}, batch {r.batch}: {r.step_ms:.2f} ms a step (+-{r.spread_ms / 2:.2f}; "
        f"{r.step_ms_first:.2f} after the prompt, {r.step_ms_last:.2f} at the end), "
        f"{r.tokens_s:.1f} tokens/s, {r.fraction_of_read:.2f} of R, "
        f"D / {r.step_ms / r.dense_limit_ms:.2f} or {r.dense_limit_ms / r.step_ms:.2f} x",
        f"  prompt {r.prefill_ms:.1f} ms, {r.prefill_tokens_s:.0f} tokens/s; weights "
        f"{memory.gb(r.weight_bytes)}, cache read {memory.gb(r.cache_bytes_read)} a step, in use "
        f"{memory.gb(r.in_use_bytes)}, workspace {memory.gb(r.workspace_bytes)}; "
        f"{r.cache_copies} copies of the cache, {r.graph_launches:g} graph launches a step",
        f"  made in {r.build_s:.1f} s",
    ]
    if r.kinds:
        lines.append(f"  us a step: {r.kinds}")
        lines.append(f"  us of the prompt: {r.prompt_kinds}")
    if r.long_prompt is not None:
        lines.append(f"  one prompt of {r.long_prompt} tokens: {r.long_prompt_ms:.1f} ms")
        lines.append(f"  us of it: {r.long_prompt_kinds}")
    return "\n".join(lines)


def _table(results: Iterable[Result]) -> str:
    head = ("weights", "batch", "ms/step", "D", "D/step", "of R", "tokens/s", "in use", "prompt/s")
    rows = [
        (
            "dense" if r.sparsity == "dense" else _sparse(float(r.sparsity), r.format),
            str(r.batch),
            f"{r.step_ms:.2f}", f"{r.dense_limit_ms:.2f}", f"{r.dense_limit_ms / r.step_ms:.2f}",
            f"{r.fraction_of_read:.2f}", f"{r.tokens_s:.1f}", memory.gb(r.in_use_bytes),
            f"{r.prefill_tokens_s:.0f}",
        )
        for r in results
    ]  # fmt: skip
    return common.table(head, rows)


def _as_text(result: Result) -> dict[str, str]:
    return {name: str(value) for name, value in dataclasses.asdict(result).items()}


def _append(path: str, result: Result) -> None:
    row = _as_text(result)
    new = not os.path.exists(path)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow(row)


def _read(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def plot(path: str, rows: list[dict[str, str]]) -> None:
    """Bars: D / step of every model, sparsity and batch; 1 is what no dense engine can beat."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'jax-flashllm[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels, values, colors = [], [], []
    for row in rows:
        dense = row["sparsity"] == "dense"
        weights = "dense" if dense else f"{100 * float(row['sparsity']):g}%"
        if row.get("format") == "delta_csr":  # files of before there was a choice have none
            weights += " Delta-CSR"
        device = re.sub(r"NVIDIA | 80GB HBM3", "", row["device"])
        labels.append(f"{row['config'].upper()} {weights}, batch {row['batch']}, {device}")
        values.append(float(row["dense_limit_ms"]) / float(row["step_ms"]))
        colors.append("#999999" if dense else "#2a6f97")
    figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(labels)), layout="constrained")
    bars = axes.barh(range(len(labels)), values, color=colors)
    axes.bar_label(bars, [f"{v:.2f}" for v in values], padding=3)
    axes.margins(x=0.1)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s, 1 = dense fp16 weights read at full bandwidth")
    figure.savefig(path, dpi=150)
