"""tune: the fastest cut of the work on this GPU, measured once and kept in a file.

A cut says how the rows of W are shared out (plan.py): warps a CTA, and CTAs. A W that is not very
sparse has two, the one for few tokens by itself (plan.by_memory).

    ~/.cache/jax_flashllm/plans-0.1.0-NVIDIA-H100-80GB-HBM3.json   (or under $XDG_CACHE_HOME)

    {"bitmap 1x28672x7168": {"warps": 16, "ctas": 132},            format, shards x rows x K
     "bitmap 1x28672x7168 by memory 1": {"warps": 8, "ctas": 132}, ...}
"""

import dataclasses
import functools
import json
import math
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashllm import plan
from jax_flashllm.formats import SparseWeight

_ROTATE_BYTES = 160 << 20  # several times the L2, so that weights come from memory
_MOST_COPIES = 32
_PRODUCTS = 48  # in a program, so that its launch does not count
_GAIN = 0.98  # of the model's time that a cut must stay below to replace it: less may be noise


@dataclasses.dataclass(frozen=True)
class Trial:
    """A cut, and the microseconds of one product for each number of tokens."""

    cut: plan.Cut
    microseconds: dict[int, float]

    @property
    def score(self) -> float:
        return math.exp(statistics.fmean(map(math.log, self.microseconds.values())))


def tune(
    w: SparseWeight,
    tokens: Sequence[int] = (1, 8, 16, 32),
    progress: Callable[[str], None] | None = None,
) -> list[Trial]:
    """Measures how to cut products with weights of w's shape and format, and keeps the fastest.

    w: encoded, on a CUDA device, with values as sparse as those it will be used with. Copies of it
    take about 160 MB of the GPU's memory meanwhile, or as much as w where that is more. tokens: the
    numbers of tokens that count, 1 to 64, each as much as the others. progress: called with a line
    for every trial, as `print` can be.

    The winner is kept for this GPU model and version of the library in the user's cache folder,
    and used from then on by what is traced: in this process, and in later ones when they begin.
    Programs that were compiled before keep their cut. Where several hosts run one program, tune on
    one and copy the file.

    Returns the trials, those that were kept first: one, or one for few tokens and one for more,
    where these take cuts of their own. Raises TypeError for other than encoded weights, ValueError
    for stacks, weights on other devices, or tokens out of range.
    """
    from jax_flashllm.spmm import _check_weight

    _check_weight("tune", w)
    _device_of(w)
    if not tokens or not all(1 <= n <= plan.MAX_GROUP for n in tokens):
        raise ValueError(f"tune: tokens must be 1 to {plan.MAX_GROUP}, got {list(tokens)}")
    gpu, shape = plan.device(), (w.format, w.shard_rows, w.row_shards, w.shard_columns)
    fill = w.values.shape[-1] / max(w.shard_rows * w.shard_columns, 1)
    bound = {n: plan.by_memory(w.format, n, fill) for n in tokens}
    cuts = {n: plan.cuts(*shape, gpu, bound[n]) for n in tokens}
    copies = min(_MOST_COPIES, max(2, -(-_ROTATE_BYTES // w.nbytes)))
    weights = [w, *(jax.tree.map(jnp.copy, w) for _ in range(copies - 1))]
    tell = progress or (lambda line: None)
    begin = time.perf_counter()
    programs = _programs(weights, cuts)
    tell(f"tune: {len(programs)} programs compiled in {time.perf_counter() - begin:.1f} s")
    kept, others = [], []
    for by_memory in sorted(set(bound.values()), reverse=True):
        counted = [n for n in tokens if bound[n] == by_memory]
        trials = []
        for cut in cuts[counted[0]]:
            us = {n: statistics.median(_time(*programs[cut, n])) for n in counted}
            trials.append(Trial(cut, us))
            line = f"{cut.warps} warps, {cut.ctas} CTAs: {trials[-1].score:.1f} us"
            tell(f"tune: {line} at {', '.join(map(str, counted))} tokens")
        best = min(trials, key=lambda t: t.score)
        if best.score > _GAIN * trials[0].score:
            best = trials[0]
        _keep(gpu.name, _key(*shape, by_memory), best.cut)
        kept.append(best)
        others += sorted((t for t in trials if t is not best), key=lambda t: t.score)
    return kept + others


def _device_of(w: SparseWeight) -> Any:
    devices = w.values.devices()
    if len(devices) > 1 or next(iter(devices)).platform != "gpu":
        raise ValueError(
            f"tune: w lies on {sorted(map(str, devices))}; put it on one GPU with jax.device_put"
        )
    return next(iter(devices))


Program = tuple[Callable, list, list[jax.Array]]  # compiled, its weights, its tokens


def _programs(
    weights: list[SparseWeight], cuts: dict[int, list[plan.Cut]]
) -> dict[tuple[plan.Cut, int], Program]:
    """The programs of all trials, compiled side by side: that takes longer than running them."""
    from jax_flashllm.spmm import spmm

    device, rounds = _device_of(weights[0]), -(-_PRODUCTS // len(weights))
    lowered, tokens = {}, {}
    for n in cuts:
        x = jax.random.normal(jax.random.key(0), (n, weights[0].shape[1]))
        x = jax.device_put(x.astype(weights[0].dtype), device)
        for cut in cuts[n]:
            with plan.forced(cut):
                program, ws, xs = _lower(spmm, weights, x, rounds)
            # One copy of the tokens for all cuts.
            lowered[cut, n] = program, ws, tokens.setdefault(n, xs)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda program: program[0].compile(), lowered.values())
        return {
            case: (run, *operands)
            for (case, (_, *operands)), run in zip(lowered.items(), compiled, strict=True)
        }


def time_products(f: Callable, weights: Sequence, x: jax.Array, rounds: int) -> list[float]:
    """Microseconds of one f(w, x), several times over: a program goes round all weights.

    Where they exceed the caches, they come from memory. Products that share a weight may become
    one, where f is XLA's: one round only then.
    """
    lowered, *operands = _lower(f, weights, x, rounds)
    return _time(lowered.compile(), *operands)


def _lower(f: Callable, weights: Sequence, x: jax.Array, rounds: int) -> tuple[Any, list, list]:
    # Other tokens each: XLA computes nothing twice.
    xs = [x + i for i in range(rounds * len(weights))]

    def products(ws, xs):
        return [f(w, x) for w, x in zip(ws * rounds, xs, strict=True)]

    return jax.jit(products).lower(list(weights), xs), list(weights), xs


def _time(run: Callable, weights: list, xs: list[jax.Array]) -> list[float]:
    jax.block_until_ready([run(weights, xs) for _ in range(2)])
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([run(weights, xs) for _ in range(3)])
        times.append(1e6 * (time.perf_counter() - start) / 3 / len(xs))
    return times


# ---- the file ----


def lookup(
    format: str, rows: int, shards: int, k: int, gpu: plan.Device, by_memory: int
) -> plan.Cut | None:
    """The cut that `tune` kept for products of this shape on this GPU model."""
    if not gpu.name:
        return None
    entry = _load(_path(gpu.name)).get(_key(format, rows, shards, k, by_memory))
    return None if entry is None else plan.Cut(**entry)


plan.tuned = lookup


def _key(format: str, rows: int, shards: int, k: int, by_memory: int) -> str:
    return f"{format} {shards}x{rows}x{k}" + (f" by memory {by_memory}" if by_memory else "")


def _path(gpu_name: str) -> Path:
    from jax_flashllm import __version__

    # XDG_CACHE_HOME counts only where it is absolute, says its specification.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # Unlike Path.home(), this gives a path of no file where no home is known.
    folder = Path(xdg if os.path.isabs(xdg) else os.path.expanduser("~/.cache"))
    name = re.sub(r"[^A-Za-z0-9.]+", "-", gpu_name)
    return folder / "jax_flashllm" / f"plans-{__version__}-{name}.json"


@functools.cache
def _load(path: Path) -> dict[str, dict[str, int]]:
    try:
        cuts = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        warnings.warn(f"jax_flashllm: ignoring tuned plans, {path}: {e}", stacklevel=2)
        return {}
    if not isinstance(cuts, dict) or not all(map(_is_cut, cuts.values())):
        warnings.warn(
            f"jax_flashllm: ignoring tuned plans, {path} holds something else; delete it",
            stacklevel=2,
        )
        return {}
    return cuts


def _is_cut(entry) -> bool:
    names = {f.name for f in dataclasses.fields(plan.Cut)}
    return (
        isinstance(entry, dict)
        and set(entry) == names
        and all(type(v) is int and v >= 1 for v in entry.values())
    )


def _keep(gpu_name: str, key: str, cut: plan.Cut) -> None:
    """Adds to the file: all of it is replaced at once, so that no reader sees a part."""
    path = _path(gpu_name)
    _load.cache_clear()  # other processes may have added to it
    cuts = {**_load(path), key: dataclasses.asdict(cut)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as f:
        f.write(json.dumps(cuts, indent=1, sort_keys=True) + "\n")
    os.replace(f.name, path)
    _load.cache_clear()
