"""Tokenizer files of a model directory, and streaming that never splits a character."""

import json

import pytest
import tokenizers

from jax_flashllm.models.tokenizer import open_tokenizer

TEXTS = [
    "It was the best of times.\n\n  It was",
    "naïve café — “quoted”",
    "日本語と中文",
    "👩‍👩‍👧 family 🏳️‍🌈!",
]


@pytest.fixture(scope="module")
def opt_files(tmp_path_factory):
    """vocab.json and merges.txt as OPT's: byte-level BPE with four special tokens first."""
    path = tmp_path_factory.mktemp("opt")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXTS[0]] * 3, trainer)
    backend.model.save(str(path))
    return path


def test_opt_text_starts_with_its_end_token(opt_files):
    t = open_tokenizer(opt_files)
    ids = t.encode("It was")
    assert ids[0] == 2
    assert t.encode("It was", add_special_tokens=False) == ids[1:]
    assert t.decode(ids) == "It was"
    assert t.decode(ids, skip_special_tokens=False) == "</s>It was"
    assert t.vocab_size == len(json.loads((opt_files / "vocab.json").read_text()))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(opt_files, text):
    t = open_tokenizer(opt_files)
    assert t.decode(t.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_never_splits_a_character(opt_files, text):
    t = open_tokenizer(opt_files)
    stream = t.stream()
    parts = [stream.add(i) for i in t.encode(text)]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) + stream.flush() == text


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_of_anything_is_the_decoding_of_all(opt_files, seed):
    import random

    t = open_tokenizer(opt_files)
    draw = random.Random(seed)
    ids = [draw.randrange(t.vocab_size) for _ in range(60)]  # mostly no UTF-8 at all
    stream = t.stream()
    assert "".join([stream.add(i) for i in ids]) + stream.flush() == t.decode(ids)


def test_an_unfinished_character_comes_with_the_flush(opt_files):
    t = open_tokenizer(opt_files)
    stream = t.stream()
    ids = t.encode("a日", add_special_tokens=False)
    assert [stream.add(i) for i in ids[:-1]] == ["a", "", ""]
    assert stream.flush() == "\ufffd"


def test_tokenizer_json_comes_first_and_as_it_is(opt_files, tmp_path):
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(
            str(opt_files / "vocab.json"), str(opt_files / "merges.txt")
        )
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.json").write_text("not read")
    (tmp_path / "merges.txt").write_text("not read")
    assert open_tokenizer(tmp_path).encode("I")[0] != 2


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer.json nor both"):
        open_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"only vocab.json"):
        open_tokenizer(tmp_path)


def test_truncation_and_padding_in_the_file_are_not_for_us(opt_files, tmp_path):
    t = open_tokenizer(opt_files)
    t._backend.enable_truncation(3)
    t._backend.enable_padding(length=50)
    t._backend.save(str(tmp_path / "tokenizer.json"))
    ids = open_tokenizer(opt_files).encode(TEXTS[0])
    assert 3 < len(ids) < 50
    assert open_tokenizer(tmp_path).encode(TEXTS[0]) == ids


def test_a_tokenizer_that_cannot_encode_says_so(tmp_path):
    words = tokenizers.models.WordLevel({"a": 0}, unk_token="<unk>")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"cannot encode the text .* fetch tokenizer.json again"):
        open_tokenizer(tmp_path).encode("b")


def test_a_panic_of_the_library_is_an_error_like_others(opt_files, tmp_path):
    t = open_tokenizer(opt_files)
    t._backend.save(str(tmp_path / "tokenizer.json"))
    broken = json.loads((tmp_path / "tokenizer.json").read_text())
    broken["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="tokenizer"):
        open_tokenizer(tmp_path).encode("a")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', json.dumps({"version": "1.0"})])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read.*fetch"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.json")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(ValueError, match=r"vocab\.json"):
        open_tokenizer(tmp_path)


def test_gpt2s_files_are_no_stand_in(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "<|endoftext|>": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"</s>.*GPT-2"):
        open_tokenizer(tmp_path)
