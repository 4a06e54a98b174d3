"""The guardian: what it takes for trouble and what not, what training leaves out, and which replica is the odd one."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from forge_ray.artifact import Artifact, Manifest, Workspace
from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.config.guard import GuardConfig
from forge_ray.data import shards
from forge_ray.data.loader import SlotLoader
from forge_ray.errors import TrainError
from forge_ray.model.transformer import Transformer, document_mask
from forge_ray.train import guardian
from forge_ray.train.guardian import Guardian, Skips, Verdict, checkpoint_before, digest, odd_ones, samples_of
from forge_ray.train.loss import mean_loss

NAN, INF = float("nan"), float("inf")
Curve = list[tuple[float, float]]


def curve(seed: int, steps: int, noise: float) -> Curve:
    """Loss and gradient norm of an ordinary run: fast fall, long tail, decay of the rate; noise with slow waves, norms
    with a heavy upper tail that rise as the rate decays."""
    draw = np.random.default_rng(seed)
    t = np.arange(steps)
    decay = np.clip((t / steps - 0.4) / 0.6, 0, 1)
    waves = np.convolve(draw.standard_normal(steps + 200), 0.98 ** np.arange(200), "valid")[:steps]
    loss = 1.8 + 9 * (1 + t / (0.002 * steps + 20)) ** -0.55 - 0.25 * decay**2
    loss = loss + noise * draw.standard_normal(steps) + 0.1 * noise * waves
    norm = (0.25 + 3 * np.exp(-t / (0.01 * steps))) * (1 + 1.5 * decay)
    norm *= np.exp(0.15 * draw.standard_normal(steps) + 0.03 * np.abs(draw.standard_t(4, steps)))
    return list(zip(loss.tolist(), norm.tolist(), strict=True))


def trained(rows: Curve, **config: Any) -> Guardian:
    """A guardian that has seen these steps, all ordinary."""
    guard = Guardian(GuardConfig(**config))
    for step, row in enumerate(rows):
        verdict = guard.judge(step, *row)
        assert verdict.action == "apply", f"step {step}: {verdict.reason}"
        guard.commit(verdict)
    return guard


def copied(guard: Guardian) -> Guardian:
    """What a newcomer makes of a state that came as JSON."""
    other = Guardian(guard.config)
    other.load(json.loads(json.dumps(guard.state(), allow_nan=False)))
    return other


@pytest.mark.parametrize("noise", [0.003, 0.02, 0.15])
@pytest.mark.parametrize("steps", [300, 20_000])
def test_ordinary_curves_raise_no_alarm(noise: float, steps: int) -> None:
    for seed in range(1 if steps > 1000 else 25):
        guard = trained(curve(seed, steps, noise))
        assert guard.skips.windows == []


@pytest.mark.parametrize("kind", ["non_finite", "loss_spike", "norm_spike"])
@pytest.mark.parametrize("policy", ["ignore", "skip", "rollback", "stop"])
def test_each_kind_of_trouble_is_met_as_its_policy_says(kind: str, policy: str) -> None:
    if (kind, policy) == ("non_finite", "ignore"):
        with pytest.raises(ValueError):
            GuardConfig(non_finite="ignore")
        return
    guard = trained(curve(0, 1000, 0.02), **{kind: policy})
    loss, norm = 2.3, 0.5
    rows = {"non_finite": [(NAN, norm), (loss, INF), (-INF, NAN)], "loss_spike": [(4.0, norm)]}
    for row in rows.get(kind, [(loss, 20.0)]):
        verdict = guard.judge(1000, *row)
        assert verdict.action == ("apply" if policy == "ignore" else policy)
        assert verdict.back_to == (900 if policy == "rollback" else None)
        json.dumps(verdict.as_dict(), allow_nan=False)
    if policy == "stop":
        with pytest.raises(TrainError, match="stopped by its guardian") as caught:
            guard.commit(verdict)
        assert f"pretrain.guard.{kind}" in str(caught.value)
        assert "at step 1000, batch 1000" in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_severest_policy_of_what_is_wrong_decides() -> None:
    for policies in ({"loss_spike": "skip", "norm_spike": "rollback"}, {"loss_spike": "rollback"}):
        assert trained(curve(0, 500, 0.02), **policies).judge(500, 20.0, 90.0).action == "rollback"


def test_before_there_is_a_history_only_nan_and_infinity_count() -> None:
    guard = trained(curve(0, 100, 0.02))
    assert guard.judge(100, 1e6, 1e6).action == "apply"
    assert guard.judge(100, 3.0, NAN).action == "skip"


def test_a_spike_is_far_out_both_in_deviations_and_in_distance() -> None:
    draw = random.Random(0)
    spread = [draw.gauss(0.0, 1.0) for _ in range(128)]
    for width, loss, norm, spikes in (
        (0.001, 2.4, 0.5, False),  # 400 deviations, but only 0.4 nats
        (0.001, 2.6, 0.5, True),
        (0.2, 3.2, 0.5, False),  # 1.2 nats, but only 6 deviations
        (0.2, 4.2, 0.5, True),
        (0.001, 2.0, 3.4, False),  # 6.8 times the median
        (0.001, 2.0, 3.6, True),
        (0.5, 2.0, 3.8, False),  # 7.6 times the median, but only 6.6 deviations
        (0.5, 2.0, 5.5, True),
        (0.001, 0.1, 0.001, False),  # far below is no trouble
    ):
        guard = Guardian(GuardConfig())
        for step, noise in enumerate(spread):
            guard.commit(guard.judge(step, 2.0 + width * noise, abs(0.5 + width * noise)))
        assert (guard.judge(128, loss, norm).action == "skip") == spikes, (width, loss, norm)


def test_a_skipped_batch_is_not_read_again_and_leaves_the_history_as_it_was() -> None:
    guard = trained(curve(0, 1000, 0.02))
    before = guard.state()
    for position in (1000, 1001, 1002):
        assert guard.position(1000) == position
        guard.commit(guard.judge(1000, 50.0, 0.5))
    assert guard.judge(1000, 2.3, 0.5) == Verdict("apply", 1000, 1003, 2.3, 0.5)
    assert {**guard.state(), "windows": [], "skipped": []} == before


def test_judging_changes_nothing() -> None:
    guard = trained(curve(0, 500, 0.02))
    before = guard.state()
    for row in ((2.0, 0.4), (90.0, 0.4), (NAN, 0.4), (2.0, 90.0)):
        assert guard.judge(500, *row) == guard.judge(500, *row) or row[0] != row[0]
    assert guard.state() == before


def test_a_newcomer_decides_as_those_who_saw_it_all() -> None:
    draw = random.Random(5)
    first = Guardian(GuardConfig(history_steps=32, max_skips=3, limit_steps=60, rollback_steps=5))
    second, step = copied(first), 0
    saved: dict[int, dict[str, Any]] = {0: first.state()}
    actions = set()
    while step < 1500:
        if draw.random() < 0.1:
            second = copied(first)
        row = (draw.choice([2.0, 2.0, 2.0, 9.0, NAN]) + draw.random() / 7, draw.random() / 3)
        verdict, other = first.judge(step, *row), second.judge(step, *row)
        assert repr(verdict) == repr(other)
        actions.add(verdict.action)
        if verdict.action == "stop":
            break
        if verdict.action == "rollback":
            step = checkpoint_before(verdict, list(saved))
            for guard in (first, second):
                guard.roll_back(verdict, step, saved[step])
            saved = {at: state for at, state in saved.items() if at <= step}
            continue
        for guard in (first, second):
            guard.commit(verdict)
        if verdict.action == "apply":
            step += 1
            saved |= {step: json.loads(json.dumps(first.state()))} if step % 7 == 0 else {}
    assert first.state() == second.state()
    assert actions == {"apply", "skip", "rollback", "stop"}


def test_trouble_that_stays_is_skipped_then_rolled_back_then_stops_the_run() -> None:
    guard = trained(curve(0, 600, 0.02), max_skips=3, max_rollbacks=2, rollback_steps=50, rollback_skip_batches=20)
    step, told = 600, []
    while (verdict := guard.judge(step, NAN, 0.5)).action != "stop":
        told.append((verdict.action, step, verdict.position))
        if verdict.action == "rollback":
            step = checkpoint_before(verdict, [0, 200, 500, 540, 590])
            guard.roll_back(verdict, step, guard.state())
        else:
            guard.commit(verdict)
    assert told == [
        *(("skip", 600, position) for position in (600, 601, 602)),
        ("rollback", 600, 603),
        *(("skip", 540, position) for position in (624, 625, 626)),
        ("rollback", 540, 627),
        *(("skip", 200, position) for position in (648, 649, 650)),
    ]
    assert "from step 600 to 540, 540 to 200" in str(verdict.error())


def test_trouble_long_ago_does_not_count() -> None:
    guard = trained([(2.0, 0.5)] * 30, history_steps=16, max_skips=2, limit_steps=12)
    for step in range(30, 200):
        if step % 6 == 0:
            verdict = guard.judge(step, NAN, 0.5)
            assert verdict.action == "skip"
            guard.commit(verdict)
        guard.commit(guard.judge(step, 2.0, 0.5))
    assert len(guard.skips.windows) == len(range(30, 200, 6))


def test_a_rollback_into_the_steep_part_judges_by_the_losses_of_that_time() -> None:
    rows = curve(0, 4000, 0.02)
    guard, saved = Guardian(GuardConfig(history_steps=32)), {}
    for step, row in enumerate(rows[:2000]):
        saved[step] = guard.state()
        guard.commit(guard.judge(step, *row))
    verdict = Verdict("rollback", 2000, 2000, NAN, 0.5, "non_finite", "", 40)
    assert rows[40][0] > guard.state()["losses"][-1] + 1.0  # which today's history would take for a spike
    guard.roll_back(verdict, 40, saved[40])
    for step in range(40, 200):
        verdict = guard.judge(step, *rows[step])
        assert verdict.action == "apply"
        guard.commit(verdict)
    assert guard.position(40) == 2101


def test_data_that_become_harder_cost_some_batches_and_do_not_stop_the_run() -> None:
    """The n-th batch's loss depends on its position alone: another source begins at 700."""
    rows = [(loss + 1.5 * (at >= 700), norm) for at, (loss, norm) in enumerate(curve(1, 3000, 0.02))]
    guard = Guardian(GuardConfig(rollback_skip_batches=50, rollback_steps=40))
    step, saved, actions = 0, {}, []
    while guard.position(step) < 3000:
        saved[step] = guard.state()
        verdict = guard.judge(step, *rows[guard.position(step)])
        actions.append((verdict.action, verdict.new_level))
        if verdict.action == "rollback":
            step = checkpoint_before(verdict, list(saved))
            guard.roll_back(verdict, step, saved[step])
            continue
        guard.commit(verdict)
        step += 1 if verdict.action == "apply" else 0
    assert actions.count(("rollback", False)) == 1
    assert actions.count(("apply", True)) == 1
    assert sum(window.after - window.first for window in guard.skips.windows) < 200
    assert guard.judge(step, 9.0, 0.5).action == "skip"  # and it watches again


def test_the_state_is_bounded_whatever_happens() -> None:
    guard = trained([(2.0, 0.123456789)] * 128, limit_steps=1, max_skips=1)
    for step in range(128, 10_000):
        verdict = guard.judge(step, INF, 0.5)
        if verdict.action == "stop":
            break
        guard.commit(verdict)
        guard.commit(guard.judge(step, 2.0 + step / 1e6, 0.123456789))
    assert "1000 windows" in str(verdict.error())
    assert len(json.dumps(guard.state())) < 60_000


def test_a_longer_history_than_the_configuration_keeps_its_newest_part() -> None:
    state = trained(curve(0, 200, 0.02)).state()
    guard = Guardian(GuardConfig(history_steps=20))
    guard.load(state)
    assert guard.state()["losses"] == state["losses"][-20:]


def test_a_rollback_without_any_checkpoint_is_an_error() -> None:
    verdict = Verdict("rollback", 50, 50, NAN, 1.0, "non_finite", "loss nan", 0)
    assert checkpoint_before(verdict, [30, 10, 20]) == 10  # none is early enough: the oldest
    with pytest.raises(TrainError, match="no checkpoint"):
        checkpoint_before(verdict, [])


@pytest.mark.parametrize("seed", range(40))
def test_consumed_and_skipped_batches_cover_a_prefix_without_holes_or_overlaps(seed: int) -> None:
    """Random histories of steps, skips, rollbacks, kills and newcomers."""
    draw = random.Random(seed)
    config = GuardConfig(
        history_steps=16,
        max_skips=draw.choice([0, 1, 4]),
        max_rollbacks=1000,
        limit_steps=draw.choice([5, 50]),
        rollback_steps=draw.choice([1, 10, 40]),
        rollback_skip_batches=draw.choice([0, 1, 30]),
        non_finite=draw.choice(["skip", "rollback"]),
    )
    guard, step, consumed = Guardian(config), 0, []
    saved = {0: guard.state()}
    for _ in range(600):
        event, before, was = draw.random(), guard.skips.windows, guard.position(step)
        if event < 0.05:
            saved[step] = json.loads(json.dumps(guard.state()))
            saved = dict(sorted(saved.items())[-4:])
        elif event < 0.07:  # all workers killed at once
            step = max(saved)
            guard, consumed = Guardian(config), consumed[:step]
            guard.load(saved[step])
        else:
            verdict = guard.judge(step, NAN if draw.random() < 0.08 else 2.0, 0.5)
            assert verdict.position == guard.position(step)
            if verdict.action == "rollback":
                step = checkpoint_before(verdict, list(saved))
                guard.roll_back(verdict, step, saved[step])
                consumed = consumed[:step]
                saved = {at: state for at, state in saved.items() if at < step} | {step: guard.state()}
            else:
                guard.commit(verdict)
                if verdict.action == "apply":
                    consumed.append(verdict.position)
                    step += 1
            assert set(map(repr, before)) <= set(map(repr, guard.skips.windows))  # what was recorded stays so
            assert guard.position(step) > was  # so the greater position tells which of two workers is ahead
        assert consumed == [guard.position(at) for at in range(step)]
        assert all(a < b for a, b in itertools.pairwise(consumed))
        windows = guard.skips.windows
        skipped = [at for window in windows for at in range(window.first, window.after)]
        assert all(window.first < window.after for window in windows)
        assert sorted([*consumed, *skipped]) == list(range(len(consumed) + len(skipped)))


def test_a_window_over_older_ones_keeps_what_they_were_for() -> None:
    skips = Skips()
    for first, after, kind in ((3, 4, "a"), (7, 9, "b"), (2, 12, "c"), (2, 12, "d"), (20, 21, "e")):
        skips.add(first, after, kind)
    kinds = {at: window.kind for window in skips.windows for at in range(window.first, window.after)}
    assert "".join(kinds.get(at, ".") for at in range(22)) == "..cacccbbccc........e."
    assert [skips.position(step) for step in range(12)] == [0, 1, *range(12, 20), 21, 22]


@pytest.fixture
def corpus(tmp_path: Any) -> Artifact:
    """Four shards of two sources; a document's tokens are its number, the last one too."""
    workspace = Workspace(str(tmp_path / "store"))
    draw, number, rows = random.Random(0), 1, []
    for i, origin in enumerate("abab"):
        tokens, columns = [], {"id": [], "offset": [], "length": []}
        for _ in range(30):
            length = draw.choice([2, 3, 10, 40, 90])
            for name, value in (("id", f"doc{number}"), ("offset", len(tokens)), ("length", length)):
                columns[name].append(value)
            tokens += [number] * length
            number += 1
        with workspace.new_file(f"train-{i}.tok") as build:
            shards.write(build.stream, np.array(tokens, "uint16"), pa.table(columns), vocab_size=128, end_token=0)
        rows.append(
            shards.ShardInfo(
                build.entry.name, build.entry.sha256, build.entry.size_bytes, len(tokens), len(columns["id"]), origin
            )
        )
    index = workspace.put_bytes(shards.INDEX, shards.ShardIndex(tuple(rows), 128, 0).to_json())
    files = (*(row.entry for row in rows), index)
    return workspace.publish(Manifest(stage="tokenize", fingerprint="0" * 16, files=files))


@pytest.fixture
def loader(corpus: Artifact) -> Any:
    mixture = {"weights": {"a": 1, "b": 2}, "max_epochs": 100}
    config = PretrainConfig(slots=4, micro_batch=2, seq_len=16, max_workers=1, mixture=mixture)
    loader = SlotLoader.of(config, corpus)
    yield loader
    loader.reader.close()


def test_samples_are_the_documents_whose_tokens_are_in_the_batch(loader: SlotLoader) -> None:
    for position in (0, 3, 17, 40):
        batch = [token for slot in range(4) for token in loader.slot(position, slot).flatten().tolist()]
        wanted = list(dict.fromkeys(f"doc{token}" for token in batch))
        found = samples_of(loader, position, most=1000)
        assert [name for _, name in found.documents] == wanted
        assert all(source == "ab"[(int(name[3:]) - 1) // 30 % 2] for source, name in found.documents)
        assert found.count == len(wanted)
        few = samples_of(loader, position, most=3)
        assert (few.documents, few.count) == (found.documents[:3], found.count)


def flipped(buffer: torch.Tensor, at: int, bit: int) -> None:
    buffer.view(torch.int32)[at] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)


@pytest.mark.parametrize("numel", [1, 2, 3, 1000, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 200_001])
def test_a_digest_changes_with_every_single_bit(numel: int) -> None:
    draw = random.Random(numel)
    buffer = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    good = digest(buffer)
    assert 0 <= good < 1 << 64
    places = {0, numel - 1, *(draw.randrange(numel) for _ in range(20))}
    for at, bit in ((at, bit) for at in places for bit in range(32)):
        flipped(buffer, at, bit)
        assert digest(buffer) != good, f"bit {bit} of element {at}"
        flipped(buffer, at, bit)
    assert digest(buffer) == good
    buffer.view(torch.int32)[:2].bitwise_not_()  # and with all of a word's
    assert digest(buffer) != good


def test_every_bit_of_a_digest_depends_on_every_bit_of_a_word() -> None:
    buffer = torch.randn(4000, generator=torch.Generator().manual_seed(2))
    good = digest(buffer)
    for half, bit in ((half, bit) for half in (0, 1) for bit in range(32)):
        changed = 0
        for at in range(half, 80, 2):
            flipped(buffer, at, bit)
            changed |= digest(buffer) ^ good
            flipped(buffer, at, bit)
        assert changed == (1 << 64) - 1, f"bit {bit + 32 * half}: {changed:064b}"


def test_a_digest_sees_order_signs_of_zero_nan_payloads_and_length() -> None:
    buffer = torch.arange(300_000, dtype=torch.float32)
    seen = {digest(buffer), digest(buffer.flip(0)), digest(buffer.roll(2))}
    blocks = buffer[: 1 << 17]
    seen |= {digest(blocks), digest(blocks.roll(1 << 16))}
    seen |= {digest(torch.zeros(n)) for n in (1, 2, 3, 1 << 16, 1 << 17)}
    seen.add(digest(-torch.zeros(2)))
    nans = torch.full((2,), NAN)
    seen.add(digest(nans))
    flipped(nans, 1, 3)
    seen.add(digest(nans))
    assert len(seen) == 3 + 2 + 5 + 1 + 2


def test_many_flips_at_once_are_seen_as_well() -> None:
    draw = random.Random(0)
    buffer = torch.randn(70_000, generator=torch.Generator().manual_seed(0))
    seen = {digest(buffer)}
    for _ in range(500):
        bit = draw.randrange(32)
        for at in draw.sample(range(70_000), 2):  # the same bit of two elements, where a plain sum would be blind
            flipped(buffer, at, bit)
        seen.add(digest(buffer))
    assert len(seen) == 501


def test_a_digest_depends_on_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = torch.randn(500_003, generator=torch.Generator().manual_seed(1))
    shifted = torch.empty(500_004)[1:]  # not on an 8-byte boundary
    shifted.copy_(buffer)
    good = digest(buffer)
    assert digest(shifted) == good
    monkeypatch.setitem(guardian._BLOCKS_AT_ONCE, "cpu", 256)  # as on a GPU
    assert digest(buffer) == good


def test_the_odd_ones_are_those_outside_a_strict_majority() -> None:
    draw = random.Random(0)
    for digests, odd in (([7], []), ([7, 7], []), ([7, 8], [0, 1]), ([7, 7, 8], [2]), ([7, 7, 8, 8], [0, 1, 2, 3])):
        assert odd_ones(digests) == odd
    for _ in range(200):
        size = draw.randrange(1, 12)
        digests = [draw.choice([1, 1, 1, 2, 3]) for _ in range(size)]
        odd = odd_ones(digests)
        kept = {mine for rank, mine in enumerate(digests) if rank not in odd}
        if len(odd) == size:
            assert all(2 * digests.count(mine) <= size for mine in digests)
        else:
            assert len(kept) == 1
            assert 2 * len(odd) < size


def test_real_training_raises_no_alarm_and_real_damage_does(loader: SlotLoader) -> None:
    """A tiny model learns; then comes a batch of noise; then its weights are damaged."""
    torch.set_num_threads(1)
    shape = ModelConfig(num_layers=1, d_model=32, num_heads=1, d_ff=48)
    model = Transformer(shape, 128, 16).initialise(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))

    def gradients(tokens: torch.Tensor) -> tuple[float, float]:
        optimizer.zero_grad()
        hidden = model.hidden(tokens[:, :-1], document_mask(tokens[:, :-1], 0))
        loss = mean_loss(hidden, model.head.weight, tokens[:, 1:], torch.float32)
        loss.backward()
        return float(loss.detach()), float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))

    def batch(position: int) -> torch.Tensor:
        return torch.cat([torch.from_numpy(loader.slot(position, slot)) for slot in range(4)])

    guard = Guardian(GuardConfig(history_steps=32))
    for step in range(120):
        verdict = guard.judge(step, *gradients(batch(guard.position(step))))
        assert verdict.action == "apply", verdict.reason
        optimizer.step()
        guard.commit(verdict)
    noise = torch.randint(0, 128, (8, 17), generator=torch.Generator().manual_seed(0))
    assert guard.judge(120, *gradients(noise)).action == "skip"
    assert guard.judge(120, *gradients(batch(120))).action == "apply"
    with torch.no_grad():
        model.norm.weight.mul_(-3.0)
    assert guard.judge(120, *gradients(batch(120))).kind == "loss_spike"
