"""Your own training loop: a model of bytelm under flax's nnx and optax.

    python examples/train_with_optax.py --steps 300 --out exports/example

Trains a small Byte Latent Transformer, whose patches begin after words, on the source of Python's
standard library (or on --data), and exports it for the other examples.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

import bytelm_jax
from bytelm.data import Windows, open_corpus, split

parser = argparse.ArgumentParser(description="Trains a small model with nnx and optax.")
parser.add_argument("--data", type=Path, nargs="*", default=[], help="files and folders")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--length", type=int, default=128, help="bytes in a row")
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--out", type=Path, default=Path("exports/example"))
options = parser.parse_args()

# ---- data: documents, some held out, cut into rows of ids ----
config = bytelm_jax.BLTConfig(
    patcher="space",
    ngram_sizes=(3, 4),
    ngram_rows=1000,
    local_dim=32,
    encoder_heads=2,
    encoder_hidden_dim=64,
    decoder_layers=1,
    decoder_heads=2,
    decoder_hidden_dim=64,
    global_dim=64,
    global_layers=2,
    global_heads=2,
    global_hidden_dim=128,
)
documents, held_out = split(open_corpus(options.data), 0.02, 0)
rows = Windows(documents, config.vocab, options.length, append_eos=True)

# ---- model and optimizer ----
model = bytelm_jax.build_model(config, nnx.Rngs(0))
schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, 20, options.steps + 20)
optimizer = nnx.Optimizer(
    model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)), wrt=nnx.Param
)


# ---- one step: every byte of every row is predicted, the first included ----
@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, ids: np.ndarray) -> jax.Array:
    def loss_of(model) -> jax.Array:
        nats, count = bytelm_jax.cross_entropy(model(ids), ids, config.vocab.pad_id)
        return nats / count

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


# ---- loop ----
source = np.random.default_rng(0)
for step in range(options.steps):
    chosen = source.integers(len(rows), size=options.batch_size)
    loss = train_step(model, optimizer, np.stack([rows[i] for i in chosen]))
    if step % 50 == 0 or step == options.steps - 1:
        print(f"step {step}: {float(loss) / np.log(2):.3f} bits per byte")

# ---- what it learned, in exact bits ----
sample = held_out.cut(min(held_out.total_bytes, 20 * options.length))[0]
result = bytelm_jax.evaluate(model, sample, options.length)
print(f"held out: {result.bits_per_byte:.3f} bits per byte over {result.count:,} bytes")
bytelm_jax.save_pretrained(model, options.out)
print(f"wrote {options.out}")
