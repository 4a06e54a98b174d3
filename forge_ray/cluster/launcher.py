"""Clusters up, seen and down, by Ray's own launcher in processes of its own.

Owns what the launcher leaves to its user: refusing an unsafe file, the identity, the environment in which it works with
each provider, a record of which clusters were started from here, and the proof that nothing is left after `down`. Does
not own provisioning: that is `ray up`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forge_ray
from forge_ray.cluster import checks, identity
from forge_ray.cluster.definition import LOCAL, Definition, read
from forge_ray.errors import ConfigError, LostError
from forge_ray.telemetry import say

DASHBOARD_PORT = 8265
_RECORD, _KNOWN_HOSTS = "cluster.json", "known_hosts"
# With its second version `ray up` starts only some workers of `local`, and deletes those of `gcp` (Ray 2.60).
_FIRST_AUTOSCALER = ("local", "gcp")
_CONNECT_S, _TUNNEL_S, _GONE_S = 10, 30.0, 90.0
# Ray by the names of its programs, and workers of ours that train on without it.
_LEFT = "pgrep -x 'raylet|gcs_server' ; pgrep -f '^forge-(seat|compute) '"
_LOOK = 'for name in rsync make python3; do command -v "$name" > /dev/null || echo "$name"; done; true'
_UNREACHED = 255  # of ssh itself
_END = "pkill -9 -f '^forge-(seat|compute) '; . ~/forge-ray/cluster/env.sh; ray stop --force"


@dataclass(frozen=True)
class Known:
    """A cluster that was started from this machine."""

    name: str
    file: Path
    started: str


def up(definition: Definition) -> str:
    """Creates a cluster, or brings one to what its file says.

    Returns:
        The head's address.

    Raises:
        ConfigError: The file is refused (`checks.py`).
        LostError: The launcher did not finish.
    """
    refuse(definition)
    root = _checkout()
    place = identity.make(definition.name)
    if _ray(definition, "up", str(definition.path.resolve()), "--yes", "--no-config-cache", cwd=root):
        raise LostError(
            "the cluster did not come up",
            got=f"ray up {definition.path}, above",
            do=f"mend what it says and run the same command again, or `{_command('down', definition)}`",
        )
    record = {"file": str(definition.path.resolve()), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    identity.put(place / _RECORD, json.dumps(record).encode())
    return head_address(definition)


def down(definition: Definition) -> list[str]:
    """Ends a cluster, and looks whether anything of it is left.

    Returns:
        Addresses of machines that are gone, or without anything of ours.

    Raises:
        LostError: Something is left, or it cannot be seen whether.
    """
    code = _ray(definition, "down", str(definition.path.resolve()), "--yes", cwd=_checkout())
    ended = _end_local(definition) if definition.kind == LOCAL else _gone_from_cloud(definition)
    if code:
        raise LostError(
            "the launcher did not take the cluster down to its end",
            got=f"ray down {definition.path}, above; seen without anything of it: {', '.join(ended) or 'none'}",
            do="run the same command again",
        )
    for name in (_RECORD, _KNOWN_HOSTS):
        (identity.folder(definition.name) / name).unlink(missing_ok=True)
    return ended


def status(definition: Definition) -> str:
    """What Ray says of a running cluster.

    Raises:
        LostError: The head does not answer.
    """
    done = ssh(definition, head_address(definition), ". ~/forge-ray/cluster/env.sh && ray status")
    if done.returncode:
        raise LostError(
            "the cluster's head does not answer",
            got=f"{definition.name}: {done.stderr.strip()[-500:]}",
            do=f"if it is down, `{_command('up', definition)}` brings it back, and runs go on from their workspace",
        )
    return done.stdout


def refuse(definition: Definition) -> None:
    """Ends here where a file is wrong or unsafe.

    Raises:
        ConfigError: With all that is to be mended.
    """
    bad = [each for each in checks.findings(definition) if each.refused]
    if bad:
        raise ConfigError(
            f"{definition.path} is refused",
            got="".join(f"\n    {each.where}: {each.what}" for each in bad),
            do=f"{bad[0].do}; `{_command('plan', definition)}` tells it of each",
        )


def known() -> list[Known]:
    """The clusters that were started from here and not taken down."""
    found = []
    for path in sorted(Path(identity.HOME).expanduser().glob(f"*/{_RECORD}")):
        record = json.loads(path.read_text())
        found.append(Known(path.parent.name, Path(record["file"]), record["started"]))
    return found


def find(named: str) -> Definition:
    """A cluster by its file, or by the name under which it was started from here.

    Raises:
        ConfigError: There is no such file and no such cluster.
    """
    if named.endswith((".yaml", ".yml")):
        return read(named)
    clusters = {each.name: each for each in known()}
    if named not in clusters:
        raise ConfigError(
            "no such cluster is known here",
            got=named,
            wanted=", ".join(clusters) or "the file of a cluster, such as cluster/onprem.yaml",
            do="`forge cluster up FILE` starts one",
        )
    return read(clusters[named].file)


def head_address(definition: Definition) -> str:
    """Where the head answers SSH.

    Raises:
        LostError: There is none.
    """
    if definition.kind == LOCAL:
        return str(definition.provider["head_ip"])
    done = subprocess.run(
        [_ray_program(), "get-head-ip", str(definition.path.resolve())],
        env=_environment(definition),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not done.stdout.strip():
        raise LostError(
            "the cluster has no head",
            got=f"{definition.name}: {done.stderr.strip()[-300:]}",
            do=f"start it: {_command('up', definition)}",
        )
    return done.stdout.strip().splitlines()[-1]


def ssh(definition: Definition, host: str, command: str, limit_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Runs a command on a node; 255 where it cannot be reached."""
    words = [*_ssh_words(definition, host), f"bash -c {shlex.quote(command)}"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, _UNREACHED, "", f"no answer in {limit_s:.0f} s")


@contextmanager
def tunnel(definition: Definition) -> Iterator[str]:
    """The dashboard's URL on this machine's loopback, through SSH, for as long as the block lasts.

    Raises:
        LostError: The head cannot be reached.
    """
    port, host = _free_port(), head_address(definition)
    forward = ("-N", "-o", "ExitOnForwardFailure=yes", "-L", f"127.0.0.1:{port}:127.0.0.1:{DASHBOARD_PORT}")
    process = subprocess.Popen(
        _ssh_words(definition, host, forward), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline_s = time.monotonic() + _TUNNEL_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline_s:
                process.kill()
                raise LostError(
                    "the cluster's head cannot be reached by SSH",
                    got=f"{host}: {process.communicate()[1].strip()[-300:]}",
                    do=f"see that `{shlex.join(_ssh_words(definition, host))}` works",
                )
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _ssh_words(definition: Definition, host: str, options: Sequence[str] = ()) -> list[str]:
    auth = definition.config["auth"]
    hosts = identity.folder(definition.name) / _KNOWN_HOSTS  # of its own: clouds give the same address to others later
    words = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}", "-o", "ServerAliveInterval=5"]
    words += ["-o", "StrictHostKeyChecking=accept-new", "-o", f"UserKnownHostsFile={hosts}"]
    if key := auth.get("ssh_private_key"):
        words += ["-o", "IdentitiesOnly=yes", "-i", str(Path(key).expanduser())]
    if proxy := auth.get("ssh_proxy_command"):
        words += ["-o", f"ProxyCommand={proxy}"]
    return [*words, *options, f"{auth['ssh_user']}@{host}"]


def hosts(definition: Definition) -> list[str]:
    """Machines of your own that it names, the head first; none in a cloud."""
    if definition.kind != LOCAL:
        return []
    return [str(definition.provider["head_ip"]), *map(str, definition.provider.get("worker_ips") or ())]


def lacks(definition: Definition, host: str) -> str:
    """Why a machine of your own could not be a node; nothing if it could."""
    done = ssh(definition, host, _LOOK)
    if done.returncode == _UNREACHED:
        return f"cannot be reached: {(done.stderr.strip().splitlines() or ['no answer'])[-1][:200]}"
    return ", ".join(f"no {name}" for name in done.stdout.split())


def _end_local(definition: Definition) -> list[str]:
    """Ray's launcher stops the head alone (2.60): the others are told here, and asked what is left."""
    ended, left = [], []
    for host in hosts(definition):
        ssh(definition, host, _END)
        found = ssh(definition, host, _LEFT)
        if found.returncode == _UNREACHED:
            left.append(f"{host}: cannot be seen, {found.stderr.strip()[-200:]}")
        elif found.stdout.split():
            left.append(f"{host}: processes {' '.join(found.stdout.split())}")
        else:
            ended.append(host)
    _raise_if_left(definition, left)
    return ended


def _gone_from_cloud(definition: Definition) -> list[str]:
    """Waits until the provider knows no machine of the cluster any more."""
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    config = _bootstrap_config(json.loads(json.dumps(definition.config)))
    provider: Any = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    deadline_s = time.monotonic() + _GONE_S
    while (left := provider.non_terminated_nodes({})) and time.monotonic() < deadline_s:
        time.sleep(3.0)
    _raise_if_left(definition, [str(each) for each in left])
    return ["all machines"]


def _raise_if_left(definition: Definition, left: list[str]) -> None:
    if left:
        raise LostError(
            "something of the cluster is left",
            got="; ".join(left),
            do=f"run `{_command('down', definition)}` again, or look there by hand: it may cost money",
        )


def _ray(definition: Definition, verb: str, *words: str, cwd: Path) -> int:
    """Runs the launcher, which speaks for itself."""
    say(f"ray {verb} {definition.path}")
    command = [_ray_program(), verb, *words]
    return subprocess.run(command, env=_environment(definition), cwd=cwd, stdout=sys.stderr, check=False).returncode


def _environment(definition: Definition) -> dict[str, str]:
    from forge_ray.runtime import QUIET_ENVIRONMENT

    first = {"RAY_UP_enable_autoscaler_v2": "0"} if definition.kind in _FIRST_AUTOSCALER else {}
    return {**QUIET_ENVIRONMENT, **first, **os.environ}


def _ray_program() -> str:
    beside = Path(sys.executable).with_name("ray")
    return str(beside) if beside.exists() else shutil.which("ray") or "ray"


def _checkout() -> Path:
    """Where this program lies, with what nodes get of it."""
    root = Path(forge_ray.__file__).resolve().parents[1]
    if not (root / checks.ENTRY).is_file():
        raise ConfigError(
            "a cluster is started from a checkout of forge-ray, which its nodes get",
            got=f"{root} without {checks.ENTRY}",
            do="clone the repository, `make venv` there, and use its .venv/bin/forge",
        )
    return root


def _command(verb: str, definition: Definition) -> str:
    return f"forge cluster {verb} {definition.path}"
