"""What the package may call, reach, hold and depend on."""

import ast
import importlib.metadata
import os
import pathlib
import re
import socket
import tomllib

import pytest

import jax_flashllm

ROOT = pathlib.Path(jax_flashllm.__path__[0])
SOURCES = [
    pathlib.Path(folder) / name
    for folder, _, names in os.walk(ROOT, followlinks=True)
    for name in names
    if name.endswith(".py")
]

MODULES = {
    # unpickle, evaluate, or import what data names
    *("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"),
    *("torch", "importlib", "imp", "runpy", "code", "codeop", "pty", "subprocess"),
    # or go to the network
    *("socket", "ssl", "http", "urllib", "urllib3", "requests", "ftplib", "smtplib", "asyncio"),
    *("huggingface_hub", "transformers", "webbrowser", "xmlrpc"),
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
METHODS = {"system", "popen", "execv", "execve", "spawnv", "posix_spawn", "load_module"}


def forbidden(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(node.module or "").split(".")[0]]
        found += MODULES.intersection(names)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                found.append(node.func.id)
            if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                found.append(node.func.attr)
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            found.append(node.arg)
    return found


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from torch import load", "import importlib.util as x", "eval(a)",
     "import os; os.system(a)", "np.load(f, allow_pickle=True)", "__import__(name)",
     "def f():\n  import urllib.request"],
)  # fmt: skip
def test_what_is_looked_for_is_found(text):
    assert forbidden(ast.parse(text))


def test_nothing_can_run_or_import_what_a_file_names():
    """No module unpickles, evaluates, imports by a computed name, starts programs, or connects."""
    assert len(SOURCES) > 40
    found = {f.name: names for f in SOURCES if (names := forbidden(ast.parse(f.read_text())))}
    assert found == {}


# ---- network ----

QUIET = """
import sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request"):
        raise AssertionError(f"{event} {args}")

sys.addaudithook(refuse)
import pkgutil, jax_flashllm, jax_flashllm.models
for package in (jax_flashllm, jax_flashllm.models):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        __import__(module.name)
from jax_flashllm.models.cli import main
sys.exit(main(["generate", "--prompt", "Alice", "--max-new-tokens", "2"]))
"""


def test_no_network_at_import_or_in_use(fresh_process):
    assert "Alice" in fresh_process(QUIET)


def test_no_network_in_tests():
    for family, address in [
        (socket.AF_INET, ("192.0.2.1", 9)),
        (socket.AF_INET6, ("2001:db8::1", 9)),
    ]:
        with socket.socket(family) as s, pytest.raises(RuntimeError, match="no network"):
            s.connect(address)
    with pytest.raises(RuntimeError, match="no network"):
        socket.getaddrinfo("example.org", 443)


# ---- what is installed ----

ALLOWED = re.compile(
    r"jax_flashllm/(\w+/)*\w+\.py"
    r"|jax_flashllm/(py\.typed|_flashllm\.pyi|_flashllm\.[\w.-]+\.(so|pyd|dylib))"
    r"|jax_flashllm/_flashllm\.(so|abi3\.so)"
    r"|jax_flashllm/models/demo/(MODEL_CARD\.md|config\.json|model\.safetensors|tokenizer\.json)"
    r"|jax_flashllm-[\w.]+\.dist-info/(METADATA|RECORD|WHEEL|entry_points\.txt|licenses/LICENSE)"
    r"|jax_flashllm-[\w.]+\.dist-info/(INSTALLER|REQUESTED|direct_url\.json)"  # pip's own
    r"|(\.\./)+bin/jax-flashllm"
)


def distribution():
    try:
        return importlib.metadata.distribution("jax-flashllm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed from a wheel")


def test_the_wheel_holds_only_what_it_must():
    dist = distribution()
    files = [f for f in dist.files if "__pycache__" not in f.parts]
    if not any(f.name == "spmm.py" for f in files):
        pytest.skip("installed to be edited")
    assert [str(f) for f in files if not ALLOWED.fullmatch(str(f))] == []
    installed = {str(f) for f in files}
    assert {f"jax_flashllm/{f.relative_to(ROOT)}" for f in SOURCES} <= installed
    assert sum(f.locate().stat().st_size for f in files if f.parts[0] == "jax_flashllm") < 40e6


def test_every_dependency_has_a_tested_range():
    """Lower and upper bound; docs/reliability.md says what was run at the lower ones."""
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())
    needs = project["project"]["dependencies"]
    assert len(needs) > 5
    for need in needs:
        name, low, high = re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", need).groups()
        version = importlib.metadata.version(name)
        here, low, high = (tuple(map(int, re.findall(r"\d+", v)[:3])) for v in (version, low, high))
        assert low <= here < high, f"{name} {version}: {need}"
