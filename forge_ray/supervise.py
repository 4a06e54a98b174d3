"""`--supervise`: runs a `forge` command as a child process and starts it again, without a person, where that can help.

Owns when the command is started again, when that is given up, and how signals reach it. Does not own going on where it
stopped: every command does that from the workspace. Loads neither ray nor torch.

What is started again is told apart by the exit code alone, as any other supervisor of the command would do it: killed
by a signal (out of memory), exit 1 (what Ray's own failures end in), 3 (a store) and 9 (Ray or its nodes were lost).
Everything else would only come again: configuration, data, a training that the guardian stopped, Ctrl-C, success.
Ray's head lost, seen with Ray 2.60: the driver ends itself with exit 1 once the head was away for a minute
(`RAY_gcs_rpc_server_reconnect_timeout_s`); the next drivers end with exit 2 until a head answers.

The child dies with the supervisor (Linux, `PR_SET_PDEATHSIG`), even one that `kill -9` ended: whoever starts the next
supervisor must not find an old driver at work on the same run. Training does not depend on either of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from forge_ray.errors import ConfigError, LostError, StorageError, TrainError
from forge_ray.telemetry import say

_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
_PASSED_ON = {signal.SIGUSR1, signal.SIGUSR2}
_FROM_TERMINAL = 0x80  # SI_KERNEL: the terminal sent it to the whole foreground group, so the child has it already
_PR_SET_PDEATHSIG = 1
_OUTSIDE = (StorageError.exit_code, LostError.exit_code, ConfigError.exit_code)
_DEFECT = 1
# A driver whose head is gone ends soon, so that the next one starts: Ray (2.60) waits a minute for the head to be back.
_CHILD_ENVIRONMENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}


@dataclass(frozen=True)
class Patience:
    """How long a command that keeps ending is started again.

    Attributes:
        first_s: Pause after the first fast end; it doubles with each in a row.
        longest_s: Longest pause.
        lived_s: A child that lived as long as this has got on: the row of fast ends begins anew.
        deaths: Fast ends in a row that count as the command's own fault.
        ends: Fast ends in a row of any kind, a store or Ray that did not answer among them: with the pauses an hour.
    """

    first_s: float = 1.0
    longest_s: float = 60.0
    lived_s: float = 300.0
    deaths: int = 10
    ends: int = 65


def run(command: Sequence[str], patience: Patience | None = None, *, one_result: bool = False) -> int:
    """Runs the command until it ends in a way that another try cannot mend.

    Args:
        command: The whole command line.
        one_result: Hold its stdout back until it has ended for good, so that one try's alone is printed (`--json`).

    Returns:
        The last child's exit code; 128 and the signal's number when a signal ended the supervisor and so the child.

    Raises:
        TrainError: It ended too often in a row.
        ConfigError: Not on Linux.
    """
    if not hasattr(signal, "sigtimedwait"):
        raise ConfigError("--supervise needs Linux", got=sys.platform, do="let launchd or a shell loop start it again")
    patience = patience or Patience()
    row: list[int] = []
    ran = False
    with _signals() as watched:
        while True:
            began_s = time.monotonic()
            with _held_stdout(one_result) as out:
                code, ended_by = _run_once(command, out, watched)
                lived_s = time.monotonic() - began_s
                if ended_by or not _is_mendable(code, ran):
                    _give_out(out)
                    return 128 + ended_by if ended_by and code < 0 else code
            ran = True
            row = [code] if lived_s >= patience.lived_s else [*row, code]
            if sum(each not in _OUTSIDE for each in row) >= patience.deaths or len(row) >= patience.ends:
                raise _give_up(code, len(row))
            pause_s = min(patience.longest_s, patience.first_s * 2 ** (len(row) - 1))
            say(f"supervise: the run {_how(code)} after {lived_s:.0f} s; it starts again in {pause_s:g} s")
            if ended_by := _pause(pause_s, watched):
                return 128 + ended_by


def _is_mendable(code: int, ran: bool) -> bool:
    """Whether another try can help.

    A configuration that an earlier child has run with is right: what is refused later is an address that does not
    answer, because Ray's head is away.
    """
    if code == ConfigError.exit_code:
        return ran
    return code < 0 or code == _DEFECT or code in _OUTSIDE


def _how(code: int) -> str:
    return f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with exit code {code}"


def _give_up(code: int, ends: int) -> TrainError:
    causes = {
        -signal.SIGKILL: "memory is the usual cause: lower pretrain.micro_batch, or give the machine more",
        StorageError.exit_code: "see the store's error above; once it answers, run the same command again",
        **dict.fromkeys(
            (LostError.exit_code, ConfigError.exit_code),
            "see the error above; once the cluster answers (`ray status`), run the same command again",
        ),
    }
    do = causes.get(code, "see the errors above; once their cause is gone, run the same command again")
    return TrainError(
        f"the run ended {ends} times in a row; the last time it {_how(code)}", do=f"{do}; nothing committed is lost"
    )


# ----------------------------------------------------------------------------------------------------------- one child


def _run_once(command: Sequence[str], out: IO[bytes] | None, watched: set[signal.Signals]) -> tuple[int, int]:
    """Runs one child; gives its return code, and the signal that was to end supervisor and child, or 0."""
    ended_by = 0
    environment = {**_CHILD_ENVIRONMENT, **os.environ}
    child = subprocess.Popen(command, stdout=out, env=environment, preexec_fn=_tied_to_this_process(watched))
    while (code := child.poll()) is None:
        found = signal.sigwaitinfo(watched | {signal.SIGCHLD})
        if found.si_signo == signal.SIGCHLD:
            continue
        if found.si_code != _FROM_TERMINAL:
            child.send_signal(found.si_signo)
        if found.si_signo in _ENDING:
            ended_by = found.si_signo
    return code, ended_by


def _tied_to_this_process(watched: set[signal.Signals]) -> Callable[[], None]:
    """What the child does before it becomes the command: it can be signalled, and ends with this process."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(128 + signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched | {signal.SIGCHLD})

    return prepare


@contextlib.contextmanager
def _signals() -> Iterator[set[signal.Signals]]:
    """Holds back the signals that are for the child too, except those that are ignored (`nohup`)."""
    watched = {each for each in _ENDING | _PASSED_ON if signal.getsignal(each) != signal.SIG_IGN}
    # Where SIGCHLD is ignored, the kernel reaps children and their exit codes are lost.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, watched | {signal.SIGCHLD})
    try:
        yield watched
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _pause(pause_s: float, watched: set[signal.Signals]) -> int:
    """Waits; gives the signal that ends the waiting, or 0."""
    deadline_s = time.monotonic() + pause_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        found = signal.sigtimedwait(watched, left_s)
        if found and found.si_signo in _ENDING:
            return found.si_signo
    return 0


@contextlib.contextmanager
def _held_stdout(hold: bool) -> Iterator[IO[bytes] | None]:
    """A file in place of the child's stdout, or none."""
    if not hold:
        yield None
        return
    with tempfile.TemporaryFile() as out:
        yield out


def _give_out(out: IO[bytes] | None) -> None:
    if out:
        out.seek(0)
        sys.stdout.flush()
        with os.fdopen(os.dup(1), "wb") as stdout:
            shutil.copyfileobj(out, stdout)
