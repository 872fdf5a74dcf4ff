"""Products by group: blocks equal the ragged form and the loop over rows, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm_jax.grouped_product import (
    block_length,
    from_slots,
    grouped_product,
    make_groups,
    to_slots,
)
from bytelm_jax.parity import GRADIENTS, LOGITS, relative_error

GROUPS, INPUTS, OUTPUTS = 5, 6, 4
SPREADS = {
    "even": [0, 1, 2, 3, 4] * 5,
    "one group has all": [3] * 19,
    "groups without rows": [4, 0, 0, 4, 4, 0, 4, 0, 0],
    "one row": [2],
    "whole blocks": [0] * 8 + [1] * 4 + [4] * 4,
}


def relative(ours, theirs):
    return relative_error(np.asarray(ours), np.asarray(theirs))


def arrays(rows):
    source = np.random.default_rng(0)
    return (
        jnp.asarray(source.normal(size=(rows, INPUTS))),
        jnp.asarray(source.normal(size=(GROUPS, INPUTS, OUTPUTS))),
    )


def multiply(x, kernels, group, block):
    groups = make_groups(group, GROUPS, block)
    return from_slots(grouped_product(to_slots(x, groups), kernels, groups), groups)


@pytest.mark.parametrize("block", [0, 1, 4, 8])
@pytest.mark.parametrize("spread", SPREADS)
def test_every_form_is_the_loop_over_rows(spread, block, x64):
    group = jnp.asarray(SPREADS[spread])
    x, kernels = arrays(len(group))
    literal = lambda x, kernels: jnp.einsum("mi,mio->mo", x, kernels[group])  # noqa: E731

    def measured(form):
        return lambda x, kernels: jnp.square(form(x, kernels)).sum()

    found = multiply(x, kernels, group, block)
    assert relative(found, literal(x, kernels)) <= LOGITS["float64"]
    ours = jax.grad(measured(lambda *a: multiply(*a, group, block)), argnums=(0, 1))(x, kernels)
    theirs = jax.grad(measured(literal), argnums=(0, 1))(x, kernels)
    for mine, other in zip(ours, theirs, strict=True):
        assert relative(mine, other) <= GRADIENTS["float64"]


def test_slots_hold_every_row_once_in_blocks_of_one_group():
    group = jnp.asarray(np.random.default_rng(1).integers(0, GROUPS, 50))
    groups = make_groups(group, GROUPS, 8)
    assert sorted(groups.row[groups.filled].tolist()) == list(range(50))
    assert jnp.array_equal(groups.group[groups.slot], group)
    assert jnp.array_equal(groups.row[groups.slot], jnp.arange(50))
    assert (groups.group.reshape(-1, 8) == groups.group[::8, None]).all()


def test_blocks_are_one_row_where_rows_are_few_and_grow_to_the_limit():
    assert [block_length(rows, 48) for rows in (2, 48, 96, 65_536, 1 << 20)] == [1, 1, 8, 256, 512]
