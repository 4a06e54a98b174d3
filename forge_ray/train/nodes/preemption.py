"""Notices that the cloud is about to take this node away, as its metadata service gives them to the node itself.

Owns asking that service and telling each notice once. Does not own what follows: the agent passes it on, the
coordinator drains the seat. Loads neither ray nor torch, for it runs inside the thin agent.

What is asked, and of whom: only plain HTTP to `169.254.169.254`, the link-local address at which AWS, Google Cloud and
Azure each serve a node its own metadata. It is a number, so no name server hears of it; proxy variables are not read
and redirects not followed. `auto` sends nothing at all unless the machine's firmware says that it is a cloud's: who
runs where the firmware tables cannot be read (gVisor) names the cloud. `off` starts nothing.

Source:
    AWS: "Spot Instance interruption notices" and "Use IMDSv2" (EC2 User Guide): two minutes, best effort.
    Google Cloud: "Create and use Spot VMs" (30 s, best effort), "Query the metadata server for maintenance event
    notices" (60 s, an hour with GPUs).
    Azure: "Scheduled Events for Linux VMs", api-version 2020-07-01: Preempt 30 s (best effort), Reboot 15 minutes.
    Firmware: the strings by which cloud-init's `ds-identify` knows the three.

Limits: AWS's rebalance recommendations are no notices (most of these nodes live on), nor are its scheduled events,
which come days ahead. Only IPv4. Azure's events are not acknowledged: that would let them begin at once, for every
machine that they name and not only for this one.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from forge_ray.errors import ConfigError
from forge_ray.telemetry import say

URL_VARIABLE = "FORGERAY_METADATA_URL"
"""Names a fake metadata service on loopback, for tests. It lacks the `FORGE_` of configuration on purpose."""

_URL = "http://169.254.169.254"
_FIRMWARE = Path("/sys/class/dmi/id")
_POLL_S, _CONNECT_S, _READ_S = 2.0, 1.0, 5.0
_AZURE_FIRST_S = 150.0  # its first answer may take two minutes, which switch the events on
_AHEAD_S = 300.0
_MOST_BYTES = 1 << 16
_FAILURES_SAID = 5
# No answer, no HTTP, or not the document that was expected: a wrong type where a field is looked up raises these.
_UNUSABLE = (
    *(OSError, http.client.HTTPException),
    *(ValueError, LookupError, TypeError, AttributeError, RecursionError),
)


@dataclass(frozen=True)
class Notice:
    """This node is about to be taken away.

    Attributes:
        kind: `aws`, `gcp` or `azure`.
        action: In the cloud's own word, in small letters: `terminate`, `stop`, `hibernate`, `preempt`, `reboot`...
        deadline_s: Wall clock before which it does not happen; none where it has begun, or nobody knows.
        raw: What the metadata service said.
    """

    kind: str
    action: str
    deadline_s: float | None
    raw: str


class Watch:
    """Asks the metadata service every two seconds, on a thread of its own, and tells each notice once.

    A notice is told at most five minutes before its deadline: Azure announces some of them days ahead. If `on_notice`
    raises, the notice counts as not told and comes again with the next poll. Nothing is raised on the thread; a service
    that does not answer is said once.

    Cost: 0.2 to 0.5 ms of CPU for each poll (a fake on loopback, 2026-11-24); 40 us once where nobody is asked.
    """

    def __init__(
        self,
        kind: str,
        on_notice: Callable[[Notice], None],
        *,
        url: str | None = None,
        firmware: Path = _FIRMWARE,
        poll_s: float = _POLL_S,
    ) -> None:
        """Decides whom to ask, and asks nothing yet.

        Args:
            kind: `auto`, `off`, `aws`, `gcp` or `azure`.
            on_notice: Called on the thread.
            url: Another service than the cloud's, on loopback; else the variable `URL_VARIABLE` names one.
            firmware: The folder of the firmware's tables.

        Raises:
            ConfigError: The URL is neither loopback nor the link-local address.
        """
        self.kind = cloud_of(firmware) if kind == "auto" else None if kind == "off" else kind
        service = _Service(url or os.environ.get(URL_VARIABLE) or _URL)
        self._cloud = _CLOUDS[self.kind](service) if self.kind else None
        self._on_notice, self._poll_s = on_notice, poll_s
        self._told: set[str] = set()
        self._said: set[str] = set()
        self._stop = threading.Event()

    def start(self) -> Watch:
        """Begins to ask, if there is anybody to ask."""
        if self._cloud:
            threading.Thread(target=self._run, args=(self._cloud,), name="forge-preemption", daemon=True).start()
        return self

    def close(self) -> None:
        """Nothing is told after this; the thread ends when the answer that it waits for is there."""
        self._stop.set()

    def _run(self, cloud: _Cloud) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                self._tell(cloud.notices())
                failures = 0
            except _UNUSABLE as error:
                failures += 1
                if failures == _FAILURES_SAID:
                    self._say_once(f"the metadata service of {self.kind} gives no usable answer", error)
            self._stop.wait(self._poll_s)

    def _tell(self, notices: Mapping[str, Notice]) -> None:
        for key, notice in notices.items():
            early = notice.deadline_s is not None and notice.deadline_s - time.time() > _AHEAD_S
            if key in self._told or early or self._stop.is_set():
                continue
            try:
                self._on_notice(notice)
            except Exception as error:  # whatever the receiver raises, it has not received
                self._say_once("a notice could not be passed on and is tried again", error)
            else:
                self._told.add(key)

    def _say_once(self, what: str, error: Exception) -> None:
        if what not in self._said:
            self._said.add(what)
            say(f"  preemption: {what} ({error!r:.200})")


def cloud_of(firmware: Path = _FIRMWARE) -> str | None:
    """The cloud that the machine's firmware names; none elsewhere, and where its tables cannot be read."""
    if _read(firmware / "sys_vendor") == "Amazon EC2" or _read(firmware / "bios_version").endswith("amazon"):
        return "aws"
    if _read(firmware / "product_name") == "Google Compute Engine":
        return "gcp"
    # "Microsoft Corporation" alone would be any Hyper-V; this tag is Azure's.
    return "azure" if _read(firmware / "chassis_asset_tag") == "7783-7084-3265-9085-8269-3286-77" else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


# ------------------------------------------------------------------------------------------------------------ service


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    text: str

    def ok(self) -> str:
        """The text of a 200; raises otherwise."""
        if self.status != 200:
            raise ConnectionError(f"HTTP {self.status}")
        return self.text


class _Service:
    """One metadata service: plain HTTP to one address, a connection for each question."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        try:
            address, port = ipaddress.ip_address(parts.hostname or ""), parts.port or 80
        except ValueError:
            address = None
        if parts.scheme != "http" or address is None or not (address.is_loopback or url == _URL):
            raise ConfigError(
                "a metadata service elsewhere is not asked",
                got=f"{URL_VARIABLE}={url}",
                wanted="a fake one such as http://127.0.0.1:8000, or nothing",
                do=f"unset {URL_VARIABLE}",
            )
        self._host, self._port = str(address), port

    def ask(self, method: str, path: str, headers: dict[str, str], read_s: float = _READ_S) -> _Answer:
        """Asks once; raises OSError, HTTPException or ValueError when no answer comes."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_CONNECT_S)
        try:
            connection.connect()
            connection.sock.settimeout(read_s)
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return _Answer(answer.status, answer.headers, answer.read(_MOST_BYTES).decode(errors="replace").strip())
        finally:
            connection.close()


class _Cloud(ABC):
    """What is asked of one cloud's service."""

    def __init__(self, service: _Service) -> None:
        self._service = service

    @abstractmethod
    def notices(self) -> dict[str, Notice]:
        """The notices that stand now, each under a key that stays the same; raises when no answer can be used."""


class _Aws(_Cloud):
    """`spot/instance-action` is missing (404) until it holds `{"action": ..., "time": "2026-11-24T08:22:00Z"}`."""

    _token: str | None = None

    def notices(self) -> dict[str, Notice]:
        if self._token is None:
            self._token = self._new_token()
        headers = {"X-aws-ec2-metadata-token": self._token}
        answer = self._service.ask("GET", "/latest/meta-data/spot/instance-action", headers)
        if answer.status == 404:
            return {}
        if answer.status != 200:  # the token has run out, or never was one: the next poll gets another
            self._token = None
        said = json.loads(answer.ok())
        return {answer.text: Notice("aws", said["action"].lower(), _instant(said.get("time")), answer.text)}

    def _new_token(self) -> str:
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
        token = self._service.ask("PUT", "/latest/api/token", ttl).ok()
        if not (token.isascii() and token.isprintable()):
            raise ValueError("the token is no token")
        return token


class _Gcp(_Cloud):
    """Two keys change their values; neither says when. A live migration takes nothing away, so it is no notice."""

    _KEYS = {
        ("instance/preempted", "TRUE"): ("preempt", 30.0),
        ("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"): ("terminate", 60.0),
    }

    def __init__(self, service: _Service) -> None:
        super().__init__(service)
        self._found: dict[str, Notice] = {}

    def notices(self) -> dict[str, Notice]:
        for (key, taken), (action, notice_s) in self._KEYS.items():
            answer = self._service.ask("GET", f"/computeMetadata/v1/{key}", {"Metadata-Flavor": "Google"})
            if answer.headers.get("Metadata-Flavor") != "Google":
                raise ConnectionError("the answer is not Google's")
            if answer.ok() == taken and action not in self._found:
                self._found[action] = Notice("gcp", action, time.time() + notice_s, f"{key}={answer.text}")
        return self._found


class _Azure(_Cloud):
    """The document names the events of all machines of a set; those of other machines, and short freezes, are left."""

    _ENDS = {"Preempt", "Terminate", "Reboot", "Redeploy"}
    _answered = False

    def notices(self) -> dict[str, Notice]:
        read_s = _READ_S if self._answered else _AZURE_FIRST_S
        events = json.loads(self._ask("/metadata/scheduledevents?api-version=2020-07-01", read_s))["Events"]
        self._answered = True
        ends = [event for event in events if event["EventType"] in self._ENDS]
        if not ends:
            return {}
        own = self._ask("/metadata/instance/compute/name?api-version=2021-02-01&format=text").casefold()
        return {
            event["EventId"]: self._notice(event)
            for event in ends
            if own in [name.casefold() for name in event["Resources"]]
        }

    def _ask(self, path: str, read_s: float = _READ_S) -> str:
        return self._service.ask("GET", path, {"Metadata": "true"}, read_s).ok()

    def _notice(self, event: dict[str, Any]) -> Notice:
        return Notice("azure", event["EventType"].lower(), _instant(event.get("NotBefore")), json.dumps(event))


_CLOUDS: dict[str, type[_Cloud]] = {"aws": _Aws, "gcp": _Gcp, "azure": _Azure}


def _instant(text: object) -> float | None:
    """Seconds of the wall clock, from ISO 8601 (AWS) or an HTTP date (Azure), both in UTC; none from anything else."""
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            found = parse(str(text or ""))
        except (ValueError, TypeError, OverflowError):
            continue
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    return None
