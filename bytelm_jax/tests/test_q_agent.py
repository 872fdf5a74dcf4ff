"""The Q-learning agent: what it learns, what it leaves alone, and what keeps it safe."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bytelm.config.q_learning import QLearningConfig
from bytelm.q_table import (
    EDGES,
    HELD,
    LEARNING_RATE_ACTIONS,
    MOMENTUM_ACTIONS,
    TRUST_START,
    cells,
    log_memory,
)
from bytelm.tolerances import AFTER_200_STEPS
from bytelm_jax.optimizers import q_agent
from bytelm_jax.optimizers.q_agent import init_agent, step_agent
from bytelm_jax.optimizers.q_learning import q_learning_metrics, q_learning_sgd

EVERY_STEP = QLearningConfig(interval=1)
STEPS = 3000


@functools.cache
def tracer(config):
    """Compiled: loss and gradient norm of STEPS steps → the agent after each, and at the end."""

    def step(agent, signal):
        loss, norm = signal
        agent, finite = step_agent(agent, loss, norm, config, steers_momentum=True)
        small = agent._replace(q_learning_rate=(), q_momentum=(), norms=())
        return agent, (small, finite)

    return jax.jit(lambda agent, signals: jax.lax.scan(step, agent, signals))


def traced(losses, norms, config=EVERY_STEP, seed=0):
    agent = init_agent(config, 0.9, seed, jnp.float32)
    signals = jnp.asarray(losses, jnp.float32), jnp.asarray(norms, jnp.float32)
    return jax.tree.map(np.asarray, tracer(config)(agent, signals))


def noisy_run(seed=0):
    """A loss that falls to half with 1 % of noise, and gradient norms that scatter."""
    source = np.random.default_rng(seed)
    losses = (1 + np.exp(-np.arange(STEPS) / 500)) * (1 + 0.01 * source.standard_normal(STEPS))
    return losses, source.lognormal(0, 0.2, STEPS)


# ---- table and configuration ------------------------------------------------------------------


def test_the_table_has_the_specified_shape():
    agent = init_agent(EVERY_STEP, 0.9, 0, jnp.float32)
    assert (agent.q_learning_rate.shape, agent.q_momentum.shape) == ((2058, 9), (2058, 7))
    assert agent.q_learning_rate.dtype == agent.q_momentum.dtype == jnp.float32
    for actions in (*LEARNING_RATE_ACTIONS.values(), MOMENTUM_ACTIONS):
        assert sorted(actions) == sorted(-action for action in actions)
        assert list(map(abs, actions)) == sorted(map(abs, actions))


def test_every_cell_is_reached_by_its_own_bins():
    between = [[e - 0.01 for e in edges] + [edges[-1] + 0.01] for edges in EDGES["trend"]]
    grid = np.stack(np.meshgrid(*between, indexing="ij"), -1).reshape(-1, 4)

    def cell(row):
        agent = init_agent(EVERY_STEP, 0.9, 0, jnp.float32)
        agent = agent._replace(position=row[:2], trend=row[2], stability=row[3])
        return q_agent._cell(agent, EVERY_STEP)

    found = jax.jit(jax.vmap(cell))(jnp.asarray(grid, jnp.float32))
    np.testing.assert_array_equal(found, np.arange(cells(EVERY_STEP)))


def test_no_start_and_no_bound_lies_on_an_edge():
    config = QLearningConfig()
    scales = [0.0, math.log(config.min_scale), math.log(config.max_scale)]
    momenta = [log_memory(x) for x in (0.9, config.min_momentum, config.max_momentum)]
    for values, edges in zip((scales, momenta), EDGES["trend"][:2], strict=True):
        assert min(abs(value - edge) for value in values for edge in edges) > 0.1


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("interval", 0, "at least 1"),
        ("memory", 0, "at least 1"),
        ("alpha", 0.0, "above 0 and at most 1"),
        ("epsilon", 1.5, "between 0 and 1"),
        ("gamma", 1.0, "below 1"),
        ("indifference", -0.1, "at least 0"),
        ("min_scale", 1.1, "above 0 and at most 1"),
        ("max_scale", 0.9, "at least 1"),
        ("surge", 0.9, "above 1, or 0 for never"),
        ("max_momentum", 1.0, "below 1"),
        ("min_momentum", 0.999, "at most max_momentum=0.995"),
    ],
)
def test_bad_configurations_are_named(field, value, hint):
    with pytest.raises(ValueError, match=f"^{field}={value}: must be .*{hint}$"):
        QLearningConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("readings", 7), ("hold_below", 0.5)])
def test_fields_of_the_trust_ratio_need_it(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value}: has no effect on signal=trend"):
        QLearningConfig(**{field: value})
    assert getattr(QLearningConfig(signal="trust", **{field: value}), field) == value


@pytest.mark.parametrize("curvature", [0.01, 1.0, 30.0])
def test_the_trust_ratio_finds_the_rate_of_a_parabola(curvature):
    """From a rate of 1, for curvatures that need a larger, about the same and a smaller one."""
    config = QLearningConfig(signal="trust", interval=5, epsilon=0, epsilon_floor=0, surge=0)
    schedule = optax.linear_schedule(1.0, 0.0, 400)
    optimizer = q_learning_sgd(schedule, 0.5, 0.0, 0.0, controller=config)
    params = {"scale": jnp.ones(4)}

    def value_fn(params, noise):
        return curvature / 2 * jnp.sum((params["scale"] - noise) ** 2)

    def step(carry, noise):
        params, state = carry
        value, grads = jax.value_and_grad(value_fn)(params, noise)
        updates, state = optimizer.update(
            grads, state, params, value=value, value_fn=lambda params: value_fn(params, noise)
        )
        metrics = q_learning_metrics(state)
        report = metrics["trust_ratio"], metrics["learning_rate_scale"], metrics["momentum"]
        return (optax.apply_updates(params, updates), state), report

    noise = jax.random.normal(jax.random.key(0), (400, 4))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, noise))
    (_, state), (ratios, scales, momenta) = run((params, optimizer.init(params)))
    steady = 100  # 1 - 0.75 of the schedule, after which the agent holds the factor
    assert ratios[0] == pytest.approx(TRUST_START) and np.all(scales[steady + 10 :] == scales[-1])
    wanted = {0.01: (4.0, 10.0), 1.0: (0.3, 1.6), 30.0: (0.09, 0.11)}[curvature]
    assert wanted[0] <= scales[-1] <= wanted[1]
    assert np.ptp(momenta) < 1e-6 and int(state.agent.trust.phase) == HELD
    with pytest.raises(ValueError, match="value_fn=None: signal=trust needs"):
        optimizer.update(params, state, params, value=jnp.ones(()))


# ---- what it does at a decision -----------------------------------------------------------------


def test_positions_are_the_sum_of_actions_less_what_is_undone():
    losses, norms = noisy_run()
    _, (agents, _) = traced(losses, norms)
    position, undone = np.array([0.0, -np.log1p(-np.float32(0.9))], np.float32), 0
    low, high = np.log([[0.1, 2.0], [10.0, 200.0]]).astype(np.float32)
    moves = [np.array(a, np.float32) for a in (LEARNING_RATE_ACTIONS["trend"], MOMENTUM_ACTIONS)]
    for now in range(STEPS):
        if now and agents.reward[now] <= EVERY_STEP.undo_margin:
            back = agents.explored[now - 1]
            undone += int(np.sum(back))
            position = np.where(back, agents.before[now - 1], position)
        np.testing.assert_array_equal(agents.before[now], position)
        move = [moves[i][agents.actions[now, i]] for i in range(2)]
        position = np.clip(position + move, low, high)
        np.testing.assert_array_equal(agents.position[now], position)
    assert undone > 100
    assert agents.judged[-1] == STEPS - 1


def test_exploration_is_uniform_and_decays_to_its_floor():
    config = QLearningConfig(interval=1, indifference=1e3)  # greedy means no change
    _, (agents, _) = traced(*noisy_run(), config=config)
    epsilons = np.maximum(0.15 * 0.999 ** np.arange(STEPS), 0.05)
    np.testing.assert_allclose(agents.epsilon[:-1], epsilons[1:], rtol=1e-4)
    for column, count in enumerate((9, 7)):
        taken = np.bincount(agents.actions[:, column], minlength=count)[1:]
        expected = np.sum(epsilons) / count
        assert np.all(np.abs(taken - expected) < 4 * np.sqrt(expected))
        np.testing.assert_array_equal(agents.explored[:, column], agents.actions[:, column] > 0)


def test_equal_values_go_to_no_change_and_then_to_either_side_alike():
    draws = jax.random.bits(jax.random.key(0), (2000, 2, 3), "uint32")
    pick = jax.jit(
        jax.vmap(
            lambda values, d: q_agent._pick(values, d, jnp.float32(0.0), EVERY_STEP)[0],
            in_axes=(None, 0),
        )
    )
    nearest = np.asarray(pick(jnp.zeros((2, 9)).at[:, 0].set(-1.0), draws))
    assert set(nearest.ravel()) == {1, 2}  # the factors 1.025 and 1 / 1.025
    assert np.all(np.abs(np.mean(nearest == 1, axis=0) - 0.5) < 4 * 0.5 / math.sqrt(2000))
    assert not np.any(pick(jnp.zeros((2, 9)), draws))
    good = jnp.zeros((2, 9)).at[:, 5].set(1.0).at[:, 4].set(0.9)
    assert set(np.asarray(pick(good, draws)).ravel()) == {4}  # within the indifference, nearer


def test_a_finite_loss_however_large_poisons_nothing():
    losses, norms = noisy_run()
    losses[[50, 51, 400]] = 1e30, -1e30, 3e38
    norms[60] = 1e30
    agent, (agents, finite) = traced(losses, norms)
    assert np.all(finite)
    for leaf in jax.tree.leaves((agent, agents)):
        assert np.all(np.isfinite(leaf))


# ---- what it learns -----------------------------------------------------------------------------


BEST = (0, 1, 4, 5, 8)  # no change, times 1.025, over 1.05, times 1.1, over 1.15


@functools.cache
def worlds():
    """5,000 decisions through `update()` of runs whose loss answers to the scale just chosen.

    First 20 seeds for each scale of BEST, after which the loss falls 1.5 times as fast as after
    any other; then 20 runs in which it falls the same whatever is done, and 80 of the same with
    1 % of noise. The gradient norm scatters by a tenth in all.
    """
    best = np.concatenate([np.repeat(BEST, 20), np.full(100, -1)])
    noise = np.where(np.arange(200) < 120, 0.0, 0.01)
    seeds = np.concatenate([np.tile(np.arange(20), 6), np.arange(80)])

    def run(best, noise, seed):
        optimizer: Any = q_learning_sgd(1.0, controller=EVERY_STEP, seed=seed)
        params, key = jnp.zeros(()), jax.random.fold_in(jax.random.key(123), seed)

        def step(carry, count):
            state, log_loss = carry
            draws = jax.random.normal(jax.random.fold_in(key, count), (2,))
            value = jnp.exp(log_loss) * (1 + noise * draws[0])
            gradient = 1 + 0.1 * draws[1]
            _, state = optimizer.update(gradient, state, params, value=value)
            action = state.agent.actions[0]
            log_loss -= jnp.where(action == best, 1.5e-3, 1e-3)
            greedy = jnp.argmax(state.agent.q_learning_rate[state.agent.cell])
            scale = jnp.log(q_learning_metrics(state)["learning_rate_scale"])
            return (state, log_loss), (action, greedy, scale)

        carry = optimizer.init(params), jnp.float32(0.0)
        return jax.lax.scan(step, carry, jnp.arange(5000))[1]

    inputs = jnp.asarray(best), jnp.asarray(noise, jnp.float32), jnp.asarray(seeds)
    return tuple(np.asarray(rows) for rows in jax.jit(jax.vmap(run))(*inputs))


@pytest.mark.parametrize("which", range(len(BEST)))
def test_the_scale_to_which_the_loss_responds_best_is_learned(which):
    actions, greedy, _ = worlds()
    rows = slice(20 * which, 20 * which + 20)
    chosen = np.mean(actions[rows, -500:] == BEST[which], axis=1)
    assert np.sum(chosen > 0.5) == 20
    assert np.mean(greedy[rows, -500:] == BEST[which]) > 0.9


@pytest.mark.parametrize("rows", [slice(100, 120), slice(120, 200)], ids=["clean", "noisy"])
def test_a_loss_that_falls_the_same_whatever_is_done_causes_no_drift(rows):
    _, _, scales = worlds()
    mean = np.mean(scales[rows], axis=0)
    assert np.max(np.abs(mean)) < 0.1
    assert np.any(scales[rows] != 0)


# ---- what keeps it safe -------------------------------------------------------------------------


def test_steps_that_are_not_finite_are_skipped_and_counted():
    source = np.random.default_rng(3)
    bad = source.random(STEPS) < 0.1
    kinds = source.integers(0, 4, STEPS)
    losses = np.where(bad & (kinds == 0), np.nan, 1.0) * np.where(bad & (kinds == 1), -np.inf, 1.0)
    factors = np.where(bad & (kinds == 2), np.nan, 1.0) * np.where(bad & (kinds == 3), np.inf, 1.0)
    params = {"a.kernel": jnp.ones((3, 2)), "a.bias": jnp.ones(2)}
    optimizer: Any = q_learning_sgd(0.01, noise_scale=0.1, controller=EVERY_STEP)

    def step(carry, signal):
        params, state = carry
        value, factor = signal
        grads = {"a.kernel": params["a.kernel"].at[1, 1].mul(factor), "a.bias": params["a.bias"]}
        updates, state = optimizer.update(grads, state, params, value=value)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), (params, state.momentum, q_learning_metrics(state))

    signals = jnp.asarray(losses, jnp.float32), jnp.asarray(factors, jnp.float32)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, signals))
    _, (weights, momenta, metrics) = scan((params, optimizer.init(params)))

    np.testing.assert_array_equal(metrics["skipped_steps"], np.cumsum(bad))
    for leaf in jax.tree.leaves((weights, momenta)):
        changed = np.any(np.diff(leaf, axis=0) != 0, axis=tuple(range(1, leaf.ndim)))
        np.testing.assert_array_equal(changed, ~bad[1:])
        assert np.all(np.isfinite(leaf))
    np.testing.assert_array_equal(metrics["reward"][bad], -1.0)
    scale = np.asarray(metrics["learning_rate_scale"])
    halved = np.maximum(scale[:-1] / 2, 0.1)
    np.testing.assert_allclose(scale[1:][bad[1:]], halved[bad[1:]], rtol=1e-5)
    for name, values in metrics.items():
        assert np.all(np.isfinite(values)), name


def test_an_action_that_ends_in_no_finite_loss_is_punished_once():
    losses, norms = noisy_run()
    losses[[700, 701]] = math.nan
    _, (agents, _) = traced(losses, norms)
    np.testing.assert_array_equal(agents.pending[699:703], [True, False, False, True])
    np.testing.assert_array_equal(agents.actions[700:702], agents.actions[[699, 699]])
    assert agents.judged[702] == agents.judged[699] == 699

    losses = np.where(np.arange(STEPS) > 0, math.nan, 1.0)
    agent, _ = traced(losses, norms)
    for table in (agent.q_learning_rate, agent.q_momentum):
        np.testing.assert_array_equal(table[table != 0], np.array([-EVERY_STEP.alpha], np.float32))


def test_a_loss_that_surges_halves_the_rate_once_in_a_window():
    """Steps 100 to 139 stand at a hundred times the first loss: over twice it when smoothed, too,
    from the fifth of them on, since none counts for more than four times."""
    losses, norms = noisy_run()
    losses[100:140] = 100 * losses[0]
    _, (agents, finite) = traced(losses, norms)
    assert np.all(finite) and np.all(agents.skipped == 0)
    risen = np.flatnonzero(np.diff(agents.surges)) + 1
    # From 0.9 of the first loss or so: 4 - 3.1 · 2^(-n/8) > 2 for n > 5.1 steps seen before.
    assert 104 <= risen[0] <= 107
    np.testing.assert_array_equal(risen, np.arange(risen[0], 140, 8))
    np.testing.assert_array_equal(agents.reward[risen], -1.0)
    fell = agents.position[risen, 0] - agents.position[risen - 1, 0]
    least = np.float32(math.log(0.1))
    expected = np.maximum(agents.position[risen - 1, 0] - math.log(2), least)
    np.testing.assert_allclose(agents.position[risen, 0], expected, rtol=1e-5)
    assert np.all(fell <= 0) and not np.any(agents.pending[risen])
    assert np.all(np.abs(agents.smoothed) < 4.1 * losses[0])
    _, (calm, _) = traced(losses, norms, config=QLearningConfig(interval=1, surge=0.0))
    assert not np.any(calm.surges) and calm.smoothed.max() > 50


def test_eight_devices_act_as_one(x64):
    """And a replica that is fed its own loss instead of the mean goes its own way."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    optimizer: Any = q_learning_sgd(0.05, noise_scale=0.1, controller=EVERY_STEP)
    source = np.random.default_rng(0)
    inputs = jnp.asarray(source.standard_normal((60, 16, 4)))
    targets = inputs.sum(-1) + jnp.asarray(source.standard_normal((60, 16)))
    params = {"a.kernel": jnp.zeros((4, 1)), "a.bias": jnp.zeros(1)}
    start = params, optimizer.init(params)

    def loss(params, x, y):
        return jnp.mean((x @ params["a.kernel"] + params["a.bias"][None] - y[:, None]) ** 2)

    def run(x, y, global_value, mean=lambda tree: tree):
        def step(carry, batch):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, *batch)
            value = jnp.where(global_value, mean(value), value)
            updates, state = optimizer.update(mean(grads), state, params, value=value)
            return (jax.tree.map(jnp.add, params, updates), state), state.agent.actions

        # Each device holds parameters of its own, so its gradient is local and its mean is due.
        bump = jnp.where(x[0, 0, 0] > jnp.inf, 1, 0)
        carry = jax.tree.map(lambda leaf: leaf + bump.astype(leaf.dtype), start)
        (end, _), actions = jax.lax.scan(step, carry, (x, y))
        return jax.tree.map(lambda leaf: leaf[None], (end, actions))

    mean = functools.partial(jax.lax.pmean, axis_name="data")
    on_devices = jax.jit(
        jax.shard_map(
            functools.partial(run, mean=mean),
            mesh=mesh,
            in_specs=(jax.P(None, "data"), jax.P(None, "data"), jax.P()),
            out_specs=jax.P("data"),
        )
    )
    one, actions = jax.jit(run)(inputs, targets, True)
    ends, eight = on_devices(inputs, targets, True)
    assert eight.shape == (8, 60, 2)
    np.testing.assert_array_equal(eight, np.broadcast_to(actions, eight.shape))
    for name, end in ends.items():
        distances = np.linalg.norm(end - one[name], axis=tuple(range(1, end.ndim)))
        assert np.all(distances <= AFTER_200_STEPS * np.linalg.norm(one[name]))
    _, alone = on_devices(inputs, targets, False)
    assert np.any(np.asarray(alone) != np.asarray(alone)[:1])
