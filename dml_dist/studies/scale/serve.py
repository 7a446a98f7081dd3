"""A web server of this machine for a folder of tar shards, whose answers are late by a fixed time.

A process of its own (`python -m dml_dist.studies.scale.serve FOLDER MILLISECONDS`), which prints
its port: a thread would take turns with the measured rank. It ends with the process that began it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dml_dist.errors import RunError


@contextmanager
def served(folder: Path, latency_ms: float) -> Iterator[str]:
    """Serve a folder at the URL that is given, until the block ends.

    Raises:
        RunError: If the server does not start.
    """
    command = [sys.executable, "-m", __name__, str(folder), str(latency_ms)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = process.stdout.readline().strip()
            if not port.isdecimal():
                raise RunError(
                    f"the web server of {folder} did not start; its output is above. Check that "
                    "127.0.0.1 has free ports"
                )
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stdin.close()
            process.terminate()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, latency_ms: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder.resolve()
        self.seconds = latency_ms / 1000

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        """Answer with the length of a file."""
        self._answer(with_body=False)

    def do_GET(self) -> None:
        """Answer with a file, or with the range of it that was asked for."""
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        time.sleep(self.server.seconds)
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file() or self.server.folder not in path.resolve().parents:
            self.send_error(404)
            return
        size = path.stat().st_size
        low, high, status = 0, size - 1, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            low, status = int(wanted[1]), 206
            high = min(int(wanted[2] or high), high)
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(high - low + 1))
        if status == 206:
            self.send_header("Content-Range", f"bytes {low}-{high}/{size}")
        self.end_headers()
        if with_body:
            with path.open("rb") as file:
                file.seek(low)
                self.wfile.write(file.read(high - low + 1))


def main() -> None:
    """Serve until the standard input ends, as it does when the parent is gone."""
    server = _Server(Path(sys.argv[1]), float(sys.argv[2]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
