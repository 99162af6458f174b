"""The command line: what it writes, what it refuses, and how it ends."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import tiny_opt
from safetensors.numpy import save

import jax_flashllm
from jax_flashllm.models import cli, opt, pruning
from jax_flashllm.models.checkpoint import open_checkpoint
from jax_flashllm.models.commands import common
from jax_flashllm.models.commands import generate as generate_command
from jax_flashllm.models.commands import prune as prune_command
from jax_flashllm.models.generate import generate
from jax_flashllm.models.tokenizer import open_tokenizer

PROMPT = "The old house stood"
MAIN = "import sys\nfrom jax_flashllm.models.cli import main\nsys.exit(main())"
COMMAND = [sys.executable, "-P", "-c", MAIN]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Compiled programs go to a cache of the tests' own."""
    cache = tmp_path_factory.mktemp("cache")
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return kept | {"XDG_CACHE_HOME": str(cache)}


@pytest.fixture
def command(environment, tmp_path):
    """Runs the command in a process of its own, in an empty directory."""

    def run(*args, first="", **variables):
        return subprocess.run(
            [*COMMAND[:-1], f"{first}\n{MAIN}", *map(str, args)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=tmp_path,
            env=environment | variables,
            timeout=120,
        )

    return run


@pytest.fixture
def inside(capsys, monkeypatch):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(common, "cache_compilations", lambda: None)

    def run(*args):
        try:
            code = cli.main([str(a) for a in args])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def tiny(tmp_path):
    """A float32 OPT of two layers with the demo's tokenizer, its vocabulary that long."""
    config = tiny_opt.config("plain", vocab_size=4096, max_position_embeddings=64)
    path = tiny_opt.save(tmp_path / "tiny", config, tiny_opt.weights(config))
    (path / "tokenizer.json").write_bytes((common.DEMO / "tokenizer.json").read_bytes())
    return path


# ---- generate ----


def test_greedy_text_is_that_of_the_library_and_the_cache_is_filled(command, environment):
    args = ("generate", "--prompt", PROMPT, "--max-new-tokens", "24", "--temperature", "0")
    result = command(*args)
    assert (result.returncode, result.stderr) == (0, b"")
    tokenizer = open_tokenizer(common.DEMO)
    tokens = generate(opt.load(common.DEMO), tokenizer.encode(PROMPT), 24)[0]
    assert result.stdout.decode() == PROMPT + tokenizer.decode(tokens) + "\n"
    assert os.listdir(os.path.join(environment["XDG_CACHE_HOME"], "jax_flashllm"))


def test_a_packed_model_may_be_held_as_delta_csr(inside):
    args = ("generate", "--prompt", PROMPT, "--max-new-tokens", "12", "--temperature", "0")
    assert inside(*args, "--format", "delta_csr") == inside(*args)
    kernel = opt.load(common.DEMO, format="delta_csr").layers[0].fc1.weight
    assert (kernel.format, opt.load(common.DEMO).layers[0].fc1.weight.format) == (
        "delta_csr", "bitmap",
    )  # fmt: skip


def test_a_seed_decides_the_text(inside):
    texts = [
        inside("generate", "--prompt", PROMPT, "--max-new-tokens", "24", "--seed", seed)[1]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_prompt_may_come_from_a_file_or_stdin(inside, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    args = ("generate", "--max-new-tokens", "4", "--temperature", "0")
    with open(file, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        results = [
            inside(*args, "--prompt", PROMPT),
            inside(*args, "--prompt-file", file),
            inside(*args),
        ]
    assert results[0][0] == 0
    assert results[0] == results[1] == results[2]


def test_without_echo_or_stream_the_continuation_is_the_same(inside):
    args = ("generate", "--prompt", PROMPT, "--max-new-tokens", "8", "--seed", "3")
    _, text, _ = inside(*args)
    assert inside(*args, "--no-echo")[1] == text.removeprefix(PROMPT)
    assert inside(*args, "--no-stream")[1] == text


def test_stop_text_ends_the_output_and_is_not_in_it(inside):
    args = ("generate", "--prompt", PROMPT, "--max-new-tokens", "30", "--temperature", "0")
    _, text, _ = inside(*args)
    stop = text[len(PROMPT) + 20 : len(PROMPT) + 26]
    code, stopped, _ = inside(*args, "--stop", "never written", "--stop", stop)
    assert code == 0
    assert stopped == text[: text.index(stop, len(PROMPT))] + "\n"


def test_stats_tell_the_time_and_the_bytes(inside):
    args = ("generate", "--prompt", PROMPT, "--max-new-tokens", "8", "--stats")
    _, _, line = inside(*args)
    assert "first token" in line
    assert "tokens/s" in line
    assert "weights 14.9 MB in memory, 28.4 MB with dense layers" in line


def printed(texts, stops=(), terminal=False):
    """What the printer writes for a model whose tokens are `texts`."""
    pieces = iter(texts)
    stream = SimpleNamespace(add=lambda _: next(pieces), flush=lambda: "")
    written = []
    out = SimpleNamespace(isatty=lambda: terminal, write=written.append, flush=lambda: None)
    printer = generate_command._Printer(out, stream, list(stops), True, "")
    try:
        for _ in texts:
            printer.add(0)
    except generate_command._Stopped:
        pass
    printer.finish()
    return "".join(written)


def test_stop_texts_may_lie_across_tokens():
    assert printed(["one t", "w", "o", " three"], ["two t"]) == "one \n"
    assert printed(["one t", "w", "o", " four"], ["two t"]) == "one two four\n"
    assert printed(["aab", "c"], ["abc", "aabd"]) == "a\n"
    assert printed(["end of th", "e"], ["the last"]) == "end of the\n"


def test_a_terminal_gets_no_control_characters():
    assert printed(["a\x1b[2Jb\x07\n\tc—é"], terminal=True) == "a[2Jb\n\tc—é\n"
    assert printed(["a\x1b[2J"], terminal=False) == "a\x1b[2J\n"


def test_all_of_the_context_is_used_and_no_more(inside, tiny):
    code, _, stderr = inside("generate", "--model", tiny, "--prompt", "a " * 20)
    assert (code, stderr) == (0, "")
    code, _, stderr = inside(
        "generate", "--model", tiny, "--prompt", "a " * 20, "--max-new-tokens", 60
    )
    assert code == 2
    assert "exceed the model's context of 64; ask for" in stderr


# ---- prune, info, eval, bench ----


@pytest.mark.parametrize("group", ["row", "global"])
def test_a_pruned_model_is_packed_described_and_evaluated(inside, tiny, tmp_path, group):
    out = tmp_path / "out"
    code, report, stderr = inside(
        "prune", tiny, "--sparsity", "0.6", "--group", group, "--out", out, "--dtype", "bfloat16"
    )
    assert (code, stderr) == (0, "")
    assert "all linear layers" in report
    assert "predicted at batch 1" in report
    with open_checkpoint(tiny) as old, open_checkpoint(out) as new:
        assert set(new.names()) == set(old.names())
        kept = weights = 0
        for name in old.names():
            before, after = old.read(name).astype(ml_dtypes.bfloat16), new.read(name)
            assert after.dtype == ml_dtypes.bfloat16
            if not new.is_sparse(name):
                np.testing.assert_array_equal(before, after)
                continue
            stays = after != 0
            np.testing.assert_array_equal(before[stays], after[stays])
            kept, weights = kept + stays.sum(), weights + stays.size
            if group == "row":
                assert (stays.sum(axis=1) == stays.shape[1] - round(0.6 * stays.shape[1])).all()
    assert kept / weights == pytest.approx(0.4, abs=0.01)

    code, table, _ = inside("info", out)
    assert code == 0
    assert table.count("bitmask") == 12
    code, dense, _ = inside("info", "--model", tiny)
    assert code == 0
    assert "bitmask" not in dense

    text = tmp_path / "text.txt"
    text.write_text("It was a dark night, and the moon was not to be seen. " * 20)
    code, line, _ = inside("eval", "--model", out, "--text", text, "--batch", "2")
    assert code == 0
    assert "bits per byte" in line
    assert "bytes scored" in line


def test_pruning_leaves_zeros_and_no_more(inside, tiny, tmp_path):
    args = ("prune", tiny, "--out", tmp_path / "out", "--sparsity")
    assert inside(*args, "0")[0] == 0
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert not any(map(checkpoint.is_sparse, checkpoint.names()))
        assert checkpoint.dtype(checkpoint.names()[0]) == np.float16
    assert inside(*args, "1", "--overwrite")[0] == 0
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert all(checkpoint.nnz(n) in (0, None) for n in checkpoint.names())
    assert inside("generate", "--model", tmp_path / "out", "--prompt", "a")[0] == 0


def test_calibrated_pruning_reports_errors_and_runs_as_its_dense_twin_does(inside, tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night, and the moon was not to be seen. " * 40)
    out = tmp_path / "out"
    code, report, stderr = inside(
        "prune", tiny, "--method", "sparsegpt", "--sparsity", "0.6", "--calibration", text,
        "--samples", "5", "--context", "48", "--out", out,
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt", "tiny"]
    rows = [line.split() for line in report.splitlines() if line.startswith("layers.")]
    assert len(rows) == 12
    assert all(59.5 < float(row[3].rstrip("%")) < 60.5 for row in rows)
    assert all(0 < float(row[4]) < 1 for row in rows)
    code, lines, _ = inside("eval", "--model", out, "--text", text, "--dense")
    assert code == 0
    assert abs(float(lines.rsplit("differ by ")[1].split("%")[0])) < 0.1


def predicted(report):
    """The two speeds of the last lines, as they are written."""
    return report.split("at most ")[1].split(" tokens/s")[0].split(" -> ")


def test_a_prediction_has_two_digits(inside, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "copy_bandwidth", lambda: 2.3456e10)
    _, report, _ = inside("prune", tiny, "--sparsity", "0.5", "--out", tmp_path / "out")
    assert all(len(n.rstrip("0")) <= 2 and n.isdigit() for n in predicted(report))
    assert "moves 23 GB/s" in report
    monkeypatch.setattr(common, "copy_bandwidth", lambda: 2e5)
    _, report, _ = inside("prune", tiny, "--sparsity", "0.5", "--out", tmp_path / "small")
    assert all(n.startswith("0.") and len(n.lstrip("0.")) <= 2 for n in predicted(report))


def test_the_report_tells_what_was_sparser_already(inside, tiny, tmp_path):
    out = tmp_path / "out"
    _, report, _ = inside("prune", tiny, "--sparsity", "0.75", "--out", out)
    assert "already" not in report
    again = ("prune", out, "--out", tmp_path / "again", "--overwrite", "--sparsity")
    assert "already" not in inside(*again, "0.75")[1]
    _, report, _ = inside(*again, "0.5")
    assert (
        "\nalready 75.0% sparse, more than the 50.0% asked for: nothing more was removed\n"
        in report
    )
    # A row that is full loses half of it, 16 weights.
    tensors = dict(tiny_opt.weights(json.loads((tiny / "config.json").read_text())))
    w = tensors["model.decoder.layers.0.self_attn.k_proj.weight"]
    w[1:] = 0
    damaged(tiny, "model.safetensors", lambda _: save(tensors))
    _, report, _ = inside("prune", tiny, "--sparsity", "0.5", "--out", tmp_path / "one")
    assert (
        "\n1 of 12 layers were sparser already than asked for, layers.0.self_attn.k_proj 96.9% "
        "instead of 50.0%\n"
    ) in report
    for name, w in tensors.items():
        if ".layers." in name and w.ndim == 2:
            w[1:] = 0
    weights = sum(w.size for n, w in tensors.items() if ".layers." in n and w.ndim == 2)
    damaged(tiny, "model.safetensors", lambda _: save(tensors))
    _, report, _ = inside("prune", tiny, "--sparsity", "0.5", "--out", tmp_path / "all")
    assert f"asked for: 208 of {weights:,} weights more were removed" in report


@pytest.mark.parametrize(
    ("kept", "says"),
    [(25, ": nothing more was removed"), (24, ": 1 of 100 weights more were removed"),
     (28, ": SparseGPT's updates filled 3 zeros")],
)  # fmt: skip
def test_zeros_that_updates_filled_are_told(kept, says):
    source = SimpleNamespace(
        linear=["w"], zeros={"w": 75}, checkpoint=SimpleNamespace(shape=lambda _: (10, 10))
    )
    report = prune_command._Report(source, pruning.Recipe("sparsegpt", 0.5, "uniform"))
    report.kept = {"w": kept}
    assert report._sparser() == [f"already 75.0% sparse, more than the 50.0% asked for{says}"]


@pytest.mark.parametrize(
    ("context", "says"),
    [
        ("8", "5 windows of 8 tokens from a text of {n} tokens"),
        ("64", "5 windows of 64 tokens from a text of {n} tokens: they overlap, side by side it "
         "has 1"),
        ("all but 1", "2 windows of {all} tokens from a text of {n} tokens, which has no more of "
         "the 5 asked for"),
    ],
)  # fmt: skip
def test_the_report_tells_what_it_calibrated_on(inside, tiny, tmp_path, context, says):
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night. " * (10 if context == "all but 1" else 13))
    n = len(open_tokenizer(tiny).encode(text.read_text(), add_special_tokens=False))
    values = {"n": n, "all": n - 1}
    code, report, _ = inside(
        "prune", tiny, "--method", "wanda", "--sparsity", "0.5", "--calibration", text,
        "--samples", "5", "--context", n - 1 if context == "all but 1" else context,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert f"\ncalibrated on {says.format(**values)}\n" in report


def test_bench_compares_sparse_and_dense(inside, tiny, tmp_path):
    inside("prune", tiny, "--sparsity", "0.7", "--out", tmp_path / "out")
    code, table, _ = inside("bench", "--model", tmp_path / "out", "--tokens", "8")
    assert code == 0
    assert "sparse (6" in table
    assert "the fastest dense" in table


# ---- what is refused ----


def damaged(path, name, change):
    data = (path / name).read_bytes()
    (path / name).write_bytes(change(data))


def hostile(path):
    """A packed weight that declares 2^40 columns in a file of a few bytes."""
    from safetensors.numpy import save_file

    head = "model.decoder.layers.0.fc1"
    parts = {
        "shape": np.array([1 << 20, 1 << 40]),
        "compressed": np.zeros(4, np.float16),
        "bitmask": np.zeros((1, 1), np.uint8),
        "row_offsets": np.zeros(1, np.int64),
    }
    save_file({f"{head}.{k}": v for k, v in parts.items()}, path / "model.safetensors")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("", "required: COMMAND; see jax-flashllm --help"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("generate --nonsense", "generate: unrecognized arguments: --nonsense; see jax-flashllm "
         "generate --help"),
        ("generate --model . --prompt a", "model . has no config.json, so it is no model's"),
        ("generate --model nowhere --prompt a", "nowhere does not exist; pass the directory"),
        ("generate --model ~nobody-of-that-name --prompt a", "does not exist; pass the directory"),
        ("info --model=", "'' does not exist; pass the directory"),
        ("generate --model tiny/config.json --prompt a", "is a file; pass the directory"),
        ("generate --prompt=", "the prompt is empty"),
        ("generate --prompt-file nowhere.txt", "nowhere.txt cannot be read"),
        ("generate --prompt-file latin1.txt", "not UTF-8 text (byte 3); convert it"),
        ("generate --prompt-file empty.txt", "the prompt is empty"),
        ("generate --prompt a --prompt-file empty.txt", "not allowed with argument"),
        ("generate --model tiny --prompt-file long.txt", "context of 64; shorten the prompt"),
        ("generate --prompt a --temperature=-1", "-1 is out of range, pass from 0"),
        ("generate --prompt a --temperature nan", "nan is out of range"),
        ("generate --prompt a --top-p 0", "0 is out of range, pass above 0 to 1"),
        ("generate --prompt a --top-k 0", "0 is out of range, pass from 1"),
        ("generate --prompt a --max-new-tokens few", "'few' is not an integer"),
        ("generate --prompt a --dtype float64", "invalid choice: 'float64'"),
        ("generate --prompt a --stop=", "--stop is empty"),
        ("prune tiny --out new --sparsity 70", "70 is out of range, pass from 0 to 1"),
        ("prune tiny --out new --sparsity=-0.1", "-0.1 is out of range"),
        ("prune tiny --out new", "required: --sparsity"),
        ("prune --model nowhere --out new --sparsity 0.5", "nowhere does not exist"),
        ("prune tiny --out long.txt --sparsity 0.5", "long.txt exists; choose another --out"),
        ("prune tiny --out long.txt --overwrite --sparsity 0.5", "is not a directory; choose"),
        ("prune tiny --out tiny --sparsity 0.5", "tiny is where the model itself lies; choose"),
        ("prune tiny --out ./tiny/../tiny --overwrite --sparsity 0.5", "the model itself lies"),
        ("prune tiny --out link --overwrite --sparsity 0.5", "link is where the model itself"),
        ("prune links --out tiny --overwrite --sparsity 0.5", "tiny is where the model itself"),
        ("prune tiny --out= --sparsity 0.5", "--out is ''; pass the name of the directory"),
        ("prune tiny --out nodir/.. --overwrite --sparsity 0.5", "--out is 'nodir/..'; pass"),
        ("prune tiny --out . --overwrite --sparsity 0.5", "no packed model has"),
        ("prune nowhere --out new --sparsity 0.5", "nowhere does not exist"),
        ("prune tiny --out long.txt/a/b --sparsity 0.5", "long.txt is not a directory; choose"),
        ("prune tiny --out new --sparsity 0.5 --method wanda", "pass --calibration FILE"),
        ("prune tiny --out new --sparsity 0.5 --owl", "--owl looks at activations"),
        ("prune tiny --out new --sparsity 0.5 --calibration nowhere.txt", "cannot be read"),
        ("prune tiny --out new --sparsity 0.5 --calibration one.txt", "1 tokens, fewer than one"),
        ("prune tiny --out new --sparsity 0.5 --calibration long.txt --context 65", "that at most"),
        ("prune tiny --out new --sparsity 0.5 --calibration long.txt --group global", "--owl"),
        ("prune tiny --out new --sparsity 0.5 --calibration long.txt --owl --owl-lambda 0.9",
         "pass a smaller lambda"),
        ("prune nan --out a/b/c --sparsity 0.5 --calibration long.txt", "hold NaN or Inf"),
        ("prune words --out new --sparsity 0.5 --calibration long.txt", "token 4294967295, out"),
        ("eval --model words --text long.txt", "token 4294967295 is outside"),
        *((f"prune tiny --out new --sparsity 0.5 {option} 0.5", f"{option} does nothing without "
           "--calibration") for option in ("--owl-m", "--owl-lambda", "--damping")),
        ("prune tiny --out new --sparsity 0.5 --samples 128", "--samples does nothing"),
        ("prune tiny --out new --sparsity 0.5 --context 8", "--context does nothing"),
        ("prune tiny --out new --sparsity 0.5 --calibration long.txt --owl-m 5",
         "--owl-m does nothing without --owl"),
        ("prune tiny --out new --sparsity 0.5 --calibration long.txt --method wanda --damping 0",
         "--damping does nothing without --method sparsegpt"),
        ("prune tiny --out new --sparsity 0.5 --damping inf", "--damping: inf is out of range"),
        ("prune tiny --out new --sparsity 0.5 --owl-m inf", "--owl-m: inf is out of range"),
        (f"prune tiny --out new --sparsity 0.5 --samples {10**30}",
         f"--samples: {10**30} is out of range, pass from 1 to 1000000"),
        ("eval --model tiny --text nowhere.txt", "nowhere.txt cannot be read"),
        ("eval --model tiny --text empty.txt", "empty.txt is empty"),
        ("eval --model tiny --text one.txt", "2 are needed"),
        ("eval --model tiny --text long.txt --context 65", "windows of 2 to 64"),
        ("bench --model tiny --tokens 100", "exceed the model's context of 64"),
        ("bench --model tiny --prompt-tokens 99999999999999", "exceed the model's context of 64"),
        ("info llama", "model_type is 'llama'; only 'opt'"),
        ("info truncated", "truncated"),
        ("info hostile", "fetch the file again"),
        ("generate --model hostile --prompt a", "fetch the file again"),
        ("prune hostile --sparsity 0.5 --out new", "fetch the file again"),
        ("generate --model wordless --prompt a", "neither tokenizer.json nor"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line_and_exit_code_2(inside, tiny, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    for name, content in (("latin1", b"caf\xe9"), ("empty", b""), ("one", b"a")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "long.txt").write_text("one two three " * 100)
    (tmp_path / "link").symlink_to(tiny, target_is_directory=True)
    known = ("llama", "truncated", "hostile", "wordless", "nan", "links", "words")
    for name in set(args.split()).intersection(known):
        path = tmp_path / name
        path.mkdir()
        for file in tiny.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        if name == "llama":
            damaged(path, "config.json", lambda x: x.replace(b'"opt"', b'"llama"'))
        elif name == "truncated":
            damaged(path, "model.safetensors", lambda x: x[: len(x) // 2])
        elif name == "hostile":
            hostile(path)
        elif name == "links":
            (path / "model.safetensors").unlink()
            (path / "model.safetensors").symlink_to(tiny / "model.safetensors")
        elif name == "words":
            words = {"model": {"type": "WordLevel", "vocab": {"?": 2**32 - 1}, "unk_token": "?"},
                     "pre_tokenizer": {"type": "Whitespace"}}  # fmt: skip
            (path / "tokenizer.json").write_text(json.dumps(words))
        elif name == "nan":
            tensors = tiny_opt.weights(json.loads((path / "config.json").read_text()))
            tensors["model.decoder.embed_tokens.weight"][:] = np.nan
            damaged(path, "model.safetensors", lambda _, t=tensors: save(t))
        else:
            (path / "tokenizer.json").unlink()
    before = sorted(p.name for p in tmp_path.rglob("*"))
    code, stdout, stderr = inside(*args.split())
    assert code == 2, stderr
    assert stdout == ""
    assert says in stderr
    assert stderr.startswith("jax-flashllm")
    assert stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_fault_of_ours_is_one_line_unless_debug(inside, monkeypatch):
    def broken(*_):
        raise TypeError("something\nwas wrong")

    monkeypatch.setattr(common, "model_path", broken)
    code, _, stderr = inside("info")
    assert code == 1
    assert stderr == (
        "jax-flashllm: internal error, TypeError: something was wrong; --debug shows where\n"
    )
    with pytest.raises(TypeError):
        cli.main(["info", "--debug"])


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")]
)
def test_out_of_memory_is_no_fault_of_ours(inside, monkeypatch, error):
    def exhausted(*_):
        raise error

    monkeypatch.setattr(common, "model_path", exhausted)
    code, _, stderr = inside("info")
    assert code == 2
    assert "out of memory" in stderr
    assert "free some memory" in stderr


def test_version(inside):
    assert inside("--version") == (0, f"jax-flashllm {jax_flashllm.__version__}\n", "")


def test_help_names_every_command(inside):
    code, text, _ = inside("--help")
    assert code == 0
    assert all(name in text for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        assert inside(name, "--help")[0] == 0


# ---- how it ends ----


def test_interrupted_it_ends_quietly_with_130(environment):
    for _ in range(5):  # on a busy machine the text may end before the signal comes
        process = subprocess.Popen(
            [*COMMAND, "generate", "--prompt", PROMPT, "--max-new-tokens", "500"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        )  # fmt: skip
        process.stdout.read(1)  # it writes
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        if process.returncode:
            break
    assert (process.returncode, stderr) == (130, b"")


@pytest.mark.filterwarnings("ignore:.*KeyboardInterrupt")
def test_an_interrupt_that_python_drops_still_ends_it(inside, monkeypatch):
    """As when it comes inside a garbage collector's callback, of which JAX has one."""

    class Drops:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    ages = []

    def process_age():
        ages.append(len(ages))
        if len(ages) == 5:
            Drops()
        return float(len(ages))

    monkeypatch.setattr(cli.generate.common, "process_age", process_age)
    before = signal.getsignal(signal.SIGINT)
    code, _, _ = inside("generate", "--prompt", PROMPT, "--max-new-tokens", "100")
    assert code == 130
    assert len(ages) < 20
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_that_leaves_is_no_error(environment):
    process = subprocess.Popen(
        [*COMMAND, "generate", "--prompt", PROMPT, "--max-new-tokens", "500"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    process.stdout.read(len(PROMPT) + 5)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_to_a_full_disk_is_an_error():
    with open("/dev/full", "wb") as full:
        result = subprocess.run([*COMMAND, "info"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "jax-flashllm: No space left on device; check the path, its permissions and the free "
        "space\n"
    )


def test_saving_to_a_full_disk_leaves_nothing(command, tmp_path):
    # A limit on file sizes fails in the middle of the weights, as a full disk does.
    result = command(
        "prune", "demo", "--sparsity", "0.8", "--out", tmp_path / "out",
        first="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))",
    )  # fmt: skip
    assert result.returncode == 2
    assert b"cannot be written (File too large)" in result.stderr.splitlines()[-1]
    assert b"Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_while_saving_keeps_the_finished_blocks(command, inside, tiny, tmp_path):
    (tmp_path / "text.txt").write_text("one two three " * 100)
    args = ("prune", tiny, "--method", "wanda", "--sparsity", "0.5", "--samples", "2",
            "--calibration", tmp_path / "text.txt", "--out", tmp_path / "out")  # fmt: skip
    # Blocks fit in this, the whole model does not.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    result = command(*args, first=limit, XDG_CACHE_HOME="/nowhere")
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert b"File too large" in last
    assert b"2 of 2 blocks are finished" in last
    assert sorted(os.listdir(tmp_path / "out.partial")) == ["layers.0", "layers.1", "run.json"]
    assert inside(*args)[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt", "tiny"]


KILLED = """
import os, signal
from jax_flashllm.models import partial
save = partial.save_packed
def dying(out, config, tensors, *rest):
    def some():
        for i, tensor in enumerate(tensors):
            if out.name == "layers.1" and i == 1:  # in the middle of the second block's file
                os.kill(os.getpid(), signal.SIGKILL)
            yield tensor
    return save(out, config, some(), *rest)
partial.save_packed = dying
"""


def test_a_run_that_was_killed_goes_on_and_ends_in_the_same_files(command, tiny, tmp_path):
    (tmp_path / "text.txt").write_text("one two three " * 100)
    args = ("prune", tiny, "--method", "sparsegpt", "--sparsity", "0.6", "--samples", "2",
            "--context", "32", "--calibration", tmp_path / "text.txt", "--out")  # fmt: skip
    assert command(*args, tmp_path / "cut", first=KILLED).returncode == -signal.SIGKILL
    work = tmp_path / "cut.partial"
    assert (work / "layers.0").is_dir()
    assert not (work / "layers.1").exists()
    assert command(*args, tmp_path / "cut").returncode == 0
    assert not work.exists()
    assert command(*args, tmp_path / "whole").returncode == 0
    for file in sorted(os.listdir(tmp_path / "whole")):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.fixture
def calibrated(tiny, tmp_path):
    """The arguments of a short calibrated run that writes `out`."""
    (tmp_path / "text.txt").write_text("one two three " * 100)
    return ("prune", tiny, "--method", "wanda", "--sparsity", "0.5", "--samples", "2",
            "--calibration", tmp_path / "text.txt", "--out", tmp_path / "out")  # fmt: skip


def test_a_directory_of_the_users_own_is_not_taken_for_finished_blocks(
    inside, calibrated, tmp_path
):
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / "thesis.txt").write_text("mine")
    code, _, stderr = inside(*calibrated)
    assert code == 2
    assert "out.partial is where finished blocks would wait, but holds ['thesis.txt']" in stderr
    assert (work / "thesis.txt").read_text() == "mine"
    (work / "thesis.txt").unlink()
    work.rmdir()
    work.write_text("mine")
    code, _, stderr = inside(*calibrated)
    assert code == 2
    assert "out.partial is where finished blocks would wait, but is no directory" in stderr
    assert work.read_text() == "mine"


def test_a_bad_destination_is_refused_before_the_work(inside, calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning.Blocks, "run", lambda _: pytest.fail("it prunes"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code, _, stderr = inside(*calibrated, "--overwrite")
    assert code == 2
    assert "holds ['thesis.txt'], which no packed model has" in stderr
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    code, _, stderr = inside(*calibrated, "--overwrite", "--out", tmp_path / "link")
    assert code == 2
    assert "link: destination: is not a directory" in stderr
    assert sorted(os.listdir(tmp_path)) == ["link", "out", "real", "text.txt", "tiny"]


def test_a_run_that_ended_meanwhile_is_seen_before_the_work(
    inside, calibrated, tmp_path, monkeypatch
):
    monkeypatch.setattr(pruning.Blocks, "run", lambda _: pytest.fail("it prunes"))
    start = pruning.Blocks.__init__

    def late(self, *args):
        (tmp_path / "out").mkdir()
        start(self, *args)

    monkeypatch.setattr(pruning.Blocks, "__init__", late)
    code, _, stderr = inside(*calibrated)
    assert code == 2
    assert "out: destination: exists; choose another" in stderr
    assert not (tmp_path / "out.partial").exists()


def test_two_runs_to_one_place_are_told_apart(inside, calibrated, tiny, tmp_path, monkeypatch):
    second = []
    run = pruning.Blocks.run

    def during(self):
        monkeypatch.undo()
        second.append(inside(*calibrated))
        run(self)

    monkeypatch.setattr(pruning.Blocks, "run", during)
    monkeypatch.setattr(common, "cache_compilations", lambda: None)
    assert inside(*calibrated)[0] == 0
    assert second[0][0] == 2
    assert "another run is at work in" in second[0][2]
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt", "tiny"]

    def made(*args):  # one that ends first, without calibration
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "config.json").write_text("{}")
        return by_magnitude(*args)

    by_magnitude = pruning.by_magnitude
    monkeypatch.setattr(pruning, "by_magnitude", made)
    code, _, stderr = inside("prune", tiny, "--sparsity", "0.5", "--out", tmp_path / "new")
    assert code == 2
    assert "new: destination: somebody else made it meanwhile; choose another" in stderr
    assert os.listdir(tmp_path / "new") == ["config.json"]


def test_a_cache_that_cannot_be_written_is_done_without(command, tmp_path):
    (tmp_path / "file").write_text("")
    result = command(
        "generate", "--prompt", PROMPT, "--max-new-tokens", "1", "--temperature", "0",
        XDG_CACHE_HOME=str(tmp_path / "file"),
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_damaged_cache_is_done_without(command, tmp_path):
    args = ("generate", "--prompt", PROMPT, "--max-new-tokens", "1", "--temperature", "0")
    whole = command(*args, XDG_CACHE_HOME=str(tmp_path))
    for entry in (tmp_path / "jax_flashllm").iterdir():
        if entry.is_file():
            entry.write_bytes(entry.read_bytes()[:100])
    damaged = command(*args, XDG_CACHE_HOME=str(tmp_path))
    assert (damaged.returncode, damaged.stderr) == (0, b"")
    assert damaged.stdout == whole.stdout


def test_nothing_heavy_is_imported_to_refuse_arguments(fresh_process):
    source = (
        "import sys\nfrom jax_flashllm.models import cli\n"
        "try: cli.main(['generate', '--top-k', '0'])\nexcept SystemExit: pass\n"
        "import json; print(json.dumps([m for m in ('flax', 'tokenizers') if m in sys.modules]))"
    )
    assert json.loads(fresh_process(source)) == []
