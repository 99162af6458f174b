"""What the checkpoint readers share: the error, bounded reads, bounded JSON, dtypes.

Every reader follows one rule: a number found in a file is compared with the size of the file
before it is used to allocate, seek or loop. `File.check` is where offsets meet that size.
Tensors are read with pread, not mapped: a file that shrinks under a map kills the process
with SIGBUS, while a short pread is an error that can be reported.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import ml_dtypes
import numpy as np

# Bounds on what is parsed into Python objects, which take up to 26 times the bytes of the JSON:
# no file may cost more than twice its size and 64 MB. OPT-175B needs 1,540 tensors, 6,000 when
# packed, and 0.7 MB of header.
MAX_TENSORS = 65_536
MAX_HEADER = 100_000_000
MAX_SMALL = 2 << 20
# Copying out of the page cache takes a core as long as a fast disk takes to fill it: large tensors
# are read by several threads, and the disk reads on while what came is worked on.
READERS, READ_STEP = 4, 8 << 20
READ_AHEAD = 64 << 20
MAX_DIMS = 8

# safetensors' names; the sub-byte types are left out.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written.

    The message names the file, the field and the next step; `file` and `field` hold the first
    two by themselves.
    """

    def __init__(self, file: str | os.PathLike, field: str, problem: str):
        self.file, self.field = os.fspath(file), field
        # Ask repr to escape what a hostile name might hold (lone surrogates, control codes).
        text = f"{self.file}: {field}: {problem}"
        super().__init__(text.encode("utf-8", "backslashreplace").decode())


def quote(name: object) -> str:
    """repr of a string from a file, short enough for one line."""
    text = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
    return text if len(text) <= 120 else f"{text[:80]}... ({len(text)} characters)"


class File:
    """A regular file opened for bounded reads; `size` is its length when it was opened."""

    def __init__(self, path: Path):
        self.path, self._fd = path, -1
        self._ahead = 0  # up to here the system was asked to read
        try:
            # Without O_NONBLOCK, opening a FIFO waits for a writer for ever.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self._fd)
        except OSError as e:
            raise CheckpointError(
                path,
                "file",
                f"cannot be opened ({e.strerror}); check that it exists and is "
                "readable, or fetch the checkpoint again",
            ) from e
        if not stat.S_ISREG(status.st_mode):
            self.close()
            self.fail("file", "is not a regular file; point to a downloaded checkpoint")
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns

    def fail(self, field: str, problem: str) -> NoReturn:
        raise CheckpointError(self.path, field, problem)

    def check(self, offset: int, count: int, field: str, end: int | None = None) -> None:
        """Raises unless bytes [offset, offset + count) lie before `end` (the file's size)."""
        end = self.size if end is None else end
        if offset < 0 or count < 0 or offset + count > end:
            self.fail(
                field,
                f"needs bytes {offset} to {offset + count}, but only {end} are there; "
                "the file is truncated or damaged, fetch it again",
            )

    def read(self, offset: int, count: int, field: str) -> bytearray:
        self.check(offset, count, field)
        out = bytearray(count)
        self._fill(memoryview(out), offset, field)
        return out

    def read_array(self, offset: int, shape: Sequence[int], dtype: np.dtype, field: str):
        """Returns a new array of `shape`, after the bounds check."""
        size = math.prod(shape) * dtype.itemsize
        self.check(offset, size, field)
        try:
            # XLA's CPU backend adopts what starts at a multiple of 64 bytes, and copies all else.
            room = np.empty(size + 64, np.uint8)
        except (MemoryError, ValueError) as e:
            self.fail(field, f"shape {list(shape)} cannot be allocated ({e}); free memory")
        start = -room.ctypes.data % 64
        held = room[start : start + size]
        if size:
            self._fill(held.data, offset, field)
        out = held.view(np.uint8 if dtype == np.bool_ else dtype).reshape(tuple(shape))
        # A bool whose byte is neither 0 nor 1 is undefined behaviour in C.
        return out != 0 if dtype == np.bool_ else out

    def _fill(self, view: memoryview, offset: int, field: str) -> None:
        if self._fd < 0:
            self.fail(field, "the checkpoint is closed; read before leaving its `with` block")
        end = offset + len(view)
        if end + READ_AHEAD // 2 > self._ahead and hasattr(os, "posix_fadvise"):
            start, self._ahead = max(self._ahead, offset), end + READ_AHEAD
            os.posix_fadvise(self._fd, start, self._ahead - start, os.POSIX_FADV_WILLNEED)
        if len(view) <= READ_STEP:
            self._fill_part(view, offset, field)
            return

        def read(at: int) -> None:
            self._fill_part(view[at : at + READ_STEP], offset + at, field)

        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(read, range(0, len(view), READ_STEP)):
                pass

    def _fill_part(self, view: memoryview, offset: int, field: str) -> None:
        done = 0
        while done < len(view):
            try:
                n = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as e:
                raise CheckpointError(
                    self.path, field, f"read failed ({e.strerror}); check the disk"
                ) from e
            if n == 0:
                self.fail(field, "the file became shorter while it was read; load it again")
            done += n

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    __del__ = close


def load_json(data: bytes | bytearray, file: File, field: str) -> dict:
    """Parses a JSON object strictly: no NaN or Infinity, no repeated key, bounded depth."""

    def pairs(items):
        out = dict(items)
        if len(out) != len(items):
            seen: set[str] = set()
            twice = next(k for k, _ in items if k in seen or seen.add(k))
            file.fail(field, f"the key {quote(twice)} appears twice; make the file again")
        return out

    def constant(text):
        file.fail(field, f"holds {text}, which is not JSON; make the file again")

    try:
        value = json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except CheckpointError:
        raise
    except (ValueError, RecursionError, MemoryError) as e:
        raise CheckpointError(
            file.path, field, f"is not valid JSON ({str(e)[:100]}); fetch the file again"
        ) from None
    if type(value) is not dict:
        file.fail(field, f"is a JSON {type(value).__name__}, not an object; fetch the file again")
    return value


def read_json(path: Path, limit: int = MAX_SMALL) -> dict:
    """Reads a small JSON file whole."""
    file = File(path)
    try:
        if file.size > limit:
            file.fail("size", f"{file.size} bytes of JSON, over the limit of {limit}")
        return load_json(file.read(0, file.size, "JSON"), file, "JSON")
    finally:
        file.close()


def check_shape(
    file: File, field: str, shape: object, itemsize: int
) -> tuple[tuple[int, ...], int]:
    """Returns (shape, bytes) for a declared shape; refuses what NumPy could not index."""
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMS:
        file.fail(field, f"shape is not a list of at most {MAX_DIMS} dimensions; convert it")
    if any(type(d) is not int or d < 0 for d in shape):
        file.fail(field, "shape is not a list of non-negative integers; fetch the file again")
    # Zeros are counted as ones: [0, 2**62] has no elements, and still cannot be an array.
    if math.prod(max(d, 1) for d in shape) * itemsize >= 1 << 48:
        file.fail(field, "its shape is larger than any file; fetch the file again")
    return tuple(shape), math.prod(shape) * itemsize


def transpose(a: np.ndarray) -> np.ndarray:
    """Returns a contiguous copy of a.T [K, M], a [M, K].

    In bands of 16 rows, which fill whole cache lines of the copy: five times as fast as
    np.ascontiguousarray(a.T) at 4096 x 4096.
    """
    out = np.empty(a.shape[::-1], a.dtype)
    for i in range(0, a.shape[0], 16):
        out[:, i : i + 16] = a[i : i + 16].T
    return out


class Tensor(Protocol):
    """One logical tensor of a checkpoint; nothing is read before `read`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def stored_bytes(self) -> int: ...

    def read(self) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Dense:
    """A contiguous row-major tensor at `offset` of `file`; [in, out] there if `transposed`."""

    file: File
    field: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    transposed: bool = False

    @property
    def stored_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        if self.transposed:
            flipped = self.file.read_array(self.offset, self.shape[::-1], self.dtype, self.field)
            return transpose(flipped)
        return self.file.read_array(self.offset, self.shape, self.dtype, self.field)
