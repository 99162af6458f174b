"""Text to token ids and back, for the tokenizer files of a model directory.

tokenizer.json is taken as it is. Without it, vocab.json and merges.txt are read as OPT's byte-level
BPE, which puts </s> (id 2) before every text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers

# The library raises nothing narrower than Exception, and its panics are BaseExceptions.
_PASS_ON = (KeyboardInterrupt, SystemExit, MemoryError)
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character


class TextTokenizer:
    """Encodes and decodes; make it with `open_tokenizer`."""

    def __init__(self, backend: tokenizers.Tokenizer):
        # tokenizer.json may carry both from training; here a text is taken whole.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    @property
    def vocab_size(self) -> int:
        """Entries, special and added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, after the tokenizer's own prefix if it has one.

        Raises ValueError when the tokenizer's files contradict themselves.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except _PASS_ON:
            raise
        except BaseException as error:
            raise ValueError(
                f"tokenizer: it cannot encode the text ({error}); fetch tokenizer.json again."
            ) from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: the bytes of text each token stands for, 0 for special tokens."""
        added = self._backend.get_added_tokens_decoder()
        vocab = self._backend.get_vocab(with_added_tokens=True)
        size = np.zeros(max(vocab.values(), default=-1) + 1, np.int32)
        for token, i in vocab.items():
            # A byte-level token is spelled with one character a byte; an added one as it is.
            if i not in added:
                size[i] = len(token)
            elif not added[i].special:
                size[i] = len(token.encode())
        return size

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A decoder that takes one id at a time."""
        return TextStream(self, skip_special_tokens)


class TextStream:
    """Decodes token by token, holding back a character until all of its bytes are there.

    The texts returned by `add` and the one by `flush`, put together, are `decode` of all the ids.
    """

    def __init__(self, tokenizer: TextTokenizer, skip_special_tokens: bool):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []  # the last token shown in full, and those after it
        self._shown = ""  # how much of their text was returned

    def add(self, token: int) -> str:
        """The text that is certain once `token` is known; often one word, at times empty."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids, self._skip)
        # Cut off bytes decode to one U+FFFD at the very end, and only that can still change.
        certain = text.removesuffix(REPLACEMENT)
        new = certain[len(self._shown) :]
        self._shown = certain
        if certain == text:
            # One token stays for context: some decoders treat the first one differently.
            self._ids = self._ids[-1:]
            self._shown = self._tokenizer.decode(self._ids, self._skip)
            if self._shown.endswith(REPLACEMENT):
                self._ids, self._shown = [], ""
        return new

    def flush(self) -> str:
        """What is held back, when no more tokens come."""
        rest = self._tokenizer.decode(self._ids, self._skip)[len(self._shown) :]
        self._ids, self._shown = [], ""
        return rest


def open_tokenizer(path: str | os.PathLike) -> TextTokenizer:
    """The tokenizer of a model directory.

    Raises ValueError when its files are missing, damaged or not OPT's.
    """
    directory = Path(path)
    whole, vocab, merges = (directory / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.is_file():
        try:
            return TextTokenizer(tokenizers.Tokenizer.from_file(str(whole)))
        except _PASS_ON:
            raise
        except BaseException as error:
            raise ValueError(
                f"tokenizer: {whole} cannot be read ({error}); fetch it again."
            ) from error
    if vocab.is_file() and merges.is_file():
        return TextTokenizer(_opt_bpe(vocab, merges))
    there = [p.name for p in (vocab, merges) if p.is_file()]
    raise ValueError(
        f"tokenizer: {directory} has neither tokenizer.json nor both vocab.json and merges.txt"
        f"{' (only ' + there[0] + ')' if there else ''}; copy the files of the model there, or "
        "pass token ids instead of text."
    )


def _opt_bpe(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    try:
        bpe = tokenizers.models.BPE.from_file(str(vocab), str(merges))
    except _PASS_ON:
        raise
    except BaseException as error:
        raise ValueError(
            f"tokenizer: {vocab} and {merges.name} cannot be read ({error}); fetch both again."
        ) from error
    backend = tokenizers.Tokenizer(bpe)
    start = backend.token_to_id("</s>")
    if start is None:
        raise ValueError(
            f"tokenizer: {vocab} has no token '</s>', which OPT puts before every text; is it "
            "GPT-2's? Its ids differ: copy the files of the OPT model."
        )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = [t for t in ("<s>", "<pad>", "</s>", "<unk>") if backend.token_to_id(t) is not None]
    backend.add_special_tokens(special)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", start)]
    )
    return backend
