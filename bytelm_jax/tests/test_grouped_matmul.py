"""Products by group: blocks equal the ragged form and the loop over rows, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm_jax.kernels.grouped_matmul import (
    block_length,
    grouped_bias,
    grouped_matmul,
    make_groups,
    mix,
    spread,
)
from bytelm_jax.parity.report import GRADIENTS, LOGITS, relative_error

GROUPS, INPUTS, OUTPUTS = 5, 6, 4
SPREADS = {
    "even": [0, 1, 2, 3, 4] * 5,
    "one group has all": [3] * 19,
    "groups without rows": [4, 0, 0, 4, 4, 0, 4, 0, 0],
    "one row": [2],
    "whole blocks, in pairs": [0] * 8 + [1] * 4 + [4] * 4,
    "pairs": [0, 1, 4, 3, 2, 0] * 4,
}


def relative(ours, theirs):
    return relative_error(np.asarray(ours), np.asarray(theirs))


def arrays(rows, copies):
    """x, kernels, biases and gates."""
    source = np.random.default_rng(0)
    shapes = (rows, INPUTS), (GROUPS, INPUTS, OUTPUTS), (GROUPS, OUTPUTS), (rows, copies)
    return tuple(jnp.asarray(source.normal(size=shape)) for shape in shapes)


def multiply(x, kernels, biases, gates, chosen, block):
    groups = make_groups(chosen.reshape(-1), GROUPS, block)
    out = grouped_matmul(spread(x, chosen.shape[1], groups), kernels, groups)
    # The bias twice: in the slots, and where they are mixed.
    return mix(out + grouped_bias(biases, groups), biases, gates, chosen, groups)


def literal(x, kernels, biases, gates, chosen):
    out = jnp.einsum("ni,nkio->nko", x, kernels[chosen]) + 2 * biases[chosen]
    return (gates[..., None] * out).sum(axis=1)


def measured(form):
    """The gradients of the squares' sum and the product itself, of one compiled program."""

    def loss(values, chosen, *block):
        out = form(*values, chosen, *block)
        return jnp.square(out).sum(), out

    # The numbers of the blocks are static, and rows of one spread are compared in one program.
    return jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)


MULTIPLY, LITERAL = measured(multiply), measured(literal)


@pytest.mark.parametrize("block", [0, 1, 4, 8])
@pytest.mark.parametrize("name", SPREADS)
def test_every_form_is_the_loop_over_rows(name, block, x64):
    chosen = jnp.asarray(SPREADS[name]).reshape(-1, 2 if "pairs" in name else 1)
    values = arrays(*chosen.shape)
    ours, actual = MULTIPLY(values, chosen, block)
    theirs, expected = LITERAL(values, chosen)
    assert relative(actual, expected) <= LOGITS["float64"]
    for one, other in zip(ours, theirs, strict=True):
        assert relative(one, other) <= GRADIENTS["float64"]


def test_slots_hold_every_row_once_in_blocks_of_one_group():
    group = jnp.asarray(np.random.default_rng(1).integers(0, GROUPS, 50))
    groups = make_groups(group, GROUPS, 8)
    assert sorted(groups.row[groups.filled].tolist()) == list(range(50))
    assert jnp.array_equal(groups.group[groups.slot], group)
    assert jnp.array_equal(groups.row[groups.slot], jnp.arange(50))
    assert (groups.group.reshape(-1, 8) == groups.group[::8, None]).all()


def test_blocks_are_one_row_where_rows_are_few_and_grow_to_the_limit():
    assert [block_length(rows, 48) for rows in (2, 48, 96, 65_536, 1 << 20)] == [1, 1, 8, 256, 512]
