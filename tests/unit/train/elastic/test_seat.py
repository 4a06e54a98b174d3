"""Seats of a machine: who may have which, and the lines that its processes speak."""

from __future__ import annotations

import fcntl
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from forge_ray.errors import StorageError
from forge_ray.train.elastic import seat
from forge_ray.train.elastic.lines import LIMIT_BYTES, Lines

TASK = {"run_id": "r", "orphan_s": 1.0}


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ExitStack]:
    """Claims that end with the test, in a folder of its own."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("os.access", lambda *_: False)
    with ExitStack() as stack:
        yield stack


def keep(stack: ExitStack, folder: Path, task: object = TASK) -> None:
    """As if a keeper lived there."""
    (folder / seat.TASK).write_text(json.dumps(task))
    lock = stack.enter_context((folder / seat.KEEPER_LOCK).open("ab"))
    fcntl.flock(lock, fcntl.LOCK_EX)


def test_each_agent_has_a_seat_of_its_own_and_an_empty_one_is_used_again(stack: ExitStack) -> None:
    first = stack.enter_context(seat.claim("r", TASK))
    with seat.claim("r", TASK) as second:
        assert (first[0].name, second[0].name) == ("0", "1")
        assert not first[1]
        assert not second[1]
    with seat.claim("r", TASK) as third:
        assert third[0] == second[0]
    assert json.loads((first[0] / seat.TASK).read_text()) == TASK


def test_a_seat_whose_keeper_is_at_work_is_taken_over_before_an_empty_one(stack: ExitStack) -> None:
    with seat.claim("r", TASK) as (zero, _), seat.claim("r", TASK) as (one, _):
        keep(stack, one)
    assert stack.enter_context(seat.claim("r", TASK)) == (one, True)
    with seat.claim("r", TASK) as again:
        assert again == (zero, False)


def test_a_keeper_with_another_task_is_left_alone(stack: ExitStack) -> None:
    with seat.claim("r", TASK) as (zero, _):
        pass
    keep(stack, zero, {**TASK, "orphan_s": 9.0})
    with seat.claim("r", TASK) as (other, kept):
        assert other != zero
        assert not kept
    assert json.loads((zero / seat.TASK).read_text())["orphan_s"] == 9.0


def test_a_folder_that_somebody_else_made_is_refused(stack: ExitStack, tmp_path: Path) -> None:
    import os

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"forge-seats-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="another user") as caught:
        seat.folder_of_run("r")
    assert "forge-seats" in str(caught.value)


def test_where_no_keeper_listens_there_is_no_connection(stack: ExitStack) -> None:
    with seat.claim("r", TASK) as (folder, _):
        assert seat.attach(folder) is None


@pytest.fixture
def ends() -> Iterator[tuple[Lines, socket.socket]]:
    """Lines, and the raw other end."""
    mine, theirs = socket.socketpair()
    lines = Lines(mine)
    yield lines, theirs
    lines.close()
    theirs.close()


def test_messages_come_whole_and_in_order_however_they_are_cut(ends: tuple[Lines, socket.socket]) -> None:
    lines, raw = ends
    raw.sendall(b'{"a": 1}\n{"b"')
    assert lines.receive() == [{"a": 1}]
    raw.sendall(b": 2}")
    assert lines.receive() == []
    raw.sendall(b'\n{"c": 3}\n')
    assert lines.receive() == [{"b": 2}, {"c": 3}]
    assert lines.send({"d": 4})
    assert raw.recv(100) == b'{"d": 4}\n'


@pytest.mark.parametrize("sent", [b"not json\n", b'\x80\x04\x95"\n', b""])
def test_what_is_not_a_message_ends_the_connection(ends: tuple[Lines, socket.socket], sent: bytes) -> None:
    lines, raw = ends
    raw.sendall(sent)
    raw.close()
    assert lines.receive() is None
    assert not lines.send({"too": "late"}) or not lines.send({"too": "late"})


def test_a_line_without_end_is_not_kept_for_ever(ends: tuple[Lines, socket.socket]) -> None:
    lines, raw = ends
    lines._rest = b"x" * (LIMIT_BYTES + 1)
    raw.sendall(b"y")
    assert lines.receive() is None
