"""For measurements only: which forms are on, by BYTELM_OFF and BYTELM_ON (names with commas)."""

import os

_OFF = set(os.environ.get("BYTELM_OFF", "").split(","))
_ON = set(os.environ.get("BYTELM_ON", "").split(","))
_EVERYWHERE = "everywhere" in _ON


def on(name: str) -> bool:
    return name not in _OFF


def extra(name: str) -> bool:
    return name in _ON


def gpu() -> bool:
    import jax

    return _EVERYWHERE or jax.default_backend() == "gpu"
