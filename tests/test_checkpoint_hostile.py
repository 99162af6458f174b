"""Bad files: always CheckpointError, at once, without running or allocating what they ask for."""

import json
import os
import pathlib
import pickle
import struct
import time
import tracemalloc
import zipfile

import flax.serialization
import msgpack
import numpy as np
import pytest
from checkpoint_files import (
    contiguous,
    flax_tree,
    model_dir,
    mutate,
    op_dict,
    op_int,
    op_ints,
    op_storage,
    op_tensor,
    op_text,
    packed_parts,
    safetensors_bytes,
    torch_bytes,
    weights,
)

from jax_flashllm.models.checkpoint import CheckpointError, open_checkpoint

HUGE = 2**20


def read_all(path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        out = {}
        for name in checkpoint.names():
            out[name] = checkpoint.read(name)
            assert out[name].shape == checkpoint.shape(name)
            assert out[name].dtype == checkpoint.dtype(name)
        return out


def refused(path, match: str, file: str | None = None, seconds=1.0) -> CheckpointError:
    """Reads; expects an error of the right kind within a second of CPU and 2x + 64 MB."""
    start = time.process_time()
    with pytest.raises(CheckpointError, match=match) as caught:
        read_all(path)
    assert time.process_time() - start < seconds
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(f.stat().st_size for f in pathlib.Path(path).iterdir() if f.is_file())
    assert peak < 2 * size + (64 << 20)
    if file is not None:
        assert pathlib.Path(caught.value.file).name == file
    assert caught.value.field
    return caught.value


# --- directories and JSON ---


def test_what_is_not_a_model_directory(tmp_path):
    refused_path = tmp_path / "absent"
    with pytest.raises(CheckpointError, match="does not exist; pass a directory"):
        open_checkpoint(refused_path)
    (tmp_path / "a file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; pass a directory"):
        open_checkpoint(tmp_path / "a file")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint("with\0nul")
    refused(tmp_path, r"cannot be opened \(No such file", "config.json")
    model_dir(tmp_path)
    refused(tmp_path, "none of model.safetensors")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not valid JSON"),
        (b"[]", "a JSON list, not an object"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": ' + b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"\\ud800": 1, "\\ud800": 2}', "appears twice"),
        (b" " * (3 << 20), "over the limit"),
    ],
)
def test_config(tmp_path, text, match):
    model_dir(tmp_path, model__safetensors=safetensors_bytes(weights()), config__json=text)
    str(refused(tmp_path, match, "config.json")).encode()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_and_devices_do_not_hang(tmp_path, name):
    model_dir(tmp_path, model__safetensors=safetensors_bytes(weights()))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refused(tmp_path, "not a regular file", name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    refused(tmp_path, "not a regular file", name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / name)
    refused(tmp_path, "cannot be opened", name)


@pytest.mark.parametrize("stem", ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "shard",
    [
        "../x",
        "/etc/passwd",
        "a/../b",
        "..",
        ".",
        "",
        "a\\b",
        ".hidden",
        "a\n",
        "\0",
        3,
        None,
        "x" * 300,
    ],
)
def test_index_names_stay_in_the_directory(tmp_path, stem, shard):
    suffix = os.path.splitext(stem)[1]
    if isinstance(shard, str):
        shard += suffix
    text = json.dumps({"weight_map": {"w": shard}})
    model_dir(tmp_path)
    (tmp_path / f"{stem}.index.json").write_text(text)
    refused(tmp_path, "plain name|is missing", f"{stem}.index.json")


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"w": "absent.safetensors"}}, "is missing; fetch it too"),
        ({"weight_map": {"other": "s.safetensors"}}, "does not hold this tensor"),
        ({"weight_map": {"w": "s.bin"}}, "plain name"),
    ],
)
def test_index(tmp_path, index, match):
    shard = safetensors_bytes({"w": np.zeros(3, np.float32)})
    model_dir(tmp_path, s__safetensors=shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, match, "model.safetensors.index.json")


# --- safetensors ---


def header(name: str, **fields):
    def edit(h):
        h[name].update(fields)

    return edit


def drop(name):
    def edit(h):
        del h[name]

    return edit


TWO = {"a": np.zeros((2, 3), np.float16), "b": np.zeros(4, np.float32)}


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (header("a", shape=[HUGE, HUGE]), r"'a'.*do not hold shape"),
        (header("a", shape=[HUGE, HUGE], data_offsets=[0, 2**41]), "only .* are there"),
        (header("a", shape=[2**62, 2**62]), "larger than any file"),
        (header("a", shape=[0, 2**62], data_offsets=[0, 0]), "larger than any file"),
        (header("a", shape=[10**4000]), "larger than any file"),
        (header("a", shape=[-2, -3]), "non-negative"),
        (header("a", shape=[2.0, 3]), "non-negative"),
        (header("a", shape=[True] * 2), "non-negative"),
        (header("a", shape=[1] * 60 + [6]), "at most 8 dimensions"),
        (header("a", shape="23"), "not a list"),
        (header("a", dtype="F4"), "dtype 'F4'"),
        (header("a", dtype=[]), "dtype a list"),
        (header("a", data_offsets=[12, 0]), "do not hold"),
        (header("a", data_offsets=[-12, 0]), "do not hold"),
        (header("a", data_offsets=[0, 12, 12]), "two integers"),
        (header("a", data_offsets=[0, 12.0]), "two integers"),
        (header("b", data_offsets=[4, 20]), "overlap or leave a gap"),
        (header("b", data_offsets=[0, 16]), "overlap or leave a gap"),
        (header("b", extra=1), "exactly dtype"),
        (drop("a"), "overlap or leave a gap"),
        (drop("b"), "tensors cover 12"),
        (lambda h: {**h, "a": 1}, "exactly dtype"),
        (lambda h: {**h, "__metadata__": {"a": 1}}, "object of strings"),
        (lambda h: b"[]", "not an object"),
        (lambda h: b'{"a": {}, "a": {}}', "appears twice"),
        (lambda h: b'{"a": NaN}', "holds NaN"),
        (lambda h: b"\xff", "not valid JSON"),
    ],
)
def test_safetensors_header(tmp_path, edit, match):
    model_dir(tmp_path, model__safetensors=safetensors_bytes(TWO, edit))
    refused(tmp_path, match, "model.safetensors")


def test_safetensors_header_length(tmp_path):
    for length in (0, 2**20, 2**27, 2**40, 2**63, 2**64 - 1):
        data = length.to_bytes(8, "little") + b"{}" * 20
        model_dir(tmp_path, model__safetensors=data)
        refused(tmp_path, "over the limit|are there|not valid JSON", "model.safetensors")
    model_dir(tmp_path, model__safetensors=b"\2" + b"\0" * 7 + b"{}")
    refused(tmp_path, "holds no tensors")


@pytest.mark.parametrize("item", [b"{}", b"[]", b'"b"', b"1.5", b'{"a":0}'])
@pytest.mark.parametrize("size", [(2 << 20) - 64, 3 << 20])
def test_json_that_grows_in_memory(tmp_path, item, size):
    """An empty dict takes 64 bytes for its three: the file's size bounds what is parsed."""
    text = b'{"a":[' + b",".join([item] * (size // (len(item) + 1))) + b"]}"
    model_dir(tmp_path / "a", model__safetensors=len(text).to_bytes(8, "little") + text)
    refused(tmp_path / "a", "over the limit|exactly dtype", seconds=5)
    index = {"model__safetensors__index__json": text}
    refused(model_dir(tmp_path / "b", **index), "over the limit|weight_map", seconds=5)
    refused(model_dir(tmp_path / "c", config__json=text), "over the limit|none of", seconds=5)


@pytest.mark.parametrize("op", [b"}", b"}\x94", b"]q\0", b"(", b"K\0\x85", b"X\0\0\0\0"])
def test_pickles_that_grow_in_memory(tmp_path, op):
    for size in ((1 << 19) - 64, 1 << 20):
        pickled = b"\x80\x02" + op * (size // len(op)) + b"."
        data = torch_bytes(tmp_path / "x", {}, pickled)
        model_dir(tmp_path / "m", pytorch_model__bin=data)
        refused(tmp_path / "m", "over the limit|not one dict", seconds=5)


# --- packed weights ---


def packed(edit=lambda parts: None) -> bytes:
    w = np.where(np.arange(50).reshape(5, 10) % 3 == 0, 1, 0).astype(np.float16)
    parts = packed_parts("w.weight", w)
    edit(parts)
    return safetensors_bytes(parts | {"bias": np.zeros(3, np.float16)})


def put(name, value):
    def edit(parts):
        parts[name] = np.asarray(value, parts[name].dtype)

    return edit


def poke(name, at, value):
    def edit(parts):
        parts[name][at] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (put("w.shape", [HUGE, HUGE]), r"does not fit a weight of shape \[1048576, 1048576\]"),
        (put("w.shape", [-5, 10]), "non-negative"),
        (put("w.shape", [5, -7]), "non-negative"),
        (put("w.shape", [5, 2**62]), "larger than any file"),
        (put("w.shape", [5, 17]), "does not fit"),
        (put("w.shape", [5, 9]), "bits set past column 9"),
        (put("w.shape", [4, 10]), "does not fit"),
        (put("w.shape", [5, 10, 1]), r"not int64 \[2\]"),
        (poke("w.bitmask", (0, 0), 0xFF), "bits set for 17 values"),
        (poke("w.bitmask", (0, 1), 0x82), "bits set past column 10"),
        (poke("w.row_offsets", 2, 2**40), "differ from the bit counts"),
        (poke("w.row_offsets", 0, -1), "differ from the bit counts"),
        (put("w.row_offsets", [0, 4]), "does not fit"),
        (put("w.compressed", np.ones(16)), "bits set for 16 values"),
        (put("w.compressed", np.ones((17, 1))), "does not fit"),
        (lambda p: p.update({"w.bitmask": p["w.bitmask"].astype(np.int64)}), "does not fit"),
        (lambda p: p.pop("w.row_offsets"), "'w.row_offsets': is missing"),
        (lambda p: p.pop("w.shape"), "'w.shape': is missing"),
        (lambda p: p.update({"w.weight": np.zeros(3, np.float16)}), "stored twice"),
    ],
)
def test_packed_weight(tmp_path, edit, match):
    assert set(read_all(model_dir(tmp_path, model__safetensors=packed()))) == {"w.weight", "bias"}
    model_dir(tmp_path, model__safetensors=packed(edit))
    refused(tmp_path, match, "model.safetensors")


def test_dense_tensors_may_have_the_names_of_parts(tmp_path):
    tensors = {"a.shape": np.zeros(3, np.float16), "b.bitmask": np.zeros(3, np.uint8)}
    model_dir(tmp_path, model__safetensors=safetensors_bytes(tensors))
    assert set(read_all(tmp_path)) == set(tensors)


# --- msgpack ---


def flax_array(shape, dtype="float16", data=b"", code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data), use_bin_type=True))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"w": flax_array((HUGE, HUGE))}, "needs 2199023255552 bytes, but 0"),
        ({"w": flax_array((2**63, 2**63))}, "larger than any file"),
        ({"w": flax_array((-1, 4))}, "unsigned"),
        ({"w": flax_array((2,), "object", b"1234")}, "dtype 'object'"),
        ({"w": flax_array((2,), "V2", b"1234")}, "dtype 'V2'"),
        ({"w": flax_array((2,), "float16", b"123")}, "but 3 are declared"),
        ({"w": flax_array((1,) * 12, "float16", b"12")}, "at most 8 dim"),
        ({"w": flax_array((2,), "float16", b"1234", code=2)}, "extension 2 is not an array"),
        ({"w": flax_array((2,), "float16", b"1234", code=5)}, "extension 5 is not an array"),
        ({"w": msgpack.ExtType(1, b"")}, "only"),
        ({"w": msgpack.ExtType(1, b"\x93")}, "only|short array"),
        ({"w": 3}, "a number where an array belongs"),
        ({"w": True}, "a number where an array belongs"),
        ({"w": "text"}, "has no place"),
        ({"w": None}, "has no place"),
        ({"w": [1]}, "has no place"),
        ({3: flax_array((0,))}, "not a string"),
        ({"x" * 300: flax_array((0,))}, "at most 256"),
        ({"a" * 200: {"b" * 200: flax_array((0,))}}, "over 256 characters"),
        ({"w": {"kernel": flax_array((2,), "float16", b"1234")}}, r"kernel of shape \[2\]"),
        ({"w": {"scale": flax_array((0,)), "embedding": flax_array((0,))}}, "is taken"),
        ({"w": {"__msgpack_chunked_array__": True}}, "not numbered from 0"),
        ({"w": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {}}}, "not flat"),
        (
            {"w": {"__msgpack_chunked_array__": True, "shape": {"0": HUGE, "1": HUGE},
                   "chunks": {"0": flax_array((2,), "float16", b"1234")}}},
            "the chunks hold 4",
        ),
        (
            {"w": {"__msgpack_chunked_array__": True, "shape": {"0": True},
                   "chunks": {"0": flax_array((2,), "float16", b"1234")}}},
            "non-negative integers",
        ),
        ({}, "holds no tensors"),
        ([], "has no place"),
    ],
)  # fmt: skip
def test_flax_value(tmp_path, value, match):
    model_dir(tmp_path, flax_model__msgpack=msgpack.packb(value))
    refused(tmp_path, match, "flax_model.msgpack")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "only 0 are there"),
        (b"\xdf\xff\xff\xff\xff", "only 5 are there"),
        (b"\x81\xa1w\xc9\xff\xff\xff\xff\x01", "are there"),
        (b"\x81\xa1w" * 1000 + b"\x00", "levels"),
        (b"\x82\xa1w\x80\xa1w\x80", "appears twice"),
        (b"\x81\xa1\xff\x80", "not UTF-8"),
        (b"\x80\x80", "bytes follow"),
        (b"\xc1", "0xc1 has no place"),
    ],
)
def test_flax_bytes(tmp_path, data, match):
    model_dir(tmp_path, flax_model__msgpack=data)
    refused(tmp_path, match, "flax_model.msgpack")


# --- torch ---


class Runs:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_that_call_are_refused_and_not_run(tmp_path, protocol):
    marker = tmp_path / "ran"
    values = [
        Runs(os.system, f"touch {marker}"),
        Runs(eval, f"open({str(marker)!r}, 'w')"),
        Runs(__import__, "os"),
    ]
    for value in values:
        for state in (value, {"w": value}, {"w": [value]}, {value: 1}, [value]):
            pickled = pickle.dumps(state, protocol)
            data = torch_bytes(tmp_path / "x", {}, pickled)
            model_dir(tmp_path / "m", pytorch_model__bin=data)
            refused(tmp_path / "m", "nothing that a checkpoint names is imported|opcode",
                    "pytorch_model.bin")  # fmt: skip
    assert not marker.exists()


def tensor(key="0", numel=6, offset=0, shape=(2, 3), stride=(3, 1), kind="Half"):
    return op_tensor(op_storage(kind, key, numel), offset, shape, stride)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (tensor(shape=(HUGE, HUGE)), "reaches past its storage"),
        (tensor(shape=(HUGE, HUGE), stride=(0, 0)), "reaches past its storage"),
        (tensor(shape=(2**62, 2**62), stride=(0, 0)), "larger than any file"),
        (tensor(shape=(2, 4), stride=(0, 1)), "reaches past its storage"),
        (tensor(numel=HUGE * HUGE, shape=(HUGE, HUGE)), "storage '0' holds 12 bytes"),
        (tensor(offset=1), "reaches past its storage"),
        (tensor(offset=-1), "storage offset"),
        (tensor(offset=2**70), "reaches past its storage"),
        (tensor(stride=(-3, 1)), "stride"),
        (tensor(stride=(3,)), "stride"),
        (tensor(stride=(2**62, 1)), "reaches past its storage"),
        (tensor(shape=(2, -3)), "non-negative"),
        (tensor(shape=(1,) * 40, stride=(1,) * 40), "at most 8 dim"),
        (tensor(key="1"), "'archive/data/1': is not in the archive"),
        (tensor(key="../../etc/passwd"), "is not in the archive"),
        (tensor(numel=7), "holds 12 bytes"),
        (tensor(kind="Float"), "holds 12 bytes"),
        (tensor(kind="Quantized"), "'torch'.'QuantizedStorage'"),
        (op_storage("Half", "0", 6), "is a storage, not a tensor"),
        (op_int(3), "is a int, not a tensor"),
        (b"cos\nsystem\n", "'os'.'system'"),
        (b"ctorch\nload\n", "'torch'.'load'"),
        (b"ctorch\nHalfStorage.__reduce__\n", "'torch'.'HalfStorage.__reduce__'"),
        (b"ctorch._utils\n_rebuild_parameter\n", "_rebuild_parameter"),
        (b"ccollections\nOrderedDict\n)\x81", "opcode NEWOBJ"),
        (b"ccollections\nOrderedDict\n(](lt\x85R", "opcode LIST|OrderedDict from"),
        (b"ctorch\nHalfStorage\n)R", "calls HalfStorage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "with 0 arguments"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(KKKKKKKKKKKKtR", "without a storage"),
        (b"K\x01)R", "not a function"),
        (b"K\x01Q", "not a storage"),
        (b"(X\x07\0\0\0storageK\0K\0K\0K\0tQ", "unknown type"),
        (b"h\x07", "never stored"),
        (b"0" * 9, "opcode POP"),
        (b"\x93", "empty stack|imported"),
        (b"t", "tensor|mark|key"),
        (b"\x86" * 9, "empty stack"),
        (b"\x82\x01", "opcode EXT1"),
        (b"P1\n", "opcode PERSID"),
        (b"\x96" + b"\xff" * 7 + b"\x7f", "opcode"),
        (b"\x8d" + b"\xff" * 7 + b"\x7f", "opcode"),
        (b"K\0r\xff\xff\xff\xff", "is a int, not a tensor"),
        (b"\x80\xff", "tensor|pickle|key"),
    ],
)  # fmt: skip
def test_torch_value(tmp_path, value, match):
    good = {"data/0": bytes(12)}
    data = torch_bytes(tmp_path / "x", {}, op_dict({"w": value}), good)
    model_dir(tmp_path / "m", pytorch_model__bin=data)
    refused(tmp_path / "m", match, "pytorch_model.bin")


def test_a_nested_tuple_as_a_key_does_not_hang(tmp_path):
    """t = (t, t), 64 deep: hashing it, as an unpickler would, takes 2^64 steps."""
    deep = b"K\x01" + b"q\0h\0\x86" * 64
    data = torch_bytes(tmp_path / "x", {}, b"\x80\x02}" + deep + b"K\x01s.")
    model_dir(tmp_path / "m", pytorch_model__bin=data)
    refused(tmp_path / "m", "key that is a tuple")


def test_many_names_of_one_storage(tmp_path):
    items = {f"w{i}": tensor(numel=50_000, shape=(50_000,), stride=(1,)) for i in range(300)}
    extra = {"data/0": bytes(100_000)}
    data = torch_bytes(tmp_path / "x", {}, op_dict(items), extra)
    model_dir(tmp_path / "m", pytorch_model__bin=data)
    refused(tmp_path / "m", "declares 30000000 bytes of tensors")


def test_torch_archives(tmp_path):
    array = {"w": np.zeros((HUGE,), np.float16)}

    def refuse(data, match):
        model_dir(tmp_path / "m", pytorch_model__bin=data)
        refused(tmp_path / "m", match, "pytorch_model.bin")

    bomb = torch_bytes(tmp_path / "x", array, compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 10_000
    refuse(bomb, "compressed or encrypted")
    torch_bytes(tmp_path / "x", array)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "x", "a") as f:
        f.writestr("archive/data/0", bytes(2 * HUGE))
    refuse((tmp_path / "x").read_bytes(), "appears twice")
    with zipfile.ZipFile(tmp_path / "x", "w") as f:
        f.writestr("a/data.pkl", op_dict({}))
        f.writestr("a/byteorder", b"big")
    refuse((tmp_path / "x").read_bytes(), "not little-endian")
    with zipfile.ZipFile(tmp_path / "x", "w") as f:
        f.writestr("a/data.pkl", op_dict({}))
        f.writestr("b/data.pkl", op_dict({}))
    refuse((tmp_path / "x").read_bytes(), "2 of them")
    with zipfile.ZipFile(tmp_path / "x", "w") as f:
        f.writestr("data.pkl", op_dict({}))
    refuse((tmp_path / "x").read_bytes(), "0 of them")
    refuse(torch_bytes(tmp_path / "x", {}, op_dict({})), "holds no tensors")
    refuse(torch_bytes(tmp_path / "x", {}, op_dict({}) + bytes(2 << 20)), "over the limit")
    refuse(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before version 1.6; convert")
    refuse(b"\x80\x02}.", "not a torch zip")
    refuse(b"", "not a torch zip")
    refuse(b"PK\x03\x04", "no end record")


def test_zip_members_may_not_overlap(tmp_path):
    """Every directory entry points to the same large member."""
    data = bytearray(torch_bytes(tmp_path / "x", {"w": np.zeros(100_000, np.float16)}))
    at = data.rfind(b"PK\x05\x06")
    count, size, start = struct.unpack_from("<H2L", data, at + 10)
    entry = data[start:].index(b"archive/data/0") + start - 46
    record = data[entry : entry + 46 + len("archive/data/0")]
    for i in range(60):
        copy = bytearray(record)
        copy[-2:] = b"%02d" % i
        copy[28:30] = struct.pack("<H", len(copy) - 46)
        data[at:at] = copy
        at += len(copy)
        size += len(copy)
        count += 1
    struct.pack_into("<2H2L", data, at + 8, count, count, size, start)
    model_dir(tmp_path / "m", pytorch_model__bin=bytes(data))
    refused(tmp_path / "m", "larger than the file")


def test_zip64(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    array = {"w": np.arange(300, dtype=np.float16)}
    data = torch_bytes(tmp_path / "x", array)
    assert b"PK\x06\x06" in data
    model_dir(tmp_path / "m", pytorch_model__bin=data)
    assert (read_all(tmp_path / "m")["w"] == array["w"]).all()


def try_to_read(path) -> CheckpointError | None:
    try:
        read_all(path)
        return None
    except CheckpointError as e:
        return e


# --- every format: too large, cut, and changed at random ---


def four_tebibytes(tmp_path) -> dict[str, bytes]:
    shape = [2 * HUGE, HUGE]  # float16

    def declare(header):
        entry = header["w"]
        entry["shape"], entry["data_offsets"] = shape, [0, 4 << 40]

    packed = packed_parts("w.weight", np.eye(8, dtype=np.float16))
    packed["w.shape"][:] = shape
    w = tensor(numel=2 * HUGE * HUGE, shape=tuple(shape), stride=(HUGE, 1))
    return {
        "model.safetensors": safetensors_bytes({"w": np.zeros(6, np.float16)}, declare),
        "packed/model.safetensors": safetensors_bytes(packed),
        "flax_model.msgpack": msgpack.packb({"w": flax_array(shape)}),
        "pytorch_model.bin": torch_bytes(
            tmp_path / "x", {}, op_dict({"w": w}), {"data/0": bytes(12)}
        ),
    }


def test_four_tebibytes_are_refused_at_once(tmp_path):
    """Within a second and 64 MB, says `refused`."""
    for name, data in four_tebibytes(tmp_path).items():
        directory, name = (tmp_path / name).parent, pathlib.Path(name).name
        (model_dir(directory) / name).write_bytes(data)
        refused(directory, "bytes|does not fit|larger than", name)
        (directory / name).unlink()
    index = json.dumps({"weight_map": {"w": "a.safetensors"}})
    model_dir(tmp_path / "m", a__safetensors=four_tebibytes(tmp_path)["model.safetensors"])
    (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
    refused(tmp_path / "m", "needs bytes", "a.safetensors")


def samples(tmp_path) -> dict[str, bytes]:
    w = weights()
    parts = dict(w)
    name = "model.decoder.layers.0.fc1.weight"
    parts |= packed_parts(name, parts.pop(name))
    return {
        "model.safetensors": safetensors_bytes(parts),
        "flax_model.msgpack": flax.serialization.to_bytes(flax_tree(w)),
        "pytorch_model.bin": torch_bytes(tmp_path / "x", w),
    }


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"])
def test_truncated_anywhere(tmp_path, name):
    data = samples(tmp_path)[name]
    model_dir(tmp_path / "m")
    cuts = {*range(0, len(data), 37), *range(64), *range(len(data) - 64, len(data))}
    for cut in cuts:
        (tmp_path / "m" / name).write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            read_all(tmp_path / "m")


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"])
def test_mutated(tmp_path, name):
    """1,500 mutations of each format; tests/stress/fuzz_checkpoint.py runs any number."""
    data = samples(tmp_path)[name]
    rng = np.random.default_rng(7)
    model_dir(tmp_path / "m")
    survived = 0
    for _ in range(1500):
        (tmp_path / "m" / name).write_bytes(mutate(data, rng, focus=1500))
        error = try_to_read(tmp_path / "m")
        survived += error is None
        if error is not None:
            assert pathlib.Path(error.file).name == name
            assert error.field
            str(error).encode()
    assert 0 < survived < 1500  # some only change values


def test_mutated_index(tmp_path):
    w = weights()
    model_dir(tmp_path, a__safetensors=safetensors_bytes(w))
    index = json.dumps({"weight_map": dict.fromkeys(w, "a.safetensors")}).encode()
    rng = np.random.default_rng(7)
    for _ in range(500):
        data = mutate(index, rng, focus=len(index))
        (tmp_path / "model.safetensors.index.json").write_bytes(data)
        error = try_to_read(tmp_path)
        assert error is None or error.field


def test_the_helpers_write_what_they_say():
    assert contiguous((2, 3)) == [3, 1]
    assert pickle.loads(b"\x80\x02" + op_ints([1, -(2**31), 2**40]) + b".") == (1, -(2**31), 2**40)
    assert pickle.loads(b"\x80\x02" + op_text("é") + b".") == "é"
