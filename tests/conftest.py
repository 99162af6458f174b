"""Fixtures that several files share."""

import os
import signal
import subprocess
import sys

import jax
import pytest

from jax_flashllm import _flashllm

# Jobs that a shell starts in the background ignore Ctrl-C, and so would what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LOOPBACK = ("127.0.0.1", "::1", "localhost", None, "")


def _refuse_network(event, args):
    """Tests reach this machine only. (Sockets that are no Internet's have no (host, port).)"""
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in LOOPBACK:
        raise RuntimeError(f"tests use no network: {args[1]}")
    if event == "socket.getaddrinfo" and args[0] not in LOOPBACK:
        raise RuntimeError(f"tests use no network: {args[0]}")


sys.addaudithook(_refuse_network)

# tests/mesh needs 8 devices, in a process of its own: test_mesh.py starts it.
collect_ignore = [] if "device_count=8" in os.environ.get("XLA_FLAGS", "") else ["mesh"]


@pytest.fixture(params=["avx512", "avx2", "portable"])
def kernels(request):
    """Each instruction set that this machine has, chosen for the length of a test."""
    before = _flashllm.cpu_kernels()
    if not _flashllm.select_cpu_kernels(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    assert _flashllm.select_cpu_kernels(before)


@pytest.fixture
def quick_compiles():
    """For tests that compile many tiny programs once each: halves their time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def fresh_process():
    """Runs Python source with arguments in a new interpreter; its stdout, or what went wrong."""

    def run(source: str, *args: str) -> str:
        command = [sys.executable, "-P", "-c", source, *args]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def pytest_terminal_summary(terminalreporter):
    """How many random cases ran, test_properties.py's."""
    counts = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, count in report.user_properties:
            counts[name] = counts.get(name, 0) + count
    for name, count in counts.items():
        terminalreporter.write_line(f"{name}: {count} cases")
