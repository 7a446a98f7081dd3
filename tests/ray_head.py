"""A stand-in for the dashboard of a Ray head: the HTTP interface of Ray Jobs, without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web


class RayHead:
    """Answers like Ray 2.60, as far as it was seen; tests set what it knows.

    Attributes:
        token: The token that it wants, if any.
        nodes: Resources of the nodes.
        jobs: The jobs by identifier, as it answers them.
        log: The log of every job.
        streams: What each next stream of the log gives before it ends: a number of characters, or
            None for all of them and then silence.
        packages: Uploaded packages by name.
        requests: Method and path of each request.
    """

    def __init__(self) -> None:
        self.token: str | None = "right"
        self.nodes: list[dict[str, float]] = [{"CPU": 4.0}]
        self.jobs: dict[str, dict[str, Any]] = {}
        self.log = ""
        self.streams: list[int | None] = []
        self.packages: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = ""

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._authorized], client_max_size=2**28)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/v0/nodes", self._nodes)
        app.router.add_route("*", "/api/packages/gcs/{name}", self._package)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{id}", self._job)
        app.router.add_post("/api/jobs/{id}/stop", self._stop)
        app.router.add_get("/api/jobs/{id}/logs", self._logs)
        app.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        return app

    @web.middleware
    async def _authorized(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        given = request.headers.get("Authorization")
        if self.token is not None and given is None:
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        if self.token is not None and given != f"Bearer {self.token}":
            return web.Response(status=403, text="Forbidden: Invalid authentication token")
        response: web.StreamResponse = await handler(request)
        return response

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0"})

    async def _nodes(self, request: web.Request) -> web.Response:
        nodes = [{"state": "ALIVE", "resources_total": one} for one in self.nodes]
        nodes.append({"state": "DEAD", "resources_total": {"CPU": 99.0, "GPU": 99.0}})
        return web.json_response({"data": {"result": {"result": nodes}}})

    async def _package(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if request.method == "PUT":
            self.packages[name] = await request.read()
        return web.Response(status=200 if name in self.packages else 404)

    async def _submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.jobs[body["submission_id"]] = {"status": "PENDING", "message": "", "body": body}
        return web.json_response({"submission_id": body["submission_id"]})

    async def _job(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        if id not in self.jobs:
            return web.Response(status=404, text=f"Job {id} does not exist")
        return web.json_response(self.jobs[id])

    async def _stop(self, request: web.Request) -> web.Response:
        return web.json_response({"stopped": True})

    async def _logs(self, request: web.Request) -> web.Response:
        if request.match_info["id"] not in self.jobs:
            return web.Response(status=404)
        return web.json_response({"logs": self.log})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        length = self.streams.pop(0)
        text = self.log if length is None else self.log[:length]
        for start in range(0, len(text), 7):
            await socket.send_str(text[start : start + 7])
        if not self.streams:
            self.jobs[request.match_info["id"]] |= {"status": "SUCCEEDED", "driver_exit_code": 0}
        if length is None:
            await asyncio.sleep(60)
        return socket


@contextmanager
def ray_head() -> Iterator[RayHead]:
    """A stand-in that listens on a free port of this machine."""
    head = RayHead()
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(head.app(), shutdown_timeout=0.1)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    head.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield head
    finally:
        asyncio.run_coroutine_threadsafe(_end(runner), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(runner: web.AppRunner) -> None:
    await runner.cleanup()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
