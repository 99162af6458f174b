"""Products over meshes: right to the bit, with these collectives and no others."""

import contextlib
import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flashllm as jf

M, K, B, T = 32, 64, 8, 2
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
both = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def integers(shape, seed, density=1.0, dtype=np.float16):
    """Small ones, so that sums are exact in any order."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.integers(-4, 5, shape), 0).astype(dtype)


W = integers((M, K), 0, 0.4)
X = integers((B, T, K), 1, dtype=np.float32)
Y = X @ W.T.astype(np.float32)
Y_BYTES = Y.nbytes


def mesh_of(kind, shape=(4, 2), names="ab"):
    return jax.make_mesh(shape, tuple(names), axis_types=(kind,) * len(shape))


def put(mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def axes(spec, ndim):
    entries = [e if isinstance(e, tuple) else () if e is None else (e,) for e in spec]
    return entries + [()] * (ndim - len(entries))


def run(f, *args, y, spec=None, moves=()):
    """Compiles f for these arguments, checks its result, where it lies and what it moved."""
    compiled = jax.jit(f).lower(*args).compile()
    result = compiled(*args)
    np.testing.assert_array_equal(result, y)
    assert collectives(compiled) == sorted(moves)
    if spec is not None:
        assert axes(result.sharding.spec, y.ndim) == axes(spec, y.ndim)
    return result


# rows and columns of W over mesh axes, x's spec, y's spec, collectives
CASES = {
    "columns_of_a_model": ("a", None, P(), P(None, None, "a"), []),
    "and_tokens": ("a", None, P("b"), P("b", None, "a"), []),
    "tokens": (None, None, P("a"), P("a"), []),
    "tokens_over_both": (None, None, P(("a", "b")), P(("a", "b")), []),
    "sum": (None, "a", P(None, None, "a"), P(), [("all-reduce", Y_BYTES)]),
    "sum_of_whole_x": (None, "a", P(), P(), [("all-reduce", Y_BYTES)]),
    "sum_and_tokens": (None, "a", P("b", None, "a"), P("b"), [("all-reduce", Y_BYTES // 2)]),
    "rows_and_columns": (
        "b", "a", P(None, None, "a"), P(None, None, "b"), [("all-reduce", Y_BYTES // 2)]
    ),
    "rows_over_both": (("a", "b"), None, P(), P(None, None, ("a", "b")), []),
    "sum_over_both": (
        None, ("a", "b"), P(None, None, ("a", "b")), P(), [("all-reduce", Y_BYTES)]
    ),
}  # fmt: skip


@both
@pytest.mark.parametrize("case", CASES)
def test_collectives(kind, case):
    rows, columns, x_spec, y_spec, moves = CASES[case]
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W), mesh, rows, columns)
    run(jf.spmm, w, put(mesh, X, *x_spec), y=Y, spec=y_spec, moves=moves)


@both
@pytest.mark.parametrize("format", ["bitmap", "delta_csr"])
def test_three_axes(kind, format):
    mesh = mesh_of(kind, (2, 2, 2), "abc")
    w = jf.shard(jf.encode(W, format), mesh, "a", "b")
    moves = [("all-reduce", Y_BYTES // 4)]
    run(jf.spmm, w, put(mesh, X, "c", None, "b"), y=Y, spec=P("c", None, "a"), moves=moves)


@both
def test_axes_of_size_one(kind):
    mesh = mesh_of(kind, (8, 1))
    for rows, columns in [("a", "b"), ("b", None), (None, "b")]:
        w = jf.shard(jf.encode(W), mesh, rows, columns)
        run(jf.spmm, w, put(mesh, X, "b"), y=Y)
        if "a" not in (rows, columns):
            run(jf.spmm, w, put(mesh, X, "a", None, "b"), y=Y, spec=P("a"))


@both
def test_meshes_in_any_order_of_devices_and_axes(kind):
    devices = np.array(jax.devices())
    for grid in (devices[::-1].reshape(4, 2), devices.reshape(2, 4).T):
        mesh = jax.sharding.Mesh(grid, ("a", "b"), axis_types=(kind,) * 2)
        w = jf.shard(jf.encode(W), mesh, ("b", "a"))
        run(jf.spmm, w, put(mesh, X), y=Y, spec=P(None, None, ("b", "a")))
        w = jf.shard(jf.encode(W), mesh, columns=("b", "a"))
        x = put(mesh, X, None, None, ("b", "a"))
        run(jf.spmm, w, x, y=Y, moves=[("all-reduce", Y_BYTES)])


@both
def test_eager(kind):
    mesh = mesh_of(kind)
    y = jf.spmm(jf.shard(jf.encode(W), mesh, "a"), put(mesh, X, "b"))
    np.testing.assert_array_equal(y, Y)
    assert axes(y.sharding.spec, 3) == [("b",), (), ("a",)]


@both
@pytest.mark.parametrize("spec", [P(None, None, "a"), P("a")], ids=["features", "tokens"])
def test_reduce_scatter_where_the_output_asks_for_it(kind, spec):
    mesh = mesh_of(kind)
    w, x = jf.shard(jf.encode(W), mesh, columns="a"), put(mesh, X, None, None, "a")

    def f(w, x):
        if kind == EXPLICIT:
            return jf.spmm(w, x, out_sharding=spec)
        return jax.lax.with_sharding_constraint(jf.spmm(w, x), NamedSharding(mesh, spec))

    run(f, w, x, y=Y, spec=spec, moves=[("reduce-scatter", Y_BYTES // 4)])


@both
@pytest.mark.parametrize("columns", [None, "a"])
def test_bias_and_activation(kind, columns):
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W), mesh, None if columns else "a", columns)
    bias = put(mesh, np.arange(M, dtype=np.float32), None if columns else "a")
    x = put(mesh, X, None, None, columns)
    y = np.maximum(Y + np.arange(M), 0).astype(np.float32)
    moves = [("all-reduce", Y_BYTES)] if columns else []
    run(lambda w, x, b: jf.spmm(w, x, b, "relu"), w, x, bias, y=y, moves=moves)


@both
def test_16_bit_sums_move_16_bits(kind):
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W), mesh, columns="a")
    x = put(mesh, X.astype(np.float16), None, None, "a")
    run(jf.spmm, w, x, y=Y.astype(np.float16), moves=[("all-reduce", Y_BYTES // 2)])


# ---- vmap and scan ----


@both
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_over_a_sharded_axis_of_x(kind, axis):
    mesh = mesh_of(kind)
    spec = [None, None, None]
    spec[axis] = "b"
    f = jax.vmap(jf.spmm, (None, axis), axis)
    w = jf.shard(jf.encode(W), mesh, "a")
    result = P(*spec[:2], "a")
    run(f, w, put(mesh, X, *spec), y=Y, spec=result)


@both
@pytest.mark.parametrize("x_too", [False, True])
def test_vmap_over_a_sharded_stack_of_weights(kind, x_too):
    mesh = mesh_of(kind)
    stack = jf.stack([jf.encode(W, "bitmap", 4), jf.encode(2 * W, "bitmap", 4)])
    stack = put(mesh, stack, "b", "a")
    x = np.stack([X, X + 1]) if x_too else X
    y = np.stack([x[0] @ W.T, x[1] @ (2 * W).T] if x_too else [Y, 2 * Y]).astype(np.float32)
    f = jax.vmap(jf.spmm, (0, 0 if x_too else None))
    run(f, stack, put(mesh, x, *("b" if x_too else "")), y=y, spec=P("b", None, None, "a"))


@both
@pytest.mark.parametrize("lead", [("b", None), (None, "b")])
def test_vmap_twice_over_a_sharded_stack_of_weights(kind, lead):
    mesh = mesh_of(kind)
    four = jf.stack([jf.encode(n * W, "bitmap", 4) for n in (1, 2, 3, 4)])
    stack = put(mesh, jax.tree.map(lambda b: b.reshape(2, 2, *b.shape[1:]), four), *lead, "a")
    f = jax.vmap(jax.vmap(jf.spmm, (0, None)), (0, None))
    y = np.stack([Y, 2 * Y, 3 * Y, 4 * Y]).reshape(2, 2, *Y.shape)
    run(f, stack, put(mesh, X), y=y, spec=P(*lead, None, None, "a"))


@both
@pytest.mark.parametrize("x_too", [False, True])
def test_gradients_of_a_sharded_stack_of_weights(kind, x_too):
    mesh = mesh_of(kind)
    stack = jf.stack([jf.encode(W, "bitmap", 4), jf.encode(2 * W, "bitmap", 4)])
    x = np.stack([X, X + 1]) if x_too else X

    def f(stack, x):
        def loss(values, x):
            y = jax.vmap(jf.spmm, (0, 0 if x_too else None))(stack.with_values(values), x)
            return (y * y).sum() / 256

        return jax.grad(loss, (0, 1))(stack.values, x)

    expected = jax.jit(f)(stack, x)
    args = put(mesh, stack, "b", "a"), put(mesh, x, *("b" if x_too else ""))
    compiled = jax.jit(f).lower(*args).compile()
    for a, b in zip(compiled(*args), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3)
    assert {move for move, _ in collectives(compiled)} == {"all-reduce"}


@both
def test_scan_over_sharded_layers(kind):
    mesh = mesh_of(kind)
    stack = jf.stack([jf.encode(W), jf.encode(2 * W)])
    stack = jf.shard(stack, mesh, "a")

    def f(stack, x):
        return jax.lax.scan(lambda c, w: (c, jf.spmm(w, x)), 0, stack)[1]

    run(f, stack, put(mesh, X, "b"), y=np.stack([Y, 2 * Y]), spec=P(None, "b", None, "a"))


# ---- shard_map ----


@both
def test_inside_a_shard_map_a_weight_is_its_local_part(kind):
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W), mesh, "a")
    seen = []

    def f(w, x):
        seen.append((w.shape, w.local_shape))
        return jf.spmm(w, x)

    f = jax.shard_map(f, mesh=mesh, in_specs=(P("a"), P("b")), out_specs=P("b", None, "a"))
    run(f, w, put(mesh, X, "b"), y=Y)
    assert seen[0] == ((M, K), (M // 4, K))
    run(jax.vmap(f, (None, 1), 1), w, put(mesh, X[:, None], "b"), y=Y[:, None])


@both
def test_inside_a_shard_map_sums_are_the_callers(kind):
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W), mesh, columns="a")
    f = jax.shard_map(
        lambda w, x: jax.lax.psum(jf.spmm(w, x), "a"),
        mesh=mesh, in_specs=(P("a"), P("b", None, "a")), out_specs=P("b"),
    )  # fmt: skip
    x = put(mesh, X, "b", None, "a")
    run(f, w, x, y=Y, moves=[("all-reduce", Y_BYTES // 2)])


@both
def test_nothing_empty_enters_a_shard_map(kind):
    """XLA's GPU compiler crashes where something does (jax 0.11.2)."""
    mesh = mesh_of(kind)
    w, x = jf.shard(jf.encode(W), mesh, "a"), put(mesh, X)
    f = jf.spmm  # which an Explicit mesh makes a shard_map
    if kind == AUTO:
        f = jax.shard_map(f, mesh=mesh, in_specs=(P("a"), P()), out_specs=P(None, None, "a"))
    text = jax.jit(f).lower(w, x).as_text()
    (entering,) = re.findall(r"^ +} : \((.*)\) -> tensor<", text, re.MULTILINE)
    assert entering.count("tensor<") >= 4
    assert "<0x" not in entering


@both
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("context", [False, True])
def test_inside_a_partly_manual_shard_map(kind, columns, context):
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W), mesh, None if columns else "a", "a" if columns else None)
    x = put(mesh, X, "b")
    where = {} if context else {"mesh": mesh}
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        f = jax.shard_map(
            jf.spmm, **where, in_specs=(P(), P("b")), out_specs=P("b"), axis_names={"b"}
        )
        if kind == EXPLICIT and jax.__version_info__ < (0, 12):
            with pytest.warns(UserWarning, match=r"gathers .* of W \[32, 64\], \d+ bytes"):
                np.testing.assert_array_equal(jax.jit(f)(w, x), Y)
            return
        run(f, w, x, y=Y, moves=[("all-reduce", Y_BYTES // 2)] if columns else [])


def test_explicit_and_auto_axes_in_one_mesh():
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(EXPLICIT, AUTO, AUTO))
    moves = [("all-reduce", Y_BYTES // 4)]
    w = jf.shard(jf.encode(W), mesh, "c", "b")
    run(jf.spmm, w, put(mesh, X, "a"), y=Y, spec=P("a", None, "c"), moves=moves)
    run(jf.spmm, jf.shard(jf.encode(W), mesh, "a"), put(mesh, X, "b"), y=Y, spec=P("b", None, "a"))


# ---- derivatives ----


def gradients(w, x, bias):
    def loss(values, x, bias):
        return (jf.spmm(w.with_values(values), x, bias, "relu") ** 2).sum() / 64

    return jax.grad(loss, (0, 1, 2))(w.values, x, bias)


# rows, columns, x's spec, bias's spec, collectives: kind and what they sum, in bytes
V_BYTES = M * K * 4
GRADIENTS = {
    "rows": ("a", None, P("b"), "a",
             [("all-reduce", X.nbytes // 2), ("all-reduce", V_BYTES // 4 + M)]),
    "columns": (None, "a", P("b", None, "a"), None,
                [("all-reduce", Y_BYTES // 2), ("all-reduce", V_BYTES // 4 + 4 * M)]),
    "tokens": (None, None, P("a"), None, [("all-reduce", V_BYTES + 4 * M)]),
}  # fmt: skip


@both
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(kind, case):
    rows, columns, x_spec, bias_spec, moves = GRADIENTS[case]
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W), mesh, rows, columns)
    bias = np.arange(M, dtype=np.float32)
    alone = jf.encode(W, shards=(w.row_shards, w.column_shards))
    expected = jax.jit(gradients)(alone, X, bias)
    args = w, put(mesh, X, *x_spec), put(mesh, bias, bias_spec)
    compiled = jax.jit(gradients).lower(*args).compile()
    got = compiled(*args)
    for a, b, like in zip(got, expected, (w.values, *args[1:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3)
        assert a.sharding.is_equivalent_to(like.sharding, a.ndim)
    assert collectives(compiled) == sorted(moves)


@both
def test_gradients_inside_a_shard_map(kind):
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W), mesh, "a")
    bias = np.arange(M, dtype=np.float32)
    expected = jax.jit(gradients)(jf.encode(W, shards=4), X, bias)

    def local(w, x, bias):
        y = jf.spmm(w, x, bias, "relu")
        return jax.lax.psum((y**2).sum(), ("a", "b")) / 64

    def f(values, x, bias):
        specs = P("a"), P("b"), P("a")
        total = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
        return total(w.with_values(values), x, bias)

    got = jax.jit(jax.grad(f, (0, 1, 2)))(w.values, put(mesh, X, "b"), put(mesh, bias, "a"))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3)


@both
def test_forward_mode_and_decode(kind):
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W), mesh, "b", "a")
    run(jf.decode, w, y=W, spec=P("b", "a"))
    x = put(mesh, X, None, None, "a")

    def f(w, x):
        return jax.jvp(lambda v: jf.spmm(w.with_values(v), x), (w.values,), (w.values,))[1]

    run(f, w, x, y=Y, moves=[("all-reduce", Y_BYTES // 2)])


# ---- layouts ----


@pytest.mark.parametrize("format", ["bitmap", "delta_csr"])
@pytest.mark.parametrize("start", [(1, 1), (4, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize(
    "rows_columns", [("a", None), ("b", "a"), (None, ("a", "b")), (None, None)]
)
def test_from_p_to_q_shards(format, start, rows_columns, monkeypatch):
    mesh = mesh_of(AUTO)
    w = jf.encode(W, format, shards=start)
    # The whole is never dense.
    monkeypatch.setattr(type(w), "to_dense", None)
    moved = jf.shard(w, mesh, *rows_columns)
    monkeypatch.undo()
    np.testing.assert_array_equal(moved.to_dense(), W)
    moved.validate()
    for b in jax.tree.leaves(moved):
        per_device = {s.data.shape[0] for s in b.addressable_shards}
        n = np.prod([mesh.shape[a] for g in rows_columns if g for a in g])
        assert per_device == {moved.shards // n}


def test_a_layout_that_fits_is_kept():
    mesh = mesh_of(AUTO)
    w = jf.shard(jf.encode(W, shards=8), mesh, "a")
    assert w.shards == 8
    run(jf.spmm, w, put(mesh, X), y=Y, spec=P(None, None, "a"))


def test_rows_that_no_block_divides():
    # y is gathered on its way to 31 features, W is not.
    mesh = mesh_of(AUTO)
    w = put(mesh, jf.encode(W[:31], shards=4), "a")
    run(jf.spmm, w, put(mesh, X), y=Y[..., :31], moves=[("all-gather", Y_BYTES)])


@both
@pytest.mark.parametrize(
    ("m", "k", "rows", "columns"),
    [
        (4, K, "a", None),
        (M, 4, None, "a"),
        (8, K, ("a", "b"), None),
        (2, 4, "b", "a"),
        (1, 4, None, "a"),
        (4, 1, "a", None),
    ],
)
def test_blocks_of_one_row_or_column(kind, m, k, rows, columns):
    mesh = mesh_of(kind)
    w, x = jf.shard(jf.encode(W[:m, :k]), mesh, rows, columns), X[..., :k]
    y = x @ W[:m, :k].T.astype(np.float32)
    sums = y.nbytes // w.row_shards
    spec = P(None, None, rows)
    run(jf.spmm, w, put(mesh, x), y=y, spec=spec, moves=[("all-reduce", sums)] if columns else [])
    run(jf.decode, w, y=W[:m, :k])

    def grad(w, x):
        return jax.grad(lambda v: jf.spmm(w.with_values(v), x).sum())(w.values)

    expected = jax.jit(grad)(jf.encode(W[:m, :k], shards=(w.row_shards, w.column_shards)), x)
    np.testing.assert_array_equal(jax.jit(grad)(w, put(mesh, x)), expected)


# ---- what cannot be ----


def test_shard_says_which_number_to_change():
    mesh = mesh_of(AUTO)
    w = jf.encode(W)
    with pytest.raises(ValueError, match=r"axis 'tp' does not exist; the mesh has \['a', 'b'\]"):
        jf.shard(w, mesh, "tp")
    with pytest.raises(ValueError, match="mesh axis 'a' splits rows and columns"):
        jf.shard(w, mesh, "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"M = 30 into 4.*; use 2 devices there.* M = 32"):
        jf.shard(jf.encode(W[:30]), mesh, "a")
    with pytest.raises(ValueError, match=r"K = 63 into 4.*; use 1 devices there.* K = 64"):
        jf.shard(jf.encode(W[:, :63]), mesh, columns="a")


def test_shard_says_what_to_pass():
    mesh, w = mesh_of(AUTO), jf.encode(W)
    with pytest.raises(TypeError, match="an encoded weight, got ndarray; make one with"):
        jf.shard(W, mesh, "a")
    for other in (None, mesh.abstract_mesh):
        with pytest.raises(TypeError, match=rf"Mesh of devices, got {type(other).__name__};"):
            jf.shard(w, other, "a")
    with pytest.raises(ValueError, match="names mesh axis 'a' twice; name it once"):
        jf.shard(w, mesh, ("a", "a"))
    with pytest.raises(ValueError, match="mesh axis 0 does not exist"):
        jf.shard(w, mesh, 0)
    with pytest.raises(ValueError, match=r"again as 4 x 1 under jit; .* with shards=\(4, 1\)"):
        jax.jit(lambda w: jf.shard(w, mesh, "a"))(w)


OUT_SHARDINGS = {
    "unknown": (P("zz"), ValueError, r"names mesh axis 'zz'; the mesh has \['a', 'b'\]"),
    "long": (P(None, None, "a"), ValueError, r"has 3 entries, but the result is \[6, 32\]"),
    "ragged": (P("a"), ValueError, r"dimension 0 of .* into 4, which does not divide 6; pad .* 8"),
    "twice": (P("b", "b"), ValueError, "names mesh axis 'b' twice"),
    "text": ("a", TypeError, "out_sharding is 'a'; pass a PartitionSpec"),
}


@pytest.mark.parametrize("case", OUT_SHARDINGS)
def test_out_sharding_says_what_to_change(case):
    spec, error, message = OUT_SHARDINGS[case]
    mesh = mesh_of(EXPLICIT)
    w, x = jf.shard(jf.encode(W), mesh, columns="a"), put(mesh, X[:3].reshape(6, K), None, "a")
    with pytest.raises(error, match=message):
        jf.spmm(w, x, out_sharding=spec)


@pytest.mark.parametrize("kind", [AUTO, None], ids=["auto", "no_mesh"])
def test_out_sharding_counts_on_explicit_meshes_alone(kind):
    w, x = jf.encode(W), X
    if kind is not None:
        w, x = jf.shard(w, mesh_of(kind), columns="a"), put(mesh_of(kind), X)
    with pytest.raises(ValueError, match="neither W nor x lies on an Explicit mesh; leave it out"):
        jf.spmm(w, x, out_sharding=P("a"))


def test_rows_that_an_explicit_mesh_does_not_divide():
    mesh = mesh_of(EXPLICIT)
    w, x = put(mesh, jf.encode(W[:31], shards=4), "a"), put(mesh, X)
    message = (
        r"W has 31 rows .* \['a'\] of an Explicit mesh, 4 parts.*; pad W to 32, or take an Auto"
    )
    for f in (jf.spmm, jax.jit(jf.spmm), jax.grad(lambda w, x: jf.spmm(w, x).sum(), 1)):
        with pytest.raises(ValueError, match=f"spmm: {message}"):
            f(w, x)
    with pytest.raises(ValueError, match=f"decode: {message}"):
        jf.decode(w)
    w = put(mesh, jf.encode(W[:28], shards=8), "a")  # padded, but the mesh divides it
    for f in (jf.spmm, jax.jit(jf.spmm)):
        np.testing.assert_array_equal(f(w, x), Y[..., :28])


@both
def test_splits_that_would_gather_the_weight(kind):
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W), mesh)
    w = w.with_values(put(mesh, np.pad(w.values, ((0, 0), (0, -w.values.size % 4))), None, "a"))
    error = ValueError if kind == EXPLICIT else jax.errors.JaxRuntimeError
    with pytest.raises(error, match="would have to be gathered; split axis 0 alone"):
        jax.jit(jf.spmm)(w, put(mesh, X))
    w = put(mesh, jf.encode(W, shards=(2, 2)), "a")  # one axis over rows and columns
    message = "lay it out again" if kind == EXPLICIT else "need mesh axes of their own"
    with pytest.raises(error, match=message):
        jax.jit(jf.spmm)(w, put(mesh, X))


@both
def test_buffers_of_one_weight_that_lie_apart(kind):
    mesh = mesh_of(kind)
    w = jf.shard(jf.encode(W, "bitmap", 4), mesh, "a")
    error = ValueError if kind == EXPLICIT else jax.errors.JaxRuntimeError
    lost = dataclasses.replace(w, masks=put(mesh, np.asarray(w.masks), "b"))
    with pytest.raises(error, match=r"axis 0 over \['a'\].* over \['b'\].*jax_flashllm.shard"):
        jax.jit(jf.spmm)(lost, put(mesh, X))
    # A copy on each device has each device's part.
    whole = dataclasses.replace(w, masks=put(mesh, np.asarray(w.masks)))
    run(jf.spmm, whole, put(mesh, X), y=Y, spec=P(None, None, "a"))


@pytest.mark.parametrize("spec", [P("a"), P(None, None, "a")])
def test_operands_that_do_not_meet(spec):
    # Explicit: types do not agree. Auto: x moves, W never.
    mesh = mesh_of(EXPLICIT)
    w = jf.shard(jf.encode(W), mesh, "a")
    with pytest.raises(
        ValueError, match=r"has to lie as P\(None, None, None\) to meet W, of 4 x 1"
    ):
        jf.spmm(w, put(mesh, X, *spec))
    with pytest.raises(ValueError, match=r"out_sharding is .* but W leaves the result as"):
        jf.spmm(w, put(mesh, X), out_sharding=P("a"))
    mesh = mesh_of(AUTO)
    w = jf.shard(jf.encode(W), mesh, "a")
    compiled = jax.jit(jf.spmm).lower(w, put(mesh, X, *spec)).compile()
    np.testing.assert_array_equal(compiled(w, put(mesh, X, *spec)), Y)
    assert ("all-gather", X.nbytes) in collectives(compiled)
    assert collectives(compiled, ["f16", "u32"]) == []


def test_one_device_lowers_to_the_plain_call():
    w = jf.encode(W)
    text = jax.jit(jf.spmm).lower(w, X).as_text()
    assert text.count("custom_call") == 1
    assert "CustomSPMDPartitioning" not in text
    one = jax.make_mesh((1,), ("a",), devices=jax.devices()[:1])
    text = jax.jit(jf.spmm).lower(jf.shard(w, one, "a"), put(one, X)).as_text()
    assert "CustomSPMDPartitioning" not in text


def test_the_counter_sees_collectives():
    mesh = mesh_of(AUTO)
    f = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, P()))
    assert collectives(f.lower(put(mesh, X, "a")).compile()) == [("all-gather", X.nbytes)]
    sums = jax.jit(jnp.sum).lower(put(mesh, X, "a")).compile()
    assert collectives(sums) == [("all-reduce", 4)]


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mesh = mesh_of(AUTO)
        jax.jit(jf.spmm)(jf.shard(jf.encode(W), mesh, "a"), put(mesh, X, "b"))
