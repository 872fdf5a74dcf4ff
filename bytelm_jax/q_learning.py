"""The Q-learning optimizers, under the name that people import."""

from bytelm_jax.optimizers.q_learning import (
    q_learning,
    q_learning_metrics,
    q_learning_sgd,
)

__all__ = ["q_learning", "q_learning_metrics", "q_learning_sgd"]
