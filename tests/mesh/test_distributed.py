"""Two processes of four CPU devices each, or of one GPU: real gRPC, real collectives, one text."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_opt

import jax_flashllm.models
from jax_flashllm.models.cli import main

CLI = "import sys; from jax_flashllm.models.cli import main; sys.exit(main())"
PROMPT = ["generate", "--prompt", "Alice looked up", "--temperature", "0", "--dtype", "float32"]
ON_GPU = jax.default_backend() == "gpu"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Eight heads, and the demo's tokenizer."""
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 8, "ffn_dim": 64}
    config = tiny_opt.config("plain", vocab_size=4096, max_position_embeddings=512, **sizes)
    path = tmp_path_factory.mktemp("model")
    tiny_opt.save(path, config, tiny_opt.weights(config, np.float16, 0.7))
    demo = Path(jax_flashllm.models.__file__).parent / "demo"
    for file in demo.glob("*token*"):
        shutil.copy(file, path)
    return str(path)


def start(model, *arguments, heartbeat=30, processes=2, devices=4):
    """model: of all processes, or one each."""
    models = [model] * processes if isinstance(model, str) else model
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    own = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-P", "-c", CLI, *PROMPT, "--model", models[i], *arguments,
             "--distributed", "--coordinator", address, "--processes", str(processes),
             "--process", str(i), "--heartbeat", str(heartbeat)],
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": str(i)} if ON_GPU else own),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(processes)
    ]  # fmt: skip


def test_the_text_of_one_process(model, capfd):
    running = start(model, "--max-new-tokens", "8")
    assert main([*PROMPT, "--model", model, "--max-new-tokens", "8"]) == 0
    alone = capfd.readouterr().out
    ended = [p.communicate(timeout=120) for p in running]
    assert [p.returncode for p in running] == [0, 0], ended
    assert ended[0][0].decode() == alone
    assert ended[1][0] == b""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_others(model, victim):
    running = start(model, "--max-new-tokens", "450", heartbeat=4)
    # The first word shows that all of them are in their loops.
    assert running[0].stdout.read(1)
    running[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, error = running[1 - victim].communicate(timeout=60)
    assert time.monotonic() - killed < 4 + 10
    assert running[1 - victim].returncode not in (0, None)
    named = r"process 1 of 2 died|unhealthy.*\n1\n" if victim else r"process 0 of 2|leader task"
    assert re.search(named, error.decode(errors="replace"))
    running[victim].wait()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_fails_ends_the_others(model, victim, tmp_path):
    damaged = shutil.copytree(model, tmp_path / "damaged")
    os.truncate(damaged / "model.safetensors", 3000)
    models = [str(damaged) if i == victim else model for i in range(2)]
    running = start(models, "--max-new-tokens", "8", heartbeat=4)
    _, error = running[victim].communicate(timeout=60)
    failed = time.monotonic()
    assert running[victim].returncode == 2
    assert re.search("model.safetensors", error.decode())
    _, error = running[1 - victim].communicate(timeout=60)
    assert time.monotonic() - failed < 4 + 15
    assert running[1 - victim].returncode not in (0, None)
    named = r"process 1 of 2 died|unhealthy.*\n1\n" if victim else r"process 0 of 2|leader task"
    assert re.search(named, error.decode(errors="replace"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator", "localhost:1"], "--process go with --distributed"),
        (["--distributed", "--processes", "2"], "pass all of --coordinator"),
        (["--tensor-parallel", "9"], "--tensor-parallel is 9; make it at most the 8 devices"),
        (["--tensor-parallel", "3"], "'tp' of size 3 does not divide num_attention_heads = 8"),
    ],
)
def test_bad_arguments(model, capfd, arguments, message):
    assert main([*PROMPT, "--model", model, *arguments]) == 2
    assert message in capfd.readouterr().err


def test_every_host_needs_the_prompt(model, capfd):
    assert main(["generate", "--model", model, "--distributed"]) == 2
    assert "--distributed needs --prompt or --prompt-file" in capfd.readouterr().err


def test_tensor_parallel_on_one_host(model, capfd):
    texts = []
    for n in ("1", "2"):
        command = [*PROMPT, "--model", model, "--max-new-tokens", "8", "--tensor-parallel", n]
        assert main(command) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]
