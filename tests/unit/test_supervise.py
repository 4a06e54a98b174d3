"""The supervisor of `--supervise`, with real child processes: what is started again, what is not, and how both end."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge_ray import cli

LIMIT_S = 30.0
# Each start takes the next action of the plan and notes its process id; signals that it gets are noted too.
CHILD = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
plan, starts = (folder / "plan").read_text().split(), folder / "starts"
done = len(starts.read_text().split()) if starts.exists() else 0
action, _, value = plan[min(done, len(plan) - 1)].partition(":")
def note(name, text):
    with open(folder / name, "a") as file:
        file.write(f"{text}\\n")
def caught(number, frame):
    note("signals", signal.Signals(number).name)
    if number != signal.SIGUSR1 and (action, number) != ("unwind", signal.SIGINT):
        os._exit(int(value or 130))
if action in ("catch", "unwind"):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, caught)
note("starts", os.getpid())
if action == "print":
    print(value, flush=True)
    sys.exit(3 if value == "wrong" else 0)
if action == "die":
    os.kill(os.getpid(), int(value))
if action == "end":
    sys.exit(int(value))
if action == "read":
    sys.exit(0 if input() == value else 2)
while True:
    time.sleep(60)
"""
SUPERVISOR = """
import json, sys
from forge_ray import supervise
from forge_ray.errors import ForgeError
patience = supervise.Patience(**json.loads(sys.argv[1]))
try:
    sys.exit(supervise.run(sys.argv[3:], patience, one_result=sys.argv[2] == "one"))
except ForgeError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""
QUICK = {"first_s": 0.001, "longest_s": 0.004, "deaths": 5, "ends": 8}


def until(ready: Callable[[], Any]) -> Any:
    """Waits for a condition; the limit only ends a test that has failed."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := ready()):
        assert time.monotonic() < deadline, "timed out"
        threading.Event().wait(0.005)
    return found


class Supervised:
    """A supervisor as a process, over a child that follows a plan."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self.repository = folder, repository
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, plan: str, *, one: bool = False, **options: Any) -> subprocess.Popen[str]:
        """Starts it; `patience` and options of `Popen` may be given."""
        (self.folder / "plan").write_text(plan)
        patience = json.dumps(QUICK | options.pop("patience", {}))
        child = [sys.executable, "-S", "-c", CHILD, str(self.folder)]
        words = [sys.executable, "-c", SUPERVISOR, patience, "one" if one else "each", *child]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONPATH": str(self.repository)}
        # Under nohup the tests themselves ignore SIGHUP, and a process hands that on.
        pipes["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
        self.processes.append(subprocess.Popen(words, env=environment, start_new_session=True, **pipes | options))
        return self.processes[-1]

    def __call__(self, plan: str, **options: Any) -> tuple[int, str, str]:
        """Runs it to its end: exit code, stdout, stderr."""
        told = options.pop("input", None)
        started = self.start(plan, **options)
        out, err = started.communicate(told, timeout=LIMIT_S)
        return started.returncode, out, err

    def noted(self, name: str) -> list[str]:
        """The lines that the children left."""
        path = self.folder / name
        return path.read_text().split() if path.exists() else []

    @property
    def starts(self) -> list[int]:
        """Process ids of the children so far."""
        return [int(pid) for pid in self.noted("starts")]


@pytest.fixture
def supervised(tmp_path: Path, repository: Path) -> Iterator[Supervised]:
    """A supervisor to be started; whatever is left of it and its children is killed."""
    each = Supervised(tmp_path, repository)
    yield each
    for pid in each.starts:
        if psutil.pid_exists(pid) and str(tmp_path) in psutil.Process(pid).cmdline():
            os.kill(pid, signal.SIGKILL)
    for process in each.processes:
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------------------------- again or not


@pytest.mark.parametrize("end", ["die:9", "die:6", "die:11", "die:15", "end:1", "end:3", "end:9"])
def test_what_another_try_can_mend_is_started_again(supervised: Supervised, end: str) -> None:
    code, _, err = supervised(f"{end} {end} end:0")
    assert code == 0, err
    assert len(set(supervised.starts)) == 3
    assert err.count("it starts again in") == 2


@pytest.mark.parametrize("code", [0, 2, 4, 5, 6, 7, 8, 130, 141])
def test_what_would_only_come_again_is_not(supervised: Supervised, code: int) -> None:
    assert supervised(f"end:{code}") == (code, "", "")
    assert len(supervised.starts) == 1


def test_what_the_configuration_says_is_right_once_it_has_run(supervised: Supervised) -> None:
    code, _, err = supervised("die:9 end:2 end:2 end:2 end:2 end:2 end:0")
    assert code == 0, err
    assert len(supervised.starts) == 7


def test_a_training_that_was_stopped_stays_stopped_after_a_restart(supervised: Supervised) -> None:
    assert supervised("die:9 end:6")[0] == 6
    assert len(supervised.starts) == 2


def test_it_gives_up_after_many_ends_in_a_row_and_says_what_to_do(supervised: Supervised) -> None:
    code, _, err = supervised("die:9")
    assert code == 6
    assert len(supervised.starts) == QUICK["deaths"]
    assert "ended 5 times in a row; the last time it was ended by signal 9 (Killed)" in err
    assert "do: memory is the usual cause" in err


def test_a_store_that_is_away_gets_more_time(supervised: Supervised) -> None:
    code, _, err = supervised("end:3")
    assert code == 6
    assert len(supervised.starts) == QUICK["ends"]
    assert "do: see the store's error above" in err


def test_a_death_after_many_failures_of_the_store_is_one_death(supervised: Supervised) -> None:
    code, _, err = supervised("end:3 end:3 end:3 end:3 end:3 die:9 end:0")
    assert code == 0, err


def test_a_child_that_got_on_begins_the_row_anew(supervised: Supervised) -> None:
    code, _, err = supervised("end:1 " * 7 + "end:0", patience={"lived_s": 0.0})
    assert code == 0, err
    assert re.findall(r"again in (\S+) s", err) == ["0.001"] * 7


def test_the_pauses_double_up_to_the_longest(supervised: Supervised) -> None:
    _, _, err = supervised("end:1 end:1 end:1 end:1 end:0")
    assert re.findall(r"again in (\S+) s", err) == ["0.001", "0.002", "0.004", "0.004"]


# ----------------------------------------------------------------------------------------------------------- terminal


def test_stdin_and_stdout_are_the_childs(supervised: Supervised) -> None:
    assert supervised("read:hello", stdin=subprocess.PIPE, input="hello\n")[0] == 0
    assert supervised("end:9 print:hello")[:2] == (0, "hello\n")


def test_one_result_is_printed_and_it_is_the_last(supervised: Supervised) -> None:
    assert supervised("print:wrong print:wrong print:right", one=True)[:2] == (0, "right\n")


def test_a_given_up_run_prints_no_result(supervised: Supervised) -> None:
    assert supervised("print:wrong", one=True)[:2] == (6, "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_reaches_the_child_once_and_both_end(supervised: Supervised, name: str) -> None:
    started = supervised.start("catch:77")
    until(lambda: supervised.starts)
    started.send_signal(getattr(signal, name))
    assert started.wait(LIMIT_S) == 77
    assert supervised.noted("signals") == [name]
    assert len(supervised.starts) == 1


def test_a_child_that_a_forwarded_signal_kills_is_not_started_again(supervised: Supervised) -> None:
    started = supervised.start("wait")
    until(lambda: supervised.starts)
    started.terminate()
    assert started.wait(LIMIT_S) == 128 + signal.SIGTERM
    assert len(supervised.starts) == 1


def test_a_signal_of_the_users_own_is_passed_on_and_ends_nothing(supervised: Supervised) -> None:
    started = supervised.start("catch:77")
    until(lambda: supervised.starts)
    for times in (1, 2):
        started.send_signal(signal.SIGUSR1)
        until(lambda times=times: len(supervised.noted("signals")) == times)
    assert started.poll() is None


def test_ctrl_c_in_the_terminal_reaches_the_child_once_and_both_end_with_130(supervised: Supervised) -> None:
    terminal, other_end = pty.openpty()
    # A session whose terminal this is, as a shell would start it.
    started = supervised.start("unwind:130", stdin=other_end, preexec_fn=lambda: _take_terminal(0))
    os.close(other_end)
    until(lambda: supervised.starts)
    started.send_signal(signal.SIGSTOP)  # or a second SIGINT could melt into the first, still unhandled one
    os.write(terminal, b"\x03")
    until(lambda: supervised.noted("signals"))
    started.send_signal(signal.SIGCONT)
    started.send_signal(signal.SIGUSR1)  # comes after whatever the supervisor makes of Ctrl-C
    until(lambda: "SIGUSR1" in supervised.noted("signals"))
    assert supervised.noted("signals") == ["SIGINT", "SIGUSR1"]
    started.terminate()
    assert started.wait(LIMIT_S) == 130
    os.close(terminal)
    assert len(supervised.starts) == 1


def _take_terminal(fd: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


def test_a_signal_in_a_pause_ends_it(supervised: Supervised) -> None:
    started = supervised.start("end:1", patience={"first_s": 3600.0, "longest_s": 3600.0})
    assert "starts again in 3600 s" in started.stderr.readline()
    started.terminate()
    assert started.wait(LIMIT_S) == 128 + signal.SIGTERM
    assert len(supervised.starts) == 1


def test_nohup_is_respected(supervised: Supervised) -> None:
    started = supervised.start("catch:77", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    until(lambda: supervised.starts)
    started.send_signal(signal.SIGHUP)
    started.send_signal(signal.SIGUSR1)
    until(lambda: supervised.noted("signals"))
    assert supervised.noted("signals") == ["SIGUSR1"]


def test_exit_codes_are_seen_where_sigchld_is_ignored(supervised: Supervised) -> None:
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)}
    assert supervised("end:9 end:5", **ignored)[0] == 5
    assert len(supervised.starts) == 2


# -------------------------------------------------------------------------------------------------------------- kills


def test_a_child_that_is_killed_is_replaced(supervised: Supervised) -> None:
    started = supervised.start("wait wait end:0")
    for times in (1, 2):
        pids = until(lambda times=times: len(supervised.starts) == times and supervised.starts)
        os.kill(pids[-1], signal.SIGKILL)
    assert started.wait(LIMIT_S) == 0
    assert len(set(supervised.starts)) == 3


def test_the_child_ends_with_a_supervisor_that_is_killed(supervised: Supervised) -> None:
    started = supervised.start("catch:77")
    child = psutil.Process(until(lambda: supervised.starts)[0])
    started.kill()
    child.wait(LIMIT_S)
    assert supervised.noted("signals") == ["SIGTERM"]


# ---------------------------------------------------------------------------------------------------------- the switch


def _forge(repository: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forge_ray.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=repository, check=False)


def test_the_switch_runs_the_same_command_without_itself(repository: Path) -> None:
    words = ["jobs/demo.yaml", "--pretrain.steps", "7", "--dry-run", "--json"]
    plain = _forge(repository, "pretrain", *words)
    supervised = _forge(repository, "pretrain", "--supervise", *words)
    assert plain.returncode == supervised.returncode == 0, supervised.stderr
    assert json.loads(supervised.stdout) == json.loads(plain.stdout)


def test_a_wrong_configuration_is_refused_at_once(repository: Path) -> None:
    run = _forge(repository, "pretrain", "no-such.yaml", "--supervise", "--json")
    assert run.returncode == 2
    assert json.loads(run.stdout)["error"] == "ConfigError"
    assert "starts again" not in run.stderr


def test_pretrain_and_run_take_it_and_no_other_verb() -> None:
    takers = {verb for verb in cli.VERBS if "--supervise" in cli.parse([verb, "--supervise", "job.yaml"]).switches}
    assert takers == {"pretrain", "run"}


def test_another_verb_refuses_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ingest", "--supervise"]) == 2
    assert "--supervise" in capsys.readouterr().err


def test_it_is_light(repository: Path) -> None:
    code = "import sys, forge_ray.supervise; print({n.partition('.')[0] for n in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, check=True)
    assert not [name for name in ("ray", "torch", "pydantic", "yaml", "numpy") if f"'{name}'" in run.stdout]
