"""Runs on several nodes: real Ray nodes, each in a network namespace of its own."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dml_dist.data.index import read_index, write_index
from tests.faults.forked import command, forked
from tests.faults.runs import assert_same_end, attempts
from tests.nodes import Nodes, ray_nodes

pytestmark = pytest.mark.timeout(600)
PATIENCE = 300.0


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Nodes]:
    """Two nodes of one CPU each, so that two ranks run on both."""
    with ray_nodes(2) as nodes:
        # A process for each run, which nothing here needs.
        nodes.environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        yield nodes


def ended(
    nodes: Nodes, folder: Path, *arguments: object, workers: int = 2
) -> tuple[int, str, float]:
    """Run a command on the ranks of a cluster; give its exit code, output and seconds."""
    start = time.monotonic()
    ray = ("--launcher", "ray", "--workers", workers, "--set", f"launch.address={nodes.address}")
    with nodes.command(*arguments, *ray, cwd=folder) as driver:
        code = driver.wait(PATIENCE)
    return code, (folder / "output").read_text(), time.monotonic() - start


def test_two_nodes_train_as_one_machine(
    two_nodes: Nodes, config_file: Path, whole_on_two: Path, tmp_path: Path
) -> None:
    code, output, seconds = ended(two_nodes, tmp_path, "train", config_file, "--run-dir", "run")
    assert code == 0, output
    print(f"\ntwo nodes: {seconds:.1f} s")
    assert_same_end(tmp_path / "run", whole_on_two)
    (attempt,) = attempts(tmp_path / "run")
    assert attempt["host"] in [node.name for node in two_nodes.nodes]


@pytest.mark.slow
def test_two_nodes_evaluate_as_one_machine(
    two_nodes: Nodes, whole_on_two: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole_on_two, tmp_path / "run")
    code, output, _ = ended(two_nodes, tmp_path, "evaluate", run)
    assert code == 0, output
    found = json.loads((run / "metrics-test-best.json").read_text())
    assert found["trained"] == json.loads((run / "metrics.json").read_text())["trained"]


@pytest.mark.slow
def test_three_nodes_train_as_one_machine(config_file: Path, tmp_path: Path) -> None:
    with ray_nodes(3) as nodes:
        code, output, seconds = ended(
            nodes, tmp_path, "train", config_file, "--run-dir", "run", workers=3
        )
    assert code == 0, output
    print(f"\nthree nodes: {seconds:.1f} s")
    arguments = ("train", str(config_file), "--run-dir", "whole")
    done = forked(command, *arguments, folder=tmp_path, world_size=3)
    assert not any(done.codes), done.output
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_node_that_does_not_see_the_run_folder(
    two_nodes: Nodes, config_file: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    node = two_nodes.nodes[1]
    arguments = ("train", config_file, "--run-dir", runs / "one")
    with node.mounted(runs):
        code, output, seconds = ended(two_nodes, tmp_path, *arguments)
    print(f"\nrun folder missing on a node: named after {seconds:.1f} s")
    assert code == 2, output
    words = " ".join(output.split())
    assert f"on the node {node.name} ({node.address}): {runs}/one/run.json does not exist" in words
    assert "Traceback" not in output
    assert attempts(runs / "one") == []  # Final, and before the first step.
    code, output, _ = ended(two_nodes, tmp_path, *arguments, "--resume")
    assert code == 0, output
    assert len(attempts(runs / "one")) == 1


@pytest.mark.slow
def test_a_node_without_the_data_or_with_other_data(
    two_nodes: Nodes, config_file: Path, glyphs: Path, tmp_path: Path
) -> None:
    node = two_nodes.nodes[1]
    other = tmp_path / "other"
    other.mkdir()
    for path in glyphs.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    where = f"on the node {node.name} ({node.address}): "
    with node.mounted(glyphs):
        code, output, _ = ended(two_nodes, tmp_path, "train", config_file, "--run-dir", "one")
    assert code == 2, output
    assert f"{where}{glyphs}/index.parquet" in " ".join(output.split())

    index = read_index(other)
    write_index(replace(index, label=index.label[::-1].copy()))
    with node.mounted(glyphs, other):
        code, output, _ = ended(two_nodes, tmp_path, "train", config_file, "--run-dir", "two")
    assert code == 2, output
    # Rank 0 may be on either node.
    assert re.search(
        rf"index.parquet of {glyphs} on the node \S+ \(\S+\) differs", " ".join(output.split())
    )
    assert all(one.address in output for one in two_nodes.nodes)
