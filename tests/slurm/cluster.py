"""A real Slurm cluster on one machine: `python -m tests.slurm.cluster up|down|status|env --dir D`.

Every virtual node has its own host name, network, process and mount namespace, boot id and machine id, so that a
node can crash, be cut off and come back as a real one does; the machine itself is the login node and runs the
controller. Needs Linux and root; on Debian and Ubuntu missing packages are installed. Nothing outside the
directory, the packages, one bridge and the namespaces is touched, and `down` removes all but the packages.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import psutil

from .layout import ClusterError, Place, Shape, configuration, free_number
from .network import call, ip, make_network, remove_network
from .packages import SEARCH, install, obstacle

_MOST_NODES: Final = 200


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file, and remove it afterwards. A lock goes with its process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                current = path.stat().st_ino == os.fstat(lock.fileno()).st_ino
            except FileNotFoundError:
                current = False
            if not current:
                # Whoever held it has removed it; another may hold its successor.
                continue
            try:
                yield
            finally:
                path.unlink()
            return


class Cluster:
    """The cluster in one directory, up or not. Methods that change it wait until the change is seen."""

    def __init__(self, directory: Path) -> None:
        self.directory: Final = directory.absolute()
        self._lock: Final = self.directory.with_name(self.directory.name + ".lock")

    # ---------------------------------------------------------------------------------------- life

    def up(self, shape: Shape | None = None) -> None:
        """Start what is not running. Raises ClusterError; then `down` still removes all of it."""
        if (reason := obstacle(accounting=bool(shape and shape.accounting))) is not None:
            raise ClusterError(reason)
        with exclusive(self._lock):
            place = self._place() if self._described.exists() else self._make(shape or Shape())
            if shape is not None and place.shape != shape:
                raise ClusterError(f"{self.directory} holds a cluster of another shape ({place.shape}); take it down")
            install(accounting=place.shape.accounting)
            self._start_munge()
            if place.shape.netns:
                make_network(place, self.nodes)
            if place.shape.accounting:
                self._start_database(place)
            self.start_controller()
            for node in self.nodes:
                self._start_node(node)
            self.wait(self._all_ready, 60, "the nodes do not become ready")

    def down(self) -> None:
        """End and remove everything, whatever state it is in. Nothing happens if there is nothing."""
        with exclusive(self._lock):
            if self._described.exists():
                place = self._place()
                for node in self.nodes:
                    self._kill_node(node)
                for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
                    self._kill(name)
                if place.shape.netns:
                    remove_network(place, self.nodes)
                else:
                    self._kill_steps()
            shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def exists(self) -> bool:
        """Whether the directory describes a cluster, running or not."""
        return self._described.exists()

    @property
    def shape(self) -> Shape:
        return self._place().shape

    @property
    def nodes(self) -> list[str]:
        """n1, n2, ..."""
        return [f"n{index}" for index in range(1, self.shape.nodes + 1)]

    def env(self) -> dict[str, str]:
        """What a command needs in its environment to talk to this cluster."""
        return {"SLURM_CONF": str(self.directory / "slurm.conf")}

    def running(self) -> dict[str, bool]:
        """Each daemon by name, and whether it runs."""
        names = ["munged", "slurmctld", *self.nodes]
        if self.shape.accounting:
            names += ["mariadbd", "slurmdbd"]
        return {name: self._pid(name) is not None for name in names}

    # ------------------------------------------------------------------------------------- commands

    def run(self, *command: str, timeout: float = 60, check: bool = True, text: str | None = None) -> str:
        """Standard output of a Slurm command on the login node. Raises ClusterError with its words if it fails."""
        done = subprocess.run(
            command,
            env=os.environ | self.env(),
            input=text if text is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode != 0:
            raise ClusterError(f"{' '.join(command)}: status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def wait(self, condition: Callable[[], bool], seconds: float, complaint: str, *, daemon: str = "slurmctld") -> None:
        """Return when `condition` holds. Raises ClusterError with `complaint` and the daemon's last words."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise ClusterError(f"{complaint} (in {seconds:g} s)\n{self._last_words(daemon)}")
            time.sleep(0.05)

    def node_state(self, node: str) -> str:
        """As sinfo prints it: idle, mixed, down*, ..."""
        return self.run("sinfo", "-h", "-N", "-n", node, "-o", "%T").split()[0]

    def node_pids(self, node: str) -> list[int]:
        """Every process of the node, by this machine's own pids; for nodes with namespaces."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self._place().namespace(node)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split() if _state(int(pid)) is not None]

    def reset(self) -> None:
        """Cancel every job, and bring every node and the controller back: what a test leaves to the next one."""
        self.start_controller()
        self.run("scancel", "--state=PENDING", "--user=root", check=False)
        self.run("scancel", "--full", "--user=root", check=False)
        for node in self.nodes:
            if self.shape.netns:
                self.rejoin_node(node, wait=False)
            self._start_node(node)
            if any(word in self.node_state(node) for word in ("down", "drain", "fail")):
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        self.wait(lambda: not self.run("squeue", "-h").strip(), 60, "jobs do not end")
        self.wait(self._all_ready, 60, "the nodes do not become ready")

    # --------------------------------------------------------------------------------------- damage

    def crash_node(self, node: str) -> None:
        """End everything on the node at once, as a power cut does. Slurm finds out by itself (SlurmdTimeout)."""
        self._kill_node(node)

    def start_node(self, node: str) -> None:
        """Boot a crashed node; returns when Slurm can use it."""
        self._start_node(node)
        self.wait(lambda: self._ready(node), 60, f"{node} does not come back")

    def isolate_node(self, node: str) -> None:
        """Pull the node's network plug: it runs on, and sees the shared directories, but nobody can talk to it."""
        ip("-n", self._place().namespace(node), "link", "set", "eth0", "down")

    def rejoin_node(self, node: str, *, wait: bool = True) -> None:
        """Put the plug back. With `wait`, return when Slurm can use the node."""
        ip("-n", self._place().namespace(node), "link", "set", "eth0", "up")
        if wait:
            self.wait(lambda: self._ready(node), 60, f"{node} does not come back")

    def kill_controller(self) -> None:
        """SIGKILL slurmctld."""
        self._kill("slurmctld")

    def start_controller(self) -> None:
        """Start slurmctld if it does not run; returns when it answers."""
        if self._pid("slurmctld") is None:
            self._spawn("slurmctld", [self._program("slurmctld"), "-D", "-f", self.env()["SLURM_CONF"]])
        self.wait(self._answers, 30, "slurmctld does not answer")

    def restart_controller(self) -> None:
        """SIGTERM, so that it saves its state, then start it again."""
        if (pid := self._pid("slurmctld")) is not None:
            os.kill(pid, signal.SIGTERM)
            self.wait(lambda: self._pid("slurmctld") is None, 30, "slurmctld does not end")
        self.start_controller()

    def set_node_state(self, node: str, state: str) -> None:
        """State DOWN requeues what runs there at once; RESUME takes the node back."""
        self.run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")

    # ------------------------------------------------------------------------------------- internal

    @property
    def _described(self) -> Path:
        return self.directory / "cluster.json"

    def _place(self) -> Place:
        described = json.loads(self._described.read_text())
        return Place(number=described["number"], shape=Shape(**described["shape"]))

    def _make(self, shape: Shape) -> Place:
        if not 1 <= shape.nodes <= _MOST_NODES:
            raise ClusterError(f"{shape.nodes} nodes; possible are 1 to {_MOST_NODES}")
        for name in ("bin", "dev", "log", "munge", "nodes", "pids", "spool/ctld"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o755)
        install(accounting=shape.accounting)
        place = Place(number=free_number(self.directory), shape=shape)
        for gpu in range(shape.gpus):
            device = self.directory / "dev" / f"nvidia{gpu}"
            try:
                os.mknod(device, 0o20666, os.makedev(1, 3))
            except PermissionError:
                device.touch()
        (self.directory / "munge" / "key").write_bytes(secrets.token_bytes(128))
        (self.directory / "munge" / "key").chmod(0o600)
        self._link_programs()
        for name, text in configuration(self.directory, place).items():
            path = self.directory / name
            path.write_text(text)
            path.chmod(0o600 if name == "slurmdbd.conf" else 0o644)
        described = {"number": place.number, "shape": asdict(shape)}
        temporary = self._described.with_suffix(".new")
        temporary.write_text(json.dumps(described))
        temporary.rename(self._described)
        return place

    def _link_programs(self) -> None:
        # The emulator package diverts /usr/sbin/slurmd and friends, and the daemons look at their own program name.
        for name in ("slurmctld", "slurmd", "slurmstepd", "slurmdbd"):
            found = shutil.which(f"{name}-wlm", path=SEARCH) or shutil.which(name, path=SEARCH)
            if found is not None:
                (self.directory / "bin" / name).unlink(missing_ok=True)
                (self.directory / "bin" / name).symlink_to(found)

    def _program(self, name: str) -> str:
        own = self.directory / "bin" / name
        return str(own) if own.is_symlink() else str(shutil.which(name, path=SEARCH) or name)

    def _start_munge(self) -> None:
        munge = self.directory / "munge"
        if self._pid("munged") is None:
            for stale in munge.glob("socket*"):
                stale.unlink()
            options = {
                "key-file": "key",
                "socket": "socket",
                "pid-file": "pid",
                "log-file": "log",
                "seed-file": "seed",
            }
            flags = [f"--{option}={munge / value}" for option, value in options.items()]
            self._spawn("munged", [self._program("munged"), "--foreground", "--force", "--num-threads=4", *flags])

        def answers() -> bool:
            command = ["munge", "-n", "-S", str(munge / "socket")]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0

        self.wait(answers, 20, "munged does not answer", daemon="munged")

    def _start_database(self, place: Place) -> None:
        directory = self.directory / "db"
        server = [self._program("mariadbd"), "--no-defaults", "--user=root", f"--datadir={directory}"]
        client = ["mariadb", "--no-defaults", f"--socket={directory}/socket", "-uroot"]
        if not directory.exists():
            call("mariadb-install-db", "--no-defaults", f"--datadir={directory}.new", "--user=root",
                  "--auth-root-authentication-method=normal", "--skip-test-db")  # fmt: skip
            (self.directory / "db.new").rename(directory)
        if self._pid("mariadbd") is None:
            self._spawn("mariadbd", [*server, f"--socket={directory}/socket", f"--pid-file={directory}/pid",
                f"--port={place.port + 4}", "--bind-address=127.0.0.1", "--performance-schema=OFF", "--skip-log-bin",
                "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0",
                "--innodb-lock-wait-timeout=900"])  # fmt: skip
        alive = [*client, "-e", "select 1"]
        self.wait(
            lambda: subprocess.run(alive, capture_output=True, check=False).returncode == 0,
            60,
            "MariaDB does not answer",
        )
        call(*client, "-e", "create database if not exists slurm_acct_db; "
              "create user if not exists slurm@'127.0.0.1' identified by 'slurm'; "
              "grant all on slurm_acct_db.* to slurm@'127.0.0.1'")  # fmt: skip
        if self._pid("slurmdbd") is None:
            self._spawn("slurmdbd", [self._program("slurmdbd"), "-D"])
        ask = ["sacctmgr", "-n", "list", "cluster"]
        environment = os.environ | self.env()
        self.wait(
            lambda: subprocess.run(ask, env=environment, capture_output=True, check=False).returncode == 0,
            60,
            "slurmdbd does not answer",
            daemon="slurmdbd",
        )
        if "proctor" not in self.run("sacctmgr", "-nP", "list", "cluster", "format=cluster").split():
            self._fill_accounts()

    def _fill_accounts(self) -> None:
        for words in (
            "add cluster proctor",
            "add qos small set MaxSubmitJobsPerUser=4",
            "add account research cluster=proctor",
            "add account limited cluster=proctor",
            "add user root account=research adminlevel=Administrator qos=normal,small defaultqos=normal",
            "modify user root set defaultaccount=research",
            "add user root account=limited qos=normal,small defaultqos=normal MaxSubmitJobs=3",
        ):
            self.run("sacctmgr", "-iQ", *words.split())

    def _start_node(self, node: str) -> None:
        if self._pid(node) is not None:
            return
        place = self._place()
        conf = self.env()["SLURM_CONF"]
        slurmd = [self._program("slurmd"), "-D", "-f", conf, "-N", node, "-d", self._program("slurmstepd")]
        (self.directory / "spool" / node).mkdir(exist_ok=True)
        if not place.shape.netns:
            self._spawn(node, slurmd)
            return
        own = self.directory / "nodes" / node
        own.mkdir(exist_ok=True)
        machine = hashlib.sha256(f"{self.directory} {node}".encode()).hexdigest()[:32]
        (own / "machine-id").write_text(machine + "\n")
        (own / "boot_id").write_text(_uuid() + "\n")
        hosts = [f"{place.address(name)} {name}" for name in self.nodes]
        (own / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{place.controller} login", *hosts]) + "\n")
        boxed = ["nsenter", f"--net=/run/netns/{place.namespace(node)}", "unshare", "--uts", "--mount", "--pid",
                 "--fork", "--kill-child", "--mount-proc", "--propagation", "slave",
                 "sh", "-c", _BOOT, "sh", node, str(own), *slurmd]  # fmt: skip
        self._spawn(node, boxed)

    def _kill_node(self, node: str) -> None:
        self._kill(node)
        if self._place().shape.netns:
            deadline = time.monotonic() + 10
            while (pids := self.node_pids(node)) and time.monotonic() < deadline:
                for pid in pids:
                    _send(pid, signal.SIGKILL)
                time.sleep(0.02)
            if pids:
                raise ClusterError(f"{node}: processes {pids} do not end")

    def _kill_steps(self) -> None:
        mark = f"SLURM_CONF={self.env()['SLURM_CONF']}".encode()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if not process.name().startswith("slurmstepd"):
                    continue
                if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                    for member in [*process.children(recursive=True), process]:
                        _send(member.pid, signal.SIGKILL)

    def _answers(self) -> bool:
        return "is UP" in self.run("scontrol", "ping", check=False)

    def _ready(self, node: str) -> bool:
        state = self.node_state(node)
        return not state.endswith("*") and not any(word in state for word in ("down", "unk", "inval", "drain"))

    def _all_ready(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()
        return bool(states) and not any(s.endswith("*") or "unk" in s or "inval" in s or "down" in s for s in states)

    # ---- processes: a pid counts only together with the time at which the process started

    def _spawn(self, name: str, argv: Sequence[str]) -> None:
        log = str(self.directory / "log" / f"{name}.out")
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        # What a job sees of the environment comes from the submission; the daemons get a plain one.
        environment = {"PATH": SEARCH, "LANG": "C.UTF-8", "HOME": "/root"} | self.env()
        pid = os.posix_spawnp(argv[0], list(argv), environment, file_actions=actions, setsid=True)
        started = psutil.Process(pid).create_time()
        (self.directory / "pids" / name).write_text(json.dumps({"pid": pid, "started": started}))

    def _pid(self, name: str) -> int | None:
        try:
            noted = json.loads((self.directory / "pids" / name).read_text())
        except FileNotFoundError:
            return None
        pid = int(noted["pid"])
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        started = _state(pid)
        return pid if started is not None and abs(started - noted["started"]) < 2 else None

    def _kill(self, name: str) -> None:
        if (pid := self._pid(name)) is not None:
            _send(pid, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while self._pid(name) is not None:
                if time.monotonic() > deadline:
                    raise ClusterError(f"{name} (process {pid}) does not end")
                time.sleep(0.01)
        (self.directory / "pids" / name).unlink(missing_ok=True)

    def _last_words(self, name: str) -> str:
        log = self.directory / "log" / f"{name}.out"
        return "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ""


# `wait` comes back when slurmd ends; the node then lives on, as a machine does whose daemon has died.
_BOOT: Final = """
node=$1 own=$2; shift 2
hostname "$node"
mount --bind "$own/hosts" /etc/hosts
[ ! -e /etc/machine-id ] || mount --bind "$own/machine-id" /etc/machine-id
mount --bind "$own/boot_id" /proc/sys/kernel/random/boot_id
"$@" &
while :; do wait; sleep 1; done
"""


def _state(pid: int) -> float | None:
    """When the process started; None if there is none, or only its remains."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _uuid() -> str:
    return Path("/proc/sys/kernel/random/uuid").read_text().strip()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description=__doc__)
    parser.add_argument("action", choices=["up", "down", "status", "env"])
    parser.add_argument("--dir", type=Path, required=True, help="holds all state of the cluster")
    default = Shape()
    parser.add_argument("--nodes", type=int, default=default.nodes)
    parser.add_argument("--gpus", type=int, default=default.gpus, help="fake GPUs of each node")
    parser.add_argument("--cpus", type=int, default=default.cpus)
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB, accounts and QOS")
    parser.add_argument("--netns", action=argparse.BooleanOptionalAction, default=True, help="namespaces for each node")
    chosen = parser.parse_args(argv)
    cluster = Cluster(chosen.dir)
    try:
        if chosen.action == "up":
            shape = replace(default, nodes=chosen.nodes, gpus=chosen.gpus, cpus=chosen.cpus,
                            accounting=chosen.accounting, netns=chosen.netns)  # fmt: skip
            cluster.up(shape)
        elif chosen.action == "down":
            cluster.down()
            return 0
        elif not cluster.exists:
            raise ClusterError(f"there is no cluster in {chosen.dir}; bring one up first")
        if chosen.action == "status":
            for name, running in cluster.running().items():
                print(f"{name:10} {'running' if running else 'not running'}")
            print(cluster.run("sinfo", check=False), end="")
            return 0 if all(cluster.running().values()) else 1
        for name, value in cluster.env().items():
            print(f"export {name}={value}")
    except ClusterError as error:
        print(f"cluster.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
