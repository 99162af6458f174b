"""The finished blocks of a pruning run, on the disk.

    OUT.partial/run.json      what is being done: only the same run goes on from here
    OUT.partial/layers.3/     block 3 as pruned: a packed checkpoint, its errors in config.json

The directory is locked while a run is at work in it. Nothing is deleted that a run did not put
there: a directory that holds anything else is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_flashllm.models.checkpoint import (
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    save_packed,
)
from jax_flashllm.models.checkpoint.base import read_json

_BLOCK = re.compile(r"layers\.\d+")
_UNFINISHED = re.compile(r"\.layers\.\d+\.tmp-\w+")  # what a killed save_packed leaves
_BLOCK_FILE = re.compile(r"config\.json|model[\w.-]*\.safetensors|model\.safetensors\.index\.json")

Shapes = dict[str, tuple[int, ...]]


class Partial:
    """The directory at `path`, made or taken up again; `close` lets others have it.

    run: JSON values that say what is being done.   blocks: the matrices of each block.
    dtype: of the matrices.   warn: gets a line for every block that has to be done again.
    Raises ValueError when another run began the directory, is at work in it, or none made it.
    """

    _lock = -1

    def __init__(
        self,
        path: Path,
        run: dict[str, Any],
        blocks: Sequence[Shapes],
        dtype: np.dtype,
        warn: Callable[[str], Any],
    ):
        self.path, self.blocks, self.dtype, self.warn = path, blocks, dtype, warn
        self._lock = self._take()
        try:
            self._check_contents()
            self._check_run(run)
            for i in range(len(blocks)):
                if self._block(i).is_dir():
                    with self._or_again(i):
                        self.open(i).close()
        except BaseException:
            self.close()
            raise

    @property
    def finished(self) -> int:
        """How many blocks are here."""
        return sum(self._block(i).is_dir() for i in range(len(self.blocks)))

    def save(self, i: int, pruned: dict[str, np.ndarray], errors: dict[str, float], sparse: bool):
        save_packed(self._block(i), {"errors": errors}, pruned.items(), lambda _: sparse)

    def read(self, i: int) -> dict[str, np.ndarray] | None:
        """The matrices of block i; None when it is not here, or cannot be read and is deleted."""
        if not self._block(i).is_dir():
            return None
        with self._or_again(i), self.open(i) as checkpoint:
            return {name: checkpoint.read(name) for name in checkpoint.names()}
        return None

    def open(self, i: int) -> Checkpoint:
        """Block i, its errors in `config`. Raises CheckpointError unless all of it is there."""
        checkpoint = open_checkpoint(self._block(i))
        shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
        errors = checkpoint.config.get("errors")
        if (
            shapes != self.blocks[i]
            or any(checkpoint.dtype(name) != self.dtype for name in shapes)
            or type(errors) is not dict
            or errors.keys() != shapes.keys()
            or any(type(e) not in (int, float) for e in errors.values())
        ):
            checkpoint.close()
            raise CheckpointError(
                self._block(i), "block", "is not as it was written; delete it, to do it again"
            )
        return checkpoint

    def remove(self) -> None:
        """Deletes what runs put here, and the directory if that was all."""
        with contextlib.suppress(OSError):
            for entry in list(self.path.iterdir()):
                if _BLOCK.fullmatch(entry.name) or _UNFINISHED.fullmatch(entry.name):
                    shutil.rmtree(entry, ignore_errors=True)
            for name in ("run.tmp", "run.json"):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    __del__ = close

    def _block(self, i: int) -> Path:
        return self.path / f"layers.{i}"

    @contextlib.contextmanager
    def _or_again(self, i: int):
        """Deletes block i when it turns out to be unreadable."""
        try:
            yield
        except CheckpointError as error:
            if isinstance(error.__cause__, MemoryError):
                raise
            shutil.rmtree(self._block(i))
            self.warn(f"{self._block(i)} is damaged: the block is pruned again")

    def _take(self) -> int:
        """A descriptor of the directory that holds its lock."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise ValueError(
                f"{self.path} is where finished blocks would wait, but is no directory; move it "
                "away, or choose another --out"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(lock), os.stat(self.path))
        except (BlockingIOError, FileNotFoundError):  # the latter: one that ended this moment
            free = False
        except OSError:  # a file system without locks
            free = True
        if not free:
            os.close(lock)
            raise ValueError(
                f"another run is at work in {self.path}; wait for its end, or choose another --out"
            )
        return lock

    def _check_contents(self) -> None:
        """Raises ValueError unless a run, or nobody, put everything here."""
        begun = (self.path / "run.json").is_file()
        foreign = sorted(e.name for e in self.path.iterdir() if not _is_ours(e, begun))
        if foreign:
            raise ValueError(
                f"{self.path} is where finished blocks would wait, but holds {foreign[:3]}, which "
                "no run put there; move it away, or choose another --out"
            )
        for entry in list(self.path.iterdir()):
            if _UNFINISHED.fullmatch(entry.name):
                shutil.rmtree(entry)

    def _check_run(self, run: dict[str, Any]) -> None:
        """Writes run.json, or finds the same in it."""
        run = json.loads(json.dumps(run))
        file = self.path / "run.json"
        if not file.exists():
            temporary = file.with_suffix(".tmp")
            try:
                temporary.write_text(json.dumps(run, indent=1) + "\n")
                os.replace(temporary, file)
            except OSError:
                self.remove()
                raise
            return
        over = f"delete {self.path} to start over"
        try:
            before = read_json(file)
        except CheckpointError as error:
            raise ValueError(f"{file} cannot be read ({error.field}); {over}") from error
        if before.keys() != run.keys():
            raise ValueError(f"{file} is not as a run of this version writes it; {over}")
        for key, value in run.items():
            if before[key] == value:
                continue
            if key in ("files", "config"):
                raise ValueError(
                    f"{self.path} holds blocks of {run['model']}, but the model has changed "
                    f"since; {over}"
                )
            raise ValueError(
                f"{self.path} holds blocks of another run ({key} was {before[key]}, is now "
                f"{value}); finish that one, or {over}"
            )


def _is_ours(entry: Path, begun: bool) -> bool:
    """Whether a run puts such an entry into its directory; blocks only once it has begun."""
    if entry.is_symlink():
        return False
    if entry.name in ("run.json", "run.tmp"):
        return entry.is_file()
    if not begun or not entry.is_dir():
        return False
    if _UNFINISHED.fullmatch(entry.name):
        return True
    files = list(entry.iterdir()) if _BLOCK.fullmatch(entry.name) else [entry]
    return all(_BLOCK_FILE.fullmatch(f.name) and f.is_file() for f in files)
