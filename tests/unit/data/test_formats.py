"""Files of every format, from a folder and from a store, good and bad."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.config import FilesSource, IngestConfig
from forge_ray.data import formats
from forge_ray.data.formats import Document, html_text
from forge_ray.errors import DataError, StorageError

Put = Callable[[str, bytes], None]


def parquet(column: list[object], name: str = "text") -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({name: column, "other": list(range(len(column)))}), sink)
    return sink.getvalue()


@pytest.fixture(params=["folder", "memory"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Put]]:
    """A URI and a way to put a file there."""
    uri = str(tmp_path / "corpus") if request.param == "folder" else f"memory://{tmp_path.name}"
    fs, root = fsspec.core.url_to_fs(uri)
    fs.makedirs(root, exist_ok=True)

    def put(name: str, data: bytes) -> None:
        fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{root}/{name}", data)

    yield uri, put
    fs.rm(root, recursive=True)


def read(uri: str, **config: int) -> dict[str, str]:
    """What arrives: text, or the reason of a skip in angle brackets, by the source below the corpus."""
    source = FilesSource(kind="files", uri=uri)
    items = [item for unit in formats.units(source) for item in formats.read(unit, IngestConfig(**config))]
    names = [item.source.partition(uri.rpartition("/")[2] + "/")[2] for item in items]
    return dict(zip(names, (item.text if isinstance(item, Document) else f"<{item.reason}>" for item in items)))


def test_each_format_arrives_in_the_order_of_names(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    put("d.parquet", parquet(["from parquet", "second row"]))
    put("sub/deeper/e.TXT", b"upper-case suffix in a sub-folder\n")
    put("a.txt", "  plain ünï\n".encode())
    put("b.md", b"# Heading\n\ntext")
    put("c.jsonl", b'{"text": "line one", "more": 1}\n\n{"text": " line three "}')
    put("c2.html", b"<html><body><h1>Title</h1><p>Text &amp; more</p></body></html>")
    put("picture.png", b"\x89PNG")
    assert list(read(uri).items()) == [
        ("a.txt", "plain ünï"),
        ("b.md", "# Heading\n\ntext"),
        ("c.jsonl#1", "line one"),
        ("c.jsonl#3", "line three"),
        ("c2.html", "Title\nText & more"),
        ("d.parquet#1", "from parquet"),
        ("d.parquet#2", "second row"),
        ("sub/deeper/e.TXT", "upper-case suffix in a sub-folder"),
    ]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.txt", b"text"),
        ("x.md", b"text"),
        ("x.html", b"<p>text"),
        ("x.jsonl", b'{"text": "text"}'),
    ],
)
def test_a_byte_order_mark_is_no_text(corpus: tuple[str, Put], name: str, data: bytes) -> None:
    uri, put = corpus
    put(name, b"\xef\xbb\xbf" + data)
    assert list(read(uri).values()) == ["text"]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("m.txt", "caf\u00e9".encode("latin-1"), "not UTF-8: byte 3"),
        ("m.html", b"<p>\xff\xfe</p>", "not UTF-8: byte 3"),
        ("m.html", b"<p>text <![nonsense[ here]]></p>", "unreadable: not HTML"),
        ("m.md", b"x" * 2001, "larger than max_document_bytes: 2001 bytes"),
        ("m.parquet", parquet(["lost"])[:-20], "unreadable: "),
        ("m.parquet", b"", "unreadable: "),
        ("m.parquet", parquet(["lost"], name="body"), "unreadable: no text field: 'text', only body, other"),
    ],
)
def test_a_bad_file_is_skipped_with_its_reason_and_its_neighbours_arrive(
    corpus: tuple[str, Put], name: str, data: bytes, reason: str
) -> None:
    uri, put = corpus
    put("a.txt", b"before")
    put(name, data)
    put("z.txt", b"after")
    found = read(uri, max_document_bytes=2000)
    assert (found.pop("a.txt"), found.pop("z.txt")) == ("before", "after")
    assert list(found) == [name]
    assert found[name].startswith(f"<{reason}")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 13"),
        (b'{"text": "torn', "JSONDecodeError"),
        (b'{"body": "x"}', "unreadable: no text field: 'text', KeyError"),
        (b'["text"]', "TypeError"),
        (b"7", "TypeError"),
        (b'{"text": null}', "the text is no string: NoneType"),
        (b'{"text": ["x"]}', "the text is no string: list"),
        (b'{"text": "half \\ud83d pair"}', "half of a surrogate pair: character 5"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_a_bad_line_is_skipped_with_its_number_and_its_neighbours_arrive(
    corpus: tuple[str, Put], line: bytes, reason: str
) -> None:
    uri, put = corpus
    put("m.jsonl", b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    found = read(uri)
    assert (found.pop("m.jsonl#1"), found.pop("m.jsonl#3")) == ("before", "after")
    assert reason in found["m.jsonl#2"]


def test_a_row_of_parquet_that_is_no_string_is_skipped_alone(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    put("a.parquet", parquet(["one", None, "three"]))
    put("b.parquet", parquet([1, 2]))
    assert read(uri) == {
        "a.parquet#1": "one",
        "a.parquet#2": "<unreadable: the text is no string: NoneType>",
        "a.parquet#3": "three",
        "b.parquet#1": "<unreadable: the text is no string: int>",
        "b.parquet#2": "<unreadable: the text is no string: int>",
    }


def test_parquet_whose_pages_are_torn_keeps_the_neighbours(tmp_path: Path) -> None:
    data = bytearray(parquet([f"document {i} " * 50 for i in range(50)]))
    data[200:1200] = bytes(1000)
    (tmp_path / "a.parquet").write_bytes(data)
    (tmp_path / "b.txt").write_text("after")
    found = read(str(tmp_path))
    assert found.pop("b.txt") == "after"
    assert found.pop("a.parquet").startswith("<unreadable: ")


def test_field_and_licence_of_the_source_go_into_every_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "from body", "text": "not this"}))
    (tmp_path / "b.txt").write_text("whole file")
    source = FilesSource(kind="files", uri=str(tmp_path), text_field="body", licence="CC0-1.0")
    items = list(formats.read(formats.units(source)[0], IngestConfig()))
    assert [(item.text, item.licence) for item in items] == [("from body", "CC0-1.0"), ("whole file", "CC0-1.0")]
    assert len({item.group for item in items}) == 2


def test_a_single_file_is_a_source(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    put("only.txt", b"this one")
    put("other.txt", b"not this one")
    [unit] = formats.units(FilesSource(kind="files", uri=f"{uri}/only.txt"))
    [item] = formats.read(unit, IngestConfig())
    assert (item.text, item.key) == ("this one", "only.txt")


def test_keys_and_groups_are_paths_below_the_source_wherever_it_lies(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    put("sub/a.txt", b"a whole file")
    put("b.jsonl", b'{"text": "a record"}')
    for slash in ("", "/"):
        [unit] = formats.units(FilesSource(kind="files", uri=uri + slash))
        items = list(formats.read(unit, IngestConfig()))
        assert [(item.key, item.group) for item in items] == [("b.jsonl#1",) * 2, ("sub/a.txt",) * 2]
        assert all(item.source.endswith(f"{uri.rpartition('/')[2]}/{item.key}") for item in items)


def test_a_file_that_vanishes_after_the_listing_is_no_bad_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    [unit] = formats.units(FilesSource(kind="files", uri=str(tmp_path)))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(StorageError, match=r"a\.txt") as caught:
        list(formats.read(unit, IngestConfig()))
    assert "still there" in caught.value.do


class _Breaks(io.BytesIO):
    """A file on a disk or link that fails."""

    error: Exception

    def read(self, size: int | None = -1) -> bytes:
        raise self.error


@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "disk"), PermissionError("expired"), RuntimeError("no token")])
def test_an_error_of_reading_is_no_bad_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    (tmp_path / name).write_bytes(parquet(["text"]))
    [unit] = formats.units(FilesSource(kind="files", uri=str(tmp_path)))
    broken = _Breaks((tmp_path / name).read_bytes())
    broken.error = error
    fs = fsspec.filesystem("file")
    monkeypatch.setattr(type(fs), "open", lambda *args, **kwargs: broken)
    with pytest.raises(StorageError) as caught:
        list(formats.read(unit, IngestConfig()))
    assert caught.value.got == str(tmp_path / name)
    assert type(error).__name__ in caught.value.what


def test_small_neighbours_share_a_unit_and_every_file_is_in_exactly_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"a": 40, "b": 40, "c": 300, "d": 10, "e": 60, "f": 60}
    for name, size in sizes.items():
        (tmp_path / f"{name}.txt").write_text("x" * size)
    monkeypatch.setattr(formats, "UNIT_BYTES", 100)
    units = formats.units(FilesSource(kind="files", uri=str(tmp_path)))
    assert [[Path(name).stem for name in unit["names"]] for unit in units] == [["a", "b"], ["c"], ["d", "e"], ["f"]]


@pytest.mark.parametrize("uri", ["/no/such/folder-of-documents", "memory://no-such-bucket/x"])
def test_a_source_that_is_not_there_is_named(uri: str) -> None:
    with pytest.raises(StorageError, match=uri):
        formats.observe(FilesSource(kind="files", uri=uri))


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(StorageError, match="gopher://documents"):
        formats.units(FilesSource(kind="files", uri="gopher://documents"))


def test_a_folder_without_readable_files_is_named(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    put("picture.png", b"\x89PNG")
    with pytest.raises(DataError, match=uri) as caught:
        formats.units(FilesSource(kind="files", uri=uri))
    assert "1 other file" in str(caught.value)


def test_observe_changes_when_a_file_does_and_not_otherwise(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    source = FilesSource(kind="files", uri=uri)
    put("a.txt", b"one")
    put("b.txt", b"two")
    before = formats.observe(source)
    put("picture.png", b"not read, so of no account")
    assert formats.observe(source) == before
    put("b.txt", b"two and more")
    longer = formats.observe(source)
    put("c.txt", b"")
    added = formats.observe(source)
    assert len({seen["listing"] for seen in (before, longer, added)}) == 3
    assert (added["files"], added["bytes"]) == (3, 15)


def test_observe_sees_an_edit_that_keeps_the_size(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, (1000, 1000))
    before = formats.observe(FilesSource(kind="files", uri=str(tmp_path)))
    path.write_text("two")
    os.utime(path, (1000, 2000))
    assert formats.observe(FilesSource(kind="files", uri=str(tmp_path))) != before


@pytest.mark.parametrize(
    ("html", "text"),
    [
        (
            "<ul><li>One<ul><li>Two</li><li>The <b>third</b></li></ul></li><li>Four</li></ul>",
            "- One\n- Two\n- The third\n- Four",
        ),
        ("<ol><li><p>In a paragraph</p></li><li> </li></ol>", "- In a paragraph"),
        ("<ul><li><ul><li>only inner</li></ul></li><li></li></ul><p>after</p>", "- only inner\nafter"),
        ("<p>a <script>alert('<p>no</p>')</script>b</p><style>p {}</style><noscript>no</noscript>", "a b"),
        (
            "<p>Call <code>f(x)</code>:</p><pre><code>def f(x):\n    if x:\n\ty  = 1\n</code></pre>",
            "Call f(x):\ndef f(x):\n    if x:\n    y  = 1",
        ),
        ("<p>a sentence\n  wrapped in\r\nthe source</p>", "a sentence wrapped in the source"),
        ("before<p>inside</p>after<br>below", "before\ninside\nafter\nbelow"),
        ("<table><tr><th>k</th><th>v</th></tr><tr><td>1</td><td>2</td></tr></table>", "k v\n1 2"),
        ("<!-- hidden --><p>5 &lt; 6 &amp;&amp; &#233;&nbsp;x</p>", "5 < 6 && é x"),
        ("<p>never <b>closed", "never closed"),
        ("", ""),
    ],
)
def test_html_becomes_a_line_for_each_block(html: str, text: str) -> None:
    assert html_text(html) == text


def test_html_of_any_depth_is_read() -> None:
    assert html_text("<div>" * 3000 + "deep" + "</div>" * 3000) == "deep"
