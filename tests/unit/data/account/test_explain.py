"""`forge data why`: the fate of one document, told from the ledger of real builds."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_ray import cli
from forge_ray.artifact import Manifest
from forge_ray.data import tokenizer
from forge_ray.data.account import builds, explain, ledger
from forge_ray.data.account.explain import Answer
from forge_ray.data.shards import Shard
from forge_ray.errors import ArtifactError, NotFoundError
from forge_ray.events import Events
from tests.unit.data.small_job import MAIL, Job, in_one_process, text


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The job with all its artifacts; not to be changed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_one_process(monkeypatch)
        job = Job(tmp_path_factory.mktemp("job"))
        job.run()
        yield job


@pytest.fixture
def job(ran: Job, tmp_path: Path) -> Job:
    """The same with a copy of its workspace, to be changed."""
    return ran.copied(tmp_path)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose files may be changed too."""
    in_one_process(monkeypatch)
    job = Job(tmp_path)
    job.run()
    return job


def why(job: Job, name: str) -> Answer:
    return explain.why(job.workspace, name, builds.latest(job.workspace))


def test_the_place_it_names_holds_the_documents_tokens(ran: Job) -> None:
    build = builds.latest(ran.workspace)
    assert build.tokenize
    vocabulary = tokenizer.load(ran.workspace.get(f"tokenizer/{build.tokenize.manifest.inputs['tokenizer']}"))
    for key in ("guide/05.txt", "posts.jsonl#2", "old.tar.gz/inner/1.md", "note.txt.gz"):
        (place,) = why(ran, key).places
        assert build.tokenize.entry(place.name).sha256 == place.shard
        tokens = Shard(build.tokenize.local_path(place.name)).tokens[place.offset : place.offset + place.tokens]
        assert vocabulary.decode(tokens[:-1].tolist()) == ran.text_of(key)
        assert tokens[-1] == tokenizer.end_of_document(vocabulary)


def test_id_beginning_of_an_id_key_source_and_path_name_the_same_document(
    ran: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ran.docs)
    row = why(ran, "guide/05.txt").found.row
    names = [row["id"], row["id"][:9], row["source"], "./guide/05.txt"]
    assert [why(ran, name).found.row for name in names] == [row] * 4


def test_a_skipped_file_is_found_by_its_path(ran: Job) -> None:
    answer = why(ran, str(ran.docs / "short.txt"))
    assert (answer.found.row["fate"], answer.found.row["step"]) == (ledger.SKIPPED, "ingest")
    assert not answer.places
    assert "shorter than min_document_chars (5 characters)" in explain.as_text(answer)


def test_a_duplicate_names_what_was_kept_and_that_names_it(ran: Job) -> None:
    dropped, kept = why(ran, "guide/copy.txt"), why(ran, "guide/05.txt")
    assert dropped.original == kept.found.row
    assert not dropped.places
    assert [row["key"] for row in kept.duplicates] == ["guide/copy.txt"]
    assert str(ran.docs / "guide/05.txt") in explain.as_text(dropped)


def test_what_was_replaced_is_counted_and_not_shown(ran: Job) -> None:
    answer = why(ran, "zz-mail.txt")
    shown = explain.as_text(answer) + json.dumps(answer.as_json())
    assert answer.as_json()["document"]["found"] == {"email": 1}
    assert "1 email" in shown
    assert MAIL not in shown


def test_an_unknown_name_gets_the_nearest(ran: Job, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFoundError, match=r"guide/05\.txt"):
        why(ran, "elsewhere/05.txt")
    with pytest.raises(NotFoundError, match=r"posts\.jsonl#2"):
        why(ran, "posts.jsonl")
    with pytest.raises(NotFoundError, match=r"zz-mail\.txt"):
        why(ran, "zz-mial.txt")
    assert cli.main(["data", "why", "no such thing", f"--workspace={ran.workspace.uri}"]) == 4
    assert "no document of that name" in capsys.readouterr().err


def test_a_name_of_several_documents_is_refused_with_their_ids(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_one_process(monkeypatch)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "zz-mail.txt").write_text(text(random.Random(1), 1))
    job.settings["ingest"]["sources"].append({"kind": "files", "uri": str(tmp_path / "more")})
    job.run()
    with pytest.raises(ArtifactError, match="more than one document") as raised:
        why(job, "zz-mail.txt")
    ids = [line.split()[0] for line in str(raised.value.wanted).splitlines()[1:]]
    assert {why(job, doc_id).found.row["origin"] for doc_id in ids} == {"docs", "more"}


def test_a_document_that_is_gone_is_told_from_the_build_that_had_it(own: Job) -> None:
    (own.docs / "guide/05.txt").unlink()
    own.run()
    answer = why(own, "guide/05.txt")
    assert not answer.is_newest
    assert answer.places
    assert "an earlier build" in explain.as_text(answer)
    # Its duplicate took its place.
    assert why(own, "guide/copy.txt").found.row["fate"] == ledger.KEPT


def test_before_curation_a_document_is_told_from_what_was_read(job: Job) -> None:
    for stage in ("curate", "tokenize"):
        for ref in [ref for ref in job.workspace.refs_of_artifacts() if ref.startswith(stage)]:
            job.workspace.storage.delete(f"artifacts/{ref}.json")
    answer = why(job, "guide/05.txt")
    assert answer.found.row["fate"] == ledger.KEPT
    assert "kept, not curated yet" in explain.as_text(answer)
    assert why(job, str(job.docs / "short.txt")).found.row["fate"] == ledger.SKIPPED


def test_models_exports_evaluations_and_unfinished_runs_that_read_its_shard_are_named(job: Job) -> None:
    tokenize = job.workspace.resolve("tokenize").manifest.fingerprint
    publish = job.workspace.publish
    for number, epochs in (("1" * 16, {"docs": 2.5}), ("2" * 16, {"docs": 0.25})):
        inputs, metrics = {"tokenize": tokenize}, {"epochs": 9.0, "epochs_by_source": epochs}
        publish(Manifest(stage="pretrain", fingerprint=number, files=(), inputs=inputs, metrics=metrics))
    inputs = {"tokenize": tokenize, "pretrain": "1" * 16}
    publish(Manifest(stage="export", fingerprint="3" * 16, files=(), inputs=inputs))
    publish(Manifest(stage="evaluate", fingerprint="4" * 16, files=(), inputs=inputs))
    publish(Manifest(stage="pretrain", fingerprint="5" * 16, files=(), inputs={"tokenize": "0" * 16}))
    for run_id, said in (("6" * 16, {"shards": f"tokenize/{tokenize}"}), ("7" * 16, {}), ("8" * 16, {"shards": "t/0"})):
        events = Events(job.workspace.storage, run_id)
        events.add("start", step=0, **said)
        events.flush()

    trained = why(job, "guide/05.txt")
    assert {(reader.kind, reader.ref, reader.passes) for reader in trained.readers} == {
        ("model", f"pretrain/{'1' * 16}", 2.5),
        ("model", f"pretrain/{'2' * 16}", 0.25),
        ("export", f"export/{'3' * 16}", 2.5),
        ("run", f"runs/{'6' * 16}", None),
    }
    assert trained.unknown_runs == ("7" * 16,)
    assert "perhaps without this document" in explain.as_text(trained)

    held_out = next(row["key"] for row in _rows(job) if row["split"] == "heldout")
    scored = why(job, held_out)
    assert [(reader.kind, reader.ref) for reader in scored.readers] == [("evaluation", f"evaluate/{'4' * 16}")]


def _rows(job: Job) -> list[dict[str, str]]:
    return [row for file in builds.files(builds.latest(job.workspace)) for row in file.rows(None, 1000)]


def test_a_jobs_own_build_counts_and_not_the_latest(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_one_process(monkeypatch)
    first = job.workspace.resolve("tokenize").ref
    mine = job.yaml.read_text()
    job.settings["curate"]["exact"]["enabled"] = False
    job.save()
    job.run()
    capsys.readouterr()
    assert why(job, "guide/copy.txt").found.row["fate"] == ledger.KEPT
    job.yaml.write_text(mine)
    assert cli.main(["data", "why", "guide/copy.txt", str(job.yaml), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["build"]["tokenize"] == first
    assert answer["document"]["fate"] == ledger.DROPPED


def test_names_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in explain.table([("from", "a\x1b[2Jb\r.txt")])


def test_every_row_is_looked_at_however_many_parts_there_are(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_process(monkeypatch)
    job.settings["ingest"]["part_bytes"] = 6000
    job.run()
    assert len([file for file in builds.files(builds.latest(job.workspace)) if file.part]) > 4
    keys = [row["key"] for row in _rows(job) if row["key"]]
    assert len(keys) == 50
    for key in random.Random(0).sample(keys, 5):
        assert why(job, key).found.row["key"] == key


def test_an_evaluation_text_that_a_document_overlaps_is_named(ran: Job) -> None:
    found = why(ran, "guide/07.txt").found
    row = found.row | {"fate": "dropped", "step": "decontaminate", "reason": "contaminated"}
    by_file = explain.as_text(Answer(builds.Found(row | {"duplicate_of": "s3://exams/one.txt"}, found.build), True))
    assert re.search(r"\noverlaps +s3://exams/one.txt", by_file)
    other = why(ran, "guide/05.txt").found.row
    by_document = explain.as_text(Answer(builds.Found(row, found.build), True, original=other))
    assert re.search(rf"\noverlaps +{other['id']}", by_document)
    assert "kept instead" not in by_document
