"""Optimizers side by side on one real model: the same bytes, the same budget, several seeds.

    python scripts/bench/bench_optimizers.py --tune sgd adamw
    python scripts/bench/bench_optimizers.py --rates sgd=0.5 --rows sgd q_learning_sgd:interval=1

A row is an optimizer of `bytelm train`, with fields of its configuration or of its controller; it
is trained at its base learning rate (--rates) times each factor, from every seed. Prints one JSON
object per cell (mean and spread of the validation bits per byte over the seeds, and how many runs
diverged: ended with a non-finite value or above 8 bits per byte), then a table. Warm-up over a
twentieth of the steps and cosine decay to a tenth, as in `bytelm train`; no weight decay. The rates
of a row run side by side in one compiled program, over the seeds one after another.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bytelm import data
from bytelm.config import ByteVocab, MegabyteConfig, OptimizerConfig, from_dict
from bytelm.config.optimizer import optimizer_class
from bytelm.metrics import bits_per_byte
from bytelm_jax.models import define_model
from bytelm_jax.optimizers.build import build_optimizer
from bytelm_jax.training.batches import training_batches
from bytelm_jax.training.loss import cross_entropy

MODEL = MegabyteConfig(
    vocab=ByteVocab(size=259),
    patch_size=4,
    global_dim=16,
    local_dim=32,
    max_length=64,
    global_layers=1,
    global_heads=2,
    local_layers=1,
    local_heads=2,
)
BATCH, HELD_OUT = 4, 512
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
SWEEP = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
MIDDLE = {"sgd": 0.5, "q_learning_sgd": 0.5, "adamw": 5e-3, "q_learning_adamw": 5e-3}


def configure(row: str, steps: int) -> OptimizerConfig:
    """`NAME` or `NAME:field=value,…` as a configuration whose learning rate is 1."""
    name, _, text = row.partition(":")
    pairs = dict(pair.split("=") for pair in text.split(",") if pair)
    values = {key: json.loads(value) for key, value in pairs.items()}
    names = {field.name for field in fields(optimizer_class(name))}
    base: dict[str, Any] = {"warmup_steps": steps // 20, "weight_decay": 0.0, "learning_rate": 1.0}
    plain = base | {key: value for key, value in values.items() if key in names}
    steered = {key: value for key, value in values.items() if key not in names}
    tree = {"name": name, **plain} | ({"controller": steered} if steered else {})
    return from_dict(OptimizerConfig, tree, "optimizer")


def make_run(config: OptimizerConfig, steps: int, held_out: jax.Array) -> Any:
    """`(rates [R], seed, batches) -> nats [R]`: what the held-out windows cost after training.

    All optimizers here are linear in the learning rate, which the agent sees only as a factor.
    """
    bind, init = define_model(MODEL)
    pad_id = MODEL.vocab.pad_id

    def mean_loss(params: Any, ids: Any) -> Any:
        nats, count = cross_entropy(bind(params)(ids), ids, pad_id)
        return nats / count

    def run(rate: Any, seed: Any, batches: Any) -> Any:
        optimizer, params = build_optimizer(config, steps, seed), init(seed)

        def scaled(updates: Any) -> Any:
            return jax.tree.map(lambda u: rate * u, updates)

        def step(carry: Any, ids: Any) -> tuple[Any, None]:
            params, state = carry
            loss, gradients = jax.value_and_grad(mean_loss)(params, ids)
            updates, state = optimizer.update(
                gradients, state, params, value=loss,
                value_fn=lambda params: mean_loss(params, ids), applied_fn=scaled,
            )  # fmt: skip
            return (jax.tree.map(jnp.add, params, scaled(updates)), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        return cross_entropy(bind(params)(held_out), held_out, pad_id)[0]

    # One after another, so that a trust ratio is computed only where it is read.
    return jax.jit(
        lambda rates, seed, batches: jax.lax.map(lambda rate: run(rate, seed, batches), rates)
    )


def measure(
    row: str, rates: tuple[float, ...], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The cells of a row, one a rate."""
    corpus = data.open_corpus(options.data)
    parts = data.split(corpus, 0.02, 0)
    windows, rest = (data.Windows(p, MODEL.vocab, MODEL.max_length, True) for p in parts)
    held_out = next(iter(data.evaluation_batches(rest, HELD_OUT, HELD_OUT))).ids
    run = make_run(configure(row, options.steps), options.steps, jnp.asarray(held_out))
    ends, start = [], time.process_time()
    for seed in range(options.seeds):
        source = training_batches(windows, BATCH, seed, 0)
        batches = np.stack([next(source).ids for _ in range(options.steps)])
        nats = run(jnp.asarray(rates, jnp.float32), jnp.int32(seed), jnp.asarray(batches))
        count = int(np.sum(held_out != MODEL.vocab.pad_id))
        ends.append([bits_per_byte(float(x), count) for x in nats])
    seconds = time.process_time() - start
    cells = []
    for rate, scores in zip(rates, zip(*ends, strict=True), strict=True):
        diverged = [not score <= 8 for score in scores]
        broken = not all(map(math.isfinite, scores))
        cells.append(
            {
                "row": row,
                "learning_rate": rate,
                "mean": None if broken else round(statistics.mean(scores), 4),
                "spread": None if broken else round(statistics.pstdev(scores), 4),
                "diverged": sum(diverged),
                "seeds": options.seeds,
                "steps": options.steps,
                "cpu_seconds_of_row": round(seconds),
                "date": time.strftime("%Y-%m-%d"),
            }
        )
        print(json.dumps(cells[-1]), flush=True)
    return cells


def shown(cell: dict[str, Any]) -> str:
    """A cell of the table."""
    if cell["diverged"]:
        return f"{cell['diverged']} of {cell['seeds']} diverged"
    return f"{cell['mean']:.3f} ± {cell['spread']:.3f}"


def main() -> None:
    """Prints one line per cell, then a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME[:FIELD=VALUE,…]")
    parser.add_argument("--tune", nargs="*", default=[], metavar="NAME[:…]", help="wide sweep")
    parser.add_argument("--rates", nargs="*", default=[], metavar="NAME=RATE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--data", nargs="*", default=[], help="the standard library by default")
    options = parser.parse_args()
    rates = MIDDLE | {k: float(v) for k, v in (pair.split("=") for pair in options.rates)}
    for row in options.tune:
        measure(row, tuple(rates[row.partition(":")[0]] * f for f in SWEEP), options)
    table = []
    for row in options.rows:
        base = rates[row.partition(":")[0]]
        cells = measure(row, tuple(base * f for f in FACTORS), options)
        means = [math.inf if c["diverged"] else c["mean"] for c in cells]
        ends = f"{min(means):.3f} | {max(means):.3f}"
        table.append(f"| `{row}` | {base:g} | {' | '.join(map(shown, cells))} | {ends} |")
    if table:
        head = ["row", "base rate", *(f"× {f:g}" for f in FACTORS), "best", "worst"]
        print("\n".join(["", f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *table]))


if __name__ == "__main__":
    main()
