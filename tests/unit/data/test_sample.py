"""The draw: by ids alone, bounded, and the same in one process and in pieces."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from forge_ray.artifact import Artifact
from forge_ray.data import sample as drawing
from forge_ray.data.sample import Draw, last_prefix, merged, parts, sample

Publish, MakeRows = Callable[..., Artifact], Callable[..., list[dict[str, str]]]


def in_pieces(documents: Artifact, split: str, max_bytes: int) -> list[dict[str, str]]:
    """What the Ray tasks do, one after the other."""
    where, names = (documents.workspace, documents.ref), parts(documents, split)
    counts = [drawing._count(*where, [name]) for name in names]
    last = last_prefix(np.sum(counts, axis=0), max_bytes)
    return merged([drawing._pick(*where, [name], last) for name in names], max_bytes).to_pylist()


def ids(found: object) -> list[str]:
    return [row["id"] for row in found]  # type: ignore[attr-defined]


def test_the_sample_depends_on_documents_and_not_on_parts(publish: Publish, rows: MakeRows) -> None:
    every = rows(50)
    one = publish({"train-00000.parquet": every})
    other = every[::-1]
    three = publish(
        {"train-00000.parquet": other[:7], "train-00001.parquet": other[7:8], "train-00002.parquet": other[8:]}
    )
    drawn = [ids(sample(documents, "train", 3000)) for documents in (one, three)]
    assert drawn[0] == drawn[1]
    assert 0 < len(drawn[0]) < 50


def test_the_sample_is_bounded_and_a_larger_one_extends_a_smaller(publish: Publish, rows: MakeRows) -> None:
    documents = publish({"train-00000.parquet": rows(50), "heldout-00000.parquet": rows(5, seed=1)})
    largest = max(len(row["text"]) for row in rows(50))
    drawn = [list(sample(documents, "train", size)) for size in (1, 2000, 4000, 1 << 30)]
    found = [ids(rows) for rows in drawn]
    assert len(found[0]) == 1
    assert 2000 <= sum(len(row["text"]) for row in drawn[1]) < 2000 + largest
    assert set(found[1]) < set(found[2]) < set(found[3]) == {row["id"] for row in rows(50)}
    assert found[3] == sorted(found[3])


@pytest.mark.parametrize("max_bytes", [1, 777, 5000, 20_000, 1 << 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_tasks_over_parts_draw_what_one_process_draws(
    publish: Publish, rows: MakeRows, max_bytes: int, seed: int
) -> None:
    every = rows(200, seed=seed)
    random.Random(seed).shuffle(every)
    cuts = [0, 1, 40, 41, 150, 200]
    documents = publish({f"train-{i:05d}.parquet": every[a:b] for i, (a, b) in enumerate(itertools.pairwise(cuts))})
    alone, together = list(sample(documents, "train", max_bytes)), in_pieces(documents, "train", max_bytes)
    assert [(row["id"], row["text"]) for row in together] == [(row["id"], row["text"]) for row in alone]
    total = sum(len(row["text"].encode()) for row in alone)
    assert len(alone) == 200 or total >= max_bytes > total - len(alone[-1]["text"].encode())


def test_ids_that_share_their_first_digits_are_cut_exactly(publish: Publish, rows: MakeRows) -> None:
    every = [{**row, "id": f"00000000{i:08x}"} for i, row in enumerate(rows(20))]
    documents = publish({"train-00000.parquet": every[::2], "train-00001.parquet": every[1::2]})
    assert ids(in_pieces(documents, "train", 1000)) == ids(sample(documents, "train", 1000)) == ids(every)[:5]


def test_only_the_parts_of_the_split_are_read(publish: Publish, rows: MakeRows) -> None:
    names = ("train-00000.parquet", "heldout-00000.parquet", "trainer.parquet", "ledger-train-00000.parquet")
    documents = publish({name: rows(3, seed=i) for i, name in enumerate(names)})
    assert parts(documents, "train") == ["train-00000.parquet"]
    assert sorted(ids(sample(documents, "heldout", 1 << 30))) == sorted(ids(rows(3, seed=1)))
    assert ids(in_pieces(documents, "heldout", 1 << 30)) == ids(sample(documents, "heldout", 1 << 30))
    assert list(sample(documents, "other", 1 << 30)) == merged([], 100).to_pylist() == []


def test_the_memory_of_a_draw_is_that_of_what_it_keeps() -> None:
    draw, numbers = Draw(1_000_000), random.Random(0)
    tracemalloc.start()
    for _ in range(3000):  # 30 MB go by
        name = f"{numbers.getrandbits(64):016x}"
        if draw.wants(name):
            draw.add({"id": name, "text": name * 625})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1_000_000 <= draw.num_bytes < 1_010_000
    assert peak < 3_000_000
