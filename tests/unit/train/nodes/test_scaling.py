"""How many agents each node is to have."""

from __future__ import annotations

from forge_ray.train.nodes.scaling import seats


def test_agents_stay_where_they_are_and_the_roomiest_nodes_are_filled_first() -> None:
    assert seats({"a": 0, "b": 1, "c": 8}, {"a": 1}, 4) == {"a": 1, "c": 3}


def test_a_node_that_is_gone_gets_nothing_and_its_agents_go_elsewhere() -> None:
    assert seats({"a": 0, "b": 3}, {"a": 1, "lost": 1}, 3) == {"a": 1, "b": 2}


def test_no_more_agents_are_wanted_than_there_is_room_for() -> None:
    assert seats({"a": 1, "b": 0}, {}, 4) == {"a": 1}


def test_a_node_takes_more_beside_those_that_it_has() -> None:
    assert seats({"a": 2}, {"a": 1}, 8) == {"a": 3}
