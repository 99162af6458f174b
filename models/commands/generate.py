"""Continues a prompt, printing words as they come.

    jax-flashllm generate --prompt "The old house stood"
    echo "The old house stood" | jax-flashllm generate --temperature 0

Draws among likely words by default; the same command writes the same text.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from jax_flashllm.models.commands import common, distributed

if TYPE_CHECKING:
    from jax_flashllm.models.tokenizer import TextStream

DEFAULT_TOKENS = 200
# Chosen by reading the demo's output. Cooler than this it repeats itself, warmer it wanders.
TEMPERATURE, TOP_P = 0.75, 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="text to continue (default: stdin)")
    source.add_argument(
        "--prompt-file", metavar="FILE", help="read it from a file; newlines at its end are dropped"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=common.number(int, 1),
        metavar="N",
        help=f"default: {DEFAULT_TOKENS}, or what the context has room for",
    )
    parser.add_argument(
        "--temperature",
        type=common.number(float, 0, 100),
        default=TEMPERATURE,
        metavar="T",
        help="0 always takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=common.number(int, 1), metavar="K", help="keep the K likeliest tokens"
    )
    parser.add_argument(
        "--top-p",
        type=common.number(float, 0, 1, above=True),
        default=TOP_P,
        metavar="P",
        help="keep the likeliest tokens that reach probability P (default: %(default)s)",
    )
    parser.add_argument(
        "--min-p",
        type=common.number(float, 0, 1),
        metavar="P",
        help="keep tokens at least P times as likely as the likeliest",
    )
    parser.add_argument(
        "--seed",
        type=common.number(int, 0, 2**64 - 1),
        default=0,
        metavar="S",
        help="of the draws: the same command gives the same text (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-dtype",
        choices=(*common.DTYPES, "float8_e4m3fn"),
        help="of keys and values (default: the activations')",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be repeated",
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print as it comes (default), or all at the end",
    )
    parser.add_argument(
        "--echo",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print the prompt before its continuation (default)",
    )
    parser.add_argument(
        "--stats",
        action=argparse.BooleanOptionalAction,
        help="a line on stderr about time and memory (default: where stderr is a terminal)",
    )
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    path = common.model_path(args.model)
    if "" in args.stop:
        raise ValueError("--stop is empty; pass the text to stop at")
    if args.distributed and args.prompt is None and args.prompt_file is None:
        raise ValueError("--distributed needs --prompt or --prompt-file, the same on every host")
    prompt = _prompt(args)

    common.use_all_memory()
    common.cache_compilations()
    with distributed.joined(args) as out:
        _continue(args, path, prompt, out)


def _continue(args: argparse.Namespace, path: Path, prompt: str, out: TextIO) -> None:
    from jax_flashllm.models import opt
    from jax_flashllm.models.generate import generate
    from jax_flashllm.models.tokenizer import open_tokenizer

    loading = common.process_age()
    tokenizer = open_tokenizer(path)
    ids = tokenizer.encode(prompt)
    model = opt.load(path, args.dtype, mesh=distributed.mesh(args), format=args.format)
    loaded = common.process_age()
    most = args.max_new_tokens
    if most is None:
        room = model.config.max_position_embeddings - len(ids)
        most = max(min(DEFAULT_TOKENS, room), 1)

    # The prompt is shown with the first token: an error before that leaves stdout empty.
    before = prompt if args.echo else ""
    # Every process looks for stop texts, or one would leave the others waiting.
    printer = _Printer(out, tokenizer.stream(), args.stop, args.stream, before)
    with contextlib.suppress(_Stopped):
        generate(
            model,
            ids,
            most,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            seed=args.seed,
            cache_dtype=args.cache_dtype,
            on_token=lambda tokens: printer.add(int(tokens[0])),
        )
    printer.finish()
    silent = isinstance(out, io.StringIO)
    if not silent and (sys.stderr.isatty() if args.stats is None else args.stats):
        held, dense = common.weight_bytes(model)
        print(_statistics(printer.times, loading, loaded, held, dense), file=sys.stderr)


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        prompt = args.prompt
    elif args.prompt_file is not None:
        prompt = common.read_text(args.prompt_file).rstrip("\n")
    elif sys.stdin is None or sys.stdin.isatty():
        raise ValueError("there is no prompt; pass --prompt TEXT or --prompt-file FILE")
    else:
        try:
            prompt = sys.stdin.buffer.read().decode().replace("\r\n", "\n").rstrip("\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the prompt on stdin is not UTF-8 (byte {error.start}); convert it first"
            ) from error
    if not prompt:
        raise ValueError("the prompt is empty; pass --prompt TEXT with one word at least")
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise ValueError("the prompt is not UTF-8; convert it first")
    return prompt


class _Stopped(Exception):
    """Leaves `generate` from within its callback."""


class _Printer:
    """Writes text as its tokens come, up to the first stop text."""

    def __init__(
        self, out: TextIO, stream: TextStream, stops: list[str], at_once: bool, before: str
    ):
        self.before = before
        self.out, self.stream, self.stops, self.at_once = out, stream, stops, at_once
        self.held = ""  # might become a stop text
        self.times: list[float] = []  # process age at each token
        # A model's text must not move the cursor or set the window's title.
        self.plain = out.isatty()

    def add(self, token: int) -> None:
        common.check_interrupt()
        self.times.append(common.process_age())
        if len(self.times) == 1:
            self.write(self.before)
        self._show(self.stream.add(token))

    def finish(self) -> None:
        with contextlib.suppress(_Stopped):
            self._show(self.stream.flush())
        self.write(self.held + "\n")
        self.held = ""
        self.out.flush()

    def _show(self, text: str) -> None:
        self.held += text
        found = [at for at in map(self.held.find, self.stops) if at >= 0]
        if found:
            self.write(self.held[: min(found)])
            self.held = ""
            raise _Stopped
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        shown = len(self.held) - keep
        self.write(self.held[:shown])
        self.held = self.held[shown:]

    def write(self, text: str) -> None:
        if self.plain:
            text = "".join(c for c in text if c.isprintable() or c in "\n\t")
        self.out.write(text)
        if self.at_once:
            self.out.flush()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def _statistics(times: list[float], loading: float, loaded: float, held: int, dense: int) -> str:
    line = (
        f"first token {times[0]:.2f} s after the start (imports {loading:.2f}, load "
        f"{loaded - loading:.2f}, compile and prefill {times[0] - loaded:.2f})"
    )
    if len(times) > 2:
        # The second token may have waited for its program.
        line += f", then {(len(times) - 2) / (times[-1] - times[1]):.0f} tokens/s"
    line += f"; weights {common.size(held)} in memory"
    return line + (f", {common.size(dense)} with dense layers" if dense > held else "")
