"""Adaptive linears against literal matrices; contexts; experts: sparse against dense, routing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm import tolerances
from bytelm_jax.kernels.adaptation import adapted_product
from bytelm_jax.layers.adaptive import AdaptiveLinear, extend_running_mean, running_mean
from bytelm_jax.layers.experts import AdaptiveExperts, MixtureOfExperts, choose_experts
from bytelm_jax.parity.report import relative_error

INPUTS, OUTPUTS, ADAPT, EXPERTS = 6, 5, 4, 4


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def randomised(module, dtype="float64"):
    """The module with random parameters, zeros included, so that none of them can hide."""
    graphdef, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    leaves = [jnp.asarray(normal(*x.shape, seed=i), dtype) for i, x in enumerate(leaves)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def literal_matrix(layer, a):
    """W + ΔW(a), [I, O], for one adaptation vector."""
    base, adapt = layer.base.kernel[...], layer.adapt
    middle = a @ adapt.kernel[...] + adapt.bias[...]
    if layer.rank:
        return base + layer.down.kernel[...] @ jnp.diag(middle) @ layer.up.kernel[...]
    return base + middle.reshape(OUTPUTS, INPUTS).T


@pytest.mark.parametrize("rank", [0, 3])
def test_adaptive_linear_is_what_its_matrices_say(rank, x64):
    layer = randomised(AdaptiveLinear(INPUTS, OUTPUTS, ADAPT, rank, 0.02, rngs=nnx.Rngs(0)))
    x, a = normal(2, 3, INPUTS), normal(2, 3, ADAPT, seed=1)
    expected = np.stack(
        [
            [x[b, t] @ literal_matrix(layer, a[b, t]) + layer.base.bias[...] for t in range(3)]
            for b in range(2)
        ]
    )
    call = jax.jit(lambda x, a: layer(x, a))
    assert relative_error(np.asarray(call(x, a)), expected) <= tolerances.LOGITS["float64"]
    # One vector for the row is the same vector at each position.
    shared = np.broadcast_to(a[:, :1], a.shape)
    error = relative_error(np.asarray(call(x, a[:, :1])), np.asarray(call(x, shared)))
    assert error <= tolerances.LOGITS["float64"]


@pytest.mark.parametrize("rank", [0, 3])
def test_adaptive_linear_starts_as_a_plain_one(rank):
    layer = AdaptiveLinear(INPUTS, OUTPUTS, ADAPT, rank, 0.02, rngs=nnx.Rngs(0))
    x, a = jnp.asarray(normal(1, 3, INPUTS), "float32"), jnp.ones((1, 3, ADAPT))
    np.testing.assert_array_equal(layer(x, a), layer.base(x))


def test_full_form_never_holds_a_matrix_for_each_position():
    dim, length = 32, 256
    layer = AdaptiveLinear(dim, dim, ADAPT, 0, 0.02, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    x, a = jnp.ones((1, length, dim)), jnp.ones((1, length, ADAPT))

    def total(params, x, a):
        return jnp.square(nnx.merge(graphdef, params)(x, a)).sum()

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(params, x, a).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < length * dim * dim * 4


def test_running_mean_by_position_and_in_bfloat16(x64):
    x = normal(2, 9, 3)
    expected = np.stack([x[:, : t + 1].mean(axis=1) for t in range(9)], axis=1)
    actual = np.asarray(jax.jit(running_mean)(x))
    assert relative_error(actual, expected) <= tolerances.LOGITS["float64"]
    sums = np.full((2, 10, 3), 1e9)  # what was never written must not count
    sums[:, 0] = 0
    extend = jax.jit(extend_running_mean)
    first, sums = extend(x[:, :4], sums, jnp.zeros(2, jnp.int32))
    rest = []
    for t in range(4, 9):
        mean, sums = extend(x[:, t : t + 1], sums, jnp.full(2, t, jnp.int32))
        rest.append(mean)
    actual = np.concatenate([first, *rest], axis=1)
    assert relative_error(actual, expected) <= tolerances.LOGITS["float64"]
    # A bfloat16 sum of ones stalls at 256, and the mean would fall.
    ones = jnp.ones((1, 2000, 1), jnp.bfloat16)
    assert (running_mean(ones) == 1).all() and running_mean(ones).dtype == jnp.bfloat16


@pytest.mark.parametrize("length", [1, 64, 150])
def test_running_mean_by_products_where_matrices_are_fast(length, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, weights = (normal(2, length, 3, seed=seed).astype(jnp.bfloat16) for seed in (0, 1))
    call = jax.jit(lambda x: running_mean(x))
    assert "dot_general" in str(jax.make_jaxpr(call)(x))
    actual, pull = jax.vjp(call, x)
    counts = np.arange(1, length + 1)[None, :, None]
    expected = np.cumsum(x.astype("float64"), axis=1) / counts
    shares = (weights.astype("float64") / counts)[:, ::-1]
    reversed_sums = np.cumsum(shares, axis=1)[:, ::-1]
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert actual.dtype == jnp.bfloat16
    assert relative_error(np.asarray(actual, "float64"), expected) <= eps / 2
    # What is summed is rounded, too.
    assert relative_error(np.asarray(pull(weights)[0], "float64"), reversed_sums) <= eps
    for position in {0, length // 2, length - 1}:
        changed = x.copy()
        changed[:, position:] = 100 * x[::-1, position:]
        after = call(changed)
        np.testing.assert_array_equal(after[:, :position], actual[:, :position])
        assert (after[:, position] != actual[:, position]).all()


CHOICES = {
    "spread": [[0, 1], [3, 2], [1, 3], [2, 0], [0, 3]],
    "all on one pair": [[2, 1]] * 5,
    "one expert idle": [[0, 3], [3, 0], [0, 1], [1, 0], [3, 1]],
}


@pytest.mark.parametrize(("rank", "machine"), [(0, "cpu"), (3, "cpu"), (3, "gpu")])
def test_sparse_dispatch_is_the_dense_sum_with_the_same_gates(rank, machine, x64, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: machine)
    experts = randomised(AdaptiveExperts(EXPERTS, INPUTS, ADAPT, rank, 0.02, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(experts)
    weights = normal(5, INPUTS, seed=3)

    def sparse(params, x, a, gates, chosen):
        y = nnx.merge(graphdef, params).sparse(x, a, chosen, gates)
        return (weights * y).sum(), y

    def dense(params, x, a, gates, chosen):
        full = jnp.zeros((5, EXPERTS)).at[jnp.arange(5)[:, None], chosen].set(gates)
        y = nnx.merge(graphdef, params).dense(x[None], a[None], full[None])[0]
        return (weights * y).sum(), y

    fast = {"xla_backend_optimization_level": 0}  # compiling takes the time, running none
    forms = [
        jax.jit(jax.value_and_grad(form, (0, 1, 2, 3), has_aux=True), compiler_options=fast)
        for form in (sparse, dense)
    ]
    gates = np.random.default_rng(2).dirichlet(np.ones(2), 5)
    for choice in CHOICES.values():
        values = (params, normal(5, INPUTS), normal(5, ADAPT, seed=1), gates, np.array(choice))
        results = [form(*values) for form in forms]
        ((_, ours), our_gradients), ((_, theirs), their_gradients) = results
        assert relative_error(np.asarray(ours), np.asarray(theirs)) <= tolerances.LOGITS["float64"]
        pairs = zip(jax.tree.leaves(our_gradients), jax.tree.leaves(their_gradients), strict=True)
        for one, other in pairs:
            error = relative_error(np.asarray(one), np.asarray(other))
            assert error <= tolerances.GRADIENTS["float64"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_position_does_not_depend_on_where_others_are_sent(dtype):
    module = AdaptiveExperts(EXPERTS, INPUTS, ADAPT, 3, 0.02, rngs=nnx.Rngs(0))
    experts, source = randomised(module, dtype), np.random.default_rng(0)
    run = jax.jit(experts.sparse)
    x, a = (normal(33, width).astype(jnp.dtype(dtype)) for width in (INPUTS, ADAPT))
    gates = np.full((33, 2), 0.5, "float32")
    bound = tolerances.BF16_LINEAR if dtype == "bfloat16" else tolerances.OTHER_PLACE[dtype]
    before = chosen = None
    for _ in range(20):
        others = source.standard_normal(x.shape).astype(x.dtype)
        others[7] = x[7]
        if before is not None:  # others have other values, and nothing moves
            np.testing.assert_array_equal(run(others, a, chosen, gates)[7], before)
        # Others go elsewhere, so it stands at other places of groups of other sizes.
        chosen = source.permuted(np.tile(np.arange(EXPERTS), (33, 1)), axis=1)[:, :2]
        chosen[7] = [3, 1]
        after = np.asarray(run(others, a, chosen, gates))[7]
        assert before is None or relative_error(after, before) <= bound
        before = after


@pytest.mark.parametrize(
    ("rows", "outputs", "merged"), [(99, 7, True), (99, 4, True), (8, 7, False)]
)
def test_both_products_of_an_adaptive_linear_as_one(rows, outputs, merged, x64, monkeypatch):
    """What a GPU computes where there are many rows: the wide product has one narrow one in it."""
    shapes = (rows, 6), (rows, 3), (6, outputs), (6, 3), (3, outputs)
    arrays = [jnp.asarray(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
    weights = normal(rows, outputs, seed=9)
    results = []
    for machine, expected in (("gpu", merged), ("cpu", False)):
        monkeypatch.setattr(jax, "default_backend", lambda machine=machine: machine)

        def weighed(x, scale, base, down, up):
            return (weights * adapted_product(x, scale, base, down, up, jnp.matmul)).sum()

        assert ("concatenate" in str(jax.make_jaxpr(weighed)(*arrays))) == expected
        results.append(jax.value_and_grad(weighed, range(5))(*arrays))
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        assert relative_error(np.asarray(ours), np.asarray(theirs)) <= tolerances.LOGITS["float64"]


def test_the_best_experts_are_those_of_a_sort_ties_included():
    levels = np.random.default_rng(0).integers(0, 4, (1, 200, 7)) / 4  # zeros, too
    probabilities = jnp.asarray(levels, "float32")
    for count in (1, 2, 6):
        chosen, _, _ = choose_experts(probabilities, count)
        np.testing.assert_array_equal(chosen, jax.lax.top_k(probabilities, count)[1])


def test_choice_gates_and_load_by_hand():
    probabilities = jnp.array([[[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]])
    chosen, gates, share = choose_experts(probabilities, 2)
    np.testing.assert_array_equal(chosen, [[[1, 3], [0, 1]]])  # equal gates by number
    expected = np.array([[[0.4, 0.3], [0.35, 0.35]]]) / 0.7
    assert relative_error(np.asarray(gates), expected) <= tolerances.LOGITS["float32"]
    np.testing.assert_array_equal(share, [[[0, 0.5, 0, 0.5], [0.5, 0.5, 0, 0]]])


def test_balance_loss_and_float32_gates():
    mixture = MixtureOfExperts(INPUTS, EXPERTS, 2, ADAPT, 3, True, 0.02, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(mixture)
    x, a = (normal(3, 8, width, seed=width).astype("float32") for width in (INPUTS, ADAPT))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def balance(params, x, a):
        _, routing = nnx.merge(graphdef, params)(x, a)
        return routing.balance.sum(), routing

    (_, routing), gradients = balance(params, x, a)
    gate = np.asarray(mixture.probabilities(jnp.asarray(a), 8))
    order = np.argsort(-gate, axis=-1)[..., :2]
    load = (order[..., None] == np.arange(EXPERTS)).sum(axis=(1, 2)) / 16
    expected = EXPERTS * (load * gate.mean(axis=1)).sum(axis=-1)
    assert relative_error(np.asarray(routing.load), load) == 0
    assert relative_error(np.asarray(routing.balance), expected) <= tolerances.LOGITS["float32"]
    # A row's loss is its own, so that devices average it exactly.
    (_, swapped), _ = balance(params, x[::-1], a[::-1])
    error = relative_error(np.asarray(swapped.balance)[::-1], np.asarray(routing.balance))
    assert error <= tolerances.OTHER_PLACE["float32"]
    # It pulls at the gate alone.
    assert np.any(gradients["gate"]["kernel"][...])
    assert not np.any(gradients["experts"]["base"]["kernels"][...])

    (_, routing), _ = balance(jax.tree.map(np.zeros_like, params), x, a)
    np.testing.assert_array_equal(routing.balance, 1)
    assert mixture.probabilities(jnp.asarray(a, "bfloat16"), 8).dtype == jnp.float32
