"""bfloat16 against float32, the same weights: how far the next-byte distributions are apart.

    python scripts/bench/bench_drift.py runs/megabyte runs/blt --data english_valid.txt --gpus 2

Prints one JSON object per run folder: the mean over all bytes of KL(float32 ‖ bfloat16) in nats,
the share of bytes at which the likeliest byte is the same, and bits per byte under both. Windows
are as long as those of the training, `--windows` of them, evenly spaced. Products of float32 are
whole ones ("highest" precision), not those of shortened mantissas that a GPU takes by default.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from equal_time import machine, side_by_side
from jaxtyping import Array, Int

from bytelm import data
from bytelm.metrics import bits_per_byte
from bytelm_jax.models import Params, cast_params, define_model
from bytelm_jax.training import checkpoint
from bytelm_jax.training.loss import token_nats

MOST_NATS, LEAST_AGREEMENT = 1e-3, 0.99
"""The bounds that `within` speaks of."""


def measure(run_dir: Path, path: str, limit: int, batch: int) -> dict[str, Any]:
    """One run folder."""
    recipe, params, step = checkpoint.load_run(run_dir)
    vocab = recipe.model.vocab
    bind, _ = define_model(recipe.model)
    corpus = data.open_corpus([path])
    windows = data.Windows(corpus, vocab, recipe.data.sequence_length, append_eos=False)

    @jax.jit
    def sums(params: Params, ids: Int[Array, "B T"]) -> Array:
        """Summed over counted ids: their number, KL, agreements, nats in float32 and bfloat16."""
        with jax.default_matmul_precision("highest"):
            exact = bind(cast_params(params, jnp.dtype("float32")))(ids).astype(jnp.float32)
        rough = bind(cast_params(params, jnp.dtype("bfloat16")))(ids).astype(jnp.float32)
        p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(rough)
        apart = (jnp.exp(p) * (p - q)).sum(axis=-1)
        same = exact.argmax(axis=-1) == rough.argmax(axis=-1)
        parts = (jnp.ones(ids.shape), apart, same, token_nats(exact, ids), token_nats(rough, ids))
        return jnp.stack([jnp.where(ids != vocab.pad_id, part, 0).sum() for part in parts])

    counts = [
        np.asarray(sums(params, each.ids), float)
        for each in data.evaluation_batches(windows, batch, limit)
    ]
    count, apart, same, exact, rough = np.sum(counts, axis=0).tolist()
    return {
        "run": str(run_dir),
        "recipe": recipe.name,
        "step": step,
        "bytes": round(count),
        "mean_kl_nats": apart / count,
        "same_likeliest_byte": same / count,
        "within": apart / count <= MOST_NATS and same / count >= LEAST_AGREEMENT,
        "bits_per_byte_float32": round(bits_per_byte(exact, round(count)), 6),
        "bits_per_byte_bfloat16": round(bits_per_byte(rough, round(count)), 6),
        **machine(),
    }


def main() -> None:
    """Prints one line per run folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--data", default="english_valid.txt")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=1, help="run folders at a time")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        row = measure(args.here, args.data, args.windows, args.batch)
        print(json.dumps(row), flush=True)
        return
    for row in side_by_side([[*sys.argv, "--here", str(run)] for run in args.runs], args.gpus):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
