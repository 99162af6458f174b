"""Generation: one prefill, then a loop of decode steps on the device, each compiled once.

    prefill  ids [B, T] -> state        T padded on the left to a bucket
    decode   state -> state, tokens     up to CHUNK steps, fewer when every row has ended

The state (cache, last tokens, which rows go on) is donated and updated in place. The decode program
compiles in a thread while the prefill compiles and runs. A chunk is dispatched before the tokens of
the one before are looked at: Python's work hides behind the device's, and no step waits for it.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jax_flashllm.attention import DTYPES
from jax_flashllm.formats.weight import check_process, room
from jax_flashllm.models import memory
from jax_flashllm.models.cache import KVCache
from jax_flashllm.models.config import OPTConfig
from jax_flashllm.models.mesh import Layout, model_mesh
from jax_flashllm.models.opt import OPT
from jax_flashllm.models.sampling import Sampling, row_uniforms, sample

NAN_LOGITS = -1  # in the place of a token
CHUNK = 32  # decode steps a dispatch, at most
# Tokens are wanted this often where somebody watches: fewer steps a dispatch on a slow model.
STREAM_SECONDS = 0.1
_ANY = -2  # in the place of a token of `ends`: whatever was there


def generate(
    model: OPT,
    input_ids: Any,
    max_new_tokens: int,
    attention_mask: Any = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: Sequence[int] | Sequence[Sequence[int]] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    on_token: Callable[[np.ndarray], Any] | None = None,
    cache_dtype: Any = None,
) -> np.ndarray:
    """Continues every row of `input_ids` by at most `max_new_tokens` tokens.

    input_ids: int [B, T], or [T] for one row.
    attention_mask: the ids' shape, 0 for left pads and 1 for tokens; None where there are no pads.
    temperature: 0 is greedy.   top_k, top_p, min_p: as in transformers, see `sampling`.
    seed: 0 to 2**64 - 1; a row's draws depend on it, on the row's index and on the step alone.
    stop: the token sequence, or several, that ends a row.
    eos_token_id: the id or ids that end a row; None takes the config's, () none.
    on_token: called with each step's tokens, int32 [B], in order. Steps run on the device up to
      CHUNK at a time, about STREAM_SECONDS of them.
    cache_dtype: float16, bfloat16, float32 or float8_e4m3fn for keys and values; None takes the
      model's dtype.

    Returns int32 [B, N], N <= max_new_tokens: the new tokens up to where the last row ended. A row
    includes the end token or stop sequence that ended it and then holds the config's pad_token_id
    (0 if it has none); `on_token` sees the same.
    Raises ValueError, before any work, for arguments that cannot be served, and where logits are
    NaN.
    """
    check_process("generate")
    config = model.config
    ids, mask = _check_prompt(config, input_ids, attention_mask, max_new_tokens)
    sampling = Sampling.create(temperature, top_k, top_p, min_p)
    _check_seed(seed)
    ends = _check_ends(config, stop, eos_token_id)
    pad = 0 if config.pad_token_id is None else config.pad_token_id

    B, T = ids.shape
    bucket = _bucket(T, least=16)
    left = ((0, 0), (bucket - T, 0))
    ids, mask = np.pad(ids, left, constant_values=pad), np.pad(mask, left)
    if model.layout is not None:
        model.layout.check_rows(B, "generate")
    what = f"{B} rows of {T + max_new_tokens} tokens"
    fewer = "pass fewer rows, ask for fewer tokens, or take cache_dtype=jnp.float8_e4m3fn"
    with model_mesh(model.layout), room("generate", what, fewer):
        slots = _bucket(bucket + max_new_tokens - 1, least=64, steps=8)
        programs, weights = programs_of(model, cache_dtype)
        if model.layout is None:
            item = programs.cache_dtype.itemsize
            memory.check_fits(
                f"generate: {B} rows of {slots} tokens",
                memory.estimate(config, 0, B, slots, bucket, item),
                memory.free_bytes(),
                fewer,
            )
        end_table = _table(ends)
        draws = None if sampling is None else row_uniforms(seed, B, max_new_tokens).T
        first = None if draws is None else draws[0]

        output = _Output(B, max_new_tokens, pad, ends, on_token)
        with ThreadPoolExecutor(1) as thread:
            compiling = None
            if max_new_tokens > 1:
                compiling = programs.compile(thread, weights, ids, mask, end_table, sampling, slots)
            state = programs.prefill(weights, ids, mask, end_table, sampling, first, slots)
            output.add(state.recent[:, -1])  # shown while the decode program may still be compiling
            if compiling is not None:
                compiling.result()
        pace = _Pace(on_token is not None, model.layout is not None)
        asked, ahead = 1, None
        while asked < max_new_tokens and not output.ended:
            steps = min(pace.steps, max_new_tokens - asked)
            uniforms = None if draws is None else _rows(draws, asked, steps)
            state, *chunk = programs.decode(weights, state, end_table, sampling, uniforms, steps)
            asked += steps
            if ahead is not None:
                pace.done(output.add_chunk(*ahead))
            ahead = chunk
        if ahead is not None:
            output.add_chunk(*ahead)
    return output.tokens[:, : output.length]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Between two steps: what the device keeps."""

    cache: KVCache
    recent: jax.Array  # int32 [B, L], the newest tokens, as many as the longest end has
    open: jax.Array  # bool [B], rows that have not ended


def _table(ends: list[np.ndarray]) -> np.ndarray:
    """All ends as int32 [E, L], the shorter ones filled up with _ANY in front."""
    length = max((len(end) for end in ends), default=1)
    table = np.full((len(ends), length), _ANY, np.int32)
    for row, end in zip(table, ends, strict=True):
        row[length - len(end) :] = end
    return table


def _rows(draws: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` rows from `start` on, as [CHUNK, B]."""
    rows = np.zeros((CHUNK, draws.shape[1]), np.float32)
    rows[:count] = draws[start : start + count]
    return rows


class Programs:
    """A model's two programs. Weights are a flat list of arrays, which dispatches fastest."""

    def __init__(
        self,
        graphdef: Any,
        treedef: Any,
        config: OPTConfig,
        cache_dtype: Any,
        layout: Layout | None,
    ):
        self.config, self.cache_dtype, self.layout = config, cache_dtype, layout
        self._compiled: set[tuple] = set()

        def step(weights, ids, mask, state, ends, sampling, uniform, empty=False):
            model = nnx.merge(graphdef, jax.tree.unflatten(treedef, weights))
            logits, cache = model(ids, mask, state.cache, last_only=True, empty=empty)
            logits = logits[:, 0]
            damaged = jnp.isnan(logits).any(axis=1)
            token = jnp.where(damaged, NAN_LOGITS, sample(logits, sampling, uniform))
            if layout is not None:  # every process reads every row
                token = lax.with_sharding_constraint(token, layout.sharding())
            recent = jnp.concatenate([state.recent[:, 1:], token[:, None]], axis=1)
            is_end = (ends == recent[:, None]) | (ends == _ANY)  # [B, E, L]
            return State(cache, recent, state.open & ~is_end.all(axis=2).any(axis=1))

        @functools.partial(jax.jit, static_argnames="slots")
        def prefill(weights, ids, mask, ends, sampling, uniform, slots):
            state = self.start(len(ids), slots, ends.shape[1])
            return step(weights, ids, mask, state, ends, sampling, uniform, empty=True)

        @functools.partial(jax.jit, donate_argnames="state")
        def decode(weights, state, ends, sampling, uniforms, steps):
            """uniforms: [CHUNK, B].   Returns state, int32 [CHUNK, B] and how many are steps."""

            def go_on(carry):
                i, state, _ = carry
                return (i < steps) & state.open.any()

            def one(carry):
                i, state, tokens = carry
                uniform = None if uniforms is None else uniforms[i]
                last = state.recent[:, -1:]
                state = step(weights, last, None, state, ends, sampling, uniform)
                return (
                    i + 1,
                    state,
                    lax.dynamic_update_slice(tokens, state.recent[:, -1][None], (i, 0)),
                )

            tokens = jnp.zeros((CHUNK, len(state.recent)), jnp.int32)
            count, state, tokens = lax.while_loop(go_on, one, (jnp.int32(0), state, tokens))
            return state, tokens, count

        self.prefill, self.decode = prefill, decode

    def start(self, rows: int, slots: int, recent: int) -> State:
        """With an empty cache, and no token yet."""
        cache = KVCache.create(self.config, rows, slots, self.cache_dtype)
        return State(cache, jnp.full((rows, recent), NAN_LOGITS, jnp.int32), jnp.ones(rows, bool))

    def compile(self, thread: ThreadPoolExecutor, weights, ids, mask, ends, sampling, slots):
        """Starts compiling decode for these shapes in `thread`; None when that was done before.

        jit's cache is filled as if by a call, and the call finds it there.
        """
        shapes = tuple((w.shape, w.dtype) for w in weights)
        key = shapes, ids.shape, slots, ends.shape, jax.tree.structure(sampling)
        if key in self._compiled:
            return None
        self._compiled.add(key)
        uniform = None if sampling is None else np.zeros(len(ids), np.float32)
        # Traced before the thread starts: both hold Python's lock, and prefill is wanted first.
        self.prefill.lower(weights, ids, mask, ends, sampling, uniform, slots)

        def lower_and_compile():
            with model_mesh(self.layout):  # a thread starts without
                self.lower_decode(weights, len(ids), slots, ends, sampling).compile()

        return thread.submit(lower_and_compile)

    def lower_decode(self, weights, rows: int, slots: int, ends, sampling):
        """decode for such arguments, lowered."""
        state = jax.eval_shape(lambda: self.start(rows, slots, ends.shape[1]))
        uniforms = None
        if sampling is not None:
            uniforms = jax.ShapeDtypeStruct((CHUNK, rows), np.float32)
        if self.layout is not None:
            placed = self.layout.placed
            state = State(placed(state.cache), placed(state.recent), placed(state.open))
        return self.decode.lower(weights, state, ends, sampling, uniforms, 1)


# Keyed by structure, not by model: a model whose weights moved on keeps its compiled programs.
_programs = functools.lru_cache(maxsize=8)(Programs)


def programs_of(model: OPT, cache_dtype: Any = None) -> tuple[Programs, list[jax.Array]]:
    """A model's programs, and the weights to pass to them."""
    dtype = _check_cache_dtype(model.dtype if cache_dtype is None else cache_dtype)
    graphdef, state = nnx.split(model)
    weights, treedef = jax.tree.flatten(state)
    return _programs(graphdef, treedef, model.config, dtype, model.layout), weights


class _Output:
    """Collects tokens and knows which rows have ended."""

    def __init__(self, rows: int, most: int, pad: int, ends: list[np.ndarray], on_token):
        self.tokens = np.full((rows, most), pad, np.int32)
        self.length = 0
        self.ends, self.on_token = ends, on_token
        self.open = np.ones(rows, bool)

    @property
    def ended(self) -> bool:
        return not self.open.any()

    def add_chunk(self, tokens: jax.Array, count: jax.Array) -> int:
        """Appends the first `count` rows of tokens [CHUNK, B]; returns how many those are."""
        steps = int(count)
        for token in np.asarray(tokens)[:steps]:
            if self.ended:
                break
            self.add(token)
        return steps

    def add(self, token: jax.Array | np.ndarray) -> None:
        """Appends the step's tokens [B] to the rows still open; waits for the device."""
        column = self.tokens[:, self.length]
        drawn = np.asarray(token)
        if (drawn[self.open] == NAN_LOGITS).any():
            raise ValueError(
                f"generate: the logits of step {self.length} are NaN; the checkpoint holds NaN or "
                "Inf, or overflows in the model's dtype: look at its weights, or try float32."
            )
        column[self.open] = drawn[self.open]
        self.length += 1
        for end in self.ends:
            if len(end) <= self.length:
                tail = self.tokens[:, self.length - len(end) : self.length]
                self.open &= ~(tail == end).all(axis=1)
        if self.on_token is not None:
            self.on_token(column.copy())


class _Pace:
    """How many steps to ask for at a time.

    watched: somebody waits for every token.   shared: other processes must ask for the same.
    """

    def __init__(self, watched: bool, shared: bool):
        self.steps = CHUNK if not watched else CHUNK // 4 if shared else 1
        self.adapts = watched and not shared
        self.since: float | None = None

    def done(self, steps: int) -> None:
        """So many steps have ended since the last call."""
        now = time.perf_counter()
        if self.adapts and self.since is not None and steps:
            each = max((now - self.since) / steps, 1e-6)
            self.steps = max(1, min(CHUNK, round(STREAM_SECONDS / each)))
        self.since = now


def _bucket(n: int, least: int, steps: int = 1) -> int:
    """n rounded up to one of `steps` sizes per doubling, and to at least `least`."""
    doubling = 1 << max(n - 1, 1).bit_length()
    step = max(least, doubling // 2 // steps)
    return -(-n // step) * step


def _check_prompt(
    config: OPTConfig, input_ids: Any, attention_mask: Any, max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask, int32 [B, T], without columns that are pads in every row."""
    try:
        ids = np.asarray(input_ids)
    except ValueError as error:
        raise ValueError(
            "generate: rows of input_ids differ in length; pad the shorter ones on the left and "
            "pass an attention_mask with zeros there."
        ) from error
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim == 2 and ids.size == 0:
        raise ValueError(
            f"generate: the prompt is empty (input_ids is {ids.shape}); pass one token at least, "
            f"such as bos_token_id {config.bos_token_id}."
        )
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"generate: input_ids is {ids.dtype} {ids.shape}; pass integers of shape [B, T]."
        )
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, (int, np.integer)):
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens!r}; pass an integer.")
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}; ask for 1 at least.")

    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise ValueError(
            f"generate: attention_mask is {mask.shape} but input_ids is {ids.shape}; pass a mask "
            "of the ids' own shape."
        )
    if not np.isin(mask, (0, 1)).all():
        raise ValueError("generate: attention_mask holds other values than 0 (pad) and 1 (token).")
    mask = mask.astype(np.int32)
    bad = np.flatnonzero((np.diff(mask, axis=1) < 0).any(axis=1) | (mask[:, -1] == 0))
    if bad.size:
        row = int(bad[0])
        kind = "has no token" if not mask[row].any() else "has pads after tokens"
        raise ValueError(
            f"generate: row {row} of attention_mask {kind}; pad on the left: zeros first, then "
            "ones, the last column all ones."
        )
    wrong = (mask == 1) & ((ids < 0) | (ids >= config.vocab_size))
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"generate: input_ids[{row}, {column}] is {ids[row, column]}, outside the vocabulary "
            f"of {config.vocab_size}; use the tokenizer that came with the model."
        )
    longest = int(mask.sum(axis=1).max())
    if longest + max_new_tokens > config.max_position_embeddings:
        room = config.max_position_embeddings - longest
        advice = f"ask for {room} new tokens at most" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"generate: {longest} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"context of {config.max_position_embeddings}; {advice}."
        )
    ids, mask = ids[:, -longest:], mask[:, -longest:]
    return np.where(mask == 1, ids, 0).astype(np.int32), mask


def _check_seed(seed: int) -> None:
    integer = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    if not integer or not 0 <= seed < 2**64:
        raise ValueError(f"generate: seed is {seed!r}; pass an integer from 0 to 2**64 - 1.")


def _check_cache_dtype(dtype: Any) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in DTYPES:
        raise ValueError(
            f"generate: cache_dtype is {found or repr(dtype)}; choose float16, bfloat16, float32 "
            "or float8_e4m3fn."
        )
    return found


def _check_ends(config: OPTConfig, stop: Any, eos_token_id: Any) -> list[np.ndarray]:
    """All token sequences that end a row."""
    eos = np.asarray(config.eos_token_ids if eos_token_id is None else eos_token_id)
    if eos.size and (eos.ndim > 1 or not np.issubdtype(eos.dtype, np.integer)):
        raise ValueError(
            f"generate: eos_token_id is {eos_token_id!r}; pass a token id, several, or () for none."
        )
    ends = [[int(token)] for token in eos.reshape(-1)]
    for (token,) in ends if eos_token_id is not None else ():
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"generate: eos_token_id holds {token}, outside the vocabulary of "
                f"{config.vocab_size}; pass () to end at no token."
            )
    if stop is not None and not hasattr(stop, "__iter__"):
        raise ValueError(f"generate: stop is {stop!r}; pass a list of token ids, or of such lists.")
    sequences = [] if stop is None else list(stop)
    if sequences and all(isinstance(token, (int, np.integer)) for token in sequences):
        sequences = [sequences]
    for sequence in sequences:
        array = np.asarray(sequence)
        if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"generate: stop sequence {sequence!r} is not a list of token ids; encode text "
                "with the tokenizer first."
            )
        if array.min() < 0 or array.max() >= config.vocab_size:
            raise ValueError(
                f"generate: stop sequence {sequence!r} leaves the vocabulary of "
                f"{config.vocab_size}; it could never match."
            )
        ends.append(list(array))
    return [np.asarray(end, np.int32) for end in ends]
