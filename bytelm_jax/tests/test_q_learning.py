"""Q-learning SGD as an optax transformation: conventions, and one step against plain formulas."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from bytelm.tolerances import GRADIENTS
from bytelm_jax.optimizers import threefry
from bytelm_jax.optimizers.q_agent import QLearningConfig
from bytelm_jax.optimizers.q_learning import q_learning, q_learning_metrics, q_learning_sgd

EVERY_STEP = QLearningConfig(interval=1)
FROZEN = QLearningConfig(interval=10**6, epsilon=0.0, epsilon_floor=0.0)  # the agent never acts

NOISY: dict[str, Any] = {"learning_rate": 1e-2, "entropy_threshold": 0.1, "noise_scale": 1e-3}
NOISY["controller"] = EVERY_STEP
OPTIMIZERS = {
    "q_learning_sgd": lambda: q_learning_sgd(**NOISY),
    "heavy_ball": lambda: q_learning(optax.inject_hyperparams(optax.sgd)(1e-2, 0.9), EVERY_STEP),
    "adamw": lambda: q_learning(optax.inject_hyperparams(optax.adamw)(1e-2), EVERY_STEP),
}


def trees(dtype="float32"):
    """Parameters and gradients of every layout, and of leaves without a name."""
    source = np.random.default_rng(0)
    shapes = {
        "a.kernel": (3, 4),
        "a.bias": (4,),
        "b.embedding": (5, 3),
        "c.scale": (3,),
        "d.kernels": (2, 3, 4),
        "e.taps": (2, 3),
        "f": [(3, 4), (4,)],
    }

    def draw(shape):
        return jnp.asarray(source.standard_normal(shape), dtype)

    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return tuple(jax.tree.map(draw, shapes, is_leaf=is_shape) for _ in range(2))


class Stepper(NamedTuple):
    """An optimizer whose compiled step the tests share: one compilation takes seconds."""

    optimizer: optax.GradientTransformationExtraArgs
    update: Callable[..., Any]
    traced: list[Any]


@functools.cache
def stepper(name: str) -> Stepper:
    optimizer, traced = OPTIMIZERS[name](), []

    def update(grads, state, params, value):
        traced.append(value)
        return optimizer.update(grads, state, params, value=value, unknown=1)

    return Stepper(optimizer, jax.jit(update), traced)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, bound):
    def check(x, y):
        assert np.linalg.norm(x - y) <= bound * np.linalg.norm(y)

    jax.tree.map(check, a, b)


# ---- conventions of optax ---------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_extra_arguments_and_no_recompilation(name):
    optimizer, update, traced = stepper(name)
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    params, grads = trees()
    state = optimizer.init(params)
    structure = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for value in (2.0, 1.0, math.nan, 0.5):
        updates, state = update(grads, state, params, jnp.float32(value))
        params = optax.apply_updates(params, updates)
    assert len(traced) == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == structure
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
    assert int(q_learning_metrics(state)["skipped_steps"]) == 1
    same(optax.tree.map_params(optimizer, lambda leaf: leaf, state), state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dtypes_are_kept(x64, name, dtype):
    optimizer, (params, grads) = OPTIMIZERS[name](), trees(dtype)
    state = optimizer.init(params)
    updates, after = jax.eval_shape(
        lambda *tree: optimizer.update(*tree, value=jnp.bfloat16(1.0)), grads, state, params
    )
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, after)


def test_gradient_accumulation():
    """The mean of four gradients in four small steps is one step, and the agent sees one."""
    optimizer, update, _ = stepper("q_learning_sgd")
    params, grads = trees()
    steps = optax.MultiSteps(optimizer, every_k_schedule=4)
    state, small_step = steps.init(params), jax.jit(steps.update)
    for factor in (0.0, 2.0, 1.0, 1.0):
        part = jax.tree.map(lambda g, f=factor: f * g, grads)
        updates, state = small_step(part, state, params, value=jnp.float32(1.0))
        assert bool(optax.tree.norm(updates) > 0) == bool(steps.has_updated(state))
    whole, inner = update(grads, optimizer.init(params), params, jnp.float32(1.0))
    close(updates, whole, GRADIENTS["float32"])
    ours, expected = q_learning_metrics(state), q_learning_metrics(inner)
    assert float(ours["learning_rate"]) == float(expected["learning_rate"])
    assert float(ours["stability"]) == float(expected["stability"])


def test_chained_masked_and_injected():
    """Noise goes by the leaf's path, so a mask moves no other leaf's noise."""
    params, grads = trees()
    grads = {**grads, "e.taps": jnp.zeros((2, 3))}  # nothing but noise is left there
    optimizer, update, _ = stepper("q_learning_sgd")
    injected = optax.inject_hyperparams(q_learning_sgd)(**NOISY)
    mask = {**jax.tree.map(lambda _: True, params), "a.bias": False}
    chain = optax.chain(optax.scale(2.0), optax.masked(injected, mask))
    value = jnp.float32(1.0)
    updates, state = jax.jit(chain.update)(grads, chain.init(params), params, value=value)
    same(updates["a.bias"], 2 * grads["a.bias"])
    inner = state[1].inner_state
    assert {"learning_rate", "momentum", "noise_scale", "seed"} <= inner.hyperparams.keys()

    doubled = {**jax.tree.map(lambda g: 2 * g, grads), "a.bias": jnp.zeros(4)}
    _, other = update(doubled, optimizer.init(params), params, value)
    ours, expected = q_learning_metrics(state), q_learning_metrics(other)
    close(ours, expected, GRADIENTS["float32"])
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    ratio = math.sqrt(size / (size - 4))  # rms(g) is over fewer parameters
    noise = ratio * other.momentum["e.taps"]
    close(inner.inner_state.momentum["e.taps"], noise, GRADIENTS["float32"])


def test_orbax_round_trip(tmp_path):
    """Saved, restored into a fresh state, and continued: the same bits as without."""
    optimizer, update, _ = stepper("q_learning_sgd")
    params, grads = trees()
    state = optimizer.init(params)
    for value in (3.0, 2.0, 2.5):
        _, state = update(grads, state, params, jnp.float32(value))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    same(restored, state)
    value = jnp.float32(1.0)
    same(update(grads, restored, params, value), update(grads, state, params, value))


CONVERGENCE = 3e-2
"""Relative and absolute, as in the common checks of optax's contributed optimizers."""

PARABOLAS = {  # start and end
    "vector": (jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0])),
    "matrix": (jnp.zeros((2, 2)), jnp.array([[3.0, -2.0], [1.0, 4.0]])),
}
ROSENBROCK = (jnp.zeros(2), jnp.ones(2))


def minimised(optimizer, loss, start, steps):
    """The parameters after `steps` steps, and what the agent did in each."""

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), q_learning_metrics(state)

    carry = start, optimizer.init(start)
    (params, _), metrics = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(carry)
    assert metrics["skipped_steps"][-1] == 0
    return params, metrics


def test_converges_on_parabolas_under_a_schedule():
    """A schedule gives the base rate that the agent scales."""
    start, end = ({k: pair[i] for k, pair in PARABOLAS.items()} for i in range(2))
    optimizer = q_learning_sgd(
        lambda count: 1e-2 / (1 + count / 1e3), weight_decay=0.0, controller=EVERY_STEP
    )

    def loss(params):
        return sum(jnp.sum((params[name] - end[name]) ** 2) for name in end)

    params, metrics = minimised(optimizer, loss, start, 3000)
    for name in end:
        np.testing.assert_allclose(params[name], end[name], CONVERGENCE, CONVERGENCE)
    base = metrics["learning_rate"] / metrics["learning_rate_scale"]
    np.testing.assert_allclose(base, 1e-2 / (1 + np.arange(3000) / 1e3), rtol=1e-5)
    assert len(np.unique(metrics["learning_rate_scale"])) > 1


def test_converges_on_rosenbrock():
    start, end = ROSENBROCK
    optimizer = q_learning_sgd(1e-4, weight_decay=0.0, max_grad_norm=0.0, controller=EVERY_STEP)

    def loss(params):
        return (1 - params[0]) ** 2 + 100 * (params[1] - params[0] ** 2) ** 2

    params, _ = minimised(optimizer, loss, start, 20_000)
    np.testing.assert_allclose(params, end, CONVERGENCE, CONVERGENCE)


def is_jaxpr(value):
    return isinstance(value, ClosedJaxpr | Jaxpr)


def primitives(jaxpr):
    """Names of all primitives, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from primitives(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_neither_calls_nor_asks_the_host(name):
    optimizer, update, _ = stepper(name)
    params, grads = trees()
    state, value = optimizer.init(params), jnp.float32(1.0)

    def spying(grads, state, params, value):
        jax.debug.callback(lambda x: None, value)
        return update(grads, state, params, value)

    waits = ("callback", "infeed", "outfeed", "device_put", "cond", "while")
    for function, expected in ((update, set()), (spying, {"debug_callback"})):
        names = set(primitives(jax.make_jaxpr(function)(grads, state, params, value).jaxpr))
        assert {name for name in names if any(word in name for word in waits)} == expected
    with jax.transfer_guard("disallow"):
        _, state = update(grads, state, params, value)
        updates, state = update(grads, state, params, value)
        jax.block_until_ready(updates)
        with pytest.raises(jax.errors.JaxRuntimeError, match="transfer"):
            update(grads, state, params, np.float32(1.0))


def test_a_wrapped_heavy_ball_takes_its_own_steps_scaled():
    """Its momentum is steered too, and the updates make up for the change in length."""
    params, grads = trees()
    optimizer, update, _ = stepper("heavy_ball")
    state, trace, momenta = optimizer.init(params), jax.tree.map(jnp.zeros_like, params), set()
    for value in np.linspace(3.0, 2.0, 40):
        updates, state = update(grads, state, params, jnp.float32(value))
        metrics = q_learning_metrics(state)
        mu, rate = float(metrics["momentum"]), float(metrics["learning_rate"])
        momenta.add(mu)
        trace = jax.tree.map(lambda t, g, mu=mu: mu * t + g, trace, grads)
        length = -rate * (1 - mu) / (1 - 0.9)
        expected = jax.tree.map(lambda t, length=length: length * t, trace)
        close(updates, expected, GRADIENTS["float32"])
    assert len(momenta) > 1


def test_a_wrapped_adamw_is_steered_by_b1():
    params, grads = trees()
    optimizer, update, _ = stepper("adamw")
    state = optimizer.init(params)
    plain: Any = optax.inject_hyperparams(optax.adamw)(1e-2)
    other, momenta = plain.init(params), set()
    plain_update = jax.jit(plain.update)
    for value in np.linspace(3.0, 2.0, 40):
        updates, state = update(grads, state, params, jnp.float32(value))
        metrics = q_learning_metrics(state)
        momenta.add(float(metrics["momentum"]))
        other = other._replace(hyperparams={**other.hyperparams, "b1": metrics["momentum"]})
        steps, other = plain_update(grads, other, params)
        scale = metrics["learning_rate_scale"]
        close(updates, jax.tree.map(lambda u, s=scale: s * u, steps), GRADIENTS["float32"])
    assert len(momenta) > 1


def test_a_wrapped_transformation_that_exposes_nothing_is_scaled_alone():
    params, grads = trees()
    optimizer: Any = q_learning(optax.sgd(1e-2), EVERY_STEP)

    def step(state, value):
        updates, state = optimizer.update(grads, state, params, value=value)
        return state, (updates, q_learning_metrics(state))

    values = jnp.linspace(3.0, 2.0, 40)
    _, (updates, metrics) = jax.lax.scan(step, optimizer.init(params), values)
    assert len(np.unique(metrics["learning_rate_scale"])) > 1
    same(metrics["learning_rate"], metrics["learning_rate_scale"])
    assert not np.any(metrics["momentum"])
    expected = np.einsum("t,io->tio", -0.01 * metrics["learning_rate_scale"], grads["a.kernel"])
    close(updates["a.kernel"], expected, GRADIENTS["float32"])


# ---- one step against plain formulas ------------------------------------------------------------


@jax.jit
def resting(grads, state, params, numbers):
    """A step, its numbers arguments, of an optimizer whose agent never acts."""
    optimizer = q_learning_sgd(controller=FROZEN, **numbers)
    return optimizer.update(grads, state, params, value=1.0)


def centred(grads):
    """The gradients less their means over the axes of the inputs, by hand."""
    return {
        **grads,
        "a.kernel": grads["a.kernel"] - jnp.mean(grads["a.kernel"], 0, keepdims=True),
        "d.kernels": grads["d.kernels"] - jnp.mean(grads["d.kernels"], 1, keepdims=True),
        "f": [grads["f"][0] - jnp.mean(grads["f"][0], 0, keepdims=True), grads["f"][1]],
    }


NUMBERS = {
    "learning_rate": 1.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "entropy_threshold": 0.0,
}


def first_step(params, grads, **numbers):
    """What one step at rate 1 and momentum 0.9 takes off: the gradient as it was prepared."""
    state = q_learning_sgd(1.0, controller=FROZEN).init(params)
    updates, _ = resting(grads, state, params, {**NUMBERS, **numbers})
    return jax.tree.map(jnp.negative, updates)


def test_with_an_agent_at_rest_it_is_plain_sgd_with_momentum(x64):
    params, _ = trees("float64")
    numbers, plain = {**NUMBERS, "learning_rate": 0.1}, optax.sgd(0.1, momentum=0.9)
    state, other = q_learning_sgd(1.0, controller=FROZEN).init(params), plain.init(params)
    for seed in range(20):
        draw = np.random.default_rng(seed).standard_normal
        grads = jax.tree.map(lambda p, draw=draw: jnp.asarray(draw(p.shape)), params)
        updates, state = resting(grads, state, params, numbers)
        expected, other = plain.update(centred(grads), other)
        close(updates, expected, GRADIENTS["float64"])


def test_centring_takes_the_mean_over_inputs_and_spares_the_rest(x64):
    params, grads = trees("float64")
    close(first_step(params, grads), centred(grads), GRADIENTS["float64"])


def test_weight_decay_spares_norms_and_biases(x64):
    params, grads = trees("float64")
    grads = jax.tree.map(jnp.zeros_like, grads)
    moved = first_step(params, grads, weight_decay=0.25)
    spared = {"a.bias": 0.0, "c.scale": 0.0}
    for name in ("a.kernel", "a.bias", "b.embedding", "c.scale", "d.kernels", "e.taps"):
        expected = spared.get(name, 0.25) * params[name]
        np.testing.assert_array_equal(moved[name], expected)
    np.testing.assert_array_equal(moved["f"][0], 0.25 * params["f"][0])
    np.testing.assert_array_equal(moved["f"][1], 0 * params["f"][1])


@pytest.mark.parametrize("most", [0.5, 1e3])
def test_clipping_bounds_the_global_norm(x64, most):
    params, grads = trees("float64")
    grads = centred(grads)
    scale = min(1, most / float(optax.tree.norm(grads)))
    moved = first_step(params, grads, max_grad_norm=most)
    close(moved, jax.tree.map(lambda g: scale * g, grads), GRADIENTS["float64"])


@pytest.mark.parametrize(
    ("filled", "scale"), [(8, 1.0), (4, 1.0), (2, 0.5 * 4 / 3), (1, 0.5)], ids=str
)
def test_concentrated_gradients_take_smaller_steps(x64, filled, scale):
    """Of eight leaves some share the gradient evenly: h = log(filled) / log 8, threshold 1/2."""
    params, grads = trees("float64")
    alike = [g / jnp.linalg.norm(g) for g in jax.tree.leaves(centred(grads))]
    leaves = [g if i < filled else 0 * g for i, g in enumerate(alike)]
    grads = jax.tree.unflatten(jax.tree.structure(grads), leaves)
    moved = first_step(params, grads, entropy_threshold=0.5)
    close(moved, jax.tree.map(lambda g: scale * g, grads), GRADIENTS["float64"])


def test_noise_has_the_given_deviation_and_anneals():
    grads = {"a.kernel": jnp.full((100, 300), 0.5), "b.bias": jnp.full(20_000, 0.5)}
    params = jax.tree.map(jnp.zeros_like, grads)
    optimizer: Any = q_learning_sgd(
        1.0, max_grad_norm=0.0, noise_scale=0.3, centralize=False, controller=FROZEN
    )
    update, state, seen = jax.jit(optimizer.update), optimizer.init(params), []
    for step in range(3):
        before = state.momentum
        _, state = update(grads, state, params, value=1.0)
        expected = 0.3 * 0.5 / (1 + step) ** 0.55
        for name, after in state.momentum.items():
            noise = (np.asarray(after) - 0.9 * np.asarray(before[name])) / 0.1 - 0.5
            seen.append(np.ravel(noise)[:20_000])
            assert abs(np.std(noise) - expected) < 4 * expected / math.sqrt(2 * noise.size)
            assert abs(np.mean(noise)) < 4 * expected / math.sqrt(noise.size)
    correlation = np.corrcoef(seen) - np.eye(len(seen))
    assert np.max(np.abs(correlation)) < 5 / math.sqrt(20_000)


def test_bits_and_keys_are_those_of_jax_random():
    key = threefry.seed_key(5)
    reference = jax.random.key(5, impl="threefry2x32")
    for data in (0, 77, 2**32 - 1):
        key = threefry.fold_in(key, np.uint32(data))
        reference = jax.random.fold_in(reference, np.uint32(data))
        same(key, jax.random.key_data(reference))
    bits = threefry.random_bits(key, jnp.uint32(0), jnp.arange(999, dtype=jnp.uint32))
    same(bits, jax.random.bits(reference, (999,), "uint32"))


def test_noise_does_not_depend_on_sharding():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    normals = functools.partial(threefry.normals, shape=(16, 24), order=(1, 0), dtype="float32")
    for spec in (jax.P("data"), jax.P(None, "data")):
        sharding = jax.NamedSharding(mesh, spec)
        shards = jax.jit(normals, out_shardings=sharding)(threefry.seed_key(1))
        assert len(shards.addressable_shards) == 8
        same(shards, jax.jit(normals)(threefry.seed_key(1)))


FINITE = "must be a finite value, at most 3.402823e+38"
BAD_ARGUMENTS = [
    ({"momentum": 0.2}, "momentum=0.2: must be in [0.5, 0.995]"),
    ({"weight_decay": -1.0}, "weight_decay=-1.0: must be at least 0"),
    ({"max_grad_norm": math.nan}, f"max_grad_norm=nan: {FINITE}"),
    ({"noise_scale": -0.1}, "noise_scale=-0.1: must be at least 0"),
    ({"noise_scale": math.inf}, f"noise_scale=inf: {FINITE}"),
    ({"entropy_threshold": 1e39}, f"entropy_threshold=1e+39: {FINITE}"),
    ({"learning_rate": math.inf}, f"learning_rate=inf: {FINITE}"),
    (
        {"weight_decay": 1e30},
        "weight_decay=1e+30: times learning_rate=0.1 it must be at most 2, or weights grow without "
        "bound; lower one of them",
    ),
    ({"seed": 2**32}, "seed=4294967296: choose one from 0 to 4294967295"),
    ({"seed": -1}, "seed=-1: choose one from 0 to 4294967295"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError) as error:
        q_learning_sgd(**{"learning_rate": 0.1, **arguments})
    assert str(error.value) == message


def test_bad_numbers_of_a_wrapped_optimizer_are_named():
    params, _ = trees()
    for name, value in (("learning_rate", math.inf), ("weight_decay", math.nan)):
        inner = optax.inject_hyperparams(optax.adamw)(**{"learning_rate": 0.1, name: value})
        with pytest.raises(ValueError, match=f"^{name}={value}: {re.escape(FINITE)}$"):
            q_learning(inner).init(params)
    with pytest.raises(ValueError, match="seed=4294967296: choose one from 0"):
        q_learning(optax.adamw(0.1), seed=2**32)
    states: Any = [q_learning_sgd(0.1, seed=seed).init(params) for seed in (0, 2**32 - 1)]
    assert [state.agent.key.tolist() for state in states] == [[0, 0], [0, 2**32 - 1]]


def test_what_update_and_metrics_need_is_named():
    params, grads = trees()
    optimizer = q_learning_sgd(0.1)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="value=None"):
        optimizer.update(grads, state, params)
    with pytest.raises(ValueError, match="params=None"):
        optimizer.update(grads, state, value=1.0)
    with pytest.raises(ValueError, match="value: has shape"):
        optimizer.update(grads, state, params, value=jnp.ones(3))
    with pytest.raises(ValueError, match="holds 0 Q-learning agents"):
        q_learning_metrics(optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="holds 2 Q-learning agents"):
        q_learning_metrics((state, state))
