"""Fixtures that several files share."""

import pytest

from jax_flashllm import _flashllm


@pytest.fixture(params=["avx512", "avx2", "portable"])
def kernels(request):
    """Each instruction set that this machine has, chosen for the length of a test."""
    before = _flashllm.cpu_kernels()
    if not _flashllm.select_cpu_kernels(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    assert _flashllm.select_cpu_kernels(before)
