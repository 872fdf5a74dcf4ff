"""Speed of cached generation with random weights: one JSON object per row.

    python scripts/bench/bench_generate.py --recipe megabyte_132m --batches 1 256 --bytes 1024
    python scripts/bench/bench_generate.py --recipe "blt_767m --patcher space" --speculate self

The first call compiles; the time is the median of `--repeats` calls of the same shape after it,
prefill and copies to the host included. `bytelm bench` measures a trained model, whose text decides
what speculation is worth; here a round's time is what counts. Needs no grain.
"""

import argparse
import json
from pathlib import Path

import jax
from equal_time import read_row

from bytelm.sampling import SamplerConfig
from bytelm_jax.models import cast_params, define_model
from bytelm_jax.tools.benchmark import Shape, measure
from bytelm_jax.training import step as steps


def main() -> None:
    """Prints one line per shape and draft."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="megabyte_132m", help="a recipe and its overrides")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[20], help="bytes of prompts")
    parser.add_argument("--bytes", type=int, default=1024, help="new bytes per row")
    parser.add_argument("--speculate", nargs="+", default=["none"])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    recipe = read_row(options.recipe)
    dtype = steps.compute_dtype(recipe.train)
    bind, init = define_model(recipe.model)
    model = bind(jax.jit(lambda: cast_params(init(0), dtype))())
    text = (Path(__file__).parents[2] / "CHANGELOG.md").read_bytes()
    sampler = SamplerConfig(temperature=options.temperature)
    for batch in options.batches:
        for context in options.contexts:
            shape = Shape(batch, context, options.bytes, options.repeats)
            for draft in options.speculate:
                row = measure(model, text, shape, sampler, 0, draft, draft)
                print(json.dumps(row | {"recipe": options.recipe, "dtype": str(dtype)}), flush=True)


if __name__ == "__main__":
    main()
