"""Mutates checkpoint files and reads them with the real loader.

    python tests/stress/fuzz_checkpoint.py --count 1000000 --seed 1
    python tests/stress/fuzz_checkpoint.py --load --count 100000

Every mutation must end in CheckpointError, with file and field, or in tensors of the declared
shapes. Anything else, or a read of more than a second of CPU time, stops the run and keeps the
file. --load has `opt.load` read a packed model, damaged anywhere: its bits go straight to the C++
encoder.

Memory: a first twentieth of the mutations is measured. After it the process may not grow past 2x
the file + 64 MB, which the system sees to: MemoryError, also as a CheckpointError's cause, stops
the run.
"""

import argparse
import json
import pathlib
import re
import resource
import shutil
import sys
import tempfile
import time
import tracemalloc

import flax.serialization
import numpy as np
import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import tiny_opt
from checkpoint_files import (
    flax_tree,
    model_dir,
    mutate,
    packed_parts,
    safetensors_bytes,
    torch_bytes,
    weights,
)

from jax_flashllm.models import opt
from jax_flashllm.models.checkpoint import CheckpointError, open_checkpoint, save_packed
from jax_flashllm.models.weights import verify

# Of a whole model, names and shapes are compared with its config too: ten times as slow.
WHOLE = ["model", "config"]


def samples(directory: pathlib.Path) -> dict[str, tuple[str, bytes, dict[str, bytes]]]:
    """name: (file to mutate, its bytes, the other files)."""
    w = weights()
    name = "model.decoder.layers.0.fc1.weight"
    packed = {k: v for k, v in w.items() if k != name} | packed_parts(name, w[name])
    shard = safetensors_bytes(w)
    index = json.dumps({"weight_map": dict.fromkeys(w, "a.safetensors")}).encode()
    recorded = pathlib.Path(__file__).parents[1] / "fixtures/torch_zip/pytorch_model.bin"
    tiny = tiny_opt.config("plain", num_hidden_layers=1)
    config = {k: tiny[k] for k in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers",
              "num_attention_heads", "ffn_dim", "max_position_embeddings")}  # fmt: skip
    saved = tiny_opt.weights(tiny, np.float16, sparsity=0.7)
    save_packed(directory / "model", config, saved.items())
    model = (directory / "model/model.safetensors").read_bytes()
    return {
        "safetensors": ("model.safetensors", shard, {}),
        "packed": ("model.safetensors", safetensors_bytes(packed), {}),
        "flax": ("flax_model.msgpack", flax.serialization.to_bytes(flax_tree(w)), {}),
        "torch": ("pytorch_model.bin", torch_bytes(directory / "x", w), {}),
        "real torch": ("pytorch_model.bin", recorded.read_bytes(), {}),
        "index": ("model.safetensors.index.json", index, {"a__safetensors": shard}),
        "model": ("model.safetensors", model, {"config__json": json.dumps(config).encode()}),
        "config": ("config.json", json.dumps(config).encode(), {"model__safetensors": model}),
    }  # fmt: skip


def read(path: pathlib.Path) -> CheckpointError | None:
    """None if the mutation was read as a whole checkpoint."""
    try:
        with open_checkpoint(path) as checkpoint:
            if path.name in WHOLE:
                verify(checkpoint)
            for name in checkpoint.names():
                array = checkpoint.read(name)
                assert array.shape == checkpoint.shape(name)
                assert array.dtype == checkpoint.dtype(name)
        return None
    except CheckpointError as e:
        return e


def load(path: pathlib.Path) -> CheckpointError | None:
    """None if the mutation was loaded as a model."""
    try:
        opt.load(path)
        return None
    except CheckpointError as e:
        return e


def limit_memory(more: int) -> None:
    """Lets the address space of this process grow by `more` bytes."""
    size = re.search(r"VmSize:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())
    assert size
    resource.setrlimit(resource.RLIMIT_AS, ((int(size[1]) << 10) + more,) * 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load", action="store_true", help="whole packed models, by opt.load")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    directory = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm"))
    kinds = samples(directory)
    counts = {kind: [0, 0] for kind in kinds}
    slowest = highest = 0.0
    for kind, (_, _, others) in kinds.items():
        model_dir(directory / kind, **others)
    if options.load:  # what JAX sets up at first is not the file's
        (directory / "model/model.safetensors").write_bytes(kinds["model"][1])
        assert load(directory / "model") is None
    tqdm.tqdm.monitor_interval = 0  # its thread would reserve address space of its own
    tracemalloc.start()
    began = time.monotonic()
    files = [kind for kind in kinds if kind not in WHOLE]
    for i in tqdm.trange(options.count, mininterval=30):
        kind = WHOLE[i // 32 % 2] if i % 32 == 0 else files[i % len(files)]
        if options.load:
            kind = "model"
        name, data, _ = kinds[kind]
        data = mutate(data, rng, focus=len(data) if options.load and i % 4 else 1500)
        (directory / kind / name).write_bytes(data)
        if i == options.count // 20:
            tracemalloc.stop()
            limit_memory(2 * max(len(data) for _, data, _ in kinds.values()) + (64 << 20))
        measured = tracemalloc.is_tracing()
        if measured:
            tracemalloc.reset_peak()
        start = time.process_time()
        try:
            error = (load if options.load else read)(directory / kind)
            seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
            assert error is None or (error.field and error.file and str(error).encode())
            assert error is None or not isinstance(error.__cause__, MemoryError)
            assert seconds < 1, f"{seconds} s"
            assert peak < 2 * len(data) + (64 << 20), f"{peak} bytes"
        except BaseException:
            print(f"mutation {i}, seed {options.seed}: kept {directory / kind / name}")
            raise
        counts[kind][error is None] += 1
        slowest, highest = max(slowest, seconds), max(highest, peak)
    for kind, (refused, accepted) in counts.items():
        if refused + accepted:
            print(f"{kind:12} {refused + accepted:9} mutations, {refused} refused, {accepted} read")
    shutil.rmtree(directory)
    print(
        f"slowest {slowest * 1e3:.0f} ms, highest peak {highest / 1e6:.1f} MB, "
        f"{options.count / (time.monotonic() - began):.0f} mutations/s"
    )


if __name__ == "__main__":
    main()
