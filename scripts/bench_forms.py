"""Candidate forms beside each other: milliseconds forward and backward, error against float32.

    python scripts/bench_forms.py [NAME …]
"""

import fcntl
import json
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

from bytelm_jax import forms
from bytelm_jax.layers import adaptive, experts, feedforward, long_convolution, norm
from bytelm_jax.models import split_model

SMALL = bool(os.environ.get("SMALL"))
B, T, D = (2, 256, 64) if SMALL else (16, 2048, 512)


def make(function):
    def scalar(weights, *arrays):
        out = function(*arrays)
        return (out.astype(jnp.float32) * weights).sum(), out

    return scalar


def time_of(call, arrays, repeats=12):
    jax.block_until_ready(call(*arrays))
    jax.block_until_ready(call(*arrays))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            found = call(*arrays)
        jax.block_until_ready(found)
        times.append((time.perf_counter() - start) / repeats)
    return round(1e3 * statistics.median(times), 3)


def relative(a, b):
    error = jnp.linalg.norm(a.astype(jnp.float32).ravel() - b.ravel())
    return float(f"{float(error / (jnp.linalg.norm(b.ravel()) + 1e-30)):.1e}")


REFERENCE = {}


def compare(check, form, function, arrays, off=(), on=()):
    """One form: off and on are names of `forms`; a check's first form, in float32, is truth."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, arrays)
    forms._OFF.clear(), forms._ON.clear()
    forms._OFF.update(off), forms._ON.update(on)
    if SMALL:
        forms._ON.add("everywhere")
    shape = jax.eval_shape(function, *half).shape
    weights = jax.random.normal(jax.random.key(9), shape)
    argnums = tuple(range(1, len(arrays) + 1))

    def compiled(arrays):
        both = jax.jit(jax.value_and_grad(make(function), argnums, has_aux=True))
        return both.lower(weights, *arrays).compile()

    forward = jax.jit(lambda *a: function(*a)).lower(*half).compile()
    both = compiled(half)
    if check not in REFERENCE:
        with jax.default_matmul_precision("highest"):
            wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
            exact = compiled(wide)
    with open(os.environ.get("LOCK", "/tmp/lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if check not in REFERENCE:
            (_, out), g = exact(weights, *wide)
            REFERENCE.clear()
            REFERENCE[check] = out, g
        (_, out), g = both(weights, *half)
        pairs = zip(jax.tree.leaves((out, g)), jax.tree.leaves(REFERENCE[check]), strict=True)
        errors = [relative(a, b) for a, b in pairs]
        del out, g
        row = {"check": check, "form": form, "forward_ms": time_of(forward, half)}
        row |= {"both_ms": time_of(both, (weights, *half)), "errors": errors}
    print(json.dumps(row), flush=True)


def normal(*shape, std=1.0, seed=0):
    return std * jax.random.normal(jax.random.key(seed), shape)


def convolution():
    taps = jnp.asarray(long_convolution._decaying(normal(16 if SMALL else 256, D, seed=1)))
    x = normal(B, T, D)

    def plain(x, taps):
        return long_convolution.long_convolution(x, taps, 64)

    compare("conv", "fft", plain, (x, taps), off=("direct",))
    for c in (64, 128, 256):
        on = (f"conv{c}",)
        compare("conv", f"direct {c}", plain, (x, taps), on=on)
    compare("conv", "direct 128, barriers", plain, (x, taps), on=("barrier",))


def mean():
    x = (normal(B, T, D),)
    compare("mean", "cumsum", adaptive.running_mean, x, off=("mean",))
    compare("mean", "products", adaptive.running_mean, x)


def gelus():
    x = (normal(B * T, 4 * D),)
    compare("gelu", "jax", feedforward.gelu, x, off=("gelu",))
    compare("gelu", "keeps x", feedforward.gelu, x)


def norms():
    for name, count, dim, out in (("local", 65536, 256, 1024), ("global", 8192, 1024, 4096)):
        count = 512 if SMALL else count
        module = norm.LayerNorm(dim)
        bind, params = split_model(module)
        params = {k: v + normal(dim, std=0.1, seed=3) for k, v in params.items()}
        x, kernel, bias = normal(count, dim), normal(dim, out, std=dim**-0.5), normal(out)

        def run(params, x, kernel, bias, bind=bind):
            return bind(params).linear(x, kernel, bias)

        arrays = (params, x, kernel, bias)
        compare(f"norm {name}", "plain", run, arrays, off=("fold",))
        compare(f"norm {name}", "folded", run, arrays)
        stacked = (params, x.reshape(32, count // 32, dim), kernel, bias)
        compare(f"norm {name}, three axes", "plain", run, stacked, off=("fold",))


def blocks():
    for name, count, dim in (("local", 65536, 256), ("global", 8192, 1024)):
        count = 512 if SMALL else count
        bind, params = split_model(feedforward.FeedForward(dim, 0.02, rngs=nnx.Rngs(0)))
        x = normal(32, count // 32, dim)

        def run(params, x, bind=bind):
            return x + bind(params)(x)

        compare(f"feed-forward {name}", "plain", run, (params, x), off=("fold", "gelu"))
        compare(f"feed-forward {name}", "gelu", run, (params, x), off=("fold",))
        compare(f"feed-forward {name}", "gelu, fold", run, (params, x))


def attends():
    from bytelm_jax.layers import attention

    import numpy as np

    count, length = (2, 64) if SMALL else (32, 256)
    q = normal(count, length, 16, 64)
    k, v = normal(count, length, 64, seed=1), normal(count, length, 64, seed=2)

    def plain(q, k, v):
        return attention.multi_query_attention(q, k, v, np.tri(length, dtype=bool))

    def fused(q, k, v, heads=1):
        k, v = (jnp.repeat(x[:, :, None], heads, axis=2) for x in (k, v))
        out = attention.fused_attention(q, k, v, 0)
        return plain(q, k[:, :, 0], v[:, :, 0]) if out is None else out

    compare("attention", "plain", plain, (q, k, v))
    compare("attention", "fused", fused, (q, k, v))
    compare("attention", "fused, keys repeated", lambda *a: fused(*a, heads=16), (q, k, v))
    q = normal(8192 if not SMALL else 4, 8, 4, 64)
    k, v = normal(len(q), 8, 64, seed=1), normal(len(q), 8, 64, seed=2)
    near = np.tri(8, dtype=bool)

    def local(q, k, v):
        return attention.multi_query_attention(q, k, v, near)

    def together(q, k, v, some=16):
        q, k, v = (x.reshape(-1, some * 8, *x.shape[2:]) for x in (q, k, v))
        mask = np.kron(np.eye(some, dtype=bool), near)
        return attention.multi_query_attention(q, k, v, mask).reshape(-1, 8, *q.shape[2:])

    compare("local attention", "plain", local, (q, k, v))
    if not SMALL:
        compare("local attention", "16 patches as one", together, (q, k, v))
        compare("local attention", "4 as one", lambda *a: together(*a, some=4), (q, k, v))


def channel():
    module = adaptive.ChannelMixing(D, 4 * D, D, 16, True, 0.02, rngs=nnx.Rngs(0))
    bind, params = split_model(module)
    params = {k: v + normal(*v.shape, std=0.02, seed=5) for k, v in params.items()}
    arrays = (params, normal(B, T, D), normal(B, T, D, seed=1))

    def run(params, x, a):
        return bind(params)(x, a)

    compare("channel", "plain", run, arrays, off=("fold", "gelu", "ride"))
    compare("channel", "gelu", run, arrays, off=("fold", "ride"))
    compare("channel", "gelu, ride", run, arrays, off=("fold",))
    compare("channel", "gelu, ride, fold", run, arrays)


def mixture():
    module = experts.MixtureOfExperts(D, 48, 2, D, 16, True, 0.02, rngs=nnx.Rngs(0))
    bind, params = split_model(module)
    params = {k: v + normal(*v.shape, std=0.02, seed=5) for k, v in params.items()}
    arrays = (params, normal(B, T, D), normal(B, T, D, seed=1))

    def run(params, x, a):
        return bind(params)(x, a)[0]

    compare("experts", "plain", run, arrays, off=("mix", "ride_experts"))
    compare("experts", "mix", run, arrays, off=("ride_experts",))
    compare("experts", "mix, ride", run, arrays)


def main():
    for name in sys.argv[1:]:
        try:
            globals()[name]()
        except Exception as error:
            print(json.dumps({"check": name, "failed": repr(error)[:600]}), flush=True)


if __name__ == "__main__":
    main()
