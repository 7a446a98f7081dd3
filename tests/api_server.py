"""A small HTTP server that answers kubectl like a Kubernetes API server with KubeRay's RayJob.

It keeps RayJobs, refuses what a closed JSON schema refuses, and serves the pods and logs that a
test sets. It knows no `exec`, and no operator acts on the RayJobs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema
import yaml

_RAYJOBS = "/apis/ray.io/v1/namespaces/research/rayjobs"
_PODS = "/api/v1/namespaces/research/pods"


class ApiServer:
    """State of the server: what a test sets, and what kubectl did."""

    def __init__(self, schema: Any) -> None:
        """Keep the schema with which RayJobs are validated."""
        self.validator = jsonschema.Draft202012Validator(schema)
        self.rayjobs: dict[str, dict[str, Any]] = {}
        self.pods: list[dict[str, Any]] = []
        self.logs: dict[str, str] = {}
        self.url = ""

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Any:
        """Return the status and the answer to a request, text or an object."""
        name = path.rpartition("/")[2]
        match method, path:
            case "POST", p if p == _RAYJOBS:
                return self._create(body, dry_run="dryRun" in query)
            case "GET", p if p.startswith(_RAYJOBS + "/"):
                found = self.rayjobs.get(name)
                return (200, found) if found else _failure(404, "NotFound", name)
            case "PATCH", p if p.startswith(_RAYJOBS + "/"):
                self.rayjobs[name]["spec"] |= body["spec"]
                return 200, self.rayjobs[name]
            case "GET", p if p == _PODS:
                labels = dict(
                    each.split("=") for each in query["labelSelector"][0].split(",")
                ).items()
                chosen = [pod for pod in self.pods if labels <= pod["metadata"]["labels"].items()]
                return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": chosen}
            case "GET", p if p.endswith("/log"):
                return 200, self.logs[p.split("/")[-2]]
            case "GET", p if p.startswith(_PODS + "/"):
                return 200, next(pod for pod in self.pods if pod["metadata"]["name"] == name)
            case "GET", p if p in _DISCOVERY:
                return 200, _DISCOVERY[p]
        return _failure(404, "NotFound", path)

    def _create(self, body: Any, *, dry_run: bool) -> Any:
        name = body["metadata"]["name"]
        errors = [error.message for error in self.validator.iter_errors(body)]
        if errors:
            return _failure(400, "BadRequest", f"strict decoding error: {'; '.join(errors)}")
        if name in self.rayjobs:
            return _failure(409, "AlreadyExists", f'rayjobs.ray.io "{name}" already exists')
        if not dry_run:
            self.rayjobs[name] = body
        return 201, body


def _failure(code: int, reason: str, message: str) -> Any:
    return code, {
        **{"kind": "Status", "apiVersion": "v1", "status": "Failure"},
        **{"code": code, "reason": reason, "message": message},
    }


def _resource(name: str, kind: str, verbs: list[str]) -> dict[str, Any]:
    return {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": verbs}


_KIND = {"group": "ray.io", "version": "v1", "kind": "RayJob"}
_VERSION = {"groupVersion": "ray.io/v1", "version": "v1"}
_PARAMETERS = [
    {"name": name, "in": "query", "schema": {"type": "string"}}
    for name in ("dryRun", "fieldValidation")
]
_DISCOVERY: dict[str, Any] = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [{"name": "ray.io", "versions": [_VERSION], "preferredVersion": _VERSION}],
    },
    "/api/v1": {
        "kind": "APIResourceList",
        "groupVersion": "v1",
        "resources": [_resource("pods", "Pod", ["get", "list"])],
    },
    "/apis/ray.io/v1": {
        "kind": "APIResourceList",
        "groupVersion": "ray.io/v1",
        "resources": [_resource("rayjobs", "RayJob", ["create", "get", "patch"])],
    },
    "/openapi/v3": {
        "paths": {"apis/ray.io/v1": {"serverRelativeURL": "/openapi/v3/apis/ray.io/v1"}}
    },
    "/openapi/v3/apis/ray.io/v1": {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.32.0"},
        "paths": {
            "/apis/ray.io/v1/namespaces/{namespace}/rayjobs/{name}": {
                "patch": {
                    "parameters": _PARAMETERS,
                    "x-kubernetes-group-version-kind": _KIND,
                    "responses": {},
                }
            }
        },
        "components": {"schemas": {}},
    },
}


@contextmanager
def serving(schema: Any) -> Iterator[ApiServer]:
    """Serve on a free port of this machine."""
    state = ApiServer(schema)

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = yaml.safe_load(self.rfile.read(length)) if length else None
            parts = urlsplit(self.path)
            code, answer = state.answer(self.command, parts.path, parse_qs(parts.query), body)
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(code)
            kind = "text/plain" if isinstance(answer, str) else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PATCH = _do

        def log_message(self, *args: Any) -> None:
            """Keep the tests' output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
