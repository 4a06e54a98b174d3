"""Documents read from real S3, GCS and Azure servers that fail, and that die in the middle and come back."""

from __future__ import annotations

import gzip
import io
import json
import random
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray import retry
from forge_ray.config import FilesSource, IngestConfig
from forge_ray.data.reading import formats, sources
from forge_ray.data.reading.formats import Document, Skipped
from forge_ray.storage import Storage
from tests.integration.stores import SERVERS, Faults, Server, reach, running

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=list(SERVERS))
def server(request: pytest.FixtureRequest) -> Iterator[tuple[Server, str]]:
    """A running store of each kind, and the URI of its bucket."""
    with running(request.param, "forge-sources") as found:
        yield found


@pytest.fixture
def corpus(server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> FilesSource:
    """Small files, records and an archive in a folder of the store."""
    reach(server[0], monkeypatch)
    store = Storage(f"{server[1]}/{uuid.uuid4().hex}")
    draw = random.Random(1)
    texts = [f"{i} " + draw.randbytes(600).hex() for i in range(4000)]
    for i in range(40):
        store.write(f"small/{i:02d}.txt", texts[i].encode())
    store.write("empty.txt", b"")
    store.write("gr\u00fc\u00dfe mit leer.md", b"odd name")
    store.write("big.jsonl.gz", gzip.compress("\n".join(json.dumps({"text": text}) for text in texts).encode(), 1))
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts[:2000]}), sink, compression="none")
    store.write("rows.parquet", sink.getvalue())
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("inner.txt", texts[0])
    store.write("a.zip", sink.getvalue())
    return FilesSource(kind="files", uri=store.uri)


def read(source: FilesSource) -> list[Document | Skipped]:
    return list(formats.read(formats.unit(source, formats.listing(source)), IngestConfig()))


def test_everything_arrives_once_whatever_the_store_does_in_between(
    server: tuple[Server, str], corpus: FilesSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_READ_AHEAD_BYTES", 256 << 10)
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.02)
    whole = read(corpus)
    assert len(whole) == 40 + 2 + 4000 + 2000 + 1
    assert all(isinstance(item, Document) for item in whole)
    assert len({item.key for item in whole}) == len(whole)
    faults = Faults(unavailable_frac=0.1, reset_frac=0.1, cut_frac=0.1, seed=3)
    with server[0].proxy.injecting(faults) as injected:
        assert read(corpus) == whole
    assert {kind for *_, kind in injected} >= {"unavailable", "reset", "cut"}


def test_a_store_that_is_killed_in_the_middle_and_comes_back_is_waited_for(
    server: tuple[Server, str], corpus: FilesSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_READ_AHEAD_BYTES", 256 << 10)
    whole = read(corpus)
    unit = formats.unit(corpus, formats.listing(corpus))
    items = formats.read(unit, IngestConfig())
    found = [next(items) for _ in range(30)]
    time.sleep(server[0].settles_s)
    server[0].kill()

    def later() -> None:
        time.sleep(2)
        server[0].start()

    back = threading.Thread(target=later)
    back.start()
    found += items
    back.join()
    assert found == whole


def test_one_object_is_a_source(corpus: FilesSource) -> None:
    [item] = read(FilesSource(kind="files", uri=f"{corpus.uri}/small/07.txt"))
    assert (item.key, item.text[:2]) == ("07.txt", "7 ")
