"""Input that means harm, or looks like it: counted by its kind, in bounded memory, and the neighbours arrive."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from forge_ray.config import FilesSource, IngestConfig
from forge_ray.data.reading import formats, parsers, records, sandbox, unpack
from forge_ray.data.reading.formats import LARGE, Document

GIB, MIB = 1 << 30, 1 << 20
AFTER = '{"text": "after"}'

# Peak memory of a process that only reads these files; the parsers' processes are its children.
_READER = """
import json, resource, sys
from forge_ray.config import FilesSource, IngestConfig
from forge_ray.data.reading import formats, sandbox, unpack
from forge_ray.data.reading.formats import Document
unpack.FREE_BYTES = 8 << 20
source = FilesSource(kind="files", uri=sys.argv[1])
config = IngestConfig(max_document_bytes=1 << 20)
warm = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = [
    [item.source, "" if isinstance(item, Document) else item.kind, item.text if isinstance(item, Document) else ""]
    for item in formats.read(formats.unit(source, formats.listing(source)), config)
]
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - warm
sandbox.close()
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"found": found, "grown_mib": grown / 1024, "children_mib": children / 1024}))
"""


def read_apart(folder: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Text or `<kind>` by the place below the folder, and the MiB that reading took."""
    done = subprocess.run(
        [sys.executable, "-c", _READER, str(folder)], stdout=subprocess.PIPE, timeout=120, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    out = json.loads(done.stdout)
    return {
        source.removeprefix(f"{folder}/"): f"<{kind}>" if kind else text for source, kind, text in out["found"]
    }, out


def read(folder: Path, **config: int) -> dict[str, str]:
    source = FilesSource(kind="files", uri=str(folder))
    items = formats.read(formats.unit(source, formats.listing(source)), IngestConfig(**config))
    return {
        item.source.removeprefix(f"{folder}/"): item.text if isinstance(item, Document) else f"<{item.kind}>"
        for item in items
    }


def zeros_gz(num_bytes: int) -> bytes:
    """Many members, of which each is made once."""
    return gzip.compress(bytes(64 * MIB), 6) * (num_bytes // (64 * MIB))


def zeros_zlib(num_bytes: int) -> bytes:
    packer = zlib.compressobj(6)
    return b"".join([packer.compress(bytes(MIB)) for _ in range(num_bytes // MIB)] + [packer.flush()])


def zipped(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return sink.getvalue()


def test_lines_of_a_gigabyte_are_read_past_in_bounded_memory(tmp_path: Path) -> None:
    for name, start, end in (
        ("line.jsonl", b'{"text": "before"}\n{"text": "', b'"}\n' + AFTER.encode()),
        ("line.csv", b"text,other\nbefore,1\n", b"\nafter,2\n"),
        ("quote.csv", b'text,other\nbefore,1\n"never closed,', b"\nafter,2\n"),
        ("whole.txt", b"text", b"text"),
    ):
        with (tmp_path / name).open("wb") as sink:
            sink.write(start)
            sink.seek(GIB if "csv" not in name else GIB // 16, os.SEEK_CUR)  # a hole: nothing is on the disk
            sink.write(end)
    found, memory = read_apart(tmp_path)
    assert found == {
        "line.jsonl#1": "before",
        "line.jsonl#2": f"<{LARGE}>",
        "line.jsonl#3": "after",
        "line.csv#1": "before",
        "line.csv#2": f"<{records.NOT_CSV}>",
        "line.csv#3": "after",
        "quote.csv#1": "before",
        "quote.csv#2": f"<{records.NOT_CSV}>",
        "quote.csv#3": "after",
        "whole.txt": f"<{LARGE}>",
    }
    assert memory["grown_mib"] < 100


def test_bombs_of_every_kind_end_early_in_bounded_memory(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(zeros_gz(GIB))
    (tmp_path / "b.jsonl.gz").write_bytes(zeros_gz(GIB))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(bytes(GIB // 16)))
    (tmp_path / "d.csv.zst").write_bytes(zstandard.ZstdCompressor().compress(b"text\n" + bytes(GIB // 16)))
    (tmp_path / "f.tar.zst").write_bytes(zstandard.ZstdCompressor().compress(_tar_of_zeros(GIB // 16)))
    (tmp_path / "g.zip").write_bytes(zipped({"a.txt": b"before", "b.jsonl": bytes(16 * MIB), "c.txt": b"after"}))
    (tmp_path / "z.txt").write_text("after")
    found, memory = read_apart(tmp_path)
    assert found == {
        "a.txt.gz": f"<{LARGE}>",
        "b.jsonl.gz": f"<{unpack.BOMB}>",
        "c.jsonl.zst": f"<{unpack.BOMB}>",
        "d.csv.zst": f"<{unpack.BOMB}>",
        "f.tar.zst/a.jsonl": f"<{unpack.BOMB}>",
        "f.tar.zst": f"<{unpack.BOMB}>",
        "g.zip/a.txt": "before",
        "g.zip/b.jsonl": f"<{unpack.BOMB}>",
        "g.zip/c.txt": f"<{unpack.BOMB}>",
        "z.txt": "after",
    }
    assert memory["grown_mib"] < 100


def _tar_of_zeros(num_bytes: int) -> bytes:
    header = tarfile.TarInfo("a.jsonl")
    header.size = num_bytes
    return header.tobuf() + bytes(num_bytes)


def test_a_bomb_in_an_archive_in_an_archive_is_never_opened(tmp_path: Path) -> None:
    inner = zipped({"deep.txt": bytes(MIB)})
    (tmp_path / "a.zip").write_bytes(zipped({"b.zip": zipped({"c.zip": inner}), "d.tar.gz": b"x", "e.txt": b"here"}))
    assert read(tmp_path) == {
        "a.zip/b.zip": f"<{unpack.NESTED}>",
        "a.zip/d.tar.gz": f"<{unpack.NESTED}>",
        "a.zip/e.txt": "here",
    }


def test_compressed_members_count_against_the_archive_around_them(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(unpack, "FREE_BYTES", MIB)
    # Each layer alone stays below the ratio.
    line = json.dumps({"text": "word " * 60}) + "\n"
    packed = zstandard.ZstdCompressor().compress(line.encode() * 5000)
    (tmp_path / "a.zip").write_bytes(zipped({f"{i:03d}.jsonl.zst": packed for i in range(200)}))
    kinds = set(read(tmp_path).values())
    assert f"<{unpack.BOMB}>" in kinds


def test_zip_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one.txt", "some text")
        archive.writestr("other.txt", "by itself")
        twin = copy.copy(archive.filelist[0])
        twin.filename = "two.txt"
        archive.filelist.append(twin)
    assert read(tmp_path) == {
        "a.zip/one.txt": f"<{unpack.BOMB}>",
        "a.zip/other.txt": "by itself",
        "a.zip/two.txt": f"<{unpack.BOMB}>",
    }


def test_a_table_of_contents_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(unpack, "_DIRECTORY_BYTES", 10_000)
    (tmp_path / "a.zip").write_bytes(zipped({f"{i:05d}.txt": b"x" for i in range(1000)}))
    assert read(tmp_path) == {"a.zip": f"<{unpack.BOMB}>"}


def tar_of(members: list[tarfile.TarInfo], mode: str = "w") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        for member in members:
            member.size = 5 if member.isreg() else 0
            archive.addfile(member, io.BytesIO(b"inner"))
    return sink.getvalue()


UNSAFE = ["/etc/a.txt", "../a.txt", "b/../../a.txt", "C:/a.txt", "..\\a.txt", "b/..\\a.txt"]


def test_names_that_point_out_of_an_archive_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in [*UNSAFE, "good.txt"]:
            archive.writestr(name, "inner")
        link = zipfile.ZipInfo("link.txt")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    (folder / "a.zip").write_bytes(sink.getvalue())
    link_ = tarfile.TarInfo("link.txt")
    link_.type, link_.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard, device = tarfile.TarInfo("hard.txt"), tarfile.TarInfo("dev.txt")
    hard.type, hard.linkname, device.type = tarfile.LNKTYPE, "good.txt", tarfile.CHRTYPE
    names = [tarfile.TarInfo(name) for name in [*UNSAFE, "good.txt"]]
    (folder / "b.tar").write_bytes(tar_of([*names, link_, hard, device]))
    before = sorted(tmp_path.rglob("*"))
    found = read(folder)
    assert {source: text for source, text in found.items() if not text.startswith("<")} == {
        "a.zip/good.txt": "inner",
        "b.tar/good.txt": "inner",
    }
    kinds = list(found.values())
    assert kinds.count(f"<{unpack.UNSAFE_NAME}>") == len({s for s in found if "good" not in s}) - 4
    assert kinds.count(f"<{unpack.NO_FILE}>") == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_twice_in_an_archive_makes_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([tarfile.TarInfo("a.txt"), tarfile.TarInfo("a.txt")]))
    source = FilesSource(kind="files", uri=str(tmp_path))
    one, two = formats.read(formats.unit(source, formats.listing(source)), IngestConfig())
    assert (one.text, two.kind) == ("inner", unpack.TWICE)


@pytest.mark.parametrize("cut", [1, 700, 1024, 1600, -1])
def test_a_torn_tar_says_so_and_keeps_what_came_before(tmp_path: Path, cut: int) -> None:
    whole = tar_of([tarfile.TarInfo("a.txt"), tarfile.TarInfo("b.txt")])[: 4 * 512]
    (tmp_path / "a.tar").write_bytes(whole[:cut] if cut > 0 else whole + b"garbage" * 100)
    found = read(tmp_path)
    assert found.get("a.tar") == f"<{unpack.TORN}>" or found.get("a.tar/b.txt") == f"<{unpack.TORN}>"
    assert found.get("a.tar/a.txt", "inner") in ("inner", f"<{unpack.TORN}>")


def test_a_tar_header_that_asks_for_memory_is_refused(tmp_path: Path) -> None:
    greedy = tarfile.TarInfo("x")
    greedy.type, greedy.size = tarfile.XHDTYPE, 8 * GIB
    (tmp_path / "a.tar").write_bytes(greedy.tobuf() + bytes(4096))
    sparse = tarfile.TarInfo("a.txt")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    (tmp_path / "b.tar").write_bytes(sparse.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    assert read(tmp_path) == {"a.tar": f"<{unpack.TORN}>", "b.tar": f"<{unpack.TORN}>"}


@pytest.mark.parametrize("codec", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage behind", "no such format"])
def test_torn_compression_says_so(tmp_path: Path, codec: str, damage: str) -> None:
    data = os.urandom(200_000).hex().encode()
    whole = gzip.compress(data) if codec == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    torn = {
        "cut": whole[:-30],
        "flipped": whole[:9000] + bytes(50) + whole[9050:],
        "garbage behind": whole + b"garbage!",
        "no such format": b"plain text, wrongly named",
    }[damage]
    (tmp_path / f"a.txt.{codec}").write_bytes(torn)
    (tmp_path / "b.txt").write_text("after")
    assert read(tmp_path) == {f"a.txt.{codec}": f"<{unpack.TORN}>", "b.txt": "after"}


def test_encrypted_and_oddly_packed_zip_members_are_skipped(tmp_path: Path) -> None:
    data = bytearray(zipped({"a.txt": b"secret", "b.txt": b"open"}))
    with zipfile.ZipFile(tmp_path / "l.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.txt", "x")
    directory = data.index(b"PK\x01\x02")
    data[directory + 8] |= 1
    (tmp_path / "e.zip").write_bytes(data)
    assert read(tmp_path) == {
        "e.zip/a.txt": f"<{unpack.CLOSED}>",
        "e.zip/b.txt": "open",
        "l.zip/a.txt": "<unreadable: unknown compression>",
    }


def hostile_docx(num_bytes: int) -> bytes:
    sink = io.BytesIO()
    docx.Document().save(sink)
    with zipfile.ZipFile(sink) as source:
        members = {name: source.read(name) for name in source.namelist()}
    body = members["word/document.xml"]
    members["word/document.xml"] = body.replace(b"<w:body>", b"<w:body>" + b" " * num_bytes)
    return zipped(members)


def pdf_of(stream: bytes, flate: bool = False) -> bytes:
    """A page with this content stream."""
    how = b"/Filter /FlateDecode " if flate else b""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< %s/Length %d >>\nstream\n%s\nendstream" % (how, len(stream), stream),
        b"<< /CreationDate (D:20240131120000+01'00') >>",
    ]
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = len(out)
    out += b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    return bytes(out + b"trailer\n<< /Size 6 /Root 1 0 R /Info 5 0 R >>\nstartxref\n%d\n%%%%EOF" % table)


@pytest.fixture
def small_child(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parsers with less memory and time, so that their end comes soon."""
    sandbox.close()
    monkeypatch.setattr(sandbox, "MEMORY_BYTES", 300 * MIB)
    monkeypatch.setattr(sandbox, "CPU_S", 0)
    yield
    sandbox.close()


def one_value_parquet(size: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"text": ["x" * size]}), sink, compression="zstd", use_dictionary=False, write_statistics=False
    )
    return sink.getvalue()


@pytest.mark.usefixtures("small_child")
@pytest.mark.parametrize(
    ("name", "make", "kinds"),
    [
        ("bomb.docx", lambda: hostile_docx(40 * MIB), {unpack.BOMB}),
        (
            "bomb.pdf",
            lambda: pdf_of(zeros_zlib(100 * MIB), flate=True),
            {"unreadable: PDF without text", sandbox.CRASHED},
        ),
        ("large.parquet", lambda: one_value_parquet(150 * MIB), {"unreadable: needs too much memory"}),
        ("slow.html", lambda: b"".join(b"<font size=%d>" % i for i in range(60_000)) + b"<p>" * 60_000, {sandbox.SLOW}),
        ("wide.html", lambda: b"<ul><li>a" * 30_000, None),
    ],
)
def test_parsers_are_stopped_by_their_limits_and_the_next_file_is_read(
    tmp_path: Path, name: str, make: Callable[[], bytes], kinds: set[str] | None
) -> None:
    (tmp_path / name).write_bytes(make())
    (tmp_path / "z.html").write_text("<p>after")
    found = read(tmp_path, max_document_bytes=4 * MIB)
    assert found.pop("z.html") == "after"
    if kinds is None:
        assert not found[name].startswith("<")
        assert len(found[name]) < MIB
    else:
        assert found[name] in {f"<{kind}>" for kind in kinds}


def test_a_parser_that_crashes_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<p>before")
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.7\n" + os.urandom(3000))
    (tmp_path / "c.html").write_text("<p>after")
    source = FilesSource(kind="files", uri=str(tmp_path))
    items = formats.read(formats.unit(source, formats.listing(source)), IngestConfig())
    assert next(items).text == "before"
    for child in sandbox._idle:
        child._process.kill()
    kinds = [item.kind if not isinstance(item, Document) else item.text for item in items]
    assert kinds == ["unreadable: not PDF", "after"]


@pytest.mark.parametrize("answer", ["['x']", "b'\\xff' * 9", "'exit'", "b'\\x7f\\xff\\xff\\xff'"])
def test_a_child_that_was_taken_over_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """A stand-in for the parsers that answers what none of them would."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(
        "import sys, os\n"
        "sys.stdin.buffer.read(8)\n"
        f"answer = {answer}\n"
        "if answer == 'exit': os._exit(3)\n"
        "data = answer if isinstance(answer, bytes) else b'\\x91\\xa1x'\n"
        "if isinstance(answer, bytes) and len(answer) == 4: os.write(1, answer)\n"
        "else: os.write(1, len(data).to_bytes(4, 'big') + data)\n"
    )
    sandbox.close()
    monkeypatch.setattr(parsers, "__file__", str(stand_in))
    with pytest.raises(unpack.Unreadable) as caught:
        list(sandbox.parse("html", 1000, data=b"<p>"))
    assert caught.value.kind == sandbox.CRASHED
    assert not sandbox._idle


def test_the_children_have_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert not [name for name in sandbox._environment() if "KEY" in name or "AWS" in name]


def test_parquet_that_repeats_one_value_for_ever_is_a_bomb(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(unpack, "FREE_BYTES", 4 * MIB)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 50_000]))
    pq.write_table(pa.table({"text": column.cast(pa.string())}), tmp_path / "a.parquet")
    source = FilesSource(kind="files", uri=str(tmp_path))
    kinds = [
        getattr(item, "kind", "")
        for item in formats.read(formats.unit(source, formats.listing(source)), IngestConfig())
    ]
    assert kinds[-1] == unpack.BOMB
    assert len(kinds) < 2000


def test_parquet_with_columns_of_every_kind(tmp_path: Path) -> None:
    tables = {
        "binary": pa.table({"text": pa.array([b"plain", b"caf\xe9"])}),
        "dictionary": pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}),
        "large": pa.table({"text": pa.array(["x", "y" * 2000], pa.large_string())}),
        "list": pa.table({"text": pa.array([["a"], None])}),
        "nested": pa.table({"text": pa.array([{"text": "inner"}])}),
        "groups": pa.table({"text": [str(i) for i in range(10)]}),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=3 if name == "groups" else None)
    found = read(tmp_path, max_document_bytes=1000)
    assert {name: [found[f"{name}.parquet#{i + 1}"] for i in range(len(table))] for name, table in tables.items()} == {
        "binary": ["plain", "<not UTF-8>"],
        "dictionary": ["a", "b", "a"],
        "large": ["x", f"<{LARGE}>"],
        "list": [f"<{records.NO_STRING}>"] * 2,
        "nested": [f"<{records.NO_STRING}>"],
        "groups": [str(i) for i in range(10)],
    }


def test_parquet_with_one_name_for_two_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    assert read(tmp_path) == {"a.parquet": "<unreadable: two columns of one name>"}


def test_any_cut_or_flip_of_a_parquet_file_is_survived(tmp_path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [f"document {i} " * 20 for i in range(40)]}), sink)
    whole = sink.getvalue()
    step = len(whole) // 12
    for at in range(0, len(whole), step):
        (tmp_path / f"cut{at:06d}.parquet").write_bytes(whole[:at])
        flipped = bytearray(whole)
        flipped[at : at + 8] = b"\xff" * 8
        (tmp_path / f"flip{at:06d}.parquet").write_bytes(flipped)
    (tmp_path / "z.txt").write_text("after")
    found = read(tmp_path)
    assert found["z.txt"] == "after"
    assert {name.partition("#")[0] for name in found if "cut" in name} == {p.name for p in tmp_path.glob("cut*")}
    assert all(text.startswith("<unreadable") for name, text in found.items() if "cut" in name)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"text": "a", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", records.NOT_JSON),
        (b'{"text": "n", "x": ' + b"9" * 200_000 + b"}", None),
        (b'{"text": ' + b"9" * 200_000 + b"}", records.NOT_JSON),
        (b'{"text": "n", "x": 1e999999}', None),
        (b'{"text": "n", "x": NaN}', None),
        (b'{"text": ' + b"[{}," * 300_000 + b"1]}", records.NOT_JSON),
        (b"\0" * 5000, records.NOT_JSON),
        (b'{"text": "x"}{"text": "y"}', records.NOT_JSON),
        (b"\xef\xbb\xbf", records.NOT_JSON),
    ],
    ids=range(9),
)
def test_odd_json(tmp_path: Path, line: bytes, kind: str | None) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + line + b"\n" + AFTER.encode())
    found = read(tmp_path)
    assert (found["a.jsonl#1"], found["a.jsonl#3"]) == ("before", "after")
    assert found["a.jsonl#2"] == (f"<{kind}>" if kind else "n")
