"""A real Slurm cluster on one machine, from Debian's or Ubuntu's packages (3 MB to fetch, 13 MB installed):

    apt-get install --no-install-recommends slurmctld slurmd slurm-client munge

Neither root nor systemd nor cgroups are needed. Each cluster has its own directory, ports and key. All that
runs in it carries the cluster's name in its environment, so nothing else is ever ended. Node names are
resolved by an /etc/hosts of its own, in a mount namespace; a small tmpfs there is the disk that fills up.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.waiting import until

INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "nsenter", "unshare")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where Debian puts daemons, and a user does not look
SMALL_KIB = 64  # of the disk that fills up

CONFIGURATION = """
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/log/slurmctld
MinJobAge=100000
FirstJobId={first_job}
SlurmdLogFile={directory}/log/slurmd.%n
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
KillWait={kill_wait_s}
SlurmdTimeout={slurmd_timeout_s}
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node[1-{num_nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=4{gres} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=0 MaxTime=UNLIMITED State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=UNLIMITED State=UP
"""
# Holds a mount namespace: the hosts file $1 in place, a small tmpfs at $2; then without any right of root's.
HOLD = f"""mount --bind "$1" /etc/hosts && mount -t tmpfs -o size={SMALL_KIB}k tmpfs "$2" &&
    exec setpriv --ambient-caps=-all --inh-caps=-all sleep infinity"""


def missing() -> list[str]:
    """Programs that a cluster needs and this machine lacks, and the leave to have mounts of its own."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    mounts = [*own_mounts(), "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
    if not absent and subprocess.run(mounts, capture_output=True, check=False).returncode:
        absent.append("the leave to make a mount namespace")
    return absent


def own_mounts() -> list[str]:
    """What starts a command in a mount namespace of its own."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    return ["unshare", *user, "--mount"]


class Cluster:
    """As a context: nodes node1, node2, ... that are idle; at its end nothing of it runs.

    gpus: of each node, which nothing opens. kill_wait_s, slurmd_timeout_s: Slurm's KillWait, SlurmdTimeout.
    """

    def __init__(
        self, *, num_nodes: int = 2, gpus: int = 0, kill_wait_s: int = 60, slurmd_timeout_s: int = 10
    ) -> None:
        self.name, self.num_nodes, self.gpus = f"drill{secrets.token_hex(4)}", num_nodes, gpus
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self.small = self.directory / "small"
        self.environment = os.environ | {
            "PATH": PATH,
            "SLURM_CONF": str(self.directory / "slurm.conf"),
            "MUNGE_SOCKET": str(self.directory / "munge.socket"),
        }
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.keeper = self._hold()
        self._configure(kill_wait_s=kill_wait_s, slurmd_timeout_s=slurmd_timeout_s)

    def __enter__(self) -> "Cluster":
        try:
            assert until(self._resolves, timeout_s=10), f"no mount namespace: {self._log('keeper')}"
            self._start("munged", *self._munge())
            assert until(lambda: (self.directory / "munge.socket").exists(), timeout_s=20), self._log(
                "munged"
            )
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for node in self.nodes:
                self.start_node(node)
            assert until(lambda: set(self.states()) == {"idle"}, timeout_s=60), (
                f"{self.states()} {self.logs()}"
            )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None and isinstance(error[1], AssertionError):
            error[1].add_note(f"the cluster's last words:\n{self.logs()}")
        self.close()

    @property
    def nodes(self) -> list[str]:
        return [f"node{i + 1}" for i in range(self.num_nodes)]

    def run(self, *command: str | Path, cwd: Path | None = None, check: bool = True, **more: str) -> str:
        """A command where the nodes' names resolve; more: of its environment. Returns what it printed."""
        done = subprocess.run(
            [*self._inside, *command],
            cwd=cwd,
            env=self.environment | more,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def states(self) -> list[str]:
        """Of the nodes: idle, allocated, down, ..."""
        return self.run(
            "sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False
        ).split()

    def start_node(self, node: str) -> None:
        (self.directory / f"spool.{node}").mkdir(exist_ok=True)
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_slurmd(self, node: str) -> None:
        """It alone; what it has started lives on."""
        os.kill(self._slurmd(node), signal.SIGKILL)

    def kill_node(self, node: str) -> None:
        """As loss of power would: slurmd and all below it at once."""
        ranks = {pid for pid in self.living() if f"SLURMD_NODENAME={node}" in environment_of(pid)}
        steps = {parent for parent in map(parent_of, ranks) if "slurmstepd" in name_of(parent)}
        for pid in [self._slurmd(node), *steps, *ranks]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def living(self) -> list[int]:
        """Process ids of what jobs of this cluster have started and what still runs."""
        name = f"SLURM_CLUSTER_NAME={self.name}"
        return [pid for pid in processes() if name in environment_of(pid) and not is_zombie(pid)]

    def logs(self, *, lines: int = 12) -> str:
        files = [
            self.directory / "log" / name for name in ("slurmctld", *(f"slurmd.{n}" for n in self.nodes))
        ]
        return "\n".join(f"-- {file.name}\n{self._log(file.name, lines=lines)}" for file in files)

    def close(self) -> None:
        for pid in self.living():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in [*reversed(self.daemons), self.keeper]:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in self._of_directory():  # slurmstepd of a job that was under way
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self._of_directory(), timeout_s=10)
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- what it is made of --

    @property
    def _inside(self) -> list[str | Path]:
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", *user, "--mount", f"--wd={os.getcwd()}", "-t", str(self.keeper.pid), "--"]

    def _hold(self) -> subprocess.Popen[bytes]:
        for name in ("log", "state", "small"):
            (self.directory / name).mkdir()
        hosts = self.directory / "hosts"
        hosts.write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {' '.join(self.nodes)}\n")
        command = [*own_mounts(), "bash", "-c", HOLD, "-", str(hosts), str(self.small)]
        with (self.directory / "log" / "keeper").open("w") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _resolves(self) -> bool:
        return "node1" in self.run("getent", "hosts", "node1", check=False)

    def _configure(self, *, kill_wait_s: int, slurmd_timeout_s: int) -> None:
        first, user = (
            free_ports(self.num_nodes + 1),
            subprocess.check_output(["id", "-un"], text=True).strip(),
        )
        text = CONFIGURATION.format(
            name=self.name,
            host=socket.gethostname().partition(".")[0],
            port=first,
            ports=f"{first + 1}-{first + self.num_nodes}",
            user=user,
            directory=self.directory,
            munge=self.environment["MUNGE_SOCKET"],
            num_nodes=self.num_nodes,
            first_job=1 + secrets.randbelow(9000),  # its ranks' port follows from it
            gres=f" Gres=gpu:{self.gpus}" if self.gpus else "",
            kill_wait_s=kill_wait_s,
            slurmd_timeout_s=slurmd_timeout_s,
        )
        (self.directory / "slurm.conf").write_text(text)
        # a "GPU" must be a character device; nothing opens it
        devices = sorted(str(path) for path in Path("/dev").iterdir() if path.is_char_device())[: self.gpus]
        (self.directory / "gres.conf").write_text(f"Name=gpu File={','.join(devices)}\n" if devices else "")
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # not used; v2 asks systemd
        (self.directory / "munge.key").write_bytes(secrets.token_bytes(1024))
        (self.directory / "munge.key").chmod(0o600)
        self.directory.chmod(0o755)

    def _munge(self) -> list[str]:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
        files |= {"log-file": "log/munged", "seed-file": "munge.seed"}
        named = [f"--{option}={self.directory / name}" for option, name in files.items()]
        return ["munged", "--foreground", "--force", "--num-threads=2", *named]

    def _start(self, name: str, *command: str) -> None:
        with (self.directory / "log" / f"{name}.out").open("a") as log:
            self.daemons.append(
                subprocess.Popen(
                    [*self._inside, *command],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _slurmd(self, node: str) -> int:
        return int((self.directory / f"slurmd.{node}.pid").read_text())

    def _of_directory(self) -> list[int]:
        configuration = f"SLURM_CONF={self.directory / 'slurm.conf'}"
        return [pid for pid in processes() if configuration in environment_of(pid) and not is_zombie(pid)]

    def _log(self, name: str, *, lines: int = 12) -> str:
        file = self.directory / "log" / name
        text = file.read_text(errors="replace") if file.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


def processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").glob("[0-9]*"))


def environment_of(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return []


def parent_of(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def name_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


def is_zombie(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def free_ports(num: int) -> int:
    """The first of `num` ports in a row that were free, below those of outgoing connections."""
    while True:
        first = 20_000 + secrets.randbelow(11_000)
        with suppress(OSError):
            for port in range(first, first + num):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
