"""Lists of addresses, against a real server on loopback."""

from __future__ import annotations

import gzip
import http.server
import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.config import HttpSource, IngestConfig
from forge_ray.data.reading import formats, http_list, sources
from forge_ray.data.reading.formats import LARGE, Document
from forge_ray.errors import DataError, StorageError

Answer = Callable[[http.server.BaseHTTPRequestHandler, int], None]


def body(data: bytes, content_type: str = "", status: int = 200, **headers: str) -> Answer:
    def answer(request: http.server.BaseHTTPRequestHandler, _: int) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        if content_type:
            request.send_header("Content-Type", content_type)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)

    return answer


def in_turn(*answers: Answer) -> Answer:
    """The first GET gets the first answer; the last one stands for all that follow. HEAD gets the last."""

    def answer(request: http.server.BaseHTTPRequestHandler, number: int) -> None:
        turn = answers[-1] if request.command == "HEAD" else answers[min(number, len(answers) - 1)]
        turn(request, number)

    return answer


def cut(data: bytes) -> Answer:
    """A body that ends before its stated length."""

    def answer(request: http.server.BaseHTTPRequestHandler, _: int) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[: len(data) // 2])
        request.close_connection = True

    return answer


class Server:
    """Answers by path; counts what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: Counter[str] = Counter()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                key = f"{self.command} {self.path}"
                number = outer.asked[key]
                outer.asked[key] += 1
                outer.answers.get(self.path, body(b"", status=404))(self, number)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.key = self.url.partition("://")[2]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(http_list, "LIST_RETRY_S", 0.3)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def source_of(server: Server, folder: Path, **fields: Any) -> HttpSource:
    path = folder / "list.txt"
    path.write_text("# addresses\n\n" + "\n".join(f"{server.url}{path}" for path in server.answers))
    return HttpSource(kind="http", uri=str(path), **fields)


def read(server: Server, folder: Path, retry_s: float = 3.0, **fields: Any) -> dict[str, str]:
    source = source_of(server, folder, **fields)
    unit = formats.unit(source, formats.listing(source))
    items = formats.read(unit, IngestConfig(retry_s=retry_s, max_document_bytes=100_000))
    return {
        item.source.removeprefix(server.url): item.text if isinstance(item, Document) else f"<{item.kind}>"
        for item in items
    }


def test_each_format_by_its_path_or_else_by_its_content_type(server: Server, tmp_path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["row"]}), sink)
    server.answers = {
        "/a.txt": body(b"plain", "application/octet-stream"),
        "/b": body(b"<p>page", "text/html; charset=utf-8"),
        "/c.jsonl?version=2": body(b'{"text": "line"}\n'),
        "/d": body(b"text\ncell\n", "text/csv"),
        "/e.parquet": body(sink.getvalue()),
        "/f.jsonl.gz": body(gzip.compress(b'{"text": "packed"}'), "application/gzip", Content_Encoding="gzip"),
        "/g": body(gzip.compress(b"sent packed"), "text/plain", Content_Encoding="gzip"),
        "/h": body("caf\u00e9".encode("latin-1"), "text/html; charset=ISO-8859-1"),
        "/i": body(b"\x89PNG", "image/png"),
        "/j": body(b"x", "text/plain", Content_Encoding="br"),
    }
    assert read(server, tmp_path) == {
        "/a.txt": "plain",
        "/b": "page",
        "/c.jsonl?version=2#1": "line",
        "/d#1": "cell",
        "/e.parquet#1": "row",
        "/f.jsonl.gz#1": "packed",
        "/g": "sent packed",
        "/h": "caf\u00e9",
        "/i": "<unreadable: unknown format>",
        "/j": "<unreadable: unknown compression>",
    }


def test_addresses_that_are_gone_are_counted(server: Server, tmp_path: Path) -> None:
    server.answers = {
        "/a.txt": body(b"here"),
        "/b.txt": body(b"gone", status=404),
        "/c.txt": body(b"gone", status=410),
        "/d.txt": in_turn(body(b"now gone", status=404), body(b"was there")),
    }
    assert read(server, tmp_path) == {
        "/a.txt": "here",
        "/b.txt": "<unreadable: HTTP 404>",
        "/c.txt": "<unreadable: HTTP 410>",
        "/d.txt": "<unreadable: HTTP 404>",
    }


def test_503_and_bodies_that_end_early_are_asked_for_again(server: Server, tmp_path: Path) -> None:
    text = b"the whole text " * 1000
    server.answers = {
        "/a.txt": in_turn(body(b"busy", status=503), body(b"busy", status=429), body(text)),
        "/b.txt": in_turn(cut(text), cut(text), body(text)),
    }
    assert read(server, tmp_path) == {"/a.txt": text.decode().strip(), "/b.txt": text.decode().strip()}
    assert server.asked["GET /a.txt"] == server.asked["GET /b.txt"] == 3


@pytest.mark.parametrize("answer", [body(b"busy", status=503), cut(b"never whole" * 99)])
def test_a_server_that_does_not_recover_is_an_error_that_names_the_address(
    server: Server, tmp_path: Path, answer: Answer
) -> None:
    server.answers = {"/a.txt": in_turn(*[answer] * 999, body(b"fine"))}
    with pytest.raises(StorageError, match="did not answer") as caught:
        read(server, tmp_path, retry_s=0.2)
    assert caught.value.got == f"{server.url}/a.txt"


def test_a_server_that_is_not_there_is_an_error_of_the_listing(server: Server, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("http://127.0.0.1:9/a.txt")
    with pytest.raises(StorageError, match="did not answer"):
        formats.listing(HttpSource(kind="http", uri=str(tmp_path / "list.txt")))


def test_an_answer_that_is_too_large_is_not_read_to_its_end(server: Server, tmp_path: Path) -> None:
    def endless(request: http.server.BaseHTTPRequestHandler, _: int) -> None:
        request.send_response(200)
        request.end_headers()
        if request.command == "GET":
            try:
                while True:
                    request.wfile.write(b'{"text": "more"}\n' * 10_000)
            except OSError:
                pass

    server.answers = {"/a.jsonl": endless, "/b.jsonl": body(b'{"text": "after"}')}
    found = read(server, tmp_path, max_file_bytes=1_000_000)
    assert found == {"/a.jsonl": f"<{LARGE}>", "/b.jsonl#1": "after"}


def test_a_body_that_expands_beyond_all_measure_is_a_bomb(server: Server, tmp_path: Path) -> None:
    server.answers = {
        "/a": body(gzip.compress(bytes(80 << 20)), "application/jsonl", Content_Encoding="gzip"),
        "/b": body(gzip.compress(bytes(80 << 20)), "text/plain", Content_Encoding="gzip"),
    }
    assert read(server, tmp_path) == {"/a": "<unreadable: decompression bomb>", "/b": f"<{LARGE}>"}


def test_redirects_are_followed_a_few_times(server: Server, tmp_path: Path) -> None:
    def to(place: str) -> Answer:
        return body(b"", status=302, Location=place)

    server.answers = {
        "/a.txt": to("/b.txt"),
        "/b.txt": body(b"found"),
        "/loop.txt": to("/loop.txt"),
        "/file.txt": to("file:///etc/passwd"),
    }
    assert read(server, tmp_path) == {
        "/a.txt": "found",
        "/b.txt": "found",
        "/loop.txt": "<unreadable: too many redirects>",
        "/file.txt": "<unreadable: no HTTP address>",
    }


def test_the_state_is_what_the_server_says_of_the_version(server: Server, tmp_path: Path) -> None:
    def no_head(request: http.server.BaseHTTPRequestHandler, number: int) -> None:
        if request.command == "HEAD":
            body(b"", status=405)(request, number)
        else:
            answer = body(b"x", status=206, ETag='"g"', Content_Range="bytes 0-0/77")
            answer(request, number)

    server.answers = {
        "/a.txt": body(b"12345", ETag='"v1"', Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT"),
        "/b.txt": body(b"12345", Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT"),
        "/c.txt": body(b"12345"),
        "/d.txt": no_head,
        "/e.txt": body(b"", status=404),
    }
    rows = formats.listing(source_of(server, tmp_path))
    assert [(row["key"], row["size"], row["state"]) for row in rows] == [
        (f"{server.key}/a.txt", 5, '"v1"'),
        (f"{server.key}/b.txt", 5, "Mon, 01 Jan 2024 00:00:00 GMT"),
        (f"{server.key}/c.txt", 5, "5"),
        (f"{server.key}/d.txt", 77, '"g"'),
        (f"{server.key}/e.txt", 0, "!unreadable: HTTP 404"),
    ]


def test_a_list_is_sorted_and_each_address_counts_once(server: Server, tmp_path: Path) -> None:
    server.answers = {"/b.txt": body(b"b"), "/a.txt": body(b"a"), "/b.txt#part": body(b"b")}
    assert [row["key"] for row in formats.listing(source_of(server, tmp_path))] == [
        f"{server.key}/a.txt",
        f"{server.key}/b.txt",
    ]


@pytest.mark.parametrize(
    "line",
    ["/etc/passwd", "file:///etc/passwd", "ftp://host/a.txt", "http://", "http://user:secret@host/a", "x" * 20_000],
)
def test_a_line_that_is_no_address_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.txt").write_text(f"# first\n{line}\n")
    with pytest.raises(DataError, match="list of addresses") as caught:
        formats.listing(HttpSource(kind="http", uri=str(tmp_path / "list.txt")))
    assert "line 2" in caught.value.got


def test_an_empty_list_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(DataError, match="empty"):
        formats.listing(HttpSource(kind="http", uri=str(tmp_path / "list.txt")))
