"""The command line: `jax-flashllm generate | prune | info | eval | bench`.

Exit codes: 0, 2 for anything the caller can put right (one line on stderr says how), 130 after
Ctrl-C, 141 when the reader of the output went away, 1 for a fault of ours (`--debug` shows where).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jax_flashllm import __version__
from jax_flashllm.models.commands import bench, common, eval, generate, info, prune

PROGRAM = "jax-flashllm"
COMMANDS = {
    "generate": (generate, "continue a prompt"),
    "prune": (prune, "write a sparse copy of a model"),
    "info": (info, "sparsity, bits a weight and bytes of every layer"),
    "eval": (eval, "perplexity on a text file"),
    "bench": (bench, "tokens per second, sparse against dense"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog=PROGRAM,
        description="Serve and prune unstructured-sparse language models with JAX.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    debug = False
    try:
        _prepare_streams()
        args, unknown = parser().parse_known_args(argv)
        if unknown:  # argparse would point to the help that does not list a command's options
            raise ValueError(
                f"{args.command}: unrecognized arguments: {' '.join(unknown)}; see {PROGRAM} "
                f"{args.command} --help"
            )
        debug = args.debug
        with common.interruptible():
            args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # whatever was on the line stays readable
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it a place to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        return _report(error)


def _report(error: Exception) -> int:
    """One line on stderr; 2 where the caller can act on it, else 1."""
    text = " ".join(str(error).split()) or type(error).__name__
    full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text  # the latter is XLA's
    expected = full or isinstance(error, (ValueError, OSError, NotImplementedError))
    if full:
        text = f"out of memory ({text[:200]}); use a smaller model or batch, or free some memory"
    elif isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}; check the path, its permissions and the free space"
    elif not expected:
        text = f"internal error, {type(error).__name__}: {text[:500]}; --debug shows where"
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: {text}", file=sys.stderr)
    # Output that could not be written would be tried, and reported, again at exit.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return 2 if expected else 1
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 2 if expected else 1


def _prepare_streams() -> None:
    """Characters that the terminal's encoding lacks become '?', rather than an error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as in `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        reconfigure: Any = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
