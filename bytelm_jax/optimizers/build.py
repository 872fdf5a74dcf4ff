"""Learning-rate schedule, clipping, decay mask, and a builder for each optimizer.

The schedule and the clip are our own formulas, so that the torch twin can compute the same values:
optax's schedules return float32 even in a float64 run, and torch's clip adds 1e-6 to the norm;
either alone makes 200 steps of float64 training differ by 3e-6.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from bytelm.config import (
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    QLearningAdamWConfig,
    QLearningSGDConfig,
    SGDConfig,
)
from bytelm.leaves import decays, is_hidden_matrix
from bytelm.trainable import EVERYTHING, Trainable
from bytelm_jax.optimizers.muon import scale_by_muon
from bytelm_jax.optimizers.q_agent import begin_counting
from bytelm_jax.optimizers.q_learning import (
    QLearningSGDState,
    QLearningWrapperState,
    is_injected,
    q_learning,
    q_learning_metrics,
    q_learning_sgd,
)


def learning_rate_schedule(
    config: OptimizerConfig, steps: int
) -> Callable[[Any], Float[Array, ""]]:
    """Step number, from 0, → learning rate, as `bytelm.schedules` defines it."""
    warmup, floor = config.warmup_steps, config.final_fraction
    begin = config.decay_start(steps)

    def schedule(count: Int[Array, ""]) -> Float[Array, ""]:
        at = jnp.asarray(count).astype(jnp.result_type(float))  # float64 under x64
        rising = (at + 1) / max(warmup, 1)
        if begin is None:
            return config.learning_rate * jnp.where(at < warmup, rising, 1.0)
        done = jnp.clip((at - begin) / max(steps - begin, 1), 0.0, 1.0)
        if config.schedule == "cosine":
            falling = floor + (1 - floor) * 0.5 * (1 + jnp.cos(math.pi * done))
        else:
            falling = floor + (1 - floor) * (1 - done)
        return config.learning_rate * jnp.where(at < warmup, rising, falling)

    return schedule


def global_norm(tree: optax.Updates) -> Float[Array, ""]:
    """Euclidean norm over all leaves, in at least float32."""
    leaves = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in leaves))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """g · min(1, max_norm / ‖g‖), Pascanu et al. 2013; `max_norm=0` leaves g unchanged."""

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None):
        del params
        if max_norm == 0:
            return updates, state
        norm = global_norm(updates)
        scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_mask(params: Mapping[str, Any]) -> dict[str, bool]:
    """Whether weight decay applies, for each parameter."""
    return {name: decays(name) for name in params}


def restrict(
    inner: optax.GradientTransformationExtraArgs, parts: Trainable
) -> optax.GradientTransformationExtraArgs:
    """Applies `inner` to every parameter that is not frozen, and scales its updates by name.

    Frozen parameters have no state, are not part of any norm, are not decayed, and get updates of
    0. A scale multiplies the finished update, so also the decay and what an agent makes of it.
    """

    def init(params: Any) -> optax.OptState:
        return inner.init(without(params, parts.frozen))

    def scaled(moves: Any) -> Any:
        return moves | {k: parts.scales[k] * moves[k] for k in moves.keys() & parts.scales.keys()}

    def update(updates: Any, state: optax.OptState, params: Any = None, **extra: Any):
        moving = None if params is None else without(params, parts.frozen)
        moves: Any
        if parts.scales:  # for what an agent reads of a step
            extra["applied_fn"] = scaled
        moves, state = inner.update(without(updates, parts.frozen), state, moving, **extra)
        moves = scaled(moves)
        return {k: moves[k] if k in moves else jnp.zeros_like(v) for k, v in updates.items()}, state

    changes = parts.frozen or parts.scales
    return optax.GradientTransformationExtraArgs(init, update) if changes else inner


def without(params: Mapping[str, Any], frozen: Collection[str]) -> dict[str, Any]:
    """The parameters that are not called as `frozen` says."""
    return {name: value for name, value in params.items() if name not in frozen}


Build = Callable[[Any, int, ArrayLike], optax.GradientTransformationExtraArgs]
"""`(config, steps, seed) -> optimizer`."""


def build_optimizer(
    config: OptimizerConfig, steps: int, seed: ArrayLike = 0, parts: Trainable = EVERYTHING
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `config` names, for a run of `steps` steps; `update` needs `value=loss`.

    `parts` says which parameters it leaves alone and which move at another rate. `seed` is that of
    an agent's choices; an agent sees the gradient norm before clipping.
    """
    return restrict(BUILDERS[config.name](config, steps, seed), parts)


def _adamw(
    config: AdamWConfig, steps: int, seed: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """Loshchilov & Hutter 2019."""
    del seed
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    return _scheduled(config, steps, optax.chain(adam, _decay(config)))


def _sgd(config: SGDConfig, steps: int, seed: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Heavy-ball momentum with the decay added to the gradient, as in torch.optim.SGD."""
    del seed
    return _scheduled(config, steps, optax.chain(_decay(config), optax.trace(config.momentum)))


def _q_learning_sgd(
    config: QLearningSGDConfig, steps: int, seed: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    return q_learning_sgd(
        learning_rate_schedule(config, steps),
        config.momentum,
        config.weight_decay,
        config.max_grad_norm,
        config.entropy_threshold,
        config.noise_scale,
        config.centralize,
        config.controller,
        seed,
    )


def _q_learning_adamw(
    config: QLearningAdamWConfig, steps: int, seed: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    betas = {"b1": config.beta1, "b2": config.beta2, "eps": config.epsilon}
    adam = optax.inject_hyperparams(optax.scale_by_adam, static_args=("b2", "eps"))(**betas)
    schedule = learning_rate_schedule(config, steps)
    rate = optax.inject_hyperparams(optax.scale_by_learning_rate)(schedule)
    clip = clip_by_global_norm(config.max_grad_norm)
    return q_learning(optax.chain(clip, adam, _decay(config), rate), config.controller, seed)


def _lion(config: LionConfig, steps: int, seed: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Chen et al. 2023."""
    del seed
    lion = optax.scale_by_lion(config.beta1, config.beta2)
    return _scheduled(config, steps, optax.chain(lion, _decay(config)))


def _muon(config: MuonConfig, steps: int, seed: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Muon for the matrices of hidden layers, AdamW at its own rate for all other leaves."""
    del seed
    muon = scale_by_muon(config.beta, config.ns_steps, config.consistent_rms, config.epsilon)
    adam = optax.scale_by_adam(config.adam_beta1, config.adam_beta2, config.epsilon)
    ratio = config.adam_rate / config.learning_rate
    parts: Any = {  # pyright takes the keys of a dictionary for strings alone
        "muon": optax.chain(muon, _decay(config)),
        "adamw": optax.chain(adam, _decay(config), optax.scale(ratio)),
    }

    def kinds(params: Mapping[str, Any]) -> dict[str, str]:
        return {name: "muon" if is_hidden_matrix(name) else "adamw" for name in params}

    return _scheduled(config, steps, optax.partition(parts, kinds))


BUILDERS: dict[str, Build] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "q_learning_sgd": _q_learning_sgd,
    "q_learning_adamw": _q_learning_adamw,
    "lion": _lion,
    "muon": _muon,
}
"""Name → builder of every optimizer in `OPTIMIZER_CONFIGS`."""


def _decay(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.add_decayed_weights(config.weight_decay, mask=decay_mask)


def _scheduled(
    config: OptimizerConfig, steps: int, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`inner` between the clip and the scheduled learning rate."""
    clip = clip_by_global_norm(config.max_grad_norm)
    rate = optax.scale_by_learning_rate(learning_rate_schedule(config, steps))
    return optax.with_extra_args_support(optax.chain(clip, inner, rate))


def at_step(state: optax.OptState, step: int) -> optax.OptState:
    """An optimizer state whose learning-rate schedule stands at `step`.

    The counts of an agent, which also say how much it has seen, begin anew; its table stays.
    """

    def scheduled(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState) or is_injected(node)

    def moved(node: Any) -> Any:
        return node._replace(count=0 * node.count + step) if scheduled(node) else node

    state = jax.tree.map(moved, state, is_leaf=scheduled)
    if isinstance(state, QLearningSGDState | QLearningWrapperState):
        state = state._replace(agent=begin_counting(state.agent))
    return state


def optimizer_metrics(state: optax.OptState) -> dict[str, Array]:
    """The agent's metrics of the last step, as scalars on the device; empty without an agent.

    See `q_learning_metrics`.
    """
    wrapped = isinstance(state, QLearningSGDState | QLearningWrapperState)
    return q_learning_metrics(state) if wrapped else {}
