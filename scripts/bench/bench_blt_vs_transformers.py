"""One training step of a Byte Latent Transformer here and in transformers, side by side.

    python scripts/bench/bench_blt_vs_transformers.py --lengths 2048 4096 --patches 4 8

Both train the configuration of `--recipe` on the same random bytes with given patch lengths,
bfloat16 products, float32 parameters and AdamW; transformers in eager mode under autocast. A row of
ours is one of `bench_train.py`. Every row has a process of its own, one after another. JSON lines.
`bench_blt_generation.py` compares generation.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bytelm import recipes
from bytelm.config import BLTConfig


def configuration(recipe: str) -> BLTConfig:
    """That of the recipe, with boundaries inside characters, as transformers has them."""
    model = recipes.get(recipe).model
    if not isinstance(model, BLTConfig):
        raise ValueError(f"recipe={recipe}: must be a Byte Latent Transformer")
    return replace(model, patcher="entropy", whole_characters=False)


def their_model(config: BLTConfig) -> Any:
    """The same configuration in transformers, with random weights."""
    from transformers import BltConfig, BltForCausalLM

    def sizes(dim: int, heads: int, hidden: int, layers: int) -> dict[str, int]:
        return {
            "hidden_size": dim, "num_attention_heads": heads, "intermediate_size": hidden,
            "num_hidden_layers": layers,
        }  # fmt: skip

    c, e, width = config, config.entropy, {"hidden_size_global": config.global_dim}
    encoder = sizes(c.local_dim, c.encoder_heads, c.encoder_hidden_dim, c.encoder_layers)
    decoder = sizes(c.local_dim, c.decoder_heads, c.decoder_hidden_dim, c.decoder_layers)
    foreign = BltConfig(
        encoder_hash_byte_group_vocab=c.ngram_rows,
        encoder_config=encoder | width,
        decoder_config=decoder | width,
        global_config=sizes(c.global_dim, c.global_heads, c.global_hidden_dim, c.global_layers),
        patcher_config=sizes(e.dim, e.heads, e.hidden_dim, e.layers),
    )
    return BltForCausalLM(foreign)


def device_of_torch() -> str:
    """ "cuda" where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of `repeats` calls, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def their_machine() -> dict[str, Any]:
    """On what a row of transformers was measured, with its peak memory."""
    import torch
    import transformers

    cuda = device_of_torch() == "cuda"
    return {
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0.0,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def their_training(
    recipe: str, batch: int, length: int, patch: int, repeats: int
) -> dict[str, Any]:
    """One row of transformers: milliseconds per step, megabytes per second, memory."""
    import torch

    device = device_of_torch()
    model = their_model(configuration(recipe)).to(device).train()
    model.model.patcher.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 260, (batch, length))).to(device)
    sizes = [1, *[patch] * ((length - 1) // patch)]
    sizes += [length - sum(sizes)] * (sum(sizes) < length)
    lengths = torch.tensor([sizes] * batch).to(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(ids, patch_lengths=lengths, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    step()
    median = timed(step, repeats)
    return {
        "row": f"transformers:{batch}:{length}:{patch}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms": round(1e3 * median, 2),
        "megabytes_per_second": round(batch * length / median / 1e6, 4),
        **their_machine(),
    }


def main() -> None:
    """Prints one line per row: ours and theirs for each length and mean patch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="blt_767m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--patches", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--theirs", metavar="BATCH:LENGTH:PATCH", help="one row, in this process")
    options = parser.parse_args()
    recipe = options.recipe
    if options.theirs:
        batch, length, patch = map(int, options.theirs.split(":"))
        row = their_training(recipe, batch, length, patch, options.repeats)
        print(json.dumps(row), flush=True)
        return
    rows = [f"{options.batch}:{n}:{p}" for n in options.lengths for p in options.patches]
    ours = Path(__file__).with_name("bench_train.py")
    subprocess.run([sys.executable, ours, "--rows", *[f"{recipe}:{row}" for row in rows]])
    for row in rows:
        subprocess.run([sys.executable, *sys.argv, "--theirs", row])


if __name__ == "__main__":
    main()
