"""A small model for every vocabulary, trained for the same floating-point operations, scored in bits per byte.

Owns one such trial: its number of steps, its tokens, its training (`train/loop.py`) and its score (`quality.nats`). All
trials read the same documents in the same order with the same batch; a vocabulary with cheaper tokens (a smaller output
projection) gets more steps, and one with longer tokens reads more text in a step. Does not own which are tried.

With the same vocabulary size, equal compute is also equal steps and equal parameters. With another size the parameters
differ, and are stated: the blocks stay the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.data.tokenizer import end_of_document
from forge_ray.errors import DataError
from forge_ray.model.arithmetic import num_parameters, train_flops_per_token

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

_ENCODE_DOCUMENTS = 64
_SCORE_DOCUMENTS = 8


@dataclass(frozen=True)
class Trial:
    """What is the same for all vocabularies.

    `config` gives batch, context, optimizer and precision; its steps are worked out for each vocabulary.
    """

    model: ModelConfig
    config: PretrainConfig
    flops: float

    def sized(self, vocab_size: int, seed: int) -> PretrainConfig:
        """The training of a vocabulary of this size: the number of steps that comes nearest to the compute."""
        per_step = self.config.slots * self.config.micro_batch * self.config.seq_len
        cost = train_flops_per_token(self.model, vocab_size, self.config.seq_len) * per_step
        return self.config.replace(steps=max(1, round(self.flops / cost)), seed=seed)

    def run(
        self, tokenizer: Tokenizer, training: Iterable[str], held_out: Sequence[str], *, seed: int, bf16: bool
    ) -> dict[str, Any]:
        """Trains and scores in this process.

        Returns:
            `bits_per_byte`, and what it was reached with: steps, tokens, passes over the text, parameters, flops.

        Memory: 4 bytes for each token that is trained on, the model, its gradients and optimizer state.
        """
        from forge_ray.model.transformer import Transformer
        from forge_ray.train.guardian import Guardian
        from forge_ray.train.loop import Alone, Worker, fit
        from forge_ray.train.optimizer import Optimizer

        began = time.monotonic()
        vocab_size, end = tokenizer.get_vocab_size(), end_of_document(tokenizer)
        config = self.sized(vocab_size, seed)
        wanted = config.steps * config.slots * config.micro_batch * config.seq_len
        stream = _Stream(_tokens(tokenizer, training, end, wanted + 1), config)
        model = Transformer(self.model, vocab_size, config.seq_len).initialise(seed)
        optimizer, guardian = Optimizer(model, config.optimizer), Guardian(config.guard)
        worker = Worker(config, model, optimizer, stream, end, bf16, guardian, step=0)  # type: ignore[arg-type]
        losses: list[float] = []
        fit(worker, Alone(), lambda record: losses.append(record.loss), lambda verdict: None)
        return {
            "seed": seed,
            "bits_per_byte": bits_per_byte(model.eval(), tokenizer, held_out, config.seq_len),
            "final_train_loss": sum(losses[-20:]) / len(losses[-20:]),
            "steps": config.steps,
            "tokens": wanted,
            "epochs": wanted / (stream.num_sequences * config.seq_len),
            "parameters": num_parameters(self.model, vocab_size),
            "flops": train_flops_per_token(self.model, vocab_size, config.seq_len) * wanted,
            "wall_s": round(time.monotonic() - began, 1),
        }


def bits_per_byte(model: Any, tokenizer: Tokenizer, texts: Sequence[str], context: int) -> float:
    """Bits that a coder driven by the model needs for the texts, over their UTF-8 bytes."""
    from forge_ray.evaluate.quality import nats

    end = end_of_document(tokenizer)
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    documents = sorted(([end, *encoding.ids] for encoding in encodings), key=len)
    batches = (documents[start : start + _SCORE_DOCUMENTS] for start in range(0, len(documents), _SCORE_DOCUMENTS))
    total = sum(nats(model, batch, context) for batch in batches)
    return total / math.log(2) / sum(len(text.encode()) for text in texts)


class _Stream:
    """Sequences of one stream of tokens in a seeded order, each once before any is read twice: a loader of `loop`."""

    def __init__(self, tokens: np.ndarray, config: PretrainConfig) -> None:
        self.tokens, self.config = tokens, config
        self.num_sequences = (len(tokens) - 1) // config.seq_len
        if self.num_sequences < 1:
            raise DataError(
                "the training documents hold less than one sequence for the small models of the sweep",
                got=f"{len(tokens)} tokens",
                wanted=f"more than sweep.seq_len {config.seq_len}",
                do="add documents or lower sweep.seq_len",
            )

    def slot(self, step: int, slot: int) -> np.ndarray:
        """The slot's tokens: int64 of shape (micro_batch, seq_len + 1)."""
        import numpy as np

        size, length = self.config.micro_batch, self.config.seq_len
        first = (step * self.config.slots + slot) * size
        places = [divmod(first + row, self.num_sequences) for row in range(size)]
        starts = [int(self._order(epoch)[index]) * length for epoch, index in places]
        return np.stack([self.tokens[start : start + length + 1] for start in starts]).astype(np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        import numpy as np

        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._places = np.random.default_rng((self.config.seed, epoch)).permutation(self.num_sequences)
        return self._places


def _tokens(tokenizer: Tokenizer, texts: Iterable[str], end: int, wanted: int) -> np.ndarray:
    """The first `wanted` tokens of the texts, fewer where they hold fewer; an end token opens and closes each."""
    import numpy as np

    found, total, pending = [np.array([end], dtype=np.uint32)], 1, iter(texts)
    while total < wanted and (batch := [text for _, text in zip(range(_ENCODE_DOCUMENTS), pending, strict=False)]):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            found.append(np.array([*encoding.ids, end], dtype=np.uint32))
            total += len(found[-1])
    return np.concatenate(found)[:wanted]
