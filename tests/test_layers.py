"""Data flows one way: format, op, layer, model, command line. Nothing imports upward."""

import ast
import os
from pathlib import Path

import pytest

import jax_flashllm

# Lowest first; a module belongs to the longest prefix that fits. Modules of one layer may
# import each other.
LAYERS = [
    ["_flashllm"],
    ["formats"],
    ["partition"],
    ["kernel", "plan"],
    ["spmm", "attention"],
    ["chain"],
    ["", "tuning"],  # the public names
    ["nn", "linen"],
    ["prune"],
    ["models"],
    ["models.commands"],
    ["models.cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ROOT = Path(jax_flashllm.__file__).parent


def sources() -> dict[str, Path]:
    found = {}
    for folder, _, files in os.walk(ROOT, followlinks=True):
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(p for p in parts if p != "__init__")] = path
    return found


SOURCES = sources()


def layer(module: str) -> str:
    while module not in RANK:
        assert "." in module, f"{module} has no layer: give it one in this file"
        module = module.rpartition(".")[0]
    return module


def imports(module: str, path: Path) -> set[str]:
    """The modules of this package that a file imports, function bodies included."""
    found = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ["jax_flashllm", *package.split(".")] if package else ["jax_flashllm"]
                base = ".".join([*parts[: len(parts) - node.level + 1], base]).rstrip(".")
            found |= {f"{base}.{a.name}" for a in node.names}
    inside = {m.removeprefix("jax_flashllm").lstrip(".") for m in found if is_ours(m)}
    # `from package import name` names a module, or something that its parent defines.
    return {m if m in SOURCES or m == "_flashllm" else m.rpartition(".")[0] for m in inside}


def is_ours(module: str) -> bool:
    return module == "jax_flashllm" or module.startswith("jax_flashllm.")


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_nothing_imports_upward(module):
    mine = RANK[layer(module)]
    for other in imports(module, SOURCES[module]):
        assert RANK[layer(other)] <= mine, f"{module or 'jax_flashllm'} imports {other}"


def test_prune_serves_models_only():
    users = {m for m, path in SOURCES.items() for o in imports(m, path) if layer(o) == "prune"}
    strangers = [m for m in users if not layer(m).startswith(("prune", "models"))]
    assert not strangers
    for other in imports("prune", SOURCES["prune"]):
        assert layer(other) == "prune", f"prune works on arrays alone, but imports {other}"


def test_the_test_sees_imports(tmp_path):
    source = tmp_path / "f.py"
    source.write_text(
        "import jax_flashllm.nn.dense\n"
        "from jax_flashllm import spmm, encode\n"
        "from .bitmap import Bitmap\n"
        "def f():\n    from jax_flashllm.models.opt import OPT\n"
    )
    assert imports("formats.f", source) == {"nn.dense", "spmm", "", "formats.bitmap", "models.opt"}
