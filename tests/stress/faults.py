"""kill -9 while saving and pruning, a full disk, Ctrl-C; tests hold a little of each.

python tests/stress/faults.py            # 50 kills of each; the full disk needs root (a tmpfs)
"""

import argparse
import contextlib
import gc
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import tiny_opt

from jax_flashllm.models.checkpoint import CheckpointError, open_checkpoint, save_packed

# A process that has imported all it needs, and forks one that works, for each byte it reads:
# imports take seconds, and what may be killed is the work. Nothing has used JAX yet.
FORKS = """
import os, sys
{imports}
while sys.stdin.buffer.read(1):
    child = os.fork()
    if child == 0:
        os.close(0)
        os.write(1, b"%d\\n" % os.getpid())
        {work}
        os._exit(0)
    os.waitpid(child, 0)
    os.write(1, b"ended\\n")
"""
SAVE = {
    "imports": "import numpy as np\nfrom jax_flashllm.models.checkpoint import save_packed",
    "work": """
        for value in range(1, 1000):
            tensors = [(f"w{i}.weight", np.full((64, 256), value, np.float16)) for i in range(8)]
            save_packed(sys.argv[1], {"v": value}, tensors, overwrite=True, max_shard_bytes=99_999)
""",
}
PRUNE = {
    "imports": "from jax_flashllm.models.cli import main\nimport jax_flashllm.models.pruning",
    "work": """
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        model, out = sys.argv[1:]
        assert main(["prune", model, "--sparsity", "0.6", "--out", out, "--overwrite"]) == 0
""",
}


class Forks:
    """Starts and kills workers."""

    def __init__(self, parts: dict[str, str], *args):
        source = FORKS.format(imports=parts["imports"], work=parts["work"].strip())
        command = [sys.executable, "-P", "-c", source, *map(str, args)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self) -> int:
        self.process.stdin.write(b"x")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> None:
        assert self.process.stdout.readline() == b"ended\n"

    def kill(self, after: float) -> None:
        child = self.start()
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        self.wait()

    def time(self) -> float:
        """Seconds that the work takes when nobody kills it."""
        start = time.monotonic()
        self.start()
        self.wait()
        return time.monotonic() - start

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def kill_while_saving(count: int, directory, seed=0) -> int:
    """The directory is one whole checkpoint after every kill; returns how many there were."""
    out, rng, seen = pathlib.Path(directory) / "out", random.Random(seed), set()
    save_packed(out, {"v": 1}, [(f"w{i}.weight", np.ones((2, 2), np.float16)) for i in range(8)])
    forks = Forks(SAVE, out)
    for _ in range(count):
        forks.kill(0.05 + rng.random() * 0.1)
        with open_checkpoint(out) as checkpoint:
            values = {checkpoint.config["v"]}
            for name in checkpoint.names():
                values |= set(np.unique(checkpoint.read(name)).tolist())
            assert len(checkpoint.names()) == 8
        assert len(values) == 1, values
        seen |= values
    forks.close()
    return len(seen)


def kill_while_pruning(count: int, directory, seed=0) -> tuple[int, int]:
    """How often the old model was there after a kill, and how often the new one: never neither."""
    directory = pathlib.Path(directory)
    config = tiny_opt.config("plain", num_hidden_layers=12, hidden_size=256, ffn_dim=1024)
    stored = tiny_opt.weights(config, np.float16)
    tiny_opt.save(directory / "model", config, stored)
    out, rng = directory / "out", random.Random(seed)
    # Before each run `out` holds another model: what stands there is told by its values.
    old = {name: np.zeros_like(value) for name, value in stored.items()}
    forks = Forks(PRUNE, directory / "model", out)
    seconds = min(forks.time() for _ in range(3))
    with open_checkpoint(out) as checkpoint:
        new = {name: checkpoint.read(name) for name in checkpoint.names()}
    found = [0, 0]
    for _ in range(count):
        shutil.rmtree(out)
        save_packed(out, config, old.items())
        forks.kill(rng.random() * 1.1 * seconds)
        with open_checkpoint(out) as checkpoint:
            got = {name: checkpoint.read(name) for name in checkpoint.names()}
        is_new = any(value.any() for value in got.values())
        for name, value in (new if is_new else old).items():
            np.testing.assert_array_equal(got[name], value)
        found[is_new] += 1
    forks.time()  # what was killed is in nobody's way
    left = sorted(p.name for p in directory.iterdir() if not p.name.startswith(".out.tmp-"))
    assert left == ["model", "out"], left
    forks.close()
    return found[0], found[1]


def fill_a_disk(directory, size: int = 1 << 20) -> str:
    """Saves more than a tmpfs holds: the old model stays, nothing else does. Needs root."""
    disk = pathlib.Path(directory) / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], check=True)
    try:
        old = {"a.weight": np.eye(64, dtype=np.float16)}
        save_packed(disk / "out", {"v": 1}, old.items())
        large = [(f"w{i}.weight", np.ones((256, 256), np.float16)) for i in range(20)]
        try:
            save_packed(disk / "out", {"v": 2}, iter(large), overwrite=True)
            raise AssertionError("it fits")
        except CheckpointError as error:
            said = str(error)
        assert [p.name for p in disk.iterdir()] == ["out"]
        with open_checkpoint(disk / "out") as checkpoint:
            assert checkpoint.config["v"] == 1
            np.testing.assert_array_equal(checkpoint.read("a.weight"), old["a.weight"])
        save_packed(disk / "out", {"v": 3}, old.items(), overwrite=True)  # there is room again
        return said
    finally:
        subprocess.run(["umount", disk], check=True)


def hear_interrupts() -> None:
    """Jobs that a shell starts in the background ignore Ctrl-C, and so do their children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt_generations(count: int, directory, seed=0) -> int:
    """The generation after one that Ctrl-C ended is as the first. Returns how many were lost.

    Python drops what comes inside its garbage collector's callbacks, of which JAX has one; the
    command line notices, a program with this library in it does not.
    """
    import jax  # not before the forks
    import load

    from jax_flashllm.models.generate import generate

    hear_interrupts()
    rng, model = random.Random(seed), load.tiny_model(directory)
    prompt = [5, 6, 7]

    def run():
        return generate(model, prompt, 60, eos_token_id=())

    expected = run()
    start = time.monotonic()
    run()
    seconds, live, lost = time.monotonic() - start, None, 0
    for _ in range(count):
        timer = threading.Timer(rng.random() * seconds, signal.raise_signal, [signal.SIGINT])
        try:
            timer.start()
            run()
            timer.join()
            time.sleep(1)  # it comes in here at the latest
            lost += 1
        except KeyboardInterrupt:
            pass
        np.testing.assert_array_equal(run(), expected)
        gc.collect()
        live = live or len(jax.live_arrays())
        assert len(jax.live_arrays()) <= live
    return lost


def interrupt_on_a_terminal(count: int) -> None:
    """`jax-flashllm generate` on a terminal of its own: 130, no traceback, modes as before."""
    import pty
    import termios

    hear_interrupts()
    rng = random.Random(0)
    for _ in range(count):
        master, slave = pty.openpty()
        before = termios.tcgetattr(slave)
        command = [sys.executable, "-P", "-m", "jax_flashllm.models.cli", "generate", "--prompt"]
        child = subprocess.Popen([*command, "Alice", "--max-new-tokens", "500"],
                                 stdin=slave, stdout=slave, stderr=slave)  # fmt: skip
        text = os.read(master, 1)  # it writes
        time.sleep(rng.random() * 0.2)
        child.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            text += _available(master)
        text += _available(master)
        # 0, or killed by it, where it came at the very end
        assert child.returncode in (130, 0, -signal.SIGINT), (child.returncode, text)
        assert b"Traceback" not in text
        assert text.endswith(b"\n"), text[-80:]
        assert termios.tcgetattr(slave) == before
        os.close(master)
        os.close(slave)


def _available(fd: int) -> bytes:
    import select

    ready, _, _ = select.select([fd], [], [], 0.1)
    return os.read(fd, 1 << 16) if ready else b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as d:
        seen = kill_while_saving(count, d)
        print(
            f"save, killed {count} times: always one whole checkpoint, {seen} different", flush=True
        )
    with tempfile.TemporaryDirectory() as d:
        old, new = kill_while_pruning(count, d)
        print(f"prune, killed {count} times: {old} times the old model, {new} times the new one,"
              " whole each time", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as d:
        if os.geteuid() == 0:
            print("full disk:", fill_a_disk(d).replace(d, ""), flush=True)
        else:
            print("full disk: not root, skipped", flush=True)
    with tempfile.TemporaryDirectory() as d:
        lost = interrupt_generations(count, d)
        print(f"{count} generations interrupted, {lost} times in vain: the next ones right")
    interrupt_on_a_terminal(min(count, 10))
    print("jax-flashllm generate interrupted on a terminal: clean", flush=True)


if __name__ == "__main__":
    main()
