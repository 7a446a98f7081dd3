"""The structure of the package: imports go down, files stay small, importing has no effect."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dml_dist

ROOT = Path(dml_dist.__file__).parent

# Packages and modules directly below dml_dist. A file may import its own package and any layer
# below its own; within layer 0 the small modules may know each other; sideways imports between
# packages of one layer are refused, except what ALLOWED_SIDEWAYS names.
LAYERS: dict[int, set[str]] = {
    0: {
        *("errors", "config", "topology", "partition", "files", "urls", "random_streams"),
        *("terminal", "import_path"),
    },
    1: {"runs", "losses", "models", "metrics"},
    2: {"parallel", "data", "search"},
    3: {"train", "evaluation", "report"},
    4: {"runtime"},
    5: {"orchestration"},
    6: {"studies", "export", "jobs"},
    # "": dml_dist/__init__.py, the names for other programs.
    7: {"cli", "cli_data", "cli_jobs", "cli_options", "cli_studies", "__main__", ""},
}

# Importer -> what it may import of its own layer.
ALLOWED_SIDEWAYS: dict[str, set[str]] = {
    **{name: LAYERS[0] - {name} for name in LAYERS[0]},  # values and small functions
    "data": {"parallel.comm"},  # the type through which ranks talk
    "search": {"parallel.comm"},
    "cli": {"cli_data", "cli_jobs", "cli_options", "cli_studies"},
    "cli_studies": {"cli_data", "cli_options"},
    "__main__": {"cli"},
}

# Libraries that only some packages import, and where at the top of a module.
ONLY_IN: dict[str, set[str]] = {
    "ray": {"orchestration", "jobs"},
    "optuna": {"studies"},
    "typer": {"cli", "cli_data", "cli_jobs", "cli_options", "cli_studies"},
}
NEVER_AT_TOP = {
    *("onnx", "onnxruntime", "onnxscript", "faiss", "webdataset", "zuko", "matplotlib"),
    *("timm", "safetensors"),
}
NO_TORCH = LAYERS[0] | {"runs"}

TESTS = Path(__file__).parents[1]

MAX_LINES = 400
MAX_FUNCTION_LINES = 60


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py"))


def dotted(path: Path) -> str:
    """Return the name of a module below dml_dist, such as `parallel.comm`."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    return module.split(".")[0]


def layer_of(name: str) -> int | None:
    return next((layer for layer, names in LAYERS.items() if name in names), None)


def imports(tree: ast.AST, module: str, *, at_top: bool = False) -> Iterator[tuple[str, int]]:
    """Yield the absolute name of every import and its line; `at_top`: those that run on import.

    Imports under `if TYPE_CHECKING:` are yielded as dependencies, but do not run.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and at_top:
            continue
        if isinstance(node, ast.If) and at_top and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["dml_dist", *module.split(".")][: -node.level]
                base = ".".join([*package, base]).rstrip(".")
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        else:
            yield from imports(node, module, at_top=at_top)


def violations(module: str, source: str) -> list[str]:
    """Return what a module's imports do against the tables above."""
    found = []
    tree = ast.parse(source)
    own = unit(module)
    for name, line in imports(tree, module):
        library, _, rest = name.partition(".")
        if library != "dml_dist":
            if own not in ONLY_IN.get(library, {own}):
                found.append(f"{module}:{line}: {library} belongs to {sorted(ONLY_IN[library])}")
            if library == "torch" and own in NO_TORCH:
                found.append(f"{module}:{line}: layer 0 does without torch")
            continue
        other = unit(rest)
        if other == own or not rest or other == "__version__":
            continue
        mine, theirs = layer_of(own), layer_of(other)
        if mine is None or theirs is None:
            found.append(f"{module}:{line}: {other} is in no layer")
        elif theirs > mine:
            found.append(f"{module}:{line}: layer {mine} imports {rest} of layer {theirs}")
        elif theirs == mine and not _sideways_allowed(own, rest):
            found.append(f"{module}:{line}: {rest} is beside, not below")
    for name, line in imports(tree, module, at_top=True):
        if name.partition(".")[0] in NEVER_AT_TOP:
            found.append(f"{module}:{line}: {name} is to be imported inside a function")
    return found


def _sideways_allowed(own: str, rest: str) -> bool:
    allowed = ALLOWED_SIDEWAYS.get(own, set())
    return any(rest == name or rest.startswith(f"{name}.") for name in allowed)


def test_every_module_is_in_a_layer() -> None:
    names = {unit(dotted(path)) for path in modules()} - {""}
    assert {name for name in names if layer_of(name) is None} == set()


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_go_down(path: Path) -> None:
    assert violations(dotted(path), path.read_text(encoding="utf-8")) == []


def in_cycles(sources: dict[str, str]) -> set[str]:
    """Return the modules in import cycles or between two of them; source by module name."""
    below: dict[str, set[str]] = {}
    for module, source in sources.items():
        below[module] = set()
        for name, _ in imports(ast.parse(source), module):
            library, _, rest = name.partition(".")
            # `from dml_dist.data import index` names a module, `from ... import Index` a value.
            target = rest if rest in sources else rest.rpartition(".")[0]
            if library == "dml_dist" and target in sources and target != module:
                below[module].add(target)
    # A module that imports none of the rest is in no cycle, nor is one that none of them imports.
    before = 0
    while before != len(below):
        before = len(below)
        below = {name: used & below.keys() for name, used in below.items() if used & below.keys()}
        used_by_some = {name for used in below.values() for name in used}
        below = {name: used for name, used in below.items() if name in used_by_some}
    return set(below)


def test_modules_do_not_import_each_other() -> None:
    """Imports for type checking and those inside functions count, too."""
    assert in_cycles({dotted(path): path.read_text("utf-8") for path in modules()}) == set()


@pytest.mark.parametrize(
    ("sources", "cycle"),
    [
        ({"a": "from dml_dist.b import f", "b": "from dml_dist.c import g", "c": ""}, False),
        ({"a": "from dml_dist.b import f", "b": "import dml_dist.a"}, True),
        ({"a": "def f():\n    from dml_dist import b", "b": "from dml_dist.a import f"}, True),
        ({"a": "if TYPE_CHECKING:\n    from dml_dist.b import B", "b": "import dml_dist.a"}, True),
        ({"a": "import dml_dist.b", "b": "import dml_dist.c", "c": "from .a import f"}, True),
        ({"p.a": "from dml_dist.p import b", "p.b": "from .a import f", "p": ""}, True),
    ],
)
def test_import_cycles_are_seen(sources: dict[str, str], cycle: bool) -> None:
    assert bool(in_cycles(sources)) == cycle


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1 - _docstring_lines(node)
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_files_of_tests_are_short() -> None:
    sizes = {
        str(path.relative_to(TESTS)): len(path.read_text(encoding="utf-8").splitlines())
        for path in TESTS.rglob("*.py")
    }
    assert len(sizes) > 100
    assert {name: size for name, size in sizes.items() if size > MAX_LINES} == {}


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    has = ast.get_docstring(node) is not None
    return (first.end_lineno or 0) - first.lineno + 1 if has else 0


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("losses.nca", "import dml_dist.parallel.comm", 1),
        ("losses.nca", "from dml_dist.parallel import comm", 1),
        ("losses.nca", "from dml_dist import parallel", 1),
        ("losses.nca", "from ..parallel import comm", 1),
        ("losses.nca", "from .numerics import x", 0),
        ("losses.nca", "from dml_dist.models import head", 1),
        ("losses.nca", "def f():\n    from dml_dist.train import loop", 1),
        ("losses.nca", "from dml_dist.errors import ConfigError", 0),
        ("train.loop", "from dml_dist.evaluation import retrieval", 1),
        ("train.loop", "import ray.train", 1),
        ("train.loop", "def f():\n    import ray", 1),
        ("data.loader", "from dml_dist.parallel.comm import Comm", 0),
        ("data.loader", "from dml_dist.parallel.proxies import Proxies", 1),
        ("data.loader", "import webdataset", 1),
        ("data.loader", "def f():\n    import webdataset", 0),
        ("data.loader", "try:\n    import webdataset\nexcept ImportError:\n    raise", 1),
        ("config.load", "import torch", 1),
        ("orchestration.launch", "import ray", 0),
        ("wombat", "import dml_dist.errors", 1),
    ],
)
def test_violations_are_seen(module: str, source: str, count: int) -> None:
    assert len(violations(module, source)) == count


IMPORT_ALL = """
import importlib, os, sys, threading
import torch, torchvision  # which change the environment themselves
names = sys.argv[1:]
environment = dict(os.environ)
for name in names:
    importlib.import_module(name)
heavy = {"ray", "optuna", "faiss", "webdataset", "zuko", "matplotlib"} & set(sys.modules)
assert not heavy, f"imported: {sorted(heavy)}"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert not torch.distributed.is_initialized(), "a process group was opened"
assert threading.active_count() == 1, "threads were started"
assert dict(os.environ) == environment, "the environment was changed"
"""


def test_importing_has_no_effect_and_needs_no_heavy_library(tmp_path: Path) -> None:
    """In one process: all modules below orchestration, so none imports ray indirectly."""
    names = ["dml_dist"]
    for path in modules():
        module = dotted(path)
        if module and (layer_of(unit(module)) or 0) <= 4:
            names.append(f"dml_dist.{module}")
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT.parent), "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []


LIGHT = """
import sys
sys.argv = ["dml-dist", "--help"]
import dml_dist.cli
heavy = {"torch", "ray", "numpy", "pyarrow", "faiss", "matplotlib"} & set(sys.modules)
assert not heavy, f"imported: {sorted(heavy)}"
"""


def test_the_command_line_starts_without_heavy_libraries() -> None:
    result = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60, cwd=ROOT.parent
    )
    assert result.returncode == 0, result.stderr


DRY_RUN = """
import sys
from rich.console import Console
from dml_dist.config.load import load_config
from dml_dist.orchestration.train import dry_run_table
dry_run_table(load_config(sys.argv[1]), Console(quiet=True))
heavy = {"torchvision", "pandas", "ray", "optuna", "faiss", "matplotlib"} & set(sys.modules)
assert not heavy, f"imported: {sorted(heavy)}"
"""


def test_a_dry_run_imports_torch_and_no_other_heavy_library(tmp_path: Path) -> None:
    """Of a network and data that need none: what remains is torch's own time."""
    result = subprocess.run(
        [sys.executable, "-c", DRY_RUN, ROOT.parent / "configs/sop_shape.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT.parent), "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
