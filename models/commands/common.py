"""What the commands share: arguments, the model's directory, JAX's cache, sizes and tables."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_flashllm.models.memory import USABLE

if TYPE_CHECKING:
    from jax_flashllm.models.opt import OPT

DEMO = Path(__file__).parent.parent / "demo"
DTYPES = ("float16", "bfloat16", "float32")
FORMATS = ("auto", "bitmap", "delta_csr")  # formats.FORMATS, without importing JAX


def add_model(
    parser: argparse.ArgumentParser, dtype: bool = True, positional: bool = False
) -> None:
    if positional:  # as well; absent, it leaves --model's value alone
        parser.add_argument(
            "model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="as --model"
        )
    parser.add_argument(
        "--model",
        default="demo",
        metavar="DIR",
        help="directory of a Hugging Face or packed OPT; 'demo' (default) is the one that ships",
    )
    if dtype:
        parser.add_argument(
            "--dtype",
            choices=DTYPES,
            help="of activations (default: float32 on a CPU, else the checkpoint's)",
        )
        parser.add_argument(
            "--format",
            choices=FORMATS,
            default="auto",
            help="of sparse weights: delta_csr decodes faster on a GPU for one to four rows from "
            "about 70%% sparsity on (default: auto, the smaller one)",
        )


def number(
    kind: Callable[[str], Any], least: float, most: float = float("inf"), above: bool = False
) -> Callable[[str], Any]:
    """An argparse type: `kind` from `least` to `most`; `above` leaves `least` itself out."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}") from None
        if not (least < value <= most if above else least <= value <= most):
            start = f"above {least}" if above else f"from {least}"
            end = "" if most == float("inf") else f" to {most}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, pass {start}{end}")
        return value

    return parse


def model_path(name: str) -> Path:
    """The directory that `--model` names. Raises ValueError when there is none."""
    if name == "demo":
        return DEMO
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~ of a user that is not there, or of one without a home
        path = Path(name)
    if not name or not path.is_dir():
        what = "is a file" if name and path.exists() else "does not exist"
        raise ValueError(
            f"model {name or repr(name)} {what}; pass the directory of a downloaded OPT "
            "checkpoint, or 'demo'"
        )
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model {name} has no config.json, so it is no model's directory; pass that of a "
            "downloaded OPT checkpoint, or 'demo'"
        )
    return path


_interrupted = False


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Remembers Ctrl-C, for `check_interrupt`.

    Python drops an exception that comes inside a callback of its garbage collector. JAX has such
    a callback, and one Ctrl-C in 400 during a generation fell into it.
    """
    global _interrupted
    _interrupted = False

    def note(number: int, frame: Any) -> None:
        global _interrupted
        _interrupted = True
        signal.default_int_handler(number, frame)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def check_interrupt() -> None:
    """Raises KeyboardInterrupt where Ctrl-C came and was dropped."""
    if _interrupted:
        raise KeyboardInterrupt


def read_text(path: str) -> str:
    """A UTF-8 text file, newlines as \\n. Raises ValueError naming what is wrong."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the path") from error


def cache_compilations() -> None:
    """Lets JAX keep compiled programs in the user's cache directory, where it can be written."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"]:  # the user's own choice
        return
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(root, "jax_flashllm")
    if not os.path.isabs(path):  # "~" where no home is known
        return
    try:
        # Compiled programs are run when they are found: nobody else may put some there.
        os.makedirs(path, mode=0o700, exist_ok=True)
        mine = os.stat(path).st_uid == os.getuid() and os.access(path, os.W_OK | os.X_OK)
    except (OSError, AttributeError):
        return
    if mine:
        jax.config.update("jax_compilation_cache_dir", path)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        # A full disk or a damaged entry costs a compilation, which is no news to the user.
        warnings.filterwarnings("ignore", message="Error .* persistent compilation cache")


def use_all_memory() -> None:
    """Lets JAX take most of a GPU's memory, not three quarters; before it looks for devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(USABLE))


def process_age() -> float:
    """Seconds since this process started, the interpreter's own start included."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError, IndexError):
        return time.process_time()  # no /proc: the CPU time spent is near it


def weight_bytes(model: OPT) -> tuple[int, int]:
    """Bytes of a model's weights in memory, and of the same with its sparse layers dense.

    A dense layer counts as stored in the sparse one's dtype, 16 bits a weight.
    """
    import jax
    from flax import nnx

    from jax_flashllm.nn import SparseDense

    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    dense = held
    for _, module in nnx.iter_modules(model):
        if isinstance(module, SparseDense):
            w = module.weight
            dense += w.shape[0] * w.shape[1] * w.dtype.itemsize - w.nbytes
    return held, dense


def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of a large copy on JAX's default device."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    if jax.default_backend() == "cpu":
        # XLA's threads would also page in new memory at every copy, at a tenth of the speed.
        threads = os.cpu_count() or 1
        source, target = np.ones((2, threads, (128 << 20) // threads), np.uint8)
        nbytes = source.nbytes
        pool = ThreadPoolExecutor(threads)

        def copy() -> None:
            list(pool.map(np.copyto, target, source))
    else:
        step = jax.jit(lambda x: x + 1, donate_argnums=0)
        x = jnp.zeros(256 << 20, jnp.float32)
        nbytes = x.nbytes

        def copy() -> None:
            nonlocal x
            x = step(x).block_until_ready()

    seconds = []
    for _ in range(6):  # the first compiles
        start = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - start)
    return 2 * nbytes / min(seconds)


def size(count: float) -> str:
    """Bytes for people: 11.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns padded to their widest entry; the first `left` ones flush left."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
