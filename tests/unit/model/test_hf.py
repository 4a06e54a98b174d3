"""Our model beside stock transformers' Qwen3, read from the folder that we write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from forge_ray.config import ModelConfig
from forge_ray.errors import ExportError
from forge_ray.model import hf
from forge_ray.model.transformer import Transformer, load_weights

END, MAX_LEN = 0, 48
SHAPES = {
    "tied": {},
    "untied": {"tied_embeddings": False},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 500_000.0},
    "wide heads": {"head_dim": 128, "num_heads": 3, "num_kv_heads": 3, "norm_eps": 1e-5, "tied_embeddings": False},
    "experts": {"num_experts": 5, "experts_per_token": 2, "expert_d_ff": 64},
}


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    """A vocabulary of an end token and single bytes."""
    names = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer.to_str()


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def written(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_json: str) -> tuple[Transformer, Path]:
    """A model with weights large enough to tell errors, and its folder."""
    config = ModelConfig(**{"num_layers": 2, "d_model": 64, "d_ff": 96, "init_std": 0.1, **request.param})
    model = Transformer(config, 257, MAX_LEN).initialise(0).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.linspace(-0.3, 0.3, p.numel()))
    hf.write_folder(tmp_path, model, tokenizer_json, END)
    return model, tmp_path


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 257, (3, MAX_LEN), generator=torch.Generator().manual_seed(0))


def test_transformers_computes_the_same_logits(written: tuple[Transformer, Path], ids: torch.Tensor) -> None:
    model, folder = written
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        ours, wanted = model(ids), theirs(ids).logits
    assert wanted.std() > 0.1
    assert (ours - wanted).abs().max() <= 1e-5
    assert hf.compare(folder, model, ids, 1e-5) <= 1e-5


def test_names_map_both_ways_onto_what_transformers_itself_writes(
    written: tuple[Transformer, Path], tmp_path: Path
) -> None:
    model, folder = written
    names = [name for name, _ in model.named_parameters()]
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / hf.WEIGHTS)
    assert [hf.from_hf_name(hf.to_hf_name(name)) for name in names] == names
    assert {hf.to_hf_name(name) for name in names} == set(theirs)
    assert all(theirs[hf.to_hf_name(name)].shape == p.shape for name, p in model.named_parameters())


def test_weights_come_back_from_the_folder(written: tuple[Transformer, Path]) -> None:
    model, folder = written
    fresh = load_weights(Transformer(model.config, 257, MAX_LEN), hf.read_weights(folder))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))


@pytest.mark.parametrize(
    "culprit", ["model.layers.1.self_attn.k_norm.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
def test_an_altered_weight_is_found(written: tuple[Transformer, Path], ids: torch.Tensor, culprit: str) -> None:
    model, folder = written
    weights = load_file(folder / hf.WEIGHTS)
    culprit = culprit if culprit in weights else culprit.replace("mlp.", "mlp.experts.1.")
    weights[culprit].view(-1)[5] += 1.0
    save_file(weights, folder / hf.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="log-probabilities differ"):
        hf.compare(folder, model, ids, 1e-4)


def test_weights_that_are_not_finite_are_found(written: tuple[Transformer, Path], ids: torch.Tensor) -> None:
    model, folder = written
    weights = load_file(folder / hf.WEIGHTS)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / hf.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ExportError):
        hf.compare(folder, model, ids, 1e-4)


def test_the_folder_stands_alone(written: tuple[Transformer, Path], ids: torch.Tensor) -> None:
    model, folder = written
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "naïve 日本 <b>"
    encoded = tokenizer(text)["input_ids"]
    # A client's prompt begins as a document does in training: behind an end token.
    assert encoded[0] == tokenizer.eos_token_id == tokenizer.bos_token_id == END
    assert tokenizer.decode(encoded[1:]) == text
    assert tokenizer.model_max_length == MAX_LEN
    assert GenerationConfig.from_pretrained(folder).eos_token_id == END
    stored = sum(tensor.numel() for tensor in load_file(folder / hf.WEIGHTS).values())
    assert stored == sum(p.numel() for p in model.parameters())


def test_greedy_text_is_the_same_through_transformers(written: tuple[Transformer, Path]) -> None:
    from forge_ray.evaluate.quality import generate

    model, folder = written
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = [END, 70, 101]
    out = theirs.generate(torch.tensor([start]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    wanted = out[: out.index(END)] if END in out else out
    assert generate(model, start, 12, 0.0, END) == wanted
