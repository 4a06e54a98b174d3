"""Checkpoints of a run: everything that is needed to go on is weights, optimizer state and step.

A checkpoint is a manifest `runs/<run id>/checkpoints/<step>.json` over blobs, written last, like an artifact. It lies
in the workspace (tier `store`) and, where that is an object store, more often in a workspace of the run's own on the
node that computes (tier `disk`), below `<cache>/checkpoints/<run id>`. The newest that verifies wins; one that does not
is named and passed over. Owns committing, finding, loading and releasing. Does not own writing in the background
(`saving.py`), nor checkpoints whose tensors lie in several files (`pieces.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_ray import garbage
from forge_ray.artifact import Artifact, FileEntry, Manifest, Workspace, cache_folder, digest_bytes
from forge_ray.errors import ArtifactError, CorruptError, ForgeError
from forge_ray.telemetry import say
from forge_ray.train.saving.pieces import OPTIMIZER, WEIGHTS, assemble

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DISK", "OPTIMIZER", "STABLE", "STATE", "STORE", "WEIGHTS", "Checkpoints", "Saved", "Stored", "Tiers"]
STATE = "state.json"
STABLE = "stable/"  # before these names, in a finished run: what a longer one goes on from
DISK, STORE = "disk", "store"
_CLOCK_SKEW_S = 900.0


@dataclass(frozen=True)
class Stored:
    """A file of a checkpoint whose bytes are stored; `new` if the workspace did not have them before."""

    entry: FileEntry
    new: bool


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in one workspace.

    Args:
        pinned: The newest one of no more steps than this is never released: a longer run could go on from it.
    """

    workspace: Workspace
    run_id: str
    pinned: int = -1

    # -------------------------------------------------------------------------------------------------- writing

    def save(
        self, step: int, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], keep: int
    ) -> Artifact:
        """Stores a checkpoint after `step` finished steps and releases all but the newest `keep` and the pinned one.

        Raises:
            DiskFullError: No space; earlier checkpoints are untouched.
        """
        from safetensors.torch import save

        begun_s = time.time()
        files = [self.put_bytes(WEIGHTS, save(weights)), self.put_bytes(OPTIMIZER, save(optimizer))]
        files.append(self.put_bytes(STATE, json.dumps({**state, "step": step}).encode()))
        return self.commit(step, files, begun_s, keep)

    def put_bytes(self, name: str, data: bytes) -> Stored:
        """Stores a file from memory."""
        new = not self._has(digest_bytes(data))
        return Stored(self.workspace.put_bytes(name, data), new)

    def put_file(self, entry: FileEntry, path: Path) -> Stored:
        """Stores a file whose digest is known, so that its bytes are read once; bytes that are there are checked."""
        if self._has(entry.sha256):
            return Stored(self.workspace.put_file(entry.name, path), new=False)
        self.workspace.storage.put_file(blob_name(entry.sha256), path, entry.sha256)
        return Stored(entry, new=True)

    def commit(self, step: int, files: Sequence[Stored], begun_s: float, keep: int, trusted_step: int = -1) -> Artifact:
        """Makes stored files the checkpoint of a step, and releases all but the newest `keep`.

        Args:
            step: Number of finished steps.
            files: What it consists of.
            begun_s: Time since the epoch before the first of them was stored.
            keep: How many checkpoints stay.
            trusted_step: The newest of no more steps than this stays too: where a worker's memory turns out to have
                flipped a bit, all later ones are taken back.
        """
        made = {"new": [file.entry.name for file in files if file.new], "begun_s": int(begun_s)}
        manifest = Manifest(
            stage="checkpoint",
            fingerprint=self._fingerprint(step),
            files=tuple(file.entry for file in files),
            metrics=made,
        )
        # Not `create`: a manifest that stands there is of a checkpoint that was passed over as damaged.
        self.workspace.storage.write(self._name(step), manifest.to_json())
        self._release(keep, trusted_step)
        return Artifact(self.workspace, manifest)

    def drop_after(self, step: int) -> None:
        """Takes back the checkpoints of later steps; `forge gc` removes their blobs."""
        for later in reversed([found for found in self.steps() if found > step]):
            self.workspace.storage.delete(self._name(later))

    # -------------------------------------------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """Steps of what is stored, oldest first; not yet verified."""
        names = self.workspace.storage.list(f"runs/{self.run_id}/checkpoints")
        return sorted(int(name.rpartition("/")[2].removesuffix(".json")) for name in names if name.endswith(".json"))

    def newest(self) -> Artifact | None:
        """The newest checkpoint whose every file verifies; none if there is none."""
        for step in reversed(self.steps()):
            try:
                return self.verified(step)
            except ArtifactError as error:
                say(f"  checkpoint {step} is passed over, the next older one is tried: {error}")
        return None

    def verified(self, step: int) -> Artifact:
        """The checkpoint of a step, every byte of it checked.

        Raises:
            CorruptError, NotFoundError: Naming the file that is not as it was written.
        """
        found = self.get(step)
        for name in found.names():
            found.local_path(name)
        return found

    def get(self, step: int) -> Artifact:
        """The checkpoint of a step; its files are verified when they are read."""
        name = self._name(step)
        manifest = Manifest.from_json(self.workspace.storage.read_bytes(name), f"{self.workspace.uri}/{name}")
        if manifest.fingerprint != self._fingerprint(step):
            raise CorruptError("a checkpoint stands under another's name", got=manifest.ref, wanted=f"step {step}")
        return Artifact(self.workspace, manifest)

    def _fingerprint(self, step: int) -> str:
        return f"{self.run_id}@{step}"

    def _name(self, step: int) -> str:
        return f"runs/{self.run_id}/checkpoints/{step:08d}.json"

    def _has(self, sha256: str) -> bool:
        return self.workspace.storage.exists(blob_name(sha256))

    # ------------------------------------------------------------------------------------------------ releasing

    def _release(self, keep: int, trusted_step: int) -> None:
        """Removes old manifests, then those of their blobs that nothing else refers to.

        Cost: reads this run's manifests and, of the others, those that are younger than what goes; all of them only
        where bytes go that were there before their checkpoint was.
        """
        steps = self.steps()
        staying = set(steps[-keep:])
        for most in (self.pinned, trusted_step):
            staying.add(max((step for step in steps if step <= most), default=-1))
        going = [step for step in steps if step not in staying]
        if not going:
            return
        try:
            kept = {entry.sha256 for step in steps if step in staying for entry in self.get(step).manifest.files}
            for step, manifest in [(step, self._readable(step)) for step in going]:
                doomed = [entry for entry in manifest.files if entry.sha256 not in kept] if manifest else []
                used = self._used_elsewhere(manifest, doomed) if manifest else set()
                self.workspace.storage.delete(self._name(step))
                for entry in doomed:
                    if entry.sha256 not in used:
                        self.workspace.delete_blob(entry)
        except ForgeError as error:
            # Space is kept a little longer; training goes on.
            say(f"  old checkpoints are kept for now: {error.what}")

    def _readable(self, step: int) -> Manifest | None:
        """An old manifest; none if it is damaged, so that it can only go, and `forge gc` finds its blobs."""
        try:
            return self.get(step).manifest
        except ArtifactError:
            return None

    def _used_elsewhere(self, manifest: Manifest, doomed: list[FileEntry]) -> set[str]:
        """The digests that other manifests refer to, as far as they can be among these.

        Bytes that were new with their checkpoint can only be referred to by what was written after it was begun.
        """
        new = {entry.name for entry in doomed} <= set(manifest.metrics.get("new", ()))
        since_s = manifest.metrics["begun_s"] - _CLOCK_SKEW_S if new else 0.0
        storage = self.workspace.storage
        older = {row.name for top in ("runs", "artifacts") for row in storage.listing(top) if row.modified_s < since_s}
        own = {self._name(step) for step in self.steps()}
        return garbage.in_use(self.workspace, but=older | own)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was found, all its bytes verified."""

    step: int
    tier: str
    checkpoint: Artifact


class Tiers:
    """The checkpoints of one run wherever this process can read them.

    Args:
        workspace: The run's.
        run_id: The run.
        disk: Folder of this node for the copies of all runs; none for the cache. Used if the workspace is no folder.
        pinned: See `Checkpoints`; in the store alone.
    """

    def __init__(self, workspace: Workspace, run_id: str, disk: Path | None = None, pinned: int = -1) -> None:
        self.tiers = {STORE: Checkpoints(workspace, run_id, pinned)}
        if workspace.storage.local is None:
            folder = (disk or cache_folder("checkpoints")) / run_id
            self.tiers = {DISK: Checkpoints(Workspace(str(folder)), run_id), **self.tiers}

    def candidates(self) -> list[tuple[int, str]]:
        """Step and tier of what is stored, newest first, the nearer first; not yet verified."""
        found = [(step, tier) for tier, checkpoints in self.tiers.items() for step in checkpoints.steps()]
        return sorted(found, key=lambda row: -row[0])

    def newest(self) -> Saved | None:
        """The newest checkpoint whose every file verifies, in whichever tier; those that do not are named."""
        return self._first(self.candidates())

    def newest_before(self, step: int) -> Saved | None:
        """The same of those of fewer than `step` steps."""
        return self._first([row for row in self.candidates() if row[0] < step])

    def load(self, step: int, tier: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Weights, optimizer state and the rest, verified.

        Raises:
            CorruptError, NotFoundError: Naming the file that is not as it was written.
        """
        found = self.tiers[tier].get(step)
        return *assemble(found), found.read_json(STATE)

    def drop_after(self, step: int) -> None:
        """Takes back the checkpoints of later steps in every tier that this process can write."""
        for checkpoints in self.tiers.values():
            checkpoints.drop_after(step)

    def _first(self, candidates: list[tuple[int, str]]) -> Saved | None:
        for step, tier in candidates:
            try:
                return Saved(step, tier, self.tiers[tier].verified(step))
            except ForgeError as error:
                if tier == STORE and not isinstance(error, ArtifactError):
                    raise  # the store does not answer: what it has is not known
                say(f"  checkpoint {step} ({tier}) is passed over, the next older one is tried: {error}")
        return None


def load_tensors(checkpoint: Artifact, name: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file, verified."""
    from safetensors.torch import load_file

    return load_file(checkpoint.local_path(name))


def blob_name(sha256: str) -> str:
    """Where a workspace keeps bytes of this digest."""
    return f"blobs/{sha256[:2]}/{sha256}"
