"""Ray on a node of a SLURM job: a child of this process, with ports and files of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dml_dist.errors import RunError

# Above the ports of Ray's workers (10002 to 19999), below those that the kernel gives away.
_FIRST_PORT, _NUM_PORTS = 20000, 12000
_PORTS_PER_NODE = 4
# `ray start` gives up after 30 s, which a busy node may need, and its ports may be taken.
_TRIES = 4
_STARTED = "Ray runtime started"
_OBJECT_STORE_BYTES = 256 * 2**20
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_DIE = 5.0
_RAY = (sys.executable, "-m", "ray.scripts.scripts")


class Signals:
    """SLURM's SIGTERM, which is blocked in this process and in all that it starts.

    Attributes:
        received: Whether it has come.
    """

    def __init__(self) -> None:
        """Block it; this must come before the first thread and the first child."""
        self.received = False
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        # `scancel --signal=INT` reaches the command itself. A handler is not inherited.
        signal.signal(signal.SIGINT, lambda *_: None)

    def wait(self, seconds: float) -> bool:
        """Sleep, at most until SIGTERM, and return whether it has come."""
        if self.received:
            time.sleep(seconds)
        else:
            self.received = signal.sigtimedwait({signal.SIGTERM}, seconds) is not None
        return self.received


def free_ports(number: int, seed: int) -> list[int]:
    """Return ports on which nothing listens, the first ones from a place that `seed` decides."""
    found: list[int] = []
    for offset in range(_NUM_PORTS):
        port = _FIRST_PORT + (seed + offset) % _NUM_PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == number:
            return found
    raise RunError(
        f"no {number} free ports between {_FIRST_PORT} and {_FIRST_PORT + _NUM_PORTS} on "
        f"{socket.gethostname()}; end what holds them, or exclude the node (--exclude in `extra`)"
    )


class RayProcess:
    """`ray start --block` on this node.

    Attributes:
        address: HOST:PORT of the head.
    """

    def __init__(self, job: str, node_id: int, gpus: int, head: str | None = None) -> None:
        """Nothing is started yet.

        Args:
            job: Number of the job.
            node_id: Number of this node in the job.
            gpus: Number of this node's GPUs that Ray may use.
            head: Address of the head to join; None makes this node the head.
        """
        self.address = head or ""
        self._is_head = head is None
        self._seed = int(job) * 101 + node_id * _PORTS_PER_NODE
        self._gpus = gpus
        # The paths of sockets in it must be short, so TMPDIR is not used.
        self._folder = Path(f"/tmp/dml-{job}-{node_id}")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, wait: Callable[[float], bool], seconds: float) -> bool:
        """Start Ray and return whether it runs; it does not if it was given up.

        Args:
            wait: Sleeps for some seconds and returns whether to give up.
            seconds: Time limit.

        Raises:
            RunError: If it does not start.
        """
        deadline = time.monotonic() + seconds
        for attempt in range(_TRIES):
            self.end()
            self._launch(self._seed + attempt * _NUM_PORTS // _TRIES)
            while self.lives:
                if _STARTED in self._output():
                    return True
                if wait(_SECONDS_BETWEEN_LOOKS):
                    return False
                if time.monotonic() > deadline:
                    break
            if time.monotonic() > deadline:
                break
        last = "\n".join(self._output().splitlines()[-20:])
        raise RunError(
            f"Ray did not start on {socket.gethostname()} within {seconds:g} s and {_TRIES} tries; "
            "see what it printed, and raise start_seconds of the SLURM target if the node is only "
            f"slow:\n{last}"
        )

    @property
    def lives(self) -> bool:
        """Whether `ray start --block` runs."""
        return self._process is not None and self._process.poll() is None

    def end(self) -> None:
        """Kill Ray on this node, and delete its files.

        Nothing that Ray holds is needed any more, and its processes have SIGTERM blocked.
        """
        if self._process is not None:
            kill_tree(self._process)
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _launch(self, seed: int) -> None:
        import ray  # For the address by which other nodes reach this one.

        ports = free_ports(3, seed)
        host = ray.util.get_node_ip_address()
        options = {
            "num-cpus": os.environ["SLURM_CPUS_PER_TASK"],
            "num-gpus": self._gpus,
            "object-store-memory": _OBJECT_STORE_BYTES,
            "temp-dir": self._folder / "ray",
            "dashboard-agent-listen-port": ports[0],
            "node-ip-address": host,
        }
        if self._is_head:
            self.address = f"{host}:{ports[1]}"
            options |= {
                "port": ports[1],
                "ray-client-server-port": ports[2],
                "include-dashboard": "false",
            }
        else:
            options["address"] = self.address
        words = [*_RAY, "start", "--block", "--disable-usage-stats"]
        words += ["--head"] if self._is_head else []
        try:
            self._folder.mkdir(mode=0o700)
        except FileExistsError:
            raise RunError(
                f"{self._folder} on {socket.gethostname()} belongs to another user; remove it, or "
                "exclude the node (--exclude in `extra` of the SLURM target)"
            ) from None
        with open(self._folder / "output", "wb") as output:
            self._process = subprocess.Popen(
                [*words, *(f"--{name}={value}" for name, value in options.items())],
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _output(self) -> str:
        path = self._folder / "output"
        return path.read_text(errors="replace") if path.exists() else ""


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and all that descends from it, and wait for their end."""
    parents = _parents()
    family = [process.pid]
    for pid in family:  # It grows while it is read.
        family += [child for child, parent in parents.items() if parent == pid]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while set(family) & _parents().keys() and time.monotonic() < deadline:
        time.sleep(0.02)


def _parents() -> dict[int, int]:
    """Return the parent of every process that has not ended."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # It ended meanwhile.
            # PID (NAME) STATE PARENT ..., where the name may hold anything.
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found
