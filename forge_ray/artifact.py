"""Immutable artifacts: a manifest over content-addressed blobs, in a workspace on any store.

```
<workspace>/blobs/<2 hex>/<sha256>                bytes, published whole
           /artifacts/<stage>/<fingerprint>.json  the manifest, written last, only if absent
           /runs/<run id>/checkpoints/<step>.json a manifest too: what is still growing
           /memo/<stage>/<key>.json               what a piece of work gave; see `memo.py`
           /runs/<run id>/active                  there while the stage of that fingerprint runs; see `garbage.py`
           /refs/<name>                           a small movable name: the text "<stage>/<fingerprint>"
           /erasures/<time>-<digest>.json         what was deleted on purpose, and why (data/account/erase.py)
```

Owns digests, publishing order, resolving and verifying, and refs; what is of no use any more is `garbage.py`'s. A
reader checks the SHA-256 of a file before it uses a byte. No blob or manifest is ever changed, no pickle ever read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from forge_ray.copies import Entry, Held
from forge_ray.errors import ArtifactError, CorruptError, ForgeError, NotFoundError
from forge_ray.storage import Storage, translated

FORMAT_VERSION = 1
ACTIVE_S = 7 * 24 * 3600.0


def digest_bytes(data: bytes) -> str:
    """SHA-256 as hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file as hex. Cost: 1.0 to 1.7 GB/s per core."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(stage: str, version: int, config: Any, inputs: Mapping[str, str], frozen: Mapping[str, Any]) -> str:
    """The name of what a stage would produce: 16 hex digits.

    Args:
        stage: Name of the stage.
        version: Format version of the stage's code; raise it when the same config would produce something else.
        config: The stage's non-operational configuration as JSON values.
        inputs: Fingerprints of the input artifacts by role.
        frozen: What was chosen or observed automatically: precision, the listing of a source.
    """
    parts = {"stage": stage, "version": version, "config": config, "inputs": dict(inputs), "frozen": dict(frozen)}
    return digest_bytes(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode())[:16]


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact."""

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What was made, out of what, how, when and at what cost; a field for each key of the JSON."""

    stage: str
    fingerprint: str
    files: tuple[FileEntry, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    frozen: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0
    created: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def ref(self) -> str:
        """The artifact's full name, `<stage>/<fingerprint>`."""
        return f"{self.stage}/{self.fingerprint}"

    def to_json(self) -> bytes:
        """Canonical bytes, ended by a digest of themselves, so that a flipped bit in a manifest is found too."""
        body = json.loads(json.dumps(asdict(self)))  # a number as a key sorts otherwise once it has become text
        body["sha256"] = digest_bytes(_canonical(body))
        return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes, where: str) -> Manifest:
        """Reads and verifies a manifest.

        Raises:
            ArtifactError: A newer forge-ray has written it.
            CorruptError: It is no JSON, its digest does not match, or a row of its files is none that we write.
        """
        try:
            body = json.loads(data)
            if int(body["format_version"]) > FORMAT_VERSION:
                raise ArtifactError(
                    "a manifest was written by a newer forge-ray",
                    got=f"{where}: format {body['format_version']}",
                    wanted=f"format {FORMAT_VERSION} or older",
                    do="upgrade forge-ray on this machine, then run the same command again",
                )
            stated = body.pop("sha256")
            if digest_bytes(_canonical(body)) != stated:
                raise ValueError("its SHA-256 does not match")
            body["files"] = tuple(_checked(FileEntry(**entry)) for entry in body["files"])
            return Manifest(**body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError(
                "a manifest is damaged",
                got=f"{where}: {error}",
                do=f"delete {where} and run the stage again; its blobs are reused where they verify",
            ) from None


def _checked(entry: FileEntry) -> FileEntry:
    """The row, if its name stays inside a folder and its digest is one: a manifest may come from someone else.

    Raises:
        ValueError: It does not.
    """
    path = PurePosixPath(entry.name)
    if not path.parts or path.is_absolute() or ".." in path.parts or str(path) != entry.name or "\0" in entry.name:
        raise ValueError(f"{entry.name!r} is no name of a file inside a folder")
    if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
        raise ValueError(f"{entry.sha256!r} is no SHA-256")
    return entry


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


class Artifact:
    """A published artifact: its manifest, and verified access to its files."""

    def __init__(self, workspace: Workspace, manifest: Manifest) -> None:
        self.workspace, self.manifest = workspace, manifest
        self._entries = {entry.name: entry for entry in manifest.files}

    @property
    def ref(self) -> str:
        """`<stage>/<fingerprint>`."""
        return self.manifest.ref

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What the stage measured."""
        return self.manifest.metrics

    def names(self, suffix: str = "") -> list[str]:
        """Names of its files that end so, in the manifest's order."""
        return [entry.name for entry in self.manifest.files if entry.name.endswith(suffix)]

    def entry(self, name: str) -> FileEntry:
        """The manifest's row of a file.

        Raises:
            NotFoundError: The artifact has no such file.
        """
        if name in self._entries:
            return self._entries[name]
        raise NotFoundError(f"{self.ref} has no file of that name", got=name, wanted=", ".join(self.names()))

    def local_path(self, name: str) -> Path:
        """A verified local file with the content; read it, never write it. See `Workspace.verified`."""
        return self.workspace.verified(self.entry(name), f"{self.ref}:{name}")

    def read_bytes(self, name: str) -> bytes:
        """The verified content."""
        return self.local_path(name).read_bytes()

    def read_json(self, name: str) -> Any:
        """The verified content, parsed."""
        return json.loads(self.read_bytes(name))

    def materialize(self, folder: Path) -> Path:
        """Copies every file, verified, into a new folder that appears whole or not at all.

        An existing folder is checked, and made anew if a file differs, is missing or was added: loaders take what lies
        there.
        """
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        whole = folder.exists() and found == set(self.names())
        if whole and all(_matches(folder / entry.name, entry) for entry in self.manifest.files):
            return folder
        with translated(str(folder)):
            temp = Path(tempfile.mkdtemp(prefix=".tmp-", dir=_made(folder.parent)))
            try:
                for entry in self.manifest.files:
                    target = temp / entry.name
                    _made(target.parent)
                    shutil.copyfile(self.local_path(entry.name), target)
                if folder.exists():
                    shutil.rmtree(folder)
                os.replace(temp, folder)
            finally:
                shutil.rmtree(temp, ignore_errors=True)
        return folder


def cache_folder(kind: str) -> Path:
    """Where this machine keeps verified copies of that kind; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "forge-ray" / kind


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _matches(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size_bytes and digest_file(path) == entry.sha256


class Workspace:
    """A folder or URI where everything of a company's models lives. Picklable, so that Ray tasks take it along.

    Args:
        uri: Where it is.
        cache_bytes: What copies of an object store's blobs may take on each machine; see `copies.py` for none.
    """

    def __init__(self, uri: str, cache_bytes: int | None = None) -> None:
        self.storage, self.cache_bytes = Storage(uri), cache_bytes
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._copies: Held | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return Workspace, (self.uri, self.cache_bytes)

    @property
    def uri(self) -> str:
        """Its absolute path or URI."""
        return self.storage.uri

    # -------------------------------------------------------------------------------------------------- writing

    def put_bytes(self, name: str, data: bytes) -> FileEntry:
        """Stores a blob; `name` is what a manifest will call it."""
        with self.new_file(name) as build:
            build.stream.write(data)
        return build.entry

    def put_file(self, name: str, path: Path) -> FileEntry:
        """Stores a copy of a local file as a blob."""
        entry = FileEntry(name, digest_file(path), path.stat().st_size)
        blob = _blob(entry.sha256)
        stored = self.storage.local_path(blob)
        if stored and stored.exists() and not _matches(stored, entry):
            self.storage.delete(blob)  # damaged since it was written: these are the right bytes again
        self.storage.put_file(blob, path, entry.sha256)
        return entry

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[BlobBuilder]:
        """Builds a blob by writing to `.stream` (or to the file at `.path`); `.entry` is its row once the block ends.

        An error inside the block publishes nothing.
        """
        with self.storage.scratch_file() as path, path.open("w+b") as stream:
            builder = BlobBuilder(path, stream)
            yield builder
            stream.flush()
            builder.entry = self.put_file(name, path)

    def publish(self, manifest: Manifest, *, named: bool = True) -> Artifact:
        """Writes the manifest, the act that makes an artifact exist; if it exists already, that one is returned.

        Args:
            named: Whether the stage's name means it from now on.
        """
        new = self.storage.create(f"artifacts/{manifest.ref}.json", manifest.to_json())
        artifact = Artifact(self, manifest) if new else self.get(manifest.ref)
        if named:
            self.set_latest(artifact)
        return artifact

    def set_latest(self, artifact: Artifact) -> None:
        """Makes the stage's name mean this artifact."""
        self.set_ref(f"latest/{artifact.manifest.stage}", artifact.ref)

    def set_ref(self, name: str, ref: str, expected: str | None = None) -> str:
        """Points a movable name at an artifact and returns what it meant before, "" for nothing.

        The rule: each move replaces exactly what it returns, by compare-and-swap, so no move is lost unseen. Without
        `expected` the last one counts, as for `latest`; with it the ref only moves if it still means that.

        Raises:
            ArtifactError: The ref does not mean `expected` (any more); it is left as it is.
        """
        while True:
            try:
                data, version = self.storage.read_versioned(f"refs/{name}")
            except NotFoundError:
                data, version = b"", ""
            found = data.decode()
            if expected is not None and found != expected:
                raise ArtifactError(
                    "a ref was moved by somebody else",
                    got=f"{name} is {found or 'not set'}",
                    wanted=expected or "not set",
                    do="look at what it means now, then decide again",
                )
            if found == ref:
                return found
            path, new = f"refs/{name}", ref.encode()
            if self.storage.swap(path, new, version) if version else self.storage.create(path, new):
                return found

    @contextlib.contextmanager
    def active(self, stage: str, run_id: str) -> Iterator[None]:
        """Marks a stage as running while the block lasts, publishing included, so that `garbage.py` spares its
        blobs.

        A process that is killed leaves its marker, which counts for `ACTIVE_S`; whoever finishes that stage removes it.
        Not covered: of two processes that run the same stage, the end of the first takes the marker from both.
        """
        name, finished = f"runs/{run_id}/active", False
        created = datetime.now(UTC).isoformat(timespec="seconds")
        body = json.dumps({"stage": stage, "host": socket.gethostname(), "created": created}).encode()
        mine = self.storage.create(name, body)
        if not mine:
            with contextlib.suppress(NotFoundError):
                if time.time() - self.storage.modified_s(name) > ACTIVE_S:
                    self.storage.write(name, body)
        try:
            yield
            finished = True
        finally:
            if finished or mine:
                with contextlib.suppress(ForgeError):  # the stage's own outcome is what counts
                    self.storage.delete(name)

    # -------------------------------------------------------------------------------------------------- reading

    def has(self, ref: str) -> bool:
        """Whether `<stage>/<fingerprint>` is published."""
        return self.storage.exists(f"artifacts/{ref}.json")

    def get(self, ref: str) -> Artifact:
        """The artifact of an exact `<stage>/<fingerprint>`.

        Raises:
            NotFoundError: It is not published.
            CorruptError: Its manifest is damaged, or that of another artifact.
        """
        name = f"artifacts/{ref}.json"
        manifest = Manifest.from_json(self.storage.read_bytes(name), self.storage._at(name))
        if manifest.ref != ref:
            raise CorruptError(
                "a manifest is that of another artifact",
                got=f"{self.storage._at(name)}: {manifest.ref}",
                wanted=ref,
                do=f"delete {self.storage._at(name)} and run the stage again",
            )
        return Artifact(self, manifest)

    def resolve(self, ref: str) -> Artifact:
        """Finds an artifact by full name, by a unique prefix of its fingerprint, by stage (its latest) or by ref.

        Raises:
            NotFoundError: Nothing matches; the message lists what there is.
            ArtifactError: More than one matches.
        """
        if re.fullmatch(r"[a-z]+/[0-9a-f]{16}", ref) and self.has(ref):
            return self.get(ref)
        for name in (f"refs/{ref}", f"refs/latest/{ref}"):
            if not ref.startswith(("/", ".")) and self.storage.exists(name):
                return self.get(self.storage.read_bytes(name).decode())
        every = self.refs_of_artifacts()
        found = [name for name in every if name.startswith(ref) or name.partition("/")[2].startswith(ref)]
        if len(found) > 1:
            raise ArtifactError(
                "more than one artifact matches", got=ref, wanted=", ".join(found), do="give more digits"
            )
        if not found:
            raise NotFoundError(
                "no artifact of that name",
                got=f"{ref} in {self.uri}",
                wanted=", ".join(every) or "nothing is published yet",
                do="`forge run jobs/demo.yaml` makes artifacts; `--workspace` says where to look",
            )
        return self.get(found[0])

    def refs_of_artifacts(self) -> list[str]:
        """`<stage>/<fingerprint>` of all that is published."""
        return [name.removeprefix("artifacts/").removesuffix(".json") for name in self.storage.list("artifacts")]

    def verified(self, entry: FileEntry, shown: str) -> Path:
        """A local file with a blob's content, its SHA-256 checked once per workspace object and version of the file.

        Of an object store it is a copy on this machine, which keeps its name while the path that is returned lives:
        hold on to it until the file is open.

        A version is size, times of modification and of change, so a write whose mtime was set back is found too; a copy
        has no time of change to tell. Not covered: bytes that change below the file system after this process has
        checked them.

        Raises:
            CorruptError: Naming the file, when it is missing or its digest differs.
            DiskFullError, StorageError: A copy cannot be had.
        """
        path = self.storage.local_path(_blob(entry.sha256))
        if path is None:
            return self._held().hold(entry, shown)
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise self.missing(entry, self._where(entry, shown), shown) from None
        state = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        if self._seen.get(entry.sha256) != state:
            found = digest_file(path)
            if found != entry.sha256:
                raise self.damaged(entry, shown, f"sha256 {found[:16]}…, {stat.st_size} bytes")
            self._seen[entry.sha256] = state
        return path

    def fetch_blob(self, entry: Entry, shown: str, target: Path) -> None:
        """Copies a blob to a new local file; its bytes are not verified.

        Raises:
            CorruptError: It is not there.
        """
        try:
            self.storage.fetch(_blob(entry.sha256), target)
        except NotFoundError:
            raise self.missing(entry, self._where(entry, shown), shown) from None

    def damaged(self, entry: Entry, shown: str, why: str) -> CorruptError:
        """The error of a blob whose bytes are not those of its digest."""
        return CorruptError(
            "a file's bytes do not match its manifest",
            got=f"{self._where(entry, shown)}: {why}",
            wanted=f"sha256 {entry.sha256[:16]}…, {entry.size_bytes} bytes",
            do=_rebuild_hint(shown),
        )

    def _where(self, entry: Entry, shown: str) -> str:
        return f"{shown} ({self.storage._at(_blob(entry.sha256))})"

    def _held(self) -> Held:
        """This machine's copies of blobs."""
        folder = cache_folder("blobs")
        if self._copies is None or self._copies.folder != folder:
            self._copies = Held(self, self.cache_bytes, folder)
        return self._copies

    def missing(self, entry: Entry, where: str, shown: str) -> CorruptError:
        """The error of a blob that is not there: erased, as a record of `forge data forget --erase` says, or lost."""
        for name in self.storage.list("erasures"):
            data = self.storage.read_bytes(name) if name.endswith(".json") else b""
            if entry.sha256.encode() in data:
                record = json.loads(data)
                return CorruptError(
                    "a file of an artifact was erased on purpose",
                    got=f"{where}: erased on {record['when']} by {record['who']}, see {name}",
                    do="run the job of this artifact again: what is made of its documents now is without the erased",
                )
        return CorruptError("a file of an artifact is missing", got=where, do=_rebuild_hint(shown))

    def has_blob(self, entry: FileEntry) -> bool:
        """Whether a blob of that digest and size is stored; its bytes are not read."""
        try:
            return self.storage.size_bytes(_blob(entry.sha256)) == entry.size_bytes
        except NotFoundError:
            return False

    def delete_blob(self, entry: FileEntry) -> None:
        """Deletes one blob; the caller knows that no manifest refers to it any more."""
        self.storage.delete(_blob(entry.sha256))


@dataclass
class BlobBuilder:
    """What `Workspace.new_file` yields."""

    path: Path
    stream: IO[bytes]
    entry: FileEntry = FileEntry("", "", 0)


def _blob(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256}"


def _rebuild_hint(shown: str) -> str:
    owner = shown.partition(":")[0]
    checkpoint = re.fullmatch(r"checkpoint/(.+)@(\d+)", owner)
    if checkpoint:
        name = f"runs/{checkpoint[1]}/checkpoints/{int(checkpoint[2]):08d}.json"
        return (
            f"nothing: the run goes on from an older checkpoint; restore the file, or delete {name}, to end the message"
        )
    return f"restore the file, or delete artifacts/{owner}.json and run the same command again: it is made anew"
