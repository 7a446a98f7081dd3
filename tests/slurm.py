"""A real SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd.

Files, ports and keys are its own, so that it disturbs no other SLURM. Needs root and the packages
that tests/install_slurm.sh installs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.runs import wait_for

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
KILL_WAIT_SECONDS = 30

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
MinJobAge=3600
JobRequeue=1
KillWait={kill_wait}
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
{nodes}
PartitionName=batch Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 GraceTime=90
PartitionName=urgent Nodes=n1,n2 MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


@contextmanager
def slurm_cluster() -> Iterator[Path]:
    """Start the cluster and give its folder; SLURM_CONF makes SLURM's commands use it.

    Where this is not possible the test is skipped with the reason.
    """
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"a SLURM cluster needs {', '.join(missing)} (run tests/install_slurm.sh)")
    if os.geteuid() != 0:
        pytest.skip("a SLURM cluster of one's own needs root")
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # Paths of sockets must be short.
    daemons: list[subprocess.Popen[bytes]] = []
    before = os.environ.get("SLURM_CONF")
    try:
        _configure(folder)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        _start_all(folder, daemons)
        yield folder
    finally:
        if (folder / "slurm.conf").exists():
            _cancel_all()
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if before is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    for name in ("munge", "state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    folder.chmod(0o755)  # munge refuses a socket in a folder that others cannot search.
    port, port1, port2 = _free_ports(3)
    nodes = [
        f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={own} "
        "CPUs=2 CoresPerSocket=2 RealMemory=4000"
        for name, own in (("n1", port1), ("n2", port2))
    ]
    (folder / "slurm.conf").write_text(
        _CONF.format(
            folder=folder,
            host=socket.gethostname(),
            port=port,
            nodes="\n".join(nodes),
            kill_wait=KILL_WAIT_SECONDS,
        )
    )


def _start_all(folder: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    munge = folder / "munge"
    commands = [
        [
            *("munged", "--foreground", "--force", "--num-threads=1"),
            f"--socket={munge}/socket",
            f"--key-file={munge}/key",
            *(f"--{name}-file={munge}/{name}" for name in ("pid", "log", "seed")),
        ],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    for command in commands:
        with open(folder / f"{command[0]}{len(daemons)}.out", "wb") as output:
            daemons.append(
                subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
        if command[0] == "munged":
            wait_for((munge / "socket").exists, seconds=20, what="munged")

    def is_up() -> bool:
        states = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "batch", "-o", "%T"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.split()
        time.sleep(0.1)
        return states == ["idle", "idle"]

    try:
        wait_for(is_up, seconds=60, what="the cluster")
    except AssertionError as error:
        said = "".join(path.read_text() for path in folder.glob("slurm*.out"))
        raise AssertionError(f"{error}:\n{said}") from None


def _cancel_all() -> None:
    def queue() -> str:
        command = ["squeue", "-h", "-o", "%i"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    if jobs := queue().split():
        subprocess.run(["scancel", "--signal=KILL", "--full", *jobs], check=False)
        subprocess.run(["scancel", *jobs], check=False)
        wait_for(lambda: time.sleep(0.2) or not queue(), seconds=60, what="the end of all jobs")


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
