"""Opens a Hugging Face model directory: which files hold the weights, and what is in them.

    safetensors   model.safetensors      or model.safetensors.index.json + shards
    msgpack       flax_model.msgpack     or flax_model.msgpack.index.json + shards
    torch         pytorch_model.bin      or pytorch_model.bin.index.json + shards

The first line that is present is read. Nothing is imported, run or downloaded because a file
names it; tensors are read one at a time when asked for.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import bitmask, flax_file, safetensors_file, torch_file
from .base import CheckpointError, File, Tensor, quote, read_json

_FORMATS: list[tuple[str, str, Callable[[File], dict]]] = [
    ("model.safetensors", ".safetensors", safetensors_file.read_header),
    ("flax_model.msgpack", ".msgpack", flax_file.read_header),
    ("pytorch_model.bin", ".bin", torch_file.read_header),
]


class Checkpoint:
    """The tensors and the configuration of one model directory.

    Use it as a context manager; it holds its files open, so that replacing the directory
    meanwhile does not mix two checkpoints.
    """

    def __init__(self, path: Path, config: dict, tensors: dict[str, Tensor], files: list[File]):
        self.path, self.config = path, config
        self._tensors, self._files = tensors, files

    def names(self) -> list[str]:
        """Names of the logical tensors, in stored order; a packed weight counts once."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype; bfloat16 is ml_dtypes.bfloat16."""
        return self._find(name).dtype

    def is_sparse(self, name: str) -> bool:
        """Whether the tensor is stored as a sparse bitmask."""
        return isinstance(self._find(name), bitmask.Bitmask)

    def nnz(self, name: str) -> int | None:
        """Stored nonzeros of a packed weight; None for a dense tensor, which is not counted."""
        tensor = self._find(name)
        return tensor.nnz if isinstance(tensor, bitmask.Bitmask) else None

    def packed(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bits, row starts and values of a weight for which `is_sparse` is true, checked."""
        tensor = self._find(name)
        assert isinstance(tensor, bitmask.Bitmask)
        return tensor.parts()

    def stored_bytes(self, name: str) -> int:
        """Bytes that one tensor takes in the files."""
        return self._find(name).stored_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.size for file in self._files)

    @property
    def stamps(self) -> list[tuple[str, int, int]]:
        """(name, bytes, time of the last change in ns) of each weight file: others, if replaced."""
        return [(file.path.name, file.size, file.mtime_ns) for file in self._files]

    def read(self, name: str) -> np.ndarray:
        """Returns a new dense array in the stored dtype, torch's layout ([out, in])."""
        try:
            return self._find(name).read()
        except MemoryError as e:
            raise CheckpointError(
                self.path, f"tensor {quote(name)}", "does not fit in memory; free some"
            ) from e

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _find(self, name: str) -> Tensor:
        if name not in self._tensors:
            close = difflib.get_close_matches(name, self._tensors, n=1)
            hint = f"the nearest is {quote(close[0])}" if close else "see names()"
            raise CheckpointError(self.path, f"tensor {quote(name)}", f"is not here; {hint}")
        return self._tensors[name]

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self._tensors)} tensors, {self.nbytes} bytes)"


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens a model directory and checks every size, offset and name that its files declare.

    Raises CheckpointError for whatever is missing, damaged or hostile. Contents of tensors are
    checked by `Checkpoint.read`.
    """
    path = Path(path)
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise CheckpointError(
            path,
            "directory",
            f"{what}; pass a directory with config.json and "
            "model.safetensors, such as a downloaded Hugging Face model",
        )
    config = read_json(path / "config.json")
    files: list[File] = []
    try:
        tensors = _open_weights(path, files)
        if any(".compressed" in name for name in tensors):
            tensors = bitmask.group(tensors)
        if not tensors:
            files[0].fail("header", "holds no tensors; fetch the checkpoint again")
    except BaseException:
        for file in files:
            file.close()
        raise
    return Checkpoint(path, config, tensors, files)


def _open_weights(path: Path, files: list[File]) -> dict:
    for name, suffix, read_header in _FORMATS:
        if os.path.lexists(path / name):
            files.append(File(path / name))
            return read_header(files[0])
        index = path / f"{name}.index.json"
        if os.path.lexists(index):
            return _open_shards(path, index, suffix, read_header, files)
    raise CheckpointError(
        path,
        "weights",
        "none of "
        + ", ".join(f"{name}[.index.json]" for name, _, _ in _FORMATS)
        + " is here; fetch the checkpoint again",
    )


def _open_shards(path: Path, index: Path, suffix: str, read_header, files: list[File]) -> dict:
    """Reads the tensors that the index lists, each from the shard that it names."""
    weight_map = read_json(index).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError(index, "weight_map", "is not an object of names; fetch it again")
    held: dict[str, dict] = {}
    out = {}
    for name, shard in weight_map.items():
        field = f"weight_map[{quote(name)}]"
        plain = type(shard) is str and shard.endswith(suffix) and shard.isprintable()
        if not plain or "/" in shard or "\\" in shard or shard.startswith("."):
            raise CheckpointError(
                index,
                field,
                f"{quote(shard)} is not the plain name of a "
                f"{suffix} file beside the index; fetch the index again",
            )
        if shard not in held:
            if not os.path.isfile(path / shard):
                raise CheckpointError(
                    index, field, f"the shard {quote(shard)} is missing; fetch it too"
                )
            files.append(File(path / shard))
            held[shard] = read_header(files[-1])
        if suffix == ".msgpack":
            name = flax_file.torch_name(name)
        if name not in held[shard]:
            raise CheckpointError(
                index, field, f"{quote(shard)} does not hold this tensor; fetch both again"
            )
        if name in out:
            raise CheckpointError(index, field, f"{quote(name)} is listed twice")
        out[name] = held[shard][name]
    return out
