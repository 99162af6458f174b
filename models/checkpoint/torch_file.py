"""pytorch_model.bin: a zip of raw storages and one pickle, read without unpickling.

    archive/data.pkl        {"name": _rebuild_tensor_v2(storage 0, offset, size, stride, ...)}
    archive/data/0          the bytes of storage 0, stored, not deflated
    archive/byteorder       "little"

Here is the archive; unpickle.py reads its pickle.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np

from .base import MAX_TENSORS, Dense, File, Tensor, check_shape, quote
from .unpickle import CONVERT, Pickle, Storage, TensorRecord


class _Entry(NamedTuple):
    header: int  # offset of the local header
    size: int


@dataclass(frozen=True, slots=True)
class Strided:
    """A tensor that is not contiguous in its storage, such as a saved transpose."""

    storage: Dense
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype

    @property
    def stored_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        flat = self.storage.read()
        strides = tuple(s * self.dtype.itemsize for s in self.stride)
        view = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        return np.ascontiguousarray(view)


def read_header(file: File) -> dict[str, Tensor]:
    """Returns every tensor of the state dict by name."""
    if file.size < 4 or file.read(0, 4, "magic") != b"PK\x03\x04":
        legacy = file.read(0, min(file.size, 14), "magic").startswith(b"\x80\x02\x8a\nl\xfc\x9c")
        problem = "is torch's format from before version 1.6" if legacy else "is not a torch zip"
        file.fail("magic", f"{problem}; {CONVERT}")
    archive = _Zip(file)
    pickles = [
        name for name in archive.entries if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(pickles) != 1:
        file.fail("data.pkl", f"{len(pickles)} of them in the archive, expected 1; {CONVERT}")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.entries:
        offset, size = archive.locate(f"{root}byteorder")
        if size != 6 or file.read(offset, size, "byteorder") != b"little":
            file.fail("byteorder", f"is not little-endian; {CONVERT}")
    offset, size = archive.locate(pickles[0])
    # An opcode of one byte can make an object of a hundred; OPT-175B's pickle has 0.4 MB.
    if size > (limit := min(8 << 20, max(1 << 19, file.size // 64))):
        file.fail("data.pkl", f"{size} bytes, over the limit of {limit}; {CONVERT}")
    state = Pickle(file, file.read(offset, size, "data.pkl")).run()

    if len(state) > MAX_TENSORS:
        file.fail("data.pkl", f"{len(state)} tensors, over the limit of {MAX_TENSORS}")
    located: dict[Storage, int] = {}
    out: dict[str, Tensor] = {}
    total = 0
    for name, value in state.items():
        field = f"tensor {quote(name)}"
        if type(value) is not TensorRecord:
            file.fail(field, f"is a {type(value).__name__.lower()}, not a tensor; {CONVERT}")
        storage = value.storage
        if storage not in located:
            at, held = archive.locate(f"{root}data/{storage.key}")
            if held != storage.numel * storage.dtype.itemsize:
                file.fail(
                    field,
                    f"storage {quote(storage.key)} holds {held} bytes, declared are "
                    f"{storage.numel} of {storage.dtype}; fetch the file again",
                )
            located[storage] = at
        out[name] = _place(file, field, value, located[storage])
        total += out[name].stored_bytes
    # Names may share a storage (tied embeddings), so the sum may exceed the file, but not by far.
    if total > 4 * file.size:
        file.fail(
            "data.pkl", f"declares {total} bytes of tensors in a file of {file.size}; {CONVERT}"
        )
    return out


def _place(file: File, field: str, t: TensorRecord, start: int) -> Tensor:
    """Checks offset, shape and strides against the storage."""
    dtype, numel = t.storage.dtype, t.storage.numel
    shape, size = check_shape(file, field, t.shape, dtype.itemsize)
    stride = t.stride
    if (
        type(stride) is not tuple
        or len(stride) != len(shape)
        or any(type(s) is not int or s < 0 for s in stride)
    ):
        file.fail(field, f"stride does not match shape {list(shape)}; {CONVERT}")
    if type(t.offset) is not int or t.offset < 0:
        file.fail(field, f"storage offset is not a count; {CONVERT}")
    last = t.offset + sum((d - 1) * s for d, s in zip(shape, stride, strict=True)) if size else -1
    if last >= numel or size > numel * dtype.itemsize:
        file.fail(
            field,
            f"shape {list(shape)} with its strides reaches past its storage of "
            f"{numel}; the file is damaged, fetch it again",
        )
    packed = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    contiguous = not size or all(
        d == 1 or s == p for d, s, p in zip(shape, stride, packed, strict=True)
    )
    at = start + t.offset * dtype.itemsize if size else start
    if contiguous:
        return Dense(file, field, dtype, shape, at)
    return Strided(Dense(file, field, dtype, (last - t.offset + 1,), at), shape, stride, dtype)


class _Zip:
    """The directory of a zip whose members are stored plainly, as torch writes it."""

    def __init__(self, file: File):
        self.file = file
        tail_size = min(file.size, 22 + 0xFFFF)
        start = file.size - tail_size
        tail = file.read(start, tail_size, "zip directory")
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < 22:
            self._damaged("no end record")
        disk, cd_disk, here, count, size, offset, comment = struct.unpack_from(
            "<4H2LH", tail, at + 4
        )
        if at + 22 + comment != len(tail):
            self._damaged("bytes follow the end record")
        end = start + at
        if 0xFFFF in (here, count) or 0xFFFFFFFF in (size, offset):
            locator = file.read(max(end - 20, 0), 20, "zip64 locator")
            record = int.from_bytes(locator[8:16], "little")
            if locator[:4] != b"PK\x06\x07" or record + 56 > end:
                self._damaged("no zip64 record")
            fields = file.read(record, 56, "zip64 record")
            if fields[:4] != b"PK\x06\x06":
                self._damaged("no zip64 record")
            disk, cd_disk, here, count, size, offset = struct.unpack_from("<2L4Q", fields, 16)
            end = record
        if disk or cd_disk or here != count:
            self._damaged("split over several disks")
        if (
            offset + size > end
            or size < 46 * count
            or count > 2 * MAX_TENSORS
            or size > 256 * (count + 1) + (1 << 20)
        ):
            self._damaged(f"{count} entries in {size} bytes at {offset}")
        self.data_end = offset
        self.entries = self._entries(file.read(offset, size, "zip directory"), count)
        # Members that overlap would let a small file stand for a large one.
        if sum(entry.size for entry in self.entries.values()) > file.size:
            self._damaged("its members are larger than the file")

    def _damaged(self, problem: str) -> NoReturn:
        self.file.fail("zip directory", f"{problem}; the file is damaged, fetch it again")

    def _entries(self, data: bytearray, count: int) -> dict[str, _Entry]:
        out: dict[str, _Entry] = {}
        at = 0
        for _ in range(count):
            if data[at : at + 4] != b"PK\x01\x02" or at + 46 > len(data):
                self._damaged(f"entry {len(out)} is cut off")
            flags, method = struct.unpack_from("<2H", data, at + 8)
            packed, size, n, m, k = struct.unpack_from("<2L3H", data, at + 20)
            (header,) = struct.unpack_from("<L", data, at + 42)
            at += 46
            if at + n + m + k > len(data):
                self._damaged(f"entry {len(out)} is cut off")
            name = data[at : at + n].decode("utf-8", "backslashreplace")
            extra = data[at + n : at + n + m]
            at += n + m + k
            if 0xFFFFFFFF in (size, packed, header):
                size, packed, header = self._wide(extra, size, packed, header)
            if flags & 1 or method or packed != size:
                self.file.fail(quote(name), f"is compressed or encrypted; {CONVERT}")
            if name in out:
                self.file.fail(quote(name), f"appears twice in the archive; {CONVERT}")
            out[name] = _Entry(header, size)
        return out

    def _wide(self, extra: bytearray, *values: int) -> list[int]:
        """Replaces each 0xFFFFFFFF by the next field of the zip64 extra block."""
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            body = extra[at + 4 : at + 4 + length]
            at += 4 + length
            if kind == 1:
                wide = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
                values = tuple(next(wide, -1) if v == 0xFFFFFFFF else v for v in values)
                if -1 not in values:
                    return list(values)
        self._damaged("a zip64 size is missing")

    def locate(self, name: str) -> tuple[int, int]:
        """(offset, size) of a member's bytes."""
        if name not in self.entries:
            self.file.fail(quote(name), f"is not in the archive; {CONVERT}")
        entry = self.entries[name]
        head = self.file.read(entry.header, 30, f"zip member {quote(name)}")
        if head[:4] != b"PK\x03\x04":
            self._damaged(f"no member at {entry.header}")
        # The extra block differs from the directory's: torch pads there to align the data.
        offset = entry.header + 30 + sum(struct.unpack_from("<2H", head, 26))
        self.file.check(offset, entry.size, f"zip member {quote(name)}", self.data_end)
        return offset, entry.size
