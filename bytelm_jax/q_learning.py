"""The Q-learning optimizers, under their public name; the module can be called as `q_learning`."""

from bytelm.callable_module import make_callable
from bytelm_jax.optimizers.q_learning import (
    q_learning,
    q_learning_metrics,
    q_learning_sgd,
)

__all__ = ["q_learning", "q_learning_metrics", "q_learning_sgd"]

make_callable(__name__, q_learning)
