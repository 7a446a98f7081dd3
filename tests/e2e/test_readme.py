"""The README's Python examples, run unchanged, one after another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dml_dist
from tests.e2e.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_python_examples_run(glyphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine").symlink_to(glyphs)
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) >= 3
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)  # noqa: S102 - the README is ours


def test_readme_is_short_and_installs_twice() -> None:
    assert README.count("python3 -m venv .venv") == 2
    assert len(README.splitlines()) <= 280


def test_public_names_are_there() -> None:
    for name in dml_dist.__all__:
        assert callable(getattr(dml_dist, name)), name
    with pytest.raises(AttributeError, match="proxy_nca"):
        _ = dml_dist.proxy_nca
