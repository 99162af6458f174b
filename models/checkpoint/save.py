"""Writes a packed model directory: whole, or not at all.

    out/config.json          with the entry by which compressed-tensors knows the layout
    out/tokenizer files      copied
    out/model.safetensors    or model-00001-of-0000N.safetensors and their index

Everything is written into a temporary directory beside `out`, flushed to the disk, then renamed.
A crash leaves the old directory or the new one, and at worst a `.out.tmp-*` directory to delete.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from . import bitmask
from .base import DTYPES, CheckpointError, quote

_CODES = {dtype: code for code, dtype in DTYPES.items()}
# What a directory to be replaced may hold besides the files that are about to be written.
_OURS = frozenset({
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "model.safetensors", "model.safetensors.index.json",
})  # fmt: skip


def save_packed(
    out_dir: str | os.PathLike,
    config: dict,
    tensors: Iterable[tuple[str, np.ndarray]],
    sparse: Collection[str] | Callable[[str], bool] | None = None,
    tokenizer_files: Sequence[str | os.PathLike] = (),
    *,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[str, int], None] | None = None,
) -> int:
    """Writes `tensors` to `out_dir` and returns the bytes of the weight files.

    config: becomes config.json.   tensors: (name, array) in torch's names and layouts, consumed
    once and one at a time; NumPy or JAX arrays.
    sparse: which 2-D weights (names ending in `.weight`) become bitmasks: names, a predicate, or
    None for those that become smaller. The rest are stored dense.
    tokenizer_files: files copied beside the weights.   overwrite: replace an existing packed
    directory; it stays as it is until the new one is whole.
    progress: called with (name, bytes stored) after each tensor.

    While it runs, the disk holds one shard twice. Raises CheckpointError, and leaves nothing
    behind, when `out_dir` exists, a name repeats, or the disk is full.
    """
    out = Path(os.path.abspath(out_dir))
    check_destination(out_dir, tokenizer_files, overwrite=overwrite)
    copies = {Path(f).name: Path(f) for f in tokenizer_files}
    with new_parents(out), _temporary(out) as temporary:
        shards = _Shards(out, temporary, max_shard_bytes)
        for name, value in tensors:
            stored = shards.add(name, np.asarray(value), sparse)
            if progress is not None:
                progress(name, stored)
        shards.finish()
        config = _describe(config, shards)
        _write(temporary / "config.json", _json(config, out / "config.json"))
        for name, source in copies.items():
            shutil.copyfile(source, temporary / name)
            _sync(temporary / name)
        _sync(temporary)
        _publish(temporary, out, overwrite)
        _sync(out.parent)
        return shards.total_bytes


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A directory beside `out`, gone at the end; an OSError inside becomes a CheckpointError."""
    path = None
    try:
        path = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
        os.chmod(path, 0o777 & ~_umask())  # mkdtemp makes it private
        yield path
    except OSError as e:
        raise _write_error(out, e) from e
    finally:
        # After a swap this is the old directory, after a failure the unfinished one.
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)


class _Shards:
    """Collects tensors into safetensors files of bounded size.

    A safetensors header comes before the data and needs the sizes, which for a packed weight are
    known only once it is packed. So the bytes of a shard go to one spool file per item size
    first; the shard is the header and the spools, widest items first, which keeps every tensor
    aligned as torch requires.
    """

    def __init__(self, out: Path, directory: Path, max_bytes: int):
        self.out, self.directory, self.max_bytes = out, directory, max_bytes
        self.weight_map: dict[str, str] = {}
        self.packed: list[str] = []
        self.zeros = self.weights = 0  # over the packed weights
        self.total_bytes = 0
        self._files: list[Path] = []
        self._where: dict[str, int] = {}
        self._names: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        self._spools: dict[int, list] = {8: [], 4: [], 2: [], 1: []}
        self._size = 0

    def add(self, name: str, value: np.ndarray, sparse) -> int:
        if type(name) is not str or name in self._names or name == "__metadata__":
            raise CheckpointError(
                self.out,
                f"tensor {quote(name)}",
                "is given twice, or its name is not a usable string; give each tensor its own name",
            )
        self._names.add(name)
        if value.dtype not in _CODES:
            raise CheckpointError(
                self.out,
                f"tensor {quote(name)}",
                f"has dtype {value.dtype}; cast it to one of {', '.join(d.name for d in _CODES)}",
            )
        parts = {name: value}
        if _wants_packing(self.out, name, value, sparse):
            packed = bitmask.pack(value)
            head = name.removesuffix(".weight")
            size = sum(part.nbytes for part in packed.values())
            if sparse is not None or size < value.nbytes:
                parts = {f"{head}.{part}": array for part, array in packed.items()}
                self.packed.append(head)
                self.weights += value.size
                self.zeros += value.size - packed["compressed"].size
        size = sum(part.nbytes for part in parts.values())
        if self._size and self._size + size > self.max_bytes:
            self._end()
        for part, array in parts.items():
            # A dense `x.compressed` would be read as part of a packed weight.
            if part in self._where or (part == name and name.endswith(".compressed")):
                raise CheckpointError(
                    self.out,
                    f"tensor {quote(part)}",
                    "is the name of a part of a packed weight; rename it",
                )
            self._put(part, np.asarray(array, order="C"))
        self._size += size
        return size

    def _put(self, name: str, array: np.ndarray) -> None:
        spool = self.directory / f"spool-{array.dtype.itemsize}"
        with open(spool, "ab") as f:
            f.write(array.reshape(-1).view(np.uint8).data)
        self._spools[array.dtype.itemsize].append((name, array.dtype, array.shape, array.nbytes))
        self._where[name] = len(self._files)

    def _end(self) -> None:
        header: dict = {"__metadata__": {"format": "pt"}}
        at = 0
        for entries in self._spools.values():
            for name, dtype, shape, size in entries:
                header[name] = {
                    "dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]
                }  # fmt: skip
                at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = self.directory / f"shard-{len(self._files)}"
        with open(path, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for itemsize in self._spools:
                spool = self.directory / f"spool-{itemsize}"
                if spool.exists():
                    with open(spool, "rb") as source:
                        shutil.copyfileobj(source, f, 16 << 20)
                    spool.unlink()
            f.flush()
            os.fsync(f.fileno())
            self.total_bytes += f.tell()
        self._files.append(path)
        self._begin()

    def finish(self) -> None:
        """Writes the last shard and gives the files their final names."""
        if not self._names:
            raise CheckpointError(self.out, "tensors", "there are none to save")
        self._end()
        count = len(self._files)
        if count == 1:
            self._files[0].rename(self.directory / "model.safetensors")
            return
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for path, name in zip(self._files, names, strict=True):
            path.rename(self.directory / name)
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": {tensor: names[i] for tensor, i in self._where.items()},
        }
        text = _json(index, self.out / "model.safetensors.index.json")
        _write(self.directory / "model.safetensors.index.json", text)


def _wants_packing(out: Path, name: str, value: np.ndarray, sparse) -> bool:
    possible = value.ndim == 2 and name.endswith(".weight") and value.dtype != np.bool_
    if sparse is None:
        return possible
    chosen = bool(sparse(name)) if callable(sparse) else name in sparse
    if chosen and not possible:
        raise CheckpointError(
            out,
            f"tensor {quote(name)}",
            f"has shape {list(value.shape)}; only 2-D tensors named *.weight can be packed",
        )
    return chosen


def _describe(config: dict, shards: _Shards) -> dict:
    """Adds what compressed-tensors 0.14 looks for: its method, and a sparsity_config."""
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    if shards.packed:
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "version": "0.14.0.1",
            "sparsity_config": {
                "format": "sparse-bitmask",
                "sparsity_structure": "unstructured",
                "global_sparsity": round(shards.zeros / max(shards.weights, 1), 6),
                "targets": shards.packed,
                "ignore": [],
            },
        }
    return config


def check_destination(
    out_dir: str | os.PathLike,
    tokenizer_files: Sequence[str | os.PathLike] = (),
    *,
    overwrite: bool = False,
) -> None:
    """Raises CheckpointError where `save_packed` would refuse `out_dir` or `tokenizer_files`.

    For callers with hours of work before they save.
    """
    out = Path(os.path.abspath(out_dir))
    if Path(out_dir).name == "..":
        raise CheckpointError(out_dir, "destination", "ends in '..'; name the directory itself")
    copies = {Path(f).name: Path(f) for f in tokenizer_files}
    for name, source in copies.items():
        if not source.is_file():
            raise CheckpointError(source, "tokenizer file", "is not there; check the path")
        if name == "config.json" or name.startswith("model") or len(copies) != len(tokenizer_files):
            raise CheckpointError(
                source,
                "tokenizer file",
                "has a name that is already taken in "
                "the output; pass each file once, and no weights",
            )
    above = next((p for p in out.parents if os.path.lexists(p)), out)
    if not os.path.isdir(above):
        raise CheckpointError(
            out, "destination", f"{above} is not a directory; choose another place"
        )
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise CheckpointError(
            out, "destination", "exists; choose another directory, or allow overwriting"
        )
    if out.is_symlink() or not out.is_dir():
        raise CheckpointError(out, "destination", "is not a directory; choose another one")
    # Replacing deletes: never a directory that holds something else.
    foreign = sorted(
        f.name for f in out.iterdir()
        if not f.is_file() or not (f.name in _OURS or f.name in copies
                                   or f.match("model-*-of-*.safetensors"))
    )  # fmt: skip
    if foreign:
        raise CheckpointError(
            out,
            "destination",
            f"holds {foreign[:3]}, which no packed model has; choose another directory",
        )


@contextlib.contextmanager
def new_parents(out: Path) -> Iterator[None]:
    """Makes the directories above `out`; a failure inside takes those along that are empty again.

    Raises CheckpointError where they cannot be made.
    """
    missing = list(itertools.takewhile(lambda p: not os.path.exists(p), out.parents))
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise _write_error(out, e) from e
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _publish(temporary: Path, out: Path, overwrite: bool) -> None:
    """Puts the finished directory at `out`; an old one ends up at `temporary`."""
    if not overwrite or not os.path.lexists(out):
        os.rename(temporary, out)
        return
    if _exchange(temporary, out):
        return
    # No atomic exchange here (macOS, some network disks): a crash between the two renames
    # leaves both directories whole, but the old one under its temporary name.
    aside = Path(f"{temporary}.old")
    os.rename(out, aside)
    try:
        os.rename(temporary, out)
    except OSError:
        os.rename(aside, out)
        raise
    os.rename(aside, temporary)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two directories in one step (Linux's renameat2); False where there is no such call."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def _json(value: dict, path: Path) -> bytes:
    try:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as e:
        raise CheckpointError(path, "JSON", f"cannot be written ({e}); use plain values") from e


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        # Some network disks cannot sync a directory; its files are synced by then.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(fd)
    finally:
        os.close(fd)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write_error(out: Path, e: OSError) -> CheckpointError:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        problem = "the disk is full; free space there or save elsewhere, nothing was left behind"
    elif e.errno in (errno.ENOTEMPTY, errno.EEXIST) and os.path.lexists(out):
        problem = "somebody else made it meanwhile; choose another directory, nothing was replaced"
    else:
        problem = f"cannot be written ({e.strerror or e}); check permissions or save elsewhere"
    return CheckpointError(out, "destination", problem)
