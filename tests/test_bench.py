"""benchmarks/bench_spmm.py runs, and takes other people's kernels."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
PLUGIN = """
import numpy as np

def encode(dense):
    assert dense.dtype == np.float32 and dense.flags.c_contiguous
    rows, columns = np.nonzero(dense)
    return dense.shape[0], rows, columns, dense[rows, columns]

def multiply(weight, x):
    m, rows, columns, values = weight
    y = np.zeros((m, len(x)), np.float32)
    np.add.at(y, rows, values[:, None] * x.T[columns])
    return y.T{wrong}
"""


@pytest.fixture
def bench(monkeypatch):
    """bench_spmm.main with a command line."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_spmm

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["bench_spmm.py", "--seconds", "0.01", *args])
        bench_spmm.main()

    return run


def test_a_plugin_is_timed_beside_the_others(bench, capsys, tmp_path):
    plugin, out = tmp_path / "coordinates.py", tmp_path / "out.csv"
    plugin.write_text(PLUGIN.format(wrong=""))
    case = ["--shapes", "96x64", "--tokens", "1", "3", "--sparsity", "0.5"]
    bench(*case, "--plugin", str(plugin), "--csv", str(out))
    lines = out.read_text().splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    assert about.keys() >= {"cpu", "versions", "commit"}
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert {(r["M"], r["K"], r["N"], r["sparsity"]) for r in rows} == {
        ("96", "64", "1", "0.5"),
        ("96", "64", "3", "0.5"),
    }
    assert {"coordinates", "ours bf16", "ours fp16", "XLA f32"} <= {r["kernel"] for r in rows}
    assert all(float(r["median_ms"]) > 0 for r in rows)
    assert capsys.readouterr().out.count("coordinates") == 2  # a line a case


def test_a_plugin_that_is_wrong_is_not_timed(bench, tmp_path):
    plugin = tmp_path / "coordinates.py"
    plugin.write_text(PLUGIN.format(wrong=" * 1.1"))
    with pytest.raises(SystemExit, match="coordinates: relative error"):
        bench("--shapes", "96x64", "--tokens", "2", "--plugin", str(plugin))


@pytest.mark.parametrize("text", [None, "encode = 1", "def encode(dense): pass"])
def test_what_is_no_plugin_is_refused(bench, tmp_path, text):
    plugin = tmp_path / "mine.py"
    if text:
        plugin.write_text(text)
    with pytest.raises(SystemExit, match=r"--plugin .*mine\.py: "):
        bench("--plugin", str(plugin))


def test_all_shapes_of_the_models_are_there(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import shapes

    found = shapes.all_shapes()
    assert len(found) == len(set(found))
    opt = [768, 1024, 2048, 2560, 4096, 5120, 7168, 9216, 12288]
    assert {(a * d, b * d) for d in opt for a, b in [(3, 1), (1, 1), (4, 1), (1, 4)]} <= set(found)
    assert {(11008, 4096), (8192, 22016), (10240, 8192), (8192, 28672)} <= set(found)
    assert shapes.names((4096, 4096)) == "Llama-7B output; OPT-6.7B output"
    assert np.prod(max(found, key=np.prod)) == 49152 * 12288


def test_reports_count_each_case_once_and_say_who_loses(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    import report

    cases = {(7168, 7168): 0.5, (28672, 7168): 2.0, (64, 64): 9.0}  # cuBLAS / ours

    def write(path, ratios):
        rows = [
            {"M": m, "K": k, "N": 8, "sparsity": 0.5, "kernel": kernel, "median_ms": ms,
             "roof_ms": 0.5, "vs_cublas": 1 / ms, "dtype": "float16"}
            for (m, k), ratio in ratios.items()
            for kernel, ms in (("cuBLAS", 1.0), ("ours bitmap", 1 / ratio))
        ]  # fmt: skip
        with open(path, "w", newline="") as f:
            f.write("# gpu: none\n")
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    write(tmp_path / "old.csv", cases | {(7168, 7168): 0.1})
    write(tmp_path / "new.csv", {(7168, 7168): 0.5})
    files = [str(tmp_path / name) for name in ("old.csv", "new.csv")]
    monkeypatch.setattr(sys, "argv", ["report.py", *files])
    report.main()
    out = capsys.readouterr().out
    assert "2 of the 12 shapes" in out
    assert "| 50% | 1.00 (1.7); 0.50 (0.9) |" in out  # means of 0.5 and 2, and of 0.25 and 1
    assert "1 of 2 cases" in out
    assert "N = 8: 1; 7168x7168 50% 0.50" in out
    assert "| 7168x7168 | **0.50** |" in out
    assert "| 64x64 | 9.00 |" in out


def test_reports_of_decoding_say_what_is_short(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import report

    row = dict.fromkeys(["layers", "context", "read_gb_s", "long_prompt", "long_prompt_ms"], "")
    row |= {"config": "opt-30b", "dtype": "float16", "cache_dtype": "float16", "choice": "greedy"}
    row |= dict.fromkeys(["fraction_of_read", "tokens_s", "prefill_tokens_s", "in_use_bytes"], "1")
    row |= {"dense_limit_ms": "20"}
    cases = [("GPU", "dense", "1", "21"), ("GPU", "0.7", "8", "9"), ("GPU", "0.7", "1", "12"),
             ("GPU", "0.7", "1", "10"), ("another", "0.7", "1", "5")]  # fmt: skip
    path = tmp_path / "decode.csv"
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, ["device", *row, "sparsity", "batch", "step_ms"])
        writer.writeheader()
        for case in cases:
            names = ("device", "sparsity", "batch", "step_ms")
            writer.writerow(row | dict(zip(names, case, strict=True)))
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    report.main()
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("another")
    tables = [[line.split(" | ")[1:7] for line in part if line.startswith("| ")][1:]
              for part in (lines[lines.index("GPU") : at], lines[at:])]  # fmt: skip
    assert tables == [
        [
            ["70% sparse", "1", "10.00", "20.00", "**2.00**", "2.1"],
            ["", "8", "9.00", "20.00", "2.22", "2.1"],
            ["dense", "1", "21.00", "20.00", "**0.95**", ""],
        ],
        [["70% sparse", "1", "5.00", "20.00", "4.00", "2.1"]],
    ]
