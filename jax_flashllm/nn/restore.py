"""`restore`: a sparse model from the code of the dense one and saved arrays."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from jax_flashllm.nn.dense import SparseDense, annotation_of, annotation_of_placed
from jax_flashllm.nn.tree import Path, dotted, flatten, normal, replace
from jax_flashllm.nn.weights import rebuild

M = TypeVar("M")


def restore(model: M, state: Mapping[Any, Any]) -> M:
    """Returns a copy of `model` with the arrays of `state`, sparse where the state is.

    How many values a sparse layer has, in which format, is known to its arrays alone, so no
    template of the right shapes can be made beforehand. Save and restore like this:

        checkpointer.save(path, nnx.state(model))
        model = nn.restore(nnx.eval_shape(make_dense_model), checkpointer.restore(path))

    model: the dense model, abstract as here or not, or a sparse one. Each nnx.Linear for which
        the state has a `kernel_index` becomes a SparseDense, with the layer's own `dtype`.
    state: what Orbax restores without a template, or an nnx.State, or nested dicts.

    On a mesh (`jax.set_mesh`) annotated variables are laid out over it; the state may come from
    another mesh, with other numbers of shards.

    Raises ValueError for arrays that are missing, left over, or of another shape. Random state
    (nnx.RngState) may be missing.
    """
    arrays = flatten(state)

    kernels: dict[int, SparseDense] = {}

    def convert(path: Path, layer: nnx.Linear | SparseDense) -> nnx.Module:
        twin = kernels.get(id(layer.kernel))  # of two layers of one kernel the first was saved
        if twin is not None:
            return SparseDense.from_encoded(twin.weight, layer.bias, layer.dtype).share(twin)
        if (*path, "kernel_index") not in arrays:
            return layer
        names = [(*path, n) for n in ("kernel", "kernel_index", "kernel_offsets")]
        lost = [dotted(n) for n in names if n not in arrays]
        if lost:
            raise ValueError(f"restore: {', '.join(lost)}: not in the state, though its index is")
        w = [arrays[n] for n in names]
        grid = arrays.get((*path, "kernel_grid"))
        if grid is not None:  # in NumPy: JAX does nothing to what lies on another Explicit mesh
            grid = np.asarray(grid)
            grid = int(grid[0]), int(grid[1])
        weight = rebuild(*w, shape=(layer.out_features, layer.in_features), grid=grid)
        metadata = annotation_of(layer) or annotation_of_placed(weight)
        if not jax.sharding.get_mesh().empty:
            metadata.pop("mesh", None)
        new = SparseDense.from_encoded(weight, layer.bias, layer.dtype, kernel_metadata=metadata)
        if metadata:  # laid out over the model's mesh, maybe as other shards
            for name in ("kernel", "kernel_index", "kernel_offsets", "kernel_grid"):
                variable = getattr(new, name)
                arrays.pop((*path, name), None)
                if variable is not None:
                    arrays[(*path, name)] = variable[...]
        return kernels.setdefault(id(layer.kernel), new)

    result = replace(model, [nnx.Linear, SparseDense], convert)
    graph, variables = nnx.split(result, graph=True)
    new, missing = [], []
    for raw, variable in nnx.to_flat_state(variables):
        path = normal(raw)
        if path not in arrays:
            new.append((raw, variable))
            if not isinstance(variable, nnx.RngState):
                missing.append(path)
            continue
        array, old = arrays.pop(path), variable.get_value()
        if array.shape != old.shape:
            raise ValueError(
                f"restore: {dotted(path)} is {list(array.shape)} in the state but "
                f"{list(old.shape)} in the model; pass the model that was saved"
            )
        new.append((raw, variable.replace(_placed(array, variable))))
    for paths, where in [(missing, "the model but not in the state"), (arrays, "the state only")]:
        if paths:
            raise ValueError(f"restore: {', '.join(map(dotted, paths))}: in {where}")
    return nnx.merge(graph, nnx.from_flat_state(new))


def _placed(array: Any, variable: nnx.Variable) -> Any:
    """The array where its variable's annotation says, if jax.set_mesh gave a mesh."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return array
    spec = nnx.get_partition_spec(variable).get_value()
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))
