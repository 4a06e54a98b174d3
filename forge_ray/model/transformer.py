"""Our decoder in plain PyTorch, in the shape of Qwen3, dense or with experts: what it computes is what transformers and
vLLM compute.

RMSNorm before each block, grouped-query attention with normalised queries and keys, rotary positions, SwiGLU, no
biases. Owns parameters, their initialisation and the forward pass; training is `train/`, names of other libraries are
`hf.py`.

Shapes: B batch, T time, D model width, H query heads, G key-value heads, K head size, F feed-forward width, V
    vocabulary; N tokens (B x T), E experts, C experts that a token takes.

Source: Qwen3 technical report (arXiv 2505.09388), section 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forge_ray.config import ModelConfig
from forge_ray.errors import CorruptError
from forge_ray.model.arithmetic import LONGEST_BY_ROWS, row_block


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention that does not look across documents."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q = nn.Linear(config.d_model, self.num_heads * self.head_dim, bias=False)
        self.k = nn.Linear(config.d_model, self.num_kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(config.d_model, self.num_kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(self.num_heads * self.head_dim, config.d_model, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """`mask` is True where a query (row) may see a key (column), or for `RowAttention` zero there: (B, 1, T, T);
        none for plain causal."""
        B, T, _ = x_BTD.shape
        q_BHTK = self.q_norm(self.q(x_BTD).view(B, T, self.num_heads, self.head_dim)).transpose(1, 2)
        k_BGTK = self.k_norm(self.k(x_BTD).view(B, T, self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v_BGTK = self.v(x_BTD).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q_BHTK, k_BGTK = rotate(q_BHTK, rotary), rotate(k_BGTK, rotary)
        if mask is not None and mask.dtype != torch.bool:
            y_BHTK = RowAttention.apply(q_BHTK, k_BGTK, v_BGTK, mask)
        else:
            y_BHTK = F.scaled_dot_product_attention(
                q_BHTK,
                k_BGTK,
                v_BGTK,
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=self.num_heads != self.num_kv_heads,
            )
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape kept."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """SwiGLU by the experts that a router chooses for each token, weighted by its probabilities. Drops no token.

    `balance` is, after a forward pass, E times the sum over experts of (share of choices) x (mean probability): 1 when
    they are evenly busy, E when one does it all. Its gradient spreads the choices (arXiv 2101.03961, section 2.2).

    No index is added to twice, so that gradients are the same bits each time, on GPUs too. An expert that nobody chose
    computes on no rows, so that its gradient is zero and not missing.
    """

    balance: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.per_token = config.experts_per_token
        self.router = nn.Linear(config.d_model, config.num_experts, bias=False)
        self.each = nn.ModuleList(FeedForward(config.d_model, config.expert_width) for _ in range(config.num_experts))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Shape kept."""
        x_ND = x_BTD.flatten(0, 1)
        with torch.autocast(x_ND.device.type, enabled=False):
            p_NE = self.router(x_ND.float()).softmax(dim=-1)
        weight_NC, expert_NC = p_NE.topk(self.per_token, dim=-1)
        weight_NC = weight_NC / weight_NC.sum(dim=-1, keepdim=True)
        counts = torch.bincount(expert_NC.flatten(), minlength=len(self.each))
        self.balance = len(self.each) * (counts / counts.sum() * p_NE.mean(dim=0)).sum()
        order = expert_NC.flatten().argsort(stable=True)
        rows = x_ND.unsqueeze(1).expand(-1, self.per_token, -1).flatten(0, 1).index_select(0, order)
        done = [expert(part) for expert, part in zip(self.each, rows.split(counts.tolist()), strict=True)]
        y_NCD = torch.cat(done).index_select(0, order.argsort()).view(*expert_NC.shape, -1)
        return (y_NCD * weight_NC.unsqueeze(-1)).sum(dim=1).view_as(x_BTD)


class Block(nn.Module):
    """One layer: attention and feed-forward, each on a normalised copy and added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = Experts(config) if config.num_experts else FeedForward(config.d_model, config.d_ff)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Shape kept."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, mask)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Transformer(nn.Module):
    """The whole decoder.

    Args:
        config: Its shape.
        vocab_size: Entries of the vocabulary.
        max_len: Longest sequence; rotary tables are computed for it.

    With `recompute` set a block keeps only its input for the backward pass, and computes the rest again: the same bits,
    a third more work.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, max_len: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.max_len = config, vocab_size, max_len
        self.recompute = False
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        cos, sin = rotary_tables(max_len, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def initialise(self, seed: int) -> Transformer:
        """Draws every weight from the seed: the same on every machine, whatever the global generator did."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.init_std
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    shrink = (
                        math.sqrt(2 * self.config.num_layers) if name.endswith(("out.weight", "down.weight")) else 1.0
                    )
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * (std / shrink))
        return self

    def hidden(self, tokens_BT: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token ids to the normalised last layer, (B, T, D)."""
        rotary = (self.cos[: tokens_BT.shape[1]], self.sin[: tokens_BT.shape[1]])
        x_BTD = self.embedding(tokens_BT)
        if mask is not None and mask.device.type == "cpu" and tokens_BT.shape[1] <= LONGEST_BY_ROWS:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, rotary, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD = block(x_BTD, rotary, mask)
        return self.norm(x_BTD)

    def imbalance(self) -> Tensor | None:
        """How unevenly experts were busy in the last forward pass: 1 for even, mean over blocks; none without them."""
        found = [block.mlp.balance for block in self.blocks if isinstance(block.mlp, Experts)]
        return torch.stack(found).mean() if found else None

    def forward(self, tokens_BT: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token ids to logits, (B, T, V)."""
        return self.head(self.hidden(tokens_BT, mask))


class RowAttention(torch.autograd.Function):
    """Attention as plain matrix products, some rows of queries at a time, each with no more keys than it may see.

    torch's attention for CPUs reaches a tenth of the speed of its products in bf16, and does not skip what is hidden
    (torch 2.13). The queries of one key-value head are rows of one product. The softmax is fp32. Keeps the
    probabilities for the backward pass, B x H x T x T / 2.

    Shapes: bias (B, 1, T, T), zero where a query may see a key, else minus infinity; result (B, H, T, K), in the type
    of the values.
    Source: the backward pass as in FlashAttention-2 (arXiv 2307.08691, section 2.3).
    """

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, bias_B1TT: Tensor) -> Tensor:
        """See the class."""
        (B, H, T, K), G, dtype = q_BHTK.shape, k_BGTK.shape[1], v_BGTK.dtype
        q = (q_BHTK * K**-0.5).to(dtype).reshape(B * G, H // G, T, K)
        k, v = k_BGTK.to(dtype).reshape(B * G, T, K), v_BGTK.reshape(B * G, T, K)
        chances, parts = [], []
        for rows in _row_blocks(T):
            scores = torch.bmm(q[:, :, rows].flatten(1, 2), k[:, : rows.stop].transpose(1, 2))
            biased = scores.view(B, G, H // G, -1, rows.stop).float() + bias_B1TT[:, :, None, rows, : rows.stop]
            chances.append(biased.softmax(dim=-1).to(dtype).view(B * G, -1, rows.stop))
            parts.append(torch.bmm(chances[-1], v[:, : rows.stop]).view(B * G, H // G, -1, K))
        y = torch.cat(parts, dim=2)
        ctx.save_for_backward(q, k, v, y, *chances)
        ctx.types = q_BHTK.dtype, k_BGTK.dtype
        return y.view(B, H, T, K)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        """See the class."""
        q, k, v, y, *chances = ctx.saved_tensors
        B, H, T, K = grad_y.shape
        grad_y = grad_y.reshape(y.shape)
        inner = (grad_y.float() * y.float()).sum(dim=-1)
        grad_q = []
        grad_k, grad_v = (torch.zeros(k.shape, device=k.device) for _ in range(2))
        for rows, chance in zip(_row_blocks(T), chances, strict=True):
            part = grad_y[:, :, rows].flatten(1, 2)
            grad_chance = torch.bmm(part, v[:, : rows.stop].transpose(1, 2)).float()
            grad_scores = (chance * (grad_chance - inner[:, :, rows].flatten(1, 2).unsqueeze(-1))).to(chance.dtype)
            grad_q.append(torch.bmm(grad_scores, k[:, : rows.stop]).view(len(y), y.shape[1], -1, K))
            grad_k[:, : rows.stop] += torch.bmm(grad_scores.transpose(1, 2), q[:, :, rows].flatten(1, 2))
            grad_v[:, : rows.stop] += torch.bmm(chance.transpose(1, 2), part)
        of_q, of_k = ctx.types
        scaled = torch.cat(grad_q, dim=2).view(B, H, T, K).to(of_q) * K**-0.5
        return scaled, grad_k.view(B, -1, T, K).to(of_k), grad_v.view(B, -1, T, K).to(v.dtype), None


def _row_blocks(length: int) -> list[slice]:
    size = row_block(length)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def rotary_tables(max_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (max_len, head_dim), in the half-split layout of transformers (arXiv 2104.09864)."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(max_len, dtype=torch.float32), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x_BHTK: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each half pair of a head by its position's angle."""
    cos, sin = (table.to(x_BHTK.dtype) for table in rotary)
    left, right = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos + torch.cat([-right, left], dim=-1) * sin


def document_mask(tokens_BT: Tensor, end_token: int) -> Tensor:
    """True where a query may see a key: earlier or the same position, and of the same document; (B, 1, T, T).

    An end token opens the document after it, so that a document begins from it alone, as a prompt does.
    """
    document_BT = (tokens_BT == end_token).cumsum(dim=1)
    same = document_BT[:, :, None] == document_BT[:, None, :]
    T = tokens_BT.shape[1]
    return (same & torch.ones(T, T, dtype=torch.bool, device=tokens_BT.device).tril()).unsqueeze(1)


def load_weights(model: Transformer, tensors: dict[str, Tensor]) -> Transformer:
    """Takes over a checkpoint's weights, exactly the model's own, neither more nor fewer.

    Raises:
        CorruptError: Names or shapes differ from the model's.
    """
    own = dict(model.named_parameters())
    wrong = sorted(set(own) ^ set(tensors)) or sorted(n for n, p in own.items() if p.shape != tensors[n].shape)
    if wrong:
        raise CorruptError(
            "the weights belong to a model of another shape",
            got=", ".join(wrong[:3]),
            do="use the model section that the run was started with",
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return model
