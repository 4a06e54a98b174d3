"""Lines and limits, against what the standard library makes of the same bytes."""

from __future__ import annotations

import io
import random

import pytest

from forge_ray.data.reading import unpack


class _Trickle(io.RawIOBase):
    """A file that gives a few bytes at a time."""

    def __init__(self, data: bytes, seed: int) -> None:
        self._data, self._draw = data, random.Random(seed)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        count = self._draw.randint(1, 40)
        piece, self._data = self._data[:count], self._data[count:]
        return piece


@pytest.mark.parametrize("seed", range(30))
def test_lines_are_those_of_split_whatever_the_chunks_and_long_ones_are_none(seed: int) -> None:
    draw = random.Random(seed)
    found = [bytes(draw.choices(b"ab \r", k=draw.choice([0, 1, 5, 20, 60]))) for _ in range(draw.randint(0, 40))]
    data = b"\n".join(found) + draw.choice([b"", b"\n"])
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    limit = draw.choice([1, 20, 40, 1000])
    read = [line for batch in unpack.lines(_Trickle(data, seed), limit) for line in batch]
    assert read == [line if len(line) <= limit else None for line in expected]


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 5000])
def test_whole_holds_no_more_than_its_limit(size: int) -> None:
    data = bytes(size)
    stream = io.BytesIO(data)
    assert unpack.whole(stream, 100) == (data if size <= 100 else None)
    assert stream.tell() <= 101


def test_a_budget_allows_a_ratio_beyond_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "FREE_BYTES", 1000)
    unpack.Budget(0).spend(1000)
    budget = unpack.Budget(100)
    budget.spend(100 * unpack.MAX_RATIO)
    with pytest.raises(unpack.Unreadable, match="bomb"):
        budget.spend(1)
