"""Files of every format, from a folder and from a store, good and bad."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import docx
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from forge_ray.config import FilesSource, IngestConfig
from forge_ray.data.reading import formats, sandbox
from forge_ray.data.reading.documents import format_of, moment
from forge_ray.data.reading.formats import Document, Skipped, html_text
from tests.unit.data.test_hostile import pdf_of

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


def items_of(source: FilesSource, **config: int) -> list[Document | Skipped]:
    return list(formats.read(formats.unit(source, formats.listing(source)), IngestConfig(**config)))


def read(uri: str, **config: int) -> dict[str, str]:
    """What arrives: text, or the reason of a skip in angle brackets, by the source below the corpus."""
    items = items_of(FilesSource(kind="files", uri=uri), **config)
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
        (b'{"body": "x"}', "unreadable: no text field: 'text'"),
        (b'["text"]', "unreadable: no text field: 'text', the line is of type list"),
        (b"7", "unreadable: no text field: 'text', the line is of type int"),
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
    items = items_of(source)
    assert [(item.text, item.licence) for item in items] == [("from body", "CC0-1.0"), ("whole file", "CC0-1.0")]
    assert len({item.group for item in items}) == 2


def test_a_single_file_is_a_source(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    put("only.txt", b"this one")
    put("other.txt", b"not this one")
    [item] = items_of(FilesSource(kind="files", uri=f"{uri}/only.txt"))
    assert (item.text, item.key) == ("this one", "only.txt")


def test_keys_and_groups_are_paths_below_the_source_wherever_it_lies(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    put("sub/a.txt", b"a whole file")
    put("b.jsonl", b'{"text": "a record"}')
    for slash in ("", "/"):
        items = items_of(FilesSource(kind="files", uri=uri + slash))
        assert [(item.key, item.group) for item in items] == [("b.jsonl#1",) * 2, ("sub/a.txt",) * 2]
        assert all(item.source.endswith(f"{uri.rpartition('/')[2]}/{item.key}") for item in items)


def csv_of(rows: list[list[str]]) -> bytes:
    sink = io.StringIO()
    csv.writer(sink).writerows(rows)
    return sink.getvalue().encode()


def docx_of() -> bytes:
    document = docx.Document()
    document.add_heading("Rotating keys", 1)
    document.add_paragraph("First paragraph.")
    table = document.add_table(2, 2)
    for row, values in enumerate([("Port", "Use"), ("22", "ssh")]):
        for column, value in enumerate(values):
            table.cell(row, column).text = value
    document.add_paragraph("After the table.")
    document.core_properties.created = datetime(2024, 1, 31, 12, 0, 0)
    sink = io.BytesIO()
    document.save(sink)
    return sink.getvalue()


def test_csv_with_quotes_line_ends_and_gaps(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    put(
        "a.csv",
        csv_of([["id", "text"], ["1", 'two\nlines, "quoted"'], ["2", ""], ["3", "last"]]) + b"4\r\n\r\n5,no end",
    )
    assert read(uri) == {
        "a.csv#1": 'two\nlines, "quoted"',
        "a.csv#2": "<unreadable: the text is no string: NoneType>",
        "a.csv#3": "last",
        "a.csv#4": "<unreadable: no text field: a row of 1 fields>",
        "a.csv#5": "no end",
    }


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"id,body\n1,x\n", "unreadable: no text field: 'text', only 'id, body'"),
        (b"7,Jane Roe,jane@example.org\n", "unreadable: no text field: 'text', only '…, …, …'"),
        (b"text,text\na,b\n", "unreadable: two columns of one name: text"),
    ],
)
def test_a_csv_with_the_wrong_columns_is_skipped(corpus: tuple[str, Put], data: bytes, reason: str) -> None:
    uri, put = corpus
    put("a.csv", data)
    assert read(uri) == {"a.csv": f"<{reason}>"}


def test_a_bad_record_of_csv_is_skipped_alone(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    put("a.csv", b"text,x\nbefore,1\ncaf\xe9,2\n" + b'"open ' + b"x\n" * 40_000 + b"\nafter,3\n")
    found = read(uri, max_document_bytes=2000)
    assert found["a.csv#1"] == "before"
    assert found["a.csv#2"] == "<not UTF-8: character 3>"
    assert found["a.csv#3"].startswith("<unreadable: not CSV: a record of more than")
    assert list(found.values())[-1] == "after"


@pytest.mark.parametrize("name", ["a.txt", "b.md", "c.html", "d.jsonl", "e.csv", "f.ndjson"])
@pytest.mark.parametrize("codec", ["gz", "zst"])
def test_compressed_files_hold_the_same_documents(corpus: tuple[str, Put], name: str, codec: str) -> None:
    uri, put = corpus
    data = {"jsonl": b'{"text": "words"}\n', "ndjson": b'{"text": "words"}\n', "csv": b"text\nwords\n"}.get(
        name.partition(".")[2], b"words"
    )
    pack = gzip.compress if codec == "gz" else zstandard.ZstdCompressor().compress
    put(f"{name}.{codec}", pack(data[:3]) + pack(data[3:]))  # of two members, as parallel compressors write them
    assert list(read(uri).values()) == ["words"]


ARCHIVES = {
    "a.zip": "zip",
    "a.tar": "w",
    "a.tar.gz": "w:gz",
    "a.tgz": "w:gz",
    "a.tar.zst": "w",
}


@pytest.mark.parametrize(("name", "how"), ARCHIVES.items())
def test_archives_are_read_member_by_member(corpus: tuple[str, Put], name: str, how: str) -> None:
    uri, put = corpus
    members = {
        "b.txt": b"second by name, first in the archive",
        "sub/a.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
        "sub/c.jsonl.gz": gzip.compress(b'{"text": "packed twice"}'),
        "d.parquet": parquet(["a row"]),
        "e.docx": docx_of(),
        "long/" + "x" * 120 + "/f.txt": "ünï".encode(),
        "picture.png": b"\x89PNG",
    }
    sink = io.BytesIO()
    if how == "zip":
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, data in members.items():
                archive.writestr(path, data)
    else:
        with tarfile.open(fileobj=sink, mode=how) as archive:
            for path, data in members.items():
                header = tarfile.TarInfo(path)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
    data = sink.getvalue()
    put(name, zstandard.ZstdCompressor().compress(data) if name.endswith("zst") else data)
    found = read(uri)
    docx_text = found.pop(f"{name}/e.docx")
    assert docx_text.startswith("Rotating keys\nFirst paragraph.")
    assert found == {
        f"{name}/b.txt": "second by name, first in the archive",
        f"{name}/sub/a.jsonl#1": "one",
        f"{name}/sub/a.jsonl#2": "two",
        f"{name}/sub/c.jsonl.gz#1": "packed twice",
        f"{name}/d.parquet#1": "a row",
        f"{name}/long/{'x' * 120}/f.txt": "ünï",
    }


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_says_the_encoding(corpus: tuple[str, Put], encoding: str, name: str) -> None:
    uri, put = corpus
    text = {"a.jsonl": '{"text": "ünï"}\n' * 2, "a.csv": "text\nünï\nünï\n"}.get(name, "ünï")
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    put(name, mark + text.encode(encoding))
    assert set(read(uri).values()) == {"ünï"}


def test_html_may_state_an_encoding_and_others_may_not(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    put("a.html", b'<meta charset="windows-1252"><p>caf\xe9 \x80')
    put("b.html", b'<meta http-equiv="Content-Type" content="text/html; charset=ISO-8859-1"><p>caf\xe9')
    put("c.html", b'<meta charset="punycode"><p>caf\xe9')
    put("d.txt", "no mark".encode("utf-16-le"))
    found = read(uri)
    assert (found["a.html"], found["b.html"]) == ("café €", "café")
    assert found["c.html"].startswith("<not UTF-8")
    assert found["d.txt"].startswith("<unreadable: binary, not text: NUL at character 1")


def test_html_keeps_what_plain_technical_pages_hold() -> None:
    page = """<html><head><title>T</title><style>p {}</style></head><body><nav><a href=/>Home</a></nav>
    <h1>Printers</h1><p>Call <code>f(x)</code> &amp; wait.</p><pre><code>def f(x):
    if x:
        y  = 1</code></pre><table><tr><th>Port</th><th>Use</th></tr><tr><td>22</td><td>ssh</td></tr></table>
    <dl><dt>-v</dt><dd>verbose</dd></dl><div class="sidebar comment">Beware: hot</div>
    <footer>Contact us</footer><script>alert(1)</script><!-- hidden --></body></html>"""
    lines = html_text(page).split("\n")
    for line in (
        "Printers",
        "Call f(x) & wait.",
        "def f(x):",
        "    if x:",
        "        y  = 1",
        "Port\t\tUse",
        "22\t\tssh",
    ):
        assert line in lines
    for line in ("-v", "verbose", "Beware: hot", "Contact us"):
        assert line in lines
    assert not any(word in "\n".join(lines) for word in ("alert", "hidden", "p {}"))


def test_html_of_any_depth_is_read() -> None:
    assert html_text("<div>" * 100_000 + "deep" + "</div>" * 100_000) == "deep"
    assert html_text("") == ""


def test_pdf_and_docx_give_their_text_and_when_they_were_written(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    put("a.docx", docx_of())
    put("b.pdf", pdf_of(b"BT /F1 24 Tf 72 700 Td (Rotating keys) Tj ET"))
    word, pdf = items_of(FilesSource(kind="files", uri=uri))
    assert word.text == "Rotating keys\nFirst paragraph.\nPort\tUse\n22\tssh\nAfter the table."
    assert (pdf.text, pdf.key, pdf.group) == ("Rotating keys", "b.pdf", "b.pdf")
    assert (word.created, pdf.created) == ("2024-01-31T12:00:00Z", "2024-01-31T11:00:00Z")


def test_a_pdf_without_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf_of(b""))
    assert read(str(tmp_path)) == {"a.pdf": "<unreadable: PDF without text: 1 pages; a scan?>"}


def test_without_the_extra_office_files_are_counted_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for package in ("docx", "pypdfium2"):
        (tmp_path / "empty" / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.docx").write_bytes(docx_of())
    (tmp_path / "in" / "b.pdf").write_bytes(pdf_of(b""))
    sandbox.close()
    monkeypatch.syspath_prepend(str(tmp_path / "empty"))
    found = read(str(tmp_path / "in"))
    sandbox.close()
    assert found == {
        "a.docx": "<unreadable: needs the office extra: docx: install forge-ray[office]>",
        "b.pdf": "<unreadable: needs the office extra: pypdfium2: install forge-ray[office]>",
    }


SIDES = {"licence_field": "lic", "language_field": "lang", "created_field": "when", "group_field": "who"}
RECORDS = [
    {
        "text": "a",
        "lic": "MIT",
        "lang": "en-US",
        "when": "2024-01-31T12:00:00+01:00",
        "who": "acme",
        "b": "2",
        "a": "1",
    },
    {"text": "b"},
    {"text": "c", "lang": "klingon!", "when": "yesterday"},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_records_say_licence_language_time_group_and_more(corpus: tuple[str, Put], name: str) -> None:
    uri, put = corpus
    names = list(RECORDS[0])
    if name == "a.jsonl":
        put(name, "\n".join(map(json.dumps, RECORDS)).encode())
    elif name == "a.csv":
        put(name, csv_of([names, *([record.get(field, "") for field in names] for record in RECORDS)]))
    else:
        sink = io.BytesIO()
        pq.write_table(pa.table({field: [record.get(field) for record in RECORDS] for field in names}), sink)
        put(name, sink.getvalue())
    source = FilesSource(kind="files", uri=uri, licence="CC0-1.0", metadata_fields=("b", "a"), **SIDES)
    one, two, three = items_of(source)
    assert one == Document(
        f"{name}#1", one.source, "acme", "MIT", "a", "en", "2024-01-31T11:00:00Z", '{"a":"1","b":"2"}'
    )
    assert two == Document(f"{name}#2", two.source, f"{name}#2", "CC0-1.0", "b")
    # What was stated and cannot be used is kept.
    assert (three.language, three.created) == ("", "")
    assert json.loads(three.metadata) == {"lang": "klingon!", "when": "yesterday"}


def test_metadata_is_equal_for_equal_values_and_bounded(tmp_path: Path) -> None:
    lines = [
        '{"text": "x", "m": {"b": 1, "a": [1.5, null, "é"]}}',
        '{"m": {"a": [1.50, null, "\\u00e9"], "b": 1}, "text": "x"}',
    ]
    lines.append(json.dumps({"text": "y", "m": "z" * (2 << 20)}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    one, two, three = items_of(FilesSource(kind="files", uri=str(tmp_path), metadata_fields=("m",)))
    assert one.metadata == two.metadata == '{"m":{"a":[1.5,null,"é"],"b":1}}'
    assert (three.text, three.metadata) == ("y", "")


def test_times_and_numbers_of_parquet_become_text(tmp_path: Path) -> None:
    when = datetime(2024, 1, 31, 12, tzinfo=timezone(timedelta(hours=1)))
    table = pa.table({"text": ["a"], "created": [when], "group": [7], "m": [[1, 2]], "n": [2.5]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = FilesSource(kind="files", uri=str(tmp_path), group_field="group", metadata_fields=("m", "n", "gone"))
    [item] = items_of(source)
    assert (item.created, item.group, item.metadata) == ("2024-01-31T11:00:00Z", "7", '{"m":[1,2],"n":2.5}')


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        ("2024-01-31", "2024-01-31"),
        ("20240131", "2024-01-31"),
        ("2024-01-31T12:00:00Z", "2024-01-31T12:00:00Z"),
        ("2024-01-31 12:00:00.5+02:00", "2024-01-31T10:00:00Z"),
        ("2024-01-31T12:00", "2024-01-31T12:00:00"),
        ("2024-02-31", ""),
        ("0001-01-01T00:00:00+14:00", ""),
        ("1706702400", ""),
        ("", ""),
    ],
)
def test_only_iso_8601_is_a_time(stated: str, kept: str) -> None:
    assert moment(stated) == kept


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.TXT", ("text", "")),
        ("a.jsonl.GZ", ("jsonl", "gz")),
        ("a.tgz", ("tar", "gz")),
        ("a.tar.zst", ("tar", "zst")),
        ("a.parquet.gz", None),
        ("a.zip.gz", None),
        ("a.gz", None),
        ("txt", None),
        (".txt", ("text", "")),
        ("a.txt.bak", None),
    ],
)
def test_the_name_says_the_format(name: str, expected: tuple[str, str] | None) -> None:
    assert format_of(name) == expected


def test_the_same_bytes_give_the_same_documents(corpus: tuple[str, Put]) -> None:
    uri, put = corpus
    put("a.jsonl", b"\n".join(b'{"text": "%d"}' % i for i in range(500)))
    put("b.html", b"<p>a<ul><li>b</ul>" * 50)
    put("c.parquet", parquet([str(i) for i in range(500)]))
    put("d.docx", docx_of())
    source = FilesSource(kind="files", uri=uri)
    first = items_of(source)
    sandbox.close()
    assert items_of(source) == first
