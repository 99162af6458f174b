"""OPT on a mesh: each device runs the forward on its heads, its part of the FFN, its rows.

    tensor axis   q, k, v, fc1: rows of W     out_proj, fc2: columns of W, outputs summed
                  embeddings and head: rows of the vocabulary, where the axis divides it
    data axis     rows of the batch, and their caches

One `shard_map` around the forward: two all-reduces a block, one for the embedding, and one gather
of the logits. What no axis splits (norms, positions, projections) is on every device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashllm.models.cache import KVCache
from jax_flashllm.models.config import OPTConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, the names of its two axes, and how a config is split over them."""

    mesh: Mesh
    tensor: str | None
    data: str | None
    splits_vocabulary: bool

    @classmethod
    def create(cls, mesh: Mesh, config: OPTConfig, tensor: str, data: str) -> Layout:
        """Raises ValueError for axes that are not there, and sizes that do not divide the model."""
        if not isinstance(mesh, Mesh):
            raise TypeError(
                f"opt.load: mesh is a {type(mesh).__name__}; pass one that jax.make_mesh makes"
            )
        names = mesh.axis_names
        if tensor == data:
            raise ValueError(
                f"opt.load: tensor and data are both {tensor!r}; name two axes, of which the mesh "
                "may lack one"
            )
        if {tensor, data} <= set(names) and len(names) > 2:
            others = [n for n in names if n not in (tensor, data)]
            raise ValueError(
                f"opt.load: the mesh has axes {list(names)}, but the model is split over "
                f"{tensor!r} and {data!r} alone; make a mesh without {others}"
            )
        if not {tensor, data} & set(names) or not set(names) <= {tensor, data}:
            raise ValueError(
                f"opt.load: the mesh has axes {list(names)}; name them {tensor!r} (tensor "
                f"parallel) and {data!r} (data parallel), or pass their names as tensor= and data="
            )
        tp = mesh.shape.get(tensor, 1)
        sizes = {"num_attention_heads": config.num_attention_heads, "ffn_dim": config.ffn_dim}
        for name, size in sizes.items():
            if size % tp:
                raise ValueError(
                    f"opt.load: mesh axis {tensor!r} of size {tp} does not divide {name} = {size}; "
                    f"make it {math.gcd(*sizes.values(), tp)}"
                )
        return cls(
            # Inside a shard_map the kind of a mesh makes no difference, outside XLA shall decide.
            Mesh(mesh.devices, names),
            tensor if tensor in names else None,
            data if data in names else None,
            config.vocab_size % tp == 0,
        )

    @property
    def parts(self) -> int:
        """Devices that share a block."""
        return 1 if self.tensor is None else self.mesh.shape[self.tensor]

    @property
    def rows(self) -> int:
        """Devices that share the rows of a batch."""
        return 1 if self.data is None else self.mesh.shape[self.data]

    def check_rows(self, rows: int, what: str) -> None:
        n = self.rows
        if rows % n:
            raise ValueError(
                f"{what}: {rows} rows over mesh axis {self.data!r} of size {n}; pass a multiple of "
                f"{n} rows, or a mesh where it is {math.gcd(rows, n)}"
            )

    def sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, P(*spec))

    @property
    def cache(self) -> KVCache:
        """PartitionSpecs of a cache, whose rows are ordered by device, then row and head."""
        axes = tuple(a for a in (self.data, self.tensor) if a is not None)
        return KVCache(P(axes), P(axes), P(self.data), P())  # type: ignore[arg-type]

    def placed(self, shapes: Any) -> Any:
        """Shapes of a cache, or of tokens, that say where they lie."""
        specs = self.cache if isinstance(shapes, KVCache) else P()

        def place(spec, part):
            where = self.sharding(*spec)
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), part
            )

        return jax.tree.map(place, specs, shapes, is_leaf=lambda x: isinstance(x, P))

    def put(self, array: np.ndarray, *spec: Any) -> jax.Array:
        """Each device's part of a host array, and nothing else."""
        # Copied, since a CPU device may keep a view, and with it all of the array.
        return jax.make_array_from_callback(
            array.shape, self.sharding(*spec), lambda at: array[at].copy()
        )

    def metadata(self, *spec: Any) -> dict[str, Any]:
        """Of a Variable whose array `put` has placed."""
        if not any(spec):
            return {}
        return {"out_sharding": spec, "mesh": self.mesh, "eager_sharding": False}

    def sum(self, y: jax.Array) -> jax.Array:
        """Inside the forward: over the devices that share a block."""
        return y if self.tensor is None else lax.psum(y, self.tensor)

    def embed(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """Inside the forward: rows `ids` of the whole table, of which `table` is this part."""
        if self.tensor is None or not self.splits_vocabulary:
            return table[ids]
        at = ids - lax.axis_index(self.tensor) * len(table)
        mine = (at >= 0) & (at < len(table))
        return lax.psum(jnp.where(mine[..., None], table[jnp.where(mine, at, 0)], 0), self.tensor)

    def gather(self, logits: jax.Array) -> jax.Array:
        """Inside the forward: all of the vocabulary."""
        if self.tensor is None or not self.splits_vocabulary:
            return logits
        return lax.all_gather(logits, self.tensor, axis=logits.ndim - 1, tiled=True)

    def forward(self, model: Any, ids, mask, cache: KVCache | None, last_only: bool, empty: bool):
        """`model._forward` on the parts of every device."""
        self.check_rows(ids.shape[0], "OPT")
        graph, state = nnx.split(model)
        specs = nnx.get_partition_spec(state)
        rows = P(self.data)
        caches = None if cache is None else self.cache

        def local(state, ids, mask, cache):
            return nnx.merge(graph, state)._forward(ids, mask, cache, last_only, empty)

        mapped = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(specs, rows, None if mask is None else rows, caches),
            out_specs=rows if cache is None else (rows, self.cache),
            check_vma=False,
        )
        with self._own_mesh():
            return mapped(state, ids, mask, cache)

    def _own_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """As `model_mesh`, while tracing too."""
        outer, own = jax.sharding.get_abstract_mesh(), self.mesh.abstract_mesh
        if outer.empty or outer == own:
            return contextlib.nullcontext()
        if outer.axis_names != own.axis_names or outer.axis_sizes != own.axis_sizes:
            raise ValueError(
                f"OPT: the model lies on a mesh {dict(own.shape)}, but jax.set_mesh names "
                f"{dict(outer.shape)}; call the model outside of it, or under its own mesh"
            )
        return jax.sharding.use_abstract_mesh(own)


def model_mesh(layout: Layout | None) -> contextlib.AbstractContextManager[Any]:
    """In it programs see the model's own mesh, whatever `jax.set_mesh` named outside."""
    return contextlib.nullcontext() if layout is None else jax.set_mesh(layout.mesh)
