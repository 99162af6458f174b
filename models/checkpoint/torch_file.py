"""pytorch_model.bin: a zip of raw storages and one pickle, read without unpickling.

    archive/data.pkl        {"name": _rebuild_tensor_v2(storage 0, offset, size, stride, ...)}
    archive/data/0          the bytes of storage 0, stored, not deflated
    archive/byteorder       "little"

`_Pickle` interprets the few opcodes that a dict of tensors needs. It has no way to import or to
call: a GLOBAL outside three kinds of names is an error, REDUCE knows two functions, both of
this file. Python's unpickler is not used even with a restricted find_class: hashing nested
tuples or a large memo index is enough to hang it or to exhaust memory.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np

from .base import DTYPES, MAX_TENSORS, CheckpointError, Dense, File, Tensor, check_shape, quote

CONVERT = (
    "convert the checkpoint to safetensors where you trust it (transformers: model.save_pretrained)"
)
_STORAGES = {
    f"{kind}Storage": DTYPES[code]
    for kind, code in {
        "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64",
        "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL",
    }.items()
}  # fmt: skip
# Opcodes that push their argument, push a constant, or pack the last values.
_PUSH = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT")
)
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# All that `_Pickle` knows. The arguments of any other opcode are not even decoded.
_OPCODES = frozenset(
    (
        *_PUSH, *_CONSTANT, *_TUPLES, "PROTO", "FRAME", "STOP", "MARK", "TUPLE", "EMPTY_DICT",
        "EMPTY_LIST", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT",
        "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE",
        "BUILD",
    )
)  # fmt: skip
_BY_CODE = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


class _Entry(NamedTuple):
    header: int  # offset of the local header
    size: int


class _Global(NamedTuple):
    module: str
    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple
    stride: tuple


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
    state = _Pickle(file, file.read(offset, size, "data.pkl")).run()

    if len(state) > MAX_TENSORS:
        file.fail("data.pkl", f"{len(state)} tensors, over the limit of {MAX_TENSORS}")
    located: dict[_Storage, int] = {}
    out: dict[str, Tensor] = {}
    total = 0
    for name, value in state.items():
        field = f"tensor {quote(name)}"
        if type(value) is not _Tensor:
            file.fail(field, f"is a {type(value).__name__.strip('_')}, not a tensor; {CONVERT}")
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


def _place(file: File, field: str, t: _Tensor, start: int) -> Tensor:
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


class _Pickle:
    """A stack machine for the opcodes of a pickled dict of tensors."""

    def __init__(self, file: File, data: bytearray):
        self.file, self.data = file, data
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def fail(self, problem: str) -> NoReturn:
        self.file.fail("data.pkl", f"{problem}; {CONVERT}")

    def run(self) -> dict:
        try:
            code = io.BytesIO(self.data)
            while (opcode := _BY_CODE.get(code.read(1))) is not None:
                if opcode.name not in _OPCODES:
                    self.fail(
                        f"uses the opcode {opcode.name}, which a dict of tensors does not need"
                    )
                if opcode.name == "GLOBAL":  # pickletools would interpret backslashes
                    arg = [code.readline().decode().removesuffix("\n") for _ in range(2)]
                else:
                    arg = opcode.arg.reader(code) if opcode.arg else None
                self.step(opcode.name, arg)
                if opcode.name == "STOP":
                    break
            else:
                self.fail(f"has no opcode at byte {code.tell()}, and no end")
        except CheckpointError:
            raise
        except (ValueError, struct.error, OverflowError) as e:
            self.fail(f"is not a whole pickle ({str(e)[:80]})")
        if len(self.stack) != 1 or type(self.stack[0]) is not dict:
            self.fail("is not one dict of tensors")
        return self.stack[0]

    def pop(self):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.fail("takes a value from an empty stack")
        return self.stack.pop()

    def pop_mark(self) -> list:
        if not self.marks:
            self.fail("takes a mark that was not set")
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def top(self, kind: type):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.fail("takes a value from an empty stack")
        if type(self.stack[-1]) is not kind:
            self.fail(f"expected a {kind.__name__}, found a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def step(self, op: str, arg) -> None:
        stack = self.stack
        if op in _PUSH:
            stack.append(arg)
        elif op in _CONSTANT:
            stack.append(_CONSTANT[op])
        elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            if not stack:
                self.fail("remembers a value that is not there")
            self.memo[len(self.memo) if op == "MEMOIZE" else arg] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            if arg not in self.memo:
                self.fail(f"recalls value {arg}, which was never stored")
            stack.append(self.memo[arg])
        elif op == "MARK":
            self.marks.append(len(stack))
        elif op == "TUPLE":
            stack.append(tuple(self.pop_mark()))
        elif op in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[op])]
            stack.append(tuple(items[::-1]))
        elif op == "EMPTY_DICT":
            stack.append({})
        elif op == "EMPTY_LIST":
            stack.append([])
        elif op in ("APPEND", "APPENDS"):
            items = self.pop_mark() if op == "APPENDS" else [self.pop()]
            self.top(list).extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            items = self.pop_mark() if op == "SETITEMS" else [self.pop(), self.pop()][::-1]
            self.update(self.top(dict), items)
        elif op == "GLOBAL":
            self.push_global(*arg)
        elif op == "STACK_GLOBAL":
            name, module = self.pop(), self.pop()
            self.push_global(module, name)
        elif op == "BINPERSID":
            stack.append(self.storage(self.pop()))
        elif op == "REDUCE":
            args, function = self.pop(), self.pop()
            stack.append(self.reduce(function, args))
        elif op == "BUILD":
            # torch hangs `_metadata` (module versions) on the OrderedDict; it is not needed.
            self.pop()
            self.top(dict)

    def update(self, target: dict, items: list) -> None:
        if len(items) % 2:
            self.fail("sets a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                self.fail(f"has a key that is a {type(key).__name__}, not a string")
            if key in target:
                self.fail(f"sets the key {quote(key)} twice")
            target[key] = value

    def push_global(self, module, name) -> None:
        known = (module, name) in (
            ("collections", "OrderedDict"),
            ("torch._utils", "_rebuild_tensor_v2"),
        ) or (module == "torch" and type(name) is str and name in _STORAGES)
        if not known:
            self.fail(
                f"names {quote(module)}.{quote(name)}, and nothing that a checkpoint names "
                "is imported beyond tensors and OrderedDict"
            )
        self.stack.append(_Global(module, name))

    def storage(self, pid) -> _Storage:
        """pid: ('storage', torch.HalfStorage, key, location, numel)."""
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            self.fail("has a persistent id that is not a storage")
        _, kind, key, _, numel = pid
        if type(kind) is not _Global or kind.module != "torch":
            self.fail("has a storage of unknown type")
        if type(key) is not str or type(numel) is not int or numel < 0:
            self.fail("has a storage without a key and a size")
        return _Storage(_STORAGES[kind.name], key, numel)

    def reduce(self, function, args):
        if type(function) is not _Global or type(args) is not tuple:
            self.fail("calls something that is not a function")
        if function.name == "OrderedDict":
            # Its items follow as SETITEMS. Arguments would be copied at each call: a bomb.
            if args:
                self.fail("makes an OrderedDict from arguments")
            return {}
        if function.name != "_rebuild_tensor_v2" or len(args) not in (6, 7):
            self.fail(f"calls {function.name} with {len(args)} arguments")
        storage, offset, size, stride = args[:4]
        if type(storage) is not _Storage or type(size) is not tuple:
            self.fail("makes a tensor without a storage or a size")
        return _Tensor(storage, offset, size, stride)
