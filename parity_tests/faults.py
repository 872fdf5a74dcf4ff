"""Faults for the torch twin, each with the layer that `bytelm parity` must name.

A fault is a changed weight, attribute or function. The models are tiny, in float64; what JAX does
is computed once a model.
"""

import contextlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bytelm_torch
from bytelm.config import BLTConfig, EntropyConfig, LFByteConfig, MegabyteConfig
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert
from bytelm_jax.models import abstract_params
from bytelm_jax.parity import report as parity
from bytelm_torch.layers import (
    attention,
    cross_attention,
    experts,
    grouped_attention,
    ngram,
    spline,
)
from bytelm_torch.layers.rotary import rotate
from bytelm_torch.models import blt_local, lfbyte, patching

_HEADS: Any = {"encoder_heads": 2, "decoder_heads": 2, "global_heads": 2}
_WIDTHS = {"local_dim": 8, "encoder_hidden_dim": 6, "decoder_hidden_dim": 6, "decoder_layers": 1}
_WIDE = {"global_dim": 16, "global_layers": 1, "global_hidden_dim": 6, "ngram_rows": 50}
MODELS = {
    "megabyte": MegabyteConfig(
        variant="in_action",
        patch_size=4,
        global_dim=4,
        local_dim=8,
        global_layers=2,
        global_heads=2,
        local_layers=1,
        local_heads=2,
    ),
    "lfbyte": LFByteConfig(embed_dim=8, num_layers=1, adapt_dim=4, rank=2, kernel_length=8),
    "blt": BLTConfig(
        patcher="entropy",
        threshold=4.5,
        patch_budget=1.0,
        local_window=5,
        entropy=EntropyConfig(dim=8, layers=1, heads=2, hidden_dim=6),
        feedforward="spline",
        entropy_attention=True,
        ngram_sizes=(3, 4),
        **(_HEADS | _WIDTHS | _WIDE),
    ),
}


def weight(path: str, change: Callable[[Any], Any]) -> Callable[..., None]:
    """A fault that replaces a parameter's values."""

    def plant(twin: Any, patches: contextlib.ExitStack) -> None:
        tensor = twin.get_parameter(path)
        tensor.data = change(tensor.data).clone()

    return plant


def attribute(path: str, name: str, change: Callable[[Any], Any]) -> Callable[..., None]:
    """A fault in a layer's attribute or method; path "" is the model."""

    def plant(twin: Any, patches: contextlib.ExitStack) -> None:
        module = twin.get_submodule(path)
        setattr(module, name, change(getattr(module, name)))

    return plant


def function(module: Any, name: str, change: Callable[[Any], Any]) -> Callable[..., None]:
    """A fault in a function or constant, as `module` sees it."""

    def plant(twin: Any, patches: contextlib.ExitStack) -> None:
        patches.enter_context(patch.object(module, name, change(getattr(module, name))))

    return plant


def halves(x: Any) -> Any:
    """The two halves of the first axis swapped."""
    return torch.cat(x.chunk(2)[::-1])


def swapped_gate(twin: Any, patches: contextlib.ExitStack) -> None:
    """The two kernels of a gated layer change places."""
    layer = twin.patcher.transformer.layers[0].feedforward
    layer.gate.weight, layer.up.weight = layer.up.weight, layer.gate.weight


def split_halves(real: Any) -> Any:
    """Rotary pairs (i, i + K/2) instead of (2i, 2i + 1)."""

    def rotated(x: Any, rope: Any) -> Any:
        mixed = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return rotate(mixed, rope).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    return rotated


def stale(real: Any) -> Any:
    """The cache is read, and never written."""
    return lambda x, cache, *where: (
        real(x, type(cache)(*(c.clone() for c in cache)), *where)[0],
        cache,
    )


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is a millionth too large."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * (1 + 1e-6)


def tanh_gelu(twin: Any, patches: contextlib.ExitStack) -> None:
    """GELU by its tanh approximation."""
    layer = twin.global_transformer.layers[1].feedforward
    gelu = torch.nn.functional.gelu
    layer.forward = lambda x: layer.down(gelu(layer.up(layer.norm(x)), approximate="tanh"))


def no_renormalisation(real: Any) -> Any:
    """The chosen experts' gates as they are, instead of over their sum."""

    def chosen(probabilities: Any, top_k: int) -> Any:
        which, gates, share = real(probabilities, top_k)
        return which, probabilities.gather(-1, which) + 0 * gates, share

    return chosen


def earlier(plan: Any) -> Any:
    """Bytes read one patch too early."""
    return lambda *a: (shifted := plan(*a))._replace(read_of=(shifted.read_of - 1).clamp(min=0))


DECODED = "megabyte"
"""The model of the faults in cached decoding; that of the others is not compared."""

LOCAL, GLOBAL = "local_transformer.layers.0", "global_transformer.layers"
ENCODER = "encoder.transformer.layers.0"
Fault = tuple[str, str, str, Callable[..., None]]
FAULTS: list[Fault] = [
    ("transposed kernel", "megabyte", f"{LOCAL}.attention.to_out",
     weight(f"{LOCAL}.attention.to_out.weight", lambda w: w.T)),
    ("dropped bias", "megabyte", f"{LOCAL}.feedforward.up",
     weight(f"{LOCAL}.feedforward.up.bias", torch.zeros_like)),
    ("swapped heads", "megabyte", f"{GLOBAL}.0.attention.to_q",
     weight(f"{GLOBAL}.0.attention.to_q.weight", halves)),
    ("swapped keys and values", "megabyte", f"{GLOBAL}.1.attention.to_kv",
     weight(f"{GLOBAL}.1.attention.to_kv.weight", halves)),
    ("embedding shifted by one id", "megabyte", "embed",
     weight("embed.weight", lambda w: w.roll(1, 0))),
    ("wrong eps", "megabyte", f"{LOCAL}.attention.norm",
     attribute(f"{LOCAL}.attention.norm", "eps", lambda eps: 1e-6)),
    ("tanh GELU", "megabyte", f"{GLOBAL}.1.feedforward", tanh_gelu),
    ("missing scale", "megabyte", f"{GLOBAL}.0.attention: multi_query_attention",
     function(attention, "multi_query_attention", lambda f: lambda q, *a: f(2 * q, *a))),
    ("ALiBi slope", "megabyte", f"{GLOBAL}.0.attention",
     function(attention, "alibi_bias", lambda f: lambda heads, n: f(heads, n) * 2)),
    ("shifted patch", "megabyte", "Megabyte",
     attribute("", "shift", lambda f: lambda ids, axis: f(ids.flatten(1), 1).reshape(ids.shape))),
    ("stale cache", "megabyte", f"{GLOBAL}.0.attention.extend",
     attribute(f"{GLOBAL}.0.attention", "extend", stale)),
    ("gradient of a norm", "megabyte", f"{GLOBAL}.1.feedforward.norm",
     attribute(f"{GLOBAL}.1.feedforward.norm", "forward", lambda f: lambda x: f(Scaled.apply(x)))),
    ("values detached", "megabyte", f"{LOCAL}.attention",
     attribute(f"{LOCAL}.attention", "_attend",
               lambda f: lambda q, k, v, mask: f(q, k, v.detach(), mask))),
    ("taps reversed", "lfbyte", "layers.0.token_mixing.convolution",
     weight("layers.0.token_mixing.convolution.taps", lambda w: w.flip(0))),
    ("experts in another order", "lfbyte", "layers.0.mixture.experts.sparse",
     weight("layers.0.mixture.experts.base.kernels", halves)),
    ("gates not renormalised", "lfbyte", "layers.0.mixture: choose_experts",
     function(experts, "choose_experts", no_renormalisation)),
    ("mean over one too many", "lfbyte", "layers.0: running_mean",
     function(lfbyte, "running_mean", lambda f: lambda *a: f(*a) * 0.5)),
    ("sine and cosine swapped", "lfbyte", "LFByteTransformer: sinusoidal_positions",
     function(lfbyte, "sinusoidal_positions", lambda f: lambda *a: f(*a).roll(1, -1))),
    ("gate and up swapped", "blt", "patcher.transformer.layers.0.feedforward.gate", swapped_gate),
    ("rotary pairs", "blt", "patcher.transformer.layers.0.attention: rotate",
     function(grouped_attention, "rotate", split_halves)),
    ("rotary base", "blt", "encoder.transformer: rotation",
     attribute("encoder.transformer", "theta", lambda theta: 1e4)),
    ("window off by one", "blt", f"{ENCODER}.attention: causal_attention",
     attribute(f"{ENCODER}.attention", "window", lambda window: window + 1)),
    ("hash prime", "blt", "BLT: ngram_rows",
     function(ngram, "HASH_PRIMES", lambda primes: primes[1:])),
    ("hash newest first", "blt", "BLT: ngram_rows",
     function(ngram, "polynomial_hash", lambda f: lambda grams, *a: f(grams.flip(-1), *a))),
    ("n-gram tables swapped", "blt", "encoder.ngrams", weight("encoder.ngrams.weight", halves)),
    ("wrong threshold", "blt", "BLT: boundary_after",
     function(patching, "boundary_after", lambda f: lambda c, r, p, e, s: f(c, r, p, e * 0.9, s))),
    ("read one patch early", "blt", "BLT: plan_patches",
     function(patching, "plan_patches", earlier)),
    ("pooled by the mean", "blt", "encoder.pool: segment_max",
     function(blt_local, "segment_max", lambda f: lambda x, *a: f(x / 2, *a))),
    ("input added once", "blt", "encoder.cross_attention.pool_cached",
     function(cross_attention.CrossAttention, "_add",
              lambda f: lambda self, x, mixed: f(self, x, mixed) - x)),
    ("spline knots", "blt", f"{ENCODER}.feedforward.spline: spline_activation",
     function(spline, "SPLINE_EDGE", lambda edge: edge + 0.01)),
    ("guide without beta", "blt", f"{GLOBAL}.0.attention: guide",
     function(grouped_attention, "guide", lambda f: lambda q, k, e, g, b: f(q, k, e, g, 0 * b))),
]  # fmt: skip


class Bench:
    """Exports of the models, and what JAX does with them, computed once."""

    def __init__(self, folder: Path):
        self.folder, self._record = folder, parity.record_jax
        self._jax: dict[str, parity.Recording] = {}
        (folder / "text").write_bytes("Fünf alte Löwen, 42 Zebras: 'ja'!\n".encode() * 4)
        source = np.random.default_rng(0)
        with jax.enable_x64(True):
            for name, config in MODELS.items():
                params = {
                    key: jnp.asarray(
                        0.4 * source.standard_normal(leaf.shape) + key.endswith("scale")
                    )
                    for key, leaf in abstract_params(config).items()
                }
                convert.export_model(config, params, folder / name)

    def run(self, name: str, plant: Callable[..., None] | None, *more: str) -> tuple[int, str]:
        """Exit code and last line of `bytelm parity` on a model, its twin under `plant`.

        `more` are further options, such as `--json`.
        """
        load = bytelm_torch.from_pretrained
        with contextlib.ExitStack() as patches, contextlib.redirect_stdout(io.StringIO()) as output:

            def faulty(path: Path) -> Any:
                twin = load(path)
                if plant is not None:
                    plant(twin, patches)
                return twin

            def remembered(*arguments: Any, **named: Any) -> Any:
                if name not in self._jax:
                    decode = name == DECODED
                    self._jax[name] = self._record(*arguments, decode=decode, **named)
                return self._jax[name]

            brief = partial(parity.record_torch, decode=name == DECODED)
            patches.enter_context(patch.object(bytelm_torch, "from_pretrained", faulty))
            patches.enter_context(patch.object(parity, "record_jax", remembered))
            patches.enter_context(patch.object(parity, "record_torch", brief))
            patches.enter_context(
                patch.object(parity, "ArrayStore", lambda: contextlib.nullcontext({}))
            )
            options = ["--data", str(self.folder / "text"), "--length", "19", *more]
            code = cli.main(["parity", str(self.folder / name), *options])
        return code, output.getvalue().splitlines()[-1]


def named(line: str) -> str:
    """The layer that a verdict blames."""
    return line.removeprefix("DIFFERENT from ").partition(" (first")[0].removesuffix(" on")
