"""Attention within patches in blocks, as on a TPU, is attention within patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm import tolerances
from bytelm.positions import alibi_bias
from bytelm_jax.kernels.backend import pretend_platform
from bytelm_jax.kernels.partitioned import is_partitioned
from bytelm_jax.kernels.patch_attention import patch_attention, suits
from bytelm_jax.layers.attention import multi_query_attention
from bytelm_jax.parity.report import relative_error
from bytelm_jax.training import mesh as meshes

MASK = np.tri(8, dtype=bool)


def inputs(seed, dtype, batch=2, patches=32):
    keys = jax.random.split(jax.random.key(seed), 4)
    lead = (batch, patches, 8)
    shapes = [(*lead, 3, 4), (*lead, 4), (*lead, 4), (*lead, 3, 4)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("biased", [False, True])
def test_it_is_attention_within_patches(x64, biased):
    q, k, v, gradient = inputs(0, jnp.float64)
    bias = alibi_bias(3, 8) if biased else None
    found = []
    for attend in (multi_query_attention, patch_attention):
        out, pull = jax.vjp(lambda q, k, v, f=attend: f(q, k, v, MASK, bias), q, k, v)
        found.append([np.asarray(x) for x in (out, *pull(gradient))])
    for name, ours, theirs in zip(("out", "q", "k", "v"), *found, strict=True):
        bound = tolerances.LOGITS if name == "out" else tolerances.GRADIENTS
        assert relative_error(theirs, ours) <= bound["float64"], name


def test_another_patch_and_the_future_change_nothing():
    q, k, v, _ = inputs(1, jnp.float32)
    before = patch_attention(q, k, v, MASK)
    after = patch_attention(q, k.at[:, 5].add(3.0), v.at[:, 5].add(3.0), MASK)
    others = np.arange(32) != 5
    np.testing.assert_array_equal(before[:, others], after[:, others])
    assert not np.array_equal(before[:, 5], after[:, 5])
    later = patch_attention(q, k.at[:, :, 6:].add(3.0), v.at[:, :, 6:].add(3.0), MASK)
    np.testing.assert_array_equal(before[:, :, :6], later[:, :, :6])


def test_it_is_for_a_tpu_and_for_patches_that_fill_blocks():
    q, *_ = inputs(2, jnp.bfloat16)
    assert not suits(q, MASK)
    with pretend_platform("tpu"):
        assert suits(q, MASK)
        assert not suits(q.astype(jnp.float32), MASK)
        assert not suits(q[:, :31], MASK) and not suits(q[0], MASK)
        assert not suits(q, np.broadcast_to(MASK, (2, 8, 8)))
        with meshes.layers_on(meshes.make_mesh(2, tensor=2)):
            assert is_partitioned() and not suits(q, MASK)
