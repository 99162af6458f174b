"""The matrices of OPT and Llama models, [M, K] = [out, in]."""


def _opt(d: int) -> dict[str, tuple[int, int]]:
    return {"QKV": (3 * d, d), "output": (d, d), "FFN up": (4 * d, d), "FFN down": (d, 4 * d)}


def _llama(d: int, ffn: int, kv: int | None = None) -> dict[str, tuple[int, int]]:
    return {
        "QKV": (d + 2 * (kv or d), d),
        "output": (d, d),
        "gate, up": (ffn, d),
        "down": (d, ffn),
    }


# The largest first: what a run that is cut short should have.
MODELS = {
    "OPT-30B": _opt(7168),
    "OPT-66B": _opt(9216),
    "OPT-175B": _opt(12288),
    "Llama-7B": _llama(4096, 11008),
    "Llama-13B": _llama(5120, 13824),
    "Llama-33B": _llama(6656, 17920),
    "Llama-65B": _llama(8192, 22016),
    "Llama-70B": _llama(8192, 28672, kv=1024),
    "OPT-13B": _opt(5120),
    "OPT-6.7B": _opt(4096),
    "OPT-2.7B": _opt(2560),
    "OPT-1.3B": _opt(2048),
    "OPT-350M": _opt(1024),
    "OPT-125M": _opt(768),
}


def names(shape: tuple[int, int]) -> str:
    """The matrices that are [M, K]."""
    return "; ".join(
        f"{m} {n}" for m, parts in MODELS.items() for n, s in parts.items() if s == shape
    )


def all_shapes() -> list[tuple[int, int]]:
    return list(dict.fromkeys(s for parts in MODELS.values() for s in parts.values()))
