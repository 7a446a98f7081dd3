"""Files of the current folder hide no library, whatever they are called; custom targets work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dml_dist.import_path import put_current_folder_last, search_path
from tests.e2e.conftest import REPOSITORY, write_config

HIDING = (
    *("torch", "webdataset", "numpy", "PIL", "pyarrow", "pydantic", "ray", "typer", "optuna"),
    *("token", "secrets", "socket", "tempfile", "pickle", "json"),
)
# As the script `dml-dist`, which has its own folder first.
_SCRIPT = "import sys; sys.path.pop(0); from dml_dist.cli import main; main()"
PROGRAMS = {
    "script": [
        sys.executable,
        "-c",
        "import sys; sys.path.pop(0); import dml_dist.cli as c; c.main()",
    ],
    "module": [sys.executable, "-m", "dml_dist"],
}


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with files named like libraries; each leaves a trace when it is imported."""
    for number, name in enumerate(HIDING):
        path = tmp_path / f"{name}.py"
        if number % 2:  # Every other one is a package.
            (tmp_path / name).mkdir()
            path = tmp_path / name / "__init__.py"
        path.write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write('{name} ')\n")
    (tmp_path / "own_code.py").write_text(
        "import torch\n"
        "from tests.custom_examples import Stripes as Base\n"
        "class Stripes(Base):\n    pass\n"
        "def optimizer(groups, **options):\n    return torch.optim.SGD(groups, lr=0.1)\n"
    )
    return tmp_path


def dml_dist(program: str, folder: Path, *arguments: object, python_path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{python_path}", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [*PROGRAMS[program], *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "imported").exists(), (folder / "imported").read_text()
    return done.stdout


@pytest.mark.parametrize("program", ["module", pytest.param("script", marks=pytest.mark.slow)])
def test_data_commands_import_libraries(program: str, hostile: Path) -> None:
    glyphs = ("glyphs", "--classes", 4, "--images-per-class", 4, "--image-size", 16)
    # An empty entry of PYTHONPATH is the current folder.
    python_path = os.pathsep if program == "module" else ""
    dml_dist(
        program, hostile, "data", "import", *glyphs, "--out", "shards", python_path=python_path
    )


@pytest.mark.slow
def test_check_loss_imports_libraries(hostile: Path) -> None:
    assert "ok" in dml_dist("module", hostile, "check-loss", "contrastive")


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_workers_under_ray_import_libraries_and_custom_code(
    program: str, hostile: Path, glyphs: Path
) -> None:
    config = write_config(glyphs, hostile)
    custom = (
        "--set=data.dataset={name: custom, target: 'own_code:Stripes'}",
        "--set=data.path=stripes",
        "--set=optim={name: custom, target: 'own_code:optimizer'}",
        "--set=data.loader_workers=1",
        "--set=evaluation.final=none",
        "--set=validation={name: none}",
        "--set=train.global_batch_size=6",
    )
    output = dml_dist(
        program, hostile, "train", config, "--launcher", "ray", "--workers", 2, *custom
    )
    assert "results:" in output


def test_the_order_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    here = str(tmp_path)
    cases = [
        (["", "/lib"], "", ["/lib", here]),
        ([here, "/lib"], "", ["/lib", here]),
        (["/a", here, "/lib"], f"/a{os.pathsep}", ["/a", "/lib", here]),
        ([here, "/lib"], ".", ["/lib", here]),
        ([here, "/lib"], here, [here, "/lib", here]),  # named in full
        (["/lib"], "", ["/lib"]),  # nothing to move
    ]
    for folders, python_path, expected in cases:
        monkeypatch.setattr(sys, "path", list(folders))
        monkeypatch.setenv("PYTHONPATH", python_path)
        put_current_folder_last()
        assert sys.path in (expected, expected[:-1] if expected[0] == here else expected)
        assert search_path()[-1] == here
    assert os.environ["PYTHONSAFEPATH"] == "1"
