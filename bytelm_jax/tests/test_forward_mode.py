"""Forward-mode differentiation, which Hessian-vector products need, against the backward pass."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bytelm import tolerances
from bytelm.config import BLTConfig, ModelConfig
from bytelm_jax.kernels.grouped_matmul import make_groups, mix, spread
from bytelm_jax.kernels.lookup import look_up
from bytelm_jax.layers.ngram import _lookup
from bytelm_jax.layers.resets import take_once
from bytelm_jax.layers.segments import segment_max, take_segments
from bytelm_jax.models import abstract_params, define_model
from parity_tests.tiny_models import CONFIGS

BLT = CONFIGS["blt"]
assert isinstance(BLT, BLTConfig)
MODELS: dict[str, ModelConfig] = {
    **CONFIGS,
    "resets": replace(CONFIGS["megabyte"], reset_on="newline"),
    "blt": replace(BLT, patcher="fixed", ngram_sizes=(3, 4)),
}
TEXT = b"one\ntwo, three\nfour five"


def inner(left: Any, right: Any) -> Any:
    return sum(jnp.vdot(left[name], right[name]) for name in left)


def loss_of(name: str) -> Callable[[Any], Any]:
    config = MODELS[name]
    bind, _ = define_model(config)
    ids = jnp.asarray(np.frombuffer(TEXT, np.uint8)[None].astype(np.int32) + config.vocab.offset)

    def loss(params: Any) -> Any:
        logs = jax.nn.log_softmax(bind(params)(ids))
        return -jnp.take_along_axis(logs, ids[..., None], axis=-1).mean()

    return loss


@pytest.mark.slow
def test_forward_mode_agrees_with_the_backward_pass(x64: None) -> None:
    loss, shapes = loss_of("resets"), abstract_params(MODELS["resets"])

    @jax.jit
    def both(params: Any, direction: Any) -> Any:
        gradient, product = jax.jvp(jax.grad(loss), (params,), (direction,))
        slope = lambda params: inner(jax.grad(loss)(params), direction)  # noqa: E731
        again = inner(jax.grad(slope)(params), direction)
        forward = jax.jvp(loss, (params,), (direction,))[1]
        return (forward, inner(gradient, direction)), (inner(product, direction), again)

    source = np.random.default_rng(0)
    params, direction = (
        {n: jnp.asarray(0.3 * source.standard_normal(p.shape)) for n, p in shapes.items()}
        for _ in range(2)
    )
    for forward, backward in both(params, direction):
        assert abs(forward - backward) <= tolerances.GRADIENTS["float64"] * abs(backward)
        assert backward != 0


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resets"])
def test_every_architecture_has_forward_mode(name: str) -> None:
    shapes = abstract_params(MODELS[name])
    product = lambda p, v: jax.jvp(jax.grad(loss_of(name)), (p,), (v,))  # noqa: E731
    jax.eval_shape(product, shapes, shapes)


def test_the_pieces_with_gradients_of_their_own(x64: None) -> None:
    source = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(source.standard_normal(shape))  # noqa: E731
    ids, rows = jnp.asarray([[2, 0, 2, 9]]), jnp.asarray([[[0, 3], [1, 1], [2, 7]]])
    index, inverse = jnp.asarray([[3, 0]]), jnp.asarray([[1, 2, 2, 0]])
    patch_of = jnp.asarray([[0, 0, 0, 1, 3]])
    chosen = jnp.asarray([[1, 0], [1, 2], [0, 1]])
    group = chosen.reshape(-1)
    pieces: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (lambda table: look_up(table, ids[:, :3]), (normal(4, 3),)),
        (lambda table: _lookup(table, rows, table.dtype), (normal(5, 3),)),
        (lambda x: take_once(x, index, inverse), (normal(1, 4, 3),)),
        (lambda x: take_segments(x, patch_of), (normal(1, 3, 2),)),
        (lambda x: segment_max(x, patch_of, 3), (normal(1, 5, 2),)),
    ]
    for block in (0, 2):
        groups = make_groups(group, 3, block)
        x = spread(normal(3, 2), 2, groups)
        pieces.append((lambda x, g=groups: spread(x, 2, g)[g.slot], (normal(3, 2),)))
        pieces.append(
            (
                lambda x, bias, gates, g=groups: mix(x, bias, gates, chosen, g),
                (x, normal(3, 2), normal(3, 2)),
            )
        )
    for function, arguments in pieces:
        check_grads(jax.jit(function), arguments, order=1)
