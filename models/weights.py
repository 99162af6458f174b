"""A checkpoint's tensors become a model's parts, one tensor at a time.

`OPT` asks a maker for its parts by name. `Declared` only writes the names down, so that what is
missing, extra or of another shape is told before anything is read; `Loader` reads.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from jax_flashllm.formats import (
    FORMATS,
    Format,
    SparseWeight,
    bitmap_of_packed,
    encode,
    encode_on_host,
    smaller_format,
)
from jax_flashllm.formats.layout import place
from jax_flashllm.formats.weight import room
from jax_flashllm.models import checkpoint, memory
from jax_flashllm.models.config import OPTConfig
from jax_flashllm.models.mesh import Layout, model_mesh
from jax_flashllm.models.opt import LAYER_NORM_EPSILON, OPT, Implementation
from jax_flashllm.nn import SparseDense

# 16-bit tables up to this size are widened for float32 activations, which saves the demo model 0.2
# ms a token. Larger ones are widened in use (opt.WIDEN_AT_ONCE).
WIDEN_TABLE_BYTES = 4 << 20
_SMALLER = "prune it further, or load it over several devices with mesh="

_FLOATS = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32))
# Where the decoder lies: OPTForCausalLM's files, OPTModel's, and bare decoders.
_PREFIXES = ("model.decoder.", "decoder.", "")


def load(
    path: str | os.PathLike,
    dtype: Any,
    attention_implementation: Implementation,
    mesh: Mesh | None = None,
    tensor: str = "tp",
    data: str = "dp",
    format: Format = "auto",
) -> OPT:
    """See `opt.load`."""
    if format not in FORMATS:
        raise ValueError(f"opt.load: format must be auto, bitmap or delta_csr, got {format!r}")
    with checkpoint.open_checkpoint(path) as ckpt:
        names, config = verify(ckpt)
        try:
            cast = None if dtype is None else jnp.dtype(dtype)
        except TypeError:
            cast = dtype
        if cast is not None and cast not in _FLOATS:
            raise ValueError(
                f"opt.load: dtype is {cast}; choose float16, bfloat16, float32 or None."
            )
        compute = cast
        if compute is None:
            on_cpu = jax.default_backend() == "cpu"
            compute = jnp.dtype(jnp.float32) if on_cpu else names.dtype("embed_tokens.weight")
        if mesh is None:
            _check_fits(names, config, cast or compute)
        layout = None if mesh is None else Layout.create(mesh, config, tensor, data)
        cast = cast if cast != np.float32 else None
        loader = Loader(names, config, compute, cast, layout, format)
        # Shown on a terminal, once a second has passed.
        progress = tqdm(
            total=len(names.stored),
            desc="load",
            unit=" tensors",
            delay=1,
            leave=False,
            disable=None,
        )
        with progress as bar, model_mesh(layout), room("opt.load", str(ckpt.path), _SMALLER):
            loader.on_read = bar.update
            model = OPT(
                config,
                make=loader,
                dtype=compute,
                attention_implementation=attention_implementation,
                layout=layout,
            )
            jax.block_until_ready(model)
            return model


def _check_fits(names: _Names, config: OPTConfig, compute: np.dtype) -> None:
    """Raises ValueError where the weights cannot fit. What is stored dense counts as empty."""
    need = 0
    for name, stored in names.stored.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # the embedding once more
        dtype = names.dtype(name)
        dtype = min(dtype, compute, key=lambda d: np.dtype(d).itemsize)
        nonzeros = names.ckpt.nnz(stored) or 0
        need += memory.held_bytes(stored, names.shape(name), dtype, names.is_sparse(name), nonzeros)
    memory.check_fits(
        f"opt.load: {names.ckpt.path}",
        memory.Estimate(need, 0, 0),
        memory.free_bytes(),
        _SMALLER,
    )


def verify(ckpt: checkpoint.Checkpoint) -> tuple[_Names, OPTConfig]:
    """Its tensors and its config, when every tensor that the config asks for is there, so shaped.

    Raises CheckpointError naming the first that is not. Reads no weights.
    """
    try:
        config = OPTConfig.from_dict(ckpt.config)
    except ValueError as e:
        raise checkpoint.CheckpointError(ckpt.path, "config.json", str(e)) from e
    names = _Names(ckpt)
    declared = Declared(config)
    # One layer more than there are is enough to find one missing: 4096 would take seconds.
    layers = min(config.num_hidden_layers, len(names.stored) + 1)
    OPT(dataclasses.replace(config, num_hidden_layers=layers), make=declared)
    names.check(declared.shapes, config)
    return names, config


def tensors(model: OPT) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of a model, as a Hugging Face checkpoint names and lays it out.

    The inverse of `load`: sparse layers come out dense, in the dtypes that the model holds.
    """

    parts = 1 if model.layout is None else model.layout.parts

    def linear(layer: Any, *names: str) -> Iterator[tuple[str, np.ndarray]]:
        dense = isinstance(layer, nnx.Linear)
        w = np.asarray(layer.kernel[...]).T if dense else layer.weight.to_dense()
        w = _swap_outer(w, parts, len(names))
        bias = layer.bias
        if bias is not None:
            bias = _swap_outer(np.asarray(bias[...]), parts, len(names))
        for i, name in enumerate(names):
            rows = slice(i * len(w) // len(names), (i + 1) * len(w) // len(names))
            yield f"{name}.weight", w[rows]
            if bias is not None:
                yield f"{name}.bias", bias[rows]

    def norm(layer: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
        for kind, value in (("weight", layer.scale), ("bias", layer.bias)):
            if value is not None:
                yield f"{name}.{kind}", np.asarray(value[...])

    root = _PREFIXES[0]
    for name in ("embed_tokens", "embed_positions"):
        yield f"{root}{name}.weight", np.asarray(getattr(model, name).embedding[...])
    for name in ("project_in", "project_out"):
        if getattr(model, name) is not None:
            yield from linear(getattr(model, name), root + name)
    for i, layer in enumerate(model.layers):
        here = f"{root}layers.{i}."
        attention = layer.self_attn
        yield from linear(attention.qkv_proj, *(f"{here}self_attn.{x}_proj" for x in "qkv"))
        yield from linear(attention.out_proj, f"{here}self_attn.out_proj")
        for name in ("fc1", "fc2"):
            yield from linear(getattr(layer, name), here + name)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            yield from norm(getattr(layer, name), here + name)
    if model.final_layer_norm is not None:
        yield from norm(model.final_layer_norm, f"{root}final_layer_norm")
    if model.lm_head is not None:
        yield from linear(model.lm_head, "lm_head")


class _Names:
    """A checkpoint seen by the decoder's own names, whatever stands before them in the file."""

    def __init__(self, ckpt: checkpoint.Checkpoint):
        self.ckpt = ckpt
        stored = set(ckpt.names())
        embed = "embed_tokens.weight"
        prefix = next((p for p in _PREFIXES if p + embed in stored), None)
        if prefix is None:
            held = ", ".join(map(checkpoint.quote, sorted(stored)[:3]))
            self._fail(
                _PREFIXES[0] + embed, f"is missing; is it an OPT checkpoint? It holds {held}"
            )
        self.prefix = prefix
        self.stored: dict[str, str] = {}
        # metaseq's exports carry a version number beside the weights
        for name in sorted(stored - {prefix + "version"}):
            own = name.removeprefix(prefix)
            if own in self.stored:
                self._fail(name, f"is {self.stored[own]!r} once more; remove one of them")
            self.stored[own] = name

    def _fail(self, name: str, problem: str) -> NoReturn:
        raise checkpoint.CheckpointError(
            self.ckpt.path, f"tensor {checkpoint.quote(name)}", problem
        )

    def check(self, shapes: dict[str, tuple[int, ...]], config: OPTConfig) -> None:
        """Raises CheckpointError unless exactly the tensors of `shapes` are stored, so shaped."""
        missing = [name for name in shapes if name not in self.stored]
        extra = [name for name in self.stored if name not in shapes]
        if "lm_head.weight" in extra and config.tie_word_embeddings:
            extra.remove("lm_head.weight")
            self._check_tied()
        if missing:
            name = missing[0]
            self._fail(
                self.prefix + name,
                f"{list(shapes[name])} is missing{_more(missing)}; config.json asks for it: fetch "
                "both files again",
            )
        if extra:
            self._fail(
                self.stored[extra[0]],
                f"is not part of the model that config.json describes{_more(extra)}; fetch both "
                "files again",
            )
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                self._fail(
                    self.stored[name],
                    f"is {list(self.shape(name))} but config.json makes it {list(shape)}; fetch "
                    "both files again",
                )
            if self.dtype(name) not in _FLOATS:
                self._fail(
                    self.stored[name],
                    f"is {self.dtype(name)}; float16, bfloat16 and float32 are supported: convert "
                    "the checkpoint",
                )

    def _check_tied(self) -> None:
        """A tied head is the embedding; many files store it a second time."""
        head, table = "lm_head.weight", "embed_tokens.weight"
        same = self.shape(head) == self.shape(table) and self.dtype(head) == self.dtype(table)
        # Bytes, so that NaN equals itself.
        if not same or self.read(head).tobytes() != self.read(table).tobytes():
            self._fail(
                self.stored[head],
                f"differs from {self.stored[table]!r}, but config.json ties them; set "
                "tie_word_embeddings to false there to use both",
            )

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.ckpt.shape(self.stored[name]))

    def dtype(self, name: str) -> np.dtype:
        return self.ckpt.dtype(self.stored[name])

    def is_sparse(self, name: str) -> bool:
        return self.ckpt.is_sparse(self.stored[name])

    def nnz(self, name: str) -> int:
        """Stored values of a tensor for which `is_sparse` is true."""
        return self.ckpt.nnz(self.stored[name]) or 0

    def packed(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.ckpt.packed(self.stored[name])

    def read(self, name: str) -> np.ndarray:
        return self.ckpt.read(self.stored[name])


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


class Declared:
    """A maker that makes nothing and keeps every tensor's name and shape, [out, in] as stored."""

    def __init__(self, config: OPTConfig):
        self.affine = config.layer_norm_elementwise_affine
        self.shapes: dict[str, tuple[int, ...]] = {}

    def linear(self, names: list[str], in_features: int, out_features: int, bias: bool) -> None:
        for name in names:
            self.shapes[f"{name}.weight"] = (out_features // len(names), in_features)
            if bias:
                self.shapes[f"{name}.bias"] = (out_features // len(names),)

    def embed(self, name: str, rows: int, features: int) -> None:
        self.shapes[f"{name}.weight"] = (rows, features)

    def norm(self, name: str, features: int) -> None:
        if self.affine:
            self.shapes[f"{name}.weight"] = self.shapes[f"{name}.bias"] = (features,)


class _NoKeys:
    """Stands in for nnx.Rngs where nothing is drawn: making a key compiles a program."""

    def params(self) -> None:
        return None


_NO_KEYS: Any = _NoKeys()


class Loader:
    """A maker that reads.

    compute: dtype of activations.   cast: the 16-bit dtype to cast weights to, None for none.
    layout: where each part goes; None is JAX's default device.   format: of sparse matrices.
    """

    def __init__(
        self,
        names: _Names,
        config: OPTConfig,
        compute: np.dtype,
        cast: np.dtype | None,
        layout: Layout | None = None,
        format: Format = "auto",
    ):
        self.names, self.compute, self.cast, self.layout = names, compute, cast, layout
        self.format: Format = format
        self.parts = 1 if layout is None else layout.parts
        self.affine = config.layer_norm_elementwise_affine
        self.on_read: Callable[[], Any] = lambda: None  # a tensor

    def linear(self, names: list[str], in_features: int, out_features: int, bias: bool):
        rows, columns = self._split(names[0])
        b = self._vector([f"{name}.bias" for name in names], rows) if bias else None
        if (w := self._packed([f"{name}.weight" for name in names])) is not None:
            return SparseDense.from_encoded(w, bias=b, dtype=self.compute)
        kernel = self._read([f"{name}.weight" for name in names])
        kernel = _swap_outer(kernel, len(names), self.parts)
        stored_sparse = all(self.names.is_sparse(f"{name}.weight") for name in names)
        # XLA's CPU backend widens all of a bfloat16 operand first, whatever part is used: ten times
        # slower than float16. The sparse kernel reads it as it is, so full matrices go there too.
        wide_bf16 = kernel.dtype == ml_dtypes.bfloat16 and self.compute == np.float32
        if stored_sparse or wide_bf16 or _share_of_zeros(kernel) >= memory.SPARSE_FROM:
            half = _to_half(kernel)
            if half is not None:
                # weight * mask, the usual way to prune, leaves -0.0 behind, which `encode` keeps.
                bits = half.view(np.uint16)
                bits *= bits != 0x8000
                w = self._encoded(half, rows, columns)
                variable = None if b is None else nnx.Param(b, **self._metadata(rows))
                return SparseDense.from_encoded(w, bias=variable, dtype=self.compute)
        kernel = self._put(kernel.T, columns, rows)
        return nnx.Linear(
            in_features,
            out_features,
            use_bias=bias,
            kernel_init=lambda *_: kernel,
            bias_init=lambda *_: b,
            dtype=self.compute,
            param_dtype=kernel.dtype,
            kernel_metadata=self._metadata(columns, rows),
            bias_metadata=self._metadata(rows),
            rngs=_NO_KEYS,
        )

    def embed(self, name: str, rows: int, features: int):
        table = self._read([f"{name}.weight"])
        if table.dtype.itemsize < self.compute.itemsize and table.nbytes <= WIDEN_TABLE_BYTES:
            table = table.astype(self.compute)
        split, _ = self._split(name)
        table = self._put(table, split)
        return nnx.Embed(
            rows,
            features,
            embedding_init=lambda *_: table,
            dtype=self.compute,
            param_dtype=table.dtype,
            embedding_metadata=self._metadata(split),
            rngs=_NO_KEYS,
        )

    def norm(self, name: str, features: int):
        scale = self._vector([f"{name}.weight"]) if self.affine else None
        bias = self._vector([f"{name}.bias"]) if self.affine else None
        return nnx.LayerNorm(
            features,
            epsilon=LAYER_NORM_EPSILON,
            use_bias=self.affine,
            use_scale=self.affine,
            scale_init=lambda *_: scale,
            bias_init=lambda *_: bias,
            use_fast_variance=False,
            dtype=self.compute,
            rngs=_NO_KEYS,
        )

    def _split(self, name: str) -> tuple[str | None, str | None]:
        """The mesh axes over the rows and over the columns of a stored matrix."""
        part = name.rpartition(".")[2]
        if self.layout is None:
            return None, None
        if part in ("out_proj", "fc2"):
            return None, self.layout.tensor
        vocabulary = part in ("embed_tokens", "lm_head") and self.layout.splits_vocabulary
        return (self.layout.tensor if part in ("q_proj", "fc1") or vocabulary else None), None

    def _put(self, array: np.ndarray, *spec: str | None) -> jax.Array:
        if self.layout is None:
            return jax.device_put(array)  # unlike jnp.asarray, it compiles nothing
        return self.layout.put(array, *spec)

    def _metadata(self, *spec: str | None) -> dict[str, Any]:
        return {} if self.layout is None else self.layout.metadata(*spec)

    def _packed(self, names: list[str]) -> SparseWeight | None:
        """The matrices of `names`, one below the other, from what is stored, never dense.

        None where they are stored dense, in other dtypes, split over devices, or Delta-CSR is asked
        for or smaller.
        """
        dtype = self.names.dtype(names[0])
        plain = dtype.itemsize == 2 and self.cast in (None, dtype) and self.layout is None
        if not plain or any(self.names.dtype(name) != dtype for name in names):
            return None
        if not all(map(self.names.is_sparse, names)):
            return None
        size = sum(math.prod(self.names.shape(name)) for name in names)
        columns = self.names.shape(names[0])[1]
        format = self.format
        if format == "auto":
            format = smaller_format(sum(map(self.names.nnz, names)) / size, columns)
        if format != "bitmap":
            return None
        parts = []
        for name in names:
            parts.append(self.names.packed(name))
            self.on_read()
        return jax.device_put(bitmap_of_packed(parts, columns))

    def _encoded(self, dense: np.ndarray, rows: str | None, columns: str | None) -> SparseWeight:
        if self.layout is None:
            return encode(dense, self.format)
        grid = self.parts if rows else 1, self.parts if columns else 1
        encoded = encode_on_host(dense, self.format, grid)
        return place(encoded, self.layout.sharding(columns or rows))

    def _vector(self, names: list[str], split: str | None = None) -> jax.Array:
        """Biases and scales: small, so held in the dtype they are used in where that is wider."""
        vector = self._read(names)
        wider = vector.dtype.itemsize < self.compute.itemsize
        vector = _swap_outer(vector, len(names), self.parts)
        return self._put(vector.astype(self.compute) if wider else vector, split)

    def _read(self, names: list[str]) -> np.ndarray:
        parts = [self._read_one(name) for name in names]
        # q, k and v of different dtypes meet in one that holds them all.
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_one(self, name: str) -> np.ndarray:
        stored = self.names.read(name)
        self.on_read()
        if self.cast is None or stored.dtype == self.cast:
            return stored
        with np.errstate(over="ignore"):
            cast = stored.astype(self.cast)
        lost = np.isinf(cast) & np.isfinite(stored)
        if lost.any():
            raise ValueError(
                f"opt.load: tensor {self.names.stored[name]!r} holds {stored[lost][0]}, past the "
                f"range of {self.cast}; load with dtype=jnp.bfloat16 or jnp.float32."
            )
        return cast


def _swap_outer(array: np.ndarray, a: int, b: int) -> np.ndarray:
    """Rows (a, b, ...) as (b, a, ...): from all of q, all of k ... to each device's, or back."""
    if a == 1 or b == 1:
        return array
    parts = array.reshape(a, b, -1, *array.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(0, 1)).reshape(array.shape)


def _magnitude_bits(kernel: np.ndarray) -> np.ndarray:
    """The bits below the sign: all zero for 0.0 and for -0.0."""
    bits = kernel.view(f"u{kernel.dtype.itemsize}")
    return bits & (np.iinfo(bits.dtype).max >> 1)


def _share_of_zeros(kernel: np.ndarray) -> float:
    return 1 - np.count_nonzero(_magnitude_bits(kernel)) / kernel.size


def _to_half(kernel: np.ndarray) -> np.ndarray | None:
    """`kernel` in 16 bits, the same values to the last bit; None if neither dtype holds them."""
    if kernel.dtype.itemsize == 2:
        return kernel
    for dtype in (np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            half = kernel.astype(dtype)
        if np.array_equal(half.astype(kernel.dtype).view(np.uint32), kernel.view(np.uint32)):
            return half
    return None
