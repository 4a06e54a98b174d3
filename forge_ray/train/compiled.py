"""torch.compile of a model's blocks: one after the other shares the code of the first.

Owns when it pays, what it wants of a machine, and that a process has the code before anybody waits for it. A keeper
compiles once before it forks, so that whoever is forked from it has the code and is as fast at its first step. On GPUs,
and where a worker has several threads, no process that has computed may fork: there each worker compiles by itself,
from the machine's cache after the first.

Imports no torch before it compiles, so that planning stays light.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING

from forge_ray.config import ModelConfig, PretrainConfig
from forge_ray.errors import ConfigError, TrainError
from forge_ray.model.arithmetic import block_parameters

if TYPE_CHECKING:
    import torch

    from forge_ray.model.transformer import Transformer
    from forge_ray.train.fitting import Fit
    from forge_ray.train.spec import RunSpec

# Operations in blocks that compiled code does two minutes of a core sooner: two workers compile for half as long.
_PAYS_FLOPS = 1e14
_TINY_VOCABULARY = 16


def decide(model: ModelConfig, config: PretrainConfig) -> bool:
    """Whether a run's blocks are compiled.

    Raises:
        ConfigError: They shall be, and cannot be here.
    """
    if config.compile == "off":
        return False
    why_not = "sharding fsdp computes uncompiled" if config.sharding == "fsdp" else ""
    if shutil.which(_compiler()) is None:
        why_not = f"there is no {_compiler()} here: install it on every node, or name another in CXX"
    if config.compile == "auto":
        tokens = config.steps * config.slots * config.micro_batch * config.seq_len
        return not why_not and 6.0 * block_parameters(model) * tokens >= _PAYS_FLOPS
    if why_not:
        raise ConfigError("the model cannot be compiled", got=why_not, do="or set pretrain.compile to auto")
    return True


def apply(model: Transformer) -> None:
    """Has blocks compiled when they are first called; where experts get other rows each time, their attention alone."""
    from forge_ray.model.transformer import Experts

    for block in model.blocks:
        part = block.attention if isinstance(block.mlp, Experts) else block
        part.compile(dynamic=False)


def warm(spec: RunSpec, fit: Fit, device: torch.device, *, forking: bool = False) -> None:
    """Compiles what a run will compute, unless it is compiled already or not to be.

    Args:
        fit: How much is computed at once.
        device: Where it will be computed.
        forking: This process will fork, so that it may start no thread and touch no device.

    Raises:
        TrainError: The compiler does not do it.
    """
    global _warm
    if not spec.compiled or _warm or (forking and (device.type != "cpu" or spec.config.cpus_per_worker > 1)):
        return
    import torch

    from forge_ray.model import fp8
    from forge_ray.model.transformer import Transformer
    from forge_ray.train.loop import backbone

    began_s = time.monotonic()
    if forking:
        with contextlib.suppress(ImportError):  # torch shows its progress with it, if it is there
            import tqdm

            tqdm.tqdm.monitor_interval = 0  # or a thread of its own would watch the bars
    torch.set_num_threads(spec.config.cpus_per_worker)
    # A block of its own shape, one vocabulary as good as another.
    shape = spec.model.replace(depth=None, num_layers=1)
    model = Transformer(shape, _TINY_VOCABULARY, spec.config.seq_len).initialise(0).to(device)
    if spec.precision == "fp8":
        fp8.apply(model)
    apply(model)
    tokens = torch.zeros((fit.at_once, spec.config.seq_len + 1), dtype=torch.int64, device=device)
    try:
        backbone(model, tokens[:, :-1], 1, spec.precision != "fp32").sum().backward()
    except Exception as error:  # of g++, of Inductor, of Dynamo
        raise TrainError(
            "the model could not be compiled here",
            got=str(error)[-2000:],
            wanted=f"a working {_compiler()} on every node, and room in TORCHINDUCTOR_CACHE_DIR or TMPDIR",
            do="see that it works, or set pretrain.compile to off",
        ) from None
    _warm = True
    print(f"compiled in {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)


_warm = False


def _compiler() -> str:
    """What Inductor calls."""
    return os.environ.get("CXX", "g++")
