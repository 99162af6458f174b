"""Walking NNX models: paths, and layers put in the place of others."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

Path = tuple[str | int, ...]


def replace(model: Any, kinds: list[type], convert: Callable[[Path, Any], nnx.Module]) -> Any:
    """A copy of `model` with `convert(path, layer)` in place of every layer of these types.

    Goes through modules and through the dicts, lists and tuples that they hold. A module found
    in two places is converted once, at its first path, and stays one. Arrays are not copied.
    """
    done: dict[int, Any] = {}

    def walk(path: Path, node: Any) -> Any:
        if id(node) in done:
            return done[id(node)]
        if type(node) in kinds:
            done[id(node)] = new = convert(path, node)
            return new
        if isinstance(node, nnx.Pytree):
            done[id(node)] = node
            for name, child in list(vars(node).items()):
                if not name.startswith("_pytree__"):
                    new = walk(normal((*path, name)), child)
                    if new is not child:
                        is_module = isinstance(new, nnx.Pytree)
                        setattr(node, name, new if is_module else nnx.data(new))
            return node
        if isinstance(node, dict | list | tuple):
            entries, tree = jax.tree_util.tree_flatten_with_path(node, lambda x: x is not node)
            old = [child for _, child in entries]
            new = [walk(normal((*path, _key(key[0]))), child) for key, child in entries]
            if any(a is not b for a, b in zip(old, new, strict=True)):
                return tree.unflatten(new)
        return node

    return walk((), nnx.clone(model, graph=True))


def flatten(tree: Mapping[Any, Any]) -> dict[Path, Any]:
    """Arrays by path, from nested mappings, dotted or tuple keys, nnx.State, or Orbax's dicts.

    Variables become their arrays, and so does the {"value": array} that Orbax stores for one.
    """
    flat: dict[Path, Any] = {}

    def visit(path: Path, node: Any):
        if isinstance(node, Mapping) and not (set(node) == {"value"} and _is_leaf(node["value"])):
            for key, child in node.items():
                visit((*path, *_parts(key)), child)
        elif isinstance(node, Mapping):
            flat[path] = node["value"]
        elif node is not None:
            flat[path] = node[...] if isinstance(node, nnx.Variable) else node

    visit((), tree)
    return flat


def normal(path: tuple[Any, ...]) -> Path:
    """With ints for digits: checkpoints have "0" where NNX has 0."""
    return tuple(int(p) if isinstance(p, str) and p.isdigit() else p for p in path)


def dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "the model itself"


def _key(entry: Any) -> str | int:
    """The key of a dict, sequence or attribute entry of a pytree path."""
    name = next(n for n in ("key", "idx", "name") if hasattr(entry, n))
    return getattr(entry, name)


def _parts(key: Any) -> Path:
    return normal(
        key if isinstance(key, tuple) else tuple(key.split(".")) if isinstance(key, str) else (key,)
    )


def _is_leaf(node: Any) -> bool:
    return not isinstance(node, Mapping | nnx.Variable)
