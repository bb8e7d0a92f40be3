"""A whole Slurm on this machine, of the user's own: munged, slurmctld and slurmd in a temporary directory.

It needs the programs (tests/cluster/install.sh) and root, as slurmd does. As a command it stays until Ctrl-C:

    python -m tests.cluster.slurm
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
NODES = 2
CPUS = 8  # of each node, whatever the machine has

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=20
MinJobAge=300
InactiveLimit=0
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
    """Why no Slurm can be started here."""


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """Starts Slurm, and ends it. Gives the environment with which its commands reach it.

    Raises Unavailable where a program is missing, or it does not come up.
    """
    missing = [program for program in PROGRAMS if _which(program) is None]
    if missing:
        raise Unavailable(f"Slurm is not installed ({', '.join(missing)}); run tests/cluster/install.sh")
    if os.getuid() != 0:
        raise Unavailable("slurmd needs root")
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield _start(directory, started)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _start(directory: Path, started: list[subprocess.Popen[bytes]]) -> dict[str, str]:
    host, ports = socket.gethostname().split(".")[0], _free_ports(1 + NODES)
    nodes = [f"node{i}" for i in range(1, NODES + 1)]
    directory.chmod(0o755)
    for name in ("state", *(f"spool.{node}" for node in nodes)):
        (directory / name).mkdir()
    configuration = directory / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=host, ports=ports, directory=directory, cpus=CPUS,
            nodes=f"node[1-{NODES}]", node_ports=f"[{','.join(map(str, ports[1:]))}]",
        )
    )  # fmt: skip
    (directory / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={directory}/cgroup\n")
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(configuration)}

    def launch(name: str, program: str, *arguments: str) -> None:
        with (directory / f"{name}.out").open("wb") as out:
            path = _which(program)
            assert path is not None
            started.append(
                subprocess.Popen([path, *arguments], stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment)
            )

    sockets = [
        f"--{what}={directory}/munge.{what.removesuffix('-file')}" for what in ("pid-file", "log-file", "seed-file")
    ]
    launch(
        "munged",
        "munged",
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={directory}/munge.socket",
        *sockets,
    )
    _wait_for((directory / "munge.socket").exists, "munged", directory, started)
    launch("slurmctld", "slurmctld", "-D", "-f", str(configuration))
    for node in nodes:
        launch(f"slurmd.{node}", "slurmd", "-D", "-N", node, "-f", str(configuration))
    _wait_for(lambda: _idle(environment) == NODES, "the nodes", directory, started)
    return environment


def _idle(environment: dict[str, str]) -> int:
    told = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=environment, capture_output=True, text=True, timeout=30
    )
    return told.stdout.split().count("idle")


def _wait_for(
    condition: Callable[[], bool], what: str, directory: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    end = time.monotonic() + 30
    while not condition():
        if time.monotonic() > end or any(process.poll() is not None for process in started):
            said = [path.read_text(errors="replace")[-1500:] for path in sorted(directory.glob("*.out"))]
            raise Unavailable(f"{what} did not come up: " + " / ".join(said))
        time.sleep(0.1)


def _which(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return sorted(ports)


if __name__ == "__main__":
    with slurm() as environment:
        print(f"export SLURM_CONF={environment['SLURM_CONF']}", file=sys.stderr)
        try:
            while True:
                time.sleep(60)
        except KeyboardInterrupt:
            pass
