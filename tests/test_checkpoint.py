"""Reading: the same tensors come back bit for bit from every container."""

import json
import os
import pathlib
import time
import tracemalloc

import flax.serialization
import flax.traverse_util
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import (
    FLOATS,
    contiguous,
    flax_tree,
    model_dir,
    op_dict,
    op_storage,
    op_tensor,
    packed_parts,
    safetensors_bytes,
    same,
    torch_bytes,
    weights,
)

from jax_flashllm.models.checkpoint import (
    CheckpointError,
    base,
    open_checkpoint,
    save_packed,
)

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def check(path, expected, sparse=()):
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint.names()) == set(expected)
        for name, array in expected.items():
            assert checkpoint.shape(name) == np.shape(array)
            assert checkpoint.dtype(name) == np.asarray(array).dtype
            assert checkpoint.is_sparse(name) == (name in sparse)
            assert same(checkpoint.read(name), array), name
        assert checkpoint.nbytes > 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_safetensors(tmp_path, dtype):
    expected = weights(dtype)
    model_dir(tmp_path, model__safetensors=safetensors_bytes(expected))
    check(tmp_path, expected)


def test_safetensors_of_the_library_itself(tmp_path):
    expected = weights(np.float16) | {
        "scalar": np.array(3, np.float32),
        "flags": np.array([True, False]),
    }
    expected |= {"empty": np.zeros((0, 5), np.float32), "count": np.arange(4)}
    model_dir(tmp_path, model__safetensors=safetensors.numpy.save(expected, {"format": "pt"}))
    check(tmp_path, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_flax(tmp_path, dtype):
    expected = weights(dtype)
    tree = flax_tree(expected)
    for data in (tree, {"params": tree}):
        model_dir(tmp_path, flax_model__msgpack=flax.serialization.to_bytes(data))
        check(tmp_path, expected)


def test_flax_chunks(tmp_path, monkeypatch):
    expected = weights()
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    data = flax.serialization.msgpack_serialize(flax_tree(expected))
    assert b"__msgpack_chunked_array__" in data
    model_dir(tmp_path, flax_model__msgpack=data)
    check(tmp_path, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_torch(tmp_path, dtype):
    expected = weights(dtype) | {"count": np.arange(3), "scalar": np.zeros((), dtype)}
    model_dir(tmp_path, pytorch_model__bin=torch_bytes(tmp_path / "x", expected))
    check(tmp_path, expected)


def test_torch_views_of_one_storage(tmp_path):
    base = np.arange(60, dtype=np.float32)
    storage = op_storage("Float", "0", 60)
    expected = {
        "whole": base.reshape(6, 10),
        "tied": base.reshape(6, 10),
        "transposed": base.reshape(6, 10).T,
        "slice": base.reshape(6, 10)[2:5, 1::3],
        "row": base.reshape(6, 10)[3],
        "empty": np.zeros((0, 4), np.float32),
    }
    layouts = {
        "whole": (0, (6, 10), (10, 1)),
        "tied": (0, (6, 10), (10, 1)),
        "transposed": (0, (10, 6), (1, 10)),
        "slice": (21, (3, 3), (10, 3)),
        "row": (30, (10,), (1,)),
        "empty": (60, (0, 4), (4, 1)),
    }
    pickle = op_dict({name: op_tensor(storage, *layout) for name, layout in layouts.items()})
    data = torch_bytes(tmp_path / "x", {}, pickle, {"data/0": base.tobytes()})
    model_dir(tmp_path, pytorch_model__bin=data)
    check(tmp_path, {k: np.ascontiguousarray(v) for k, v in expected.items()})
    assert contiguous((6, 10)) == [10, 1]


def test_torch_file_made_by_torch():
    """fixtures/torch_zip holds what torch.save wrote (make_torch_zip.py beside it)."""
    expected = {
        "half": np.arange(12, dtype=np.float16).reshape(3, 4) - 5,
        "tied": np.arange(12, dtype=np.float16).reshape(3, 4) - 5,
        "brain": np.arange(5).astype(ml_dtypes.bfloat16),
        "single": np.linspace(-1, 1, 9, dtype=np.float32),
        "transposed": np.ascontiguousarray(np.arange(6, dtype=np.float32).reshape(2, 3).T),
        "position_ids": np.arange(4),
    }
    check(FIXTURES / "torch_zip", expected)


@pytest.mark.parametrize("kind", ["safetensors", "msgpack", "bin"])
def test_shards(tmp_path, kind):
    expected = weights()
    names = list(expected)
    stem = {"safetensors": "model", "msgpack": "flax_model", "bin": "pytorch_model"}[kind]
    weight_map = {}
    model_dir(tmp_path)
    for i in range(3):
        part = {name: expected[name] for name in names[i::3]}
        shard = f"{stem}-0000{i + 1}-of-00003.{kind}"
        keys = list(part)
        if kind == "safetensors":
            data = safetensors_bytes(part)
        elif kind == "bin":
            data = torch_bytes(tmp_path / "x", part)
        else:
            tree = flax_tree(part)
            keys = list(flax.traverse_util.flatten_dict(tree, sep="/"))
            data = flax.serialization.to_bytes(tree)
        (tmp_path / shard).write_bytes(data)
        weight_map |= dict.fromkeys(keys, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    check(tmp_path, expected)


@pytest.mark.parametrize("old_names", [False, True])
def test_packed_weights_written_by_hand(tmp_path, old_names):
    """Current files say layer.bitmask for layer.weight, older ones layer.weight.bitmask."""
    expected = weights(ml_dtypes.bfloat16)
    packed = [n for n in expected if "layers.0" in n and n.endswith("weight")]
    stored = {n: a for n, a in expected.items() if n not in packed}
    for name in packed:
        stored |= packed_parts(name + (".weight" if old_names else ""), expected[name])
    model_dir(tmp_path, model__safetensors=safetensors_bytes(stored))
    check(tmp_path, expected, sparse=packed)
    with open_checkpoint(tmp_path) as checkpoint:
        name = packed[0]
        nnz = np.count_nonzero(expected[name].view(np.uint16))
        assert checkpoint.nnz(name) == nnz
        assert checkpoint.stored_bytes(name) == 16 + 2 * nnz + 8 + 8 * 8
        assert checkpoint.nnz("model.decoder.final_layer_norm.bias") is None


@pytest.mark.parametrize("shape", [(0, 0), (0, 9), (9, 0), (1, 1), (3, 8), (3, 65), (70, 129)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_packing_any_shape_and_density(tmp_path, shape, density):
    rng = np.random.default_rng(1)
    bits = rng.integers(1, 2**16, shape, np.uint16)  # NaN payloads and -0.0 included
    bits[rng.random(shape) >= density] = 0
    expected = {"w.weight": bits.view(np.float16)}
    save_packed(tmp_path / "out", {"model_type": "opt"}, expected.items(), ["w.weight"])
    check(tmp_path / "out", expected, sparse=["w.weight"])


def test_order_of_formats(tmp_path):
    """safetensors, then msgpack, then torch."""
    for i, name in enumerate(["pytorch_model.bin", "flax_model.msgpack", "model.safetensors"]):
        value = {"w": np.full(1, i, np.float32)}
        data = {
            0: lambda v: torch_bytes(tmp_path / "x", v),
            1: flax.serialization.to_bytes,
            2: safetensors_bytes,
        }[i](value)
        model_dir(tmp_path)
        (tmp_path / name).write_bytes(data)
        check(tmp_path, value)


def test_an_open_checkpoint_survives_being_replaced(tmp_path):
    old, new = {"w": np.zeros(3, np.float16)}, {"w": np.ones(3, np.float16)}
    save_packed(tmp_path / "m", {}, old.items())
    with open_checkpoint(tmp_path / "m") as checkpoint:
        save_packed(tmp_path / "m", {}, new.items(), overwrite=True)
        assert same(checkpoint.read("w"), old["w"])
    check(tmp_path / "m", new)


def test_large_tensors_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "READ_STEP", 100)  # bytes
    expected = weights(np.float16)
    model_dir(tmp_path, model__safetensors=safetensors_bytes(expected))
    check(tmp_path, expected)
    with open_checkpoint(tmp_path) as checkpoint:
        file = tmp_path / "model.safetensors"
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="became shorter"):
            [checkpoint.read(name) for name in expected]


def test_unknown_names_and_closed_files(tmp_path):
    model_dir(tmp_path, model__safetensors=safetensors_bytes(weights()))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"nearest is 'model\.decoder.*fc1\.weight'"):
        checkpoint.read("decoder.layers.0.fc1.weight")
    checkpoint.close()
    with pytest.raises(CheckpointError, match="is closed"):
        checkpoint.read("model.decoder.layers.0.fc1.weight")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files on Linux")
def test_files_are_released(tmp_path):
    model_dir(tmp_path, model__safetensors=safetensors_bytes(weights()))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        open_checkpoint(tmp_path).close()
    (tmp_path / "model.safetensors").write_bytes(b"x" * 40)
    for _ in range(20):
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("kind", ["safetensors", "packed", "flax", "torch"])
def test_loading_takes_little_more_than_the_weights(tmp_path, kind):
    """A whole model, one tensor at a time, within 1.3x of its dense bytes."""
    rng = np.random.default_rng(0)
    w = {}
    for i in range(12):
        w[f"l{i}.weight"] = rng.standard_normal((512, 1024), dtype=np.float32).astype(np.float16)
        w[f"l{i}.weight"][:, ::2] = 0
    path = tmp_path / "m"
    if kind == "safetensors":
        model_dir(path, model__safetensors=safetensors_bytes(w))
    elif kind == "packed":
        save_packed(path, {}, w.items(), list(w))
    elif kind == "flax":
        model_dir(path, flax_model__msgpack=flax.serialization.to_bytes(flax_tree(w)))
    else:
        model_dir(path, pytorch_model__bin=torch_bytes(tmp_path / "x", w))
    tracemalloc.start()
    with open_checkpoint(path) as checkpoint:
        held = {name: checkpoint.read(name) for name in checkpoint.names()}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * sum(a.nbytes for a in held.values())


def test_expanding_ten_million_weights_is_fast(tmp_path):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((2500, 4000), dtype=np.float32).astype(np.float16)
    w[rng.random(w.shape, np.float32) < 0.7] = 0
    save_packed(tmp_path / "m", {}, [("w.weight", w)])
    with open_checkpoint(tmp_path / "m") as checkpoint:
        times = []
        for _ in range(5):
            start = time.process_time()
            got = checkpoint.read("w.weight")
            times.append(time.process_time() - start)
    assert same(got, w)
    assert min(times) < 0.3  # 0.05 s on two idle cores; room for a busy one
