"""`sparsify`: a copy of an NNX model with its nnx.Linear layers made sparse."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flax import nnx

from jax_flashllm.formats import Format, Shards
from jax_flashllm.nn.dense import SparseDense
from jax_flashllm.nn.tree import Path, dotted, flatten, replace

M = TypeVar("M")


def sparsify(
    model: M,
    sparsity: float | None = None,
    *,
    masks: Mapping[Any, Any] | None = None,
    filter: Callable[[Path, nnx.Linear], bool] | None = None,
    format: Format = "auto",
    shards: Shards | None = None,
    dtype: Any = None,
    param_dtype: Any = None,
) -> M:
    """Returns a copy of `model` with SparseDense in place of every nnx.Linear.

    sparsity: 0 to 1; of each output's K weights the smallest round(sparsity * K) are dropped. A
        weight that sparse already is only encoded.
    masks: bool arrays [K, M] (the shape of `kernel`), True to keep, by the layer's path:
        {"blocks.0.fc1": mask} or {("blocks", 0, "fc1"): mask} or a tree like the model's
        state, e.g. `jax.tree.map(lambda p: p != 0, nnx.state(model, nnx.Param))`, of which the
        masks of kernels count. Layers without a mask stay dense.
    With neither, the zeros that are there are dropped.
    filter: called with (path, layer), e.g. `lambda path, layer: "lm_head" not in path`; layers
        for which it is False stay dense. Subclasses of nnx.Linear always do.
    format, shards, dtype, param_dtype: as in `SparseDense.from_dense`. A float32 weight is stored
        in its layer's 16-bit `dtype` if it has one, else in bfloat16, and computes in float32.

    Layers and Variables used in several places stay shared. Arrays that do not change are the
    same buffers as `model`'s: donate or delete the old model with that in mind.

    Only nnx.Linear itself is replaced: nnx.LinearGeneral and nnx.Einsum, and so the projections
    of nnx.MultiHeadAttention, stay dense. A model without any nnx.Linear gets a UserWarning.

    Raises ValueError for masks that name no layer, for layers that are SparseDense already and
    less sparse than asked, and as `SparseDense.from_dense`.
    """
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"sparsify: sparsity must be from 0 to 1, got {sparsity}")
    by_path = None
    if masks is not None:
        by_path = {p[:-1] if p[-1:] == ("kernel",) else p: m for p, m in flatten(masks).items()}
    known: set[Path] = set()
    sparse_already: list[Path] = []
    kernels: dict[int, SparseDense] = {}

    def convert(path: Path, linear: nnx.Linear | SparseDense) -> nnx.Module:
        if isinstance(linear, SparseDense):
            sparse_already.append(path)
            if sparsity is not None and linear.weight.sparsity < sparsity - 1 / linear.in_features:
                raise ValueError(
                    f"sparsify: {dotted(path)} is sparse already, {linear.weight.sparsity:.0%}, "
                    f"and is not pruned again to {sparsity:.0%}; start from the dense model"
                )
            return linear
        known.add(path)
        mask = None if by_path is None else by_path.get(path)
        if (by_path is not None and mask is None) or (filter and not filter(path, linear)):
            return linear
        try:
            layer = SparseDense.from_dense(
                linear,
                sparsity,
                mask=mask,
                format=format,
                shards=shards,
                dtype=dtype,
                param_dtype=param_dtype,
            )
        except (TypeError, ValueError) as e:
            e.add_note(f"sparsify: at {dotted(path)}")
            raise
        twin = kernels.setdefault(id(linear.kernel), layer)
        return layer if twin is layer else layer.share(twin)

    result = replace(model, [nnx.Linear, SparseDense], convert)
    if not known and not sparse_already:
        warnings.warn(
            f"sparsify: {type(model).__name__} has no nnx.Linear layer, so nothing became sparse",
            stacklevel=2,
        )
    state = nnx.to_flat_state(nnx.state(model, graph=True))
    variables = {p[:-1] if p[-1] == "kernel" else p for p, _ in state}
    unknown = [p for p in by_path or () if p not in known and p not in variables]
    if unknown:
        raise ValueError(
            f"sparsify: masks name {', '.join(map(dotted, unknown))}, but the nnx.Linear layers "
            f"are {', '.join(map(dotted, sorted(known, key=str))) or 'none'}"
        )
    return result
