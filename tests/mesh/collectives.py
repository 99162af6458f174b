"""What a compiled program sends between devices."""

import math
import re

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_OP = re.compile(rf" = (.+?) ({_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_BYTES = {"pred": 1, "u8": 1, "s8": 1, "f16": 2, "bf16": 2, "f32": 4, "u32": 4, "s32": 4}


def collectives(compiled, dtypes=tuple(_BYTES)) -> list[tuple[str, int]]:
    """(kind, bytes of its results of these dtypes) of each collective that has some, sorted."""
    found = []
    for types, kind in _OP.findall(compiled.as_text()):
        sizes = [
            _BYTES[dtype] * math.prod(map(int, dims.split(",") if dims else ()))
            for dtype, dims in _ARRAY.findall(types)
            if dtype in dtypes
        ]
        if sizes:
            found.append((kind, sum(sizes)))
    return sorted(found)
