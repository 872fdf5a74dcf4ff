"""One training step of a Byte Latent Transformer here and in transformers, side by side.

    python scripts/bench_blt_vs_transformers.py --lengths 2048 4096 --patches 4 8

Both train the configuration of `blt_767m` on the same random bytes with given patch lengths,
bfloat16 products, float32 parameters and AdamW; transformers in eager mode under autocast. A row of
ours is one of `bench_train.py`. Every row has a process of its own, one after another. JSON lines.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def theirs(batch: int, length: int, patch: int, repeats: int) -> dict[str, Any]:
    """One row of transformers: milliseconds a step, megabytes a second, memory."""
    import torch
    import transformers
    from transformers import BltConfig, BltForCausalLM

    local = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048}
    local["hidden_size_global"] = 1536
    config = BltConfig(
        encoder_hash_byte_group_vocab=50_002,
        encoder_config=local | {"num_hidden_layers": 1},
        decoder_config=local | {"num_hidden_layers": 6},
        global_config={
            "hidden_size": 1536, "num_attention_heads": 16, "intermediate_size": 4096,
            "num_hidden_layers": 16,
        },
        patcher_config={
            "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1408,
            "num_hidden_layers": 4,
        },
    )  # fmt: skip
    model: Any = BltForCausalLM(config)
    model = model.cuda().train()
    model.model.patcher.requires_grad_(False)
    count = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 260, (batch, length))).cuda()
    sizes = [1, *[patch] * ((length - 1) // patch)]
    sizes += [length - sum(sizes)] * (sum(sizes) < length)
    lengths = torch.tensor([sizes] * batch).cuda()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, patch_lengths=lengths, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times = []
    for i in range(3 + repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * (i >= 3))
    median = statistics.median(times[3:])
    return {
        "row": f"transformers:{batch}:{length}:{patch}",
        "parameters": count,
        "ms": round(1e3 * median, 2),
        "megabytes_per_second": round(batch * length / median / 1e6, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Prints a line a row: ours and theirs for each length and mean patch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--patches", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--theirs", metavar="BATCH:LENGTH:PATCH", help="one row, in this process")
    options = parser.parse_args()
    if options.theirs:
        batch, length, patch = map(int, options.theirs.split(":"))
        print(json.dumps(theirs(batch, length, patch, options.repeats)), flush=True)
        return
    rows = [f"{options.batch}:{n}:{p}" for n in options.lengths for p in options.patches]
    ours = Path(__file__).with_name("bench_train.py")
    subprocess.run([sys.executable, ours, "--rows", *[f"blt_767m:{row}" for row in rows]])
    for row in rows:
        subprocess.run([sys.executable, __file__, "--theirs", row])


if __name__ == "__main__":
    main()
