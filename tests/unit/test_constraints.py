"""The versions that were tried together, tests/constraints-*.txt, are those of pyproject.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _requirements(lines: Iterable[str]) -> Iterator[Requirement]:
    """Requirements of other projects, with those of the extras that are named."""
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                yield from _requirements(PROJECT["optional-dependencies"][extra])
        else:
            yield requirement


def _bounds() -> dict[str, SpecifierSet]:
    """Bounds of everything that dml-dist[dev] names."""
    bounds: dict[str, SpecifierSet] = {}
    for requirement in _requirements([*PROJECT["dependencies"], "dml-dist[dev]"]):
        name = canonicalize_name(requirement.name)
        bounds[name] = bounds.get(name, SpecifierSet()) & requirement.specifier
    return bounds


def _pins(name: str) -> dict[str, Version]:
    """Versions that a file of constraints names."""
    lines = (ROOT / f"tests/constraints-{name}.txt").read_text().splitlines()
    pins: dict[str, Version] = {}
    for line in lines:
        if line and not line.startswith("#"):
            package, _, version = line.partition("==")
            assert package not in pins
            pins[canonicalize_name(package)] = Version(version)
    return pins


@pytest.mark.parametrize("name", ["oldest", "newest"])
def test_constraints_name_every_dependency_within_its_bounds(name: str) -> None:
    pins, bounds = _pins(name), _bounds()
    assert sorted(pins) == sorted(bounds)
    assert not [package for package in pins if pins[package] not in bounds[package]]


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    lower = {
        package: [Version(one.version) for one in bound if one.operator == ">="]
        for package, bound in _bounds().items()
    }
    assert lower == {package: [version] for package, version in _pins("oldest").items()}


def test_the_newest_versions_are_not_below_the_oldest() -> None:
    oldest = _pins("oldest")
    assert all(version >= oldest[package] for package, version in _pins("newest").items())
