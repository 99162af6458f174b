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
from reference import FORMATS, HALVES, assert_product, bits, sparse_matrix

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
    # At this density nearly all rows have four groups.
    ways = [sparse_matrix((1024, 1024), np.float16, 0.45, seed) for seed in range(8)]
    encoded = [jf.encode(d, format) for d in ways]
    # Vectors of 8, or groups of 128, of which rows have the same number.
    needed = [int(o[-1]) * 8 if format == "bitmap" else int(o[-2]) * 128
              for o in (np.asarray(w.offsets[0]) for w in encoded)]  # fmt: skip
    assert len(set(needed)) > (4 if format == "bitmap" else 1)
    assert len({w.values.shape for w in encoded}) <= 2
    for w, values in zip(encoded, needed, strict=True):
        assert values <= w.values.shape[1] <= values * (1 + 1 / 256)


@pytest.mark.parametrize(
    ("sparsity", "size"),
    [(0, 20.08), (0.5, 10.26), (0.6, 8.26), (0.7, 6.29), (0.8, 4.40), (0.9, 2.66), (0.95, 1.40)],
)
def test_sizes_of_delta_csr_are_those_of_the_documents(sparsity, size):
    dense = sparse_matrix((256, 7168), np.float16, 1 - sparsity)
    assert jf.encode(dense, "delta_csr").bits_per_weight == pytest.approx(size, abs=0.03)


@pytest.mark.parametrize("density", [0, 1e-4, 1e-3, 0.01, 0.05, 0.09, 0.105, 0.12, 0.3, 1])
@pytest.mark.parametrize("columns", [200, 1024, 7168, 25000])
@pytest.mark.parametrize("blocks", [1, 2])
def test_auto_takes_the_smaller(columns, density, blocks):
    dense = sparse_matrix((128, columns), np.float16, density)
    sizes = {f: jf.encode(dense, f, (1, blocks)).nbytes for f in FORMATS}
    assert jf.encode(dense, shards=(1, blocks)).nbytes <= 1.005 * min(sizes.values())


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
        jf.encode(np.ones((4, 4), np.float16), "delta_csr"),
        jf.encode(np.ones((4, 4), ml_dtypes.bfloat16)),
        jf.encode(np.ones((4, 4), np.float16), shards=2),
    ]:
        with pytest.raises(ValueError, match="differ in format, shape, dtype or shards"):
            jf.stack([a, other])
    with pytest.raises(TypeError, match="expected weights from encode, got int"):
        jf.stack([a, 1])


# ---- Delta-CSR's bytes ----


def lanes_of(row: np.ndarray, filler: int) -> list[list[tuple[int, int]]]:
    """Of a row in a block of columns, from the definition: the entries of each lane, column and
    bits; 0 bits stand for a filler."""
    entries = []
    for col in np.flatnonzero(row).tolist():
        if entries:
            while col - entries[-1][0] >= filler:
                entries.append((entries[-1][0] + filler, 0))
        entries.append((col, int(row[col])))
    total = len(entries)
    return [entries[lane * total // 32 : (lane + 1) * total // 32] for lane in range(32)]


def item_of(lanes: list[list[tuple[int, int]]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """The words of index and the values of an item."""
    groups = -(-sum(map(len, lanes)) // 128)
    bases, codes = np.zeros(32, np.uint16), np.zeros((groups, 32, 4), np.int64)
    values = np.zeros((groups, 32, 4), np.uint16)
    for lane, entries in enumerate(lanes):
        weights = [i for i, (_, value) in enumerate(entries) if value]
        if not weights:
            continue
        bases[lane] = entries[weights[0]][0]
        at = entries[weights[0]][0] - 1
        for i in range(weights[0], weights[-1] + 1):
            col, value = entries[i]
            codes[i // 4, lane, i % 4] = col - at
            values[i // 4, lane, i % 4] = value
            at = col
    codes = codes.reshape(-1)
    packed = codes.astype(np.int8) if width == 8 else (codes[::2] | codes[1::2] << 4)
    words = np.concatenate([bases.view(np.uint8), packed.astype(np.uint8)]).view(np.uint32)
    return words, values.reshape(-1)


def delta_csr_of(dense: np.ndarray, shards: int):
    """The buffers of each shard, index, offsets and values, without room."""
    M, K = dense.shape
    rows = -(-M // shards)
    block = -(-K // -(-K // 12288))
    block = -(-block // 64) * 64
    for s in range(shards):
        part = np.zeros((rows, K), np.uint16)
        here = dense.view(np.uint16)[s * rows : (s + 1) * rows]
        part[: len(here)] = here
        ways = {}
        for width, filler in ((8, 127), (4, 15)):
            ways[width] = [
                item_of(lanes_of(row[at : at + block], filler), width)
                for at in range(0, K, block)
                for row in part
            ]
        size = {width: sum(a.nbytes + b.nbytes for a, b in way) for width, way in ways.items()}
        width = 4 if size[4] < size[8] else 8
        index, values = (np.concatenate(b) for b in zip(*ways[width], strict=True))
        groups = [len(values) // 128 for _, values in ways[width]]
        yield index, np.array([0, *np.cumsum(groups), width]), values


GAPS = [1, 2, 13, 14, 15, 16, 17, 29, 30, 31, 44, 45, 46, 125, 126, 127, 128, 129, 253, 254, 255]
GAPS += [380, 381, 382, 1905, 12000]


def gaps(rng: np.random.Generator, shape: tuple[int, int], density: float) -> np.ndarray:
    """Rows whose nonzeros lie these gaps apart, for so much of the row; zeros elsewhere."""
    dense = np.zeros(shape, np.uint16)
    for row in dense:
        col = int(rng.choice([0, 1, 14, 15, 127, 128]))
        while col < max(1, density * shape[1]):
            row[min(col, shape[1] - 1)] = rng.integers(1, 2**16)
            col += int(rng.choice(GAPS))
    return dense


DELTA_CASES = {
    "one weight": (1, 1, 1, 1.0),
    "63 columns": (5, 63, 1, 0.3),
    "64 columns": (5, 64, 2, 0.3),
    "65 columns, full": (4, 65, 3, 1.0),
    "empty": (3, 200, 1, 0.0),
    "129 weights": (2, 129, 1, 1.0),
    "sparse": (40, 3000, 1, 0.01),
    "dense": (20, 1000, 1, 0.6),
    "rows of the last shard are few": (33, 300, 4, 0.2),
    "a block": (3, 12288, 1, 0.1),
    "two blocks": (3, 12289, 1, 0.1),
    "two blocks, sparse": (3, 12289, 1, 0.001),
    "three blocks": (2, 25000, 2, 0.2),
}


@pytest.mark.parametrize("case", DELTA_CASES)
def test_the_bytes_of_delta_csr(case):
    rows, columns, shards, density = DELTA_CASES[case]
    rng = np.random.default_rng(0)
    spread = rng.integers(1, 2**16, (rows, columns), dtype=np.uint16)
    spread[rng.random((rows, columns)) >= density] = 0
    # Nonzeros here, and large gaps elsewhere, in other rows.
    for dense in (spread, gaps(rng, (rows, columns), 1.0), gaps(rng, (rows, columns), density)):
        _check_bytes(dense.view(np.float16), shards)


def _check_bytes(dense, shards):
    w = encode_on_host(dense, "delta_csr", shards)
    for s, (index, offsets, values) in enumerate(delta_csr_of(dense, shards)):
        np.testing.assert_array_equal(w.offsets[s], offsets)
        np.testing.assert_array_equal(w.index[s, : index.size], index)
        np.testing.assert_array_equal(bits(w.values[s, : values.size]), values)
        assert not w.index[s, index.size :].any()
        assert not bits(w.values[s, values.size :]).any()
    w.validate()
    np.testing.assert_array_equal(bits(w.to_dense()), bits(dense))
    np.testing.assert_array_equal(bits(jf.decode(jax.device_put(w))), bits(dense))
    assert w.nnz == np.count_nonzero(bits(dense))
    return w


def test_each_shard_of_delta_csr_takes_its_own_width():
    dense = np.zeros((12, 2000), np.float16)
    dense[:4] = sparse_matrix((4, 2000), np.float16, 0.5)
    dense[4:8] = sparse_matrix((4, 2000), np.float16, 0.03)
    w = _check_bytes(dense, 3)
    np.testing.assert_array_equal(w.offsets[:, -1], [4, 8, 8])
    x = np.ones((3, 2000), np.float32)
    assert_product(jf.spmm(jax.device_put(w), x), x, dense)


@pytest.mark.parametrize(
    ("weights", "filler", "width"),
    [(384, 0, 4), (384, 1, 8), (640, 0, 4), (640, 1, 8), (768, 1, 4)],
)
def test_the_width_is_the_one_that_takes_fewer_bytes(weights, filler, width):
    """A group takes 384 bytes with 8 bits, 320 with 4; of whole groups a filler makes one more:
    3 of 8 against 4, 5 against 6, which is equal, 6 against 7."""
    dense = np.zeros((1, 1000), np.float16)
    dense[0, : weights - 1] = 1
    dense[0, weights - 1 + 15 * filler] = 1
    assert _check_bytes(dense, 1).offsets[0, -1] == width


def test_entries_may_come_in_any_order():
    """Codes of 8 bits lead backwards too: of each list the weights in pairs, the second first."""
    dense = np.zeros((70, 2000), np.float32)
    dense[:, ::16] = sparse_matrix((70, 125), np.float32, 0.9, integers=True)
    dense[1, 1:] = 0
    dense[2, [0, 250, 500, 750]] = 1
    w = encode_on_host(dense.astype(np.float16), "delta_csr")
    assert w.offsets[0, -1] == 8
    items = []
    for row in bits(dense.astype(np.float16)):
        lanes = lanes_of(row, 127)
        for entries in lanes:
            if all(value for _, value in entries):
                for i in range(0, len(entries) - 1, 2):
                    entries[i : i + 2] = entries[i + 1], entries[i]
        items.append(item_of(lanes, 8))
    index, values = (np.concatenate(b) for b in zip(*items, strict=True))
    other = dataclasses.replace(
        w,
        index=np.pad(index, (0, w.index.size - index.size))[None],
        values=np.pad(values, (0, w.values.size - values.size))[None].view(np.float16),
    )
    assert (other.index != w.index).any()
    other.validate()
    np.testing.assert_array_equal(other.to_dense(), dense)
    other = jax.device_put(other)
    np.testing.assert_array_equal(jf.decode(other), dense)
    x = np.arange(6000, dtype=np.float32).reshape(3, 2000) % 7
    np.testing.assert_array_equal(jf.spmm(other, x), x @ dense.T)
    g = jax.grad(lambda v: jf.spmm(other.with_values(v), x).sum())(other.values)
    expected = np.where(dense != 0, x.sum(0), 0)
    np.testing.assert_array_equal(other.with_values(g).to_dense(), expected)


def test_a_list_by_hand():
    """Steps of -128, a filler before a step back, two fillers, a weight right behind a filler."""
    columns = [200, 72, 190, 500, 499, 626]
    codes = [1, -128, 118, 127, 127, 56, -1, 127, 0]
    index = np.zeros((1, 16 + 3 * 32), np.uint32)
    bases = index[0, :16].view(np.uint16)
    bases[5] = 200
    lists = index[0, 16:].view(np.int8).reshape(3, 32, 4)
    values = np.zeros((1, 3, 32, 4), np.float16)
    for i, code in enumerate(codes):
        lists[i // 4, 5, i % 4] = code
    for i, entry in enumerate([0, 1, 2, 5, 6, 8]):
        values[0, entry // 4, 5, entry % 4] = i + 1
    offsets = np.array([[0, 3, 8]], np.uint32)
    w = jf.DeltaCSR(offsets, values.reshape(1, -1), (1, 700), index)
    w.validate()
    dense = np.zeros((1, 700), np.float16)
    dense[0, columns] = range(1, 7)
    np.testing.assert_array_equal(w.to_dense(), dense)
    w = jax.device_put(w)
    np.testing.assert_array_equal(jf.decode(w), dense)
    x = np.eye(700, dtype=np.float32)
    np.testing.assert_array_equal(jf.spmm(w, x), dense.T)
    g = jax.grad(lambda v: jf.spmm(w.with_values(v), x).sum())(w.values)
    np.testing.assert_array_equal(g, bits(values).reshape(1, -1) != 0)


@pytest.mark.parametrize("keep", [np.s_[:, ::2], np.s_[:, :64], np.s_[::16], np.s_[5], np.s_[:, 9]])
def test_pruned_columns_and_rows(keep):
    dense = np.zeros((300, 300), np.float16)
    dense[keep] = sparse_matrix((300, 300), np.float16, 1)[keep]
    for format in FORMATS:
        w = jf.encode(dense, format)
        w.validate()
        np.testing.assert_array_equal(w.to_dense(), dense)
        np.testing.assert_array_equal(jf.decode(w), dense)


@pytest.mark.parametrize("density", [0.003, 0.03, 0.1, 0.6])
def test_dead_entries_have_no_gradient_and_a_training_step_keeps_the_structure(density):
    dense = sparse_matrix((100, 300), np.float32, density, integers=True)
    w = jf.encode(dense.astype(np.float16), "delta_csr", shards=3)
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
        ({"shape": (40, 12289)}, r"of shape \[40, 12289\]: .* make weights with"),
        ({"shape": (400, 300)}, r"of shape \[400, 300\]: "),
        ({"shape": (0, 300)}, r"shape must be \[M, K\] >= 1, got \(0, 300\)"),
        ({"offsets": w.offsets[:, 1:]}, "offsets is uint32"),
        ({"offsets": w.offsets.astype(np.int32)}, "offsets is int32"),
        ({index: getattr(w, index)[0]}, f"{index} is uint32"),
        ({index: getattr(w, index).astype(np.uint8)}, f"{index} is uint8"),
        ({index: getattr(w, index)[..., 1:]}, f"{index} is uint32"),
        (
            {"values": w.values[:, 1:]},
            rf"values has room for .*, expected a multiple of {w.unit}\b",
        ),
        ({"values": w.values[:, :0]}, "values has room for 0 a shard"),
        ({"values": w.values[:0]}, f"{index} is uint32.*, expected uint32.0,"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(w, **changes)


@pytest.mark.parametrize("format", FORMATS)
def test_to_dense_of_garbage_says_what_is_wrong(format):
    w = jf.encode(sparse_matrix((40, 300), np.float16, 0.5), format)
    garbage = dataclasses.replace(w, offsets=w.offsets * 50)
    with pytest.raises(ValueError, match=r"offsets|bits"):
        garbage.to_dense()


def test_the_encoders_check_once_more():
    dense = np.ones((4, 4), np.uint16)
    for encode in (_flashllm.encode_bitmap, _flashllm.encode_delta_csr):
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
for encode in (_flashllm.encode_bitmap, _flashllm.encode_delta_csr):
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


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_validate_finds_a_broken_delta_csr(density):
    dense = sparse_matrix((40, 2000), np.float16, density)
    dense[0] = np.arange(2000) % 8 == 0
    dense[0, 512:] = 0  # two weights a lane, and two dead entries
    w = jf.encode(dense, "delta_csr", shards=2)
    width = int(w.offsets[0, -1])
    assert width == (8 if density < 0.1 else 4)

    def broken(message, **changes):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(w, **changes).validate()

    broken("must start at 0", offsets=w.offsets + np.uint32([1] * 20 + [0, 0]))
    broken("must start at 0", offsets=changed(w.offsets, (0, 1), 2**32 - 1))
    broken("must start at 0", offsets=changed(w.offsets, (1, 5), 0))
    for other in (0, 5, 16, 2**32 - 1):
        broken(
            f"shard 1 has codes of {other} bits, exp", offsets=changed(w.offsets, (1, -1), other)
        )
    broken(
        f"4294967295 groups of shard 0 need .* are {w.values.shape[1]} and {w.index.shape[1]}",
        offsets=changed(w.offsets, (0, -2), 2**32 - 1),
    )
    needed = max(int(o[-2]) for o in w.offsets)
    broken("groups of shard . need", values=w.values[:, : (needed - 1) * 128])
    broken("groups of shard . need", index=w.index[:, : (16 * 20 + 4 * width * (needed - 1))])

    def broken_item(message, base=None, codes=None, values=None):
        """With another list of lane 3 in row 0."""
        index, stored = np.array(w.index), np.array(w.values)
        if base is not None:
            index[0, :16].view(np.uint16)[3] = base
        if codes is not None and width == 8:
            index[0, 16:48].view(np.int8).reshape(32, 4)[3] = codes
        elif codes is not None:
            packed = codes[0] | codes[1] << 4, codes[2] | codes[3] << 4
            index[0, 16:32].view(np.uint8).reshape(32, 2)[3] = packed
        if values is not None:
            stored[0, 12:16] = values
        broken(message, index=jnp.asarray(index), values=jnp.asarray(stored))

    filler = 127 if width == 8 else 15
    broken_item("leaves its block of 2048 columns", base=2048)
    broken_item("leaves its block of 2048 columns", base=65535)
    broken_item("leaves its block of 2048 columns, or W", base=2047, codes=[1, 0, 0, 0])
    broken_item("leaves its block of 2048 columns, or W", base=2001, codes=[0, 0, 0, 0])
    if width == 8:
        broken_item("leaves its block", base=5, codes=[1, -128, 0, 0])
        broken_item("weight outside", base=5, codes=[1, -6, 0, 0], values=[1, 1, 0, 0])
    broken_item("list that ends with a filler", base=5, codes=[1, 0, 0, filler])
    broken_item("dead entry that is not", base=5, codes=[0, 0, 0, 0], values=[0, -0.0, 0, 0])
    broken_item("dead entry that is not", base=5, codes=[1, filler, 0, 0], values=[1, 1, 1, 0])
    taken = int(np.flatnonzero(dense[0])[0])
    broken_item(
        f"shard 0 stores row 0, column {taken} twice",
        base=taken, codes=[1, 0, 0, 0], values=[1, 0, 0, 0],
    )  # fmt: skip
    with pytest.raises(ValueError, match="values are float32"):
        w.with_values(w.values.astype(np.float32)).validate()
    with pytest.raises(ValueError, match=r"shape must be \[M, K\]"):
        dataclasses.replace(w, shape=(40, 0))
    # An item of 64 columns, which one group has room for, with a dead second one.
    w = jf.encode(np.eye(2, 64, dtype=np.float16), "delta_csr")
    assert np.asarray(w.offsets)[0, :3].tolist() == [0, 1, 2]
    width = int(w.offsets[0, -1])
    index = np.insert(np.asarray(w.index), [16 + 4 * width] * 4 * width, 0, axis=1)
    broken(
        "an item of 2 groups, but the columns of a block fill 1",
        offsets=w.offsets + jnp.uint32([0, 1, 1, 0]),
        index=index,
        values=np.insert(np.asarray(w.values), [128] * 128, 0, axis=1),
    )
    # Five rows in four shards of two: the last shard has none.
    w = jf.encode(np.ones((5, 128), np.float16), "delta_csr", shards=4)
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
