"""The platform whose kernels are chosen: this machine's, or one that a trace pretends to be for.

Some layers compute the same in another way on a GPU or a TPU. What a program for such a machine
would keep in memory can be asked of a CPU as well, as long as nothing is computed.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_pretended: ContextVar[str] = ContextVar("pretended", default="")


def backend() -> str:
    """The kind of machine that layers should suit: "cpu", "gpu" or "tpu"."""
    return _pretended.get() or jax.default_backend()


@contextlib.contextmanager
def pretend_platform(name: str) -> Iterator[None]:
    """Within, whatever is traced is traced for the machine `name`. For shapes alone: not to run."""
    before = _pretended.set(name)
    try:
        yield
    finally:
        _pretended.reset(before)


def is_pretended() -> bool:
    """Whether kernels of another machine are traced, which JAX may refuse to do here."""
    return bool(_pretended.get())


def platform_of(chip: str) -> str:
    """The platform of an accelerator, "gpu" or "tpu", by its name ("H100", "TPU v4") or kind."""
    return "tpu" if chip.lower().startswith("tpu") else "gpu"


def has_preallocation(device: jax.Device) -> bool:
    """Whether JAX takes a fixed share of the device's memory at its start, as it does on a GPU."""
    return device.platform == "gpu"


def simulate_devices(count: int) -> bool:
    """Gives this process `count` simulated CPU devices, before anything else is done with JAX.

    False where JAX was used before and does not have as many.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        return jax.default_backend() == "cpu" and len(jax.devices()) >= count
    return True
