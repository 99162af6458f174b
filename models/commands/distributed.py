"""Several processes, one a host: joining them, and saying which one is gone."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from jax_flashllm.models.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tensor-parallel",
        type=common.number(int, 1),
        metavar="N",
        help="devices that share the model (default: 1, with --distributed all of all processes)",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="run the same command on every host; the first writes the text. Under Slurm and the "
        "like processes find each other, elsewhere pass the three options below",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    parser.add_argument("--processes", type=common.number(int, 1), metavar="N", help="how many")
    parser.add_argument(
        "--process", type=common.number(int, 0), metavar="I", help="this one, from 0"
    )
    parser.add_argument(
        "--heartbeat",
        type=common.number(int, 1),
        default=30,
        metavar="S",
        help="seconds of silence after which a process counts as dead (default: %(default)s)",
    )


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[TextIO]:
    """Joins the other processes for the time of a block; where this one writes its text.

    Raises ValueError where they cannot be joined, and where one of them has died. One that is
    silent, rather than gone, is found by JAX's heartbeat, which ends the process and names it. So
    is this one, by the others, when the block raises: it leaves without waiting for them.
    """
    options = [args.coordinator, args.processes, args.process]
    if not args.distributed:
        if options != [None] * 3:
            raise ValueError("--coordinator, --processes and --process go with --distributed")
        yield sys.stdout
        return
    if None in options and options != [None] * 3:
        raise ValueError("pass all of --coordinator, --processes and --process, or none of them")
    import jax

    try:
        jax.distributed.initialize(*options, heartbeat_timeout_seconds=args.heartbeat)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes cannot be joined ({' '.join(str(error).split())[:200]}); start one "
            "for each --process from 0, all with the same --coordinator and --processes"
        ) from error
    try:
        with _own_stdout() as out:
            yield out if jax.process_index() == 0 else io.StringIO()
    except BaseException as error:
        dead = isinstance(error, jax.errors.JaxRuntimeError) and _missing(args.heartbeat)
        # At exit JAX would wait minutes at a barrier that the others, in the middle of their work
        # with this one, do not reach.
        atexit.register(_exit_at_once, ValueError() if dead else error)
        if not dead:
            raise
        raise ValueError(
            f"process {', '.join(map(str, dead))} of {jax.process_count()} died; see its own "
            "output, and start all of them again"
        ) from error
    jax.distributed.shutdown()


def _exit_at_once(error: BaseException) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    expected = isinstance(error, (ValueError, OSError, NotImplementedError, MemoryError))
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 2 if expected else 1)


@contextlib.contextmanager
def _own_stdout() -> Iterator[TextIO]:
    """Keeps stdout for the text: libraries that print to it (Gloo does) get stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding=sys.stdout.encoding, errors="replace") as out:
            yield out
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def mesh(args: argparse.Namespace):
    """The devices that were asked for, in one tensor parallel axis; None for one device."""
    import jax

    devices = jax.devices()
    n = args.tensor_parallel or (len(devices) if args.distributed else 1)
    if n > len(devices) or (args.distributed and n != len(devices)):
        which = "each of the" if args.distributed else "at most the"
        raise ValueError(
            f"--tensor-parallel is {n}; make it {which} {len(devices)} devices that there are"
        )
    return None if n == 1 else jax.make_mesh((n,), ("tp",), devices=devices[:n])


def _missing(heartbeat: int) -> list[int]:
    """Processes that do not answer, waiting for a heartbeat to run out; [] where all do."""
    import jax
    from jax._src import distributed  # the public API has no such question

    client: Any = distributed.global_state.client
    everyone = list(range(jax.process_count()))
    end = time.monotonic() + heartbeat + 5
    while time.monotonic() < end:
        try:
            alive = set(client.get_live_nodes(everyone))
        except Exception:  # whatever the connection broke with
            return [0]  # where the coordinator runs
        if len(alive) < len(everyone):
            return [i for i in everyone if i not in alive]
        time.sleep(0.2)
    return []
