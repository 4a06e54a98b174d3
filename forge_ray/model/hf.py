"""Our model as a Hugging Face folder, which stock transformers and vLLM load as Qwen3 or Qwen3-MoE.

Owns the mapping of names and shapes both ways, the folder's files, and the comparison of what both compute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge_ray.config import ModelConfig
from forge_ray.errors import ExportError
from forge_ray.model.transformer import Transformer

WEIGHTS = "model.safetensors"

_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp.router": "mlp.gate",
    "mlp.each.*.gate": "mlp.experts.*.gate_proj",
    "mlp.each.*.up": "mlp.experts.*.up_proj",
    "mlp.each.*.down": "mlp.experts.*.down_proj",
}
_TOP_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


def to_hf_name(name: str) -> str:
    """Qwen3's name of one of our parameters."""
    stem, _, leaf = name.rpartition(".")
    if stem.startswith("blocks."):
        _, index, inner = stem.split(".", 2)
        return f"model.layers.{index}.{_renamed(inner, _BLOCK_NAMES)}.{leaf}"
    return f"{_TOP_NAMES[stem]}.{leaf}"


def from_hf_name(name: str) -> str:
    """Our name of one of Qwen3's parameters."""
    stem, _, leaf = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, index, inner = stem.split(".", 3)
        return f"blocks.{index}.{_renamed(inner, _inverse(_BLOCK_NAMES))}.{leaf}"
    return f"{_inverse(_TOP_NAMES)[stem]}.{leaf}"


def hf_config(config: ModelConfig, vocab_size: int, max_len: int, end_token: int) -> Any:
    """The `Qwen3Config`, or with experts the `Qwen3MoeConfig`, of our shape."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    experts = {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": config.expert_balance,
    }
    kind, more = (Qwen3MoeConfig, experts) if config.num_experts else (Qwen3Config, {})
    return kind(
        architectures=[kind.__name__.replace("Config", "ForCausalLM")],
        **more,
        vocab_size=vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=max_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied_embeddings,
        attention_bias=False,
        use_sliding_window=False,
        bos_token_id=end_token,
        eos_token_id=end_token,
        dtype="float32",
    )


def write_folder(folder: Path, model: Transformer, tokenizer_json: str, end_token: int) -> None:
    """Writes weights, configuration, generation configuration and tokenizer."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    weights = {to_hf_name(name): parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    hf_config(model.config, model.vocab_size, model.max_len, end_token).save_pretrained(folder)
    GenerationConfig(bos_token_id=end_token, eos_token_id=end_token, pad_token_id=end_token).save_pretrained(folder)
    _write_tokenizer(folder, tokenizer_json, end_token, model.max_len)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """A Hugging Face folder's weights under our names."""
    from safetensors.torch import load_file

    return {from_hf_name(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}


def compare(folder: Path, model: Transformer, tokens_BT: Tensor, tolerance: float) -> float:
    """Largest difference between our log-probabilities and transformers' on the folder, both in fp32.

    Raises:
        ExportError: It exceeds the tolerance.
    """
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.inference_mode():
        difference = (model(tokens_BT).log_softmax(-1) - theirs(tokens_BT).logits.log_softmax(-1)).abs().max().item()
    if not difference <= tolerance:
        raise ExportError(
            "the exported folder does not compute what the trained model does",
            got=f"log-probabilities differ by {difference:.2e}",
            wanted=f"at most {tolerance:.0e} (export.logit_tolerance)",
            do="compare the versions of transformers and forge-ray with those of the lock; nothing was published",
        )
    return difference


def _write_tokenizer(folder: Path, tokenizer_json: str, end_token: int, max_len: int) -> None:
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(tokenizer_json)
    end = tokenizer.id_to_token(end_token)
    # A prompt starts a document, and documents start behind an end token: clients get that without asking.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", pair=f"{end} $A {end} $B", special_tokens=[(end, end_token)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        model_max_length=max_len,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _renamed(name: str, names: dict[str, str]) -> str:
    """Looks a name up in which the number of an expert stands for `*`."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    found = names[".".join("*" if part.isdigit() else part for part in name.split("."))]
    return found.replace("*", numbers[0]) if numbers else found


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}
