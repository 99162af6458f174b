"""OPTConfig reads every config.json that OPT has and refuses what cannot work."""

import dataclasses

import pytest

from jax_flashllm.models.config import PRESETS, OPTConfig


def test_absent_keys_take_hugging_faces_defaults():
    c = OPTConfig.from_dict({"model_type": "opt"})
    assert (c.vocab_size, c.hidden_size, c.num_hidden_layers, c.ffn_dim) == (50272, 768, 12, 3072)
    assert c.word_embed_proj_dim == 768
    assert c.has_final_layer_norm
    assert not c.has_projections


def test_350m_has_projections_and_no_final_norm():
    c = OPTConfig.preset("opt-350m")
    assert c.has_projections
    assert not c.has_final_layer_norm


def test_remove_final_layer_norm_is_read_with_its_underscore():
    c = OPTConfig.from_dict({"model_type": "opt", "_remove_final_layer_norm": True})
    assert not c.has_final_layer_norm
    assert c.to_dict()["_remove_final_layer_norm"] is True


@pytest.mark.parametrize("name", PRESETS)
def test_to_dict_and_from_dict_are_inverse(name):
    c = OPTConfig.preset(name, eos_token_id=[2, 50118])
    assert OPTConfig.from_dict(c.to_dict()) == c
    assert c.eos_token_ids == (2, 50118)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("opt-125m", 0.125), ("opt-350m", 0.331), ("opt-1.3b", 1.316), ("opt-2.7b", 2.652),
     ("opt-6.7b", 6.658), ("opt-13b", 12.85), ("opt-30b", 29.97), ("opt-66b", 65.7),
     ("opt-175b", 174.6)],
)  # fmt: skip
def test_presets_have_the_published_sizes(name, billions):
    c = OPTConfig.preset(name)
    H, F, E, L = c.hidden_size, c.ffn_dim, c.word_embed_proj_dim, c.num_hidden_layers
    layer = 4 * (H * H + H) + 2 * H * F + H + F + 4 * H
    tables = c.vocab_size * E + (c.max_position_embeddings + 2) * H
    total = tables + L * layer + 2 * H * E * c.has_projections + 2 * H * c.has_final_layer_norm
    assert total == pytest.approx(billions * 1e9, rel=0.005)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, ["'llama'", "only 'opt'"]),
        ({"model_type": None}, ["None", "only 'opt'"]),
        ({"num_attention_heads": 7}, ["7", "768", "divide"]),
        ({"activation_function": "silu"}, ["'silu'", "'relu' and 'gelu'"]),
        ({"hidden_size": 0}, ["hidden_size", "0"]),
        ({"hidden_size": "768"}, ["hidden_size", "'768'"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"vocab_size": 2**40}, ["vocab_size", str(2**40)]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers", "-1"]),
        ({"num_hidden_layers": 2**20}, ["num_hidden_layers", str(2**20)]),
        ({"ffn_dim": 3072.0}, ["ffn_dim", "3072.0"]),
        ({"enable_bias": "yes"}, ["enable_bias", "'yes'", "true or false"]),
        ({"init_std": 0}, ["init_std", "0"]),
        ({"init_std": float("nan")}, ["init_std", "nan"]),
        ({"eos_token_id": [2, "x"]}, ["eos_token_id", "'x'"]),
        ({"pad_token_id": 1.5}, ["pad_token_id", "1.5"]),
        ({"pad_token_id": 2**31}, ["pad_token_id", str(2**31)]),
        ({"eos_token_id": 10**12}, ["eos_token_id", str(10**12)]),
    ],
)
def test_errors_carry_the_value_and_the_next_step(change, words):
    with pytest.raises(ValueError, match="OPTConfig") as error:
        OPTConfig.from_dict({"model_type": "opt"} | change)
    for word in words:
        assert word in str(error.value)


def test_what_is_not_an_object_is_refused():
    with pytest.raises(ValueError, match="holds a list"):
        OPTConfig.from_dict([])


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"opt-9b.*opt-125m"):
        OPTConfig.preset("opt-9b")


def test_a_config_is_frozen_and_hashable():
    c = OPTConfig()
    assert hash(c) == hash(OPTConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.vocab_size = 3
