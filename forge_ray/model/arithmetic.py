"""Sizes and costs of a model from its configuration alone. Imports no torch, so that planning stays light."""

from __future__ import annotations

from forge_ray.config import ModelConfig

LONGEST_BY_ROWS = 2048  # attention by rows would keep too much of longer sequences for the backward pass


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Trainable parameters, a tied output projection counted once."""
    return _parameters(model, vocab_size, experts=model.num_experts)


def num_active_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Those that one token meets: of a block's experts the few that it takes."""
    return _parameters(model, vocab_size, experts=model.experts_per_token)


def _parameters(model: ModelConfig, vocab_size: int, experts: int) -> int:
    d, attention = model.d_model, model.num_heads * model.head_dim
    kv = model.num_kv_heads * model.head_dim
    mlp = 3 * d * model.d_ff
    if model.num_experts:
        mlp = d * model.num_experts + experts * 3 * d * model.expert_width
    block = d * attention + 2 * d * kv + attention * d + mlp + 2 * d + 2 * model.head_dim
    return model.num_layers * block + d + vocab_size * d * (1 if model.tied_embeddings else 2)


def block_parameters(model: ModelConfig) -> int:
    """Parameters of all blocks: what is left without embedding, output projection and the last norm."""
    return num_parameters(model, 0) - model.d_model


def train_flops_per_token(model: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """Floating-point operations to train on one token, forward and backward, without recomputation.

    Six for each weight of a matrix product, and attention's scores and mix counted in full (not halved for causality).

    Source: PaLM (arXiv 2204.02311), appendix B.
    """
    d, attention = model.d_model, model.num_heads * model.head_dim
    norms = model.num_layers * 2 * (d + model.head_dim) + d
    matrices = num_active_parameters(model, 0) - norms + vocab_size * d
    return 6.0 * matrices + 12.0 * model.num_layers * attention * seq_len


def newton_schulz_flops(model: ModelConfig) -> float:
    """Floating-point operations of a step in which Muon orthogonalises all matrices of the blocks.

    Source: Jordan et al. 2024: five rounds of three products.
    """
    d, attention, kv = model.d_model, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    width, copies = (model.expert_width, model.num_experts) if model.num_experts else (model.d_ff, 1)
    block = 2 * newton_schulz_cost(d, attention) + 2 * newton_schulz_cost(d, kv)
    return 10.0 * model.num_layers * (block + 3 * copies * newton_schulz_cost(d, width))


def newton_schulz_cost(rows: int, columns: int) -> int:
    """Multiplications of one round for a matrix of this shape."""
    short, long = sorted((rows, columns))
    return short * short * (2 * long + short)


def state_bytes(model: ModelConfig, vocab_size: int, *, muon: bool, precision: str) -> int:
    """Memory of a worker that holds the whole state: weights, gradients and optimizer in fp32, and autocast's weights.

    AdamW keeps two moments for a parameter, Muon one for each matrix of a block; autocast bf16 weights for a step.
    """
    everything = num_parameters(model, vocab_size)
    autocast = 0 if precision == "fp32" else 2
    return (4 * 4 + autocast) * everything - (4 * block_parameters(model) if muon else 0)


def sums_bytes(model: ModelConfig, vocab_size: int, slots: int, workers: int, *, exact: bool) -> int:
    """Memory for sums of slots' gradients, beside the gradient of the slot under way (`elastic/slots.py`)."""
    return 4 * num_parameters(model, vocab_size) * num_sums(slots, workers, exact=exact)


def num_sums(slots: int, workers: int, *, exact: bool) -> int:
    """Sums of slots' gradients that a worker holds at a time, at most.

    Exact: one for each level of the tree over the worker's own slots. Fast: the copy that is sent to the others. Not
    counted: in exact mode, what a worker holds more for the rest of a step in which another was lost.
    """
    if not exact:
        return min(1, workers - 1)
    return max(1, (-(-slots // workers) - 1).bit_length())


def activation_bytes(
    model: ModelConfig,
    seq_len: int,
    sequences: int,
    *,
    precision: str,
    cpu: bool = False,
    recompute: bool = False,
    compiled: bool = False,
) -> int:
    """Memory that a forward pass keeps for its backward pass, in fp32 or under bf16 autocast.

    For a token and block: the stream before and after each norm (fp32) and, under autocast, as each product's input
    (bf16); queries and keys before and after their norm, with the values; four feed-forward tensors, and for each
    expert that it takes its input, twice, and output. A compiled block keeps what products need and computes the rest
    again. On a CPU attention by rows keeps its probabilities. Elsewhere (SDPA) each block keeps what may be seen, a
    value for each pair of tokens.
    """
    d, attention, kv = model.d_model, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    size, autocast = (4, False) if precision == "fp32" else (2, True)
    by_rows = cpu and seq_len <= LONGEST_BY_ROWS
    if compiled and not model.num_experts:
        per_block = 14 * d + 6 * (attention + kv) if autocast else 16 * d + 12 * (attention + kv)
        per_block += 3 * size * model.d_ff
    else:
        per_block = 26 * d + 12 * (attention + kv) if autocast else 24 * d + 16 * (attention + kv)
        if model.num_experts:
            per_block += model.experts_per_token * (4 * size * model.expert_width + 6 * d) + 8 * model.num_experts
        else:
            per_block += 4 * size * model.d_ff
    if by_rows:
        per_block += size * model.num_heads * (seq_len + row_block(seq_len)) // 2
        if not (compiled and autocast):
            per_block += size * (attention + kv * autocast)
    else:
        per_block += size * seq_len
    once = 8 * d + seq_len * (4 if by_rows else 1)  # the last norm, and the mask that all blocks are given
    if recompute:  # the blocks' inputs, and one block's inside at a time
        return sequences * seq_len * (model.num_layers * 4 * d + per_block + once)
    return sequences * seq_len * (model.num_layers * per_block + once)


def row_block(seq_len: int) -> int:
    """Rows of queries that attention by rows takes at a time."""
    return max(128, seq_len // 8)
