"""Encoding keeps every bit, sizes add up, and broken buffers are named."""

import dataclasses
import pickle
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from properties import SPECIAL
from reference import FORMATS, HALVES, bits, sparse_matrix

import jax_flashllm as jf
from jax_flashllm import _flashllm
from jax_flashllm.formats import bitmap_of_packed, encode_on_host


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
def test_sizes_of_bitmaps_are_those_of_the_documents(density):
    # 16 d + 1 bits a weight, 0.02 for offsets and alignment, and room.
    dense = sparse_matrix((1024, 1024), np.float16, density)
    d = np.count_nonzero(dense) / dense.size
    w = jf.encode(dense, "bitmap")
    assert 0 <= w.bits_per_weight - (16 * d + 1) < 0.03 + 16 * d / 256


@pytest.mark.parametrize("format", FORMATS)
def test_matrices_as_sparse_have_buffers_of_one_size(format):
    """And so programs for one run the other; room for that is 1/256 at most."""
    ways = [sparse_matrix((1024, 1024), np.float16, 0.5, seed) for seed in range(8)]
    encoded = [jf.encode(d, format) for d in ways]
    assert len({int(w.offsets.reshape(-1)[-1]) for w in encoded}) > 4
    assert len({w.values.shape for w in encoded}) <= 2
    for w in encoded:
        vectors = w.offsets[0, -1] * (1 if format == "bitmap" else np.array([32, 1]))
        needed = 8 * int(vectors.sum())
        assert needed <= w.values.shape[1] <= needed * (1 + 1 / 256)


@pytest.mark.parametrize(
    ("sparsity", "size"),
    [(0, 20), (0.5, 10.57), (0.6, 8.56), (0.7, 6.54), (0.8, 4.57), (0.9, 2.76), (0.95, 1.62)],
)
def test_sizes_of_tiled_csl_are_those_of_the_documents(sparsity, size):
    dense = sparse_matrix((1024, 1024), np.float16, 1 - sparsity)
    assert jf.encode(dense, "tiled_csl").bits_per_weight == pytest.approx(size, abs=0.03)


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
        "Bitmap([64, 64] float16, shards=2, 0.0% padding, sparsity=0.9844, nnz=64, "
        "1.30 bits/weight, 664 bytes)"
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
    with pytest.raises(TypeError, match="expected weights from encode, got int"):
        jf.stack([a, 1])


# ---- Tiled-CSL's bytes ----


def list_and_row(r: int, k: int) -> tuple[int, int]:
    """Where weight (r, k) of a block lies, from the definition: its list, and its row 1..128."""
    tile, g, upper = r // 16 * 2 + k // 64, r % 8, r % 16 // 8
    t, step, ahalf, half = k % 64 // 16, k % 16 // 4, k % 4 // 2, k % 2
    lane, register = 4 * g + t, upper + 2 * ahalf
    address = tile * 2048 + step * 512 + lane * 16 + register * 4 + half * 2
    return address % 128 // 2, address // 128 + 1


def block_of(lists: dict[int, list[int]]) -> np.ndarray:
    """A block [64, 128] with 64 row + list at the rows of the lists, zero elsewhere."""
    dense = np.zeros((64, 128), np.uint16)
    for r, k in np.ndindex(64, 128):
        number, row = list_and_row(r, k)
        if row in lists.get(number, []):
            dense[r, k] = 64 * row + number
    return dense


def test_the_bytes_of_a_small_tiled_csl():
    # Every list: three weights, gaps of 15 and 17 rows, and one weight more than two chunks hold.
    lists = {i: [1, 2, 3, 18, 35, 36, 37] for i in range(64)}
    lists[5] = [1, 2, 18, 35, 36, 37]  # fits
    lists[6] = [1, 2, 3, 18, 35]  # one short
    w = jf.encode(block_of(lists).view(np.float16), "tiled_csl")

    codes = np.array([[1, 1, 1, 15, 0, 15, 2, 1]] * 64)
    rows = np.array([[1, 2, 3, 0, 18, 0, 35, 36]] * 64)
    codes[5], rows[5] = [1, 1, 15, 1, 15, 2, 1, 1], [1, 2, 0, 18, 0, 35, 36, 37]
    codes[6], rows[6] = [0, 1, 1, 1, 15, 0, 15, 2], [0, 1, 2, 3, 0, 18, 0, 35]
    # The last weights of the lists 0, 2, .. and then of 1, 3, ..: one of each bank, twice.
    tail = [37 * 64 + i for i in [*range(0, 64, 2), *range(1, 64, 2)] if i not in (5, 6)]
    tail.remove(37 * 64 + 7)
    tail.insert(3, 37 * 64 + 7)  # bank 3 has nothing before it
    tail += [0, 0]

    np.testing.assert_array_equal(w.offsets, [[[0, 0], [2, 8]]])
    values, index = bits(w.values[0]), np.asarray(w.index[0])
    assert (values.size, index.size) == (2 * 256 + 64, 2 * 32 + 32)
    for i, bank, number in np.ndindex(8, 32, 2):
        chunk, entry, row = i // 4, i % 4, rows[2 * bank + number, i]
        value = values[chunk * 256 + number * 128 + bank * 4 + entry]
        assert value == (row * 64 + 2 * bank + number if row else 0)
        code = index[chunk * 32 + bank] >> (8 * entry + 4 * number) & 15
        assert code == codes[2 * bank + number, i]
    np.testing.assert_array_equal(index[64:].view(np.uint16), tail)
    np.testing.assert_array_equal(values[512:], tail)
    w.validate()


def fewest_bytes(dense: np.ndarray) -> int:
    """Bytes of a block, from the definition, with the best number of chunks."""
    rows = [[] for _ in range(64)]
    for r, k in np.argwhere(dense):
        number, row = list_and_row(r, k)
        rows[number].append(row)
    slots = [
        np.cumsum(1 + np.diff(sorted(of_list), prepend=0) // 15) - 1 for of_list in rows if of_list
    ]
    slots = np.concatenate([[], *slots])
    return min(640 * c + 32 * -(-int((slots >= 4 * c).sum()) // 8) for c in range(33))


@pytest.mark.parametrize("density", [0.005, 0.05, 0.1, 0.3, 0.5, 0.9, 1])
def test_a_block_of_tiled_csl_takes_the_fewest_bytes(density):
    dense = sparse_matrix((64, 128), np.float16, density)
    if density == 0.3:
        dense[:, :64] = 0  # a gap of 16 rows in every list
    chunks, tails = jf.encode(dense, "tiled_csl").offsets[0, -1]
    assert 640 * chunks + 32 * tails == fewest_bytes(dense)


ADVERSARIAL = {
    "one full list": {7: range(1, 129)},
    "one full list of two in a bank": {62: range(1, 129), 63: [128]},
    "half of the lists full": {i: range(1, 129) for i in range(32)},
    "one row": {i: [128] for i in range(64)},
    "the first and the last row": {i: [1, 128] for i in range(64)},
    "every 15th row": {i: range(15, 129, 15) for i in range(64)},
    "every 16th row": {i: range(16, 129, 16) for i in range(64)},
    "every 14th row": {i: range(14, 129, 14) for i in range(64)},
    "a triangle": {i: range(1, 2 * i + 2) for i in range(64)},
    "full": {i: range(1, 129) for i in range(64)},
}


@pytest.mark.parametrize("lists", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_odd_blocks_of_tiled_csl_lose_nothing(lists):
    block = block_of(lists).view(np.float16)
    dense = np.zeros((200, 400), np.float16)
    dense[64:128, 128:256] = block
    dense[128:192, 256:384] = block
    w = jf.encode(dense, "tiled_csl")
    w.validate()
    np.testing.assert_array_equal(bits(w.to_dense()), bits(dense))
    np.testing.assert_array_equal(bits(jf.decode(w)), bits(dense))
    assert w.nnz == np.count_nonzero(bits(dense))
    if len(lists) == 64 and lists[0] == range(1, 129):
        np.testing.assert_array_equal(np.unique(np.diff(w.offsets, axis=1)[..., 0]), [0, 32])
        assert not np.asarray(w.offsets)[..., 1].any()


@pytest.mark.parametrize("keep", [np.s_[:, ::2], np.s_[:, :64], np.s_[::16], np.s_[5], np.s_[:, 9]])
def test_pruned_columns_and_rows(keep):
    dense = np.zeros((300, 300), np.float16)
    dense[keep] = sparse_matrix((300, 300), np.float16, 1)[keep]
    for format in FORMATS:
        w = jf.encode(dense, format)
        w.validate()
        np.testing.assert_array_equal(w.to_dense(), dense)
        np.testing.assert_array_equal(jf.decode(w), dense)


@pytest.mark.parametrize("density", [0.03, 0.1, 0.6])
def test_dead_entries_have_no_gradient_and_a_training_step_keeps_the_structure(density):
    dense = sparse_matrix((100, 300), np.float32, density, integers=True)
    w = jf.encode(dense.astype(np.float16), "tiled_csl", shards=3)
    x, c = np.ones((2, 300), np.float32), np.arange(1, 101, dtype=np.float32)
    g = jax.grad(lambda v: (jf.spmm(w.with_values(v), x) @ c).sum())(w.values)
    assert np.count_nonzero(g) == w.nnz < g.size  # 2 c > 0 at every weight
    stepped = w.with_values(w.values - g)
    stepped.validate()
    assert stepped.nnz == w.nnz
    expected = np.where(dense != 0, dense - 2 * c[:, None], 0)
    np.testing.assert_array_equal(stepped.to_dense(), expected)
    np.testing.assert_array_equal(jf.spmm(stepped, x), x @ expected.T)


# ---- errors ----


@pytest.mark.parametrize(
    ("dense", "kwargs", "error", "message"),
    [
        (np.ones((2, 2), np.float32), {}, TypeError, "got float32; cast first"),
        (np.ones((2, 2), np.int8), {}, TypeError, "got int8"),
        ([[1.0]], {}, TypeError, "got list"),
        (jax.ShapeDtypeStruct((2, 2), np.float16), {}, TypeError, "with values, got Shape"),
        (jf.encode(np.ones((2, 2), np.float16)), {}, TypeError, r"to_dense\(\) decodes a weight"),
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
    index = "masks" if format == "bitmap" else "index"
    for changes, message in [
        ({"shape": (40, 900)}, r"of shape \[40, 900\]: .* make weights with"),
        ({"shape": (400, 300)}, r"of shape \[400, 300\]: "),
        ({"shape": (0, 300)}, r"shape must be \[M, K\] >= 1, got \(0, 300\)"),
        ({"offsets": w.offsets[:, 1:]}, "offsets is uint32"),
        ({"offsets": w.offsets.astype(np.int32)}, "offsets is int32"),
        ({index: getattr(w, index)[0]}, f"{index} is uint32"),
        ({index: getattr(w, index).astype(np.uint8)}, f"{index} is uint8"),
        ({index: getattr(w, index)[..., 1:]}, f"{index} is uint32"),
        ({"values": w.values[:, 1:]}, "values has room for .*, expected a multiple of 8"),
        ({"values": w.values[:, :0]}, "values has room for 0 a shard"),
        ({"values": w.values[:0]}, f"{index} is uint32.*, expected uint32.0,"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(w, **changes)


@pytest.mark.parametrize("format", FORMATS)
def test_to_dense_of_garbage_says_what_is_wrong(format):
    w = jf.encode(sparse_matrix((40, 300), np.float16, 0.5), format)
    garbage = dataclasses.replace(w, offsets=w.offsets * 50)
    with pytest.raises(ValueError, match=r"offsets|chunks"):
        garbage.to_dense()


def test_the_encoders_check_once_more():
    dense = np.ones((4, 4), np.uint16)
    for encode in (_flashllm.encode_bitmap, _flashllm.encode_tiled_csl):
        for w, shards in [(dense, 0), (dense, -1), (dense, 5), (dense[:0], 1), (dense[:, :0], 1)]:
            with pytest.raises(ValueError, match="in 1 to M shards"):
                encode(w, shards)


ENCODE_WITHOUT_THREADS = r"""
import re, resource, numpy as np
from jax_flashllm import _flashllm
size = int(re.search(r"VmSize:\s+(\d+)", open("/proc/self/status").read())[1]) << 10
dense = np.ones((512, 2048), np.uint16)
# Room for the result, not for the stack of a thread.
resource.setrlimit(resource.RLIMIT_AS, (size + (7 << 20),) * 2)
for encode in (_flashllm.encode_bitmap, _flashllm.encode_tiled_csl):
    print(encode(dense, 1)[2].size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_encoding_where_no_thread_starts(fresh_process):
    assert fresh_process(ENCODE_WITHOUT_THREADS).split() == [str(512 * 2048)] * 2


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
    w = jf.encode(sparse_matrix((40, 300), np.float16, 0.7), "tiled_csl", shards=2)
    chunks, tails = np.diff(w.offsets, axis=1)[0, 0]  # of block 0
    assert chunks > 4
    assert tails > 0

    def broken(message, **changes):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(w, **changes).validate()

    broken("offsets must start at 0", offsets=w.offsets + np.uint32(1))
    broken("offsets must start at 0", offsets=changed(w.offsets, (0, 1, 0), 2**32 - 1))
    broken("offsets must start at 0", offsets=changed(w.offsets, (1, 2, 1), 0))
    broken("need", offsets=changed(w.offsets, (1, -1, 1), w.values.shape[1] // 8))
    needed = max(256 * int(c) + 8 * int(t) for c, t in w.offsets[:, -1])
    broken("need", values=w.values[:, : needed - 8])
    broken("need", index=w.index[:, : 32 * (needed // 256)])
    words = np.array(w.index[0])
    codes = words[: 32 * chunks].view(np.uint8).reshape(chunks, 32, 4)  # two lists a byte
    tail = words[32 * chunks :].view(np.uint16)

    def broken_index(message, part, at, value):
        before, part[at] = part[at].copy(), value
        broken(message, index=jnp.asarray(np.stack([words, w.index[1]])))
        part[at] = before

    broken_index("leaves its block", codes, np.s_[:, 3], 0xFF)
    broken_index("leaves its block", tail, 0, 129 * 64)
    broken_index("padding behind", codes, (chunks - 1, 0, 3), 0)
    broken_index("outside the matrix", tail, 0, tail[0] % 64 + 127 * 64)
    broken_index("overlaps its lists", tail, 0, tail[0] % 64 + 64)
    broken_index("twice", tail, 0, tail[np.flatnonzero(tail[1:] % 64 == tail[0] % 64)[0] + 1])
    dead = np.flatnonzero(np.asarray(w.values[0]) == 0)[0]
    broken("dead entry", values=changed(w.values, (0, dead), -0.0))
    with pytest.raises(ValueError, match="values are float32"):
        w.with_values(w.values.astype(np.float32)).validate()
    # Five rows in four shards of two: the last shard has none.
    w = jf.encode(np.ones((5, 128), np.float16), "tiled_csl", shards=4)
    w.validate()
    broken(
        "shard 3 has a weight outside",
        **jax.tree.map(
            lambda b: b[jnp.array([0, 1, 2, 0])],
            {"offsets": w.offsets, "values": w.values, "index": w.index},
        ),
    )


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


def test_a_device_without_room_is_named(monkeypatch):
    """tests/stress/gpu_memory.py fills a GPU."""

    def fail(text):
        def put(*args):
            raise jax.errors.JaxRuntimeError(text)

        monkeypatch.setattr(jax, "device_put", put)

    fail("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
    said = r"RESOURCE_EXHAUSTED: encode: no room on cpu:0 for W \(4, 4\) encoded \(Out of memory "
    with pytest.raises(jax.errors.JaxRuntimeError, match=said + r"allocating 123 bytes\.\); drop"):
        jf.encode(np.eye(4, dtype=np.float16))
    fail("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"^INTERNAL: something else$"):
        jf.encode(np.eye(4, dtype=np.float16))


# ---- blocks of rows and columns ----


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "grids"),
    [((70, 300), [(1, 1), (3, 2), (1, 3), (70, 5)]), ((7, 5), [(2, 1), (4, 4), (7, 5)])],
)
def test_encoding_in_blocks(format, shape, grids):
    dense = sparse_matrix(shape, np.float16, 0.3, integers=True)
    for grid in grids:
        w = jf.encode(dense, format, shards=grid)
        assert (w.row_shards, w.column_shards) == grid
        assert w.shards == grid[0] * grid[1] == len(w.values)
        np.testing.assert_array_equal(w.to_dense(), dense)
        w.validate()
        assert w.nnz == np.count_nonzero(dense)
        assert 0 <= w.padding < 1
    np.testing.assert_array_equal(jf.decode(w), dense)
    x = np.ones((3, shape[1]), np.float32)
    np.testing.assert_array_equal(jf.spmm(w, x), x @ dense.T.astype(np.float32))


def test_a_weight_in_the_padding_of_column_blocks_is_refused():
    w = jf.encode(np.ones((16, 70), np.float16), "bitmap", shards=(1, 4))  # 18 columns a block
    damaged = dataclasses.replace(w, shape=(16, 69))
    with pytest.raises(ValueError, match="column block 3 has a weight outside the matrix"):
        damaged.validate()


def test_padding_is_what_the_longest_block_costs():
    dense = np.ones((32, 64), np.float16)
    assert jf.encode(dense, "bitmap", 2).padding == 0
    dense[16:] = 0
    w = jf.encode(dense, "bitmap", 2)
    assert w.padding == pytest.approx(w.values.nbytes / 2 / w.nbytes)
    assert f"{w.padding:.1%} padding" in repr(w)


@pytest.mark.parametrize("shards", [(1,), (1, 2, 3), (2, 6), (0, 1), (1.0, 1)])
def test_pairs_of_shards_that_encode_refuses(shards):
    with pytest.raises(ValueError, match=r"up to K = 5"):
        jf.encode(np.ones((4, 5), np.float16), shards=shards)


# ---- packed matrices ----


def _packed(dense):
    """Bits, starts and values of a matrix, as compressed-tensors' sparse-bitmask has them."""
    kept = dense.view(np.uint16) != 0
    bits = np.packbits(kept, axis=1, bitorder="little")
    counts = kept.sum(axis=1)
    return bits, np.cumsum(counts) - counts, dense[kept]


@pytest.mark.parametrize("negative_zero", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "shapes",
    [[(1, 1)], [(16, 64)], [(33, 300), (16, 300)], [(40, 1030), (7, 1030), (1, 1030)]],
)
def test_a_bitmap_of_packed_matrices_is_that_of_the_dense_one(
    kernels, shapes, density, dtype, negative_zero
):
    matrices = [sparse_matrix(shape, dtype, density, seed=i) for i, shape in enumerate(shapes)]
    if negative_zero:  # stored by some, and a zero
        matrices[0].view(np.uint16)[0, 0] = 0x8000
    parts = [_packed(m) for m in matrices]
    w = bitmap_of_packed(parts, shapes[0][1])
    w.validate()
    if negative_zero:
        matrices[0][0, 0] = 0
    expected = encode_on_host(np.concatenate(matrices), "bitmap")
    for buffer, other in zip(jax.tree.leaves(w), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(
            np.asarray(buffer).view(np.uint8), np.asarray(other).view(np.uint8)
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b, s, v: (b, s + 1, v), "starts differ"),
        (lambda b, s, v: (b, s[:-1], v), r"starts \[M\]"),
        (lambda b, s, v: (b[:, :-1], s, v), r"ceil\(K / 8\)"),
        (lambda b, s, v: (b, s, v[:-1]), "as many values as bits"),
        (lambda b, s, v: (b | 0x80, s, v), "outside|starts differ"),
    ],
)
def test_packed_matrices_that_contradict_themselves_are_refused(change, says):
    parts = change(*_packed(sparse_matrix((5, 60), np.float16, 0.5)))
    with pytest.raises(ValueError, match=says):
        bitmap_of_packed([parts], 60)
