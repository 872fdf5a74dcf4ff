"""The fast forms of this device beside the plain ones: error, exact causality, time. JSON lines.

    python scripts/check/kernels.py

Fused attention in bfloat16 is compared with the written-out form in float32, forward and gradient,
as ‖a − b‖ / ‖b‖; the written-out form in bfloat16 stands beside it. The same for products of
experts by blocks, the long convolution by one product and by transforms, running means by products
and by sums, and the GELU that keeps its input alone. A changed future may change no earlier output,
exactly. On a CPU, where nothing is fused, attention is compared with itself.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bytelm_jax.kernels import attention, convolution, gelu, running_mean
from bytelm_jax.kernels.grouped_matmul import (
    block_length,
    grouped_matmul,
    make_groups,
    mix,
    spread,
)
from bytelm_jax.layers import grouped_attention, long_convolution
from bytelm_jax.parity.report import relative_error

SHAPES = {
    "one key head, as in MEGABYTE's global stack": (4, 256, 16, 1, 64, 0),
    "BLT's global stack": (2, 512, 16, 16, 96, 0),
    "BLT's windowed local stack": (2, 2048, 12, 12, 64, 512),
    "BLT's global stack, odd": (2, 691, 16, 16, 96, 0),
    "a windowed stack, odd": (2, 2047, 12, 12, 64, 512),
}


def plain(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    """The written-out form."""
    length = q.shape[1]
    ahead = np.arange(length)[:, None] - np.arange(length)[None, :]
    return grouped_attention.grouped_attention(q, k, v, (ahead >= 0) & (ahead < (window or length)))


def fused(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    """The fused form, or the written-out one where there is none."""
    return attention.fused_or_plain(q, k, v, window, lambda: plain(q, k, v, window))


def with_gradients(form: Callable[..., jax.Array], weights: jax.Array) -> Callable[..., Any]:
    """Output and gradients of a weighted sum of it."""

    def scalar(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = form(*arrays)
        return (out.astype(jnp.float32) * weights).sum(), out

    def both(*arrays: jax.Array) -> Any:
        return jax.value_and_grad(scalar, argnums=tuple(range(len(arrays))), has_aux=True)(*arrays)

    return jax.jit(both)


def milliseconds(call: Callable[..., Any], *arrays: jax.Array) -> float:
    """Of one call, the mean of twenty, after one."""
    jax.block_until_ready(call(*arrays))
    start = time.perf_counter()
    result = call(*arrays)
    for _ in range(19):
        result = call(*arrays)
    jax.block_until_ready(result)
    return round(50 * (time.perf_counter() - start), 4)


def errors(actual: Any, exact: Any) -> list[float]:
    """Relative errors of output and gradients."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(exact), strict=True)
    return [
        float(f"{relative_error(np.asarray(a, np.float32), np.asarray(b)):.2e}") for a, b in pairs
    ]


def check_attention(name: str) -> dict[str, Any]:
    """One shape of `SHAPES`."""
    batch, length, heads, groups, width, window = SHAPES[name]
    source = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(source.normal(size=shape), jnp.float32)  # noqa: E731
    q = draw(batch, length, heads, width)
    k, v = (draw(batch, length, groups, width) for _ in range(2))
    weights, half = draw(*q.shape), [x.astype(jnp.bfloat16) for x in (q, k, v)]
    forms = {
        name: with_gradients(lambda *arrays, form=form: form(*arrays, window), weights)
        for name, form in (("fused", fused), ("plain", plain))
    }
    with jax.default_matmul_precision("highest"):
        (_, out), gradients = forms["plain"](*(x.astype(jnp.float32) for x in half))
    row: dict[str, Any] = {"check": name}
    for form, call in forms.items():
        (_, ours), theirs = call(*half)
        row[form] = errors((ours, theirs), (out, gradients))
        row[f"{form}_ms"] = milliseconds(call, *half)
    cut, later = length // 2 + 1, [x.at[:, length // 2 + 1 :].add(1) for x in half]
    forward = jax.jit(lambda q, k, v: fused(q, k, v, window))
    row["causal"] = bool((forward(*half)[:, :cut] == forward(*later)[:, :cut]).all())
    return row


def check_experts() -> dict[str, Any]:
    """Products of a dozen experts by blocks."""
    rows, count, width = 2_048, 12, 256
    source = np.random.default_rng(0)
    expert = jnp.asarray(np.minimum(source.geometric(0.08, rows) - 1, count - 1))
    x = jnp.asarray(source.normal(size=(rows, width)), jnp.bfloat16)
    kernels = jnp.asarray(source.normal(size=(count, width, width)), jnp.bfloat16)
    biases = jnp.asarray(source.normal(size=(count, width)), jnp.bfloat16)
    gates = jnp.ones((rows, 1))

    def multiply(x: jax.Array, kernels: jax.Array, biases: jax.Array, block: int) -> jax.Array:
        groups = make_groups(expert, count, block)
        out = grouped_matmul(spread(x, 1, groups), kernels, groups)
        return mix(out, biases, gates, expert[:, None], groups)

    forms = {
        "blocks": lambda *a: multiply(*a, block=block_length(rows, count)),
        "ragged": lambda *a: multiply(*a, block=0),
    }
    return compare("experts", "ragged", forms, (x, kernels, biases))


def compare(
    check: str, exact: str, forms: dict[str, Callable[..., jax.Array]], half: Sequence[jax.Array]
) -> dict[str, Any]:
    """Forms of one function in bfloat16 against the form `exact` in float32."""
    shape = jax.eval_shape(forms[exact], *half).shape
    weights = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    calls = {name: with_gradients(form, weights) for name, form in forms.items()}
    with jax.default_matmul_precision("highest"):
        (_, out), gradients = calls[exact](*(x.astype(jnp.float32) for x in half))
    row: dict[str, Any] = {"check": check}
    for name, call in calls.items():
        (_, ours), theirs = call(*half)
        row[name] = errors((ours, theirs), (out, gradients))
        row[f"{name}_forward_ms"] = milliseconds(jax.jit(forms[name]), *half)
        row[f"{name}_ms"] = milliseconds(call, *half)
    return row


def check_elementwise() -> list[dict[str, Any]]:
    """Convolution, running mean and GELU at the shapes of `lfbyte_130m:16`; smaller on a CPU."""
    batch, length, width, taps, chunk = (16, 2048, 512, 256, 64)
    if jax.default_backend() == "cpu":
        batch, length, width = 2, 512, 32
    source = np.random.default_rng(0)
    x = jnp.asarray(source.normal(size=(batch, length, width)), jnp.bfloat16)
    decay = np.asarray(long_convolution.decays(taps, width))
    filters = jnp.asarray(source.normal(size=(taps, width)) * decay / taps**0.5, jnp.bfloat16)

    def convolve(form: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def run(x: jax.Array, taps: jax.Array) -> jax.Array:
            total = form(jnp.moveaxis(x, -1, 0), taps.T, chunk)
            return jnp.moveaxis(total, 0, -1).astype(x.dtype)

        return run

    forms = {
        "direct": convolve(convolution.direct_convolution),
        "transforms": convolve(convolution.transformed_convolution),
    }
    rows = [compare("convolution", "transforms", forms, (x, filters))]
    later = x.at[:, length // 2 + 1 :].add(1)
    run = jax.jit(forms["direct"])
    before, after = (run(values, filters)[:, : length // 2 + 1] for values in (x, later))
    rows[0]["causal"] = bool((before == after).all())
    forms = {"products": running_mean.mean_by_products, "sums": running_mean.mean_by_sums}
    rows.append(compare("running mean", "sums", forms, (x,)))
    plain = functools.partial(jax.nn.gelu, approximate=False)
    return [*rows, compare("GELU", "plain", {"keeps x": gelu.gelu, "plain": plain}, (x,))]


def main() -> None:
    """Prints one line per check."""
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for name in SHAPES:
        print(json.dumps(check_attention(name) | device), flush=True)
    for row in (check_experts(), *check_elementwise()):
        print(json.dumps(row | device), flush=True)


if __name__ == "__main__":
    main()
