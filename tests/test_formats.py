"""Encoding keeps every bit, sizes add up, and broken buffers are named."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FORMATS, HALVES, bits, sparse_matrix

import jax_flashllm as jf

SPECIAL = np.array(
    # -0, smallest and largest subnormals of both types, infinities and NaNs of both types
    [
        0x8000,
        0x0001,
        0x8001,
        0x03FF,
        0x007F,
        0x7C00,
        0xFC00,
        0x7E01,
        0xFFFF,
        0x7F80,
        0xFF80,
        0x7FC1,
    ],
    np.uint16,
)


@st.composite
def matrices(draw):
    """Any bits at any density, in any place: whole matrices, or one patch of an empty one."""
    m, k = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    words = rng.integers(0, 2**16, (m, k), dtype=np.uint16)
    if draw(st.booleans()):
        words = rng.choice(SPECIAL, (m, k))
    words[rng.random((m, k)) >= draw(st.sampled_from([0, 0.01, 0.06, 0.07, 0.5, 1]))] = 0
    if draw(st.booleans()):
        row, col = draw(st.integers(0, m - 1)), draw(st.integers(0, k - 1))
        patch = np.zeros_like(words)
        patch[row : row + 16, col : col + 64] = words[row : row + 16, col : col + 64]
        words = patch
    return words.view(draw(st.sampled_from(HALVES)))


@pytest.mark.filterwarnings("ignore:.*-0.0")
@settings(max_examples=80, deadline=None)
@given(matrices(), st.sampled_from([*FORMATS, "auto"]), st.integers(1, 5))
def test_round_trip_keeps_every_bit(dense, format, shards):
    shards = min(shards, dense.shape[0])
    w = jf.encode(dense, format, shards)
    np.testing.assert_array_equal(bits(w.to_dense()), bits(dense))
    w.validate()
    assert w.dtype == dense.dtype
    assert w.shape == dense.shape
    assert w.shards == shards
    assert w.nnz == np.count_nonzero(bits(dense))
    assert w.sparsity == pytest.approx(1 - w.nnz / dense.size)
    assert w.nbytes == sum(np.asarray(b).nbytes for b in jax.tree.leaves(w))
    assert w.bits_per_weight == pytest.approx(8 * w.nbytes / dense.size)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", HALVES)
def test_one_full_tile_among_empty_ones(format, dtype):
    for row, col in [(0, 0), (128, 64), (272, 448)]:
        dense = np.zeros((300, 530), dtype)
        dense[row : row + 128, col : col + 64] = 1.5
        w = jf.encode(dense, format)
        np.testing.assert_array_equal(w.to_dense(), dense)
        np.testing.assert_array_equal(jf.decode(w), dense)


def test_negative_zeros_are_kept_with_a_warning():
    w = sparse_matrix((64, 64), np.float16, 1.0)
    mask = sparse_matrix((64, 64), np.float16, 0.5, seed=1) != 0
    with pytest.warns(UserWarning, match=r"encode: \d+% of the weights are -0\.0"):
        encoded = jf.encode(w * mask)
    assert encoded.nnz > 1.3 * mask.sum()
    assert jf.encode(np.where(mask, w, np.float16(0))).nnz == mask.sum()
    assert jf.encode(w * mask + np.float16(0)).nnz == mask.sum()


@pytest.mark.filterwarnings("ignore:.*-0.0")
@pytest.mark.parametrize("format", FORMATS)
def test_decode_gives_the_bits_of_to_dense(format):
    dense = np.resize(SPECIAL, (37, 133)) * (np.arange(37 * 133).reshape(37, 133) % 3 > 0)
    for dtype in HALVES:
        w = jf.encode(dense.astype(np.uint16).view(dtype), format, shards=3)
        np.testing.assert_array_equal(bits(jf.decode(w)), bits(w.to_dense()))
        np.testing.assert_array_equal(bits(jax.jit(jf.decode)(w)), bits(w.to_dense()))


@pytest.mark.parametrize("format", FORMATS)
def test_encoding_does_not_depend_on_where_the_array_is(format):
    dense = sparse_matrix((100, 200), np.float16, 0.4)
    ways = [dense, jnp.asarray(dense), np.asfortranarray(dense), np.repeat(dense, 2, 1)[:, ::2]]
    first, *others = [jax.tree.leaves(jf.encode(d, format)) for d in ways]
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.parametrize("density", [1 / 8, 1 / 2, 1])
def test_sizes_are_those_of_the_documents(density):
    # Bitmap: 16 d + 1 bits a weight and 0.02 for offsets and alignment; Tiled-CSL: 32 d.
    dense = sparse_matrix((1024, 1024), np.float16, density)
    d = np.count_nonzero(dense) / dense.size
    assert 0 <= jf.encode(dense, "bitmap").bits_per_weight - (16 * d + 1) < 0.03
    assert 0 <= jf.encode(dense, "tiled_csl").bits_per_weight - 32 * d < 0.03


@pytest.mark.parametrize("density", [0, 0.02, 0.0555, 0.07, 0.3, 1])
def test_auto_takes_the_smaller(density):
    dense = sparse_matrix((512, 1024), np.float16, density)
    sizes = {f: jf.encode(dense, f).nbytes for f in FORMATS}
    assert jf.encode(dense).nbytes == min(sizes.values())


def test_a_weight_is_a_pytree():
    w = jf.encode(sparse_matrix((64, 100), np.float16, 0.3))
    leaves, tree = jax.tree.flatten(w)
    assert len(leaves) == 3
    again = jax.tree.unflatten(tree, leaves)
    assert isinstance(again, jf.Bitmap)
    assert again.shape == (64, 100)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(w)]
    assert sorted(paths) == [".masks", ".offsets", ".values"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        w.shape = (1, 1)
    copy = pickle.loads(pickle.dumps(w))
    np.testing.assert_array_equal(copy.to_dense(), w.to_dense())
    doubled = w.with_values(2 * w.values)
    np.testing.assert_array_equal(doubled.to_dense(), 2 * w.to_dense())


def test_repr_tells_shape_dtype_and_size():
    w = jf.encode(np.eye(64, dtype=np.float16), "bitmap", shards=2)
    assert repr(w) == (
        "Bitmap([64, 64] float16, shards=2, sparsity=0.9844, nnz=64, 1.30 bits/weight, 664 bytes)"
    )
    seen = []
    jax.jit(lambda w: seen.append(repr(w)))(w)
    assert seen == ["Bitmap([64, 64] float16, shards=2, traced)"]
    assert repr(jax.tree.map(lambda _: None, w)).startswith("Bitmap((64, 64), None")
    assert repr(jax.eval_shape(lambda w: w, w)).startswith("Bitmap(")


@pytest.mark.parametrize("format", FORMATS)
def test_a_stack_of_weights(format):
    dense = np.stack([sparse_matrix((40, 100), np.float16, d, i) for i, d in enumerate([0.2, 0.9])])
    w = jf.stack([jf.encode(d, format, shards=2) for d in dense])
    assert w.values.ndim == 3
    assert w.shape == (40, 100)
    w.validate()
    np.testing.assert_array_equal(w.to_dense(), dense)
    np.testing.assert_array_equal(jax.vmap(jf.decode)(w), dense)
    assert w.nnz == np.count_nonzero(dense)
    assert w.sparsity == pytest.approx(1 - w.nnz / dense.size)
    assert w.bits_per_weight == pytest.approx(8 * w.nbytes / dense.size)
    assert "stack of 2" in repr(w)


def test_stack_refuses_what_does_not_match():
    a = jf.encode(np.ones((4, 4), np.float16))
    with pytest.raises(ValueError, match="needs at least one"):
        jf.stack([])
    for other in [
        jf.encode(np.ones((4, 5), np.float16)),
        jf.encode(np.ones((4, 4), np.float16), "tiled_csl"),
        jf.encode(np.ones((4, 4), ml_dtypes.bfloat16)),
        jf.encode(np.ones((4, 4), np.float16), shards=2),
    ]:
        with pytest.raises(ValueError, match="differ in format, shape, dtype or shards"):
            jf.stack([a, other])


# ---- errors ----


@pytest.mark.parametrize(
    ("dense", "kwargs", "error", "message"),
    [
        (np.ones((2, 2), np.float32), {}, TypeError, "got float32; cast first"),
        (np.ones((2, 2), np.int8), {}, TypeError, "got int8"),
        ([[1.0]], {}, TypeError, "got list"),
        (np.ones(3, np.float16), {}, ValueError, r"got \[3\]"),
        (np.ones((2, 0), np.float16), {}, ValueError, r"got \[2, 0\]"),
        (np.ones((1, 2, 3), np.float16), {}, ValueError, r"got \[1, 2, 3\]"),
        (np.ones((2, 2), np.float16), {"shards": 3}, ValueError, "from 1 to M = 2, got 3"),
        (np.ones((2, 2), np.float16), {"shards": 0}, ValueError, "got 0"),
        (np.ones((2, 2), np.float16), {"shards": 1.0}, ValueError, "got 1.0"),
        (np.ones((2, 2), np.float16), {"format": "csr"}, ValueError, "got 'csr'"),
    ],
)
def test_encode_refuses(dense, kwargs, error, message):
    with pytest.raises(error, match=message):
        jf.encode(dense, **kwargs)


def test_encode_refuses_tracers():
    with pytest.raises(TypeError, match="cannot run under jit, vmap or grad"):
        jax.jit(jf.encode)(jnp.ones((2, 2), jnp.float16))


@pytest.mark.parametrize("format", FORMATS)
def test_constructors_refuse_buffers_of_other_shapes(format):
    w = jf.encode(sparse_matrix((40, 300), np.float16, 0.5), format)
    index = "masks" if format == "bitmap" else "positions"
    for changes, message in [
        ({"shape": (40, 900)}, r"of shape \[40, 900\]: .* make weights with"),
        ({"shape": (400, 300)}, r"of shape \[400, 300\]: "),
        ({"shape": (0, 300)}, r"shape must be \[M, K\] >= 1, got \(0, 300\)"),
        ({"offsets": w.offsets[:, 1:]}, "offsets is uint32"),
        ({"offsets": w.offsets.astype(np.int32)}, "offsets is int32"),
        ({index: getattr(w, index)[..., 1:]}, f"{index} is uint"),
        ({index: getattr(w, index).astype(np.uint8)}, f"{index} is uint8"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(w, **changes)


def changed(array, at, value):
    array = np.array(array)
    array[at] = value
    return jnp.asarray(array)


def test_validate_finds_a_broken_bitmap():
    w = jf.encode(sparse_matrix((40, 300), np.float16, 0.5), "bitmap", shards=2)

    def broken(message, **changes):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(w, **changes).validate()

    broken("offsets give it", offsets=changed(w.offsets, (0, 1), 2**32 - 1))
    broken("offsets give it", offsets=changed(w.offsets, (1, -1), w.values.shape[1] // 8 + 1))
    broken("offsets give it", offsets=changed(w.offsets, (1, 1), 0))
    broken("mask bits", masks=jnp.full_like(w.masks, 2**32 - 1))
    broken("offsets give it", values=w.values[:, :-8])
    # Row 20 of a shard of 20 rows lies outside: bits 4-7 of lanes 16.. in band 1.
    broken("outside", masks=changed(w.masks, (0, 1, 0, 31), w.masks[0, 1, 0, 31] | 16))
    # Column 300 lies outside: tile 4 has 44 columns, lane 3 columns 48..63.
    broken("outside", masks=changed(w.masks, (0, 0, 4, 3), 1))
    with pytest.raises(ValueError, match="values are float32"):
        w.with_values(w.values.astype(np.float32)).validate()


def test_validate_finds_a_broken_tiled_csl():
    w = jf.encode(sparse_matrix((40, 300), np.float16, 0.3), "tiled_csl", shards=2)
    positions, padding = np.asarray(w.positions), np.asarray(w.positions) >= 0x8000
    shard, pad = np.argwhere(padding)[0]

    def broken(message, **changes):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(w, **changes).validate()

    broken("offsets must not fall", offsets=changed(w.offsets, (0, 1), 2**32 - 1))
    broken("offsets must not fall", offsets=changed(w.offsets, (1, 2), 0))
    broken("outside a 128 x 64 tile", positions=changed(positions, (1, 3), 0x4000))
    broken("twice", positions=changed(positions, (0, 1), positions[0, 0]))
    broken("padding", values=changed(w.values, (shard, pad), 1.0))
    # Shards of 20 rows: row 20 of a tile lies outside.
    broken("outside", positions=changed(positions, (0, 0), 20 * 64 | (20 % 8) * 8))
    # Tile 4 has 44 columns: column 44 of its row 0 lies outside.
    last = int(w.offsets[0, 4]) * 8
    broken("outside", positions=changed(positions, (0, last), 44))
    with pytest.raises(ValueError, match="values are float32"):
        w.with_values(w.values.astype(np.float32)).validate()


def test_matmul_points_to_spmm():
    w, x = jf.encode(np.eye(3, dtype=np.float16)), np.ones((2, 3), np.float32)
    for product in [lambda: x @ w, lambda: w @ x, lambda: jnp.asarray(x) @ w]:
        with pytest.raises(TypeError, match=r"jax_flashllm.spmm\(w, x\)"):
            product()


def test_a_weight_without_indices_is_refused_in_words():
    w = jf.encode(np.eye(4, dtype=np.float16))
    x = np.ones((2, 4), np.float32)
    grad = jax.grad(lambda w: jf.spmm(w, x).sum(), allow_int=True)(w)
    with pytest.raises(TypeError, match="w is a gradient, without indices"):
        jf.spmm(grad, x)
    with pytest.raises(TypeError, match="leaves that are no arrays"):
        jf.spmm(w.with_values(None), x)


def test_many_negative_zeros_are_warned_of():
    w = np.full((20, 64), 1.5, np.float16)
    w[:2] *= np.float16(0)
    jf.encode(w)
    w[:2] *= -1
    with pytest.warns(UserWarning, match=r"10% of the weights are -0\.0"):
        assert jf.encode(w).nnz == w.size
