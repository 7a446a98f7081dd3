"""The documentation of the configuration, and loading what the user wrote."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dml_dist.config import shape
from dml_dist.config.custom import load_target
from dml_dist.config.explain import explain
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError

# ---------------------------------------------------------------- explain


def test_a_field() -> None:
    assert explain("optim.lr") == (
        "optim.lr\n"
        "  Learning rate of the backbone, and of every group without one of its own.\n"
        "  requires: a number > 0\n"
        "  default: 0.001"
    )


def test_a_field_that_may_change_when_resumed() -> None:
    assert "may change when a run is resumed" in explain("launch.num_workers")
    assert "may change" not in explain("train.global_batch_size")


def test_a_field_that_must_be_given() -> None:
    assert "default: none, it must be given" in explain("data.path")


def test_a_field_of_some_members_only() -> None:
    text = explain("optim.momentum")
    assert "optim.momentum (with name: sgd)\n" in text
    assert "optim.momentum (with name: rmsprop)\n" in text
    assert "default: 0.9" in text


def test_a_member_by_its_name() -> None:
    text = explain("optim.sgd")
    assert "sgd: Stochastic gradient descent with momentum." in text
    assert "nesterov: true or false; default false" in text
    assert "betas" not in text
    assert "optim.sgd.momentum\n  Momentum.\n" in explain("optim.sgd.momentum")


def test_a_key_that_is_also_the_name_of_a_member() -> None:
    assert "requires: a number > 0 and < 1" in explain("validation.fraction")


def test_a_section_lists_its_fields() -> None:
    text = explain("evaluation")
    assert "How embeddings are computed and ranked." in text
    for key in ("recall_at", "distance", "memory_mb"):
        assert f"\n  {key}: " in text
    assert "The K of Recall@K" in text


def test_a_family_lists_its_members() -> None:
    text = explain("schedule")
    assert "Schedule of the learning rates." in text
    assert "one of these; default constant" in text
    assert "    cosine: Cosine decay of the learning rates" in text
    assert "gamma: [step] a number > 0 and <= 1; default 0.1" in text
    assert "cosine: Cosine decay" in explain("schedule.name")


def test_the_empty_path_lists_the_sections() -> None:
    text = explain("")
    for key in RunConfig.model_fields:
        assert f"\n  {key}: " in text


def test_every_path_of_the_schema_is_explained() -> None:
    for paths in shape.key_paths().values():
        for path in paths:
            assert path in explain(path)
            assert max(map(len, explain(path).splitlines())) <= 100


def test_every_field_and_section_is_documented() -> None:
    def check(section: type, path: str) -> None:
        assert section.__doc__ or section is RunConfig, path
        for key, field in section.model_fields.items():  # type: ignore[attr-defined]
            found = shape.members(field.annotation)
            assert field.description or key == "name" or found, f"{path}.{key}"
            for member in found:
                check(member, f"{path}.{key}")

    check(RunConfig, "")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("lr", "did you mean optim.lr?"),
        ("optim.lrr", "did you mean optim.lr?"),
        ("optim.size", "did you mean data.transform.size?"),
        ("optim.lr.x", "optim.lr is a plain value without fields"),
        ("wombat", "the top level has name, seed, data"),
        ("optim.wombat", "optim has lr, "),
    ],
)
def test_unknown_paths(path: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        explain(path)
    assert expected in str(caught.value)
    assert f"no field or section '{path}'" in str(caught.value)


# ---------------------------------------------------------------- load_target


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current working directory that holds modules of the user's."""
    before = set(sys.modules)
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "__init__.py").write_text("")
    (tmp_path / "my_pkg" / "losses.py").write_text("class TripletLoss:\n    pass\n\nsize = 3\n")
    (tmp_path / "my_pkg" / "broken.py").write_text("\nx = 1 / 0\n")
    (tmp_path / "my_pkg" / "syntax.py").write_text("def f(:\n")
    (tmp_path / "my_pkg" / "needs.py").write_text("import no_such_library\n")
    (tmp_path / "my_pkg" / "leaves.py").write_text("raise SystemExit('no')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "my_pkg":
            del sys.modules[name]


def test_targets_in_the_current_directory(project: Path) -> None:
    assert load_target("my_pkg.losses:size") == 3
    assert load_target("my_pkg.losses:TripletLoss").__name__ == "TripletLoss"
    assert sys.path.count(str(project)) == 1
    assert sys.path[-1] == str(project)


def test_installed_targets() -> None:
    assert load_target("math:pi") == pytest.approx(3.14159, abs=1e-5)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("my_pkg.losses", "must be package.module:name"),
        ("my_pkg.losses:", "must be package.module:name"),
        ("my_pkg..losses:x", "must be package.module:name"),
        ("my pkg:x", "must be package.module:name"),
        ("no_pkg.losses:x", "there is no module no_pkg;"),
        ("my_pkg.lossses:x", "there is no module my_pkg.lossses;"),
        ("my_pkg.losses.deeper:x", "there is no module my_pkg.losses.deeper"),
        ("my_pkg.losses:TripetLoss", "did you mean my_pkg.losses:TripletLoss?"),
        ("my_pkg.losses:wombat", "losses.py) does not define wombat"),
        ("my_pkg.broken:x", "broken.py, line 2: ZeroDivisionError: division by zero"),
        ("my_pkg.syntax:x", "syntax.py, line 1: SyntaxError"),
        ("my_pkg.needs:x", "line 1: ModuleNotFoundError: No module named 'no_such_library'"),
        ("my_pkg.leaves:x", "SystemExit: no"),
    ],
)
def test_targets_that_cannot_be_loaded(project: Path, target: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_target(target)
    assert expected in str(caught.value)
    assert repr(target) in str(caught.value)
