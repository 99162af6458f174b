"""Makes checkpoint files for tests: good ones by hand, bad ones by mutation."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

CODES = {
    np.dtype(np.float16): ("F16", "Half"),
    np.dtype(np.float32): ("F32", "Float"),
    np.dtype(ml_dtypes.bfloat16): ("BF16", "BFloat16"),
    np.dtype(np.int64): ("I64", "Long"),
    np.dtype(np.uint8): ("U8", "Byte"),
    np.dtype(np.bool_): ("BOOL", "Bool"),
}
FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32]


def weights(dtype=np.float16, seed=0) -> dict[str, np.ndarray]:
    """A small OPT-like set, with NaN, infinity and -0.0 in it."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    prefix = "model.decoder"
    out = {
        f"{prefix}.embed_tokens.weight": normal(19, 8),
        f"{prefix}.embed_positions.weight": normal(10, 8),
        f"{prefix}.final_layer_norm.weight": normal(8),
        f"{prefix}.final_layer_norm.bias": normal(8),
    }
    for part, shape in (("self_attn.q_proj", (8, 8)), ("fc1", (13, 8)), ("fc2", (8, 13))):
        w = normal(*shape)
        w[rng.random(shape) < 0.7] = 0
        out[f"{prefix}.layers.0.{part}.weight"] = w
        out[f"{prefix}.layers.0.{part}.bias"] = normal(shape[0])
    out[f"{prefix}.layers.0.fc1.weight"][0, :3] = [-0.0, np.nan, np.inf]
    return out


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def model_dir(path: Path, **files: bytes) -> Path:
    """A directory with a config.json and the given files (`__` in a name stands for a dot)."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text('{"model_type": "opt"}')
    for name, data in files.items():
        (path / name.replace("__", ".")).write_bytes(data)
    return path


def safetensors_bytes(tensors: dict[str, np.ndarray], edit=None) -> bytes:
    """`edit` changes the header, a dict, or replaces it by its bytes."""
    header, data = {}, b""
    for name, array in tensors.items():
        raw = np.asarray(array).tobytes()
        header[name] = {
            "dtype": CODES[np.asarray(array).dtype][0],
            "shape": list(np.shape(array)),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    if edit is not None:
        header = edit(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def packed_parts(name: str, w: np.ndarray) -> dict[str, np.ndarray]:
    """The four tensors of sparse-bitmask, one bit and one value at a time."""
    rows, cols = w.shape
    mask = np.zeros((rows, -(-cols // 8)), np.uint8)
    values, offsets = [], []
    for i in range(rows):
        offsets.append(len(values))
        for j in range(cols):
            if w[i, j : j + 1].tobytes().strip(b"\0"):
                mask[i, j // 8] |= 1 << (j % 8)
                values.append(w[i, j])
    head = name.removesuffix(".weight")
    return {
        f"{head}.shape": np.array([rows, cols], np.int64),
        f"{head}.compressed": np.array(values, w.dtype),
        f"{head}.bitmask": mask,
        f"{head}.row_offsets": np.array(offsets, np.int64),
    }


# --- torch's zip, opcode by opcode (pickle protocol 2) ---


def op_text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def op_int(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def op_ints(values) -> bytes:
    return b"(" + b"".join(op_int(v) for v in values) + b"t"


def op_storage(kind: str, key: str, numel: int) -> bytes:
    return (
        b"(" + op_text("storage") + f"ctorch\n{kind}Storage\n".encode() + op_text(key)
        + op_text("cpu") + op_int(numel) + b"tQ"
    )  # fmt: skip


def op_tensor(storage: bytes, offset: int, shape, stride) -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + op_int(offset) + op_ints(shape)
        + op_ints(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def op_dict(items: dict[str, bytes]) -> bytes:
    body = b"".join(op_text(name) + value for name, value in items.items())
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + body + b"u."


def contiguous(shape) -> list[int]:
    return [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]


def torch_bytes(
    path: Path,
    tensors: dict[str, np.ndarray],
    pickle: bytes | None = None,
    extra: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """A file as torch.save makes it; `pickle` replaces data.pkl, `extra` adds members."""
    items, members = {}, {}
    for i, (name, array) in enumerate(tensors.items()):
        array = np.asarray(array)
        storage = op_storage(CODES[array.dtype][1], str(i), array.size)
        items[name] = op_tensor(storage, 0, array.shape, contiguous(array.shape))
        members[f"data/{i}"] = array.tobytes()
    members = {"data.pkl": pickle or op_dict(items), "byteorder": b"little", **members}
    members |= {"version": b"3\n", **(extra or {})}
    with zipfile.ZipFile(path, "w", compression) as f:
        for name, data in members.items():
            f.writestr(f"archive/{name}", data)
    return path.read_bytes()


# --- Flax ---


def flax_tree(tensors: dict[str, np.ndarray]) -> dict:
    """Flax's names and layouts for torch's, nested."""
    tree: dict = {}
    for name, array in tensors.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if leaf == "weight" and "embed" in name:
            leaf = "embedding"
        elif leaf == "weight" and array.ndim == 1:
            leaf = "scale"
        elif leaf == "weight":
            leaf, array = "kernel", np.ascontiguousarray(array.T)
        node[leaf] = array
    return tree


# --- mutations ---


# What parsers stumble over: sizes at the edges of their types, in every spelling that a format
# has; JSON's words; msgpack's widest headers; opcodes that name, call or nest.
WORDS = [
    *(b"%d" % n for n in (-1, 0, 1, 2**31, 2**32 - 1, 2**42, 2**63 - 1, 2**63, 2**64, 10**30)),
    *(
        n.to_bytes(size, order)
        for size in (4, 8)
        for n in (1 << 8 * size - 1, (1 << 8 * size) - 1, 1 << 8 * size - 9)
        for order in ("little", "big")
    ),
    b'"shape":[', b'"data_offsets":[', b'"dtype":"', b"null", b"NaN", b"1e999", b"[[[[", b'"":{',
    b'"../', b"\xdf\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\xdd\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff", b"cos\nsystem\n", b"cbuiltins\neval\n", b"\x80\x05", b"(", b"t", b"R",
    b"Q", b"q\x00h\x00\x86", b"\x93", b"\x8d" + 8 * b"\x7f", b"PK\x01\x02", b"PK\x05\x06",
]  # fmt: skip


def mutate(data: bytes, rng: np.random.Generator, focus: int) -> bytes:
    """One to three random edits, mostly within the first or last `focus` bytes."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        size = len(out)
        if not size:
            break
        near = min(size, focus)
        where = rng.random()
        if where < 0.6:
            at = int(rng.integers(near))
        elif where < 0.9:
            at = size - 1 - int(rng.integers(near))
        else:
            at = int(rng.integers(size))
        count = int(rng.integers(1, 9))
        kind = rng.integers(9)
        if kind == 0:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[at : at + count] = rng.bytes(count)
        elif kind == 2:
            del out[at : at + count]
        elif kind == 3:
            out[at:at] = rng.bytes(count)
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            out[at : at + count] = bytes([rng.choice([0, 0x7F, 0x80, 0xFF])]) * count
        elif kind == 6:
            other = int(rng.integers(size))
            out[at : at + 8 * count] = out[other : other + 8 * count]
        elif kind == 7:
            word = WORDS[int(rng.integers(len(WORDS)))]
            out[at : at + (len(word) if rng.random() < 0.5 else 0)] = word
        else:
            # Digits stay digits: a header that parses and lies.
            digits = [i for i in range(at, min(at + 64, size)) if 48 <= out[i] < 58]
            for i in digits[:count]:
                out[i] = 48 + int(rng.integers(10))
    return bytes(out)
