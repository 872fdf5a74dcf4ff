"""What the agent and its noise cost: milliseconds of each optimizer's update, as JSON objects.

    python scripts/bench/bench_q_learning.py --recipe megabyte_tiny --batch 16

The gradient and each update are compiled and timed by themselves, after warm-up: medians of single
calls, each waited for; processor time on a CPU, since its cores may be busy, wall time elsewhere.
`share_over_sgd` is what an update takes beyond that of SGD with momentum, over the gradient's time
plus SGD's. Under the signal "trust" an update is the mean of those of an interval near the peak of
the schedule: all but one without, and one with a reading of the loss, `reading_ms`. `state_bytes`
is the optimizer's memory.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bytelm import recipes
from bytelm.config import (
    AdamWConfig,
    QLearningAdamWConfig,
    QLearningConfig,
    QLearningSGDConfig,
    SGDConfig,
)
from bytelm.q_table import STEADY
from bytelm_jax.models import cast_params, define_model
from bytelm_jax.optimizers.build import build_optimizer
from bytelm_jax.training import step as steps
from bytelm_jax.training.loss import cross_entropy

TRUST = QLearningConfig(signal="trust", interval=20)
ROWS = {
    "sgd": SGDConfig(),
    "q_learning_sgd": QLearningSGDConfig(),
    "q_learning_sgd, noise": QLearningSGDConfig(noise_scale=1e-3),
    "q_learning_sgd, not centred": QLearningSGDConfig(centralize=False),
    "q_learning_sgd, trust": QLearningSGDConfig(controller=TRUST),
    "adamw": AdamWConfig(),
    "q_learning_adamw": QLearningAdamWConfig(),
    "q_learning_adamw, trust": QLearningAdamWConfig(controller=TRUST),
}


def steady(state: Any, count: int) -> Any:
    """The state of an optimizer that reads trust ratios, after `count` steps, near the peak."""
    trust = state.agent.trust._replace(phase=jnp.int32(STEADY))
    return state._replace(agent=state.agent._replace(trust=trust, count=jnp.int32(count)))


def time_update(
    update: Callable[[Any], Any], state: Any, config: Any, repeats: int
) -> tuple[float, float]:
    """Milliseconds of an update on the average, and of a reading of the trust ratio beside it."""
    if not config.has_agent or config.controller.signal != "trust":
        return milliseconds(lambda: update(state), repeats), 0.0
    interval = config.controller.interval
    plain, read = (
        milliseconds(partial(update, steady(state, count)), repeats)
        for count in (interval - 2, interval - 1)
    )
    return plain + (read - plain) / interval, read - plain


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of `call`, whose arrays are waited for."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    times = []
    for _ in range(repeats + 2):
        start = clock()
        jax.block_until_ready(call())
        times.append(clock() - start)
    return 1e3 * statistics.median(times[2:])


def main() -> None:
    """Prints one line per optimizer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="megabyte_tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    recipe = recipes.get(options.recipe)
    bind, init = define_model(recipe.model)
    dtype = steps.compute_dtype(recipe.train)
    params, vocab = jax.jit(init)(0), recipe.model.vocab
    shape = options.batch, recipe.data.sequence_length
    source = np.random.default_rng(0)
    ids = jnp.asarray(source.integers(vocab.offset, vocab.offset + 256, shape, np.int32))

    def mean_loss(params: Any) -> Any:
        nats, count = cross_entropy(bind(cast_params(params, dtype))(ids), ids, vocab.pad_id)
        return nats / count

    gradient = jax.jit(jax.value_and_grad(mean_loss))
    loss, gradients = gradient(params)
    base = milliseconds(lambda: gradient(params), max(options.repeats // 4, 3))
    plain = 0.0
    for name, config in ROWS.items():
        optimizer = build_optimizer(config, recipe.train.steps)
        state, start = optimizer.init(params), time.perf_counter()

        def update(
            gradients: Any, state: Any, params: Any, loss: Any, held: Any = optimizer
        ) -> Any:
            return held.update(gradients, state, params, value=loss, value_fn=mean_loss)

        program = jax.jit(update).lower(gradients, state, params, loss).compile()
        compiled = time.perf_counter() - start

        def call(state: Any, program: Any = program) -> Any:
            return program(gradients, state, params, loss)

        spent, reading = time_update(call, state, config, options.repeats)
        plain = plain or spent
        row = {
            "optimizer": name,
            "update_ms": round(spent, 3),
            "reading_ms": round(reading, 3),
            "compile_seconds": round(compiled, 1),
            "gradient_ms": round(base, 1),
            "share_over_sgd": round((spent - plain) / (base + plain), 4),
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            "recipe": recipe.name,
            "batch": shape,
            "dtype": str(dtype),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
