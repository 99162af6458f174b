"""flax_model.msgpack: nested maps whose leaves are arrays (flax.serialization's layout).

    {"model": {"decoder": {"layers": {"0": {"fc1": {"kernel": ext(1, array), "bias": ...
    array = msgpack [[d0, d1], "float16", bin]
    arrays over 1 GiB: {"__msgpack_chunked_array__": true, "shape": {"0": d0, ...},
                        "chunks": {"0": array, "1": array, ...}}   (flat pieces)

`flax.serialization.msgpack_restore` holds the file, every payload and every array at once. This
scanner walks over the tokens and notes where the payloads lie; nothing else is read.

Flax names and layouts become those of the torch files: kernel [in, out] to weight [out, in],
embedding and scale to weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .base import DTYPES, MAX_TENSORS, Dense, File, Tensor, check_shape, quote, transpose

MAX_DEPTH = 24
MAX_KEY = 256

_BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


@dataclass(frozen=True, slots=True)
class Chunked:
    """An array stored as flat pieces, [in, out] if `transposed`."""

    field: str
    pieces: tuple[Dense, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    transposed: bool = False

    @property
    def stored_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        out, at = np.empty(math.prod(self.shape), self.dtype), 0
        for piece in self.pieces:
            count = piece.shape[0]
            out[at : at + count] = piece.read()
            at += count
        if self.transposed:
            return transpose(out.reshape(self.shape[::-1]))
        return out.reshape(self.shape)


class _Scanner:
    """A cursor over msgpack tokens; reads small windows, seeks over payloads."""

    def __init__(self, file: File):
        self.file, self.at, self.nodes = file, 0, 0
        self._window, self._start = bytearray(), 0

    def take(self, count: int, field: str) -> bytearray:
        i = self.at - self._start
        if i < 0 or i + count > len(self._window):
            self.file.check(self.at, count, field)
            size = min(max(count, 4096), self.file.size - self.at)
            self._window, self._start, i = self.file.read(self.at, size, field), self.at, 0
        self.at += count
        return self._window[i : i + count]

    def number(self, count: int, field: str) -> int:
        return int.from_bytes(self.take(count, field), "big")

    def sized(self, field: str, tag: int, fix: tuple[int, int], wide: dict[int, int]) -> int | None:
        """The length behind `tag` if it is of this family: fix = (base, count), or None."""
        base, count = fix
        if base <= tag < base + count:
            return tag - base
        return self.number(wide[tag], field) if tag in wide else None

    def node(self, field: str, depth: int = 0):
        """One value: dict, Dense (an array, unnamed), int or bool. The rest is refused."""
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > 2 * MAX_TENSORS:
            self.file.fail(
                field,
                f"more than {MAX_DEPTH} levels or {2 * MAX_TENSORS} values; "
                "this is no Flax checkpoint",
            )
        tag = self.take(1, field)[0]
        count = self.sized(field, tag, (0x80, 16), {0xDE: 2, 0xDF: 4})
        if count is not None:
            return self._map(field, count, depth)
        if tag in (0xC7, 0xC8, 0xC9) or 0xD4 <= tag <= 0xD8:
            size = self.sized(field, tag, (0, 0), {0xC7: 1, 0xC8: 2, 0xC9: 4})
            size = 1 << (tag - 0xD4) if size is None else size
            if (kind := self.take(1, field)[0]) != 1:
                self.file.fail(field, f"msgpack extension {kind} is not an array (1)")
            self.file.check(self.at, size, field)
            return self._array(field, self.at + size)
        if tag in (0xC2, 0xC3):
            return tag == 0xC3
        if tag < 0x80 or tag in (0xCC, 0xCD, 0xCE, 0xCF):
            return tag if tag < 0x80 else self.number(1 << (tag - 0xCC), field)
        self.file.fail(
            field,
            f"msgpack type 0x{tag:02x} has no place in a Flax checkpoint; fetch the file again",
        )

    def _map(self, field: str, count: int, depth: int) -> dict:
        # Each entry takes two bytes or more.
        self.file.check(self.at, 2 * count, field)
        out = {}
        for _ in range(count):
            key = self._text(field)
            if key in out:
                self.file.fail(field, f"the key {quote(key)} appears twice; make the file again")
            path = f"{field}/{key}" if field != "root" else key
            if len(path) > MAX_KEY:
                self.file.fail(quote(path), f"names over {MAX_KEY} characters are refused")
            out[key] = self.node(path, depth + 1)
        return out

    def _text(self, field: str, what: str = "key") -> str:
        tag = self.take(1, field)[0]
        size = self.sized(field, tag, (0xA0, 32), {0xD9: 1, 0xC4: 1})
        if size is None or size > MAX_KEY:
            self.file.fail(field, f"a {what} is not a string of at most {MAX_KEY} bytes")
        try:
            return self.take(size, field).decode()
        except UnicodeDecodeError:
            self.file.fail(field, f"a {what} is not UTF-8; fetch the file again")

    def _array(self, field: str, end: int) -> Dense:
        field = f"tensor {quote(field)}"
        if self.take(1, field) != b"\x93":
            self.file.fail(field, "is not [shape, dtype, bytes]; fetch the file again")
        tag = self.take(1, field)[0]
        if not 0x90 <= tag < 0xA0:
            self.file.fail(field, "shape is not a short array; fetch the file again")
        dims = []
        for _ in range(tag - 0x90):
            tag = self.take(1, field)[0]
            if tag >= 0x80 and tag not in (0xCC, 0xCD, 0xCE, 0xCF):
                self.file.fail(field, "a dimension is not an unsigned integer")
            dims.append(tag if tag < 0x80 else self.number(1 << (tag - 0xCC), field))
        dtype = _BY_NAME.get(name := self._text(field, "dtype"))
        if dtype is None:
            self.file.fail(field, f"dtype {quote(name)} is not one of {', '.join(_BY_NAME)}")
        shape, expected = check_shape(self.file, field, dims, dtype.itemsize)
        tag = self.take(1, field)[0]
        size = self.sized(field, tag, (0, 0), {0xC4: 1, 0xC5: 2, 0xC6: 4})
        if size is None or size != expected or self.at + size != end:
            self.file.fail(
                field,
                f"shape {list(shape)} of {name} needs {expected} bytes, "
                f"but {size} are declared; fetch the file again",
            )
        array = Dense(self.file, field, dtype, shape, self.at)
        self.at = end
        return array


def read_header(file: File) -> dict[str, Tensor]:
    """Returns every tensor under its torch name."""
    scanner = _Scanner(file)
    root = scanner.node("root")
    if type(root) is not dict:
        file.fail("root", "is not a map; this is no Flax checkpoint")
    if scanner.at != file.size:
        file.fail(
            "end",
            f"{file.size - scanner.at} bytes follow the last value; the file is "
            "damaged, fetch it again",
        )
    if root.keys() == {"params"} and type(root["params"]) is dict:
        root = root["params"]
    out: dict[str, Tensor] = {}
    _flatten(file, root, "", out)
    return out


def _flatten(file: File, node: dict, prefix: str, out: dict[str, Tensor]) -> None:
    for key, value in node.items():
        path = f"{prefix}/{key}" if prefix else key
        if type(value) is dict and "__msgpack_chunked_array__" in value:
            value = _chunked(file, path, value)
        if type(value) is dict:
            _flatten(file, value, path, out)
            continue
        if not isinstance(value, Dense | Chunked):
            file.fail(quote(path), "is a number where an array belongs; fetch the file again")
        name = torch_name(path)
        if name in out:
            file.fail(quote(path), f"becomes {quote(name)}, which is taken; rename one of them")
        if path.rpartition("/")[2] == "kernel":
            if len(value.shape) != 2:
                file.fail(quote(path), f"a kernel of shape {list(value.shape)}, expected two axes")
            # dataclasses.replace is ten times slower, and there may be 65,536 of these.
            if isinstance(value, Dense):
                value = Dense(file, value.field, value.dtype, value.shape[::-1], value.offset, True)
            else:
                value = Chunked(value.field, value.pieces, value.shape[::-1], value.dtype, True)
        out[name] = value


def torch_name(path: str) -> str:
    """model/decoder/layers/0/fc1/kernel to model.decoder.layers.0.fc1.weight."""
    *parents, leaf = path.removeprefix("params/").split("/")
    return ".".join([*parents, _LEAVES.get(leaf, leaf)])


def _chunked(file: File, path: str, node: dict) -> Chunked:
    field = f"tensor {quote(path)}"

    def ordered(key):
        part = node.get(key)
        if type(part) is not dict or part.keys() != {str(i) for i in range(len(part))}:
            file.fail(field, f"{key} of a chunked array is not numbered from 0")
        return [part[str(i)] for i in range(len(part))]

    pieces = ordered("chunks")
    if not pieces or any(type(p) is not Dense or len(p.shape) != 1 for p in pieces):
        file.fail(field, "chunks are not flat arrays; fetch the file again")
    dtype = pieces[0].dtype
    if any(p.dtype != dtype for p in pieces):
        file.fail(field, "chunks differ in dtype; fetch the file again")
    shape, size = check_shape(file, field, ordered("shape"), dtype.itemsize)
    held = sum(p.stored_bytes for p in pieces)
    if held != size:
        file.fail(field, f"shape {list(shape)} needs {size} bytes, the chunks hold {held}")
    return Chunked(field, tuple(pieces), shape, dtype)
