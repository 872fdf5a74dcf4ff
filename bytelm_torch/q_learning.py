"""The Q-learning optimizers, under the name that people import."""

from bytelm_torch.optimizers.q_learning import (
    EnhancedSGD,
    QLearning,
    q_learning,
    q_learning_metrics,
)

__all__ = ["EnhancedSGD", "QLearning", "q_learning", "q_learning_metrics"]
