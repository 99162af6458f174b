"""`sparsify`: a copy of an NNX model with its nnx.Linear layers made sparse."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from jax_flashllm.formats import Format
from jax_flashllm.nn.dense import SparseDense
from jax_flashllm.nn.weights import Mask

M = TypeVar("M")
Path = tuple[str | int, ...]


def sparsify(
    model: M,
    sparsity: float | None = None,
    *,
    masks: Mapping[Any, Any] | None = None,
    filter: Callable[[Path, nnx.Linear], bool] | None = None,
    format: Format = "auto",
    shards: int = 1,
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

    Raises ValueError for masks that name no layer, and as `SparseDense.from_dense`.
    """
    by_path = None if masks is None else _flat(masks)
    known: set[Path] = set()
    done: dict[int, Any] = {}
    kernels: dict[int, SparseDense] = {}

    def convert(path: Path, linear: nnx.Linear):
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
            e.add_note(f"sparsify: at {_dotted(path)}")
            raise
        twin = kernels.setdefault(id(linear.kernel), layer)
        if twin is not layer:  # two layers of one kernel
            layer.kernel, layer.kernel_index = twin.kernel, twin.kernel_index
            layer.kernel_offsets = twin.kernel_offsets
        return layer

    def walk(path: Path, node: Any) -> Any:
        if id(node) in done:
            return done[id(node)]
        if type(node) is nnx.Linear:
            done[id(node)] = new = convert(path, node)
            return new
        if isinstance(node, nnx.Pytree):
            done[id(node)] = node
            for name, child in list(vars(node).items()):
                if not name.startswith("_pytree__"):
                    key = int(name) if isinstance(node, nnx.List) and name.isdigit() else name
                    new = walk((*path, key), child)
                    if new is not child:
                        is_module = isinstance(new, nnx.Pytree)
                        setattr(node, name, new if is_module else nnx.data(new))
            return node
        if isinstance(node, dict | list | tuple):
            entries, tree = jax.tree_util.tree_flatten_with_path(node, lambda x: x is not node)
            old = [child for _, child in entries]
            new = [walk((*path, _key(key[0])), child) for key, child in entries]
            if any(a is not b for a, b in zip(old, new, strict=True)):
                return tree.unflatten(new)
        return node

    result = walk((), nnx.clone(model, graph=True))
    state = nnx.to_flat_state(nnx.state(model, graph=True))
    variables = {p[:-1] if p[-1] == "kernel" else p for p, _ in state}
    unknown = [p for p in by_path or () if p not in known and p not in variables]
    if unknown:
        raise ValueError(
            f"sparsify: masks name {', '.join(map(_dotted, unknown))}, but the nnx.Linear layers "
            f"are {', '.join(map(_dotted, sorted(known, key=str))) or 'none'}"
        )
    return result


def _key(entry: Any) -> str | int:
    """The key of a dict, sequence or attribute entry of a pytree path."""
    name = next(n for n in ("key", "idx", "name") if hasattr(entry, n))
    return getattr(entry, name)


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "the model itself"


def _flat(masks: Mapping[Any, Any]) -> dict[Path, Mask]:
    """Masks by the path of their layer, from any nesting of mappings."""
    flat = {}

    def visit(path: Path, node: Any):
        if isinstance(node, Mapping):
            for key, child in node.items():
                visit((*path, *_parts(key)), child)
        elif node is not None:
            array = node[...] if isinstance(node, nnx.Variable) else node
            flat[path[:-1] if path[-1:] == ("kernel",) else path] = array

    visit((), masks)
    return flat


def _parts(key: Any) -> Path:
    parts = key if isinstance(key, tuple) else key.split(".") if isinstance(key, str) else (key,)
    return tuple(int(p) if isinstance(p, str) and p.isdigit() else p for p in parts)
