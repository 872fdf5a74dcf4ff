"""The platform whose kernels are chosen: this machine's, or the one that a trace is meant for.

Some layers compute the same function differently on a GPU or a TPU. A CPU can also answer what a
program for such a machine would keep in memory, as long as nothing is computed.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_pretended: ContextVar[str] = ContextVar("pretended", default="")


def backend() -> str:
    """The platform that layers are traced for: "cpu", "gpu" or "tpu"."""
    return _pretended.get() or jax.default_backend()


@contextlib.contextmanager
def pretend_platform(name: str) -> Iterator[None]:
    """Within this context everything is traced for platform `name`; for shapes only, not to run."""
    before = _pretended.set(name)
    try:
        yield
    finally:
        _pretended.reset(before)


def is_pretended() -> bool:
    """Whether kernels of another machine are being traced, which JAX may refuse on this one."""
    return bool(_pretended.get())


def platform_of(chip: str) -> str:
    """The platform, "gpu" or "tpu", of an accelerator by its name or kind ("H100", "TPU v4")."""
    return "tpu" if chip.lower().startswith("tpu") else "gpu"


def has_preallocation(device: jax.Device) -> bool:
    """Whether JAX reserves a fixed share of the device's memory when it starts, as on a GPU."""
    return device.platform == "gpu"


def simulate_devices(count: int) -> bool:
    """Gives this process `count` simulated CPU devices; must precede any other use of JAX.

    Returns False if JAX was used before and has fewer devices.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        return jax.default_backend() == "cpu" and len(jax.devices()) >= count
    return True
