"""Exports of random bits, for the tests of conversion and of damaged files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.config import MegabyteConfig
from bytelm_jax.interop import convert
from bytelm_jax.models import abstract_params as trace_params

CONFIGS = {
    variant: MegabyteConfig(
        variant=variant,
        patch_size=2,
        global_dim=4,
        local_dim=8,
        max_length=8,
        global_layers=2,
        global_heads=3,
        local_layers=1,
        local_heads=2,
    )
    for variant in ("paper", "in_action")
}


PAPER = CONFIGS["paper"]


abstract_params = functools.cache(trace_params)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are the same every time, and tracing a model costs more than all the rest here."""
    monkeypatch.setattr(convert, "abstract_params", abstract_params)


def any_bits(
    config: MegabyteConfig, dtype: Any, seed: int = 0, finite: bool = True
) -> dict[str, Any]:
    """Parameters of random bits, subnormals and −0.0 among them.

    NaN payloads and infinities, too, where they need not be `finite`.
    """
    source = np.random.default_rng(seed)
    dtype, params = np.dtype(dtype), {}
    unsigned = np.dtype(f"u{dtype.itemsize}")
    infinity = np.array(np.inf, dtype).view(unsigned)
    for name, leaf in abstract_params(config).items():
        bits = np.frombuffer(source.bytes(leaf.size * dtype.itemsize), unsigned).copy()
        if finite:
            bits[(bits & infinity) == infinity] ^= infinity  # subnormals
        params[name] = bits.view(dtype).reshape(leaf.shape)
    first = params["to_logits.kernel"].reshape(-1).view(unsigned)
    top = 8 * dtype.itemsize - 1
    first[:3] = [1 << top, 1, (1 << top) + 3]  # −0.0, two subnormals
    if not finite:
        first[3] = int(infinity) + 5  # a signalling NaN with a payload
    return {name: jnp.array(value) for name, value in params.items()}


def bits(params: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What two sets of parameters must share to be the same bit for bit."""
    return {
        name: (value.dtype.name, value.shape, np.asarray(value).tobytes())
        for name, value in params.items()
    }


def tensors(config: MegabyteConfig = PAPER) -> dict[str, np.ndarray]:
    return convert.to_torch(any_bits(config, np.float32))


def message(call: Callable[..., Any], *arguments: Any) -> str:
    """The one line of the `ValueError` that the call must raise."""
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text and "\n" not in text, text
    return text


def export(folder: Path, seed: int = 0, config: MegabyteConfig = PAPER) -> Path:
    convert.export_model(config, any_bits(config, np.float32, seed), folder, {"step": seed})
    return folder
