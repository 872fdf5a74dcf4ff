"""The Q-learning optimizers, under their public name; the module can be called as `q_learning`."""

from bytelm.callable_module import make_callable
from bytelm_torch.optimizers.q_agent import q_learning_metrics
from bytelm_torch.optimizers.q_learning import EnhancedSGD
from bytelm_torch.optimizers.q_wrapper import QLearning, q_learning

__all__ = ["EnhancedSGD", "QLearning", "q_learning", "q_learning_metrics"]

make_callable(__name__, q_learning)
