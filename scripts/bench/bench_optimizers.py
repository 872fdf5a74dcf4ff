"""Optimizers side by side on one real model: the same bytes, the same budget, several seeds.

    python scripts/bench/bench_optimizers.py --tune sgd adamw
    python scripts/bench/bench_optimizers.py --lines table.jsonl --rates sgd=0.5 --rows sgd \\
        q_learning_sgd "q_learning_sgd:signal=trust,interval=20"

A row is an optimizer of `bytelm train`, or `q_learning_muon`, the agent over Muon, with fields of
its configuration or of its controller; it is trained at its base learning rate (--rates) times each
factor, from every seed. Prints one JSON object per row and seed (validation bits per byte at each
factor; what is above 8 or not finite has diverged), then a table of mean and spread over the seeds.
Rows and seeds that the file --lines holds are not run again. Warm-up over a twentieth of the steps
and cosine decay to a tenth, as in `bytelm train`; no weight decay. The rates of a row run one after
another in one compiled program, seed after seed.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bytelm import data
from bytelm.config import ByteVocab, MegabyteConfig, OptimizerConfig, QLearningConfig, from_dict
from bytelm.config.optimizer import optimizer_class
from bytelm.files import read_json_lines
from bytelm.metrics import bits_per_byte
from bytelm_jax.models import define_model
from bytelm_jax.optimizers.build import build_optimizer, learning_rate_schedule
from bytelm_jax.optimizers.q_learning import q_learning
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
MIDDLE = {"sgd": 0.5, "q_learning_sgd": 0.5} | dict.fromkeys(
    ("adamw", "q_learning_adamw", "muon", "q_learning_muon"), 0.015
)
"""Base learning rates: the best of `--tune sgd adamw` for those, and AdamW's for Muon."""


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def build(row: str, steps: int, seed: Any) -> Any:
    """The optimizer of a row, at a learning rate of 1."""
    name, _, text = row.partition(":")
    if name != "q_learning_muon":
        return build_optimizer(configure(row, steps), steps, seed)
    controller = QLearningConfig(**{k: _value(v) for k, v in _pairs(text).items()})
    config = configure("muon", steps)
    unit = replace(config, schedule="constant", warmup_steps=0)
    rate = optax.inject_hyperparams(optax.scale_by_learning_rate, static_args=("flip_sign",))
    scheduled = rate(learning_rate_schedule(config, steps), flip_sign=False)
    return q_learning(optax.chain(build_optimizer(unit, steps), scheduled), controller, seed)


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split(",") if pair)


def configure(row: str, steps: int) -> OptimizerConfig:
    """`NAME` or `NAME:field=value,…` as a configuration whose learning rate is 1."""
    name, _, text = row.partition(":")
    values = {key: _value(value) for key, value in _pairs(text).items()}
    names = {field.name for field in fields(optimizer_class(name))}
    base: dict[str, Any] = {"warmup_steps": steps // 20, "weight_decay": 0.0, "learning_rate": 1.0}
    plain = base | {key: value for key, value in values.items() if key in names}
    steered = {key: value for key, value in values.items() if key not in names}
    tree = {"name": name, **plain} | ({"controller": steered} if steered else {})
    return from_dict(OptimizerConfig, tree, "optimizer")


def make_run(row: str, steps: int, held_out: jax.Array) -> Any:
    """`(rates [R], seed, batches) -> nats [R]`: what the held-out windows cost after training.

    All optimizers here are linear in the learning rate, which the agent sees only as a factor.
    """
    bind, init = define_model(MODEL)
    pad_id = MODEL.vocab.pad_id

    def mean_loss(params: Any, ids: Any) -> Any:
        nats, count = cross_entropy(bind(params)(ids), ids, pad_id)
        return nats / count

    def run(rate: Any, seed: Any, batches: Any) -> Any:
        optimizer, params = build(row, steps, seed), init(seed)

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


class Table:
    """The lines that are known, and the programs that make more."""

    def __init__(self, options: argparse.Namespace, rates: dict[str, float]) -> None:
        corpus = data.open_corpus(options.data)
        parts = data.split(corpus, 0.02, 0)
        self._windows, rest = (data.Windows(p, MODEL.vocab, MODEL.max_length, True) for p in parts)
        self._held_out = next(iter(data.evaluation_batches(rest, HELD_OUT, HELD_OUT))).ids
        self._options, self._rates, self._runs = options, rates, {}
        file = options.lines
        self.lines: list[dict[str, Any]] = read_json_lines(file) if file and file.exists() else []

    def base(self, row: str) -> float:
        """The learning rate of a row at factor 1."""
        return self._rates[row.partition(":")[0]]

    def find(self, row: str, seed: int, factors: tuple[float, ...]) -> dict[str, Any]:
        """The line of a row and seed, measured if it is not known."""
        steps, file = self._options.steps, self._options.lines
        key = {"row": row, "base": self.base(row), "factors": list(factors), "steps": steps}
        key |= {"seed": seed}
        for line in self.lines:
            if line.items() >= key.items():
                return line
        if row not in self._runs:
            self._runs[row] = make_run(row, steps, jnp.asarray(self._held_out))
        source, start = training_batches(self._windows, BATCH, seed, 0), time.process_time()
        batches = jnp.asarray(np.stack([next(source).ids for _ in range(steps)]))
        rates = jnp.asarray([self.base(row) * factor for factor in factors], jnp.float32)
        nats = self._runs[row](rates, jnp.int32(seed), batches)
        count = int(np.sum(self._held_out != MODEL.vocab.pad_id))
        bits = [bits_per_byte(float(x), count) for x in nats]
        line = key | {"bits_per_byte": [round(x, 4) if math.isfinite(x) else None for x in bits]}
        line |= {"cpu_seconds": round(time.process_time() - start), "jax": jax.__version__}
        line |= {"date": time.strftime("%Y-%m-%d")}
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        if file:
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
        return line

    def markdown(self, rows: list[str], seeds: list[int]) -> str:
        """Mean ± population deviation in each cell, and the best and the worst of each row."""
        head = ["row", "base rate", *(f"× {f:g}" for f in FACTORS), "best", "worst"]
        table = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        for row in rows:
            runs = [self.find(row, seed, FACTORS)["bits_per_byte"] for seed in seeds]
            cells, means = [], []
            for scores in zip(*runs, strict=True):
                bad = sum(score is None or score > 8 for score in scores)
                mean = math.inf if bad else statistics.mean(scores)
                means.append(mean)
                spread = 0.0 if bad else statistics.pstdev(scores)
                good = f"{mean:.3f} ± {spread:.3f}"
                cells.append(f"{bad} of {len(seeds)} diverged" if bad else good)
            ends = f"{min(means):.3f} | {max(means):.3f}"
            table.append(f"| `{row}` | {self.base(row):g} | {' | '.join(cells)} | {ends} |")
        return "\n".join(table)


def main() -> None:
    """Prints one line per row and seed, then a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME[:FIELD=VALUE,…]")
    parser.add_argument("--tune", nargs="*", default=[], metavar="NAME[:…]", help="wide sweep")
    parser.add_argument("--rates", nargs="*", default=[], metavar="NAME=RATE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--lines", type=Path, metavar="FILE", help="kept up, and gone on from")
    parser.add_argument("--data", nargs="*", default=[], help="the standard library by default")
    options = parser.parse_args()
    rates = MIDDLE | {k: float(v) for k, v in (pair.split("=") for pair in options.rates)}
    table, seeds = Table(options, rates), list(range(options.seeds))
    for row in options.tune:
        for seed in seeds:
            table.find(row, seed, SWEEP)
    for seed in seeds:
        for row in options.rows:
            table.find(row, seed, FACTORS)
    if options.rows:
        print("\n" + table.markdown(options.rows, seeds))


if __name__ == "__main__":
    main()
