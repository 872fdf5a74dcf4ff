"""Q-learning SGD: JAX against torch. The same bits, actions and parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import Tensor

import bytelm_jax.optimizers.q_agent
import bytelm_jax.optimizers.threefry
import bytelm_torch.optimizers.q_agent
import bytelm_torch.optimizers.threefry
from bytelm.q_table import LEARNING_RATE_ACTIONS, MOMENTUM_ACTIONS
from bytelm.tolerances import AFTER_200_STEPS, LOGITS
from bytelm_jax.optimizers.q_learning import q_learning_metrics, q_learning_sgd
from bytelm_torch.optimizers.q_agent import q_learning_metrics as torch_metrics
from bytelm_torch.optimizers.q_learning import EnhancedSGD

SHAPES = {
    "embed.embedding": (7, 6),
    "norm.scale": (6,),
    "dense.kernel": (6, 5),
    "dense.bias": (5,),
    "experts.kernels": (2, 5, 4),
    "mix.taps": (3, 4),
    "heads.kernel": (4, 4, 3),
}
TURNED = {"dense.kernel", "heads.kernel"}  # their last two axes change places in torch
ROWS = 5
TOLD = ("actions", "cell", "explored", "judged")


def inputs(steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, noisy targets, as unlearnable in part as text is, and factors of the loss."""
    source = np.random.default_rng(1)
    ids = source.integers(0, 7, (steps, ROWS))
    targets = np.sin(ids)[..., None] + 0.3 * source.standard_normal((steps, ROWS, 3))
    return ids, targets, np.ones(steps)


def start() -> dict[str, np.ndarray]:
    source = np.random.default_rng(2)
    return {name: 0.5 * source.standard_normal(shape) for name, shape in SHAPES.items()}


def loss_of(np_: Any, params: dict[str, Any], ids: Any, targets: Any) -> Any:
    """The model, in the arrays of `np_` (jax.numpy or torch) and in JAX's layout."""
    hidden = np_.einsum("bd,d->bd", params["embed.embedding"][ids], params["norm.scale"])
    hidden = np_.tanh(hidden @ params["dense.kernel"] + params["dense.bias"][None])
    hidden = np_.einsum("bd,edf->bf", hidden, params["experts.kernels"])
    hidden = np_.einsum("bd,td->bd", hidden, params["mix.taps"])
    outputs = np_.einsum("bd,hdf->bf", np_.tanh(hidden), params["heads.kernel"])
    return ((outputs - targets) ** 2).mean()


CHUNK = 50


@functools.cache
def trainer(name: str) -> Any:
    """An optimizer, and its compiled run over CHUNK batches, which the tests share."""
    optimizer: Any = q_learning_sgd(**arguments_of(name, bytelm_jax.optimizers.q_agent))

    def step(carry, batch):
        params, state = carry
        ids, targets, scale = batch

        def value_fn(params):
            return scale * loss_of(jnp, params, ids, targets)

        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = optimizer.update(grads, state, params, value=value, value_fn=value_fn)
        agent = state.agent
        trace = agent.actions, agent.cell, agent.explored, agent.judged
        return (optax.apply_updates(params, updates), state), trace

    return optimizer, jax.jit(functools.partial(jax.lax.scan, step))


class JaxRun:
    """The JAX side: parameters, optimizer state, and what the agent did at every step."""

    def __init__(self, name: str):
        optimizer, self.scan = trainer(name)
        self.params = {name: jnp.asarray(x) for name, x in start().items()}
        self.state = optimizer.init(self.params)

    def train(self, *batches: np.ndarray) -> dict[str, np.ndarray]:
        trace = []
        for at in range(0, len(batches[0]), CHUNK):
            chunk = tuple(rows[at : at + CHUNK] for rows in batches)
            (self.params, self.state), rows = self.scan((self.params, self.state), chunk)
            trace.append(jax.tree.map(np.asarray, rows))
        return dict(zip(TOLD, map(np.concatenate, zip(*trace, strict=True)), strict=True))


class TorchRun:
    """The torch side of the same."""

    def __init__(self, **arguments: Any):
        self.weights = {}
        for name, value in start().items():
            transposed = np.swapaxes(value, -1, -2) if name in TURNED else value
            weight = torch.nn.Parameter(torch.tensor(transposed.copy()))
            vars(weight)["bytelm_path"] = name
            self.weights[name] = weight
        arguments["lr"] = arguments.pop("learning_rate")
        # Another order than JAX's, which sorts: nothing may depend on it.
        self.optimizer = EnhancedSGD(reversed(list(self.weights.values())), **arguments)

    def train(self, *batches: np.ndarray) -> dict[str, np.ndarray]:
        trace = []
        for ids, targets, scale in zip(*map(torch.from_numpy, batches), strict=True):

            def closure(ids=ids, targets=targets, scale=scale):
                self.optimizer.zero_grad()
                value = scale * loss_of(torch, self.params(), ids, targets)
                value.backward()
                return value

            self.optimizer.step(closure)
            agent = self.optimizer.agent
            trace.append((agent.actions, agent.cell, agent.explored, agent.judged))
        rows = [torch.stack(column).numpy() for column in zip(*trace, strict=True)]
        return dict(zip(TOLD, rows, strict=True))

    def params(self) -> dict[str, Tensor]:
        return {n: w.mT if n in TURNED else w for n, w in self.weights.items()}


def differs(run: JaxRun, twin: TorchRun) -> float:
    """The largest relative distance of a parameter from its twin."""
    rows = [(np.asarray(run.params[n]), p.detach().numpy()) for n, p in twin.params().items()]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in rows)


ARGUMENTS = {
    "plain": {"learning_rate": 0.03, "controller": {"interval": 1}},
    "noise": {
        "learning_rate": 0.03,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "entropy_threshold": 0.8,
        "noise_scale": 0.1,
        "centralize": False,
        "seed": 3,
    },
    "trust": {
        "learning_rate": 0.003,
        "noise_scale": 0.1,
        "controller": {"signal": "trust", "interval": 5},
    },
}


def arguments_of(name: str, package: Any) -> dict[str, Any]:
    arguments = ARGUMENTS[name]
    return {**arguments, "controller": package.QLearningConfig(**arguments.get("controller", {}))}


def both(name: str) -> tuple[JaxRun, TorchRun]:
    return JaxRun(name), TorchRun(**arguments_of(name, bytelm_torch.optimizers.q_agent))


def test_bits_are_the_same(x64):
    key, twin = (
        bytelm_jax.optimizers.threefry.seed_key(2**31 + 5),
        bytelm_torch.optimizers.threefry.seed_key(2**31 + 5),
    )
    for data in (0, 1, 2**32 - 1):
        key = bytelm_jax.optimizers.threefry.fold_in(key, np.uint32(data))
        twin = bytelm_torch.optimizers.threefry.fold_in(twin, data)
        assert tuple(np.asarray(key)) == twin
        source = np.random.default_rng(data)
        counters = np.append(source.integers(0, 2**32, 4096), [0, 1, 2**32 - 1])
        high, low = np.uint32(data), jnp.asarray(counters, jnp.uint32)
        bits = bytelm_jax.optimizers.threefry.random_bits(key, jnp.asarray(high), low)
        same = bytelm_torch.optimizers.threefry.random_bits(twin, data, torch.as_tensor(counters))
        np.testing.assert_array_equal(np.asarray(bits, np.int64), same.numpy())
        assert int(bits[-1]) == bytelm_torch.optimizers.threefry.random_bits(twin, data, 2**32 - 1)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_normals_are_the_same(x64, dtype):
    key = bytelm_jax.optimizers.threefry.seed_key(11)
    ours = bytelm_jax.optimizers.threefry.normals(key, (3, 40, 50), (0, 2, 1), dtype)
    other = bytelm_torch.optimizers.threefry.normals(
        bytelm_torch.optimizers.threefry.seed_key(11), (3, 50, 40), getattr(torch, dtype)
    )
    a, b = np.asarray(ours), other.mT.numpy()
    assert a.dtype == b.dtype == np.dtype(dtype)
    assert np.linalg.norm(a - b) / np.linalg.norm(b) <= LOGITS[dtype]


@pytest.mark.parametrize("name", ["noise", "trust"])
def test_200_steps_with_noise_end_at_the_same_parameters(x64, name):
    run, twin = both(name)
    batches = inputs(200)
    trace, same = run.train(*batches), twin.train(*batches)
    assert differs(run, twin) <= AFTER_200_STEPS
    np.testing.assert_array_equal(trace["actions"], same["actions"])
    ours, others = q_learning_metrics(run.state), torch_metrics(twin.optimizer)
    assert ours.keys() == others.keys()
    for metric, value in ours.items():
        assert float(value) == pytest.approx(float(others[metric]), rel=AFTER_200_STEPS), metric
    if name == "trust":
        assert len(np.unique(trace["cell"])) > 5
        assert float(ours["learning_rate_scale"]) > 3  # of a rate that is far too low


def test_actions_are_the_same_for_2000_steps(x64):
    """And the parameters after 200 of them and after all."""
    run, twin = both("plain")
    batches = inputs(2000)
    rows = []
    for part in (slice(0, 200), slice(200, 2000)):
        chunk = [column[part] for column in batches]
        rows.append((run.train(*chunk), twin.train(*chunk)))
        assert differs(run, twin) <= AFTER_200_STEPS
    for what in TOLD:
        for trace, same in rows:
            np.testing.assert_array_equal(trace[what], same[what])
    same = rows[-1][1]
    assert len(np.unique(same["actions"][:, 0])) == len(LEARNING_RATE_ACTIONS["trend"])
    assert len(np.unique(same["actions"][:, 1])) == len(MOMENTUM_ACTIONS)
    assert same["judged"][-1] == 1999


@pytest.mark.parametrize(("dtype", "interval"), [("float32", 1), ("float64", 10)])
def test_agents_fed_the_same_act_the_same(x64, dtype, interval):
    """1,000 steps of a falling loss with 1 % of noise, a tenth of the steps not finite."""
    source = np.random.default_rng(interval)
    losses = (np.exp(-np.arange(1000) / 400) + 1) * (1 + 0.01 * source.standard_normal(1000))
    norms = source.lognormal(0, 0.3, 1000)
    losses[source.random(1000) < 0.05] = np.nan
    norms[source.random(1000) < 0.05] = np.inf
    signals = losses.astype(dtype), norms.astype(dtype)

    config = bytelm_jax.optimizers.q_agent.QLearningConfig(interval=interval)
    agent = bytelm_jax.optimizers.q_agent.init_agent(config, 0.9, 4, dtype)

    def step(agent, signal):
        agent, _ = bytelm_jax.optimizers.q_agent.step_agent(
            agent, signal[0], signal[1], config, steers_momentum=True
        )
        return agent, (agent.actions, agent.cell, agent.skipped, agent.explored)

    agent, trace = jax.jit(functools.partial(jax.lax.scan, step))(agent, signals)

    other_config = bytelm_torch.optimizers.q_agent.QLearningConfig(interval=interval)
    kind, device = getattr(torch, dtype), torch.device("cpu")
    other = bytelm_torch.optimizers.q_agent.init_agent(other_config, 0.9, 4, kind, device)
    same = []
    for loss, norm in zip(*map(torch.from_numpy, signals), strict=True):
        other, _ = bytelm_torch.optimizers.q_agent.step_agent(other, loss, norm, other_config, True)
        same.append((other.actions, other.cell, other.skipped, other.explored))
    for a, b in zip(trace, zip(*same, strict=True), strict=True):
        np.testing.assert_array_equal(np.asarray(a), torch.stack(b).numpy())
    assert 70 < int(other.skipped) == int(np.sum(~np.isfinite(losses) | ~np.isfinite(norms)))
    tables = np.asarray(agent.q_learning_rate), other.q_learning_rate.numpy()
    assert np.linalg.norm(tables[0] - tables[1]) / np.linalg.norm(tables[1]) <= LOGITS["float32"]


def test_a_state_dict_in_the_middle_changes_nothing(x64, tmp_path):
    batches = inputs(60)
    straight, first = (
        TorchRun(**arguments_of("noise", bytelm_torch.optimizers.q_agent)) for _ in range(2)
    )
    straight.train(*batches)
    first.train(*(rows[:35] for rows in batches))
    torch.save(first.optimizer.state_dict(), tmp_path / "state.pt")

    later = TorchRun(learning_rate=1.0, seed=99)  # every setting comes from the file
    for weight, source in zip(later.weights.values(), first.weights.values(), strict=True):
        weight.data.copy_(source.data)
    later.optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    later.train(*(rows[35:] for rows in batches))
    for a, b in zip(straight.weights.values(), later.weights.values(), strict=True):
        assert torch.equal(a, b)
    ours, others = straight.optimizer.agent, later.optimizer.agent
    for field in ours._fields:
        a, b = getattr(ours, field), getattr(others, field)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field


def test_steps_that_are_not_finite_are_skipped_alike(x64):
    run, twin = both("plain")
    batches = inputs(CHUNK)
    batches[2][[0, 7, 8, 30]] = [np.nan, np.inf, np.nan, -np.inf]
    trace, same = run.train(*batches), twin.train(*batches)
    np.testing.assert_array_equal(trace["actions"], same["actions"])
    assert differs(run, twin) <= AFTER_200_STEPS
    assert int(q_learning_metrics(run.state)["skipped_steps"]) == 4
    assert int(torch_metrics(twin.optimizer)["skipped_steps"]) == 4


def test_the_configurations_are_the_same():
    ours, theirs = bytelm_jax.optimizers.q_agent, bytelm_torch.optimizers.q_agent
    assert repr(ours.QLearningConfig()) == repr(theirs.QLearningConfig())
    assert ours.QLearningState._fields == theirs.QLearningState._fields
