"""A Slurm of two nodes on the loopback, with daemons, keys and state of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ray_cluster import ROOT, free_ports

NODES = ("127.0.0.2", "127.0.0.3")  # names that resolve without a name server
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
START_SECONDS, POLL_SECONDS = 60.0, 0.2
CONFIGURATION = """
ClusterName=dlora
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
AuthInfo=socket={root}/munge
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdSpoolDir={root}/spool-%n
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MailProg=/bin/true
ReturnToService=2
{nodes}
PartitionName=main Nodes={names} Default=YES State=UP
"""


def programs() -> list[str]:
    """Those of Slurm's that are not installed here."""
    searched = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=searched) is None]


class Slurm:
    """Its daemons run in the foreground, as children of the tests.

    Args:
        root: for all of its files; a short path, as sockets lie in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = os.environ | {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "GLOO_SOCKET_IFNAME": "lo",
            "NPROC_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        control, *ports = free_ports(1 + len(NODES))
        host = socket.gethostname()
        places = [
            f"NodeName={node} NodeAddr={node} NodeHostname={host} Port={port} CPUs=1"
            for node, port in zip(NODES, ports, strict=True)
        ]
        (self.root / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host,
                control=control,
                root=self.root,
                nodes="\n".join(places),
                names=",".join(NODES),
            )
        )
        (self.root / "state").mkdir()
        key = self.root / "key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o400)
        files = [f"--socket={self.root}/munge", f"--key-file={key}"]
        files += [f"--pid-file={self.root}/munged.pid", f"--log-file={self.root}/munged.log"]
        self._daemon("munged", "--foreground", "--force", f"--seed-file={self.root}/seed", *files)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        until = time.monotonic() + START_SECONDS
        while self.ask("sinfo", "--noheader", "--Node", "--format=%T").split() != ["idle"] * 2:
            if time.monotonic() > until or any(d.poll() is not None for d in self._daemons):
                logs = [path.read_text() for path in sorted(self.root.glob("*.log"))]
                raise AssertionError("no Slurm:\n" + "\n".join(logs))
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        for job in self.ask("squeue", "--noheader", "--format=%i").split():
            self.ask("scancel", "--full", "--signal=KILL", job)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def submit(self, log: Path, *words: str) -> str:
        """The number of a job of launchers/slurm.sbatch."""
        command = ["sbatch", "--parsable", f"--output={log}", "launchers/slurm.sbatch", *words]
        made = subprocess.run(
            command, cwd=ROOT, env=self.environment, text=True, capture_output=True, timeout=30
        )
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of it."""
        shown = self.ask("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in shown if "=" in word)

    def ask(self, *command: str) -> str:
        """What one of Slurm's programs prints."""
        return subprocess.run(
            command, env=self.environment, text=True, capture_output=True, timeout=30
        ).stdout

    def _daemon(self, *command: str) -> None:
        log = self.root / f"{command[0]}-{len(self._daemons)}.out.log"
        with log.open("wb") as file:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=file, stderr=file, start_new_session=True
                )
            )


@contextlib.contextmanager
def slurm() -> Iterator[Slurm]:
    """One that is gone with the block."""
    found = Slurm(Path(tempfile.mkdtemp(prefix="slurm-")))
    try:
        found.start()
        yield found
    finally:
        found.stop()
