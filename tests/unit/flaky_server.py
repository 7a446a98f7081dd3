"""A local web server whose responses fail on demand."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FlakyServer(ThreadingHTTPServer):
    """Serves a folder; `faults` are used up by GET requests of tar files, one each.

    "status": answers 503. "drop": closes the connection after half of the body. "short": announces
    and sends half of the body. "garbage": sends other bytes of the same length. "slow": sends the
    body in pieces with pauses. "silent": sends nothing for longer than anyone waits.
    """

    daemon_threads = True

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.ranges = ranges
        self.faults: list[str] = []
        self.always: str | None = None
        self.gets: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/shards"

    def next_fault(self, name: str) -> str | None:
        with self.lock:
            self.gets[name] += 1
            if not name.endswith(".tar"):
                return None
            return self.faults.pop(0) if self.faults else self.always

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""

    def do_HEAD(self) -> None:
        body = self._body()
        if body is not None:
            self._begin(200, len(body))

    def do_GET(self) -> None:
        body = self._body()
        if body is None:
            return
        fault = self.server.next_fault(self._name())
        if fault == "status":
            self._begin(503, 0)
            return
        if fault == "garbage":
            body = bytes(255 - byte for byte in body)
        status = 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and self.server.ranges:
            status, body = 206, body[int(wanted[1]) : int(wanted[2]) + 1]
        if fault == "short":
            body = body[: len(body) // 2]
        self._begin(status, len(body))
        self._send(body, fault)

    def _send(self, body: bytes, fault: str | None) -> None:
        if fault == "silent":
            time.sleep(3)
            self.close_connection = True
        elif fault == "drop":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "slow":
            for low in range(0, len(body), 4096):
                self.wfile.write(body[low : low + 4096])
                time.sleep(0.01)
        else:
            self.wfile.write(body)

    def _name(self) -> str:
        return Path(self.path.partition("?")[0]).name

    def _body(self) -> bytes | None:
        path = self.server.folder / self._name()
        if path.is_file():
            return path.read_bytes()
        self._begin(404, 0)
        return None

    def _begin(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if status < 300 and self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()


@contextmanager
def flaky_server(folder: Path, *, ranges: bool = True) -> Iterator[FlakyServer]:
    """Serve a folder until the block ends."""
    server = FlakyServer(folder, ranges=ranges)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
