"""Checkpoints in pieces: any rows come back, whatever number of ranks wrote them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from forge_ray.artifact import Artifact, Workspace
from forge_ray.errors import CorruptError
from forge_ray.train.saving.checkpoint import OPTIMIZER, STATE, WEIGHTS, Checkpoints, Tiers
from forge_ray.train.saving.pieces import Pieces, assemble
from forge_ray.train.saving.saver import commit_pieces, save_piece
from forge_ray.train.sharded.worker import Rows, share

SHAPES = {"big": (10, 3), "thin": (2, 5), "norm": (7,)}
WHOLE = {name: torch.arange(torch.Size(shape).numel()).float().view(shape) for name, shape in SHAPES.items()}
MOMENTS = {f"{name}/exp_avg": tensor / 3 for name, tensor in WHOLE.items()} | {"big/step": torch.tensor(4.0)}


def rows_of(tensors: dict[str, Tensor], rank: int, size: int) -> dict[str, Rows]:
    """What a rank holds of them; what has no dimensions is with rank 0."""
    held = {}
    for name, tensor in tensors.items():
        mine = share(len(tensor) if tensor.ndim else 1, rank, size)
        if tensor.ndim:
            held[name] = Rows(tuple(tensor.shape), mine.start, tensor[mine.start : mine.stop])
        elif rank == 0:
            held[name] = Rows((), 0, tensor)
    return held


def write(checkpoints: Checkpoints, size: int, step: int = 8, keep: int = 2, add: float = 0.0) -> Artifact:
    weights = {name: tensor + add for name, tensor in WHOLE.items()}
    begun_s = time.time()
    pieces: list[Any] = [
        save_piece(checkpoints, rank, size, rows_of(weights, rank, size), rows_of(MOMENTS, rank, size))
        for rank in range(size)
    ]
    return commit_pieces(checkpoints, step, pieces, {"end_token": 5}, begun_s, keep)


@pytest.fixture
def checkpoints(workspace: Workspace) -> Checkpoints:
    return Checkpoints(workspace, "run")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_rows_come_back_whatever_number_of_ranks_wrote_them(checkpoints: Checkpoints, size: int) -> None:
    write(checkpoints, size)
    found = Checkpoints(Workspace(checkpoints.workspace.uri), "run").newest()
    assert len(found.names(".safetensors")) == 2 * size
    for reader in (Pieces(found), Pieces(found)):
        for name, whole in (WHOLE | MOMENTS).items():
            for start in range(len(whole) if whole.ndim else 1):
                for stop in range(start, len(whole) + 1 if whole.ndim else 2):
                    read = reader.rows(name, range(start, stop))
                    assert torch.equal(read, whole[start:stop] if whole.ndim else whole), (name, start, stop)
    assert Pieces(found).shapes() == {name: tuple(whole.shape) for name, whole in (WHOLE | MOMENTS).items()}


def test_pieces_are_put_together_to_what_a_whole_checkpoint_has(workspace: Workspace) -> None:
    tiers = Tiers(workspace, "run")
    write(tiers.tiers["store"], 3, step=9)
    weights, optimizer, state = tiers.load(9, "store")
    for read, wanted in ((weights, WHOLE), (optimizer, MOMENTS)):
        assert read.keys() == wanted.keys()
        assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    assert state == {"end_token": 5, "step": 9}
    whole = tiers.tiers["store"].save(10, WHOLE, MOMENTS, {}, keep=1)
    assert whole.names() == [WEIGHTS, OPTIMIZER, STATE]
    assert all(torch.equal(assemble(whole)[0][name], tensor) for name, tensor in WHOLE.items())


def test_a_rank_opens_the_pieces_that_have_its_rows_and_no_others(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, opened = write(checkpoints, 5), []
    real = Artifact.local_path
    monkeypatch.setattr(Artifact, "local_path", lambda self, name: opened.append(name) or real(self, name))
    reader = Pieces(found)
    assert torch.equal(reader.rows("big", range(6, 8)), WHOLE["big"][6:8])
    assert torch.equal(reader.rows("big", range(7, 10)), WHOLE["big"][7:])
    assert opened == ["layout.json", "model-3-of-5.safetensors", "model-4-of-5.safetensors"]


def test_a_row_that_no_piece_has_is_an_error(checkpoints: Checkpoints) -> None:
    begun_s = time.time()
    pieces = [save_piece(checkpoints, rank, 3, rows_of(WHOLE, rank, 3), {}) for rank in (0, 2)]
    found = commit_pieces(checkpoints, 8, pieces, {}, begun_s, 2)
    assert torch.equal(Pieces(found).rows("big", range(9, 10)), WHOLE["big"][9:])
    for name, rows in (("big", range(3, 9)), ("other", range(1))):
        with pytest.raises(CorruptError, match="no file of") as caught:
            Pieces(found).rows(name, rows)
        assert name in caught.value.wanted


def test_pieces_are_released_and_verified_like_any_checkpoint(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        write(checkpoints, 2, step, add=step)
    assert checkpoints.steps() == [2, 3]
    newest = checkpoints.get(3)
    checkpoints.workspace.delete_blob(newest.entry("model-1-of-2.safetensors"))
    assert torch.equal(assemble(checkpoints.newest())[0]["big"], WHOLE["big"] + 2)
    assert "model-1-of-2.safetensors" in capsys.readouterr().err
