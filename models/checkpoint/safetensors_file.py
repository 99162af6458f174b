"""safetensors: a JSON header, then the tensors' bytes without gaps.

    | u64 header length N | N bytes of JSON | data ...                         |
    {"name": {"dtype": "F16", "shape": [M, K], "data_offsets": [begin, end]}, ...}

The `safetensors` library is not used for reading: its NumPy front end has no bfloat16, maps
the file, and does not give offsets. The rules are its own: a header of at most 100 MB, and
tensors that cover the data exactly once.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from .base import (
    DTYPES,
    MAX_HEADER,
    MAX_SMALL,
    MAX_TENSORS,
    Dense,
    File,
    check_shape,
    load_json,
    quote,
)


def read_header(file: File) -> dict[str, Dense]:
    """Returns every stored tensor by name, in the order of the header."""
    length = int.from_bytes(file.read(0, 8, "header length"), "little")
    # A header that outweighs its data is refused (see MAX_SMALL).
    limit = min(MAX_HEADER, max(MAX_SMALL, file.size // 16))
    if length > limit:
        file.fail(
            "header length",
            f"{length} bytes, over the limit of {limit}; the file is "
            "damaged or not safetensors, fetch it again",
        )
    header = load_json(file.read(8, length, "header"), file, "header")

    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(v) is not str for v in metadata.values()):
        file.fail("__metadata__", "is not an object of strings; make the file again")
    if len(header) > MAX_TENSORS:
        file.fail("header", f"{len(header)} tensors, over the limit of {MAX_TENSORS}")

    start = 8 + length
    tensors, spans = {}, []
    for name, entry in header.items():
        field = f"tensor {quote(name)}"
        if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
            file.fail(field, "needs exactly dtype, shape and data_offsets; make the file again")
        kind, offsets = entry["dtype"], entry["data_offsets"]
        dtype = DTYPES.get(kind) if type(kind) is str else None
        if dtype is None:
            file.fail(field, f"dtype {quote(kind)} is not one of {', '.join(DTYPES)}; convert it")
        shape, count = check_shape(file, field, entry["shape"], dtype.itemsize)
        if type(offsets) is not list or [type(v) for v in offsets] != [int, int]:
            file.fail(field, "data_offsets is not two integers; make the file again")
        begin, end = offsets
        if not 0 <= begin <= end or end - begin != count:
            file.fail(
                field,
                f"data_offsets [{begin}, {end}] do not hold shape {list(shape)} of "
                f"{kind} ({count} bytes); fetch the file again",
            )
        file.check(start + begin, count, field)
        spans.append((begin, end, field))
        tensors[name] = Dense(file, field, dtype, shape, start + begin)

    spans.sort(key=lambda span: span[:2])
    at = 0
    for begin, end, field in spans:
        if begin != at:
            file.fail(
                field,
                f"begins at {begin} of the data, expected {at}: tensors overlap or "
                "leave a gap; fetch the file again",
            )
        at = end
    if start + at != file.size:
        file.fail(
            "data",
            f"{file.size - start} bytes, but the tensors cover {at}; the file is "
            "damaged, fetch it again",
        )
    return tensors
