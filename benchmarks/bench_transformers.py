"""OPT with random weights in Hugging Face transformers on the same GPU, eager and compiled.

    python benchmarks/bench_transformers.py --config opt-13b --batch 1 8 --csv out.csv

The time of a step is the difference of two `generate` calls of different length, divided by the
tokens between them, so that the prompt, and what is paid once a call, is not in it. The median of
--rounds such differences. Compiled: a static cache, whose decode step transformers compiles on a
GPU; one cache for both lengths, so that it compiles once.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
import transformers

# Zhang et al., OPT, table 1.
SHAPES = {
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-6.7b": (4096, 32, 32),
    "opt-13b": (5120, 40, 40),
    "opt-30b": (7168, 48, 56),
}


def model_of(name: str, layers: int | None, device: str, dtype: torch.dtype):
    hidden, depth, heads = SHAPES[name]
    config = transformers.OPTConfig(
        hidden_size=hidden, num_hidden_layers=layers or depth, num_attention_heads=heads,
        ffn_dim=4 * hidden, word_embed_proj_dim=hidden, dropout=0.0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Drawn below: transformers' own initialisation of 13B numbers takes minutes on a host.
        with torch.device("meta"):
            model = transformers.OPTForCausalLM(config)
        model = model.to_empty(device=device).eval()
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            parameter.data.uniform_(-0.03, 0.03)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model


def step_ms(model, ids: torch.Tensor, short: int, long: int, rounds: int, **kwargs) -> list[float]:
    cache = kwargs.get("past_key_values")

    def seconds(new: int) -> float:
        if cache is not None:
            cache.reset()
        synchronize(ids)
        begin = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=1, **kwargs,
        )  # fmt: skip
        synchronize(ids)
        assert out.shape[1] == ids.shape[1] + new
        return time.perf_counter() - begin

    # With a static cache twice each: the first compiles, the second records CUDA graphs.
    warm_up = (short,) if cache is None else (short, long, short, long)
    print("warmed up in " + " + ".join(f"{seconds(new):.1f}" for new in warm_up) + " s", flush=True)
    return [1e3 * (seconds(long) - seconds(short)) / (long - short) for _ in range(rounds)]


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=SHAPES, default="opt-13b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, nargs=2, default=[16, 112], metavar=("SHORT", "LONG"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float16) if cuda else ("cpu", torch.float32)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    model = model_of(args.config, args.layers, device, dtype)
    for mode in args.modes:
        for batch in args.batch:
            kwargs = {}
            if mode == "compiled":
                slots = args.prompt + max(args.new)
                kwargs["past_key_values"] = transformers.StaticCache(model.config, slots)
            ids = torch.randint(5, 50000, (batch, args.prompt), device=device)
            try:
                with torch.inference_mode():
                    times = step_ms(model, ids, *args.new, args.rounds, **kwargs)
            except Exception as error:
                print(f"{mode}, batch {batch}: {type(error).__name__}: {str(error)[:300]}")
                continue
            row = {
                "device": name,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "config": args.config,
                "layers": model.config.num_hidden_layers,
                "mode": mode,
                "batch": batch,
                "prompt": args.prompt,
                "step_ms": round(statistics.median(times), 3),
                "spread_ms": round(max(times) - min(times), 3),
            }
            print(
                f"{args.config} in transformers, {mode}, batch {batch}: {row['step_ms']:.2f} ms a "
                f"step (+-{row['spread_ms'] / 2:.2f})",
                flush=True,
            )
            if args.csv:
                new = not args.csv.exists()
                with args.csv.open("a", newline="") as file:
                    writer = csv.DictWriter(file, row.keys())
                    if new:
                        writer.writeheader()
                    writer.writerow(row)


if __name__ == "__main__":
    main()
