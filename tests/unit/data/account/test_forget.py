"""`forge data forget`: tombstones, the build without the documents, and the deleting of what held them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from forge_ray import cli, garbage, pipeline
from forge_ray.artifact import FileEntry, Workspace, cache_folder, digest_file
from forge_ray.config import IngestConfig
from forge_ray.data import ingest
from forge_ray.data.account import builds, erase, explain, forget, ledger
from forge_ray.errors import CorruptError, DataError
from tests.unit.data.small_job import Job, holders, in_one_process

EACH_KIND = ("guide/07.txt", "posts.jsonl#2", "old.tar.gz/inner/1.md", "note.txt.gz")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The job with all its artifacts; not to be changed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_one_process(monkeypatch)
        job = Job(tmp_path_factory.mktemp("job"))
        job.run()
    return job


@pytest.fixture
def job(ran: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The same over a copy of its workspace."""
    in_one_process(monkeypatch)
    return ran.copied(tmp_path)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job with files of its own, not run yet."""
    in_one_process(monkeypatch)
    return Job(tmp_path)


class Killed(BaseException):
    """What ends a process here and passes every handler, as `kill -9` would."""


def call(job: Job, *words: str) -> dict[str, Any]:
    """`forge data forget`, which must succeed; its JSON."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert cli.main(["data", "forget", *words, str(job.yaml), "--json"]) == 0
    result: dict[str, Any] = json.loads(told.getvalue())
    return result


def keys(job: Job) -> set[str]:
    """What the newest build has kept."""
    rows = [row for file in builds.files(builds.latest(job.workspace)) for row in file.rows(None, 1000)]
    return {row["key"] for row in rows if row["fate"] == ledger.KEPT}


def test_the_next_build_leaves_files_records_members_and_operations_out(job: Job) -> None:
    job.settings["ingest"]["sources"].append({"kind": "botocore", "services": ["sts"]})
    job.save()
    job.run()
    operation = next(key for key in sorted(keys(job)) if key.startswith("botocore:sts/"))
    names = [*EACH_KIND, operation]
    before = keys(job)
    result = call(job, *names, "--reason", "asked by mail")
    assert [row["key"] for row in result["forgotten"]] == names
    assert {stone["why"] for stone in result["tombstones"]} == {"asked by mail"}
    assert keys(job) == before  # nothing is built yet
    job.run()
    assert keys(job) == before - set(names)
    rows = [row for file in builds.files(builds.latest(job.workspace)) for row in file.rows(None, 1000)]
    assert {row["key"] for row in rows if row["fate"] == ledger.FORGOTTEN} == set(names)
    assert job.workspace.resolve("ingest").metrics["forgotten"] == len(names)


def test_only_what_held_them_is_written_anew(own: Job) -> None:
    own.run()
    (own.docs / "guide/99.txt").write_text("A new file of a new generation. " * 20)
    (own.docs / "guide/98.txt").write_text("Another one beside it, which stays. " * 20)
    before = own.run()
    call(own, "guide/99.txt")
    after = own.run()
    assert "guide/99.txt" not in keys(own)
    assert "guide/98.txt" in keys(own)
    for stage in ("ingest", "curate", "tokenize"):
        stay = {entry.sha256 for entry in before[stage].manifest.files if entry.name.startswith(("train", "heldout"))}
        left = {entry.sha256 for entry in after[stage].manifest.files if entry.name.startswith(("train", "heldout"))}
        assert (len(stay - left), len(left - stay)) == (1, 1), stage


def test_a_dry_run_writes_nothing(job: Job) -> None:
    every = sorted(job.workspace.storage.list(""))
    result = call(job, "guide/07.txt", "--erase", "--dry-run")
    assert result["dry_run"]
    assert [row["key"] for row in result["forgotten"]] == ["guide/07.txt"]
    assert len(result["places"]) == 1
    assert sorted(job.workspace.storage.list("")) == every


def test_tombstones_of_one_corpus_leave_the_fingerprints_of_another_alone(job: Job, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for i in range(30):
        (tmp_path / "other" / f"{i}.txt").write_text(f"Another corpus altogether, document {i}. " * 5)
    other = IngestConfig(sources=({"kind": "files", "uri": str(tmp_path / "other")},))
    frozen = ingest.observe(other, job.workspace)
    mine = ingest.observe(job.config.ingest, job.workspace)
    call(job, "guide/07.txt")
    assert ingest.observe(other, job.workspace) == frozen
    assert ingest.observe(job.config.ingest, job.workspace) != mine


def test_a_renamed_and_moved_source_does_not_bring_it_back(own: Job, tmp_path: Path) -> None:
    own.run()
    call(own, *EACH_KIND)
    own.docs.rename(tmp_path / "moved")
    own.settings["ingest"]["sources"] = [{"kind": "files", "uri": str(tmp_path / "moved"), "name": "archive"}]
    own.save()
    own.run()
    assert keys(own)
    assert not keys(own).intersection(EACH_KIND)


def test_without_its_duplicates_one_takes_its_place_and_with_them_none_does(job: Job) -> None:
    result = call(job, "guide/05.txt", "--erase")
    (copy,) = result["duplicates_left"]
    assert copy["key"] == "guide/copy.txt"
    assert any(copy["id"] in text for text in result["erasures"][0]["left"])
    assert "guide/copy.txt" in keys(job)
    # The document is forgotten by now; what said the same is still known.
    result = call(job, "guide/05.txt", "--duplicates")
    assert {row["key"] for row in result["forgotten"]} == {"guide/05.txt", "guide/copy.txt"}
    job.run()
    assert not keys(job) & {"guide/05.txt", "guide/copy.txt"}


def test_earlier_versions_of_a_document_are_named_and_can_be_erased_by_their_ids(own: Job) -> None:
    own.run()
    old = own.text_of("guide/07.txt")
    own.write("guide/07.txt", "It was rewritten and says something else altogether by now. " * 5)
    own.run()
    assert holders(own.workspace, old)
    (version,) = call(own, "guide/07.txt", "--erase")["other_versions"]
    assert holders(own.workspace, old)
    call(own, version["id"], "--erase")
    assert holders(own.workspace, old) == []
    assert call(own, "guide/07.txt")["other_versions"] == []


def test_a_tombstone_is_written_once_and_keeps_its_reason(job: Job) -> None:
    first = call(job, "guide/07.txt", "--reason", "first")["tombstones"]
    assert call(job, "guide/07.txt", "--reason", "second")["tombstones"] == first


def test_what_was_skipped_cannot_be_forgotten_and_nothing_is(job: Job) -> None:
    assert cli.main(["data", "forget", "guide/07.txt", str(job.docs / "short.txt"), str(job.yaml)]) == 5
    assert forget.tombstones(job.workspace) == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("forget",), 2),
        (("forget", "guide/07.txt", "--erase"), 2),
        (("forget", "no/such.txt"), 4),
        (("forget", "guide/07.txt", "--reason"), 2),
        (("forget", "guide/07.txt", "--resaon", "x"), 2),
        (("why", "guide/07.txt", "--reason", "x"), 2),
        (("why", "guide/07.txt", "--erase"), 2),
        (("why",), 2),
        (("forgte", "guide/07.txt"), 2),
        (("report", "--examples", "many"), 2),
    ],
)
def test_wrong_words_are_refused(job: Job, words: tuple[str, ...], code: int) -> None:
    assert cli.main(["data", *words, f"--workspace={job.workspace.uri}"]) == code
    assert forget.tombstones(job.workspace) == []


# ------------------------------------------------------------------------------------------------------------ erasing


def test_after_erasing_no_file_of_the_workspace_holds_text_or_tokens(job: Job) -> None:
    said = {key: job.text_of(key) for key in EACH_KIND}
    curated = job.workspace.resolve("curate")
    (features,) = [entry for entry in curated.manifest.files if entry.name.startswith("features/train")]
    for key, text in said.items():
        kinds = {Path(name).parts[0] for name in holders(job.workspace, text)}
        assert kinds == {"blobs"}, key
        assert len(holders(job.workspace, text)) >= 3, key  # read, cleaned, tokenized
    result = call(job, *EACH_KIND, "--erase", "--reason", "asked by mail")
    for key, text in said.items():
        assert holders(job.workspace, text) == [], key
    assert not job.workspace.has_blob(features)  # hashes of their lines and words
    (record,) = result["erasures"]
    stored = json.loads(job.workspace.storage.read_bytes(record["record"]))
    assert [row["key"] for row in stored["documents"]] == list(EACH_KIND)
    assert stored["why"] == "asked by mail"
    assert any("posts.jsonl#2" in text for text in stored["left"])
    assert not any(job.workspace.has_blob(FileEntry("", **blob)) for blob in stored["blobs"])


def test_what_did_not_hold_them_keeps_its_bytes_and_its_time(job: Job) -> None:
    result = call(job, "posts.jsonl#2", "--erase")
    gone = {blob["sha256"] for blob in result["erasures"][0]["blobs"]}
    assert gone
    for path in Path(job.workspace.uri, "blobs").rglob("*"):
        if path.is_file():
            assert digest_file(path) == path.name
    before = {path: path.stat().st_mtime_ns for path in Path(job.workspace.uri, "blobs").rglob("*") if path.is_file()}
    assert call(job, "posts.jsonl#2", "--erase")["erasures"] == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_after_erasing_show_gc_why_and_the_job_still_work(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    old = job.workspace.resolve("tokenize")
    result = call(job, "guide/07.txt", "--erase")
    assert cli.main(["show", old.ref, f"--workspace={job.workspace.uri}"]) == 0
    assert old.ref in capsys.readouterr().out
    idle = {name for name, _ in garbage.find(job.workspace, grace_s=0.0)}
    used = {entry.sha256 for artifact in job.run().values() for entry in artifact.manifest.files}
    assert not {name.rpartition("/")[2] for name in idle} & used
    for artifact in job.run().values():
        for name in artifact.names():
            artifact.local_path(name)
    answer = explain.why(job.workspace, "guide/07.txt", builds.latest(job.workspace))
    assert answer.found.row["fate"] == ledger.FORGOTTEN
    assert [record["record"] for record in answer.erasures] == [result["erasures"][0]["record"]]
    assert answer.places[0].shard in {blob["sha256"] for blob in result["erasures"][0]["blobs"]}


def test_reading_what_was_erased_says_so(job: Job) -> None:
    old = job.workspace.resolve("tokenize")
    result = call(job, "guide/07.txt", "--erase")
    gone = {blob["sha256"] for blob in result["erasures"][0]["blobs"]}
    (name,) = [entry.name for entry in old.manifest.files if entry.sha256 in gone]
    with pytest.raises(CorruptError, match="erased on purpose") as raised:
        old.local_path(name)
    assert result["erasures"][0]["record"] in str(raised.value)
    lost = next(name for name in job.workspace.resolve("tokenize").names(".tok"))
    job.workspace.delete_blob(job.workspace.resolve("tokenize").entry(lost))
    with pytest.raises(CorruptError, match="is missing"):
        job.workspace.resolve("tokenize").local_path(lost)


def test_builds_of_other_jobs_and_leftovers_of_killed_ones_are_erased_too(job: Job) -> None:
    said = job.text_of("guide/07.txt")
    mine, settings = job.yaml.read_text(), json.loads(json.dumps(job.settings))
    job.settings["ingest"]["held_out_frac"] = 0.2
    job.settings["curate"] = {}
    job.save()
    other = job.run()["ingest"].ref
    stray = next(name for name in holders(job.workspace, said))
    for ref in job.workspace.refs_of_artifacts():  # as if that run had been killed before it published
        if ref.startswith("tokenize/") and ref != job.workspace.resolve("tokenize").ref:
            job.workspace.storage.delete(f"artifacts/{ref}.json")
    assert stray
    job.settings = settings
    job.yaml.write_text(mine)
    result = call(job, "guide/07.txt", "--erase")
    assert holders(job.workspace, said) == []
    assert result["erasures"][0]["other_jobs"] == [other]


def test_copies_in_this_machines_caches_go_too(job: Job) -> None:
    tokenize = job.workspace.resolve("tokenize")
    place = explain.why(job.workspace, "guide/07.txt", builds.latest(job.workspace)).places[0]
    kept = next(entry for entry in tokenize.manifest.files if entry.sha256 != place.shard)
    copies = [cache_folder(kind) / digest for kind in ("blobs", "shards") for digest in (place.shard, kept.sha256)]
    for path in copies:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a copy")
    call(job, "guide/07.txt", "--erase")
    assert [path.exists() for path in copies] == [False, True] * 2


def test_features_that_a_build_without_the_document_has_too_are_kept(job: Job) -> None:
    """A document that was dropped at once leaves features and a cleaned part that do not know it."""
    job.settings["curate"]["licences"] = {"allow": ["CC-BY-4.0"]}
    job.save()
    job.run()
    assert explain.why(job.workspace, "posts.jsonl#2", builds.latest(job.workspace)).found.row["step"] == "licences"
    call(job, "posts.jsonl#2", "--erase")
    for artifact in job.run().values():
        for name in artifact.names():
            artifact.local_path(name)


Kill = Callable[[pytest.MonkeyPatch], None]


def _before_the_build(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipeline, "run", _killed)


def _before_the_record(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(erase, "_record", _killed)


def _before_deleting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(erase, "_finish", _killed)


def _while_deleting(patch: pytest.MonkeyPatch) -> None:
    calls = []
    delete = type(Workspace("/").storage).delete

    def some(storage: Any, name: str) -> None:
        if name.startswith("blobs/"):
            calls.append(name)
        if len(calls) > 3:
            raise Killed
        delete(storage, name)

    patch.setattr(type(Workspace("/").storage), "delete", some)


def _before_it_is_done(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(erase, "_clear_caches", _killed)


def _killed(*args: object, **named: object) -> None:
    raise Killed


@pytest.mark.parametrize(
    "kill", [_before_the_build, _before_the_record, _before_deleting, _while_deleting, _before_it_is_done]
)
def test_the_same_command_finishes_what_a_killed_one_began(job: Job, kill: Kill) -> None:
    said = job.text_of("guide/07.txt")
    words = ["guide/07.txt", "--erase", "--reason", "asked by mail"]
    with pytest.MonkeyPatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            call(job, *words)
    result = call(job, *words)
    assert len(result["erasures"]) == 1
    assert holders(job.workspace, said) == []
    assert erase.unfinished(job.workspace) == []
    assert result["erasures"][0]["why"] == "asked by mail"
    for artifact in job.run().values():
        for name in artifact.names():
            artifact.local_path(name)


def test_nothing_is_deleted_while_the_new_build_holds_the_document(job: Job) -> None:
    made = list(job.run().values())
    every = job.workspace.storage.list("blobs")
    row = explain.why(job.workspace, "guide/07.txt", builds.latest(job.workspace)).found.row
    with pytest.raises(DataError, match="still holds"):
        erase.erase(job.workspace, [row], "", made)
    assert job.workspace.storage.list("blobs") == every


def test_a_running_stage_is_named(job: Job) -> None:
    with job.workspace.active("pretrain", "f" * 16):
        assert call(job, "guide/07.txt", "--dry-run")["running"][0].startswith(f"pretrain/{'f' * 16} on ")


def test_keys_of_places_in_files_belong_to_their_files() -> None:
    places = ("a.jsonl#7", "b.zip/in/c.txt", "d.txt", "botocore:sqs/2012-11-05/SendMessage", "a.jsonl#9")
    stones = [{"id": str(number), "key": key} for number, key in enumerate(places)]
    found = forget.by_file(stones, {"a.jsonl", "b.zip", "e.txt", "botocore:sqs", "botocore:s3"})
    assert found == {"a.jsonl": ["0", "4"], "b.zip": ["1"], "botocore:sqs": ["3"]}


def test_erasing_on_an_object_store(own: Job, store_uri: str, tmp_path: Path) -> None:
    own.workspace = Workspace(store_uri)
    own.settings["workspace"] = store_uri
    own.save()
    own.run()
    said = own.text_of("guide/07.txt")
    assert holders(_downloaded(own.workspace, tmp_path / "before"), said)
    call(own, "guide/07.txt", "--erase")
    assert holders(_downloaded(own.workspace, tmp_path / "after"), said) == []
    for artifact in own.run().values():
        for name in artifact.names():
            artifact.local_path(name)


def _downloaded(workspace: Workspace, folder: Path) -> Workspace:
    for name in workspace.storage.list(""):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        workspace.storage.fetch(name, folder / name)
    return Workspace(str(folder))


def test_ngrams_of_held_out_documents_go_with_one_of_them(own: Job) -> None:
    own.settings["curate"]["decontaminate"] = {"enabled": True}
    own.save()
    own.run()
    rows = [row for file in builds.files(builds.latest(own.workspace)) for row in file.rows(None, 1000)]
    kept = [row for row in rows if row["fate"] == ledger.KEPT]
    held_out, training = (next(row["id"] for row in kept if row["split"] == split) for split in ("heldout", "train"))
    call(own, training, "--erase")
    assert ngrams(own)
    assert own.workspace.storage.list("memo/evaluation")
    call(own, held_out, "--erase")
    assert ngrams(own) == own.workspace.storage.list("memo/evaluation") == []


def ngrams(job: Job) -> list[str]:
    """Files of n-grams, whatever remembers them."""
    found = []
    for name in job.workspace.storage.list("blobs"):
        path = job.workspace.storage.local_path(name)
        if path is not None and path.read_bytes()[:6] == b"ARROW1" and "gram" in pa.ipc.open_file(path).schema.names:
            found.append(name)
    return found
