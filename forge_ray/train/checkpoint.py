"""Checkpoints of a run: everything that is needed to go on is weights, optimizer state and step.

A checkpoint is a manifest `runs/<run id>/checkpoints/<step>.json` over blobs, written last, like an artifact. The
newest that verifies wins; one that does not is named and passed over. Owns saving, finding, loading and releasing.
Not covered yet: copies in peers' memory and background writing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forge_ray import garbage
from forge_ray.artifact import Artifact, FileEntry, Manifest, Workspace
from forge_ray.errors import ArtifactError, CorruptError, ForgeError
from forge_ray.telemetry import say

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    workspace: Workspace
    run_id: str

    def save(
        self, step: int, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], keep: int
    ) -> Artifact:
        """Stores a checkpoint after `step` finished steps and releases all but the newest `keep`.

        Raises:
            DiskFullError: No space; earlier checkpoints are untouched.
        """
        from safetensors.torch import save

        files = (
            self.workspace.put_bytes(WEIGHTS, save(weights)),
            self.workspace.put_bytes(OPTIMIZER, save(optimizer)),
            self.workspace.put_bytes(STATE, json.dumps({**state, "step": step}).encode()),
        )
        manifest = Manifest(stage="checkpoint", fingerprint=self._fingerprint(step), files=files)
        # Not `create`: a manifest that stands there is of a checkpoint that was passed over as damaged.
        self.workspace.storage.write(self._name(step), manifest.to_json())
        self._release(keep)
        return Artifact(self.workspace, manifest)

    def steps(self) -> list[int]:
        """Steps of what is stored, oldest first; not yet verified."""
        names = self.workspace.storage.list(f"runs/{self.run_id}/checkpoints")
        return sorted(int(name.rpartition("/")[2].removesuffix(".json")) for name in names if name.endswith(".json"))

    def newest(self) -> Artifact | None:
        """The newest checkpoint whose every file verifies; none if there is none."""
        for step in reversed(self.steps()):
            try:
                found = self.get(step)
                for name in found.names():
                    found.local_path(name)
                return found
            except ArtifactError as error:
                say(f"  checkpoint {step} is passed over: {error}")
        return None

    def get(self, step: int) -> Artifact:
        """The checkpoint of a step."""
        name = self._name(step)
        manifest = Manifest.from_json(self.workspace.storage.read_bytes(name), f"{self.workspace.uri}/{name}")
        if manifest.fingerprint != self._fingerprint(step):
            raise CorruptError("a checkpoint stands under another's name", got=manifest.ref, wanted=f"step {step}")
        return Artifact(self.workspace, manifest)

    def _fingerprint(self, step: int) -> str:
        return f"{self.run_id}@{step}"

    def _name(self, step: int) -> str:
        return f"runs/{self.run_id}/checkpoints/{step:08d}.json"

    def _release(self, keep: int) -> None:
        """Removes old manifests, then those of their blobs that no other checkpoint and no published model has."""
        old = self.steps()[:-keep]
        if not old:
            return
        try:
            # By every run: two runs may store the same bytes, such as a state file.
            used = garbage.in_use(self.workspace, but={self._name(step) for step in old})
            for step in old:
                files: tuple[FileEntry, ...] = self.get(step).manifest.files
                self.workspace.storage.delete(self._name(step))
                for entry in files:
                    if entry.sha256 not in used:
                        self.workspace.delete_blob(entry)
        except ForgeError as error:
            # Space is kept a little longer; training goes on.
            say(f"  old checkpoints are kept for now: {error.what}")


def load_tensors(checkpoint: Artifact, name: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file, verified."""
    from safetensors.torch import load_file

    return load_file(checkpoint.local_path(name))
