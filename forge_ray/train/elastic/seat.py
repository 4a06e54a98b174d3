"""A seat: the place of one worker on a node, and the keeper that holds it.

The keeper is a process of its own session that has imported everything and touched no thread pool and no device, so
that it can fork: a compute process that dies is replaced in tens of milliseconds. Ray's agent attaches to it, but may
die, be replaced, and come back: the keeper and its compute process go on meanwhile, as long as they may be orphaned.

Owns the life of the compute process and passing on what it and the coordinator tell each other. Knows nothing of
training, and nothing of Ray.

```
agent (Ray Train's worker) --unix socket-- keeper --TCP, token-- coordinator
                                             |  socketpair
                                        compute process
```
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import itertools
import json
import os
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import IO, Any

import setproctitle

from forge_ray.errors import StorageError
from forge_ray.train.elastic.lines import Lines, Message

SOCKET, LOG, TASK = "socket", "log.txt", "task.json"
AGENT_LOCK, KEEPER_LOCK = "agent.lock", "keeper.lock"
_TICK_S = 0.5
_CONNECT_S = 3.0
_DUMP_S = 10.0
_SHORT_LIFE_S = 2.0
_IDLE_ORPHAN_S = 10.0  # with nothing to go on with there is nothing to wait for
_LONGEST_PAUSE_S = 5.0
_STOP_S = 60.0  # the step under way, and a last checkpoint
_TAIL_BYTES = 4000
_PR_SET_NAME, _PR_SET_PDEATHSIG, _PR_SET_PTRACER = 15, 1, 0x59616D61
_UNANSWERED_MS = 10_000  # a coordinator whose host lost its power does not even say that it is gone


def folder_of_run(run_id: str) -> Path:
    """Where this machine's seats of a run are; only this user may enter.

    Raises:
        StorageError: It cannot be made, or belongs to somebody else.
    """
    # Below it lies a socket, whose path may have 107 bytes.
    parent = Path("/tmp" if len(tempfile.gettempdir()) > 30 and os.access("/tmp", os.W_OK) else tempfile.gettempdir())
    own = parent / f"forge-seats-{os.getuid()}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        if own.stat().st_uid != os.getuid() or own.is_symlink():
            raise PermissionError("it belongs to another user")
        (own / run_id).mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"no room for the run's processes to meet: {error}", got=own, do="remove it, or set TMPDIR"
        ) from None
    return own / run_id


@contextlib.contextmanager
def claim(run_id: str, task: Message) -> Iterator[tuple[Path, bool]]:
    """Takes a seat of this machine for an agent: one whose keeper is at work on this task, or else an empty one.

    Args:
        task: What a keeper is started for; one that was started for another is not taken over.

    Returns:
        The seat's folder, and whether a keeper is at work there.
    """
    folder, empty = folder_of_run(run_id), None
    with contextlib.ExitStack() as stack:
        for number in itertools.count():
            seat = folder / str(number)
            existed = seat.exists()
            seat.mkdir(exist_ok=True)
            lock = stack.enter_context((seat / AGENT_LOCK).open("ab"))
            if _lock(lock):  # no other agent has it
                kept = is_kept(seat)
                if kept and _task_of(seat) == task:
                    if empty:
                        empty[1].close()
                    yield seat, True
                    return
                if kept or empty:  # with another task a keeper ends by itself, when it has been an orphan for too long
                    lock.close()
                else:
                    empty = seat, lock
            if empty and not existed:
                break
        seat = empty[0]
        (seat / TASK).write_text(json.dumps(task))
        yield seat, False


def start_keeper(seat: Path, threads: int) -> None:
    """Starts a keeper that outlives this process. It listens at the seat's socket some seconds later."""
    (seat / SOCKET).unlink(missing_ok=True)  # a keeper that was killed has left it behind
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    # torch's store asks the DNS for the name of whoever connects, and a group waits for that (torch 2.13).
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # Inductor's own processes would be threads of the keeper
    environment["RES_OPTIONS"] = "timeout:1 attempts:1"
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS may add in another order each time
    log = (seat / LOG).open("ab")
    with log:
        subprocess.run(
            [sys.executable, "-m", "forge_ray.train.elastic.seat", str(seat)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
            check=True,
        )


def attach(seat: Path) -> Lines | None:
    """A connection to a seat's keeper; none if nobody listens."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(seat / SOCKET))
    except OSError:
        connection.close()
        return None
    return Lines(connection)


def tail(seat: Path) -> str:
    """The end of a seat's log."""
    with contextlib.suppress(OSError), (seat / LOG).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return log.read().decode(errors="replace")
    return ""


def _lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_kept(seat: Path) -> bool:
    """Whether a keeper lives there, or is about to."""
    with (seat / KEEPER_LOCK).open("ab") as lock:
        return not _lock(lock)


def _task_of(seat: Path) -> Any:
    try:
        return json.loads((seat / TASK).read_text())
    except (OSError, ValueError):
        return None


class Keeper:
    """Holds a seat until its work is done, it is told to stop, or it has been an orphan for too long.

    Args:
        seat: Its folder.
        task: What compute processes are forked for; `orphan_s` and `run_id` are read here.
        lock: Held as long as this process lives.
        compute: Runs in each forked process with its end of a socketpair.
    """

    def __init__(
        self, seat: Path, task: Message, lock: IO[bytes], compute: Callable[[Message, socket.socket], None]
    ) -> None:
        self._seat, self._task, self._lock, self._compute = seat, task, lock, compute
        self._name = f"{socket.gethostname()}/{seat.name}"
        shared = Path("/dev/shm")
        self._memory = (shared if shared.is_dir() else seat) / f"forge-{os.getuid()}-{task['run_id']}-{seat.name}"
        self._agent: Lines | None = None
        self._coordinator: Lines | None = None
        self._where: Message = {}
        self._notice: Message = {}
        self._child: Lines | None = None
        self._pid = self._pidfd = 0
        self._born_s = self._fork_at_s = 0.0
        self._pause_s = 0.0
        self._orphan_since_s = time.monotonic()
        self._stopping_s: float | None = None
        self._over = self._at_work = False
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Serves until it is over."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._seat / SOCKET))
        listener.listen()
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
        while not self._over:
            for key, _ in self._selector.select(_TICK_S):
                key.data()
            self._tick()
        self._kill()
        if self._agent:
            self._agent.send({"kind": "over"})
        for folder in (self._memory, self._seat):
            shutil.rmtree(folder, ignore_errors=True)

    def _tick(self) -> None:
        now_s = time.monotonic()
        if self._stopping_s is not None:
            self._over = not self._pid or now_s - self._stopping_s > _STOP_S
            return
        if not self._pid and self._where and now_s >= self._fork_at_s:
            self._fork()
        if self._agent:
            self._orphan_since_s = now_s
            if self._where and not self._coordinator:
                self._connect()
        elif now_s - self._orphan_since_s > min(self._task["orphan_s"], inf if self._at_work else _IDLE_ORPHAN_S):
            print("nobody came for this seat: it ends", flush=True)
            self._stop()

    # ------------------------------------------------------------------------------------------------------- the agent

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        agent = self._agent = Lines(connection)
        self._selector.register(agent, selectors.EVENT_READ, lambda: self._from_agent(agent))

    def _from_agent(self, agent: Lines) -> None:
        messages = agent.receive()
        if messages is None:
            self._drop(agent)
            if agent is self._agent:
                self._agent, self._orphan_since_s = None, time.monotonic()
            return
        for message in messages:
            if message["kind"] == "attach":
                if message["coordinator"] != self._where.get("coordinator"):
                    self._where = message
                    self._hang_up()
                    self._connect()
            elif message["kind"] == "notice":
                self._notice = {**message, "seat": self._name}
                self._tell(self._notice)

    # ------------------------------------------------------------------------------------------------- the coordinator

    def _connect(self) -> None:
        host, _, port = self._where["coordinator"].rpartition(":")
        try:
            connection = socket.create_connection((host, int(port)), timeout=_CONNECT_S)
        except OSError:
            if self._agent:
                self._agent.send({"kind": "unreachable"})
            return
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)
        self._coordinator = Lines(connection)
        self._selector.register(self._coordinator, selectors.EVENT_READ, self._from_coordinator)
        self._tell({"kind": "hello", "token": self._where["token"], "seat": self._name, "pid": self._pid})
        if self._notice:  # the coordinator before may not have heard it
            self._tell(self._notice)
        if self._child:
            self._child.send({"kind": "introduce"})

    def _from_coordinator(self) -> None:
        coordinator = self._coordinator
        messages = coordinator.receive() if coordinator else None
        if messages is None:
            self._hang_up()
            if self._agent:
                self._agent.send({"kind": "unreachable"})
            return
        for message in messages:
            if message["kind"] == "replace":
                stacks = self._stacks()
                self._tell({"kind": "stacks", "pid": self._pid, "stacks": stacks})
                self._kill()
            elif message["kind"] == "stop":
                self._stop()
            elif self._child and message.get("pid", self._pid) == self._pid:
                self._child.send(message)

    def _tell(self, message: Message) -> None:
        if self._coordinator and not self._coordinator.send(message):
            self._hang_up()

    def _hang_up(self) -> None:
        if self._coordinator:
            self._drop(self._coordinator)
            self._coordinator = None

    # -------------------------------------------------------------------------------------------------------- the child

    def _fork(self) -> None:
        mine, theirs = socket.socketpair()
        keeper_pid = os.getpid()
        self._born_s, self._at_work = time.monotonic(), False
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _die_with(keeper_pid)
                name_process(f"forge-compute {self._task['run_id']} {self._name}")
                for key in list(self._selector.get_map().values()):
                    os.close(key.fd)
                mine.close()
                self._lock.close()
                self._compute({**self._task, "seat": self._name, "memory": str(self._memory)}, theirs)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        theirs.close()
        self._pid, self._pidfd = pid, os.pidfd_open(pid)
        self._child = Lines(mine)
        self._selector.register(self._child, selectors.EVENT_READ, self._from_child)
        self._selector.register(self._pidfd, selectors.EVENT_READ, self._reap)

    def _from_child(self) -> None:
        messages = self._child.receive() if self._child else None
        if messages is None:
            if self._child:
                self._drop(self._child)
                self._child = None
            return
        for message in messages:
            self._at_work |= message.get("state") == "in"
            self._tell({**message, "pid": self._pid})

    def _reap(self) -> None:
        # What it said last comes before the news of its end.
        while self._child and select.select([self._child], [], [], 0)[0]:
            self._from_child()
        _, status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._selector.unregister(self._pidfd)
        os.close(self._pidfd)
        if self._child:
            self._drop(self._child)
            self._child = None
        pid, self._pid = self._pid, 0
        why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        # A process that ends in order has said so before.
        self._tell(
            {"kind": "died", "pid": pid, "code": code, "why": why, "tail": "" if code <= 0 else tail(self._seat)}
        )
        if code == 0:
            self._stop()
        lived_s = time.monotonic() - self._born_s
        self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s + 0.1) if lived_s < _SHORT_LIFE_S else 0.0
        self._fork_at_s = time.monotonic() + self._pause_s
        if self._stopping_s is None and not self._pause_s:
            self._fork()

    def _stop(self) -> None:
        if self._stopping_s is None:
            self._stopping_s = time.monotonic()
            if self._child:
                self._child.send({"kind": "stop"})

    def _kill(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)

    def _stacks(self) -> str:
        """Where every thread of the compute process is, without waking it."""
        program = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
        words = [program, "dump", "--nonblocking", "--pid", str(self._pid)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=_DUMP_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"no stacks: {error}"
        return done.stdout or f"no stacks: {done.stderr.strip()}"

    def _drop(self, lines: Lines) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(lines)
        lines.close()


def name_process(name: str) -> None:
    """What `ps` and `top` show of this process: its whole command line, and its first word of 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.split()[0].encode()[:15], 0, 0, 0)
    setproctitle.setproctitle(name)


def _die_with(parent_pid: int) -> None:
    """Ends this process with its parent, also where that is gone already; what the parent starts may look at it."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Where Yama lets parents alone look at a process, py-spy is the keeper's child and not the parent.
    prctl(_PR_SET_PTRACER, ctypes.c_ulong(parent_pid), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def main(seat: Path) -> None:
    """The keeper's process: leaves its parent, imports what compute processes need, and serves."""
    lock = (seat / KEEPER_LOCK).open("ab")  # before the fork: whoever comes once `start_keeper` is back finds it locked
    if not _lock(lock) or os.fork():
        os._exit(0)
    task = json.loads((seat / TASK).read_text())
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN if signal_number == signal.SIGINT else signal.SIG_DFL)
    from forge_ray.train import compute

    compute.preload(task)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise SystemExit(f"a keeper must have one thread to fork safely, it has {threads}")
    name_process(f"forge-seat {task['run_id']} {seat.name}")
    gc.collect()
    gc.freeze()
    Keeper(seat, task, lock, compute.main).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
