"""No rows, and rows of no bytes: logits, loss and gradient of every architecture."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bytelm.config import ModelConfig
from bytelm_jax.models import define_model
from bytelm_jax.parity.twins import make_twin
from bytelm_torch.training.loss import cross_entropy
from parity_tests.cases import quick
from parity_tests.tiny_models import CONFIGS

SHAPES = ((0, 0), (0, 5), (2, 0))
MODELS: dict[str, ModelConfig] = {
    **CONFIGS,
    "resets": replace(CONFIGS["megabyte"], reset_on="newline"),
    "histogram": replace(CONFIGS["blt"], patcher="histogram", threshold=9.0),
}


@pytest.mark.parametrize("name", quick(MODELS, "blt", "lfbyte", "megabyte"))
def test_nothing_gives_nothing(name: str) -> None:
    config = MODELS[name]
    bind, init = define_model(config)
    params = jax.jit(init, static_argnums=0)(0)
    twin: Any = make_twin(config, params).train()

    def loss(params: Any, ids: Any) -> Any:
        output = bind(params).outputs(ids)
        return output.logits.sum() + output.extra_loss.sum(), output

    for shape in SHAPES:
        ids = np.full(shape, 97, np.int32)
        # Traced alone, which is where it failed, and costs no compilation.
        _, output = jax.eval_shape(jax.grad(loss, has_aux=True), params, jnp.asarray(ids))
        theirs = twin.outputs(torch.from_numpy(ids))
        for logits in (output.logits, theirs.logits.detach().numpy()):
            assert logits.shape == (*shape, config.vocab.size) and logits.dtype == np.float32
        assert output.metrics.keys() == theirs.metrics.keys()
        for metrics in (output.metrics, theirs.metrics):
            assert all(value.shape == shape[:1] for value in metrics.values())
        nats, count = cross_entropy(theirs.logits, torch.from_numpy(ids), config.vocab.pad_id)
        assert float(nats.detach()) == int(count) == 0
        (nats + theirs.extra_loss.sum()).backward()
        assert not any(p.grad is not None and p.grad.any() for p in twin.parameters())
