"""The log of a run on stores that cannot append."""

from __future__ import annotations

from forge_ray.events import Events
from forge_ray.storage import Storage


def test_records_of_two_writers_are_read_in_the_order_of_time(store_uri: str) -> None:
    storage = Storage(store_uri)
    first, second = Events(storage, "run"), Events(storage, "run")
    for number, events in enumerate([first, second, first, second]):
        events.add("step", number=number)
        events.flush()
    rows = Events.read(storage, "run")
    assert sorted(row["number"] for row in rows) == [0, 1, 2, 3]
    assert [row["time_s"] for row in rows] == sorted(row["time_s"] for row in rows)
    assert Events.read(storage, "another run") == []


def test_no_record_is_lost_or_doubled_where_a_segment_closes(store_uri: str) -> None:
    storage = Storage(store_uri)
    events = Events(storage, "run")
    for number in range(Events.SEGMENT_RECORDS + 5):
        events.add("step", number=number)
        if number % 300 == 0 or number >= Events.SEGMENT_RECORDS - 1:
            events.flush()
    assert [row["number"] for row in Events.read(storage, "run")] == list(range(Events.SEGMENT_RECORDS + 5))
    assert len(storage.list("runs/run/events")) == 2


def test_what_is_not_flushed_is_not_visible(store_uri: str) -> None:
    events = Events(Storage(store_uri), "run")
    events.add("step")
    assert Events.read(Storage(store_uri), "run") == []
