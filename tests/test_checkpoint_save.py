"""Writing: the whole directory or nothing, through crashes and full disks."""

import errno
import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from checkpoint_files import FLOATS, same, weights

from jax_flashllm.models.checkpoint import (
    CheckpointError,
    check_destination,
    open_checkpoint,
    save,
    save_packed,
)

CONFIG = {"model_type": "opt", "vocab_size": 19}


def check(path, expected, packed=()):
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint.names()) == set(expected)
        for name, array in expected.items():
            assert checkpoint.is_sparse(name) == (name in packed), name
            assert same(checkpoint.read(name), array)
        return checkpoint.config


def is_large(name):
    return "layers.0" in name and name.endswith("weight")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shard", [5_000_000_000, 700, 1])
def test_round_trip(tmp_path, dtype, shard):
    w = weights(dtype) | {"scalar": np.array(2, np.int64), "empty": np.zeros((0, 3), np.uint8)}
    (tmp_path / "tokenizer.json").write_text("{}")
    out, seen = tmp_path / "a" / "out", []
    size = save_packed(
        out, CONFIG, iter(w.items()), is_large, [tmp_path / "tokenizer.json"],
        max_shard_bytes=shard, progress=lambda name, stored: seen.append(name),
    )  # fmt: skip
    packed = [name for name in w if is_large(name)]
    config = check(out, w, packed)
    assert seen == list(w)
    assert {k: config[k] for k in CONFIG} == CONFIG
    targets = config["quantization_config"]["sparsity_config"]["targets"]
    assert targets == [name.removesuffix(".weight") for name in packed]
    files = sorted(f.name for f in out.iterdir())
    assert ("model.safetensors" in files) == (shard > 10_000)
    assert "tokenizer.json" in files
    assert not [f for f in files if f.startswith(("spool", "shard"))]
    assert size == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert os.listdir(out.parent) == ["out"]
    for file in out.glob("*.safetensors"):
        with safetensors.safe_open(file, "numpy") as f:  # the library accepts them
            assert f.metadata() == {"format": "pt"}
        length = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + length])
        header.pop("__metadata__")
        itemsize = {"I64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
        for entry in header.values():  # torch views each tensor in place
            assert (8 + length + entry["data_offsets"][0]) % itemsize[entry["dtype"]] == 0


def test_packs_what_becomes_smaller_unless_told(tmp_path):
    dense, sparse = np.ones((16, 64), np.float16), np.zeros((16, 64), np.float16)
    sparse[:, ::4] = 1
    w = {"dense.weight": dense, "sparse.weight": sparse, "norm.weight": np.zeros(64, np.float16)}
    save_packed(tmp_path / "a", CONFIG, w.items())
    check(tmp_path / "a", w, packed=["sparse.weight"])
    save_packed(tmp_path / "b", CONFIG, w.items(), {"dense.weight"})
    check(tmp_path / "b", w, packed=["dense.weight"])
    save_packed(tmp_path / "c", CONFIG, w.items(), ())
    assert "quantization_config" not in check(tmp_path / "c", w)


def test_jax_arrays(tmp_path):
    w = {"a.weight": jnp.eye(32, dtype=jnp.bfloat16)}
    save_packed(tmp_path / "out", CONFIG, w.items())
    check(tmp_path / "out", {"a.weight": np.eye(32, dtype=ml_dtypes.bfloat16)}, ["a.weight"])


def test_an_existing_destination(tmp_path):
    out = tmp_path / "out"
    old, new = {"w": np.zeros(3, np.float16)}, {"w": np.ones(3, np.float16)}
    save_packed(out, CONFIG, old.items())
    with pytest.raises(CheckpointError, match="exists; choose another directory, or allow"):
        save_packed(out, CONFIG, new.items())
    check(out, old)
    save_packed(out, CONFIG, new.items(), overwrite=True)
    check(out, new)

    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds \['thesis.tex'\], which no packed model"):
        save_packed(out, CONFIG, old.items(), overwrite=True)
    (out / "thesis.tex").unlink()
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="which no packed model"):
        save_packed(out, CONFIG, old.items(), overwrite=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(out)
    for name in ("file", "link"):
        with pytest.raises(CheckpointError, match="is not a directory"):
            save_packed(tmp_path / name, CONFIG, old.items(), overwrite=True)
    with pytest.raises(CheckpointError, match="file is not a directory"):
        save_packed(tmp_path / "file" / "out", CONFIG, old.items())
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "out"]


def test_replacing_without_an_atomic_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "_exchange", lambda a, b: False)
    old, new = {"w": np.zeros(3, np.float16)}, {"w": np.ones(3, np.float16)}
    save_packed(tmp_path / "out", CONFIG, old.items())
    save_packed(tmp_path / "out", CONFIG, new.items(), overwrite=True)
    check(tmp_path / "out", new)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("tensors", "sparse", "files", "match"),
    [
        ([], None, [], "there are none to save"),
        ([("a", np.zeros(2, "f2"))] * 2, None, [], "'a': is given twice"),
        ([("__metadata__", np.zeros(2, "f2"))], None, [], "is given twice, or"),
        ([("a", np.zeros(2, "c8"))], None, [], "dtype complex64; cast it"),
        ([("a", np.zeros(2, object))], None, [], "dtype object; cast it"),
        ([("a.weight", np.zeros(2, "f2"))], ["a.weight"], [], "only 2-D tensors"),
        ([("a", np.zeros((2, 2), "f2"))], ["a"], [], "only 2-D tensors"),
        (
            [("a.shape", np.zeros(2, "f2")), ("a.weight", np.zeros((2, 2), "f2"))],
            ["a.weight"], [], "name of a part",
        ),
        (
            [("a.weight", np.zeros((2, 2), "f2")), ("a.shape", np.zeros(2, "f2"))],
            ["a.weight"], [], "given twice|name of a part",
        ),
        ([("a.compressed", np.zeros(2, "f2"))], None, [], "name of a part"),
        ([("a", np.zeros(2, "f2"))], None, ["absent.json"], "is not there"),
        ([("a", np.zeros(2, "f2"))], None, ["config.json"], "already taken"),
        ([("a", np.zeros(2, "f2"))], None, ["vocab.json"] * 2, "already taken"),
    ],
)  # fmt: skip
def test_errors(tmp_path, tensors, sparse, files, match):
    for name in files:
        if name != "absent.json":
            (tmp_path / name).write_text("{}")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=match):
        save_packed(tmp_path / "out", CONFIG, tensors, sparse, [tmp_path / f for f in files])
    assert sorted(os.listdir(tmp_path)) == before


def test_a_config_that_is_not_json(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: JSON: cannot be written.*nan"):
        save_packed(tmp_path / "out", {"x": float("nan")}, weights().items())
    assert os.listdir(tmp_path) == []


class Full:
    """Lets so many calls through, then the disk is full."""

    def __init__(self, function, calls):
        self.function, self.calls = function, calls

    def __call__(self, *args, **kwargs):
        self.calls -= 1
        if self.calls < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize(
    "where", ["os.fsync", "os.rename", "shutil.copyfileobj", "shutil.copyfile"]
)
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, where, calls):
    """At whatever call the space ends: the old directory stays, nothing else does."""
    old, new = {"w": np.zeros(3, np.float16)}, weights()
    out, tokenizer = tmp_path / "out", tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    save_packed(out, CONFIG, old.items())
    module, function = where.split(".")
    target = getattr(save, module)
    monkeypatch.setattr(target, function, Full(getattr(target, function), calls))
    try:
        save_packed(out, CONFIG, new.items(), is_large, [tokenizer], overwrite=True)
        check(out, new, [n for n in new if is_large(n)])
    except CheckpointError as e:
        message = str(e)
        assert "the disk is full; free space" in message
        monkeypatch.undo()
        check(out, old)
    assert sorted(os.listdir(tmp_path)) == ["out", "tokenizer.json"]


def test_a_failure_leaves_no_new_directories(tmp_path):
    def tensors():
        yield "w.weight", np.ones((2, 2), np.float16)
        (tmp_path / "a" / "theirs").mkdir()  # of somebody else, meanwhile
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="the disk is full"):
        save_packed(tmp_path / "a" / "b" / "c", {}, tensors())
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["a", "a/theirs"]
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_packed(tmp_path / "a" / "d" / ("e" * 300) / "f", {}, tensors())
    assert not (tmp_path / "a" / "d").exists()


def test_a_destination_that_somebody_else_made_meanwhile_is_left(tmp_path):
    def tensors():
        yield "w.weight", np.ones((2, 2), np.float16)
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "theirs").write_text("")

    with pytest.raises(CheckpointError, match="somebody else made it meanwhile; choose another"):
        save_packed(tmp_path / "m", {}, tensors())
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "theirs"]


@pytest.mark.parametrize(
    ("out", "match"),
    [("nodir/..", r"ends in '\.\.'"), ("file/a/b", "file is not a directory; choose another")],
)
def test_a_destination_can_be_checked_before_the_work(tmp_path, out, match):
    (tmp_path / "file").write_text("")
    for check in (check_destination, lambda path: save_packed(path, {}, [])):
        with pytest.raises(CheckpointError, match=match):
            check(os.path.join(tmp_path, out))
    check_destination(tmp_path / "new" / "deeper")
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_of_the_source_leaves_nothing(tmp_path):
    def tensors():
        yield "a", np.zeros(1000, np.float16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_packed(tmp_path / "out", CONFIG, tensors())
    assert os.listdir(tmp_path) == []
