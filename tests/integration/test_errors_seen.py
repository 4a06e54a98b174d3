"""What a person sees when something is wrong: one clear error, its exit code, and nothing half-done."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import TINY, Finished, Forge


@pytest.fixture
def fresh(forge: Forge, tmp_path: Path) -> Forge:
    """`forge` on an empty workspace."""
    return Forge(tmp_path / "workspace", forge.environment)


def _files(uri: object) -> list[str]:
    return [
        f"--ingest.sources=[{{kind: files, uri: '{uri}'}}]",
        "--ingest.held_out_frac=0.3",
        "--ingest.held_out_groups=[]",
    ]


@pytest.mark.parametrize(("uri", "code"), [("/no/such/folder", 3), ("nosuch://bucket/x", 3)])
def test_a_wrong_uri_is_named(fresh: Forge, uri: str, code: int) -> None:
    done = fresh("ingest", str(TINY), "--json", *_files(uri))
    assert (done.code, uri in done.stdout) == (code, True), done.stderr


def test_an_empty_corpus_says_what_was_looked_for(fresh: Forge, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "picture.png").write_bytes(b"\x89PNG")
    done = fresh("ingest", str(TINY), "--json", *_files(tmp_path / "docs"))
    assert done.code == 5
    assert ".jsonl" in done.result["wanted"]


def test_bad_documents_are_counted_and_listed_and_the_rest_goes_on(fresh: Forge, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for number in range(12):
        (docs / f"good{number}.txt").write_text(
            f"Document {number} says that every bucket has a name and a region. " * 4
        )
    (docs / "latin1.txt").write_bytes(
        "Die Größe des Behälters wird in Litern angegeben, nicht in Metern.".encode("latin-1") * 3
    )
    (docs / "tiny.txt").write_text("no")
    done = fresh("ingest", str(TINY), "--json", *_files(docs))
    assert done.code == 0, done.stderr
    metrics = done.result["stages"]["ingest"]["metrics"]
    assert metrics["train_documents"] + metrics["heldout_documents"] == 12
    assert sum(metrics["skipped"].values()) == 2
    assert any("UTF-8" in reason for reason in metrics["skipped"])
    assert "latin1.txt" in done.stderr


def test_a_vocabulary_larger_than_the_corpus_supports_says_what_is_possible(
    forge: Forge, ran: Finished, fresh: Forge
) -> None:
    done = fresh("tokenizer", str(TINY), "--json", "--tokenizer.vocab_size=60000")
    assert done.code == 5
    assert "60000" in done.result["got"]
    assert "tokenizer.vocab_size" in done.result["do"]


def test_a_busy_port_is_named_before_anything_starts(forge: Forge, ran: Finished) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = forge("serve", str(TINY), "--json", f"--serve.port={port}")
    assert done.code == 8, done.stderr
    assert str(port) in done.stdout


def test_an_address_that_others_reach_is_refused(forge: Forge, ran: Finished) -> None:
    done = forge("serve", str(TINY), "--json", "--serve.host=0.0.0.0")
    assert done.code == 8
    assert "0.0.0.0" in done.result["got"]


def test_a_cluster_that_does_not_answer_is_named(fresh: Forge) -> None:
    done = fresh("ingest", str(TINY), "--json", "--ray.address=127.0.0.1:1")
    assert done.code == 2, done.stderr[-2000:]
    assert "127.0.0.1:1" in done.result["got"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_at_a_checkpoint_ends_the_run_and_once_there_is_room_it_goes_on(
    forge: Forge, ran: Finished, small_disk: Path
) -> None:
    """The error comes from one of two workers while the other waits for it: nothing may hang."""
    shutil.copytree(forge.workspace, small_disk / "workspace")
    on_it = Forge(small_disk / "workspace", forge.environment)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 300_000))
    full = on_it("pretrain", str(TINY), "--json", "--pretrain.seed=21")
    assert full.code == 3, full.stderr[-3000:]
    assert full.result["error"] == "DiskFullError"
    assert "free space" in full.result["do"]
    filler.unlink()
    done = on_it("pretrain", str(TINY), "--json", "--pretrain.seed=21")
    assert done.code == 0, done.stderr[-3000:]
