"""BLT's cross-attention, linear and dense side by side in one run: one JSON object per row.

    python scripts/bench/bench_cross_attention.py --lengths 2048 4096 8192 16384

Pooling bytes into patches and reading patches back, forward and backward, one row of text, patches
of four bytes, one head, float32 random numbers. `linear` is what the model runs: a softmax over
segments and a gather. `dense` is the masked form with an [N, T] matrix. Times are medians after
warm-up, each waited for, beside the processor time of this process, which other processes disturb
less; memory is what the compiler sets aside beside inputs and outputs.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bytelm_jax.layers.cross_attention import CrossAttention
from bytelm_jax.layers.grouped_attention import grouped_attention
from bytelm_jax.models import split_model

DIM, HEADS, QUERIES, PATCH = 64, 1, 2, 4


def linear(layer: Any, states: Any, queries: Any, patch_of: Any) -> Any:
    """Pool, then read back, as the model does."""
    pooled = layer.pool_cached(queries, layer.keys_values(states), patch_of)
    return layer.read(states, pooled, patch_of)[0]


def dense(layer: Any, states: Any, queries: Any, patch_of: Any) -> Any:
    """The same through a mask of vectors times bytes."""
    rows, count = queries.shape[:2]
    vectors = jnp.repeat(jnp.arange(count), QUERIES)
    mask = vectors[None, :, None] == patch_of[:, None, :]

    def attend(x: Any, seen: Any, mask: Any) -> Any:
        keys, values = layer.keys_values(seen)
        return layer._add(x, grouped_attention(layer._queries(x), keys, values, mask))

    pooled = attend(queries.reshape(rows, -1, DIM), states, mask)
    return attend(states, pooled, jnp.swapaxes(mask, 1, 2))


def measure(name: str, form: Any, length: int, repeats: int) -> dict[str, object]:
    """One row: milliseconds and mebibytes."""
    bind, params = split_model(CrossAttention(DIM, HEADS, 0, rngs=nnx.Rngs(0)))
    source = np.random.default_rng(0)
    states = source.standard_normal((1, length, DIM), np.float32)
    queries = source.standard_normal((1, length // PATCH, QUERIES, DIM), np.float32)
    patch_of = (np.arange(length, dtype=np.int32) // PATCH)[None]

    def loss(params: Any, states: Any, queries: Any) -> Any:
        return jnp.square(form(bind(params), states, queries, patch_of)).mean()

    inputs = jax.device_put((params, states, queries))
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*inputs).compile()
    times, work = [], []
    for _ in range(repeats + 2):
        start, began = time.perf_counter(), time.process_time()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - start)
        work.append(time.process_time() - began)
    memory = compiled.memory_analysis()
    return {
        "form": name,
        "bytes": length,
        "ms": round(1e3 * statistics.median(times[2:]), 2),
        "cpu_ms": round(1e3 * statistics.median(work[2:]), 2),
        "temporary_mib": memory and round(memory.temp_size_in_bytes / 2**20, 1),
        "device": jax.devices()[0].device_kind,
    }


def main() -> None:
    """Parses the options and prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for length in options.lengths:
        for name, form in (("linear", linear), ("dense", dense)):
            print(json.dumps(measure(name, form, length, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
