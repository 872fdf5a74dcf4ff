"""Looking inside a model: where patches start, and what each byte surprises it by.

    python examples/look_inside.py exports/example "def main(arguments):"

The same in PyTorch, with `import bytelm_torch` in the place of `bytelm_jax`. `bytelm inspect` shows
it in colours, `bytelm serve` in a browser.
"""

import argparse
from pathlib import Path

import numpy as np

import bytelm_jax

parser = argparse.ArgumentParser(description="Looks inside a model.")
parser.add_argument("model", type=Path, help="an export or a run folder")
parser.add_argument("text", nargs="?", default="for index in range(len(names)):\n    print(index)")
options = parser.parse_args()

model = bytelm_jax.from_pretrained(options.model)
seen = bytelm_jax.inspect(model, options.text.encode())
print(seen.describe())

# Surprise is what a byte cost, in bits; entropy is what the model expected it to cost. A patch that
# costs much is one that the model had to be told; the bytes after its first ones are often free.
starts = np.arange(len(seen.data)) == 0 if seen.starts is None else seen.starts
first = np.flatnonzero(starts)
print(f"{'patch':24} {'bits':>6}  bits of each byte (expected)")
for begin, end in zip(first, [*first[1:], len(seen.data)], strict=True):
    costs = zip(seen.surprise[begin:end], seen.entropy[begin:end], strict=True)
    each = "  ".join(f"{surprise:.1f} ({entropy:.1f})" for surprise, entropy in costs)
    print(f"{seen.data[begin:end]!r:24} {seen.surprise[begin:end].sum():6.1f}  {each}")
