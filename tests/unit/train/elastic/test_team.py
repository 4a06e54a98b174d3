"""What members of a group tell each other: the same state for all, and whose is not that of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forge_ray.train.elastic import team as team_module
from forge_ray.train.elastic.group import Group, GroupLost
from forge_ray.train.elastic.team import Odd, Team
from tests.unit.train.groups import in_group


class Taken(SimpleNamespace):
    """A worker, as far as its state goes."""

    def extra(self) -> dict[str, Any]:
        return {"step": self.step}

    def take(self, extra: dict[str, Any]) -> None:
        self.step = extra["step"]


def _team(group: Group, distrusted: list[int]) -> Team:
    control = SimpleNamespace(progress=lambda phase: None)
    device, nothing = torch.device("cpu"), lambda *_: None
    found = Team(control, "127.0.0.1", device, nothing, nothing, distrusted.append, lambda: -1)  # type: ignore[arg-type]
    found.group, found.rank = group, group.rank
    return found


def _worker(values: torch.Tensor, step: int) -> Taken:
    return Taken(step=step, state=SimpleNamespace(buffer=values.clone()), sums=SimpleNamespace(clear=lambda: None))


@pytest.mark.parametrize(("sources", "piece"), [([0], 8), ([1, 3], 8), ([0, 1, 2], 1000), ([0, 1, 2, 3], 8)])
def test_all_get_the_state_of_the_sources_piece_by_piece(
    sources: list[int], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team_module, "_PIECE", piece)
    wanted = torch.arange(103, dtype=torch.float32)

    def body(group: Group) -> tuple[torch.Tensor, int]:
        has = group.rank in sources
        worker = _worker(wanted if has else torch.zeros(103), 7 if has else 2)
        _team(group, [])._make_alike(worker, sources)  # type: ignore[arg-type]
        return worker.state.buffer, worker.step

    for buffer, step in in_group(4, body):
        assert torch.equal(buffer, wanted)
        assert step == 7


@pytest.mark.parametrize("sources", [(), (0, 1), (0, 2)])
def test_the_odd_one_ends_and_what_is_stored_is_taken_back_unless_it_has_only_just_come(
    sources: tuple[int, ...],
) -> None:
    def body(group: Group) -> tuple[str, list[int]]:
        distrusted: list[int] = []
        team = _team(group, distrusted)
        worker = _worker(torch.full((9,), float(group.rank == 2)), 40)
        team._trusted_step = 30
        with pytest.raises((Odd, GroupLost)) as caught:
            team.compare(worker, sources)  # type: ignore[arg-type]
        return caught.typename, distrusted

    results = in_group(3, body)
    assert [kind for kind, _ in results] == ["GroupLost", "GroupLost", "Odd"]
    # Rank 2 has just taken its state from ranks 0 and 1, who agree: nothing that is stored is of its making.
    assert {tuple(steps) for _, steps in results} == {() if sources == (0, 1) else (30,)}


def test_who_is_alone_trusts_itself_and_those_who_agree_trust_each_other() -> None:
    def body(group: Group) -> int:
        team = _team(group, [])
        team.compare(_worker(torch.zeros(9), 40))  # type: ignore[arg-type]
        return team.trusted_step

    assert in_group(2, body) == [40, 40]
    assert body(Group.alone()) == 40
