"""The public op: y = act(x W^T + bias) with W encoded."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_flashllm.formats import SparseWeight
from jax_flashllm.formats.weight import HALF_DTYPES, check_process
from jax_flashllm.kernel import ACTIVATIONS, NO_BIAS, decode_p, spmm_p
from jax_flashllm.partition import cut

FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32)  # of x and bias


def spmm(
    w: SparseWeight,
    x: jax.Array,
    bias: jax.Array | None = None,
    activation: str | None = None,
    *,
    out_sharding: jax.sharding.PartitionSpec | jax.sharding.NamedSharding | None = None,
) -> jax.Array:
    """Returns act(x @ W.T + bias) with fp32 accumulation.

    w: encoded [M, K].  x: [..., K], float16, bfloat16 or float32.  bias: [M] or None.
    activation: None, "relu" or "gelu" (the exact one, with erf).
    out_sharding: on an Explicit mesh, where the result of a sum over column blocks shall lie: a
    dimension over the mesh axes of the sum makes it a reduce-scatter.
    Returns [..., M] in x.dtype.

    On a mesh W stays where it is (docs/sharding.md). Inside a `shard_map` a weight stands for the
    shards that its device has, [M, K] is `w.local_shape`, and sums are the caller's.

    W is multiplied as the dense matrix it stands for: an Inf or NaN in x meets the zeros too.
    Works under jit, vmap (over x, w and bias), grad and jvp (in x, bias and `w.values`), scan
    and remat. For gradients in w as a pytree pass `allow_int=True` to `jax.grad`: the result
    is a weight of the same structure, with float0 index buffers. `jax.export` must be told to
    trust the call: `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name)]` with name
    "flashllm_spmm_bitmap_v1" or "flashllm_spmm_delta_csr_v1"; import jax_flashllm before calling.

    Raises TypeError for other types or dtypes, ValueError when K or M differ.
    """
    check_product("spmm", w, x, bias, activation)
    m, k = w.local_shape
    x = jnp.asarray(x)
    wanted = None if out_sharding is None else _wanted(out_sharding, w, x)
    if x.size == 0:
        return jnp.zeros((*x.shape[:-1], m), x.dtype)
    R, C = w.local_grid
    rows, features = R * w.shard_rows, C * w.shard_columns
    if features > k:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, features - k)])
    # A sum over column blocks is complete after the product only: so wait bias and activation.
    fused = C == 1
    row_bias = np.zeros(NO_BIAS, np.float32)
    if bias is not None and fused:
        row_bias = jnp.pad(bias, (0, rows - m)) if rows > m else bias
    y = spmm_p.bind(
        *_alike(*w.buffers, w.values, x, jnp.asarray(row_bias)),
        format=w.format,
        shape=w.local_shape,
        activation=activation if fused else None,
        columns=C,
        batch=(),
        out_sharding=wanted,
    )
    y = cut("spmm", y, (*x.shape[:-1], m))
    if fused:
        return y
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return ACTIVATIONS[activation][1](y)


def check_product(op: str, w: SparseWeight, x, bias, activation) -> None:
    """Raises what `spmm` does, with `op` in front. Of x only shape and dtype count."""
    _check_weight(op, w)
    m, k = w.local_shape
    if not hasattr(x, "dtype"):
        raise TypeError(f"{op}: x must be an array, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: x is {x.dtype}; cast it to float16, bfloat16 or float32, "
            "e.g. x.astype(jnp.float32)"
        )
    if x.ndim < 1 or x.shape[-1] != k:
        got = x.shape[-1] if x.ndim else "no"
        raise ValueError(
            f"{op}: x has {got} features but W is [{m}, {k}]; pass x of shape [..., {k}]"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be None, 'relu' or 'gelu', got {activation!r}")
    if bias is not None:
        if not hasattr(bias, "dtype"):
            raise TypeError(f"{op}: bias must be an array, got {type(bias).__name__}")
        if bias.shape != (m,):
            raise ValueError(
                f"{op}: bias is {list(bias.shape)} but W is [{m}, {k}]; pass bias [{m}]"
            )
        if bias.dtype not in FLOATS:
            raise TypeError(f"{op}: bias is {bias.dtype}; cast it to x's dtype, {x.dtype}")


def _wanted(out_sharding, w: SparseWeight, x: jax.Array) -> PartitionSpec:
    """The spec of `out_sharding`, which the result can lie as."""
    spec = getattr(out_sharding, "spec", out_sharding)
    if not isinstance(spec, PartitionSpec):
        raise TypeError(
            f"spmm: out_sharding is {out_sharding!r}; pass a PartitionSpec or a NamedSharding"
        )
    meshes = [jax.typeof(a).sharding.mesh for a in (*w.buffers, w.values, x)]
    mesh = next((each for each in meshes if each.explicit_axes), None)
    if mesh is None:
        raise ValueError(
            f"spmm: out_sharding is {spec}, but neither W nor x lies on an Explicit mesh; leave it "
            "out, and on an Auto mesh put jax.lax.with_sharding_constraint on the result"
        )
    shape = *x.shape[:-1], w.local_shape[0]
    if len(spec) > len(shape):
        raise ValueError(
            f"spmm: out_sharding {spec} has {len(spec)} entries, but the result is {list(shape)}"
        )
    named = []
    for dim, (entry, size) in enumerate(zip(spec, shape, strict=False)):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for axis in axes:
            if axis not in mesh.axis_names:
                raise ValueError(
                    f"spmm: out_sharding names mesh axis {axis!r}; the mesh has "
                    f"{list(mesh.axis_names)}"
                )
            if axis in named:
                raise ValueError(f"spmm: out_sharding {spec} names mesh axis {axis!r} twice")
            named.append(axis)
        parts = math.prod(mesh.shape[a] for a in axes)
        if size % parts:
            raise ValueError(
                f"spmm: out_sharding {spec} cuts dimension {dim} of the result {list(shape)} into "
                f"{parts}, which does not divide {size}; pad it to {-(-size // parts) * parts}, or "
                "split another dimension"
            )
    return spec


def _alike(*operands):
    """Inside a shard_map: all operands varying over the mesh axes that any of them varies over."""
    varying = frozenset().union(*(jax.typeof(a).mat.varying for a in operands))
    for a in operands:
        missing = varying - jax.typeof(a).mat.varying
        yield jax.lax.pcast(a, tuple(missing), to="varying") if missing else a


def decode(w: SparseWeight) -> jax.Array:
    """Returns W as a dense [M, K] array on w's device; differentiable in `w.values`.

    `w.to_dense()` gives the same bits in NumPy. Raises TypeError for other than encoded weights,
    ValueError for stacked ones.
    """
    _check_weight("decode", w)
    dense = decode_p.bind(
        *_alike(*w.buffers, w.values),
        format=w.format,
        shape=w.local_shape,
        columns=w.local_grid[1],
        batch=(),
        out_sharding=None,
    )
    return cut("decode", dense, w.local_shape)


def _check_weight(op: str, w) -> None:
    check_process(op)
    if not isinstance(w, SparseWeight):
        raise TypeError(
            f"{op}: w must be an encoded weight, got {type(w).__name__}; make one with "
            "jax_flashllm.encode"
        )
    if not all(hasattr(b, "dtype") for b in (*w.buffers, w.values)):
        raise TypeError(f"{op}: w has leaves that are no arrays: {w!r}; make it with encode")
    if w.offsets.dtype == jax.dtypes.float0:
        raise TypeError(
            f"{op}: w is a gradient, without indices; take its values: w.with_values(grad.values)"
        )
    if w.values.ndim < 2:
        raise ValueError(
            f"{op}: w is a part of a weight, with values {list(w.values.shape)}; under jax.vmap "
            "over the tokens alone pass in_axes=(None, 0)"
        )
    if w.values.ndim > 2:
        raise ValueError(
            f"{op}: w is stacked, with values {list(w.values.shape)}; use jax.vmap or lax.scan"
        )
    if w.dtype not in HALF_DTYPES:
        raise TypeError(
            f"{op}: the values of w are {w.dtype}; cast them to float16 or bfloat16, "
            "e.g. w.with_values(w.values.astype(jnp.bfloat16))"
        )
