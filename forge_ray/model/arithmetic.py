"""Sizes and costs of a model from its configuration alone. Imports no torch, so that planning stays light."""

from __future__ import annotations

from forge_ray.config import ModelConfig


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Trainable parameters, a tied output projection counted once."""
    d, attention = model.d_model, model.num_heads * model.head_dim
    kv = model.num_kv_heads * model.head_dim
    block = d * attention + 2 * d * kv + attention * d + 3 * d * model.d_ff + 2 * d + 2 * model.head_dim
    return model.num_layers * block + d + vocab_size * d * (1 if model.tied_embeddings else 2)


def train_flops_per_token(model: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """Floating-point operations to train on one token, forward and backward, without recomputation.

    Six for each weight of a matrix product, and attention's scores and mix counted in full (not halved for causality).

    Source: PaLM (arXiv 2204.02311), appendix B.
    """
    d, attention = model.d_model, model.num_heads * model.head_dim
    kv = model.num_kv_heads * model.head_dim
    matrices = model.num_layers * (2 * d * attention + 2 * d * kv + 3 * d * model.d_ff) + vocab_size * d
    return 6.0 * matrices + 12.0 * model.num_layers * attention * seq_len
