"""Generation with a Byte Latent Transformer here and in transformers: bytes per second, one text.

    python scripts/bench/bench_blt_generation.py --context 1024

Random weights in bfloat16. Both draw from the model's distribution after the same random letters.
An entropy model cuts the patches; the threshold makes them four bytes long on those letters. Ours
is the cached loop, and reading the prompt is part of its time; transformers runs
`generate(use_cache=False)`, since with the cache it stops with an error. Medians of `--repeats`
after one call that does not count. One process per row, one after the other. JSON lines.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_blt_vs_transformers import (
    configuration,
    device_of_torch,
    their_machine,
    their_model,
    timed,
)

from bytelm import recipes

PATCH = 4


def prompt(context: int) -> bytes:
    """Random letters, digits and signs."""
    return np.random.default_rng(0).integers(32, 127, context, np.uint8).tobytes()


def their_generation(recipe: str, context: int, new: int, repeats: int) -> dict[str, Any]:
    """Bytes per second of transformers' `generate` after `context` bytes."""
    import torch

    torch.manual_seed(0)
    model = their_model(configuration(recipe)).to(device_of_torch(), torch.bfloat16).eval()
    patcher, vocab = model.model.patcher.float(), configuration(recipe).vocab  # exact entropies
    ids = torch.tensor([[byte + vocab.offset for byte in prompt(context)]], device=model.device)
    generated = ids
    with torch.inference_mode():
        entropies = patcher(ids, patch_size=PATCH, threshold=0.0)[0].flatten()
        model.model.config.patching_threshold = entropies.quantile(1 - 1 / PATCH).item()

        def run() -> None:
            nonlocal generated
            generated = model.generate(
                ids, min_new_tokens=new, max_new_tokens=new, do_sample=True, use_cache=False,
                pad_token_id=vocab.pad_id,
            ).cpu()  # fmt: skip

        median = timed(run, repeats)
        limit = model.model.config.patching_threshold
        _, lengths, _ = patcher(generated.to(model.device), patch_size=PATCH, threshold=limit)
    return {
        "row": f"transformers:generate:{context}:{new}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_per_second": round(new / median, 2),
        "mean_patch": round(generated.shape[1] / int((lengths > 0).sum()), 2),
        **their_machine(),
    }


def our_generation(
    folder: Path, recipe: str, context: int, new: int, repeats: int
) -> dict[str, Any]:
    """Bytes per second of cached generation after `context` bytes, which are read in that time.

    `folder` holds the texts whose patches are counted.
    """
    import jax
    from equal_time import machine

    from bytelm import data
    from bytelm_jax.inference.generate import generate
    from bytelm_jax.models import cast_params, define_model
    from bytelm_jax.training import patch_calibration as patch_contract
    from bytelm_jax.training import step as steps

    config = configuration(recipe)
    dtype = steps.compute_dtype(recipes.get(recipe).train)
    params = jax.jit(lambda: cast_params(define_model(config)[1](0), dtype))()

    def windows(text: bytes) -> data.Windows:
        path = folder / f"{len(text)}.bytes"
        path.write_bytes(text)
        return data.Windows(data.open_corpus([path]), config.vocab, len(text), append_eos=False)

    scores = patch_contract.boundary_scores(config, params, windows(prompt(context)), None)
    config = replace(config, threshold=float(np.quantile(scores, 1 - 1 / PATCH)))
    model, generated = define_model(config)[0](params), b""

    def run() -> None:
        nonlocal generated
        (generated,) = generate(model, [prompt(context)], new, stop_at_eos=False)

    median = timed(run, repeats)
    contract = patch_contract.measure(config, params, windows(prompt(context) + generated))
    return {
        "row": f"{recipe}:generate:{context}:{new}",
        "parameters": config.parameter_count(),
        "bytes_per_second": round(new / median, 2),
        "mean_patch": round(contract.mean_length, 2),
        "dtype": str(dtype),
        **machine(),
    }


def main() -> None:
    """Prints two lines, ours and theirs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="blt_767m")
    parser.add_argument("--context", type=int, default=1024, help="bytes of the prompt")
    parser.add_argument("--new", type=int, default=256, help="bytes that we add")
    parser.add_argument("--their-new", type=int, default=8, help="bytes that transformers adds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--here", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    recipe, context, repeats = options.recipe, options.context, options.repeats
    if options.here == "ours":
        with tempfile.TemporaryDirectory() as folder:
            row = our_generation(Path(folder), recipe, context, options.new, repeats)
        print(json.dumps(row), flush=True)
    elif options.here == "theirs":
        row = their_generation(recipe, context, options.their_new, repeats)
        print(json.dumps(row), flush=True)
    else:
        for who in ("ours", "theirs"):
            subprocess.run([sys.executable, *sys.argv, "--here", who])


if __name__ == "__main__":
    main()
