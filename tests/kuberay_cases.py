"""Settings and a request for tests of the KubeRay target, and a kubectl that talks to a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dml_dist.jobs.kuberay import KubeRayTargetConfig
from dml_dist.jobs.target import JobRequest

RUN_DIR = Path("/shared/runs/demo")


def settings(**changes: Any) -> KubeRayTargetConfig:
    values = {
        "image": "registry.example.com/dml-dist:0.1.0",
        "ray_version": "2.60.0",
        "namespace": "research",
        "storage": {"name": "claim", "claim": "dml-dist", "mount_path": "/shared"},
        "workers": {"gpus": 2, "cpus": 16, "memory_gib": 64, "shared_memory_gib": 16},
        **changes,
    }
    return KubeRayTargetConfig.model_validate_json(json.dumps(values))


def request(**changes: Any) -> JobRequest:
    values = {
        "id": "demo-1",
        "arguments": ("train", "/shared/configs/demo.yaml", "--run-dir", str(RUN_DIR)),
        "run_dir": RUN_DIR,
        "min_workers": 4,
        "max_workers": 8,
        "cpus_per_rank": 4.0,
        "uses_gpu": True,
        **changes,
    }
    return JobRequest(**values)


# kubectl's verbs that the target uses, over one JSON file: rayjobs by name, pods, logs by pod. A
# status or a log that is a list gives its next item at each call, and its last one for ever.
FAKE = """#!{python} -IS
import json, re, sys, time
from pathlib import Path

here = Path(__file__).parent
arguments = sys.argv[1:]
command = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
options = ("--namespace", "--context")
values = [index + 1 for index, word in enumerate(arguments) if word in options]
words = [
    word
    for index, word in enumerate(arguments)
    if index not in values and not word.startswith("-")
]
state = json.loads((here / "state.json").read_text())
text = sys.stdin.read() if words[0] == "create" else ""
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(arguments) + "\\n")

def save():
    (here / "state.json").write_text(json.dumps(state))

def fail(message):
    print(message, file=sys.stderr)
    sys.exit(1)

def step(value):
    if not isinstance(value, list):
        return value
    return value.pop(0) if len(value) > 1 else value[0]

time.sleep(state.get("hang", 0))
if "error" in state:
    fail(state["error"])
verb = words[0]
if verb == "create":
    name = re.search(r"^  name: (.*)$", text, re.M)[1]
    if name in state["rayjobs"]:
        fail(f'Error from server (AlreadyExists): rayjobs.ray.io "{{name}}" already exists')
    if "--dry-run=server" not in arguments:
        state["rayjobs"][name] = {{}}
        state["manifest"] = text
        save()
    print(f"rayjob.ray.io/{{name}} created")
elif verb == "get" and words[1] == "rayjob":
    name = words[2]
    if name in state["rayjobs"]:
        status = step(state["rayjobs"][name])
        save()
        given = {{"status": status}} if status else {{}}
        print(json.dumps({{"metadata": {{"name": name}}, **given}}))
elif verb == "get" and words[1] == "pods":
    selector = arguments[arguments.index("--selector") + 1].split(",")
    items = [p for p in state["pods"] if all(s in p["metadata"]["labels"] for s in selector)]
    print(json.dumps({{"items": items}}))
elif verb == "logs":
    sys.stdout.write(step(state["logs"][words[1]]))
    save()
elif verb == "patch":
    state["patched"] = json.loads(arguments[arguments.index("--patch") + 1])
    save()
elif verb == "exec":
    state["executed"] = command
    save()
else:
    fail("unknown command " + verb)
"""


class FakeKubectl:
    """A folder for PATH with nothing but a kubectl that reads and writes `state.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = folder / "kubectl"
        script.write_text(FAKE.format(python=sys.executable))
        script.chmod(0o755)
        self.set(rayjobs={}, pods=[], logs={})

    def set(self, **state: Any) -> None:
        old = self.state if (self.folder / "state.json").exists() else {}
        (self.folder / "state.json").write_text(json.dumps({**old, **state}))

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "state.json").read_text())

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pod(name: str, *labels: str, created: str = "2026-11-01T10:00:00Z") -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": list(labels), "creationTimestamp": created},
        "status": {"phase": "Running"},
    }
