"""How the primitives run on several devices.

A weight's buffers are blocks [S, ...]: R row blocks of each of C column blocks, a column's blocks
side by side, S = C R. Mesh axes over axis 0 of the buffers so split columns (c), then rows (m):

    op      operands besides the weight            result                   collective
    spmm    x [tokens, K over c]  bias [M over m]  y [tokens, M over m]     y is summed over c
    decode                                         W [M over m, K over c]
    sample  W [M over m, K over c]                 values [S over c and m]

The weight decides: its blocks stay where they are, activations move to meet them. On an Explicit
mesh types say where everything lies, and the op becomes a `shard_map` of its local self. On an Auto
mesh XLA's partitioner decides and asks us through `custom_partitioning`. Inside a `shard_map`, and
where there is one device, the op is its local self.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax._src import dispatch  # for one set, in `register`
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir, xla
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Axes = tuple[str, ...]
Spec = tuple[Axes, ...]  # mesh axes of each dimension

# What a dimension is. Numbers are dimensions that operands and result share: from 0 those of
# tokens, below it those of batches.
BLOCK, ROWS, COLUMNS, OWN = "block", "rows", "columns", "own"
Roles = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where operands and result lie, what one device has, and what is summed."""

    operands: tuple[Spec, ...]
    result: Spec
    grid: tuple[int, int]  # (R, C) of a device's part
    sums: Axes
    scatters: tuple[tuple[int, Axes], ...]  # (dimension, axes): sums of which each keeps a part

    def finish(self, y: jax.Array) -> jax.Array:
        """Sums one device's result with the others'."""
        for dim, axes in self.scatters:
            y = lax.psum_scatter(y, axes, scatter_dimension=dim, tiled=True)
        return lax.psum(y, self.sums) if self.sums else y


def make_plan(
    name: str,
    roles: tuple[Sequence[Roles], Roles],
    specs: Sequence[Spec],
    wanted: Spec,
    result_shape: Sequence[int],
    sizes: Mapping[str, int],
    grid: tuple[int, int],
) -> Plan:
    """From where operands lie, and where the result should: what each device does.

    roles: of the operands' dimensions and of the result's.   sizes: of mesh axes.
    grid: (R, C) of the whole weight. Raises ValueError for splits that would gather the weight.
    """
    blocks: Axes = ()
    for spec, dims in zip(specs, roles[0], strict=True):
        for axes, role in zip(spec, dims, strict=True):
            if role == BLOCK:
                short, long = sorted((blocks, axes), key=len)
                if long[: len(short)] != short:
                    raise ValueError(
                        f"{name}: the buffers of W lie apart, axis 0 over {list(axes)} of one and "
                        f"over {list(blocks)} of another, so that one would have to be moved; lay "
                        "all of W out together with jax_flashllm.shard"
                    )
                blocks = long
            if role == OWN and axes:
                raise ValueError(
                    f"{name}: a buffer of W is split over mesh axis {axes[0]!r} within its blocks, "
                    "and would have to be gathered; split axis 0 alone, as jax_flashllm.shard does"
                )
    rows, columns = _split(name, blocks, sizes, grid)
    where: dict[str | int, Axes] = {BLOCK: blocks, ROWS: rows, COLUMNS: columns, OWN: ()}
    taken = set(blocks)
    for spec, dims in [*zip(specs, roles[0], strict=True), (wanted, roles[1])]:
        for axes, role in zip(spec, dims, strict=True):
            if isinstance(role, int) and not where.get(role):
                where[role] = tuple(a for a in axes if a not in taken)
                taken.update(axes)
    result = [where[r] for r in roles[1]]
    sums, scatters = (() if BLOCK in roles[1] or COLUMNS in roles[1] else columns), []
    for dim, axes in enumerate(wanted):
        has, more = axes[: len(result[dim])], axes[len(result[dim]) :]
        fits = result_shape[dim] % math.prod(sizes[a] for a in axes) == 0
        if more and has == result[dim] and set(more) <= set(sums) and fits:
            result[dim] = axes
            scatters.append((dim, more))
            sums = tuple(a for a in sums if a not in more)
    n_rows, n_columns = (math.prod(sizes[a] for a in axes) for axes in (rows, columns))
    return Plan(
        tuple(tuple(where[r] for r in dims) for dims in roles[0]),
        tuple(result),
        (grid[0] // n_rows, grid[1] // n_columns),
        sums,
        tuple(scatters),
    )


def _split(name: str, blocks: Axes, sizes: Mapping[str, int], grid: tuple[int, int]):
    """Mesh axes over a weight's blocks: those over rows, those over columns."""
    R, C = grid
    parts, n = 1, 0
    while n < len(blocks) and parts < C:
        parts *= sizes[blocks[n]]
        n += 1
    m = math.prod(sizes[a] for a in blocks[n:])
    if C % parts or R % m or (parts < C and m > 1):
        raise ValueError(
            f"{name}: W has {R} x {C} blocks (rows x columns), which mesh axes {list(blocks)} of "
            f"sizes {[sizes[a] for a in blocks]} do not divide into rows and columns; lay it out "
            "again with jax_flashllm.shard(w, mesh, rows=..., columns=...)"
        )
    return blocks[n:], blocks[:n]


# ---- specs ----


def _to_spec(spec: P | Sequence[Any], ndim: int) -> Spec:
    entries = [() if e is None else e if isinstance(e, tuple) else (e,) for e in spec]
    return (*entries, *((),) * (ndim - len(entries)))


def _split_by(spec: Spec, mesh) -> Spec:
    """Without the axes of size 1, which split nothing."""
    return tuple(tuple(a for a in axes if mesh.shape[a] > 1) for axes in spec)


def _to_p(spec: Spec) -> P:
    return P(*(axes[0] if len(axes) == 1 else axes or None for axes in spec))


def _decode_sharding(sharding, ndim: int, mesh: Mesh) -> Spec:
    """The mesh axes of each dimension, of what XLA's partitioner hands over."""
    hlo = sharding._to_xla_hlo_sharding(ndim)
    if hlo.is_replicated() or not hlo.tile_assignment_dimensions():
        return ((),) * ndim
    tiles = hlo.tile_assignment_dimensions()
    devices = np.asarray(hlo.tile_assignment_devices()).reshape(tiles)
    spec = []
    for dim in range(ndim):
        line = np.moveaxis(devices, dim, 0).reshape(tiles[dim], -1)[:, 0]
        places = zip(mesh.axis_names, np.unravel_index(line, mesh.devices.shape), strict=True)
        # The step at which a mesh axis moves first, least for the minor one.
        moves = {a: int(np.argmax(at != at[0])) for a, at in places}
        axes = sorted((a for a in moves if moves[a]), key=lambda a: -moves[a])
        if math.prod(mesh.shape[a] for a in axes) != tiles[dim]:
            raise ValueError(
                f"jax_flashllm: an operand is split {tiles[dim]} ways over a part of mesh axes "
                f"{axes} of sizes {[mesh.shape[a] for a in axes]}; rows and columns of W need mesh "
                "axes of their own, which divide its blocks"
            )
        spec.append(tuple(axes))
    return tuple(spec)


# ---- the primitives ----


def register(
    p: Primitive, roles: Callable, shape: Callable, locals: Mapping[str, Callable]
) -> None:
    """Gives `p` its abstract evaluation and its lowerings.

    roles: (*operands) -> roles of the operands' dimensions, and of the result's.
    shape: (*operands, **params) -> ShapeDtypeStruct of the result.
    locals: by platform, the op on one device: (*operands, **params) -> result.

    All of these see operands without batch axes. `p`'s own parameters besides `params`:
    batch, for each batch axis of the result which operands have it, outermost first; and
    out_sharding, where the result shall lie on an Explicit mesh, or None.
    """
    name = p.name.removeprefix("flashllm_")
    p.def_impl(functools.partial(xla.apply_primitive, p))
    p.def_abstract_eval(functools.partial(_abstract, name, roles, shape))
    # custom_partitioning has to know the devices; JAX looks for primitives that do.
    dispatch.prim_requires_devices_during_lowering.add(p)
    for platform, local in locals.items():
        rule = functools.partial(_lower, name, roles, local)
        mlir.register_lowering(p, rule, platform=platform)


def register_composed(
    p: Primitive, shape: Callable, composed: Callable, locals: Mapping[str, Callable]
) -> None:
    """As `register`, for a `p` of several results that does what `composed` does.

    shape: (*avals, **params) -> avals of the results.
    locals: by platform, the op on one device. Everywhere else it is `composed` that runs.
    """
    p.multiple_results = True
    p.def_impl(functools.partial(xla.apply_primitive, p))
    p.def_abstract_eval(shape)
    dispatch.prim_requires_devices_during_lowering.add(p)  # for what it is composed of
    mlir.register_lowering(p, mlir.lower_fun(composed, multiple_results=True))
    for platform, local in locals.items():

        def lower(ctx, *args, local=local, **params):
            alone = _mesh(ctx.module_context.axis_context) is None
            run = mlir.lower_fun(local if alone else composed, multiple_results=True)
            return run(ctx, *args, **params)

        mlir.register_lowering(p, lower, platform=platform)


def _abstract(name, roles, result, /, *avals, batch, out_sharding, **params):
    out = result(*_unbatched(avals, batch), **params)
    operands, role_of = _roles(roles, avals, batch)
    sizes = {
        role: size
        for aval, dims in zip(avals, operands, strict=True)
        for role, size in zip(dims, aval.shape, strict=True)
    }
    dims = *(sizes[role] for role in role_of[: len(batch)]), *out.shape
    like = max(avals, key=lambda a: (not a.sharding.mesh.empty, len(a.mat.varying)))
    spec = P(*(None,) * len(dims))
    if like.sharding.mesh.explicit_axes:
        plan = _plan_of_types(name, roles, avals, dims, batch, out_sharding, params)
        spec = _to_p(plan.result)
    sharding = like.sharding.update(spec=spec)
    return like.update(shape=dims, dtype=out.dtype, weak_type=False, sharding=sharding)


def _lower(name, roles, local, /, ctx, *args, batch, out_sharding, **params):
    avals, out = ctx.avals_in, ctx.avals_out[0]
    mesh = _mesh(ctx.module_context.axis_context)
    typed = out.sharding.mesh
    run = functools.partial(_run, local, batch=batch, **params)
    if mesh is not None and mesh.explicit_axes and not mesh.auto_axes:
        if mesh.manual_axes and jax.__version_info__ < (0, 12):
            _warn_of_gather(name, avals, params)
        plan = _plan_of_types(name, roles, avals, out.shape, batch, out_sharding, params)
        part = _part(params, _grid(avals, batch, params), plan.grid)
        run = _mapped(plan, typed, functools.partial(run, **part))
    elif mesh is not None:
        run = _partitioned(name, roles, run, mesh, avals, out, batch, params)
    return mlir.lower_fun(run, multiple_results=False)(ctx, *args)


def _run(local, /, *args, batch, **params):
    """The op on one device, once for each element of a batch."""
    if not batch:
        return local(*args, **params)

    def element(slices):
        it = iter(slices)
        each = (next(it) if b else a for a, b in zip(args, batch[0], strict=True))
        return _run(local, *each, batch=batch[1:], **params)

    return lax.map(element, [a for a, b in zip(args, batch[0], strict=True) if b])


def _unbatched(avals, batch):
    for level in batch:
        avals = [
            jax.ShapeDtypeStruct(a.shape[1:] if b else a.shape, a.dtype)
            for a, b in zip(avals, level, strict=True)
        ]
    return avals


def _roles(roles, avals, batch) -> tuple[Sequence[Roles], Roles]:
    operands, result = roles(*_unbatched(avals, batch))
    for n, level in reversed(list(enumerate(batch))):
        operands = [(-1 - n, *r) if b else r for r, b in zip(operands, level, strict=True)]
        result = (-1 - n, *result)
    return operands, result


def _grid(avals, batch, params) -> tuple[int, int]:
    offsets = _unbatched(avals, batch)[1]
    return offsets.shape[0] // params["columns"], params["columns"]


def _part(params, grid: tuple[int, int], part: tuple[int, int]) -> dict[str, Any]:
    """Parameters of the op on `part` of the blocks of `grid`."""
    if part == grid:
        return {}
    rows, columns = (-(-n // blocks) for n, blocks in zip(params["shape"], grid, strict=True))
    return {"shape": (part[0] * rows, part[1] * columns), "columns": part[1]}


def _mesh(context) -> Mesh | None:
    """The mesh that a program is lowered for, manual axes marked; None where one device is left."""
    mesh = getattr(context, "mesh", None)
    if mesh is not None:  # inside a shard_map
        types = [
            jax.sharding.AxisType.Manual if a in context.manual_axes else t
            for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True)
        ]
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=tuple(types))
    elif getattr(context, "num_devices", 1) > 1:
        devices, typed = np.array(context.device_assignment), context.abstract_mesh
        if typed is None:  # shardings without a mesh
            return Mesh(devices, ("devices",))
        mesh = Mesh(
            devices.reshape(typed.axis_sizes), typed.axis_names, axis_types=typed.axis_types
        )
    if mesh is None or math.prod(mesh.shape[a] for a in _free(mesh)) == 1:
        return None
    return mesh


def _free(mesh: Mesh) -> Axes:
    return (*mesh.auto_axes, *mesh.explicit_axes)


# ---- Explicit meshes ----


def _plan_of_types(name, roles, avals, dims, batch, out_sharding, params) -> Plan:
    operands, result = _roles(roles, avals, batch)
    mesh = next(a.sharding.mesh for a in avals if not a.sharding.mesh.empty)
    specs = [_split_by(_to_spec(a.sharding.spec, a.ndim), mesh) for a in avals]
    wanted = _split_by(_to_spec(out_sharding or (), len(dims)), mesh)
    grid = _grid(avals, batch, params)
    plan = make_plan(name, (operands, result), specs, wanted, dims, mesh.shape, grid)
    for spec, new, aval in zip(specs, plan.operands, avals, strict=True):
        if any(axes != to[: len(axes)] for axes, to in zip(spec, new, strict=True)):
            raise ValueError(
                f"{name}: an operand {aval.str_short()} has to lie as {_to_p(new)} to meet W, of "
                f"{grid[0]} x {grid[1]} blocks (rows x columns); jax.sharding.reshard it, or lay "
                "W out otherwise with jax_flashllm.shard"
            )
    if out_sharding is not None and wanted != plan.result:
        raise ValueError(
            f"{name}: out_sharding is {_to_p(wanted)}, but W leaves the result as "
            f"{_to_p(plan.result)}; of a sum over columns any dimension may be split"
        )
    return plan


def _mapped(plan: Plan, mesh, run: Callable) -> Callable:
    """`run` on the parts of an Explicit mesh's devices."""
    specs = tuple(map(_to_p, plan.operands))
    body = jax.shard_map(
        lambda *args: plan.finish(run(*args)),
        mesh=mesh,
        in_specs=specs,
        out_specs=_to_p(plan.result),
        axis_names=set(mesh.explicit_axes),
        check_vma=False,
    )

    def meet(*args):
        shardings = [NamedSharding(mesh, s) for s in specs]
        return body(*map(jax.sharding.reshard, args, shardings))

    return meet


def _warn_of_gather(name, avals, params) -> None:
    split = [a for a in avals[:3] if any(_to_spec(a.sharding.spec, a.ndim))]
    if split:
        nbytes = sum(a.size * a.dtype.itemsize for a in split)
        warnings.warn(
            f"{name}: jax {jax.__version__} gathers what enters a partly manual shard_map of an "
            f"Explicit mesh, here the buffers of W {list(params['shape'])}, {nbytes} bytes on each "
            "device; jax 0.12 does not, nor do Auto meshes",
            stacklevel=2,
        )


def explicit(aval, batched: int = 0) -> NamedSharding | None:
    """Where an array of this type lies, if its mesh is Explicit; an element of leading batches."""
    if not aval.sharding.mesh.explicit_axes:
        return None
    return aval.sharding.update(spec=P(*aval.sharding.spec[batched:]))


def cut(op: str, a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`a` without the padding to whole blocks; on an Explicit mesh its parts have to stay alike."""
    if a.shape == shape:
        return a
    sharding = jax.typeof(a).sharding  # says nothing on other meshes
    for size, axes in zip(shape, _to_spec(sharding.spec, a.ndim), strict=True):
        parts = math.prod(sharding.mesh.shape[n] for n in axes)
        if size % parts:
            raise ValueError(
                f"{op}: W has {size} rows or columns over mesh axes {list(axes)} of an Explicit "
                f"mesh, {parts} parts, which do not divide them; pad W to "
                f"{-(-size // parts) * parts}, or take an Auto mesh"
            )
    return lax.slice(a, (0,) * a.ndim, shape)


def dense_sharding(offsets, shape: tuple[int, int], columns: int) -> NamedSharding | None:
    """Where the dense [M, K] of a weight's blocks lies on an Explicit mesh."""
    sharding = explicit(jax.typeof(offsets))
    if sharding is None:
        return None
    grid = offsets.shape[0] // columns, columns
    blocks = _split_by(_to_spec(sharding.spec, offsets.ndim), sharding.mesh)[0]
    return NamedSharding(sharding.mesh, _to_p(_split("decode", blocks, sharding.mesh.shape, grid)))


def with_leading(spec: P | None, x, dim: int = 0, at: int = 0) -> P | None:
    """`spec` with one more entry, of x's dimension `dim`."""
    if spec is None:
        return None
    sharding = explicit(jax.typeof(x))
    entry = None if sharding is None else sharding.spec[dim]
    return P(*spec[:at], entry, *spec[at:])


# ---- Auto meshes ----


def _partitioned(name, roles, run, mesh: Mesh, avals, out, batch, params) -> Callable:
    """`run`, with a rule for XLA's partitioner."""
    roles = _roles(roles, avals, batch)
    grid = _grid(avals, batch, params)

    # In a partly manual shard_map XLA counts the devices of one group; sums name all of them.
    at = tuple(slice(None) if a in _free(mesh) else 0 for a in mesh.axis_names)
    group = Mesh(mesh.devices[at], [a for a in mesh.axis_names if a in _free(mesh)])

    def partition(_, operands, result):
        specs = [_decode_sharding(a.sharding, len(a.shape), group) for a in operands]
        wanted = _decode_sharding(result.sharding, len(result.shape), group)
        plan = make_plan(name, roles, specs, wanted, result.shape, mesh.shape, grid)
        part = functools.partial(run, **_part(params, grid, plan.grid))
        shardings = [NamedSharding(group, _to_p(s)) for s in (*plan.operands, plan.result)]
        return mesh, lambda *args: plan.finish(part(*args)), shardings[-1], tuple(shardings[:-1])

    rule, sizes = _rule(roles, params["shape"], grid)
    # Of the function itself only the type counts.
    op = custom_partitioning(lambda *args: lax.full(out.shape, 0, out.dtype))
    sums = grid[1] > 1 and COLUMNS not in roles[1] and BLOCK not in roles[1]
    op.def_partition(
        partition=partition,
        decode_shardings=False,
        sharding_rule=rule,
        reduction_factors=("c",) if sums else (),
        **sizes,
    )
    return op


def _rule(roles, shape: tuple[int, int], grid: tuple[int, int]) -> tuple[str, dict[str, int]]:
    """Shardy's rule: a weight's rows split what result rows split, its columns what x's split."""
    (R, C), (M, K) = grid, shape
    sizes = {"m": R, "c": C, "r": -(-M // R), "k": -(-K // C)}
    compound, alone, own = set(), set(), iter(range(99))

    def factors(role) -> str:
        if role == OWN:
            return f"o{next(own)}"
        if isinstance(role, int):
            return f"t{role}" if role >= 0 else f"b{-role}"
        names = {BLOCK: "cm", ROWS: "mr", COLUMNS: "ck"}[role]
        # Among several factors Shardy takes none of size 1.
        names = [n for n in names if not (n == "c" and C == 1) and not (n == "m" and R == 1)]
        names = [n for n in names if len(names) == 1 or sizes[n] > 1]
        if len(names) > 1:
            compound.update(names)
            return f"({' '.join(names)})"
        alone.update(names)
        return names[0] if names else f"o{next(own)}"

    texts = [" ".join(map(factors, dims)) for dims in (*roles[0], roles[1])]
    return f"{', '.join(texts[:-1])} -> {texts[-1]}", {n: sizes[n] for n in compound - alone}
