"""One job on S3, Google Cloud Storage and Azure as in a local folder, and what is left of it when the store is killed.

The corpus and the workspace lie in a bucket; the job names them and nothing else, the environment says where the store
is. `stores.py` has the servers. Every run is a process of its own with a private Ray cluster.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from forge_ray.artifact import Artifact, FileEntry, Workspace
from forge_ray.data.shards import ShardIndex
from forge_ray.events import Events
from forge_ray.storage import Storage
from forge_ray.train.pretrain import CURVE, REPORT
from forge_ray.train.saving.checkpoint import STABLE
from tests.integration.conftest import ROOT, Finished, Forge, clean_environment, kill_tree
from tests.integration.crew import processes
from tests.integration.stores import ELSEWHERE, SERVERS, Server, make_bucket
from tests.waiting import wait_for

FOLDERS = ("mail", "site", "tables")
JOB = """
ingest:
  held_out_frac: 0.1
  sources:
{sources}
curate:
  normalize: {{enabled: true}}
  privacy: {{enabled: true}}
  exact: {{enabled: true}}
  near: {{enabled: true}}
  lines: {{enabled: true}}
tokenizer: {{vocab_size: 512, sample_bytes: 200000}}
tokenize: {{shard_tokens: 4000}}
model: {{num_layers: 1, d_model: 32, num_heads: 2, num_kv_heads: 1, head_dim: 64, d_ff: 64}}
pretrain:
  steps: {steps}
  slots: 2
  micro_batch: 4
  seq_len: 32
  min_workers: 2
  max_workers: 2
  window_bytes: 1
  cache_bytes: {cache_bytes}
  checkpoint_every_s: 0.1
evaluate: {{max_bytes: 3000, baselines: [gzip, bigram], prompts: ["the "], sample_tokens: 2}}
export: {{name: tiny}}
"""
STEPS, CACHE_BYTES = 40, 100_000


def _texts() -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(900)]
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(600)]
    return texts + texts[:20] + [f"{texts[n]} mail jane{n}@example.org" for n in range(20, 40)]


def _corpus() -> dict[str, bytes]:
    """Files by name: records, plain text, pages and tables, some of them compressed, some below each other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = _texts()
    files: dict[str, bytes] = {}
    for number in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[number * 60 : number * 60 + 60])
        files[f"mail/{2020 + number}/all.jsonl.gz"] = gzip.compress(lines.encode(), mtime=0)
    for number, text in enumerate(texts[180:260]):
        files[f"mail/note ä+{number:02d}.txt"] = text.encode()
    for number, text in enumerate(texts[260:320]):
        files[f"site/{number % 3}/{number}.html"] = f"<html><body><h1>{number}</h1><p>{text}</p></body></html>".encode()
    for number in range(3):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": texts[320 + number * 110 : 430 + number * 110]}), sink)
        files[f"tables/{number}.parquet"] = sink.getvalue().to_pybytes()
    return files


@dataclass
class Place:
    """Where a job runs: the root of its corpus, and an environment that leads to its store and no other."""

    root: str
    folder: Path
    server: Server | None = None

    def forge(self, name: str, **environment: str) -> Forge:
        """`forge` on a workspace of that name, with a cache of its own."""
        cleaned = clean_environment(self.folder / f"cache-{name}")
        cleaned = {name: value for name, value in cleaned.items() if not name.upper().startswith(ELSEWHERE)}
        reached = self.server.environment if self.server else {}
        uri = f"{self.root}/{name}"
        return Forge(uri, cleaned | reached | {"RAY_USAGE_STATS_ENABLED": "0"} | environment)  # type: ignore[arg-type]

    def job(self, steps: int = STEPS, cache_bytes: int = CACHE_BYTES) -> str:
        """The job: of all places the same but for the URIs."""
        rows = "\n".join(f"    - {{kind: files, uri: '{self.root}/corpus/{name}'}}" for name in FOLDERS)
        path = self.folder / f"job-{steps}-{cache_bytes}.yaml"
        path.write_text(JOB.format(sources=rows, steps=steps, cache_bytes=cache_bytes))
        return str(path)

    def run(self, forge: Forge, verb: str, *words: str) -> Finished:
        """Runs the job there."""
        return forge(verb, self.job(), "--json", *QUIET, *words)

    @contextlib.contextmanager
    def reached(self) -> Iterator[None]:
        """Leads this process's clients to the store too."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(self.folder / "cache-tests"))
            for name in [name for name in os.environ if name.upper().startswith(ELSEWHERE)]:
                patch.delenv(name)
            for name, value in (self.server.environment if self.server else {}).items():
                patch.setenv(name, value)
            yield

    def artifact(self, name: str, done: Finished, stage: str) -> Artifact:
        """What a run published."""
        return Workspace(f"{self.root}/{name}").get(done.result["stages"][stage]["ref"])


QUIET = ("--ray.address=local", "--ray.dashboard=false", "--ray.num_cpus=2")


@contextlib.contextmanager
def _place(scheme: str) -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="fc-", dir="/tmp"))
    try:
        if scheme == "local":
            (folder / "files").mkdir()
            place = Place(str(folder / "files"), folder)
            _fill(place)
            yield place
            return
        try:
            server = SERVERS[scheme](folder)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        try:
            server.start()
            place = Place(make_bucket(server, "forge-cloud"), folder, server)
            _fill(place)
            yield place
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fill(place: Place) -> None:
    with place.reached():
        storage = Storage(f"{place.root}/corpus")
        for name, data in _corpus().items():
            storage.write(name, data)


@pytest.fixture(scope="module")
def local() -> Iterator[tuple[Place, Finished]]:
    """The job in a local folder, to its end."""
    with _place("local") as place:
        done = place.run(place.forge("quiet"), "export")
        assert done.code == 0, done.stderr[-4000:]
        yield place, done


@pytest.fixture(scope="module")
def s3() -> Iterator[Place]:
    """The corpus in S3."""
    with _place("s3") as place:
        yield place


@pytest.fixture(scope="module")
def quiet(s3: Place) -> Finished:
    """The job in S3 without a disturbance, to its end."""
    done = s3.run(s3.forge("quiet"), "export")
    assert done.code == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module", params=list(SERVERS))
def cloud(request: pytest.FixtureRequest) -> Iterator[tuple[Place, Finished]]:
    """The same job on each store, to its weights; in S3 to its end."""
    if request.param == "s3":
        yield request.getfixturevalue("s3"), request.getfixturevalue("quiet")
        return
    with _place(request.param) as place:
        done = place.run(place.forge("quiet"), "pretrain")
        assert done.code == 0, done.stderr[-4000:]
        yield place, done


def test_a_job_in_a_bucket_gives_the_ids_shards_and_weights_of_a_local_one(
    local: tuple[Place, Finished], cloud: tuple[Place, Finished]
) -> None:
    (here, ours), (there, theirs) = local, cloud
    with there.reached():
        for stage in ("tokenizer", "tokenize"):
            suffix = ".tok" if stage == "tokenize" else ".json"
            mine, others = (_files(place.artifact("quiet", done, stage), suffix) for place, done in (local, cloud))
            assert mine
            assert mine == others, stage
        assert _ids(here.artifact("quiet", ours, "curate")) == _ids(there.artifact("quiet", theirs, "curate"))
        for stage in {"pretrain", "export"} & theirs.result["stages"].keys():
            mine, others = (
                _files(place.artifact("quiet", done, stage), "model.safetensors") for place, done in (local, cloud)
            )
            assert mine
            assert mine == others, stage
        if there.server and there.server.scheme == "s3":
            bits = [done.result["stages"]["evaluate"]["metrics"]["bits_per_byte"] for done in (ours, theirs)]
            assert bits[0] == pytest.approx(bits[1])


# ------------------------------------------------------------------------------------------------------- kills

# What is sent to the store in the middle of each step, in the order of the run.
MOMENTS = ("memo/ingest/", "memo/clean/", "artifacts/curate/", "memo/tokenize/", "/checkpoints/")
STEPS_OF = ("ingest", "curate", "tokenizer", "tokenize", "pretrain")
DOWN_S = 1.0


@pytest.fixture
def server(s3: Place) -> Server:
    """S3's program and proxy; both are well again for the next test."""
    assert s3.server
    return s3.server


def test_a_store_killed_again_and_again_and_back_within_the_budget_is_waited_for(
    s3: Place, quiet: Finished, server: Server
) -> None:
    driver = _started(s3, s3.forge("waited"))
    try:
        for moment in MOMENTS[::2]:  # in each step: the next test
            _wait_for(server, driver, "waited", moment)
            server.kill()
            time.sleep(DOWN_S)
            server.start()
        assert driver.wait(timeout=300) == 0, _said(s3)
    finally:
        kill_tree(driver)
    _same_as_quiet(s3, "waited", quiet)


def test_a_store_that_stays_away_in_any_step_is_said_and_the_rerun_goes_on(
    s3: Place, quiet: Finished, server: Server
) -> None:
    """With a budget of two seconds, so that the test need not wait for a minute each time."""
    hook = s3.folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text("import forge_ray.retry\nforge_ray.retry.BUDGET_S = 2.0\n")
    forge = s3.forge("gone", PYTHONPATH=f"{hook}:{ROOT}")
    for moment in MOMENTS:
        driver = _started(s3, forge)
        try:
            _wait_for(server, driver, "gone", moment)
            server.kill()
            assert driver.wait(timeout=120) == 3, f"{moment}: {_said(s3)}"
            found = json.loads((s3.folder / "result").read_text())
            assert found["error"] == "StorageError", found
            assert "the store did not answer in time" in found["what"]
            assert s3.root in found["got"]
            assert "run the same command again" in found["do"]
        finally:
            kill_tree(driver)
            if server.process is None:
                server.start()
                with s3.reached():
                    Storage(s3.root).write("probe", b"it takes writes again")
    driver = _started(s3, forge)
    try:
        assert driver.wait(timeout=120) == 0, _said(s3)
    finally:
        kill_tree(driver)
    _same_as_quiet(s3, "gone", quiet)


def test_a_killed_run_goes_on_from_its_checkpoint_in_the_store_within_its_cache(
    s3: Place, quiet: Finished, server: Server
) -> None:
    run = quiet.result["stages"]["pretrain"]["ref"].partition("/")[2]
    forge, folder = s3.forge("killed"), s3.folder / "cache-killed" / "forge-ray" / "shards"
    with s3.reached():
        storage = _until_shards(s3, "killed")
        driver = _started(s3, forge)
        try:
            _wait_for(server, driver, "killed", "/checkpoints/")
        finally:
            kill_tree(driver)
            for keeper in processes("forge-seat", run):  # or the workers would go on by themselves
                keeper.kill()
        saved = [int(name[-13:-5]) for name in storage.list(f"runs/{run}/checkpoints")]
        assert 0 < max(saved) < STEPS
        driver, most_bytes = _started(s3, forge), 0
        try:
            while driver.poll() is None:
                with contextlib.suppress(FileNotFoundError):
                    most_bytes = max(most_bytes, sum(file.stat().st_size for file in os.scandir(folder)))
                time.sleep(0.01)
        finally:
            kill_tree(driver)
        assert driver.returncode == 0, _said(s3)
        starts = [row["step"] for row in Events.read(storage, run) if row["event"] == "start"]
        assert starts == [0, max(saved)]
        shards = ShardIndex.of(s3.artifact("killed", quiet, "tokenize")).shards
        assert 0 < most_bytes <= CACHE_BYTES < sum(shard.size_bytes for shard in shards)
    _same_as_quiet(s3, "killed", quiet)


def _until_shards(place: Place, name: str) -> Storage:
    """A copy of the undisturbed run's workspace as it was before training."""
    before, copy = Storage(f"{place.root}/quiet"), Storage(f"{place.root}/{name}")
    late = tuple(f"artifacts/{stage}/" for stage in ("pretrain", "evaluate", "export"))
    for found in before.list(""):
        if not found.startswith(("runs/", "refs/", *late)):
            copy.write(found, before.read_bytes(found))
    return copy


def _said(place: Place) -> str:
    return (place.folder / "said").read_text()[-4000:]


def _started(place: Place, forge: Forge) -> subprocess.Popen[str]:
    """The job until its weights are there, what it says in files."""
    assert place.server
    place.server.proxy.seen.clear()
    with (place.folder / "said").open("w") as said, (place.folder / "result").open("w") as result:
        words = ("pretrain", place.job(), "--json", *QUIET)
        return forge.start(*words, start_new_session=True, stdout=result, stderr=said)


def _wait_for(server: Server, driver: subprocess.Popen[str], name: str, moment: str) -> None:
    def seen() -> bool:
        assert driver.poll() is None, f"it ended before {moment}"
        sent = [path for method, path, _ in list(server.proxy.seen) if method in ("PUT", "POST")]
        return any(f"/{name}/" in path and moment in path for path in sent)

    wait_for(moment, seen, limit_s=120)


def _same_as_quiet(place: Place, name: str, quiet: Finished) -> None:
    """What the last run left in a workspace is what the undisturbed one made, byte for byte."""
    found = json.loads((place.folder / "result").read_text())
    with place.reached():
        for stage in STEPS_OF:
            assert found["stages"][stage]["ref"] == quiet.result["stages"][stage]["ref"]
            mine, others = (place.artifact(each, quiet, stage) for each in (name, "quiet"))
            wanted = _lasting(others)
            assert _lasting(mine) == wanted, stage
            for entry in wanted:
                mine.local_path(entry.name)


def _lasting(artifact: Artifact) -> list[FileEntry]:
    """The files that a job alone decides.

    The curve and the report have times. Which checkpoint from before the rate fell is kept depends on when there was
    one: a longer run goes on from any of them to the same bits.
    """
    return [
        entry
        for entry in artifact.manifest.files
        if entry.name not in (CURVE, REPORT) and not entry.name.startswith(STABLE)
    ]


def _files(artifact: Artifact, suffix: str) -> list[tuple[str, str]]:
    return [(entry.name, entry.sha256) for entry in _lasting(artifact) if entry.name.endswith(suffix)]


def _ids(documents: Artifact) -> list[str]:
    import pyarrow.parquet as pq

    names = [name for name in documents.names(".parquet") if name.startswith(("train-", "heldout-"))]
    return [i for name in names for i in pq.read_table(documents.local_path(name), columns=["id"])["id"].to_pylist()]
