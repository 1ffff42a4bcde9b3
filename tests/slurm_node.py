"""A real Slurm cluster of one node in a folder of its own, started by hand, as root or ordinary user.

    python tests/slurm_node.py install         # Debian or Ubuntu, as root; nothing to do where Slurm is there
    python tests/slurm_node.py start /tmp/s1   # prints what a shell needs: export SLURM_CONF=...
    python tests/slurm_node.py stop /tmp/s1

The node has two CPUs and two GPUs, which are devices of other kinds. Partition ``high`` takes them from
partition ``low``, which gives its jobs ten seconds. The folder's name must be short: a socket's path ends at
about 100 letters.
"""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
CONFIG = """
ClusterName=one
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for as long as its old credential could be used: two minutes, if not said otherwise.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
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
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MinJobAge=3600
EnforcePartLimits=ALL
ReturnToService=2
GresTypes=gpu
NodeName={node} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 Gres=gpu:2
PartitionName=low Nodes={node} Default=YES PriorityTier=1 GraceTime=10 DefMemPerCPU=1000
PartitionName=high Nodes={node} PriorityTier=10 PreemptMode=OFF DefMemPerCPU=1000
"""


def missing_programs() -> list[str]:
    """What of Slurm is not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def install() -> None:
    """Installs Slurm with apt-get, which starts nothing by itself in a container.

    Raises:
        SystemExit: One line, where that cannot be done here.
    """
    missing = missing_programs()
    if not missing:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise SystemExit(
            f"Slurm is not installed ({missing[0]} is missing); installing it needs apt-get and root"
        )
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm"]):
        done = subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SystemExit(f"Slurm cannot be installed: apt-get {command[0]}: {reason}")


@dataclass(frozen=True)
class SlurmNode:
    """The cluster below ``folder``."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find it."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def start(self) -> None:
        """Starts munged, slurmctld and slurmd, and waits until the node is idle."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        node, user = node_name(), getpass.getuser()
        settings = {"folder": self.folder, "node": node, "user": user}
        ports = free_ports(2)
        config = CONFIG.format(**settings, controller_port=ports[0], node_port=ports[1])
        (self.folder / "slurm.conf").write_text(config)
        gpus = "".join(f"NodeName={node} Name=gpu File={file}\n" for file in ("/dev/null", "/dev/zero"))
        (self.folder / "gres.conf").write_text(gpus)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        self._run(
            "munged", "--force", *(f"--{name}={self.folder}/munge.{end}" for name, end in files.items())
        )
        self._run("slurmctld", "-c")
        self.start_slurmd()
        deadline = time.monotonic() + 30
        while self.command("sinfo", "--noheader", "--format=%t").split() != ["idle"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the node does not become idle; see {self.folder}/slurmd.log")
            time.sleep(0.2)

    def start_slurmd(self) -> None:
        """Starts the node's own daemon, which brings a failed node back; jobs that wait may start at once."""
        self._run("slurmd")

    def fail(self) -> None:
        """Ends the node's daemon and all that it started on the spot, as a power failure does.

        Slurm is told at once that the node is down; by itself it would wait for ``SlurmdTimeout``.
        """
        pids = list(self._pids("slurmd")) + self._job_pids()
        for pid in pids:
            kill(pid, signal.SIGKILL)
        self.command("scontrol", "update", f"NodeName={node_name()}", "State=DOWN", "Reason=failed")

    def stop(self) -> None:
        """Ends all jobs and daemons of this cluster."""
        self._try("scancel", "--state=PENDING", f"--user={getpass.getuser()}")
        self._try("scancel", f"--user={getpass.getuser()}")
        deadline = time.monotonic() + 15
        while self._try("squeue", "--noheader").strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in ("slurmctld", "slurmd", "munge"):
            for pid in self._pids(daemon):
                end(pid)
        for pid in self._job_pids():
            kill(pid, signal.SIGKILL)

    def command(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        return self._run(*command).stdout

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def _try(self, *command: str) -> str:
        try:
            return self.command(*command)
        except (RuntimeError, subprocess.TimeoutExpired):
            return ""

    def _pids(self, daemon: str) -> Iterator[int]:
        """The daemon's process, if it is still the one that wrote the file."""
        file = self.folder / f"{daemon}.pid"
        if file.exists() and file.read_text().strip().isdigit():
            pid = int(file.read_text())
            if daemon in command_line(pid):
                yield pid

    def _job_pids(self) -> list[int]:
        """The processes of jobs: all that were started with this cluster's config, but for the daemons."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            pid = int(folder.name)
            is_ours = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in environment
            is_of_job = any(entry.startswith(b"SLURM_JOB_ID=") for entry in environment)
            if is_ours and (is_of_job or "slurmstepd" in command_line(pid)) and pid != os.getpid():
                found.append(pid)
        return found


def node_name() -> str:
    """What slurmd takes itself for."""
    return socket.gethostname().split(".")[0]


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on."""
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def command_line(pid: int) -> str:
    """What a process was started as; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def kill(pid: int, number: signal.Signals) -> None:
    """Signals a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def end(pid: int) -> None:
    """Asks a daemon to end, and waits for it."""
    kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while command_line(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    if command_line(pid):
        kill(pid, signal.SIGKILL)


def main(arguments: list[str]) -> None:
    """The command line."""
    match arguments:
        case ["install"]:
            install()
        case ["start", folder]:
            install()
            node = SlurmNode(Path(folder).resolve())
            node.start()
            print(f"export SLURM_CONF={node.environment['SLURM_CONF']}")
        case ["stop", folder]:
            SlurmNode(Path(folder).resolve()).stop()
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
