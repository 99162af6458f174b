"""How fast a packed checkpoint becomes a model, beside the disk that it lies on.

    python benchmarks/bench_load.py --dir /tmp/packed --csv out.csv        makes the model first
    taskset -c 0,1 python benchmarks/bench_load.py --dir /tmp/packed      with two cores

Layers as OPT's with --hidden, 69% sparse. Warm: the file is in the page cache; cold: it was dropped
from there. The disk is read past the page cache, 16 MiB at a time.
"""

import argparse
import csv
import json
import mmap
import os
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jax_flashllm.models import opt
from jax_flashllm.models.checkpoint.base import DTYPES


def make(path: Path, hidden: int, layers: int) -> None:
    """Random bits and values: every layer has the same ones, and q, k, v and out too."""
    rng = np.random.default_rng(0)
    H, V = hidden, 8192

    def words(*shape):
        return np.frombuffer(rng.bytes(8 * int(np.prod(shape))), np.uint64).reshape(shape)

    def values(*shape):
        drawn = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16).reshape(shape)
        return (drawn & 0x83FF | 0x2400).view(np.float16)

    def packed(rows, columns):
        bits = words(rows, columns // 64)
        bits = bits & (words(*bits.shape) | words(*bits.shape) & words(*bits.shape))  # 5 in 16
        counts = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
        return {
            "shape": np.array([rows, columns]),
            "compressed": values(int(counts.sum())),
            "bitmask": bits.view(np.uint8),
            "row_offsets": np.cumsum(counts) - counts,
        }

    square, up, down = packed(H, H), packed(4 * H, H), packed(H, 4 * H)
    matrices = {f"self_attn.{x}_proj": square for x in ("q", "k", "v", "out")}
    matrices |= {"fc1": up, "fc2": down}

    def norm(name):
        for part in ("weight", "bias"):
            yield f"{name}.{part}", np.ones(H, np.float16)

    def tensors():
        root = "model.decoder."
        yield f"{root}embed_tokens.weight", values(V, H)
        yield f"{root}embed_positions.weight", values(2050, H)
        yield from norm(f"{root}final_layer_norm")
        for i in range(layers):
            for name, parts in matrices.items():
                for part, array in parts.items():
                    yield f"{root}layers.{i}.{name}.{part}", array
                yield f"{root}layers.{i}.{name}.bias", np.ones(parts["shape"][0], np.float16)
            for name in ("self_attn_layer_norm", "final_layer_norm"):
                yield from norm(f"{root}layers.{i}.{name}")

    config = {
        "model_type": "opt", "hidden_size": H, "word_embed_proj_dim": H, "ffn_dim": 4 * H,
        "num_hidden_layers": layers, "num_attention_heads": H // 64, "vocab_size": V,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    write(path / "model.safetensors", list(tensors()))


def write(file: Path, tensors: list[tuple[str, np.ndarray]]) -> None:
    """A safetensors file; `save_packed` would want the dense matrices."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {}, 0
    for name, array in tensors:
        start, end = end, end + array.nbytes
        shape = list(array.shape)
        header[name] = {"dtype": codes[array.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors:
            out.write(array.data)
        out.flush()
        os.fsync(out.fileno())


def forget(file: Path) -> None:
    """Drops the file from the page cache."""
    fd = os.open(file, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def disk_rate(file: Path) -> float:
    """Bytes a second of reading it past the page cache."""
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 16 << 20)  # O_DIRECT wants whole pages
    begin, done = time.perf_counter(), 0
    while (count := os.preadv(fd, [buffer], done)) == len(buffer):
        done += count
    seconds = time.perf_counter() - begin
    os.close(fd)
    return (done + count) / seconds


def load(path: Path) -> tuple[float, float]:
    """Seconds, and of all cores, until the weights are on the device."""
    begin, cpu = time.perf_counter(), time.process_time()
    model = opt.load(path)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    return time.perf_counter() - begin, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="made where it does not exist")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if not args.dir.exists():
        make(args.dir, args.hidden, args.layers)
    file = args.dir / "model.safetensors"
    size = file.stat().st_size
    forget(file)
    disk = disk_rate(file)
    load(args.dir)  # compiles, and fills the page cache
    for state in ("warm", "cold"):
        for _ in range(args.rounds):
            if state == "cold":
                forget(file)
            seconds, cpu = load(args.dir)
            row = {
                "device": jax.devices()[0].device_kind,
                "cores": len(os.sched_getaffinity(0)),
                "hidden": args.hidden,
                "layers": args.layers,
                "gigabytes": round(size / 1e9, 3),
                "disk_gb_s": round(disk / 1e9, 3),
                "page_cache": state,
                "load_gb_s": round(size / seconds / 1e9, 3),
                "gb_a_cpu_second": round(size / cpu / 1e9, 3),
            }
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            if args.csv:
                new = not args.csv.exists()
                with args.csv.open("a", newline="") as out:
                    writer = csv.DictWriter(out, row.keys())
                    if new:
                        writer.writeheader()
                    writer.writerow(row)


if __name__ == "__main__":
    main()
