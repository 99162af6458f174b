"""Block-by-block pruning: its statistics, its resumption, its errors."""

import dataclasses
import gc
import json
import os

import jax
import numpy as np
import pytest
import tiny_opt
from tiny_opt import quick_compiles  # noqa: F401

from jax_flashllm.models import opt, partial, pruning
from jax_flashllm.models.checkpoint import open_checkpoint, save_packed
from jax_flashllm.models.pruning import Blocks, Recipe, Source, windows

IDS = np.random.RandomState(3).randint(0, tiny_opt.BASE["vocab_size"], (6, 24)).astype(np.int32)
SPARSEGPT = Recipe("sparsegpt", 0.6, "uniform", block=16)
WANDA = Recipe("wanda", 0.5, "row")


def checkpoint_of(tmp_path, variant="plain", **overrides):
    config = tiny_opt.config(variant, **overrides)
    path = tmp_path / variant
    if not path.exists():
        tiny_opt.save(path, config, tiny_opt.weights(config, np.float16))
    return open_checkpoint(path)


def pruned(tmp_path, recipe, work="work", ids=IDS, variant="plain", **overrides):
    """({name: array} of the pruned model, the run)."""
    with checkpoint_of(tmp_path, variant, **overrides) as checkpoint:
        blocks = Blocks(Source(checkpoint, None), recipe, ids, tmp_path / work)
        try:
            blocks.run()
            return dict(blocks.tensors()), blocks
        finally:
            blocks.close()


def observed(path, block, monkeypatch):
    """What reaches the four linear layers of one block of a model, float64 [tokens, K] each."""
    seen, apply = [], opt.apply
    with monkeypatch.context() as patch:
        patch.setattr(
            opt, "apply", lambda w, x, *a: (seen.append(np.asarray(x)), apply(w, x, *a))[1]
        )
        opt.load(path, dtype=np.float32)(IDS)
    return [x.reshape(-1, x.shape[-1]).astype(np.float64) for x in seen[4 * block : 4 * block + 4]]


@pytest.mark.parametrize("variant", ["plain", "post_norm", "gelu", "no_bias"])
def test_statistics_come_from_the_blocks_as_pruned(tmp_path, monkeypatch, variant):
    result, run = pruned(tmp_path, WANDA, variant=variant)
    with checkpoint_of(tmp_path, variant) as dense:
        assert set(result) == set(dense.names())
        for block in range(2):
            # The model as it was when the block was looked at.
            before = {
                name: result[name] if f"layers.{block - 1}." in name else dense.read(name)
                for name in dense.names()
            }
            stage = tmp_path / f"stage{block}"
            save_packed(stage, dense.config, before.items(), sparse=[])
            for x, names in zip(
                observed(stage, block, monkeypatch),
                (["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]),
                strict=True,
            ):
                norm = np.linalg.norm(x, axis=0)
                for short in names:
                    name = next(
                        n for n in run.source.linear if f"layers.{block}." in n and short in n
                    )
                    w, new = dense.read(name).astype(np.float64), result[name]
                    scores = np.sort(np.abs(w) * norm, axis=1)
                    drop = w.shape[1] // 2
                    keep = np.abs(w) * norm > scores[:, drop - 1 : drop]
                    np.testing.assert_array_equal(new, np.where(keep, w, 0).astype(np.float16))
                    lost = np.linalg.norm(x @ (w - new).T) ** 2 / np.linalg.norm(x @ w.T) ** 2
                    assert run.errors()[name] == pytest.approx(lost, rel=1e-4)
                    assert 1e-4 < lost < 1


@pytest.mark.parametrize("recipe", [SPARSEGPT, WANDA, Recipe("magnitude", 0.5, "uniform")])
def test_every_matrix_has_the_sparsity_asked_for(tmp_path, recipe):
    result, run = pruned(tmp_path, recipe)
    for name in run.source.linear:
        w = result[name]
        # A weight a group: a row, a matrix, or a block of 16 columns.
        groups = {"row": w.shape[0], "uniform": -(-w.shape[1] // 16)}[recipe.group]
        assert abs((w == 0).sum() - recipe.sparsity * w.size) <= groups
        assert w.dtype == np.float16
        assert not (np.signbit(w) & (w == 0)).any()


def test_owl_moves_sparsity_and_keeps_the_mean(tmp_path):
    recipe = dataclasses.replace(WANDA, owl=(2.0, 0.1))
    result, run = pruned(tmp_path, recipe)
    by_block = [
        np.mean(
            np.concatenate([result[n].ravel() == 0 for n in run.source.linear if f"s.{i}." in n])
        )
        for i in range(2)
    ]
    assert abs(by_block[0] - by_block[1]) == pytest.approx(0.2, abs=0.02)
    assert np.mean(by_block) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("stop", ["layers.0", "layers.1", "layers.2"])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bits(tmp_path, stop):
    recipe = dataclasses.replace(SPARSEGPT, owl=(5.0, 0.05))
    whole, _ = pruned(tmp_path, recipe, "whole", num_hidden_layers=3)

    class Stopped(Exception):
        pass

    def say(text):
        if text == stop:
            raise Stopped

    with checkpoint_of(tmp_path) as checkpoint:
        source = Source(checkpoint, None)
        first = Blocks(source, recipe, IDS, tmp_path / "cut", say=say)
        with pytest.raises(Stopped):
            first.run()
        assert first.finished == int(stop[-1])
        first.close()
        seen, steps = [], []
        again = Blocks(source, recipe, IDS, tmp_path / "cut", say=seen.append, advance=steps.append)
        prune, calls = again._prune, []
        again._prune = lambda *args: (calls.append(1), prune(*args))[1]
        again.run()
        assert len(calls) == 3 - int(stop[-1])
        assert sum(steps) == again.steps
        resumed = dict(again.tensors())
        again.close()
    assert whole.keys() == resumed.keys()
    assert all(whole[n].tobytes() == resumed[n].tobytes() for n in whole)


def test_blocks_of_another_run_are_not_taken_for_this_one(tmp_path):
    pruned(tmp_path, WANDA)
    for recipe, ids, says in (
        (dataclasses.replace(WANDA, sparsity=0.7), IDS, r"sparsity was 0\.5, is now 0\.7"),
        (WANDA, IDS[::-1].copy(), "calibration was"),
    ):
        with pytest.raises(ValueError, match=f"another run .{says}"):
            pruned(tmp_path, recipe, ids=ids)


@pytest.mark.parametrize("text", ["{", "[1]", "3", "{}", '{"model": 1}', "\xff", "[" * 100_000])
def test_a_damaged_description_of_the_run_says_what_to_delete(tmp_path, text):
    pruned(tmp_path, WANDA)
    (tmp_path / "work" / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"run.json .*; delete .*/work to start over"):
        pruned(tmp_path, WANDA)


@pytest.mark.parametrize("change", ["weights", "config"])
def test_a_model_replaced_by_one_of_the_same_size_is_another(tmp_path, change):
    pruned(tmp_path, WANDA)
    if change == "weights":
        file = tmp_path / "plain" / "model.safetensors"
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        config = tiny_opt.config("plain", activation_function="gelu")
        (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the model has changed since; delete .*/work to start"):
        pruned(tmp_path, WANDA)


def block_file(work, change):
    """Damages what is on the disk of the first of two blocks."""
    block = work / "layers.0"
    file = block / "model.safetensors"
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif change == "no weights":
        file.unlink()
    elif change == "bits":
        # Sound to the eye: only reading the matrices finds that offsets and bits disagree.
        data = file.read_bytes()
        with open_checkpoint(block) as checkpoint:
            entry = checkpoint._tensors[checkpoint.names()[0]].bitmask
        file.write_bytes(data[: entry.offset] + b"\xff" * 8 + data[entry.offset + 8 :])
    elif change == "a tensor less" or change == "another dtype":
        with open_checkpoint(block) as checkpoint:
            config = {"errors": checkpoint.config["errors"]}
            tensors = [(name, checkpoint.read(name)) for name in checkpoint.names()]
        if change == "another dtype":
            tensors = [(name, w.astype(np.float32)) for name, w in tensors]
        save_packed(block, config, tensors[1:] if change == "a tensor less" else tensors,
                    lambda _: True, overwrite=True)  # fmt: skip
    else:
        (block / "config.json").write_text(change)


@pytest.mark.parametrize(
    "change",
    ["{}", '{"errors": [1]}', '{"errors": {}}', "{", "truncated", "no weights", "a tensor less",
     "another dtype", "bits"],
)  # fmt: skip
def test_a_damaged_block_is_pruned_again(tmp_path, change):
    whole, _ = pruned(tmp_path, WANDA)
    block_file(tmp_path / "work", change)
    lines = []
    with checkpoint_of(tmp_path) as checkpoint:
        run = Blocks(Source(checkpoint, None), WANDA, IDS, tmp_path / "work", warn=lines.append)
        prune, calls = run._prune, []
        run._prune = lambda *args: (calls.append(1), prune(*args))[1]
        run.run()
        again = dict(run.tensors())
        assert set(run.errors()) == set(run.source.linear)
        run.close()
    assert len(calls) == 1
    assert lines == [f"{tmp_path / 'work' / 'layers.0'} is damaged: the block is pruned again"]
    assert all(whole[n].tobytes() == again[n].tobytes() for n in whole)


def foreign(tmp_path, kind):
    work = tmp_path / "work"
    if kind == "file":
        work.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        work.symlink_to(tmp_path / "elsewhere")
    elif kind == "dangling link":
        work.symlink_to(tmp_path / "nowhere")
    else:
        if kind != "layers.0":  # without run.json, nobody but the user made this
            pruned(tmp_path, WANDA)
        path = work / kind
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if kind == "layers.0" else path.write_text("mine")


@pytest.mark.parametrize(
    "kind", ["file", "link", "dangling link", "layers.0", "notes.txt", "layers.0/notes.txt"]
)
def test_what_no_run_made_is_refused_and_stays(tmp_path, kind):
    foreign(tmp_path, kind)
    before = sorted(p for p in tmp_path.rglob("*") if "plain" not in p.parts)
    with pytest.raises(ValueError, match=r"work is where .*another --out"):
        pruned(tmp_path, WANDA)
    assert sorted(p for p in tmp_path.rglob("*") if "plain" not in p.parts) == before


def test_what_others_put_there_meanwhile_is_not_deleted(tmp_path):
    _, run = pruned(tmp_path, WANDA)
    work = tmp_path / "work"
    (work / ".layers.0.tmp-a1b2c3d4").mkdir()
    (work / "notes.txt").write_text("mine")
    run.partial.remove()
    assert os.listdir(work) == ["notes.txt"]
    (work / "notes.txt").unlink()
    run.partial.remove()
    assert not work.exists()


def test_two_runs_do_not_share_a_directory(tmp_path):
    with checkpoint_of(tmp_path) as checkpoint:
        source = Source(checkpoint, None)
        first = Blocks(source, WANDA, IDS, tmp_path / "work")
        with pytest.raises(ValueError, match=r"another run is at work in .*work; wait for"):
            Blocks(source, WANDA, IDS, tmp_path / "work")
        first.close()
        Blocks(source, WANDA, IDS, tmp_path / "work").close()


SHARED = """
import sys, pathlib, numpy as np, jax
from jax_flashllm.models import pruning
from jax_flashllm.models.checkpoint import open_checkpoint
pruning.SCORES_BYTES = 1  # one window a device and call
out = pathlib.Path(sys.argv[2])
recipe = pruning.Recipe("sparsegpt", 0.6, "uniform", block=16)
with open_checkpoint(sys.argv[1]) as checkpoint:
    source = pruning.Source(checkpoint, None)
    run = pruning.Blocks(source, recipe, np.load(sys.argv[3]), out / "work")
    assert run.batch == len(jax.devices()) == 4
    run.run()
    np.savez(out / "result.npz", **dict(run.tensors()))
"""


def test_windows_are_shared_out_over_devices(tmp_path, fresh_process, monkeypatch):
    one, run = pruned(tmp_path, SPARSEGPT)
    np.save(tmp_path / "ids.npy", IDS)  # six windows: four, and two that stay together
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    out = tmp_path / "four"
    out.mkdir()
    fresh_process(SHARED, str(tmp_path / "plain"), str(out), str(tmp_path / "ids.npy"))
    four = np.load(out / "result.npz")
    for name in run.source.linear:
        # Sums in another order, then rounding to float16; a mask may differ in a near tie.
        differ = ~np.isclose(one[name], four[name], rtol=1e-2, atol=1e-3)
        assert differ.mean() < 0.01


@pytest.mark.parametrize("owl", [None, (5.0, 0.05)], ids=["same", "owl"])
def test_one_block_is_on_the_accelerator_at_a_time(tmp_path, monkeypatch, owl):
    """However many blocks there are: what a 66B model needs is host memory."""
    monkeypatch.setattr(pruning, "SCORES_BYTES", 1)  # one window a call
    gc.collect()  # what earlier tests left in cycles must not go while this one counts
    idle = sum(a.nbytes for a in jax.live_arrays())
    live = lambda: sum(a.nbytes for a in jax.live_arrays()) - idle  # noqa: E731
    with checkpoint_of(tmp_path, num_hidden_layers=4) as checkpoint:
        source, between, during = Source(checkpoint, None), [], []
        read = source.read

        def look(name):
            if name.endswith("self_attn_layer_norm.weight"):  # a block's first
                between.append(live())
            return read(name)

        monkeypatch.setattr(source, "read", look)
        recipe = dataclasses.replace(SPARSEGPT, owl=owl)
        Blocks(source, recipe, IDS, tmp_path / "work", None, advance=lambda _: during.append(live())
               ).run()  # fmt: skip
        shapes = [checkpoint.shape(n) for n in source.linear if "layers.0." in n]
    assert len(between) == (8 if owl else 4)
    assert max(between) == 0
    # float16 weights, counted once more as placed, and float32 Grams of every matrix's inputs.
    assert 0 < max(during) < sum(2 * 2 * m * k + 4 * k * k for m, k in shapes)


def test_windows_spread_over_the_text_and_refuse_a_short_one():
    ids = list(range(100))
    got = windows(ids, 4, 10, 100)
    assert got.shape == (4, 10)
    assert got[:, 0].tolist() == [0, 30, 60, 90]
    assert (np.diff(got, axis=1) == 1).all()
    # No window twice.
    assert windows(ids, 3, 100, 100).tolist() == [ids]
    assert windows(ids, 10**30, 98, 100)[:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="99 tokens, fewer than one context of 100"):
        windows(ids[:99], 1, 100, 100)


@pytest.mark.parametrize("token", [100, 2**31, 2**32 - 1])
def test_tokens_outside_the_vocabulary_are_refused(token):
    with pytest.raises(ValueError, match=f"token {token}, outside the model's vocabulary of 100"):
        windows([1, token, 3], 1, 2, 100)


def test_a_number_beside_the_weights_is_not_theirs(tmp_path):
    config = tiny_opt.config("plain")
    tensors = tiny_opt.weights(config, np.float32)
    tensors["model.decoder.version"] = np.array([3e9], np.float32)  # past float16
    tiny_opt.save(tmp_path / "plain", config, tensors)
    with checkpoint_of(tmp_path) as checkpoint:
        source = Source(checkpoint, None)
        result = dict(pruning.by_magnitude(source, Recipe("magnitude", 0.5, "row"), str))
    assert result.keys() == tensors.keys() - {"model.decoder.version"}


def with_tensor(tmp_path, name, change):
    """A plain model with one tensor changed in place."""
    config = tiny_opt.config("plain")
    tensors = tiny_opt.weights(config, np.float16)
    change(tensors[name])
    return tiny_opt.save(tmp_path / "plain", config, tensors)


@pytest.mark.parametrize(
    ("tensor", "value", "says"),
    [
        ("embed_tokens.weight", np.nan, r"activations that reach .*layers.0.self_attn.q_proj"),
        ("layers.1.fc1.bias", np.nan, r"activations that reach .*layers.1.fc2.weight hold NaN"),
        ("layers.1.fc1.weight", np.nan, "layers.1.fc1.weight holds NaN"),
        ("layers.1.fc2.weight", np.inf, "layers.1.fc2.weight: .*NaN or Inf"),
    ],
)
def test_nan_is_found_where_it_is_and_finished_blocks_stay(tmp_path, tensor, value, says):
    def change(w):
        w.reshape(-1)[:] = value

    with_tensor(tmp_path, f"model.decoder.{tensor}", change)
    with checkpoint_of(tmp_path) as checkpoint:
        run = Blocks(Source(checkpoint, None), SPARSEGPT, IDS, tmp_path / "work")
        with pytest.raises(ValueError, match=says):
            run.run()
        assert run.finished == ("layers.1" in tensor)


def test_inputs_that_are_always_zero_are_no_trouble(tmp_path):
    def change(bias):
        bias[::2] = -1000  # relu never lets these through

    with_tensor(tmp_path, "model.decoder.layers.0.fc1.bias", change)
    result, run = pruned(tmp_path, SPARSEGPT)
    name = "model.decoder.layers.0.fc2.weight"
    assert (result[name][:, ::2] == 0).mean() > 0.95
    assert all(np.isfinite(w).all() for w in result.values())
    assert run.errors()[name] < 0.2


def test_a_singular_hessian_says_what_to_do(tmp_path):
    ids = np.full((1, 1), 7, np.int32)  # one token: H has rank one
    with pytest.raises(ValueError, match=r"q_proj.weight: sparsegpt: .*larger damping"):
        pruned(tmp_path, dataclasses.replace(SPARSEGPT, damping=0.0), ids=ids)


def test_a_disk_that_fills_keeps_finished_blocks(tmp_path, monkeypatch):
    save = partial.save_packed

    def full(out, *args):
        if out.name == "layers.1":
            raise OSError(28, os.strerror(28))
        return save(out, *args)

    monkeypatch.setattr(partial, "save_packed", full)
    with pytest.raises(OSError, match="No space left"):
        pruned(tmp_path, WANDA)
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["layers.0", "run.json"]
    assert json.loads((tmp_path / "work" / "run.json").read_text())["method"] == "wanda"
    result, _ = pruned(tmp_path, WANDA)
    whole, _ = pruned(tmp_path, WANDA, "whole")
    assert all(whole[n].tobytes() == result[n].tobytes() for n in whole)


def test_a_bfloat16_checkpoint_stays_one(tmp_path):
    import ml_dtypes

    config = tiny_opt.config("plain")
    tiny_opt.save(tmp_path / "plain", config, tiny_opt.weights(config, ml_dtypes.bfloat16))
    result, run = pruned(tmp_path, SPARSEGPT)
    assert {w.dtype.name for w in result.values()} == {"bfloat16"}
    assert set(run.errors()) == set(run.source.linear)


def test_comparing_all_layers_needs_all_layers(tmp_path):
    with pytest.raises(ValueError, match=r"global.*--owl"):
        pruned(tmp_path, Recipe("wanda", 0.5, "global"))
