"""What a run is, as plain values that can be sent anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forge_ray.artifact import Workspace
from forge_ray.config import ModelConfig, PretrainConfig


@dataclass(frozen=True)
class RunSpec:
    """All that a worker needs."""

    run_id: str
    workspace: Workspace
    shards_ref: str
    model: ModelConfig
    config: PretrainConfig
    vocab_size: int
    precision: str
    compiled: bool

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "run_id": self.run_id,
            "workspace": self.workspace.uri,
            "shards_ref": self.shards_ref,
            "model": self.model.model_dump(mode="json"),
            "config": self.config.model_dump(mode="json"),
            "vocab_size": self.vocab_size,
            "precision": self.precision,
            "compiled": self.compiled,
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> RunSpec:
        """From what `to_json` gave."""
        return RunSpec(
            values["run_id"],
            Workspace(values["workspace"]),
            values["shards_ref"],
            ModelConfig.model_validate(values["model"]),
            PretrainConfig.model_validate(values["config"]),
            values["vocab_size"],
            values["precision"],
            values["compiled"],
        )
