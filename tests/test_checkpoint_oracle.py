"""Against the originals: torch.save and transformers write, compressed-tensors reads and writes."""

import json

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jax_flashllm.models.checkpoint import (  # noqa: E402
    CheckpointError,
    open_checkpoint,
    save_packed,
)

pytestmark = pytest.mark.oracle
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def opt(dtype, **options):
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=100, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, **{"word_embed_proj_dim": 32} | options,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).to(dtype)


def raw(t) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check(path, state) -> int:
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.names():
            array, t = checkpoint.read(name), state[name]
            assert array.shape == tuple(t.shape)
            assert str(array.dtype) == str(t.dtype).removeprefix("torch.")
            assert array.tobytes() == raw(t), name
        return len(checkpoint.names())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
@pytest.mark.parametrize(
    "options", [{}, {"word_embed_proj_dim": 16, "do_layer_norm_before": False}]
)
def test_save_pretrained(tmp_path, dtype, shard, options):
    model = opt(dtype, **options)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    state = model.state_dict()
    assert check(tmp_path, state) == len(state) - 1  # lm_head is tied


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_save(tmp_path, dtype, protocol):
    model = opt(dtype)
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    assert check(tmp_path, state) == len(state)
    # Sharded as transformers 4 did it.
    (tmp_path / "pytorch_model.bin").unlink()
    weight_map = {}
    for i in range(3):
        part = {k: state[k] for k in list(state)[i::3]}
        torch.save(part, tmp_path / f"pytorch_model-{i}.bin", pickle_protocol=protocol)
        weight_map |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert check(tmp_path, state) == len(state)


def test_torch_save_of_views_and_odd_dtypes(tmp_path):
    base = torch.arange(60.0).reshape(6, 10)
    state = {
        "transposed": base.t(), "slice": base[2:5, 1::3], "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4), "flags": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8), "longs": torch.arange(5),
        "doubles": torch.arange(5, dtype=torch.float64), "shorts": torch.arange(5).short(),
    }  # fmt: skip
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    assert check(tmp_path, state) == len(state)


def test_what_else_torch_saves_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file, model = tmp_path / "pytorch_model.bin", opt(torch.float32)
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"from before version 1\.6; convert"):
        open_checkpoint(tmp_path)
    torch.save(model, file)
    with pytest.raises(CheckpointError, match="'OPTForCausalLM'"):
        open_checkpoint(tmp_path)
    torch.save({"epoch": 3, "model": model.state_dict()}, file)
    with pytest.raises(CheckpointError, match="is a int, not a tensor"):
        open_checkpoint(tmp_path)


@pytest.fixture
def compressor():
    pytest.importorskip("compressed_tensors", minversion="0.14")
    config = pytest.importorskip("compressed_tensors.config")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    return compressors.BitmaskCompressor(config=config.BitmaskConfig())


def sparse_state(dtype):
    state = opt(dtype).state_dict()
    del state["lm_head.weight"]
    for name, t in state.items():
        if "proj" in name and name.endswith("weight"):
            t[torch.rand(t.shape, generator=torch.manual_seed(1)) < 0.7] = 0
            t[0, 0] = float("nan")
    return state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard", [5_000_000_000, 20_000])
def test_compressed_tensors_reads_our_files(tmp_path, compressor, dtype, shard):
    state = sparse_state(dtype)
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    state[name][1, 1] = -0.0

    def arrays():
        for name, t in state.items():
            t = t.detach()
            if dtype == torch.bfloat16:
                yield name, t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            else:
                yield name, t.numpy()

    config = opt(dtype).config.to_dict()
    save_packed(tmp_path / "out", config, arrays(), lambda n: "proj.weight" in n,
                max_shard_bytes=shard)  # fmt: skip
    read = dict(compressor.decompress(str(tmp_path / "out")))
    assert read.keys() == state.keys()
    assert all(raw(read[name]) == raw(state[name]) for name in state)
    assert check(tmp_path / "out", state) == len(state)

    # The config leads compressed-tensors to the same reader.
    from compressed_tensors.compressors import ModelCompressor

    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    found = ModelCompressor.from_compression_config(stored["quantization_config"])
    assert type(found.sparsity_compressor) is type(compressor)
    model = opt(dtype)
    found.decompress(str(tmp_path / "out"), model)
    loaded = model.state_dict()
    assert all(raw(loaded[name]) == raw(state[name]) for name in state if "norm" not in name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_the_files_of_compressed_tensors(tmp_path, compressor, dtype):
    from safetensors.torch import save_file

    state = sparse_state(dtype)
    targets = {n.removesuffix(".weight") for n in state if "proj.weight" in n}
    compressed = compressor.compress(state, targets)
    assert len(compressed) == len(state) + 3 * len(targets)
    save_file(compressed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert check(tmp_path, state) == len(state)
    with open_checkpoint(tmp_path) as checkpoint:
        assert {n for n in checkpoint.names() if checkpoint.is_sparse(n)} == {
            f"{t}.weight" for t in targets
        }
        for t in targets:
            nonzero = np.count_nonzero(checkpoint.read(f"{t}.weight").astype(np.float32))
            assert checkpoint.nnz(f"{t}.weight") == nonzero
