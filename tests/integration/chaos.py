"""A private Ray cluster of several nodes on this machine, and what may befall it: the death of any process, of a node.

A node is a raylet and all that came from it. Every process of a node carries the node's mark in its environment, so
those that left their parents (a keeper in a session of its own) are found and die with their node too.

Owns starting nodes and ending processes with SIGKILL. Knows nothing of what runs there but the titles of processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "FORGE_CHAOS_NODE"
COMPUTE, KEEPER, AGENT = "compute", "keeper", "agent"
_GONE_S = 10.0


@dataclass(frozen=True)
class Process:
    """A living process of a node. `role` is `compute`, `keeper`, `agent` (a Ray Train worker) or nothing."""

    pid: int
    node: int
    role: str


class Nodes:
    """A Ray cluster: a head, which is node 0, and nodes of one CPU and one `worker` (a resource of this name) each.

    Args:
        folder: Where Ray, seats and temporary files are; a short path, since sockets lie below it.
        environment: That of the nodes.
        python: Runs the nodes and their workers.
        head_cpus: What may run beside the head, as Ray counts CPUs.
    """

    def __init__(
        self, folder: Path, environment: dict[str, str], python: str = sys.executable, head_cpus: int = 0
    ) -> None:
        self._name = secrets.token_hex(4)
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        (folder / "tmp").mkdir()
        # SPT_NOENV: a process that changes its title leaves its environment, and so the mark, as it is.
        self.environment = environment | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(folder),
            "TMPDIR": str(folder / "tmp"),
            "SPT_NOENV": "1",
        }
        self._holder = subprocess.Popen(
            [python, __file__, self._name, str(head_cpus)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "nodes.log").open("ab"),
            text=True,
        )
        self.nodes: list[int] = []
        self.address: str = self._ask("add", 0)
        self.environment |= {"RAY_ADDRESS": self.address}

    def add(self, node: int) -> None:
        """Starts a node and waits until the head knows it."""
        self._ask("add", node)
        self.nodes.append(node)

    def kill(self, node: int) -> None:
        """Ends everything on a node at once, the raylet first, as a power cut does."""
        self.nodes.remove(node)
        deadline_s = time.monotonic() + _GONE_S
        while found := [process for process in self.processes() if process.node == node]:
            for process in found:
                kill(process.pid)
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"processes of node {node} outlive SIGKILL: {found}")
        self._ask("forget", node)

    def processes(self, role: str | None = None) -> list[Process]:
        """What lives on the nodes, by node and process id."""
        return [process for process in _processes(self._name) if role in (None, process.role)]

    def close(self) -> None:
        """Ends all of it."""
        assert self._holder.stdin
        self._holder.stdin.close()
        self._holder.wait()

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, what: str, node: int) -> Any:
        assert self._holder.stdin
        assert self._holder.stdout
        self._holder.stdin.write(json.dumps([what, node]) + "\n")
        self._holder.stdin.flush()
        for line in self._holder.stdout:
            if line.startswith('["answer"'):
                return json.loads(line)[1]
        raise RuntimeError(f"the process that holds the Ray nodes ended with {self._holder.wait()}")


def kill(pid: int) -> None:
    """SIGKILL, to a process that may just be ending by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def short_folder() -> Path:
    """A folder for `Nodes`: below it lie sockets, whose paths may have 107 bytes."""
    return Path(tempfile.mkdtemp(prefix="fc-", dir="/tmp"))


def remove_folder(folder: Path) -> None:
    """Takes away what `short_folder` gave."""
    shutil.rmtree(folder, ignore_errors=True)


def _processes(name: str) -> list[Process]:
    """What lives of the cluster of this name, by node and process id."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                node = _marked(Path(entry.path), name)
                if node is not None:
                    found.append(Process(int(entry.name), node, _role(Path(entry.path))))
    return sorted(found, key=lambda process: (process.node, process.pid))


def _marked(process: Path, name: str) -> int | None:
    """The node of a living process, if it belongs to the cluster of this name."""
    wanted = f"{MARK}={name}/".encode()
    for entry in (process / "environ").read_bytes().split(b"\0"):
        if entry.startswith(wanted):
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            return int(entry[len(wanted) :]) if state not in "ZX" else None
    return None


def _role(process: Path) -> str:
    title = (process / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    short = (process / "comm").read_text().strip()
    for role, words in ((COMPUTE, "forge-compute"), (KEEPER, "forge-seat")):
        if title.startswith(words) or short.startswith(words):
            return role
    return AGENT if title.startswith("ray::") and "TrainWorker" in title else ""


# ---------------------------------------------------------- in a process of its own: it holds the nodes, and reaps them


def main(name: str, head_cpus: int) -> None:
    """Starts and forgets nodes as told, a JSON line each, until nobody tells it any more; then it ends them all.

    So they end with the process that wanted them, however that ends.
    """
    from ray.cluster_utils import Cluster

    cluster, nodes = Cluster(), {}
    for line in sys.stdin:
        what, node = json.loads(line)
        answer = None
        if what == "add":
            os.environ[MARK] = f"{name}/{node}"  # what is started from here on has it
            head = {"num_cpus": head_cpus, "include_dashboard": False}
            options = head if node == 0 else {"num_cpus": 1, "resources": {"worker": 1}}
            nodes[node] = cluster.add_node(**options, object_store_memory=80 << 20)
            answer = cluster.address
        elif what == "forget":
            cluster.remove_node(nodes.pop(node), allow_graceful=False)
        print(json.dumps(["answer", answer]), flush=True)
    while found := _processes(name):
        for process in found:
            kill(process.pid)
    os._exit(0)  # Ray would look for what has just been ended, and wait for it


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
