"""What the decoder computes: causal, document by document, of the size that arithmetic says."""

from __future__ import annotations

import pytest
import torch

from forge_ray.config import ModelConfig
from forge_ray.errors import CorruptError
from forge_ray.model import transformer
from forge_ray.model.arithmetic import activation_bytes, num_parameters, train_flops_per_token
from forge_ray.model.transformer import Transformer, document_mask, load_weights

VOCAB, END = 50, 3
SHAPES = {
    "tied": {},
    "untied": {"tied_embeddings": False},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "d_model": 96},
    "wide heads": {"head_dim": 128, "num_heads": 3, "num_kv_heads": 1, "tied_embeddings": False},
    "experts": {"num_experts": 5, "experts_per_token": 2},
}


def build(seed: int = 0, **shape: object) -> Transformer:
    config = ModelConfig(**{"num_layers": 2, "d_model": 64, "d_ff": 96, "init_std": 0.2, **shape})
    return Transformer(config, VOCAB, 32).initialise(seed).eval()


def tokens(rows: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Seeded ids above the end token."""
    return torch.randint(END + 1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_arithmetic_counts_the_real_parameters(shape: dict[str, object]) -> None:
    model = build(**shape)
    assert num_parameters(model.config, VOCAB) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_arithmetic_counts_the_real_operations(shape: dict[str, object]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, T = build(**shape), 24
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens(1, T), document_mask(tokens(1, T), END)).sum().backward()
    assert counter.get_total_flops() / T == train_flops_per_token(model.config, VOCAB, T)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("depth", "experts", "rows"), [(2, 0, False), (4, 0, True), (4, 8, True), (4, 8, False)])
def test_arithmetic_counts_the_real_memory_of_activations(
    depth: int, experts: int, rows: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    B, T = 2, 320  # no tensor of activations has the shape of a matrix then
    if not rows:
        monkeypatch.setattr(transformer, "LONGEST_BY_ROWS", T - 1)
    model = Transformer(ModelConfig(depth=depth, num_experts=experts), VOCAB, T).initialise(0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = {shape for p in model.parameters() if p.ndim == 2 for shape in (p.shape, p.shape[::-1])}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in weights:  # autocast's
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
        model.hidden(tokens(B, T), document_mask(tokens(B, T), END))
    real = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own)
    real += B * T * T * (4 if rows else 1)  # the mask that all blocks are given
    told = activation_bytes(model.config, T, B, precision=precision, cpu=rows)
    assert told == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_later_tokens_do_not_change_earlier_logits(shape: dict[str, object]) -> None:
    model, first = build(**shape), tokens()
    changed = first.clone()
    changed[:, 15:] = tokens(seed=1)[:, 15:]
    with torch.inference_mode():
        for mask in (lambda ids: None, lambda ids: document_mask(ids, END)):
            before, after = model(first, mask(first)), model(changed, mask(changed))
            assert (before[:, :15] - after[:, :15]).abs().max() < 1e-5
            assert (before[:, 15:] - after[:, 15:]).abs().max() > 1e-2


def test_a_document_inside_a_sequence_computes_what_it_does_alone() -> None:
    model, ids = build(), tokens(1)
    ids[0, [6, 15]] = END
    with torch.inference_mode():
        packed = model(ids, document_mask(ids, END))
        for start, stop in ((0, 6), (6, 15), (15, 24)):
            # Rotary positions are relative, so a document may stand anywhere.
            assert (packed[:, start:stop] - model(ids[:, start:stop])).abs().max() < 1e-4
        assert (packed[:, 6:] - model(ids)[:, 6:]).abs().max() > 1e-2


def test_the_end_token_belongs_to_the_document_that_it_opens() -> None:
    ids = torch.tensor([[5, END, 7, 8, END, 9], [END, END, 4, 5, 6, 7]])
    mask = document_mask(ids, END)[:, 0].int().tolist()
    assert mask[0] == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    assert [sum(row) for row in mask[1]] == [1, 1, 2, 3, 4, 5]


def test_initial_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build(seed=5)
    torch.manual_seed(2)
    same, other = build(seed=5), build(seed=6)
    weights = [torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1]) for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.isclose(weights[0], weights[2]).all()


def test_initial_output_projections_are_smaller_by_the_depth() -> None:
    model = build(num_layers=8, init_std=0.02)
    spread = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.ndim > 1}
    assert all(
        value == pytest.approx(0.005 if name.endswith(("out.weight", "down.weight")) else 0.02, rel=0.1)
        for name, value in spread.items()
    )


def test_weights_are_taken_over_bit_for_bit() -> None:
    one, other = build(seed=0), build(seed=1)
    load_weights(other, {name: p.detach().clone() for name, p in one.named_parameters()})
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize(
    ("shape", "culprit"),
    [
        ({"d_ff": 128}, "blocks.0.mlp.down.weight"),
        ({"num_layers": 3}, "blocks.2"),
        ({"num_layers": 1}, "blocks.1"),
        ({"tied_embeddings": False}, "head.weight"),
    ],
)
def test_weights_of_another_shape_are_refused_and_change_nothing(shape: dict[str, object], culprit: str) -> None:
    model, foreign = build(), build(seed=1, **shape)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(CorruptError, match=culprit):
        load_weights(model, dict(foreign.named_parameters()))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
