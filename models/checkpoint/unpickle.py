"""A restricted unpickler: it interprets the few opcodes that a dict of tensors needs.

It has no way to import or to call. A GLOBAL outside three kinds of names is an error, and REDUCE
knows two functions, both of this file. Python's own unpickler is not used even with a restricted
find_class: hashing nested tuples or one large memo index is enough to hang it or to exhaust
memory.
"""

from __future__ import annotations

import io
import pickletools
import struct
from typing import NamedTuple, NoReturn

import numpy as np

from .base import DTYPES, CheckpointError, File, quote

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
# All that `Pickle` knows. The arguments of any other opcode are not even decoded.
_OPCODES = frozenset(
    (
        *_PUSH, *_CONSTANT, *_TUPLES, "PROTO", "FRAME", "STOP", "MARK", "TUPLE", "EMPTY_DICT",
        "EMPTY_LIST", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT",
        "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE",
        "BUILD",
    )
)  # fmt: skip
_BY_CODE = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


class Global(NamedTuple):
    module: str
    name: str


class Storage(NamedTuple):
    dtype: np.dtype
    key: str
    numel: int


class TensorRecord(NamedTuple):
    storage: Storage
    offset: int
    shape: tuple
    stride: tuple


class Pickle:
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
        self.stack.append(Global(module, name))

    def storage(self, pid) -> Storage:
        """pid: ('storage', torch.HalfStorage, key, location, numel)."""
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            self.fail("has a persistent id that is not a storage")
        _, kind, key, _, numel = pid
        if type(kind) is not Global or kind.module != "torch":
            self.fail("has a storage of unknown type")
        if type(key) is not str or type(numel) is not int or numel < 0:
            self.fail("has a storage without a key and a size")
        return Storage(_STORAGES[kind.name], key, numel)

    def reduce(self, function, args):
        if type(function) is not Global or type(args) is not tuple:
            self.fail("calls something that is not a function")
        if function.name == "OrderedDict":
            # Its items follow as SETITEMS. Arguments would be copied at each call: a bomb.
            if args:
                self.fail("makes an OrderedDict from arguments")
            return {}
        if function.name != "_rebuild_tensor_v2" or len(args) not in (6, 7):
            self.fail(f"calls {function.name} with {len(args)} arguments")
        storage, offset, size, stride = args[:4]
        if type(storage) is not Storage or type(size) is not tuple:
            self.fail("makes a tensor without a storage or a size")
        return TensorRecord(storage, offset, size, stride)
