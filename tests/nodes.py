"""Real Ray nodes on this machine, each in a network namespace of its own, as on several machines.

A node has its own address, ports, host name and mounts. Its host name stands for 127.0.0.1 in its
/etc/hosts, as on Debian. All files are shared, unless a node mounts others. Commands run on the
head: Ray connects a command to the head if it sees the head's process, and nodes share processes.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.runs import ENVIRONMENT, wait_for

PORT = 6379
# `ray start` gives up after 30 s, which a busy machine may need.
_TRIES = 4
_numbers = itertools.count()
_SECONDS_TO_START = 150.0


class Node:
    """A machine of a cluster: a network namespace in which `ray start --block` runs."""

    def __init__(self, cluster: Nodes, number: int, cpus: int) -> None:
        """Make the namespace, with one interface that is a port of the bridge."""
        self.number = number
        self.name = f"{cluster.prefix}{number}"
        self.address = f"10.77.0.{11 + number}"
        self.folder = cluster.folder / str(number)
        self._cpus = cpus
        self._head = cluster.address
        self._environment = cluster.environment
        self._process: subprocess.Popen[bytes] | None = None
        self._tries = 0
        self.folder.mkdir()
        _ip("netns", "add", self.name)
        _ip("-n", cluster.switch, "link", "add", f"port{number}", "type", "veth",
            "peer", "name", "eth0", "netns", self.name)  # fmt: skip
        _ip("-n", cluster.switch, "link", "set", f"port{number}", "master", "bridge", "up")
        _ip("-n", self.name, "link", "set", "lo", "up")
        _ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.name, "link", "set", "eth0", "up")
        # Ray finds its own address by a route to the outside.
        _ip("-n", self.name, "route", "add", "default", "dev", "eth0")

    @property
    def pid(self) -> int:
        """Process id of `ray start --block`, to which a cluster manager would send SIGTERM."""
        assert self._process is not None
        return self._process.pid

    @property
    def output(self) -> str:
        """What `ray start` printed."""
        return (self.folder / "output").read_text()

    def start(self) -> None:
        """Start Ray, without waiting for it."""
        self._tries += 1
        hosts = self.folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {self.name}\n")
        options = {
            "num-cpus": self._cpus,
            "object-store-memory": 100 * 2**20,
            "temp-dir": self.folder / "ray",
            "node-ip-address": self.address,
        }
        if self.number == 0:
            options |= {"port": PORT, "include-dashboard": "false"}
        else:
            options["address"] = self._head
        arguments = " ".join(f"--{name}={value}" for name, value in options.items())
        ray = Path(sys.executable).with_name("ray")
        script = (
            f"hostname {self.name} && mount --bind {hosts} /etc/hosts && "
            f"exec {ray} start {'--head' if self.number == 0 else ''} --block {arguments}"
        )
        with open(self.folder / "output", "wb") as output:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", script],
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until the node has joined the cluster; start it again if `ray start` gave up."""
        deadline = time.monotonic() + _SECONDS_TO_START
        while "Ray runtime started" not in self.output:
            assert self._process is not None
            if self._process.poll() is not None:
                assert self._tries < _TRIES, self.output
                self.kill()
                self.start()
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def listens(self) -> bool:
        """Whether the head's server answers, which nodes need to join it."""
        tables = (Path(f"/proc/{self.pid}/net/{name}").read_text() for name in ("tcp", "tcp6"))
        return any(re.search(rf":{PORT:04X} 0+:0000 0A", table) for table in tables)

    @contextmanager
    def mounted(self, path: Path, source: Path | None = None) -> Iterator[None]:
        """On this node alone, another folder in the place of a folder; None is an empty one."""
        what = ("-t", "tmpfs", "none") if source is None else ("--bind", source)
        inside = self.inside(Path("/"))
        subprocess.run([*inside, "mount", *what, path], check=True)
        try:
            yield
        finally:
            subprocess.run([*inside, "umount", "--lazy", path], check=True)

    def kill(self) -> None:
        """End all processes of the node at once, as a power failure does."""
        _kill_processes(self.name)
        if self._process is not None:
            self._process.wait()

    def inside(self, cwd: Path) -> list[str]:
        """Return the words that start a command on this node."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", f"--wd={cwd}"]


class Nodes:
    """A Ray cluster of nodes that are joined by a bridge; node 0 is the head."""

    def __init__(self, folder: Path) -> None:
        """Nothing is made before `open`."""
        self.folder = folder
        self.prefix = f"dml{os.getpid()}-{next(_numbers)}-"
        self.switch = f"{self.prefix}switch"
        self.address = f"10.77.0.11:{PORT}"
        self.nodes: list[Node] = []
        self.environment = ENVIRONMENT | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.urandom(16).hex(),
            "RAY_prestart_worker_first_driver": "0",
        }

    def open(self) -> None:
        """Make the bridge, in a namespace of its own: the machine's own network stays as it is."""
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")

    def add(self, cpus: int = 1) -> Node:
        """Start one more node, without waiting for it."""
        node = Node(self, len(self.nodes), cpus)
        self.nodes.append(node)
        node.start()
        return node

    def command(self, *arguments: object, cwd: Path, name: str = "output") -> subprocess.Popen[str]:
        """Start a `dml-dist` command on the head; its output goes to the file `name` in `cwd`."""
        words = (sys.executable, "-m", "dml_dist", *map(str, arguments))
        with open(cwd / name, "w") as output:
            return subprocess.Popen(
                [*self.nodes[0].inside(cwd), *words],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def close(self) -> None:
        """End all processes and remove all namespaces, with their interfaces."""
        for node in reversed(self.nodes):
            node.kill()
        _delete_namespaces(self.prefix)


@contextmanager
def ray_nodes(number: int, cpus: int = 1) -> Iterator[Nodes]:
    """A cluster of some nodes that have joined it; everything is removed at the end.

    Where this is not permitted the test is skipped with the reason.
    """
    skip_without_namespaces()
    _delete_stale_namespaces()
    folder = Path(tempfile.mkdtemp(prefix="nodes", dir="/tmp"))  # Paths of sockets must be short.
    cluster = Nodes(folder)
    try:
        cluster.open()
        head = cluster.add(cpus)
        wait_for(head.listens, seconds=_SECONDS_TO_START, what="the head's server")
        for _ in range(number - 1):
            cluster.add(cpus)
        for node in cluster.nodes:
            node.wait()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def skip_without_namespaces() -> None:
    """Skip the test where this user may not make network, mount and UTS namespaces."""
    for program in ("ip", "unshare", "nsenter", "mount"):
        if shutil.which(program) is None:
            pytest.skip(f"nodes need the program {program} (packages iproute2, util-linux)")
    name = f"dml{os.getpid()}-test"
    script = (
        f"ip netns add {name} && ip netns exec {name} unshare --uts sh -c 'hostname test && "
        "mount -t tmpfs none /mnt && ip link add one type veth peer name two && "
        "ip link add three type bridge'"
    )
    tried = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    _delete_namespaces(name)
    if tried.returncode:
        pytest.skip(f"namespaces are not permitted here: {tried.stderr.strip()}")


def _delete_stale_namespaces() -> None:
    """End what test processes that were killed have left."""
    for name in _namespaces():
        found = re.match(r"dml(\d+)-", name)
        if found and not Path("/proc", found[1]).exists():
            _delete_namespaces(name)


def _delete_namespaces(prefix: str) -> None:
    for name in _namespaces():
        if name.startswith(prefix):
            _kill_processes(name)
            _ip("netns", "delete", name)


def _kill_processes(namespace: str) -> None:
    def is_empty() -> bool:
        found = _ip("netns", "pids", namespace).split()
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        return not found

    wait_for(is_empty, seconds=30, what=f"the end of the processes in {namespace}")


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line]


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
