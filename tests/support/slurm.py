"""A SLURM of one node in a folder: munged, slurmctld and slurmd of one's own, beside whatever the machine may have."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
SEARCH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
# A job waits for as long as its credential is good before it starts again: five seconds, SLURM's least, not 120.
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=1
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=0
KillWait=10
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 State=UP
"""


class CannotStart(Exception):
    """What is missing, or how far it came."""


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.host = socket.gethostname().partition(".")[0]
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.env |= {"PATH": SEARCH, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        if missing := [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=SEARCH) is None]:
            raise CannotStart(f"slurm-wlm is not installed: no {', '.join(missing)}")
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        values = {"host": self.host, "user": getpass.getuser(), "folder": self.folder, "ports": free_ports(2)}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values))
        munge = ["--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={key}"]
        munge += [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")]
        self.start_daemon("munged", *munge)
        self.wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self.start_daemon("slurmctld", "-D", "-c")
        self.start_daemon("slurmd", "-D", "-c", "-N", self.host)
        self.wait(lambda: self.run("sinfo", "-h", "-o", "%T").strip() == "idle", "slurmctld and slurmd")

    def start_daemon(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as output:
            path = shutil.which(name, path=SEARCH)
            self.daemons.append(
                subprocess.Popen([str(path), *arguments], env=self.env, stdout=output, stderr=subprocess.STDOUT)
            )

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 15
        while not condition():
            if self.daemons[-1].poll() is not None or time.monotonic() > deadline:
                said = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.out"))
                raise CannotStart(f"SLURM cannot be started here: {what} did not come up\n{said}")
            time.sleep(0.1)

    def stop(self) -> None:
        if len(self.daemons) == len(DAEMONS):
            self.run("scancel", f"--user={getpass.getuser()}")
            deadline = time.monotonic() + 15
            while self.run("squeue", "-h").strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()

    def run(self, *command: str) -> str:
        """What a command of SLURM's printed."""
        done = subprocess.run(command, env=self.env, text=True, capture_output=True, timeout=60)
        return done.stdout + done.stderr

    def submit(self, project: Path, *options: str) -> str:
        """The number of the job that the shipped script is now."""
        script = Path(__file__).resolve().parents[2] / "examples/schedulers/slurm.sbatch"
        return self.run("sbatch", "--parsable", f"--chdir={project}", *options, str(script)).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, Restarts, ExitCode ..."""
        words = self.run("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def await_job(self, number: str, seconds: float = 180, **wanted: str) -> dict[str, str]:
        """The job, as soon as it is as it is `wanted`."""
        deadline = time.monotonic() + seconds
        while not wanted.items() <= (job := self.job(number)).items():
            if time.monotonic() > deadline:
                log = Path(job["StdOut"])
                raise AssertionError(f"{job}\n{log.read_text() if log.exists() else ''}")
            time.sleep(0.3)
        return job


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
