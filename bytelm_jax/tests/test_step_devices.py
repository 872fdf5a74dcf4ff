"""The questions of a step about its machine go to the devices of its mesh, not to this process."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from bytelm.config import TrainConfig
from bytelm_jax.kernels.attention import has_fused_attention
from bytelm_jax.kernels.backend import backend, compiling_for, pretend_platform, target
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps


class _Device(NamedTuple):
    platform: str
    compute_capability: str


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu"])
def test_auto_is_what_suits_the_devices_of_the_mesh(platform, monkeypatch):
    monkeypatch.setattr(steps, "platform_of", lambda mesh: platform)
    expected = "float32" if platform == "cpu" else "bfloat16"
    assert steps.compute_dtype(TrainConfig(), meshes.make_mesh(1)) == jnp.dtype(expected)
    assert steps.compute_dtype(TrainConfig()) == jnp.float32  # of this machine


def test_layers_are_traced_for_the_device_compiled_for():
    device = _Device("gpu", "9.0")
    with compiling_for(device):
        assert backend() == "gpu" and target() is device and has_fused_attention()
        with pretend_platform("tpu"):
            assert backend() == "tpu"
    assert backend() == "cpu" and target() == jax.local_devices()[0]
    with compiling_for(_Device("gpu", "7.5")):
        assert not has_fused_attention()


def test_the_model_in_a_step_is_traced_for_the_devices_of_the_mesh(monkeypatch):
    """A machine whose default platform is another one changes nothing."""
    seen = []

    class Model:
        def outputs(self, ids, keys, remat):
            seen.append(backend())
            raise ZeroDivisionError

    mesh, run = meshes.make_mesh(2), TrainConfig(batch_size=2)
    optimizer = optax.with_extra_args_support(optax.sgd(1.0))
    step = steps.make_train_step(lambda params: Model(), optimizer, run, 0, mesh)
    state = steps.abstract_init(mesh, optimizer, {"layer.w": jax.ShapeDtypeStruct((2,), "float32")})
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ZeroDivisionError):
        jax.eval_shape(step, state, jax.ShapeDtypeStruct((2, 4), jnp.int32))
    assert seen == ["cpu"]
