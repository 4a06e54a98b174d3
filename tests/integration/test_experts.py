"""Mixture of experts in stock vLLM: the same greedy tokens as ours, from the exported folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models

from forge_ray.config import ModelConfig
from forge_ray.evaluate.quality import generate
from forge_ray.model import hf
from forge_ray.model.transformer import Transformer
from tests.integration.conftest import clean_environment

END, NEW_TOKENS = 0, 16
_ASK = """
import json, pathlib, sys
from vllm import LLM, SamplingParams
engine = LLM(sys.argv[1], max_model_len=64, enforce_eager=True, dtype="float32", seed=0)
greedy = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]))
done = engine.generate([{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])], greedy)
pathlib.Path(sys.argv[4]).write_text(json.dumps([list(row.outputs[0].token_ids) for row in done]))
"""


def test_vllm_says_what_we_say(tmp_path: Path) -> None:
    shape = ModelConfig(num_layers=2, d_model=64, num_experts=8, experts_per_token=2, expert_d_ff=64, init_std=0.2)
    model = Transformer(shape, 257, 64).initialise(0).eval()
    words = Tokenizer(models.WordLevel({"<|end|>": 0, **{f"w{i}": i for i in range(1, 257)}}, "w1"))
    words.add_special_tokens(["<|end|>"])
    hf.write_folder(tmp_path, model, words.to_str(), END)
    prompts = [[END, 3, 5], [END, 70, 8, 9, 200], torch.arange(1, 30).tolist()]
    environment = clean_environment(tmp_path / "cache") | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    answer = tmp_path / "answer.json"
    asked = subprocess.run(
        [sys.executable, "-c", _ASK, str(tmp_path), json.dumps(prompts), str(NEW_TOKENS), str(answer)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=environment,
    )
    assert asked.returncode == 0, asked.stderr[-3000:]
    theirs = [ids[: ids.index(END)] if END in ids else ids for ids in json.loads(answer.read_text())]
    assert theirs == [generate(model, prompt, NEW_TOKENS, 0.0, END) for prompt in prompts]
    assert len({tuple(row) for row in theirs}) == len(prompts)
