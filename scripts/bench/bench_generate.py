"""Speed of cached greedy generation with random weights: one JSON object per row.

    python scripts/bench/bench_generate.py --recipe megabyte_132m --batches 1 256 --bytes 1024

The first call compiles; the time is the median of `--repeats` calls of the same shape after it,
prompts and copies to the host included. Needs neither grain nor tyro.
"""

import argparse
import json
import statistics
import time

import jax

from bytelm import recipes
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference.generate import generate
from bytelm_jax.models import cast_params, define_model
from bytelm_jax.training import step as steps


def main() -> None:
    """Prints one line per batch size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="megabyte_132m")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--bytes", type=int, default=1024, help="new bytes per row")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    recipe = recipes.get(options.recipe)
    dtype = steps.compute_dtype(recipe.train)
    bind, init = define_model(recipe.model)
    model = bind(jax.jit(lambda: cast_params(init(0), dtype))())
    greedy = SamplerConfig(sampler="greedy")
    for batch in options.batches:
        prompts, times = [b"hello world, this is"] * batch, []
        generated: list[bytes] = []
        for _ in range(1 + options.repeats):
            start = time.perf_counter()
            generated = generate(model, prompts, options.bytes, greedy, stop_at_eos=False)
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[1:])
        row = {
            "recipe": recipe.name,
            "batch": batch,
            "bytes_per_second": round(sum(map(len, generated)) / seconds, 1),
            "seconds": round(seconds, 4),
            "dtype": str(dtype),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
