"""Preemption notices: what each cloud's metadata service answers, what is told of it, and who is asked at all."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from forge_ray.errors import ConfigError
from forge_ray.train.nodes.preemption import URL_VARIABLE, Notice, Watch, cloud_of

LIMIT_S = 30.0
AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"


def until(ready: Callable[[], Any]) -> None:
    """Waits for a condition; the limit only ends a test that has failed."""
    deadline = time.monotonic() + LIMIT_S
    while not ready():
        assert time.monotonic() < deadline, "timed out"
        threading.Event().wait(0.005)


# ------------------------------------------------------------------------------------------------------ fake services


class Fake:
    """A metadata service on loopback; `answer` says what a request gets, `asked` counts the requests."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken: Callable[[BaseHTTPRequestHandler], None] | None = None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if fake.broken:
                    fake.broken(self)
                else:
                    status, headers, body = fake.answer(self.command, self.path, self.headers)
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body.encode())
                fake.asked.append(f"{self.command} {self.path}")

            do_PUT = do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], str]:
        raise AssertionError("each cloud has its own")

    def polled(self, times: int) -> None:
        """Waits until so many more requests have been answered."""
        upto = len(self.asked) + times
        until(lambda: len(self.asked) >= upto)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class FakeAws(Fake):
    """IMDSv2 alone: every question needs a token that has not run out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: set[str] = set()
        self.action: str | None = None

    def answer(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], str]:
        if (method, path) == ("PUT", "/latest/api/token"):
            if not 1 <= int(headers.get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "0")) <= 21600:
                return 400, {}, ""
            self.tokens.add(f"token{len(self.asked)}==")
            return 200, {}, f"token{len(self.asked)}=="
        if headers.get("X-Aws-Ec2-Metadata-Token") not in self.tokens:
            return 401, {}, ""
        if path != "/latest/meta-data/spot/instance-action" or self.action is None:
            return 404, {}, "<html>Not Found</html>"
        return 200, {}, self.action

    def interrupt(self) -> None:
        self.action = json.dumps({"action": "terminate", "time": "2025-11-24T08:22:00Z"})


class FakeGcp(Fake):
    """Refuses who does not say `Metadata-Flavor: Google`, and says so itself."""

    def __init__(self) -> None:
        super().__init__()
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.flavor = "Google"

    def answer(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], str]:
        if headers.get("Metadata-Flavor") != "Google":
            return 403, {}, ""
        found = self.values.get(path.removeprefix("/computeMetadata/v1/instance/"))
        return (404 if found is None else 200), {"Metadata-Flavor": self.flavor}, found or ""

    def interrupt(self) -> None:
        self.values["preempted"] = "TRUE"


class FakeAzure(Fake):
    """This machine is `forge_3`; the events are those of its whole scale set."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def answer(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], str]:
        if headers.get("Metadata") != "true":
            return 400, {}, ""
        if path == "/metadata/instance/compute/name?api-version=2021-02-01&format=text":
            return 200, {}, "forge_3"
        if (method, path) != ("GET", "/metadata/scheduledevents?api-version=2020-07-01"):
            return 404, {}, ""
        return 200, {}, json.dumps({"DocumentIncarnation": len(self.events), "Events": self.events})

    def schedule(self, kind: str, *machines: str, in_s: float = 30.0, **fields: Any) -> None:
        when = format_datetime(datetime.fromtimestamp(time.time() + in_s, UTC), usegmt=True)
        event = {"EventId": f"id-{len(self.events)}", "EventStatus": "Scheduled", "EventType": kind}
        self.events.append(event | {"Resources": list(machines), "NotBefore": when} | fields)

    def interrupt(self) -> None:
        self.schedule("Preempt", "forge_2", "FORGE_3")


FAKES: dict[str, type[Fake]] = {"aws": FakeAws, "gcp": FakeGcp, "azure": FakeAzure}
Watched = Callable[..., list[Notice]]


@pytest.fixture
def fakes() -> Iterator[Callable[[str], Any]]:
    """Starts a fake service of a kind."""
    started: list[Fake] = []

    def start(kind: str) -> Fake:
        started.append(FAKES[kind]())
        return started[-1]

    yield start
    for fake in started:
        fake.close()


@pytest.fixture
def watch() -> Iterator[Watched]:
    """Watches a fake service; gives the list that fills with what is told."""
    watches: list[Watch] = []

    def start(kind: str, fake: Fake, on_notice: Callable[[Notice], None] | None = None) -> list[Notice]:
        told: list[Notice] = []
        watches.append(Watch(kind, on_notice or told.append, url=fake.url, poll_s=0.002).start())
        return told

    yield start
    for each in watches:
        each.close()


# ----------------------------------------------------------------------------------------------------------- notices


@pytest.mark.parametrize("kind", FAKES)
def test_nothing_is_told_before_the_notice_and_it_once(fakes: Any, watch: Watched, kind: str) -> None:
    fake = fakes(kind)
    told = watch(kind, fake)
    fake.polled(8)
    assert told == []
    fake.interrupt()
    until(lambda: told)
    fake.polled(8)
    assert [(notice.kind, notice.action) for notice in told] == [(kind, "terminate" if kind == "aws" else "preempt")]
    assert "POST" not in " ".join(fake.asked)


def test_aws_says_when(fakes: Any, watch: Watched) -> None:
    fake = fakes("aws")
    fake.interrupt()
    told = watch("aws", fake)
    until(lambda: told)
    assert told[0].deadline_s == datetime(2025, 11, 24, 8, 22, tzinfo=UTC).timestamp()
    assert json.loads(told[0].raw)["action"] == "terminate"


def test_aws_asks_for_one_token_and_for_another_when_that_has_run_out(fakes: Any, watch: Watched) -> None:
    fake = fakes("aws")
    told = watch("aws", fake)
    fake.polled(10)
    assert sum(line.startswith("PUT") for line in fake.asked) == 1
    fake.tokens.clear()
    fake.interrupt()
    until(lambda: told)
    assert sum(line.startswith("PUT") for line in fake.asked) == 2


@pytest.mark.parametrize("when", ["soon", 7, None, "", {"a": 1}])
def test_a_notice_whose_time_cannot_be_read_counts(fakes: Any, watch: Watched, when: object) -> None:
    fake = fakes("aws")
    fake.action = json.dumps({"action": "stop", "time": when})
    told = watch("aws", fake)
    until(lambda: told)
    assert (told[0].action, told[0].deadline_s) == ("stop", None)


def test_gcp_gives_thirty_seconds_and_a_live_migration_is_no_notice(fakes: Any, watch: Watched) -> None:
    fake = fakes("gcp")
    fake.values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    told = watch("gcp", fake)
    fake.polled(6)
    assert told == []
    before_s = time.time()
    fake.interrupt()
    until(lambda: told)
    assert before_s + 30 <= told[0].deadline_s <= time.time() + 30
    fake.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    until(lambda: len(told) == 2)
    assert told[1].action == "terminate"


def test_azure_tells_what_ends_this_machine_alone(fakes: Any, watch: Watched) -> None:
    fake = fakes("azure")
    fake.schedule("Freeze", "forge_3")
    fake.schedule("Terminate", "forge_33", "forge_2")
    told = watch("azure", fake)
    fake.polled(6)
    assert told == []
    for kind in ("Reboot", "Redeploy", "Terminate"):
        fake.schedule(kind, "forge_3")
    until(lambda: len(told) == 3)
    assert [notice.action for notice in told] == ["reboot", "redeploy", "terminate"]


def test_azures_event_is_not_told_again_when_it_begins(fakes: Any, watch: Watched) -> None:
    fake = fakes("azure")
    fake.interrupt()
    told = watch("azure", fake)
    until(lambda: told)
    assert time.time() < told[0].deadline_s < time.time() + 31
    fake.events[0] |= {"EventStatus": "Started", "NotBefore": ""}
    fake.polled(6)
    assert len(told) == 1


def test_an_event_that_has_begun_has_no_deadline(fakes: Any, watch: Watched) -> None:
    fake = fakes("azure")
    fake.schedule("Reboot", "forge_3", EventStatus="Started", NotBefore="")
    told = watch("azure", fake)
    until(lambda: told)
    assert told[0].deadline_s is None


def test_a_notice_days_ahead_waits_until_it_is_near(fakes: Any, watch: Watched) -> None:
    fake = fakes("azure")
    fake.schedule("Redeploy", "forge_3", in_s=4 * 86400)
    told = watch("azure", fake)
    fake.polled(6)
    assert told == []
    later = datetime.fromtimestamp(time.time() + 60, UTC)
    fake.events[0]["NotBefore"] = format_datetime(later, usegmt=True)
    until(lambda: told)


def test_a_notice_that_could_not_be_passed_on_comes_again(
    fakes: Any, watch: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, told = fakes("gcp"), []

    def fails_twice(notice: Notice) -> None:
        told.append(notice)
        if len(told) < 3:
            raise RuntimeError(f"the coordinator is away, try {len(told)}")

    fake.interrupt()
    watch("gcp", fake, fails_twice)
    until(lambda: len(told) == 3)
    fake.polled(6)
    assert len(told) == 3
    assert capsys.readouterr().err.count("the coordinator is away") == 1


def test_nothing_is_told_after_the_end(fakes: Any) -> None:
    fake, told = fakes("aws"), []
    watch = Watch("aws", told.append, url=fake.url, poll_s=0.002).start()
    fake.polled(4)
    watch.close()
    fake.interrupt()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "forge-preemption"])
    assert told == []


# ---------------------------------------------------------------------------------------------------------- mishaps


def _hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def _no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\xff hello\r\n\r\n")


def _cut_short(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nMetadata-Flavor: Google\r\nContent-Length: 999\r\n\r\n{")


def _status(status: int, body: bytes = b"", *headers: tuple[str, str]) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in (("Metadata-Flavor", "Google"), *headers):
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


MISHAPS: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
    "hangs up": _hang_up,
    "no http": _no_http,
    "cut short": _cut_short,
    "503": _status(503),
    "429": _status(429, b"{}"),
    "empty": _status(200),
    "a page": _status(200, b"<html>\nPlease log in\n</html>"),
    "another type": _status(200, b"[1, 2]"),
    "no fields": _status(200, b"{}"),
    "wrong fields": _status(200, b'{"action": 7, "Events": 5}'),
    "wrong events": _status(200, b'{"action": null, "Events": [{"EventType": [], "Resources": 3}]}'),
    "deep": _status(200, b"[" * 60_000),
    "bytes": _status(200, bytes(range(128, 256))),
    "large": _status(200, b"x" * 200_000),
}


@pytest.mark.parametrize("kind", FAKES)
@pytest.mark.parametrize("mishap", MISHAPS)
def test_an_unusable_answer_is_said_at_most_once_and_the_next_good_one_counts(
    fakes: Any, watch: Watched, capsys: pytest.CaptureFixture[str], kind: str, mishap: str
) -> None:
    fake = fakes(kind)
    fake.broken = MISHAPS[mishap]
    told = watch(kind, fake)
    fake.polled(25)
    assert told == []
    fake.broken = None
    fake.interrupt()
    until(lambda: told)
    fake.polled(4)
    assert len(told) == 1
    assert len(capsys.readouterr().err.splitlines()) <= 1


@pytest.mark.parametrize("kind", FAKES)
def test_a_service_that_vanishes_is_said_once(
    fakes: Any, watch: Watched, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tries, connect = [], http.client.HTTPConnection.connect
    monkeypatch.setattr(http.client.HTTPConnection, "connect", lambda self: (tries.append(1), connect(self)))
    fake = fakes(kind)
    watch(kind, fake)
    fake.polled(4)
    fake.close()
    tries.clear()
    until(lambda: len(tries) > 50)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"the metadata service of {kind} gives no usable answer" in said


def test_a_service_that_is_not_googles_tells_nothing(fakes: Any, watch: Watched) -> None:
    fake = fakes("gcp")
    fake.flavor = "Mallory"
    fake.interrupt()
    told = watch("gcp", fake)
    fake.polled(6)
    assert told == []


@pytest.mark.parametrize("kind", FAKES)
def test_a_service_that_does_not_answer_is_no_reason_to_wait_at_the_end(fakes: Any, kind: str) -> None:
    fake, asked, release = fakes(kind), threading.Event(), threading.Event()
    fake.broken = lambda _: (asked.set(), release.wait(LIMIT_S))
    fake.interrupt()
    told: list[Notice] = []
    watch = Watch(kind, told.append, url=fake.url).start()
    assert asked.wait(LIMIT_S)
    watch.close()
    release.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "forge-preemption"])
    assert told == []


# ------------------------------------------------------------------------------------------------------ who is asked


def _firmware(folder: Path, **tables: str) -> Path:
    folder.mkdir()
    for name, text in tables.items():
        (folder / name).write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize(
    ("tables", "cloud"),
    [
        ({"sys_vendor": "Amazon EC2", "product_name": "p5.48xlarge"}, "aws"),
        ({"sys_vendor": "Xen", "product_name": "HVM domU", "bios_version": "4.11.amazon"}, "aws"),
        ({"sys_vendor": "Google", "product_name": "Google Compute Engine"}, "gcp"),
        ({"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": AZURE_TAG}, "azure"),
        ({"sys_vendor": "Microsoft Corporation", "product_name": "Virtual Machine", "chassis_asset_tag": "1-2"}, None),
        ({"sys_vendor": "Xen", "bios_version": "4.11"}, None),
        ({"sys_vendor": "Google", "product_name": "Chromebook"}, None),
        ({"sys_vendor": "Dell Inc.", "product_name": "PowerEdge R760"}, None),
        ({}, None),
    ],
)
def test_the_firmware_names_the_cloud(tmp_path: Path, tables: dict[str, str], cloud: str | None) -> None:
    assert cloud_of(_firmware(tmp_path / "id", **tables)) == cloud


_COUNT_CONNECTIONS = """
import json, sys, threading, time
asked = []
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        asked.append([event, str(args[1 if event == "socket.connect" else 0])])
        if asked[-1] != ["socket.getaddrinfo", "169.254.169.254"]:  # a number is converted, not looked up
            raise OSError("refused by the test")
sys.addaudithook(refuse)
from pathlib import Path
from forge_ray.train.nodes.preemption import Watch
watch = Watch(sys.argv[1], print, firmware=Path(sys.argv[2]), poll_s=0.001).start()
limit = time.monotonic() + 30
while threading.active_count() > 1 and len(asked) < 50 and time.monotonic() < limit:
    time.sleep(0.001)
assert not {"ray", "torch"} & set(sys.modules)
print(json.dumps(asked))
"""


def _asked(repository: Path, kind: str, firmware: Path) -> tuple[list[list[str]], str]:
    """Every name that was looked up and every address that was to be connected; nothing leaves the process."""
    words = [sys.executable, "-c", _COUNT_CONNECTIONS, kind, str(firmware)]
    environment = {"http_proxy": "http://192.0.2.1:3128", "HTTP_PROXY": "http://192.0.2.1:3128", "PATH": ""}
    run = subprocess.run(
        words, capture_output=True, text=True, timeout=60, cwd=repository, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr


def test_off_the_cloud_nobody_is_asked_and_nothing_said(repository: Path, tmp_path: Path) -> None:
    dell, ec2 = (
        _firmware(tmp_path / "dell", sys_vendor="Dell Inc."),
        _firmware(tmp_path / "ec2", sys_vendor="Amazon EC2"),
    )
    assert _asked(repository, "auto", dell) == ([], "")
    assert _asked(repository, "off", ec2) == ([], "")


@pytest.mark.parametrize("kind", FAKES)
def test_on_a_cloud_only_the_link_local_address_is_asked(repository: Path, tmp_path: Path, kind: str) -> None:
    asked, said = _asked(repository, kind, tmp_path)
    assert set(map(tuple, asked)) == {
        ("socket.getaddrinfo", "169.254.169.254"),
        ("socket.connect", "('169.254.169.254', 80)"),
    }
    assert said.count("\n") == 1


def test_a_proxy_is_not_used(fakes: Any, watch: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, fake = fakes("gcp"), fakes("aws")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    fake.interrupt()
    told = watch("aws", fake)
    until(lambda: told)
    assert proxy.asked == []


def test_a_redirect_is_not_followed(fakes: Any, watch: Watched) -> None:
    elsewhere, fake = fakes("aws"), fakes("aws")
    fake.broken = _status(302, b"", ("Location", f"{elsewhere.url}/latest/api/token"))
    watch("aws", fake)
    fake.polled(6)
    assert elsewhere.asked == []


def test_the_variable_names_a_fake_on_loopback(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, told = fakes("gcp"), []
    fake.interrupt()
    monkeypatch.setenv(URL_VARIABLE, fake.url)
    watch = Watch("gcp", told.append, poll_s=0.002).start()
    until(lambda: told)
    watch.close()


@pytest.mark.parametrize(
    "url",
    [
        *("http://10.0.0.1", "http://metadata.google.internal", "http://localhost:80", "https://169.254.169.254"),
        *("http://169.254.169.254@10.0.0.1", "http://127.0.0.1:no", "ftp://127.0.0.1", "169.254.169.254", "http://"),
        *("http://169.254.170.2", "http://127.0.0.1.example.com"),
    ],
)
def test_no_other_address_can_be_named(url: str) -> None:
    with pytest.raises(ConfigError, match="is not asked"):
        Watch("aws", print, url=url)
