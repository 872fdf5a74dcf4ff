"""Time of one cached decoding step of LFByte against the length of its context, as JSON lines.

    python scripts/bench/bench_lfbyte.py --contexts 256 1024 4096 16384

A row: `context` bytes before the step, `step_ms` (median of the repeats, each a loop of steps on
the device), `cache_bytes` of a row, and `growth`: the step's time over that of the row before,
divided by the ratio of the contexts. Linear cost is growth 1, constant cost the inverse ratio.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from bytelm.config import LFByteConfig
from bytelm_jax.models import Params, cast_params, define_model


def measure(config: LFByteConfig, context: int, batch: int, steps: int, repeats: int) -> float:
    """Median seconds of one step that appends a byte to `context` bytes."""
    bind, init = define_model(config)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    params = jax.jit(lambda: cast_params(init(0), dtype))()
    model = bind(params)
    cache = jax.jit(lambda ids: model.prefill(ids, model.init_cache(batch, context + steps)))(
        jax.random.randint(jax.random.key(0), (batch, context), 0, 256)
    )

    @functools.partial(jax.jit, donate_argnums=1)
    def run(params: Params, cache: Any, byte: jax.Array) -> tuple[Any, jax.Array]:
        def step(i: jax.Array, state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            cache, byte = state
            return bind(params).decode_round(
                cache, byte, context + i, lambda logits, _: logits.argmax(-1).astype(jnp.int32)
            )

        return jax.lax.fori_loop(0, steps, step, (cache, byte))

    byte, seconds = jnp.zeros((batch, 1), jnp.int32), []
    for _ in range(repeats + 1):  # the first compiles
        begin = time.perf_counter()
        cache, byte = jax.block_until_ready(run(params, cache, byte))
        seconds.append((time.perf_counter() - begin) / steps)
    return statistics.median(seconds[1:])


def main() -> None:
    """Prints one JSON object per context length."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--kernel-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    config = LFByteConfig(
        embed_dim=args.embed_dim,
        adapt_dim=args.embed_dim,
        num_layers=args.num_layers,
        kernel_length=args.kernel_length,
    )
    before: tuple[int, float] | None = None
    for context in args.contexts:
        seconds = measure(config, context, args.batch, args.steps, args.repeats)
        row = {
            "context": context,
            "batch": args.batch,
            "step_ms": round(1e3 * seconds, 4),
            "cache_bytes": config.cache_bytes(context + args.steps, 4),
            "parameters": config.parameter_count(),
            "device": jax.devices()[0].device_kind,
            "machine": platform.machine(),
            "jax": jax.__version__,
        }
        if before is not None:
            row["growth"] = round(seconds / before[1] / (context / before[0]), 4)
        print(json.dumps(row), flush=True)
        before = (context, seconds)


if __name__ == "__main__":
    main()
