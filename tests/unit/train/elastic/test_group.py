"""What members of a group tell each other, and how they find out that one is gone."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from forge_ray.train.elastic.group import Group, GroupLost, store_client, store_server
from tests.unit.train.groups import ADDRESS, Peer, in_group, in_processes
from tests.waiting import wait_for

CPU = torch.device("cpu")


def test_values_of_any_size_reach_everybody_by_rank() -> None:
    wanted = [{"rank": rank, "text": "x" * 1000 * rank, "none": None} for rank in range(3)]
    assert in_group(3, lambda group: group.gather_json(wanted[group.rank])) == [wanted] * 3


def test_uneven_shares_are_exchanged_and_empty_ones_too() -> None:
    def body(group: Group) -> list[float]:
        counts = [0, 1, 2]  # to each rank as many as its number, from everybody
        mine = torch.full((3,), float(group.rank))
        out = torch.empty(3 * counts[group.rank])
        group.all_to_all(out, mine, [counts[group.rank]] * 3, counts)
        return out.tolist()

    assert in_group(3, body) == [[], [0.0, 1.0, 2.0], [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]]


def test_a_group_of_one_needs_nobody() -> None:
    group, out = Group.alone(), torch.empty(2)
    group.all_gather(out, torch.tensor([1.0, 2.0]))
    assert out.tolist() == [1.0, 2.0]
    assert group.gather_json("me") == ["me"]
    group.all_reduce(out)
    assert out.tolist() == [1.0, 2.0]


def test_the_death_of_a_member_raises_on_all_others_and_they_form_the_next_group() -> None:
    def body(peer: Peer) -> object:
        group = peer.form(0, range(3))
        group.gather_json("here")
        if peer.number == 1:
            pid = os.fork()  # the one that ends is a copy with the same connections, so that the test hears of this one
            if pid:
                return "gone"
            os._exit(0)
        with pytest.raises(GroupLost):
            list(map(group.gather_json, itertools.repeat("still here")))
        group.leave()
        with pytest.raises(GroupLost, match="left"):
            group.gather_json("again")
        return peer.form(1, [0, 2]).gather_json(peer.number)

    results = in_processes(3, body)
    assert results[0] == results[2] == [0, 2]


def test_a_call_that_waits_is_interrupted_and_nothing_of_its_group_stays(tmp_path: Path) -> None:
    def connections() -> list[str]:
        names = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
        return [name for name in names if "gloo" in name]

    def body(peer: Peer) -> str:
        store = dist.PrefixStore("0", dist.FileStore(peer.store_path, -1))
        over = threading.Event()
        group = Group.form(store, peer.number, 2, CPU, ADDRESS, over.is_set)
        group.gather_json("here")
        if peer.number == 1:  # never calls again, and keeps its connections
            while not (tmp_path / "over").exists():
                over.wait(0.02)
            return "idle"
        threading.Timer(0.2, lambda: (over.set(), group.wake())).start()
        with pytest.raises(GroupLost, match="another group"):
            group.gather_json("waiting")
        assert connections()
        group.leave()
        (tmp_path / "over").touch()
        wait_for("the end of gloo's threads", lambda: not connections())
        return "interrupted"

    assert in_processes(2, body) == ["interrupted", "idle"]


def test_members_meet_at_a_store_and_who_does_not_come_is_not_waited_for() -> None:
    server, at = store_server(ADDRESS)
    store_client(at, 7, 5.0).set("key", "value")
    assert store_client(at, 7, 5.0).get("key") == b"value"
    assert not store_client(at, 8, 5.0).check(["key"])
    over = threading.Event()
    threading.Timer(0.2, over.set).start()
    with pytest.raises(GroupLost, match="another group"):
        Group.form(store_client(at, 9, 5.0), 0, 2, CPU, ADDRESS, over.is_set)
    del server


def test_a_store_whose_member_is_gone_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "TCPStore", lambda *_, **__: pytest.fail("torch would try a closed port for 30 seconds"))
    with pytest.raises(GroupLost, match="no store"):
        store_client(f"{ADDRESS}:1", 1, 20.0)


def test_a_store_on_a_host_that_is_silent_is_left_for_the_next_group(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        assert timeout <= 1.0
        tries.append(address)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(GroupLost, match="another group"):
        store_client("192.0.2.1:1", 1, 1000.0, lambda: len(tries) == 3)
    with pytest.raises(GroupLost, match=r"no answer from 192\.0\.2\.1"):
        store_client("192.0.2.1:1", 1, 0.0)
