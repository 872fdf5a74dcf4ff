"""The PyTorch twin under torch.compile: the losses of eager steps, and one graph for each length.

    python scripts/check/compile.py [NAME …]

Trains tiny models of every architecture that can be compiled, as `bytelm_torch.train --compile`
does, five steps beside five eager ones, on the CPU or on a GPU if there is one. After the first
step another compilation is an error. Prints a JSON object per model: both lists of losses agree to
within the bound of float32's logits, and a model compiled by `from_pretrained` gives the logits of
an eager one at three lengths.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import bytelm_torch
from bytelm import tolerances
from bytelm.config import AdamWConfig, TrainConfig
from bytelm_torch.optimizers.build import build_optimizer
from bytelm_torch.training import parallel
from parity_tests.tiny_models import CONFIGS


def models() -> Iterator[tuple[str, Any]]:
    """Name and configuration of each model."""
    for name, config in CONFIGS.items():
        yield name, config if config.uncompilable is None else replace(config, top_k=0)
    for patcher in ("space", "histogram"):
        yield f"blt {patcher}", replace(CONFIGS["blt"], patcher=patcher)


def losses(config: Any, compiled: bool) -> list[float]:
    """Those of five steps; without dropout, whose draws a compiler makes in its own way."""
    if hasattr(config, "dropout"):
        config = replace(config, dropout=0.0)
    train = TrainConfig(batch_size=2, compute_dtype="float32")
    torch.manual_seed(0)
    with parallel.join_group() as group:
        model = bytelm_torch.build_model(config).to(group.device).train()
        optimizer = build_optimizer(AdamWConfig(), model)
        step = parallel.make_train_step(
            model, optimizer, train, config.vocab.pad_id, group, compiled=compiled
        )
        random, found = np.random.default_rng(0), []
        for count in range(5):
            ids = random.integers(97, 122, (2, 16)).astype(np.int32) + config.vocab.offset
            found.append(float(step(count, ids, 1e-3, 1.0, False)["loss"]))
            if compiled:
                torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")
    return found


@torch.no_grad()
def logits_error(config: Any) -> float:
    """The largest relative error of `from_pretrained(…, compiled=True)`."""
    with tempfile.TemporaryDirectory() as folder:
        bytelm_torch.save_pretrained(bytelm_torch.build_model(config), folder)
        model, plain = (bytelm_torch.from_pretrained(folder, compiled=x) for x in (True, False))
    worst = 0.0
    for length in (16, 12, 8):
        ids = torch.randint(97, 122, (2, length)) + config.vocab.offset
        ours, theirs = model(ids), plain(ids)
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return worst


def main() -> int:
    """Exit code 1 where anything differs."""
    wrong = 0
    for name, config in models():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch.compiler.reset()
        start, bound = time.perf_counter(), tolerances.LOGITS["float32"]
        eager, compiled = losses(config, False), losses(config, True)
        error = logits_error(config)
        good = np.allclose(eager, compiled, rtol=bound, atol=0) and error <= bound
        wrong += not good
        row = {"model": name, "good": bool(good), "eager": eager, "compiled": compiled}
        row |= {"logits_error": error, "seconds": round(time.perf_counter() - start, 1)}
        print(json.dumps(row | {"torch": torch.__version__}), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
