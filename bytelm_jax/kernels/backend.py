"""The platform whose kernels are chosen: this machine's, or the one that a trace is meant for.

Some layers compute the same function differently on a GPU or a TPU. A program may be compiled for
devices that this machine does not have: whoever knows the devices says so (`compiling_for`). A CPU
can also answer what a program for such a machine would keep in memory, as long as nothing is
computed (`pretend_platform`).
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

import jax


@runtime_checkable
class Device(Protocol):
    """What is asked of a device: `jax.Device`, or one that a topology describes."""

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        ...


_pretended: ContextVar[str] = ContextVar("pretended", default="")
_target: ContextVar["Device | None"] = ContextVar("target", default=None)


def backend() -> str:
    """The platform that layers are traced for: "cpu", "gpu" or "tpu"."""
    device = _target.get()
    return _pretended.get() or (device.platform if device else jax.default_backend())


def target() -> Device:
    """One of the devices that layers are traced for."""
    return _target.get() or jax.local_devices()[0]


@contextlib.contextmanager
def compiling_for(device: Device) -> Iterator[None]:
    """Within this context programs are traced to be compiled for devices like this one."""
    before = _target.set(device)
    try:
        yield
    finally:
        _target.reset(before)


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
