"""SGD whose learning rate and momentum a Q-learning agent adjusts during training.

Gradient centring: Yong et al. 2020. Annealed gradient noise: Neelakantan et al. 2015. Decoupled
weight decay: Loshchilov & Hutter 2019. The agent (`q_agent.py`), its table and its random key live
in the optimizer state on the device. `bytelm_torch/optimizers/q_learning.py` follows the same
trajectory.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from bytelm.config.base import require, require_amount, require_number
from bytelm.config.optimizer import require_shrinking
from bytelm.config.q_learning import QLearningConfig
from bytelm.q_table import LEARNING_RATE_ACTIONS, MOMENTUM_ACTIONS
from bytelm_jax.optimizers.q_agent import (
    QLearningState,
    Scalar,
    init_agent,
    step_agent,
)
from bytelm_jax.optimizers.q_trust import Step, read_trust
from bytelm_jax.optimizers.threefry import fold_in, normals

_DEFAULT_CONTROLLER = QLearningConfig()


class QLearningSGDState(NamedTuple):
    """State of `q_learning_sgd`; `momentum` is a tree like the parameters, in at least float32."""

    agent: QLearningState
    momentum: optax.Updates


class QLearningWrapperState(NamedTuple):
    """State of `q_learning`; `initial_momentum` is 0 if momentum is not steered."""

    agent: QLearningState
    initial_momentum: Float[Array, ""]
    inner_state: optax.OptState


class _Settings(NamedTuple):
    """Arguments of `q_learning_sgd`; numbers may be arrays, as inject_hyperparams passes them."""

    learning_rate: Any
    momentum: Any
    weight_decay: Any
    max_grad_norm: Any
    entropy_threshold: Any
    noise_scale: Any
    centralize: bool
    controller: QLearningConfig
    seed: Any


# ---- the transformations --------------------------------------------------------------------


def q_learning_sgd(
    learning_rate: ArrayLike | Callable[..., Any],
    momentum: ArrayLike = 0.9,
    weight_decay: ArrayLike = 0.005,
    max_grad_norm: ArrayLike = 1.0,
    entropy_threshold: ArrayLike = 0.0,
    noise_scale: ArrayLike = 0.0,
    centralize: bool = True,
    controller: QLearningConfig = _DEFAULT_CONTROLLER,
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum under a Q-learning agent; `update` needs `value=`, the global mean loss.

    The gradient of each kernel is centred; all are clipped to global norm `max_grad_norm` (0: not)
    and scaled by max(h / `entropy_threshold`, 1/2) where h in [0, 1], the entropy of the squared
    gradient norms over the leaves, lies below the threshold (0: not); normal noise of deviation
    `noise_scale` · rms(g) / (1 + t)^0.55 is added (0: none); m ← μ m + (1 − μ) g; and the update is
    −lr · (m / (1 − `momentum`) + `weight_decay` · p), norms and biases undecayed. So the learning
    rate means what it means in plain SGD at the initial momentum, and a change of μ leaves the
    length of a step alone. `learning_rate` may be a schedule: it is the base that the agent scales.
    A step whose loss or gradient norm is not finite changes no parameter. A controller with
    `signal="trust"` needs `value_fn=`, which gives the loss of the same rows with the same dropout
    at other parameters; it is called at the last step before a decision.

    A leaf's name tells its layout: `kernel` [..., in, out], `kernels` [E, in, out], `embedding`,
    `scale`, `bias`; an index for a name, and two axes or more, is a kernel [..., out]; what has
    another name is not centred. Every replica must be fed the same `value` and gradient.

    >>> import jax, jax.numpy as jnp, optax
    >>> optimizer = q_learning_sgd(0.05, weight_decay=0.0)
    >>> params = {"dense.kernel": jnp.zeros((3, 2)), "dense.bias": jnp.ones(2)}
    >>> state = optimizer.init(params)
    >>> def loss(params):
    ...     return jnp.sum((params["dense.kernel"] + params["dense.bias"][None]) ** 2)
    >>> @jax.jit
    ... def step(params, state):
    ...     value, grads = jax.value_and_grad(loss)(params)
    ...     updates, state = optimizer.update(grads, state, params, value=value)
    ...     return optax.apply_updates(params, updates), state
    >>> for _ in range(300):
    ...     params, state = step(params, state)
    >>> bool(loss(params) < 1e-6), int(q_learning_metrics(state)["skipped_steps"])
    (True, 0)
    """
    settings = _Settings(
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        entropy_threshold=entropy_threshold,
        noise_scale=noise_scale,
        centralize=centralize,
        controller=controller,
        seed=seed,
    )
    _check(settings)
    return optax.GradientTransformationExtraArgs(
        functools.partial(_sgd_init, settings), functools.partial(_sgd_update, settings)
    )


def q_learning(
    inner: optax.GradientTransformation,
    controller: QLearningConfig = _DEFAULT_CONTROLLER,
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Scales the updates of any optax transformation as the agent of `q_learning_sgd` decides.

    If exactly one part of `inner` exposes an unscheduled `momentum` or `b1` through
    `optax.inject_hyperparams`, the agent steers it too; with a heavy-ball `momentum` the updates
    are rescaled so that changing it does not change the length of a step. A step whose loss or
    gradient norm is not finite changes neither parameters nor the inner state. `update` needs
    `value=`, the global mean loss, and, with `signal="trust"`, `value_fn=`; `inner` gets both.

    >>> import jax.numpy as jnp, optax
    >>> optimizer = q_learning(optax.inject_hyperparams(optax.adamw)(1e-3, b1=0.9))
    >>> state = optimizer.init({"dense.kernel": jnp.ones((3, 2))})
    >>> round(float(q_learning_metrics(state)["momentum"]), 1)
    0.9
    """
    require_number("seed", seed)
    wrapped = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> QLearningWrapperState:
        inner_state = wrapped.init(params)
        _check_injected(inner_state)
        dtype = _agent_dtype(params)
        momentum = jnp.asarray(_exposed(inner_state, "b1", "momentum", default=0.0), dtype)
        agent = init_agent(controller, momentum, seed, dtype)
        return QLearningWrapperState(agent, momentum, inner_state)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QLearningWrapperState]:
        dtype = state.agent.position.dtype
        norm = jnp.sqrt(jnp.sum(_square_norms(jax.tree.leaves(updates), dtype)))
        steered = _exposed(state.inner_state, "b1", "momentum") is not None
        agent, finite = step_agent(
            state.agent, _scalar(value, dtype), norm, controller, steers_momentum=steered
        )
        mu, scale = -jnp.expm1(-agent.position[1]), jnp.exp(agent.position[0])
        inner_state = _expose(state.inner_state, "b1", "momentum", value=mu)
        steps, inner_state = wrapped.update(updates, inner_state, params, value=value, **extra_args)
        base = jnp.asarray(_rate(inner_state), dtype)
        agent = agent._replace(learning_rate=base * scale)
        if _exposed(inner_state, "momentum") is not None:
            scale = scale * (1 - mu) / (1 - state.initial_momentum)
        steps = jax.tree.map(lambda u: jnp.where(finite, u * scale.astype(u.dtype), 0), steps)
        inner_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), inner_state, state.inner_state
        )
        step = Step(finite, updates, steps, params, _scalar(value, dtype), base)
        trust = read_trust(agent.trust, agent.count, step, controller, **extra_args)
        return steps, state._replace(agent=agent._replace(trust=trust), inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def q_learning_metrics(state: optax.OptState) -> dict[str, Scalar | Int[Array, ""]]:
    """The last actions and signals of the agent in an optimizer state, as scalars on the device.

    `learning_rate` (for a wrapped transformation that does not expose its own: only the scale) and
    `momentum` (0 if it is not steered) as used by the last step, `learning_rate_scale` relative to
    the base, `epsilon`, `reward` (−1 at a skipped step and at a surge), the factors that the last
    decision chose (`learning_rate_action`, and `momentum_action` of 1 / (1 − momentum)),
    `smoothed_loss`, `trend` (the fall of the loss over its deviation), `stability` (deviation over
    mean of the gradient norm), the counts `decisions`, `skipped_steps` and `surges`, and with
    `signal="trust"` the pooled `trust_ratio`.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, QLearningState))
    agents = [leaf for leaf in leaves if isinstance(leaf, QLearningState)]
    require(
        len(agents) == 1,
        f"state: holds {len(agents)} Q-learning agents; pass the state of one optimizer with one",
    )
    agent = agents[0]
    moves = LEARNING_RATE_ACTIONS["trend" if agent.trust is None else "trust"], MOMENTUM_ACTIONS
    factors = [
        jnp.exp(jnp.asarray(actions, agent.position.dtype)[agent.actions[i]])
        for i, actions in enumerate(moves)
    ]
    trust = {} if agent.trust is None else {"trust_ratio": agent.trust.ratio}
    return trust | {
        "learning_rate": agent.learning_rate,
        "learning_rate_scale": jnp.exp(agent.position[0]),
        "momentum": -jnp.expm1(-agent.position[1]),
        "epsilon": agent.epsilon,
        "reward": agent.reward,
        "learning_rate_action": factors[0],
        "momentum_action": factors[1],
        "smoothed_loss": agent.smoothed,
        "trend": agent.trend,
        "stability": agent.stability,
        "decisions": agent.judged,
        "skipped_steps": agent.skipped,
        "surges": agent.surges,
    }


# ---- one step of SGD ------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How a leaf is treated.

    Its name for the noise, the axes that centring averages over, whether it decays, and its axes in
    the order of the torch twin.
    """

    path: str
    mean_axes: tuple[int, ...]
    decays: bool
    order: tuple[int, ...]


def _layout(path: Any, axes: int) -> _Layout:
    name = jax.tree_util.keystr(path, simple=True, separator=".") or "0"
    leaf, all_axes = name.rpartition(".")[2], tuple(range(axes))
    if leaf == "kernel" and axes > 1:
        return _Layout(name, (axes - 2,), True, (*all_axes[:-2], axes - 1, axes - 2))
    if leaf == "kernels" and axes > 1:
        return _Layout(name, (axes - 2,), True, all_axes)
    if leaf.isdecimal() and axes > 1:
        return _Layout(name, all_axes[:-1], True, (axes - 1, axes - 2, *all_axes[:-2]))
    decays = leaf == "embedding" or (axes > 1 and leaf not in ("scale", "bias"))
    return _Layout(name, (), decays, all_axes)


def _check(settings: _Settings) -> None:
    """Raises `ValueError` for the first invalid setting; arrays are not checked."""
    require_number("seed", settings.seed)
    rate, decay = settings.learning_rate, settings.weight_decay
    require_amount("learning_rate", rate)
    for name in ("weight_decay", "max_grad_norm", "entropy_threshold", "noise_scale"):
        require_amount(name, getattr(settings, name))
    if isinstance(rate, (int, float)) and isinstance(decay, (int, float)):
        require_shrinking(rate, decay)
    low, high = settings.controller.min_momentum, settings.controller.max_momentum
    momentum = settings.momentum
    known = isinstance(momentum, (int, float))
    inside = not known or low <= momentum <= high
    require(inside, f"momentum={momentum}: must be in [{low}, {high}]")


def _sgd_init(settings: _Settings, params: optax.Params) -> QLearningSGDState:
    dtype = _agent_dtype(params)
    agent = init_agent(settings.controller, settings.momentum, settings.seed, dtype)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, _wide(p.dtype)), params)
    return QLearningSGDState(agent, zeros)


def _sgd_update(
    settings: _Settings,
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    *,
    value: ArrayLike | None = None,
    **extra_args: Any,
) -> tuple[optax.Updates, QLearningSGDState]:
    if params is None:
        raise ValueError("params=None: weight decay needs them; call update(grads, state, params)")
    paths, treedef = jax.tree.flatten_with_path(updates)
    layouts = [_layout(path, leaf.ndim) for path, leaf in paths]
    gradients = [leaf.astype(_wide(leaf.dtype)) for _, leaf in paths]
    if settings.centralize:
        gradients = [_centred(g, layout) for g, layout in zip(gradients, layouts, strict=True)]

    dtype = state.agent.position.dtype
    squares = _square_norms(gradients, dtype)
    norm = jnp.sqrt(jnp.sum(squares))
    controller = settings.controller
    agent, finite = step_agent(
        state.agent, _scalar(value, dtype), norm, controller, steers_momentum=True
    )
    base = settings.learning_rate
    base = base(state.agent.count) if callable(base) else base
    agent = agent._replace(learning_rate=jnp.asarray(base, dtype) * jnp.exp(agent.position[0]))

    scale = _clip_scale(norm, settings) * _entropy_scale(squares, settings)
    gradients = [g * scale.astype(g.dtype) for g in gradients]
    if not _is_zero(settings.noise_scale):
        gradients = _noisy(gradients, layouts, norm * scale, state.agent, settings)
    old, weights = treedef.flatten_up_to(state.momentum), treedef.flatten_up_to(params)
    averages = [_averaged(g, m, agent, finite) for g, m in zip(gradients, old, strict=True)]
    steps = [
        _descent(m, weight, layout, agent, finite, settings)
        for m, weight, layout in zip(averages, weights, layouts, strict=True)
    ]
    moves, momentum = treedef.unflatten(steps), treedef.unflatten(averages)
    step = Step(finite, updates, moves, params, _scalar(value, dtype), base)
    agent = agent._replace(
        trust=read_trust(agent.trust, agent.count, step, controller, **extra_args)
    )
    return moves, QLearningSGDState(agent, momentum)


def _centred(gradient: Float[Array, "..."], layout: _Layout) -> Float[Array, "..."]:
    if not layout.mean_axes:
        return gradient
    return gradient - jnp.mean(gradient, layout.mean_axes, keepdims=True)


def _clip_scale(norm: Scalar, settings: _Settings) -> Scalar:
    most = jnp.asarray(settings.max_grad_norm, norm.dtype)
    scale = jnp.minimum(1.0, most / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
    return jnp.where(most > 0, scale, 1.0)


def _entropy_scale(squares: Float[Array, " leaves"], settings: _Settings) -> Scalar:
    """Gradients concentrated in few leaves take smaller steps, down to half."""
    threshold = jnp.asarray(settings.entropy_threshold, squares.dtype)
    if _is_zero(settings.entropy_threshold) or squares.shape[0] < 2:
        return jnp.ones((), squares.dtype)
    tiny = jnp.finfo(squares.dtype).tiny
    shares = squares / jnp.maximum(jnp.sum(squares), tiny)
    logs = jnp.log(jnp.where(shares > 0, shares, 1.0))
    entropy = -jnp.sum(shares * logs) / math.log(squares.shape[0])
    return jnp.where(threshold > 0, jnp.clip(entropy / jnp.maximum(threshold, tiny), 0.5, 1.0), 1.0)


def _noisy(
    gradients: list[Array],
    layouts: list[_Layout],
    norm: Scalar,
    agent: QLearningState,
    settings: _Settings,
) -> list[Array]:
    """Adds noise to each gradient, depending on its path and on the step but not on sharding."""
    size = sum(g.size for g in gradients)
    annealed = jnp.power(1 + agent.count.astype(norm.dtype), 0.55)
    deviation = settings.noise_scale * (norm / math.sqrt(max(size, 1))) / annealed
    key = fold_in(agent.key, agent.count)
    noisy = []
    for gradient, layout in zip(gradients, layouts, strict=True):
        leaf_key = fold_in(key, jnp.uint32(zlib.crc32(layout.path.encode())))
        noise = normals(leaf_key, gradient.shape, layout.order, gradient.dtype)
        noisy.append(gradient + deviation.astype(gradient.dtype) * noise)
    return noisy


def _averaged(gradient: Array, old: Array, agent: QLearningState, finite: Array) -> Array:
    memory = jnp.exp(-agent.position[1]).astype(old.dtype)  # 1 − μ
    return jnp.where(finite, (1 - memory) * old + memory * gradient, old)


def _descent(
    average: Array,
    weight: Array,
    layout: _Layout,
    agent: QLearningState,
    finite: Array,
    settings: _Settings,
) -> Array:
    step = average / (1 - jnp.asarray(settings.momentum, average.dtype))
    if layout.decays and not _is_zero(settings.weight_decay):
        decay = jnp.asarray(settings.weight_decay, average.dtype)
        step = step + decay * weight.astype(average.dtype)
    step = jnp.where(finite, -agent.learning_rate.astype(average.dtype) * step, 0.0)
    return step.astype(weight.dtype)


# ---- small pieces ---------------------------------------------------------------------------


def _wide(dtype: DTypeLike) -> DTypeLike:
    return jnp.promote_types(dtype, jnp.float32)


def _agent_dtype(params: optax.Params) -> DTypeLike:
    kinds = [leaf.dtype for leaf in jax.tree.leaves(params)]
    return functools.reduce(jnp.promote_types, kinds, jnp.dtype(jnp.float32))


def _is_zero(number: Any) -> bool:
    """Whether a setting is known to be 0 while tracing, so that its work can be omitted."""
    return isinstance(number, (int, float)) and number == 0


def _scalar(value: ArrayLike | None, dtype: DTypeLike) -> Scalar:
    if value is None:
        raise ValueError("value=None: the agent needs the mean loss; update(..., value=loss)")
    require(jnp.shape(value) == (), f"value: has shape {jnp.shape(value)}; pass the mean loss")
    return jnp.asarray(value).astype(dtype)


def _square_norms(leaves: list[Array], dtype: DTypeLike) -> Float[Array, " leaves"]:
    wide = [leaf.astype(_wide(leaf.dtype)) for leaf in leaves]
    return jnp.array([jnp.sum(jnp.square(leaf)) for leaf in wide], dtype)


def is_injected(node: Any) -> bool:
    return isinstance(node, optax.InjectStatefulHyperparamsState)


def _exposed(state: optax.OptState, *names: str, default: Any = None) -> Any:
    """The hyperparameter of one of these names, if exactly one injected state holds it."""
    nodes = [node for node in jax.tree.leaves(state, is_leaf=is_injected) if is_injected(node)]
    values = [
        node.hyperparams[name]
        for node in nodes
        for name in names
        if name in node.hyperparams and name not in node.hyperparams_states
    ]
    return values[0] if len(values) == 1 else default


def _rate(state: optax.OptState) -> Any:
    """The learning rate, scheduled or not, if exactly one injected state holds it, otherwise 1."""
    nodes = [node for node in jax.tree.leaves(state, is_leaf=is_injected) if is_injected(node)]
    rates = [n.hyperparams["learning_rate"] for n in nodes if "learning_rate" in n.hyperparams]
    return rates[0] if len(rates) == 1 else 1.0


def _check_injected(state: optax.OptState) -> None:
    """Raises `ValueError` for an injected rate or decay that cannot work, unless it is traced."""
    for node in jax.tree.leaves(state, is_leaf=is_injected):
        for name in ("learning_rate", "weight_decay"):
            value = node.hyperparams.get(name) if is_injected(node) else None
            if value is not None and not isinstance(value, Tracer):
                require_amount(name, float(value))


def _expose(state: optax.OptState, *names: str, value: Scalar) -> optax.OptState:
    """`state` with that hyperparameter, if there is one, set to `value`."""
    if _exposed(state, *names) is None:
        return state

    def replaced(node: Any) -> Any:
        if not is_injected(node):
            return node
        changed = {
            name: value.astype(old.dtype)
            for name, old in node.hyperparams.items()
            if name in names and name not in node.hyperparams_states
        }
        return node._replace(hyperparams={**node.hyperparams, **changed})

    return jax.tree.map(replaced, state, is_leaf=is_injected)
